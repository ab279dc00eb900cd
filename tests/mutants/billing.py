"""Billing without one of its guards."""

from __future__ import annotations

from tests.mutants.mutant import Edit, Mutant

__all__ = ["MUTANTS"]

OWNER = "app/meterline/billing/owner.py"
INTAKE = "app/meterline/billing/intake.py"
OUTBOUND = "app/meterline/billing/outbound.py"
VALUATION = "app/meterline/billing/valuation.py"
DOMAIN = "app/meterline/domain/billing.py"

GUARDS = "tests/unit/test_guards_billing.py"
UNITS = f"{GUARDS}::test_a_crash_anywhere_bills_the_whole_credits_once"
CREDITS = f"{GUARDS}::test_a_crash_anywhere_leaves_every_credit_in_the_ledger"
ACCOUNTS = "tests/property/test_billing_accounts.py"
INTAKE_TESTS = "tests/unit/test_billing_intake.py"

WRONG = r"wrong == \{\}[\s\S]*(acme|other)"

MUTANTS = [
    Mutant(
        name="intent-before-send",
        removes="requests go out before their records are committed: after a crash a window is valued anew, "
        "under another name",
        edits=[
            Edit(
                OWNER,
                "        committed_at = boot_time()\n",
                "        committed_at = boot_time()\n"
                "        self._outbound.start(attempts, committed_at)\n"
                "        await asyncio.sleep(0.01)\n",
            ),
            Edit(
                OWNER,
                "            self._outbound.start(attempts, committed_at)\n        if valued",
                "        if valued",
            ),
        ],
        tests=[UNITS],
        speaks_of=WRONG,
    ),
    Mutant(
        name="floor",
        removes="units are rounded, not floored: a client pays a credit it has not used up",
        edits=[
            Edit(
                DOMAIN,
                "max(0, credits_micro // unit_micro))",
                "max(0, (credits_micro + unit_micro // 2) // unit_micro))",
            )
        ],
        tests=[ACCOUNTS, UNITS],
        speaks_of=f"{WRONG}|units|credits",
    ),
    Mutant(
        name="remainder-row",
        removes="a change without a whole unit leaves no row: with the state the remainder would be lost",
        edits=[
            Edit(
                VALUATION,
                "            self.state.add_row(advance_row(now_ms, ref, cutoff, key, change))\n"
                "            return None\n",
                "            return None\n",
            )
        ],
        tests=[CREDITS],
        speaks_of=WRONG,
    ),
    Mutant(
        name="remainder-in-the-account",
        removes="the account keeps whole units only: what is below a unit is never billed",
        edits=[
            Edit(
                DOMAIN,
                "        return Account(credits_micro, max(",
                "        return Account(credits_micro // unit_micro * unit_micro, max(",
            )
        ],
        tests=[ACCOUNTS, UNITS],
        speaks_of=f"{WRONG}|floor|sum|credits",
    ),
    Mutant(
        name="verification",
        removes="a snapshot is billed without asking the ledger: the invoice shows what no receipt does",
        edits=[Edit(INTAKE, "            if not equal:\n", "            if False:\n")],
        tests=[
            f"{GUARDS}::test_no_unit_is_sent_for_a_window_unlike_the_ledger",
            f"{INTAKE_TESTS}::test_an_unverified_window_is_worth_nothing",
        ],
        speaks_of=r"units\(\) == \{\}|bench\.take",
    ),
    Mutant(
        name="installation-in-the-identifier",
        removes="two installations on one account give two records one name: Stripe drops the second",
        edits=[
            Edit(
                "app/meterline/domain/usage_records.py",
                '"meterline.usage-record.1", installation_id, client_id,',
                '"meterline.usage-record.1", "", client_id,',
            )
        ],
        tests=[f"{GUARDS}::test_two_installations_on_one_account_both_arrive"],
        speaks_of=r"stripe\.units\(\) == ",
    ),
    Mutant(
        name="older-snapshots",
        removes="a snapshot that comes again or late is taken for news: the window falls back to it",
        edits=[
            Edit(
                DOMAIN,
                "    if known is None or cutoff_offset > known.cutoff_offset:\n",
                "    if known is None or cutoff_offset != known.cutoff_offset:\n",
            )
        ],
        tests=[f"{INTAKE_TESTS}::test_a_new_and_verified_snapshot_is_valued_once", UNITS, CREDITS],
        speaks_of=f"{WRONG}|bench\\.take",
    ),
    Mutant(
        name="known-window",
        removes="a newer snapshot adds all of its credits, not what is new in it: the window is billed twice",
        edits=[
            Edit(
                DOMAIN,
                "    before = known.meters if known else {}\n",
                "    before: Mapping[str, int] = {}\n",
            )
        ],
        tests=[UNITS, CREDITS],
        speaks_of=WRONG,
    ),
    Mutant(
        name="steps-in-the-ledger",
        removes="a lost changelog is taken for a first start: every window is billed again",
        edits=[Edit(OWNER, "        if in_ledger > meta.next_seq:\n", "        if False:\n")],
        tests=[f"{GUARDS}::test_a_lost_changelog_bills_nothing_again"],
        speaks_of=r"units\(\) == before",
    ),
    Mutant(
        name="same-identifier-after-an-unknown-outcome",
        removes="a request without an answer is not made again: units that Stripe never got are lost",
        edits=[
            Edit(
                OUTBOUND,
                "        for record in state.records.values():\n            if not record.held_reason:\n",
                "        for record in state.records.values():\n"
                "            if not record.held_reason and record.first_attempt_at is None:\n",
            )
        ],
        tests=[UNITS],
        speaks_of=WRONG,
    ),
    Mutant(
        name="no-resend-after-23-hours",
        removes="an unknown outcome is retried when Stripe may have forgotten the name: counted twice",
        edits=[
            Edit(
                DOMAIN,
                "now_ms - record.first_attempt_at >= RESEND_MAX_MS:\n",
                "False:\n",
            )
        ],
        tests=["tests/unit/test_billing_outbound.py::test_what_must_not_be_sent_any_more_is_held"],
        speaks_of=r"round\(\) == \[\]|rows\(\)",
    ),
    Mutant(
        name="fresh-commit",
        removes="a stalled owner sends what it committed long ago, after somebody else took over",
        edits=[
            Edit(
                "app/meterline/billing/send.py",
                "        if self._clock() - committed_at > FRESH_S:\n",
                "        if False:\n",
            )
        ],
        tests=["tests/unit/test_billing_outcomes.py::test_a_stale_owner_sends_nothing"],
        speaks_of=r"requests|NOT_SENT",
    ),
]
