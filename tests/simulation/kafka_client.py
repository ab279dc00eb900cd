"""The engine's port to the broker (streaming.broker_log) over the simulated network."""

from __future__ import annotations

from meterline.streaming.owner import LogRange

CLUSTER_ID = "cluster"
BATCH_BYTES_MAX = 300
"""So small that a flush takes several batches, some to one partition."""


def topic_id_of(topic):
    """As stable as Kafka's; topics are not deleted here."""
    return f"id-of-{topic}"


class SimulatedLog:
    """One process's view of a broker: a BrokerLog, and the fetches of a consumer."""

    def __init__(self, world, process):
        self._world = world
        self._process = process
        self._reads = world.connect(process)
        self._fetches = world.connect(process)

    async def read_ranges(self, topic, partitions):
        logs = self._world.broker.logs

        def serve():
            return {p: (logs[topic, p].start, logs[topic, p].stable) for p in partitions}

        ends = await self._reads.call(serve)
        topic_id = topic_id_of(topic)
        return {p: LogRange(CLUSTER_ID, topic, topic_id, p, *ends[p]) for p in partitions}

    async def read_state(self, changelog, partition):
        return await self._reads.call(lambda: self._world.broker.state(changelog, partition))

    def transactional_client(self, transactional_id):
        return SimulatedProducer(self._world, self._process, transactional_id)

    async def fetch(self, topic, positions, records_max):
        """Read_committed, several partitions at once: partition -> Fetched."""
        fetch = self._world.broker.fetch
        return await self._fetches.call(
            lambda: {p: fetch(topic, p, positions[p], records_max) for p in positions}
        )

    def close(self):
        """Connections end with their process."""


class SimulatedProducer:
    """A TransactionalClient: what aiokafka's producer does, without its threads of thought."""

    def __init__(self, world, process, transactional_id):
        self._world = world
        self._process = process
        self._connection = world.connect(process)
        self._id = transactional_id
        self._epoch = -1
        self._acknowledgements = []

    async def start(self):
        self._epoch = await self._connection.call(lambda: self._world.broker.start_producer(self._id))

    async def stop(self):
        """An open transaction stays open."""

    async def begin_transaction(self):
        self._acknowledgements = []

    def create_batch(self):
        return Batch()

    async def send_batch(self, batch, topic, *, partition):
        broker, epoch = self._world.broker, self._epoch
        sending = self._connection.call(
            lambda: broker.produce(self._id, epoch, topic, partition, batch.records)
        )
        acknowledgement = self._process.loop.create_task(sending)
        self._acknowledgements.append(acknowledgement)
        return acknowledgement

    async def commit_transaction(self):
        for acknowledgement in self._acknowledgements:
            await acknowledgement
        await self._connection.call(
            lambda: self._world.broker.end_transaction(self._id, self._epoch, committed=True),
            loses=lambda: self._world.loses_commit(self._process),
        )


class Batch:
    """A BatchBuilder; the first record always fits."""

    def __init__(self):
        self.records = []
        self._bytes = 0

    def append(self, *, key, value, headers, timestamp):
        assert timestamp is None, "the broker stamps"
        self._bytes += len(key or b"") + len(value or b"")
        if self.records and self._bytes > BATCH_BYTES_MAX:
            return None
        self.records.append((key, value, tuple(headers)))
        return True

    def close(self):
        """Nothing to pack."""
