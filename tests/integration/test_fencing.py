"""Whoever starts a partition's producer last owns it: of all others no credit gets into the state."""

from __future__ import annotations

import asyncio
import gc

import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from meterline.streaming import steps
from meterline.streaming.changelog import read_changelog
from meterline.streaming.owner import Commit
from meterline.streaming.steps import Step
from meterline.streaming.transactions import FencedProducer, transactional_client

pytestmark = [pytest.mark.stack, pytest.mark.timeout(120)]


class KilledError(Exception):
    """A process ends here."""


@pytest.fixture
def changelog(settings, unique):
    name = unique("changelog")
    admin = AdminClient(settings.kafka.client_config())
    admin.create_topics([NewTopic(name, 1, 1)])[name].result(30)
    yield name
    admin.delete_topics([name])[name].result(30)


def producers(settings, changelog):
    """Two of one partition: processes that both believe to own it."""
    clients = [transactional_client(settings.kafka, f"{changelog}-0") for _ in range(2)]
    return [FencedProducer(client, changelog, 0) for client in clients]


def commit(credits_micro):
    """A flush after which the client's sum is this."""
    return Commit([(b"acme", str(credits_micro).encode())], (), 0)


def test_a_stalled_owner_that_wakes_up_changes_no_credit(settings, changelog):
    """Its flush is refused, begun or not: the new owner has counted these records already, and more."""

    async def run():
        old, new = producers(settings, changelog)
        await old.start()
        await old.transact(commit(5))
        await new.start()
        await new.transact(commit(12))
        try:
            await old.transact(commit(7))
        except Exception as error:  # noqa: BLE001 - which one depends on where it was (docs of aiokafka)
            refused = type(error).__name__
        else:
            refused = ""
        await new.stop()
        await old.stop()
        return refused

    refused = asyncio.run(run())
    # aiokafka leaves futures behind that nobody asks; Python complains of them here, not amid other work.
    gc.collect()

    assert read_changelog(settings.kafka, changelog, 0) == {b"acme": b"12"}
    assert refused


def test_credits_of_a_flush_that_did_not_commit_are_no_state(settings, changelog):
    """Everything is written but the commit; the next owner goes on from the flush before."""

    def die(step):
        if step is Step.TRANSACTION_PRODUCED:
            raise KilledError

    async def run():
        old, new = producers(settings, changelog)
        await old.start()
        await old.transact(commit(5))
        steps.observe(die)
        with pytest.raises(KilledError):
            await old.transact(commit(7))
        steps.observe(None)
        await new.start()
        state = await asyncio.to_thread(read_changelog, settings.kafka, changelog, 0)
        await new.stop()
        await old.stop()
        return state

    try:
        assert asyncio.run(run()) == {b"acme": b"5"}
    finally:
        steps.observe(None)
