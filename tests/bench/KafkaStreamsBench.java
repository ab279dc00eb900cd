import java.nio.file.Path;
import java.time.Duration;
import java.util.Properties;
import org.apache.kafka.common.serialization.Deserializer;
import org.apache.kafka.common.serialization.LongSerializer;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.kstream.Consumed;
import org.apache.kafka.streams.kstream.Materialized;
import org.apache.kafka.streams.kstream.Produced;
import org.apache.kafka.streams.kstream.Suppressed;
import org.apache.kafka.streams.kstream.Suppressed.BufferConfig;
import org.apache.kafka.streams.kstream.TimeWindows;

/**
 * The Kafka Streams idiom: a tumbling sum per key, exactly once, each window's final result once.
 *
 * Its records are keyed by client and SKU already, and of each event it reads the credits only.
 */
public final class KafkaStreamsBench {
    private static final int HEAD_BYTES = 10;
    private static final int TEXTS_BEFORE_CREDITS = 4;

    public static void main(String[] args) {
        String name = System.getenv("BENCH_NAME");
        Properties settings = new Properties();
        settings.put(StreamsConfig.APPLICATION_ID_CONFIG, name);
        settings.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, System.getenv("BENCH_BROKER"));
        settings.put(StreamsConfig.PROCESSING_GUARANTEE_CONFIG, StreamsConfig.EXACTLY_ONCE_V2);
        settings.put(StreamsConfig.REPLICATION_FACTOR_CONFIG, 1);
        settings.put(StreamsConfig.STATE_DIR_CONFIG, Path.of(System.getenv("BENCH_DATA_DIR")).toString());
        settings.put("auto.offset.reset", "earliest");
        Duration length = Duration.ofMillis(Long.parseLong(System.getenv("BENCH_WINDOW_MS")));
        Deserializer<Long> credits = (topic, value) -> creditsMicro(value);
        var sums = Materialized.<byte[], Long, org.apache.kafka.streams.state.WindowStore<
                org.apache.kafka.common.utils.Bytes, byte[]>>as("sums")
            .withKeySerde(Serdes.ByteArray()).withValueSerde(Serdes.Long());
        StreamsBuilder builder = new StreamsBuilder();
        builder.stream(name, Consumed.with(
                Serdes.ByteArray(), Serdes.serdeFrom(new LongSerializer(), credits)))
            .groupByKey()
            .windowedBy(TimeWindows.ofSizeWithNoGrace(length))
            .reduce(Long::sum, sums)
            .suppress(Suppressed.untilWindowCloses(BufferConfig.unbounded()))
            .toStream((window, sum) -> (window.window().start() + "|" + new String(window.key())).getBytes())
            .to(name + "-sums", Produced.with(Serdes.ByteArray(), Serdes.Long()));
        KafkaStreams streams = new KafkaStreams(builder.build(), settings);
        Runtime.getRuntime().addShutdownHook(new Thread(streams::close));
        streams.start();
    }

    private static long creditsMicro(byte[] value) {
        int[] at = {HEAD_BYTES};
        for (int i = 0; i < TEXTS_BEFORE_CREDITS; i++) {
            int length = (int) number(value, at);
            at[0] += length;
        }
        return number(value, at);
    }

    private static long number(byte[] value, int[] at) {
        long read = 0;
        for (int shift = 0; ; shift += 7) {
            byte next = value[at[0]++];
            read |= (long) (next & 0x7F) << shift;
            if (next >= 0) {
                return (read >>> 1) ^ -(read & 1);
            }
        }
    }
}
