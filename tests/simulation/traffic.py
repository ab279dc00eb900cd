"""What producers publish into the simulated log, told to the model at the same time."""

from __future__ import annotations

from tests.simulation.model import PartitionModel, Published, Usage
from tests.simulation.worker import CODECS
from tests.simulation.world import HORIZON_MS, LENGTH_MS, PARTITIONS

from meterline.contracts.records import event_to_record
from meterline.domain.events import Correction, CorrectionKind, UsageEvent

POISON = b"\xc3\x01 no event"
SOURCE = "usage.events"


class Traffic:
    """Publishes; knows what each record must become."""

    def __init__(self, world):
        self._world = world
        self.models = {partition: PartitionModel(LENGTH_MS, HORIZON_MS) for partition in PARTITIONS}
        self._undecided = {partition: [] for partition in PARTITIONS}
        """Records that the models wait for, in order: [record, None (open) | True (committed) | False]."""
        self._open = {}
        """Partition -> (transactional id, epoch, its undecided entries)."""
        self._transactions = 0

    def publish(self, partition, usage):
        """One record, outside of any transaction. None: poison."""
        published = Published(*self._append(partition, usage), usage)
        self._undecided[partition].append([published, True])
        self._tell_model(partition)
        return published

    def _append(self, partition, usage):
        time = self._world.wall_ms()
        return self._world.append(partition, encoded(usage), key_of(usage)), time

    def publish_in_transaction(self, partition, usages):
        """Records that no reader sees before `decide`, and all that follow them neither."""
        broker = self._world.broker
        if partition in self._open:
            self.decide(partition, committed=True)
        self._transactions += 1
        name = f"producer-{self._transactions}"
        epoch = broker.start_producer(name)
        first, time = broker.logs[SOURCE, partition].end, self._world.wall_ms()
        records = [(key_of(usage), encoded(usage), ()) for usage in usages]
        broker.produce(name, epoch, SOURCE, partition, records)
        entries = [[Published(first + at, time, usage), None] for at, usage in enumerate(usages)]
        self._undecided[partition] += entries
        self._open[partition] = name, epoch, entries
        self._world.tell_news()

    def decide(self, partition, *, committed):
        """End the open transaction of a partition, if there is one."""
        if partition not in self._open:
            return
        name, epoch, _ = self._open[partition]
        if not self._is_given_up(partition):
            self._world.broker.end_transaction(name, epoch, committed=committed)
            self._close(partition, committed=committed)

    def notice_timeouts(self):
        """What the broker gave up, as it does when a producer takes too long, is aborted."""
        for partition in list(self._open):
            self._is_given_up(partition)

    def _is_given_up(self, partition):
        name, epoch, _ = self._open[partition]
        given_up = self._world.broker.ids[name].epoch != epoch
        if given_up:
            self._close(partition, committed=False)
        return given_up

    def _close(self, partition, *, committed):
        _, _, entries = self._open.pop(partition)
        self._world.tell_news()
        for entry in entries:
            entry[1] = committed
        self._tell_model(partition)

    def _tell_model(self, partition):
        waiting = self._undecided[partition]
        while waiting and waiting[0][1] is not None:
            published, is_committed = waiting.pop(0)
            if is_committed:
                self.models[partition].judge(published)

    def owed(self):
        """Client -> billable micro-credits of everything accepted."""
        owed = {}
        for model in self.models.values():
            for client in model.by_client:
                owed[client] = owed.get(client, 0) + model.total(client, 2**63)[1]
        return owed


def encoded(usage):
    """The bytes a producer would send."""
    if usage is None:
        return POISON
    corrects = Correction("e0", CorrectionKind.AMEND, "topic", 0, 1) if usage.is_correction else None
    event = UsageEvent(
        usage.event_id,
        usage.client,
        "task",
        usage.sku,
        usage.credits_micro,
        usage.occurred_at,
        billable=usage.billable,
        corrects=corrects,
    )
    return CODECS["usage-event"].encode(event_to_record(event))


def key_of(usage):
    return usage.client.encode() if isinstance(usage, Usage) else b"acme"
