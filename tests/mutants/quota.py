"""Quota without one of its rules (Q1 to Q9), its cutoff check, or the fsync of its spool."""

from __future__ import annotations

from tests.mutants.mutant import Edit, Mutant

__all__ = ["MUTANTS"]

LUA = "app/meterline/quota/bucket.lua"
MODEL = "app/meterline/domain/buckets.py"
OWNER = "app/meterline/quota/owner.py"
GENERATION = "app/meterline/quota/generation.py"
ATTEMPT = "app/meterline/task/attempt.py"
LEASES = "app/meterline/quota/lease.py"
UNSTATED = "app/meterline/quota/unstated.py"
SPOOL = "app/meterline/task/spool.py"
SEGMENTS = "app/meterline/task/segments.py"

RULES = "tests/contract/test_guards_buckets.py"
OWNER_TESTS = "tests/unit/test_quota_app_owner.py"
GUARDIAN_TESTS = "tests/unit/test_quota_app_guardian.py"
LEASE_TESTS = "tests/unit/test_quota_leases.py"
GUARDS = "tests/unit/test_guards_quota.py"
POWER = f"{GUARDS}::test_a_power_failure_loses_no_credit_of_a_task_that_ended"

AMOUNTS = r"amounts\(b\)"


def _lua(name: str, removes: str, old: str, new: str) -> Mutant:
    """A rule taken out of the script; the model keeps it."""
    return Mutant(
        name=name,
        removes=removes,
        edits=[Edit(LUA, old, new)],
        tests=[RULES],
        speaks_of=AMOUNTS,
    )


def _model(name: str, removes: str, old: str, new: str) -> Mutant:
    """The same rule taken out of the model, which is the fake of users' tests, and the script's oracle."""
    return Mutant(
        name=f"{name}-model",
        removes=removes,
        edits=[Edit(MODEL, old, new)],
        tests=[RULES],
        speaks_of=AMOUNTS,
    )


MUTANTS = [
    _lua(
        "q1-expiry-by-the-log",
        "a hold ends by the wall clock: work that was published in time is not covered any more",
        "      elseif accounted and accounted >= record.time then\n",
        "      else\n",
    ),
    _lua(
        "q1-every-partition",
        "a partition nobody has heard of counts as accounted: the event of a hold may lie there",
        "      if not times[i] then return nil end\n      least = math.min(least, tonumber(times[i]))\n",
        "      if times[i] then least = math.min(least, tonumber(times[i])) end\n",
    ),
    _lua(
        "q2-parts",
        "the first part settles the whole reservation: the rest of the work is not covered",
        "  local rid, final = flat[at + 1], flat[at + 2] == 1\n",
        "  local rid, final = flat[at + 1], true\n",
    ),
    _lua(
        "q2-known-positions",
        "a part that is told again lowers the hold again",
        "      if text ~= '' and find(text, position, 1, true) then\n",
        "      if false then\n",
    ),
    Mutant(
        name="q3-no-void-after-a-spool-write",
        removes="usage that may be durable is voided: its credits are spent a second time",
        edits=[
            Edit(
                ATTEMPT,
                "        except SpoolFailed:\n            desk.holds.drop(self.reservation_id)\n",
                "        except SpoolFailed:\n            desk.holds.drop(self.reservation_id)\n"
                "            await self._void_quietly()\n",
            )
        ],
        tests=[f"{GUARDS}::test_credits_of_usage_that_may_be_durable_stay_reserved"],
        speaks_of=r"== 5",
    ),
    Mutant(
        name="q4-an-id-per-attempt",
        removes="a re-run works on the hold of the first attempt, and loses it with that one's end",
        edits=[
            Edit(
                ATTEMPT,
                "    attempt = secrets.token_hex(ATTEMPT_BYTES)\n",
                '    attempt = "0" * 2 * ATTEMPT_BYTES\n',
            )
        ],
        tests=[f"{GUARDS}::test_two_attempts_at_one_task_hold_credits_each"],
        speaks_of=r"\[10, 5, 0\]",
    ),
    _lua(
        "q4-ended-for-good",
        "a reservation that was voided or has expired is granted again, without a hold",
        "    if record.state ~= 'held' then return record.state == 'settled' and 'd' or 't' end\n",
        "",
    ),
    _lua(
        "q4-same-amount",
        "a larger amount under a known id is granted by the smaller hold",
        "    if record.n ~= n then return format('x %d', record.n) end\n",
        "",
    ),
    _lua(
        "reserve-what-is-there",
        "a reservation is granted whatever is available: oversold",
        "  if left < n then\n",
        "  if false then\n",
    ),
    _lua(
        "q5-covered-by-the-progress",
        "a settle that comes late is provisional though the log has accounted it: counted twice",
        "  source.settled = math.max(source.cutoff, source.progress)\n",
        "  source.settled = source.cutoff\n",
    ),
    _lua(
        "q5-dropped-by-the-progress",
        "an event that changed no total stays provisional for ever",
        "      if progress then drop_provisional(names[i], tonumber(progress)) end\n",
        "",
    ),
    Mutant(
        name="q6-read-to-the-end-first",
        removes="progress is believed before the totals behind it are read: used credits look free",
        edits=[
            Edit(OWNER, "        if at_end:\n            news |=", "        if True:\n            news |="),
        ],
        tests=[OWNER_TESTS],
        speaks_of=r"consumed\) == \(\[\], 100\)",
    ),
    _lua(
        "q7-numbered-statements",
        "an old statement of a lease that comes late is taken for the newest",
        "    if seq <= record.seq then return 'o' end\n",
        "",
    ),
    _lua(
        "q7-raise-what-is-there",
        "a lease grows beyond what is available: oversold",
        "    if hold > standing and (not open or available() < hold - record.hold) then",
        "    if false then",
    ),
    _lua(
        "q7-parts-count-always",
        "the parts of a lapsed lease are forgotten: work that was done is not charged until its total comes",
        "    local refusal = take_parts(at + 6, nil, taken_again and hold or 0)\n",
        "    if not taken_again and (not record or record.state ~= 'held') then return 'l' end\n"
        "    local refusal = take_parts(at + 6, nil, taken_again and hold or 0)\n",
    ),
    Mutant(
        name="q7-lower-before-sending",
        removes="credits of a lease are decided from while they are on their way back: sold twice",
        edits=[
            Edit(
                LEASES,
                "        if self.free > 2 * target:\n            self.free = target\n",
                "        returned = self.free - target if self.free > 2 * target else 0\n",
            ),
            Edit(
                LEASES,
                "            if not await self._say(self._stands_for(), parts):\n",
                "            if not await self._say(self._stands_for() - returned, parts):\n",
            ),
        ],
        tests=[f"{GUARDS}::test_q7_credits_on_their_way_back_are_not_decided_from"],
        speaks_of=r"reserved <= held",
    ),
    Mutant(
        name="q7-stop-at-the-deadline",
        removes="a stalled holder goes on deciding after its lease has lapsed: oversold by what it had left",
        edits=[
            Edit(
                LEASES,
                "        if micro > self.free or now >= self.deadline:\n",
                "        if micro > self.free:\n",
            )
        ],
        tests=[f"{LEASE_TESTS}::test_after_its_deadline_a_lease_decides_nothing"],
        speaks_of=r"lease\.take\([\s\S]*credits_micro=",
    ),
    Mutant(
        name="q7-sums-at-the-last-offset",
        removes="a sum of parts ends with its first event: the credits of the others are spent twice",
        edits=[Edit(UNSTATED, "        if offset > found[0]:", "        if not found[1]:")],
        tests=[f"{LEASE_TESTS}::test_a_statement_carries_one_part_for_each_partition"],
        speaks_of=r"lease_statements",
    ),
    _lua(
        "q8-closed-buckets-grant-nothing",
        "a bucket that is being rebuilt grants: holds and usage it doesn't know yet are spent again",
        "  if not open then return 'c' end\n  local left",
        "  local left",
    ),
    _lua(
        "q8-a-restarted-server-is-not-believed",
        "what a server wrote before its restart is believed: its last second may be missing",
        "local trusted = state[1] == RUN\n",
        "local trusted = state[1] and true\n",
    ),
    _lua(
        "q8-buckets-of-an-older-generation",
        "a bucket of a former generation is gone on with: its holds never end, its totals stand twice",
        "if bucket[1] and bucket[1] ~= gen then",
        "if false then",
    ),
    Mutant(
        name="q8-opened-after-the-last-hold",
        removes="a rebuilt bucket opens before the log has passed the holds that were forgotten",
        edits=[
            Edit(
                GENERATION,
                "    return not known.after_open or clock >= known.closed_at + ttl_max_ms + skew_ms\n",
                "    return True\n",
            )
        ],
        tests=[GUARDIAN_TESTS],
        speaks_of=r"not s\.is_open",
    ),
    _lua(
        "q9-first-baseline-wins",
        "a second baseline of a period, or an old one, gives its budget again",
        "    if period and start <= period then return 'o' end\n",
        "",
    ),
    _lua(
        "grant-once",
        "a grant that is told again is given again",
        "    if grants[id] or call('SISMEMBER', KEYS[7], id) == 1 then return 'o' end\n",
        "",
    ),
    _lua(
        "cutoff-check",
        "an older total that a stalled worker tells last stands: used credits come back",
        "    if cutoff <= source.cutoff then return cutoff == source.cutoff and sum ~= source.life and '!' "
        "or 'o' end\n",
        "",
    ),
    _lua(
        "totals-replace-provisional",
        "what a total holds stays provisional as well: charged twice",
        "    if listed[source.name] then drop_provisional(source.name, cutoff) end\n",
        "",
    ),
    Mutant(
        name="spool-fsync",
        removes="a task is told that its usage is durable before the disk has it",
        edits=[
            Edit(
                SPOOL,
                "        os.fdatasync(self._file)  # its room was taken before: the length doesn't change\n",
                "",
            )
        ],
        tests=[POWER],
        speaks_of=r"credits_left\(slot\) == told",
    ),
    Mutant(
        name="spool-directory-fsync",
        removes="the name of a new segment is not on the disk: a power failure takes the whole file",
        edits=[
            Edit(
                SEGMENTS,
                "        os.fsync(file)\n        sync_directory(slot)\n    except BaseException:",
                "        os.fsync(file)\n    except BaseException:",
            )
        ],
        tests=[POWER],
        speaks_of=r"credits_left\(slot\) == told",
    ),
    _model(
        "q1-expiry-by-the-log",
        "a hold ends by the wall clock",
        "            elif accounted is not None and accounted >= record.time:\n",
        "            else:\n",
    ),
    _model(
        "q1-every-partition",
        "a partition nobody has heard of counts as accounted",
        "if known and len(known) == len(times) else None",
        "if known else None",
    ),
    _model(
        "q2-parts",
        "the first part settles the whole reservation",
        "        _, rid, parts, final = op\n        record",
        "        _, rid, parts, _ = op\n        final = 1\n        record",
    ),
    _model(
        "q2-known-positions",
        "a part that is told again lowers the hold again",
        "            if position not in positions:\n",
        "            if True:\n",
    ),
    _model(
        "q4-ended-for-good",
        "a reservation that has ended is granted again, without a hold",
        '            if known.state != "held":\n'
        '                return "d" if known.state == "settled" else "t"\n',
        "",
    ),
    _model(
        "q4-same-amount",
        "a larger amount under a known id is granted by the smaller hold",
        'return self._granted(known) if known.reserved == n else f"x {known.reserved}"',
        "return self._granted(known)",
    ),
    _model(
        "reserve-what-is-there",
        "a reservation is granted whatever is available",
        '        if self.available < n:\n            return f"r {self.available}"\n',
        "",
    ),
    _model(
        "q5-covered-by-the-progress",
        "a settle that comes late is provisional though the log has accounted it",
        "offset > max(cutoff, self.shard.published_until.get(at, -1))",
        "offset > cutoff",
    ),
    _model(
        "q5-dropped-by-the-progress",
        "an event that changed no total stays provisional for ever",
        "            self._drop(at, self.shard.published_until.get(at, -1))\n",
        "            self._drop(at, -1)\n",
    ),
    _model(
        "q7-numbered-statements",
        "an old statement of a lease that comes late is taken for the newest",
        '        if seq <= record.seq:\n            return "o"\n',
        "",
    ),
    _model(
        "q7-raise-what-is-there",
        "a lease grows beyond what is available",
        "        if hold > standing and (not self._is_open or self.available < hold - record.hold):\n",
        "        if False:\n",
    ),
    _model(
        "q7-parts-count-always",
        "the parts of a lapsed lease are forgotten",
        "        self.provisional |= sources\n        if asserts:\n",
        '        if not asserts and (record is None or record.state != "held"):\n            return "l"\n'
        "        self.provisional |= sources\n        if asserts:\n",
    ),
    _model(
        "q8-closed-buckets-grant-nothing",
        "a bucket that is being rebuilt grants",
        '        if not self.shard.open:\n            return "c"\n        if self.available',
        "        if self.available",
    ),
    _model(
        "q8-a-restarted-server-is-not-believed",
        "what a server wrote before its restart is believed",
        "        return self.generation > 0 and self.run == self.server_run\n",
        "        return self.generation > 0\n",
    ),
    _model(
        "q9-first-baseline-wins",
        "a second baseline of a period, or an old one, gives its budget again",
        "        if self.period_start is not None and start <= self.period_start:\n",
        "        if False:\n",
    ),
    _model(
        "grant-once",
        "a grant that is told again is given again",
        '        if grant_id in self.grants:\n            return "o"\n',
        "",
    ),
    _model(
        "cutoff-check",
        "an older total that a stalled worker tells last stands",
        "        if cutoff <= known_cutoff:\n"
        '            return "!" if cutoff == known_cutoff and life != known_life else "o"\n',
        "",
    ),
]
