"""A stateful stand-in for Stripe on loopback: the same wire, the same rules, no account needed.

It exists so that billing can be proven against the refusals that decide money: duplicates, replayed keys,
old timestamps, concurrent calls. Where Stripe's documentation leaves a choice, the sandbox takes the reading
that is harder on the sender. Run it with `python -m meterline.local.sandbox --port N --state-dir DIR`.

    server          HTTP: keys, headers, idempotency, locks; decides nothing about money
    customers, meters, meter_events, event_summaries    one resource each: its parameters and its rules
    limits          Stripe's numbers and the checks that need only a value and a clock
    state, journal  what is true, and the append-only file it is rebuilt from
"""

from __future__ import annotations

__all__: list[str] = []
