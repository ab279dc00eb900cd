"""How a process tells a retry from two charges under one id."""

from __future__ import annotations

import pytest

from meterline.domain.events import UsageEvent
from meterline.producer.errors import InvalidUsage
from meterline.producer.recent import RecentEvents

EVENT = UsageEvent("e1", "acme", "task-1", "gpu-second", 17_250_000, 1_764_000_000_000)


def test_the_same_event_again_is_a_retry():
    """Time, source and attributes may differ: they are not compared and not billed."""
    recent = RecentEvents()

    assert recent.note(EVENT)
    assert not recent.note(EVENT._replace(occurred_at=5, source="other", attributes={"a": "b"}))


@pytest.mark.parametrize("change", [{"credits_micro": 1}, {"sku": "cpu"}, {"billable": False}])
def test_another_payload_under_one_id_is_an_error(change):
    """Only one of the two would ever be billed: the caller hears of it at once."""
    recent = RecentEvents()
    recent.note(EVENT)

    with pytest.raises(
        InvalidUsage, match=r"already published .* 17\.25 credits of 'gpu-second'.*item=0, item=1"
    ):
        recent.note(EVENT._replace(**change))


def test_the_first_payload_stands():
    """A refused contradiction doesn't replace what was published."""
    recent = RecentEvents()
    recent.note(EVENT)
    with pytest.raises(InvalidUsage):
        recent.note(EVENT._replace(credits_micro=1))

    assert not recent.note(EVENT)


def test_clients_do_not_share_ids():
    """The identity is client and event id together."""
    recent = RecentEvents()
    recent.note(EVENT)

    assert recent.note(EVENT._replace(client_id="other", credits_micro=1))


def test_what_never_left_may_be_published_with_other_credits():
    """An event that found no room in the queue holds no id."""
    recent = RecentEvents()
    recent.note(EVENT)
    recent.forget(EVENT)

    assert recent.note(EVENT._replace(credits_micro=1))


def test_memory_is_bounded_by_forgetting_the_oldest():
    """A worker that runs for a year keeps the newest events only."""
    recent = RecentEvents(events_max=3)
    for number in range(10):
        recent.note(EVENT._replace(event_id=str(number)))

    assert len(recent) == 3
    assert not recent.note(EVENT._replace(event_id="9"))
    assert recent.note(EVENT._replace(event_id="0", credits_micro=1))
