"""A partition that must not go on says why, with the exact range; what may go on does."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from tests.pipeline_books import WINDOW_MS, committed, log_ends, metering_metas
from tests.stacks import own_stack
from tests.worker_processes import ALL, until

pytestmark = [pytest.mark.stack, pytest.mark.timeout(200)]


stack = own_stack()
"""Records of its topics are deleted."""


def applied_offsets(stack):
    return {partition: meta["applied_offset"] for partition, meta in metering_metas(stack).items()}


def is_applied(stack, partitions):
    applied, ends = applied_offsets(stack), log_ends(stack, "usage.events")
    return all(applied.get(partition) == ends[partition] - 1 for partition in partitions)


def work_and_leave(stack, traffic, worker):
    """Some records of every partition are counted; then no worker is there."""
    worker.start_ready()
    traffic.publish(200)
    until(lambda: is_applied(stack, ALL), "all is applied")
    assert worker.terminate() == 0


def test_another_window_length_without_its_time_halts_every_partition(stack, traffic, worker):
    """From when on is not for a worker to say: 503 with both and the settings. With a time it goes on."""
    work_and_leave(stack, traffic, worker)
    before = applied_offsets(stack)
    worker.environment["METERLINE_METERING__WINDOW_LENGTH_MS"] = "2000"
    worker.start()
    traffic.publish(50)

    assert worker.halts() == [
        f"partition {p} halted: usage.events-{p}: its windows are {WINDOW_MS} ms long, the setting says "
        f"2000. Set METERLINE_METERING__WINDOW_LENGTH_MS={WINDOW_MS}; or, if they are to become 2000 ms "
        "long, say from when on: METERLINE_METERING__WINDOW_LENGTH_SINCE"
        for p in ALL
    ]
    assert worker.get_json("/healthz/live")[0] == 200
    assert applied_offsets(stack) == before
    assert worker.terminate() == 0
    worker.environment["METERLINE_METERING__WINDOW_LENGTH_SINCE"] = "2099-12-31T23:00:00Z"
    worker.start_ready()
    until(lambda: is_applied(stack, ALL), "what came meanwhile is applied")
    since = 4_102_441_200_000
    changed = [{"since": 0, "starts": 0, "length_ms": WINDOW_MS}]
    changed.append({"since": since, "starts": since, "length_ms": 2_000})
    assert [meta["lengths"] for meta in metering_metas(stack).values()] == [changed] * len(ALL)


def flood(stack, records_each, clients):
    """Records nobody can read, in every partition, keyed by many clients."""
    producer = Producer(stack.settings.kafka.client_config())
    for number in range(records_each):
        for partition in ALL:
            key = f"client-{number % clients}"
            producer.produce("usage.events", b"not an event", key=key, partition=partition)
    assert producer.flush(30) == 0


def account(stack):
    """`meterline lag --account --json`: exit code and what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "meterline", "lag", "--account", "--json"],
        env=stack.process_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, json.loads(done.stdout)


def test_a_flood_of_dead_letters_halts_and_is_not_sent(stack, traffic, worker):
    """Of 150 in each partition at most 100 are on the topic; let pass, each is there once and counted."""
    work_and_leave(stack, traffic, worker)
    flood(stack, 150, clients=40)
    worker.start()

    until(lambda: len(worker.halts()) == len(ALL), "every partition halts")
    assert all("are dead letters, of" in problem for problem in worker.halts())
    sent = len(committed(stack, "usage.events.dlq"))
    assert sent <= 100 * len(ALL)
    code, told = account(stack)
    assert (code, told["adds_up"]) == (0, True)
    assert sum(one["dead_letters"] for one in told["partitions"]) == sent
    assert all(one["lag"] >= 50 for one in told["partitions"])
    assert worker.terminate() == 0
    worker.environment["METERLINE_METERING__BRAKE_DEAD_LETTERS_MAX"] = "1000"
    worker.start_ready()
    until(lambda: is_applied(stack, ALL), "all is applied")
    assert worker.terminate() == 0

    letters = [(letter.partition(), letter.offset()) for letter in committed(stack, "usage.events.dlq")]
    code, told = account(stack)
    assert len(letters) == 150 * len(ALL)
    assert (code, told["adds_up"]) == (0, True)
    assert [one["dead_letters"] for one in told["partitions"]] == [150] * len(ALL)
    assert [one["lag"] for one in told["partitions"]] == [0] * len(ALL)


def test_records_gone_uncounted_halt_their_partition_alone(stack, traffic, worker, meterline):
    """Retention passed what nobody had counted: that range is named, the other partitions go on; and it, too,
    when a person has accepted exactly that.
    """
    work_and_leave(stack, traffic, worker)
    traffic.publish(200)
    applied, ends = applied_offsets(stack), log_ends(stack, "usage.events")
    gone = max(ALL, key=lambda partition: ends[partition] - applied[partition])
    start = ends[gone] - 2
    assert start > applied[gone] + 1
    admin = AdminClient(stack.settings.kafka.client_config())
    for deleted in admin.delete_records([TopicPartition("usage.events", gone, start)]).values():
        deleted.result(30)
    worker.start()

    why = (
        f"partition {gone} halted: usage.events-{gone}: offsets {applied[gone] + 1}..{start - 1} are gone "
        "from the log and were never counted (retention passed while no worker ran). Publish them again from "
        f"their source where you can. To go on without them: meterline repair state {gone} --accept-gap "
        f"{applied[gone] + 1}..{start - 1} --reason WHY"
    )
    assert worker.halts() == [why]
    others = [partition for partition in ALL if partition != gone]
    assert worker.partitions() == others
    traffic.publish(200)
    until(lambda: is_applied(stack, others), "the others are applied")
    assert applied_offsets(stack)[gone] == applied[gone]
    halted = [line for line in worker.get("/metrics")[1].splitlines() if line.endswith(" 1.0")]
    assert f'meterline_partition_halted{{partition="{gone}"}} 1.0' in halted
    assert worker.terminate() == 0
    gap = f"{applied[gone] + 1}..{start - 1}"
    for wrong in ([], ["--accept-gap", f"{applied[gone] + 1}..{start}"]):
        code, said = meterline("repair", "state", gone, *wrong, "--reason", "a test")
        assert (code, f"--accept-gap {gap}" in said) == (1, True), said
    assert applied_offsets(stack)[gone] == applied[gone]
    code, said = meterline("repair", "state", gone, "--accept-gap", gap, "--reason", "nobody has them")
    assert code == 0, said
    worker.start_ready()
    traffic.publish(50)
    until(lambda: is_applied(stack, ALL), "all is applied")
    meta = metering_metas(stack)[gone]
    counters = meta["counters"]
    assert counters["unknown"] == start - 1 - applied[gone]
    first = counters.pop("first_offset")
    assert sum(counters.values()) == meta["applied_offset"] + 1 - first
