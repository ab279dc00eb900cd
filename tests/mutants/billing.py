"""Billing without one of its guards."""

from __future__ import annotations

from tests.mutants.mutant import Edit, Mutant

__all__ = ["MUTANTS"]

OWNER = "app/meterline/billing/owner.py"
INTAKE = "app/meterline/billing/intake.py"
OUTBOUND = "app/meterline/billing/outbound.py"
DOMAIN = "app/meterline/domain/billing.py"
ACCOUNT = "app/meterline/domain/accounts.py"
BOOKS = "app/meterline/domain/account_books.py"
RECONCILER = "app/meterline/billing/reconciler.py"

GUARDS = "tests/unit/test_guards_billing.py"
UNITS = f"{GUARDS}::test_a_crash_anywhere_bills_the_whole_credits_once"
CREDITS = f"{GUARDS}::test_a_crash_anywhere_leaves_every_credit_in_the_ledger"
ACCOUNTS = "tests/property/test_billing_accounts.py"
INTAKE_TESTS = "tests/unit/test_billing_intake.py"

UNITS_AT_STRIPE = r"stripe\.units\(\)"
WRONG = r"wrong == \{\}[\s\S]*(acme|other)"

MUTANTS = [
    Mutant(
        name="intent-before-send",
        removes="requests go out before their records are committed: after a crash a window is valued anew, "
        "under another name",
        edits=[
            Edit(
                OWNER,
                "        committed_at = parts.clock.boot_s()\n",
                "        committed_at = parts.clock.boot_s()\n"
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
                ACCOUNT,
                "max(0, credits_micro // unit_micro)",
                "max(0, (credits_micro + unit_micro // 2) // unit_micro)",
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
                BOOKS,
                "        record = self._record(key, about, value, now_ms) if value else None\n",
                "        if not value:\n            return None\n"
                "        record = self._record(key, about, value, now_ms) if value else None\n",
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
                ACCOUNT,
                "        return credits_micro, max(",
                "        return credits_micro // unit_micro * unit_micro, max(",
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
        name="another-account",
        removes="the key of another account, or of a wiped one, is as good: units go where nobody pays them",
        edits=[
            Edit(OWNER, "            if name in used and known != ids[name]:\n", "            if False:\n"),
        ],
        tests=[f"{GUARDS}::test_another_stripe_account_is_sent_no_unit"],
        speaks_of=UNITS_AT_STRIPE,
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
        tests=[
            f"{GUARDS}::test_a_lost_answer_is_no_second_unit_when_stripe_has_forgotten_the_name",
            "tests/unit/test_billing_outbound.py::test_what_must_not_be_sent_any_more_is_held",
        ],
        speaks_of=UNITS_AT_STRIPE,
    ),
    Mutant(
        name="fencing-in-billing",
        removes="an owner that the broker refuses goes on: two workers bill one window under two names",
        edits=[
            Edit(
                OWNER,
                "            await self._commit(Commit(changes, (), state.meta.applied_offset))\n"
                "        for _ in batch:\n",
                "            with suppress(Exception):\n"
                "                await self._commit(Commit(changes, (), state.meta.applied_offset))\n"
                "        for _ in batch:\n",
            ),
            Edit(
                OWNER,
                "from collections.abc import Iterable, Mapping, Sequence\n",
                "from collections.abc import Iterable, Mapping, Sequence\nfrom contextlib import suppress\n",
            ),
        ],
        tests=[f"{GUARDS}::test_a_stalled_owner_bills_nothing"],
        speaks_of=UNITS_AT_STRIPE,
    ),
    Mutant(
        name="fresh-commit",
        removes="a stalled owner sends what it committed long ago, after somebody else took over",
        edits=[
            Edit(
                "app/meterline/billing/send.py",
                "        if self._clock.boot_s() - committed_at > FRESH_S:\n",
                "        if False:\n",
            )
        ],
        tests=["tests/unit/test_billing_outcomes.py::test_a_stale_owner_sends_nothing"],
        speaks_of=r"requests|NOT_SENT",
    ),
    Mutant(
        name="clip",
        removes="units may be negative: a client that was owed credits pays for them later",
        edits=[Edit(ACCOUNT, "max(0, credits_micro // unit_micro)", "credits_micro // unit_micro")],
        tests=[ACCOUNTS],
        speaks_of="units",
    ),
    Mutant(
        name="absence",
        removes="a summary is believed while attempts are young: what it doesn't show yet is told twice",
        edits=[Edit(DOMAIN, "ABSENCE_MS = 6 * HOUR_MS\n", "ABSENCE_MS = 0\n")],
        tests=[f"{GUARDS}::test_a_young_attempt_is_not_taken_for_missing"],
        speaks_of="units_counted",
    ),
    Mutant(
        name="reissue-number",
        removes="what is made anew a second time has the first one's name: Stripe takes it for a copy",
        edits=[Edit(BOOKS, "missing, now_ms, reissue=reissue)", "missing, now_ms, reissue=1)")],
        tests=[f"{GUARDS}::test_each_time_anew_is_a_name_of_its_own"],
        speaks_of=UNITS_AT_STRIPE,
    ),
    Mutant(
        name="suspect",
        removes="a notice of a rejection is only listed: the day's units miss their own invoice",
        edits=[Edit(BOOKS, "suspect=True))", "suspect=False))")],
        tests=[f"{GUARDS}::test_a_notice_of_a_rejection_brings_the_units_onto_their_own_invoice"],
        speaks_of=r"invoiced_units",
    ),
    Mutant(
        name="suspect-after-it-was-confirmed",
        removes="a day that was confirmed stays so, whatever Stripe rejects of it later: its units are lost",
        edits=[
            Edit(
                BOOKS,
                "        if what.confirmed and not what.suspect and not unknown:\n",
                "        if what.confirmed and not unknown:\n",
            ),
        ],
        tests=[f"{GUARDS}::test_a_rejection_after_the_day_was_confirmed_is_made_good"],
        speaks_of=UNITS_AT_STRIPE,
    ),
    Mutant(
        name="suspect-waits-too",
        removes="a notice is reason enough to believe the summary of the moment: what it doesn't show yet is "
        "told twice",
        edits=[
            Edit(
                BOOKS,
                "        if now_ms - what.last_attempt_at < ABSENCE_MS:\n",
                "        if now_ms - what.last_attempt_at < ABSENCE_MS and not what.suspect:\n",
            ),
        ],
        tests=[f"{GUARDS}::test_a_young_attempt_is_not_taken_for_missing"],
        speaks_of="units_counted",
    ),
    Mutant(
        name="settled-at-once",
        removes="what was compared with the summary stays under way: its value is told again",
        edits=[
            Edit(
                BOOKS,
                '            self._settle(record, "reconciled", now_ms)\n',
                "            pass\n",
            )
        ],
        tests=[f"{GUARDS}::test_a_request_that_never_arrived_is_made_anew_under_another_name"],
        speaks_of=r"stripe\.units\(\)|reconciled",
    ),
    Mutant(
        name="foreign-usage",
        removes="what somebody else feeds the meter is taken for ours, and taken back from the bill",
        edits=[Edit(BOOKS, "        if summary > what.attempted:\n", "        if False:\n")],
        tests=[f"{GUARDS}::test_usage_of_somebody_else_on_the_meter_moves_no_unit"],
        speaks_of=UNITS_AT_STRIPE,
    ),
    Mutant(
        name="one-commit-close",
        removes="a period is closed in one commit, its carry absorbed in the next: a crash loses it",
        edits=[
            Edit(
                RECONCILER,
                "        made = [self._settled(answer, now_ms) for answer in answers]\n",
                "        made = [self._books.advance(*one) for one in self._later]\n"
                "        self._later.clear()\n"
                "        made += [self._settled(answer, now_ms) for answer in answers]\n",
            ),
            Edit(
                RECONCILER,
                "        self._look_at = 0\n",
                "        self._look_at = 0\n        self._later = books.later = []\n",
            ),
            Edit(
                BOOKS,
                "        return carry, self.advance(current, carry.credits_micro, about, now_ms, "
                'reason="carry")\n',
                '        self.later.append((current, carry.credits_micro, about, now_ms, "carry"))\n'
                "        return carry, None\n",
            ),
        ],
        tests=[f"{GUARDS}::test_a_crash_anywhere_around_a_close_loses_no_credit"],
        speaks_of=WRONG,
    ),
    Mutant(
        name="carry",
        removes="a closed period carries its remainder only: what never arrived is never billed",
        edits=[Edit(BOOKS, "current, carry.credits_micro, about", "current, carry.remainder, about")],
        tests=[f"{GUARDS}::test_a_closed_period_carries_what_its_invoice_left"],
        speaks_of=r"balance_micro|stripe\.units\(\)",
    ),
    Mutant(
        name="invoice-margin",
        removes="usage is sent until its invoice is final: what is under way then is on no invoice",
        edits=[
            Edit(
                DOMAIN,
                "    return period_end + grace_ms - INVOICE_MARGIN_MS\n",
                "    return period_end + grace_ms\n",
            )
        ],
        tests=[f"{GUARDS}::test_what_is_accepted_is_on_its_invoice"],
        speaks_of=r"carried_micro|stripe\.units\(\)",
    ),
    Mutant(
        name="one-call-per-customer",
        removes="several requests of a customer are under way at once: Stripe refuses all but one",
        edits=[
            Edit(
                "app/meterline/billing/queue.py",
                "        self._given.add(lane)\n        return lane, self._lanes[lane].popleft()\n",
                "        waiting = self._lanes[lane]\n        one = waiting.popleft()\n"
                "        if waiting:\n            self._ready.append(lane)\n        return lane, one\n",
            ),
            Edit(
                OUTBOUND,
                "            elif not self._sender.reserve(lane):\n",
                "            elif self._sender.reserve(lane) is None:\n",
            ),
        ],
        tests=[f"{GUARDS}::test_a_customers_units_arrive_one_request_at_a_time"],
        speaks_of=UNITS_AT_STRIPE,
    ),
]
