"""A stateful stand-in for Stripe on loopback: the same wire, the same rules, no account needed.

It exists so that billing can be proven against the refusals that decide money: duplicates, replayed keys,
old timestamps, concurrent calls. Where Stripe's documentation leaves a choice, the sandbox takes the reading
that is harder on the sender. Run it with `meterline sandbox`.

    server, answers, routes, api_key       HTTP
    writes, idempotency                    one write: its key, its locks, its place in the journal
    faults, rate_limits, rules, control    trouble on request, and what Stripe leaves open
    customers, meters, prices, subscriptions, invoices, adjustments, core_events, event_destinations,
    meter_events, v2_meter_events, event_summaries
                                           one resource each: its parameters and its rules
    billed_usage                           what an invoice line counts; shares no code with event_summaries
    clock, periods, timeline               time, and what happens by itself when it has come
    rejections, courier                    reports of what was rejected after its 200; webhooks
    limits                                 Stripe's numbers and the checks that need only a value and a clock
    books, state, journal                  what is true, and the append-only file it is rebuilt from
"""

from __future__ import annotations

__all__: list[str] = []
