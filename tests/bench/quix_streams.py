"""The Quix Streams idiom: a tumbling sum per key, state in RocksDB, each window's final result once.

It runs in an environment of its own and imports nothing of ours. Its records are keyed by client and SKU
already, which spares it the repartition topic that it would need to add up by SKU. Defaults otherwise.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from io import BytesIO
from pathlib import Path

import fastavro
from quixstreams import Application
from quixstreams.models import Deserializer

NAME = os.environ["BENCH_NAME"]
HEAD_BYTES = 10
SCHEMA = fastavro.parse_schema(json.loads(Path(os.environ["BENCH_SCHEMA"]).read_text()))


class UsageAvro(Deserializer):
    """Avro single-object encoding; the schema is taken for granted."""

    def __call__(self, value, ctx):  # noqa: ARG002 - its signature
        return fastavro.schemaless_reader(BytesIO(value[HEAD_BYTES:]), SCHEMA, None)


def main():
    app = Application(
        broker_address=os.environ["BENCH_BROKER"],
        consumer_group=NAME,
        auto_offset_reset="earliest",
        processing_guarantee=os.environ["BENCH_GUARANTEE"],
        state_dir=os.environ["BENCH_DATA_DIR"],
        loglevel="WARNING",
    )
    usage = app.dataframe(app.topic(NAME, key_deserializer="bytes", value_deserializer=UsageAvro()))
    credits_micro = usage.apply(lambda event: event["credits_micro"])
    length = timedelta(milliseconds=int(os.environ["BENCH_WINDOW_MS"]))
    # A window closes with its partition's time; by default it waits for its own key's next event.
    sums = credits_micro.tumbling_window(length).sum().final(closing_strategy="partition")
    sums.to_topic(app.topic(f"{NAME}-sums", key_serializer="bytes", value_serializer="json"))
    app.run()


if __name__ == "__main__":
    main()
