"""Metering without one of its guards."""

from __future__ import annotations

from tests.mutants.mutant import Edit, Mutant

__all__ = ["MUTANTS"]

METER = "app/meterline/metering/meter.py"
OWNER = "app/meterline/metering/owner.py"
CHECKS = "app/meterline/metering/checks.py"
ENGINE = "app/meterline/streaming/engine.py"
TRANSACTIONS = "app/meterline/streaming/transactions.py"

FUNCTION_OF_LOG = "tests/property/test_meter.py::test_everything_that_is_said_is_a_function_of_the_log"
TOTALS_TRUE = "tests/property/test_meter.py::test_totals_and_progress_are_true_for_ever"
CHARGED_ONCE = (
    "tests/property/test_batch_meter.py::test_a_copy_is_charged_once_whatever_slice_its_first_is_in"
)
CHARGED_ONCE_AT_THE_EDGE = (
    "tests/property/test_batch_meter.py::"
    "test_a_copy_as_old_as_the_horizon_is_charged_once_wherever_in_its_slice_the_first_stands"
)
METER_TESTS = "tests/unit/test_metering_meter.py"
GUARDS = "tests/unit/test_guards_metering.py"
CRASH_CREDITS = f"{GUARDS}::test_a_crash_at_any_write_changes_no_credit"
CRASH_COUNTS = f"{GUARDS}::test_a_crash_at_any_write_counts_every_record_once"
PROGRESS = f"{GUARDS}::test_no_progress_is_ahead_of_a_total"
GROUP_OFFSET = f"{GUARDS}::test_the_groups_offset_decides_nothing"
BROKER = "tests/contract/test_broker_log.py"
CRASH_POINTS = "tests/simulation/test_crash_points.py"
HISTORIES = "tests/simulation/test_histories.py"
RED_LIST = "tests/simulation/test_red_list.py"
TWO_VERSIONS = "tests/simulation/test_two_versions.py"
CHANGING_LENGTH = "tests/property/test_meter.py::test_windows_of_changing_length_hold_each_credit_once"
FAST_IS_PLAIN = "tests/property/test_batch_meter.py::test_the_fast_meter_says_what_the_plain_one_says"

LEDGER_ROWS = r"model\.accepted\.items\(\)\} == worker\.ledger"
DEAD = r"model\.dead == worker\.dead"
WINDOWS = r"model\.windows\("
TOTALS = r"model\.totals\("
BOOKS = r"wrong == \{\}[\s\S]*(acme|accepted)"
SIMULATED_BOOKS = r"self\.dead|counted|lacking|model\.|acme|accepted"
STACK_LIMIT_S = 400.0

FLOOD_STOPS = f"{GUARDS}::test_a_flood_of_dead_letters_stops_before_it_is_sent"
FLOOD_RESTARTS = f"{GUARDS}::test_restarts_do_not_drain_the_flood_little_by_little"
REPAIR_STATE = "app/meterline/metering/repair_state.py"
REPAIR_LEDGER = "app/meterline/metering/repair_ledger.py"
TWINS = "app/meterline/domain/twins.py"
REPAIRS = "tests/unit/test_guards_repairs.py"
REPAIRED_BOOKS = r"world\.books\(\) =="
WHOLE_WINDOW = (
    "tests/property/test_meter.py::test_limits_are_those_of_the_whole_window_whatever_memory_has_forgotten"
)
JUDGED_WITH_PAST = f"{METER_TESTS}::test_a_window_that_comes_back_is_judged_with_its_past"
BRAKE = "        check_flood(self._meter.brake.flood, self._log)\n"

MUTANTS = [
    Mutant(
        name="dedupe",
        removes="a copy within the horizon is no duplicate: a resent event is billed twice",
        edits=[
            Edit(
                METER,
                "        first = self.seen.find(identity, self._appended_at, may_be_older=may_be_older)\n",
                "        first = None\n",
            )
        ],
        tests=[FUNCTION_OF_LOG, CRASH_CREDITS],
        speaks_of=f"{LEDGER_ROWS}|{BOOKS}",
    ),
    Mutant(
        name="payload-check",
        removes="same id, other payload passes for a duplicate: the conflict is swallowed",
        edits=[Edit(METER, "            if first != digest:\n", "            if False:\n")],
        tests=[FUNCTION_OF_LOG, CRASH_COUNTS],
        speaks_of=f"{DEAD}|{BOOKS}",
    ),
    Mutant(
        name="horizon-by-wall-of-the-copy",
        removes="the horizon is counted from the copy's own append time: when a broker's clock steps back, "
        "a restarted worker decides otherwise than the one before",
        edits=[
            Edit(
                METER,
                "self.seen.find(identity, self._appended_at,",
                "self.seen.find(identity, record.timestamp,",
            )
        ],
        tests=[
            FUNCTION_OF_LOG,
            f"{METER_TESTS}::test_a_broker_clock_that_steps_back_decides_the_same_after_a_restart",
        ],
        speaks_of=f"{LEDGER_ROWS}|_duplicates",
    ),
    Mutant(
        name="older-slices",
        removes="only the newest slice is searched: a copy an hour later is billed twice",
        edits=[
            Edit(
                "app/meterline/metering/sliced_index.py",
                "            return self._files.find(identity, oldest) if may_be_older else None\n",
                "            return None\n",
            )
        ],
        tests=[FUNCTION_OF_LOG, CHARGED_ONCE],
        speaks_of=f"{LEDGER_ROWS}|charged == credits_charged",
    ),
    Mutant(
        name="older-slices-asked-at-once",
        removes="of ids that come in a crowd all are taken for new: a copy an hour later is billed twice",
        edits=[
            Edit(
                "app/meterline/metering/slices.py",
                "        held: list[bool] = self.may_hold(lows).tolist()\n",
                "        held: list[bool] = [False] * len(lows)\n",
            )
        ],
        tests=[CHARGED_ONCE],
        speaks_of=r"charged == credits_charged",
    ),
    Mutant(
        name="older-slices-of-the-fast-path",
        removes="the kernels take an id of an older slice for new: a copy an hour later is billed twice",
        edits=[
            Edit(
                "app/meterline/metering/fast/batch_meter.py",
                "        records[older, ORDINARY] = 0\n",
                "",
            )
        ],
        tests=[CHARGED_ONCE],
        speaks_of=r"charged == credits_charged",
    ),
    Mutant(
        name="slice-that-leaves-too-early",
        removes="a slice is forgotten one slice too early, while its last ids are within the horizon",
        edits=[
            Edit(
                "app/meterline/metering/slices.py",
                "        oldest = now - self.horizon_ms\n        self._slices",
                "        oldest = now - self.horizon_ms + self.slice_ms\n        self._slices",
            )
        ],
        tests=[CHARGED_ONCE_AT_THE_EDGE],
        speaks_of=r"credits_micro == 7",
    ),
    Mutant(
        name="own-rows-as-duplicates",
        removes="the index is rebuilt from all rows, also those of a flush that did not commit: they swallow "
        "themselves, and are never billed",
        edits=[
            Edit(
                OWNER,
                "ask(queries.dedupe_pages, *where, meta.applied_offset, since, SLICE_IDS_MAX)\n",
                "ask(queries.dedupe_pages, *where, 2**62, since, SLICE_IDS_MAX)\n",
            )
        ],
        tests=[CRASH_CREDITS, CRASH_COUNTS],
        speaks_of=BOOKS,
    ),
    Mutant(
        name="insert-before-commit",
        removes="rows are inserted after the commit: a crash in between loses them from the ledger for ever",
        edits=[
            Edit(
                OWNER,
                """        if flush.accepted:
            with FLUSH_STEP_SECONDS.labels("insert").time():
                await self._tools.writer.insert(EVENTS, EVENT_COLUMNS, flush.rows, flush.block)
            reached(Step.ROWS_INSERTED)
""",
                "",
            ),
            Edit(
                OWNER,
                """        self._meter.committed(flush)
        self._count(flush)
""",
                """        if flush.accepted:
            await self._tools.writer.insert(EVENTS, EVENT_COLUMNS, flush.rows, flush.block)
        self._meter.committed(flush)
        self._count(flush)
""",
            ),
        ],
        tests=[CRASH_CREDITS],
        speaks_of=BOOKS,
    ),
    Mutant(
        name="first-meta-commit",
        removes="no META before the first insert: after a crash the rows look like a lost changelog, and the "
        "partition never counts again",
        edits=[
            Edit(
                OWNER,
                "            await commit(Commit([(meta_key(log.partition), meta.to_bytes())], [], "
                "meta.applied_offset))\n",
                "",
            )
        ],
        tests=[CRASH_CREDITS],
        speaks_of=BOOKS,
    ),
    Mutant(
        name="meta-in-the-transaction",
        removes="META is committed by itself, after the sums: a crash in between folds the records again",
        edits=[
            Edit(
                OWNER,
                "await self._commit(Commit(flush.changelog, outputs, flush.meta.applied_offset))\n",
                "await self._commit(Commit(flush.changelog[:-1], outputs, flush.meta.applied_offset))\n"
                "            meta = flush.changelog[-1:]\n"
                "            await self._commit(Commit(meta, (), flush.meta.applied_offset))\n",
            )
        ],
        tests=[CRASH_CREDITS, CRASH_COUNTS],
        speaks_of=BOOKS,
    ),
    Mutant(
        name="meta-kept-back",
        removes="a flush commits sums without META: after a restart everything is folded again",
        edits=[
            Edit(
                METER,
                "        changelog.append((meta_key(self.partition), flush.meta.to_bytes()))\n",
                "",
            )
        ],
        tests=[CRASH_CREDITS, CRASH_COUNTS],
        speaks_of=BOOKS,
    ),
    Mutant(
        name="resume-behind-meta",
        removes="records that the state accounts for are taken again when the group's offset is behind",
        edits=[
            Edit(
                ENGINE,
                "        if held is None or chunk.offset < held.next_offset:\n",
                "        if held is None:\n",
            ),
            Edit(
                ENGINE,
                "        elif records[0].offset < held.next_offset:\n",
                "        elif False:\n",
            ),
        ],
        tests=[GROUP_OFFSET],
        speaks_of=r"world\.(fates|owed)",
    ),
    Mutant(
        name="resume-ahead-of-meta",
        removes="records between META and a group's offset that is ahead are never counted",
        edits=[
            Edit(
                ENGINE,
                "        if chunk.first_offset > held.next_offset:\n",
                "        if False:\n",
            )
        ],
        tests=[GROUP_OFFSET],
        speaks_of=r"world\.(fates|owed)",
    ),
    Mutant(
        name="resume-from-the-group",
        removes="the whole rule: Faust's committed offset says where to go on, META says nothing",
        edits=[
            Edit(
                "app/meterline/streaming/consumer.py",
                "        if wanted:\n            await self.seek_wait(wanted)\n",
                "        if False:\n            await self.seek_wait(wanted)\n",
            ),
            Edit(
                ENGINE,
                "        if held is None or chunk.offset < held.next_offset:\n",
                "        if held is None:\n",
            ),
            Edit(ENGINE, "        if chunk.first_offset > held.next_offset:\n", "        if False:\n"),
            Edit(ENGINE, "        elif records[0].offset < held.next_offset:\n", "        elif False:\n"),
        ],
        tests=[GROUP_OFFSET],
        speaks_of=r"world\.(fates|owed)",
    ),
    Mutant(
        name="fencing",
        removes="each producer has an id of its own, so that the broker refuses nobody: a stalled owner that "
        "wakes up puts its old sums over the new ones",
        edits=[
            Edit(
                TRANSACTIONS,
                "        transactional_id=transactional_id,\n",
                '        transactional_id=f"{transactional_id}-{asyncio.get_running_loop().time()}",\n',
            )
        ],
        tests=[BROKER],
        speaks_of=r"credits_micro == .*acme",
        limit_s=STACK_LIMIT_S,
    ),
    Mutant(
        name="fencing-by-partition",
        removes="each owner asks for a transactional id of its own: of two, both commit",
        edits=[
            Edit(
                ENGINE,
                "transactional_id_of(self._group, self.source_topic, partition)",
                'f"{self._group}-{self.source_topic}-{partition}-{id(self)}"',
            )
        ],
        tests=[RED_LIST, HISTORIES],
        speaks_of=SIMULATED_BOOKS,
    ),
    Mutant(
        name="fence-before-the-state",
        removes="the state is read before the earlier owner is fenced: what that one commits in between is "
        "counted again",
        edits=[
            Edit(
                ENGINE,
                "        await producer.start()\n        reached(Step.OWNER_FENCED)\n",
                "",
            ),
            Edit(
                ENGINE,
                "        reached(Step.STATE_READ)\n",
                "        await held.producer.start()\n        reached(Step.OWNER_FENCED)\n"
                "        reached(Step.STATE_READ)\n",
            ),
        ],
        tests=[RED_LIST],
        speaks_of=SIMULATED_BOOKS,
    ),
    Mutant(
        name="ranges-after-the-state",
        removes="the end of the log is read first: if another owner counts on in between, the log looks "
        "truncated, and the partition is halted for ever",
        edits=[
            Edit(
                ENGINE,
                "        fenced = await asyncio.gather(*(self._fence(p) for p in new))\n",
                "        ranges = await self._patiently(self._broker.read_ranges, self.source_topic, new)\n"
                "        fenced = await asyncio.gather(*(self._fence(p) for p in new))\n",
            ),
            Edit(
                ENGINE,
                "        ranges = await self._patiently(self._broker.read_ranges, self.source_topic, new)\n"
                "        where",
                "        where",
            ),
        ],
        tests=[CRASH_POINTS],
        speaks_of=r"in why for why in",
    ),
    Mutant(
        name="verdict-of-a-stalled-owner",
        removes="a process that slept while another began to count finds rows and no state: it halts a "
        "partition that is well",
        edits=[
            Edit(
                ENGINE,
                "            if held.state != await self._patiently(self._broker.read_state, "
                "self._changelog, held.number):\n",
                "            if False:\n",
            )
        ],
        tests=[CRASH_POINTS],
        speaks_of=r"in why for why in",
    ),
    Mutant(
        name="uncommitted-state",
        removes="the changelog is read uncommitted: a flush that was aborted becomes state, its windows are "
        "never published",
        edits=[
            Edit(
                "app/meterline/streaming/committed.py",
                '"isolation.level": "read_committed"',
                '"isolation.level": "read_uncommitted"',
            )
        ],
        tests=[BROKER],
        speaks_of=r"credits_micro == .*acme",
        limit_s=STACK_LIMIT_S,
    ),
    Mutant(
        name="topic-id-check",
        removes="a re-created topic is taken for the old one: its first records are skipped, the rest is "
        "billed under the old name",
        edits=[
            Edit(CHECKS, "    if meta.topic_id != log.topic_id:\n", "    if False:\n"),
        ],
        tests=[f"{GUARDS}::test_nothing_of_a_recreated_topic_is_counted_under_the_old_state"],
        speaks_of=r"world\.books\(\) == before",
    ),
    Mutant(
        name="late-snapshot",
        removes="a window that was published is never published again: late events stay off the bill",
        edits=[
            Edit(
                METER,
                "if window.published_cutoff < 0 or not self._is_fresh(start, client, now_ms):\n",
                "if window.published_cutoff < 0:\n",
            )
        ],
        tests=[FUNCTION_OF_LOG, CRASH_CREDITS],
        speaks_of=f"{WINDOWS}|{BOOKS}",
    ),
    Mutant(
        name="late-snapshot-after-a-crash",
        removes="the state doesn't tell that a published window has changed: a crash before its late one "
        "keeps the credits off the bill",
        edits=[
            Edit(
                METER,
                "            if window.last_offset > window.published_cutoff:\n"
                "                self._unpublished.setdefault(start, set()).add(client)\n"
                "\n    def adopt",
                "            if window.published_cutoff < 0:\n"
                "                self._unpublished.setdefault(start, set()).add(client)\n"
                "\n    def adopt",
            )
        ],
        tests=[
            FUNCTION_OF_LOG,
            CRASH_CREDITS,
            f"{METER_TESTS}::test_a_late_snapshot_that_is_due_survives_a_crash",
        ],
        speaks_of=f"{WINDOWS}|{BOOKS}|partition\\.said",
    ),
    Mutant(
        name="past-of-an-evicted-window",
        removes="a late event's window is published without what memory has forgotten: the bill shrinks",
        edits=[
            Edit(
                METER,
                "        return self.end_of(start) <= self.watermark\n",
                "        return False\n",
            )
        ],
        tests=[FUNCTION_OF_LOG, CRASH_CREDITS],
        speaks_of=f"{WINDOWS}|{BOOKS}",
    ),
    Mutant(
        name="length-from-now-on",
        removes="windows have another length at once, where the older ones hold events already: a window is "
        "published that says less than its events",
        edits=[
            Edit(
                CHECKS,
                "length_ms, since, meta.appended_at + FUTURE_MAX_MS + 1)",
                "length_ms, since, 0)",
            )
        ],
        tests=[CHANGING_LENGTH],
        speaks_of=f"{WINDOWS}|credits_micro",
    ),
    Mutant(
        name="one-length-in-the-kernel",
        removes="the kernel puts every event into windows of one length, also those of before a change",
        edits=[
            Edit(
                "app/meterline/metering/fast/batch_meter.py",
                "            records[lengths != self._length, ORDINARY] = 0\n",
                "",
            )
        ],
        tests=[FAST_IS_PLAIN],
        speaks_of=r"plain == fast",
    ),
    Mutant(
        name="new-rules-for-what-was-begun",
        removes="a newer version decides anew what an older one has inserted and not committed: a row is in "
        "the ledger that no window holds",
        edits=[
            Edit(
                "app/meterline/metering/state.py",
                "            older_rules = (*open_ones, (log_end - 1, self.rules))\n",
                "            older_rules = tuple(open_ones)\n",
            )
        ],
        tests=[TWO_VERSIONS],
        speaks_of=SIMULATED_BOOKS,
    ),
    Mutant(
        name="limits-with-the-past",
        removes="a window that comes back is judged by its new events alone: the sum passes a limit when it "
        "is accepted, and no worker can write it down",
        edits=[
            Edit(
                METER,
                "        skus = window.skus if window is not None else self._pasts.get(key, {})\n",
                "        skus = window.skus if window is not None else {}\n",
            ),
            Edit(
                METER,
                "        window.skus[event.sku] = total\n",
                "        _merge(window, event.sku, total)\n",
            ),
            Edit(
                METER,
                "def _add(sums: SkuTotal, event: UsageEvent) -> None:\n",
                "def _merge(window: OpenWindow, sku: str, new: SkuTotal) -> None:\n"
                "    old = window.skus.setdefault(sku, new)\n"
                "    if old is not new:\n"
                "        old.count += new.count\n"
                "        old.credits_micro += new.credits_micro\n"
                "        old.free_count += new.free_count\n"
                "        old.free_credits_micro += new.free_credits_micro\n"
                "\n\n"
                "def _add(sums: SkuTotal, event: UsageEvent) -> None:\n",
            ),
        ],
        tests=[WHOLE_WINDOW, JUDGED_WITH_PAST],
        speaks_of=f"{LEDGER_ROWS}|{DEAD}|flush\\.accepted|dead\\.reason",
    ),
    Mutant(
        name="brake",
        removes="a flood of dead letters stops nothing: one wrong deployment drains the topic",
        edits=[Edit(OWNER, BRAKE, "")],
        tests=[FLOOD_STOPS, FLOOD_RESTARTS],
        speaks_of=r"len\(world\.dead_letters\)",
    ),
    Mutant(
        name="brake-order",
        removes="the brake is judged when the dead letters are sent: the flood that trips it is in the topic",
        edits=[
            Edit(OWNER, BRAKE, ""),
            Edit(
                OWNER,
                "        self._meter.committed(flush)\n",
                "        self._meter.committed(flush)\n" + BRAKE,
            ),
        ],
        tests=[FLOOD_STOPS],
        speaks_of=r"len\(world\.dead_letters\)",
    ),
    Mutant(
        name="brake-after-a-restart",
        removes="a restart forgets what the brake has counted: each one sends as many dead letters again",
        edits=[
            Edit(METER, "                self.brake.restore(value)\n", "                pass\n"),
        ],
        tests=[FLOOD_RESTARTS],
        speaks_of=r"len\(world\.dead_letters\)",
    ),
    Mutant(
        name="idle-watermark",
        removes="wall time never closes a window: credits before a pause are not billed until more come",
        edits=[
            Edit(
                METER,
                "        self.watermark = max(self.watermark, to)\n",
                "        del to\n",
            )
        ],
        tests=[
            FUNCTION_OF_LOG,
            CRASH_CREDITS,
            f"{METER_TESTS}::test_wall_time_closes_a_window_when_nothing_is_pending",
        ],
        speaks_of=f"{WINDOWS}|{BOOKS}|s\\.cutoff_offset",
    ),
    Mutant(
        name="event-of-the-future",
        removes="an event far ahead is accepted: it moves the watermark, and closes every window",
        edits=[
            Edit(
                "app/meterline/domain/events.py",
                "    if event.occurred_at > appended_at + FUTURE_MAX_MS:\n",
                "    if False:\n",
            )
        ],
        tests=[FUNCTION_OF_LOG],
        speaks_of=f"{LEDGER_ROWS}|{DEAD}",
    ),
    Mutant(
        name="totals-before-progress",
        removes="the progress is written before its totals: a bucket drops what it holds too early",
        edits=[
            Edit(
                OWNER,
                "        outputs += [total_output(total, tools.totals) for total in flush.totals]\n",
                "",
            ),
            Edit(
                OWNER,
                "            outputs.append(progress_output(flush.progress, tools.progress))\n",
                "            outputs.append(progress_output(flush.progress, tools.progress))\n"
                "        outputs += [total_output(total, tools.totals) for total in flush.totals]\n",
            ),
        ],
        tests=[PROGRESS],
        speaks_of=r"too_early == \{\}[\s\S]*acme",
    ),
    Mutant(
        name="progress-beyond-an-unpublished-total",
        removes="only the totals of the newest flush are published, the progress passes the others",
        edits=[
            Edit(
                METER,
                "            for client in sorted(self._unpublished_totals)\n",
                "            for client in sorted(self._changed_totals)\n",
            )
        ],
        tests=[TOTALS_TRUE, PROGRESS],
        speaks_of=f"{TOTALS}|too_early == ",
    ),
    Mutant(
        name="unpublished-totals-after-a-crash",
        removes="a restart forgets which totals are unpublished, and its progress passes them",
        edits=[
            Edit(
                METER,
                "                if total.last_offset > self.meta.published_until:\n",
                "                if False:\n",
            )
        ],
        tests=[TOTALS_TRUE, PROGRESS],
        speaks_of=f"{TOTALS}|too_early == ",
    ),
    Mutant(
        name="progress-time-of-the-newest-record",
        removes="the log's clock passes records that may still come with the same append time: their holds "
        "expire before they are counted",
        edits=[
            Edit(
                METER,
                "self._caught_up_until, self._appended_at - 1)",
                "self._caught_up_until, self._appended_at)",
            )
        ],
        tests=[TOTALS_TRUE],
        speaks_of=r"timestamp > progress\.accounted_until",
    ),
    Mutant(
        name="ledger-equals-state",
        removes="a state unlike the ledger is gone on with: what is billed has no receipt",
        edits=[Edit(CHECKS, "    if sums == _count_equal(kept, in_ledger):\n", "    if True:\n")],
        tests=["tests/unit/test_metering_state.py::test_a_window_that_differs_halts_with_both_amounts"],
        speaks_of=r"PartitionHalted",
    ),
    Mutant(
        name="state-from-fewer-rows",
        removes="a state is made of fewer rows than were accepted: usage counted a moment ago is forgotten",
        edits=[
            Edit(
                REPAIR_STATE,
                "    _require_counted_rows(tools, log, meta)\n    require_whole_ledger(tools, evidence)\n",
                "    require_whole_ledger(tools, evidence)\n",
            )
        ],
        tests=[REPAIRS],
        speaks_of=REPAIRED_BOOKS,
    ),
    Mutant(
        name="lost-state-from-fewer-rows",
        removes="a lost state is made of less than the totals that were published: a row that is lost with "
        "it is never billed",
        edits=[
            Edit(
                REPAIR_STATE,
                "    require_whole_ledger(tools, evidence)\n    first = min(",
                "    first = min(",
            )
        ],
        tests=[REPAIRS],
        speaks_of=REPAIRED_BOOKS,
    ),
    Mutant(
        name="wrong-windows-stay",
        removes="after a wrong state its windows count as published: the bill stays wrong",
        edits=[Edit(REPAIR_STATE, "keep_published=agrees)", "keep_published=True)")],
        tests=[REPAIRS],
        speaks_of=REPAIRED_BOOKS,
    ),
    Mutant(
        name="any-rows-are-inserted",
        removes="rows that are decided again go in, whether or not the ledger is right then: a copy for its "
        "lost first, and later both",
        edits=[
            Edit(REPAIR_LEDGER, "    _require_equal(tools, evidence, meta, plan)\n    return", "    return")
        ],
        tests=[REPAIRS],
        speaks_of=REPAIRED_BOOKS,
    ),
    Mutant(
        name="rows-in-forgotten-windows",
        removes="the missing rows are compared with no window that the state has forgotten: a copy takes the "
        "place of its lost first, in a window that was billed without it",
        edits=[Edit(REPAIR_LEDGER, "    _require_told_windows(tools, plan)\n\n\ndef", "\n\ndef")],
        tests=[REPAIRS],
        speaks_of=r"world\.accepted|world\.books",
    ),
    Mutant(
        name="range-without-what-is-below",
        removes="a range is decided as if nothing was before it: the copies in it are missing rows",
        edits=[
            Edit(
                REPAIR_LEDGER,
                "    for page in tools.ledger.ask(queries.dedupe_pages, *before, since, SLICE_IDS_MAX):\n",
                "    for page in ():\n",
            )
        ],
        tests=[REPAIRS],
        speaks_of=REPAIRED_BOOKS,
    ),
    Mutant(
        name="twins-taken-back-again",
        removes="an audit doesn't look whether a copy was taken back: beyond the horizon of its correction "
        "it is, once more",
        edits=[
            Edit(
                TWINS,
                "(verdict.reversed_before if copy.is_corrected else verdict.twins).append(copy)",
                "verdict.twins.append(copy)",
            )
        ],
        tests=[REPAIRS],
        speaks_of=REPAIRED_BOOKS,
    ),
    Mutant(
        name="one-correction-for-all-copies",
        removes="the correction is named by the event, not by the copy: of three copies two stay billed",
        edits=[
            Edit(
                TWINS,
                "event_id=twin_correction_id(copy.topic_id, copy.partition, copy.offset)",
                "event_id=twin_correction_id(copy.topic_id, copy.partition, 0)",
            )
        ],
        tests=[REPAIRS],
        speaks_of=REPAIRED_BOOKS,
    ),
    Mutant(
        name="conflicts-taken-back",
        removes="the audit takes back any later copy, also one with another payload: usage nobody has judged",
        edits=[Edit(TWINS, "        if copy.payload_digest in payloads:\n", "        if payloads:\n")],
        tests=["tests/unit/test_twins.py"],
        speaks_of=r"sum\(payloads\) == left",
    ),
]
