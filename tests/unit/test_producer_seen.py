"""How equal and contradicting rows of a file are found."""

from __future__ import annotations

from meterline.domain.events import UsageEvent
from meterline.producer.seen import SeenEvents

EVENT = UsageEvent("e1", "acme", "task-1", "gpu-second", 17_250_000, 1_764_000_000_000)


def test_a_second_copy_names_the_first_line_and_whether_it_is_equal():
    """The first stands: later copies are compared with it, whatever came in between."""
    with SeenEvents() as seen:
        assert seen.note(EVENT, 2) is None
        assert seen.note(EVENT._replace(event_id="e2"), 3) is None
        assert seen.note(EVENT._replace(client_id="other"), 4) is None
        assert seen.note(EVENT._replace(credits_micro=1), 5) == (2, False)
        assert seen.note(EVENT._replace(occurred_at=1), 6) == (2, True)
