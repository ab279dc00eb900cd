"""One of the racing processes: `python -m tests.proof.racer PLAN.json`.

It runs its tasks through the public API of credit buckets, writes what it does into its own log, and kills
itself where the plan says. Started again, it first brings what it had done to its end (as a worker's spool
does), then runs what is unfinished again, under new reservations and the same event ids.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

from tests.proof.attempts import Attempt, RacerPlan, Unit, former_attempts
from tests.proof.task_log import TaskLog, now_ms, read_lines
from tests.proof.tasks import Spec, spec_of

from meterline.domain.events import UsageEvent
from meterline.producer import UsageProducer
from meterline.producer.usage import Acknowledged
from meterline.quota import (
    CreditBuckets,
    CreditsExhausted,
    LeasePlan,
    Part,
    QuotaUnavailable,
    ReservationLapsed,
)
from meterline.settings import load_settings

DECISION_MS = 2_000
"""The machine is busy with restarts: a decision may take a while."""
SAME_ID_S = 3.0
"""Nobody decided: so long the same reservation is asked for again, then another one."""
TRIES_S = 180.0
REFUSED_AGAIN, REFUSED_PAUSE_S = 2, (0.2, 1.0)
"""A refused task asks again a little later: other work may have cost less than was set aside for it."""
PAUSE_S = 0.2
OUTLIVE_S = (1.5, 3.0)
"""A late task goes on for so long after its deadline (in times of the time to live)."""


class Racer:
    """The tasks of one process, on one event loop."""

    def __init__(
        self, plan: RacerPlan, log: TaskLog, buckets: CreditBuckets, producer: UsageProducer, life: int
    ) -> None:
        self._plan, self._log, self._buckets, self._producer = plan, log, buckets, producer
        self._chance = random.Random(f"{plan.seed}/{plan.slot}/life {life}")
        self._kill_at = ""
        self._left = self._chance.randint(1, plan.kill_within)
        self._attempts: Counter[str] = Counter()

    # -- after a restart

    async def recover(self, lines: list[Mapping[str, Any]]) -> set[str]:
        """Bring to its end what former lives have begun. The tasks that are done."""
        attempts, ended, done = former_attempts(lines)
        killed = sum(line["do"] == "kill" for line in lines)
        self._kill_at = self._plan.kills[killed] if killed < len(self._plan.kills) else ""
        self._attempts.update(line["task"] for line in lines if line["do"] == "ask")
        await asyncio.gather(*(self._end(one) for one in attempts.values() if one.rid not in ended))
        return done

    async def _end(self, attempt: Attempt) -> None:
        rid = attempt.rid
        if rid is None:
            await self._publish_rest(attempt)
        elif attempt.units:
            await self._renew(rid)
            await self._publish_rest(attempt)
            await self._settle(attempt, final=True)
            self._log.note("end", rid=rid, how="settled")
        elif attempt.is_void or self._chance.random() < 0.5:
            await self._void(rid)
        else:
            self._log.note("end", rid=rid, how="left")

    # -- tasks

    async def run(self, done: set[str]) -> None:
        """All that is not done, so many at a time."""
        plan = self._plan
        specs = [
            spec_of(plan.seed, plan.slot, number, late=plan.late, pause_s=plan.pause_s)
            for number in range(plan.tasks)
        ]
        waiting = iter([spec for spec in specs if spec.name not in done])

        async def lane() -> None:
            for spec in waiting:
                await self._run(spec)

        async with asyncio.TaskGroup() as group:
            for _ in range(plan.concurrency):
                group.create_task(lane())

    async def _run(self, spec: Spec) -> None:
        how = "unreserved" if spec.kind == "unreserved" else ""
        if spec.kind == "unreserved":
            await self._work_unreserved(spec)
        elif spec.kind == "cancel":
            job = asyncio.create_task(self._attempt(spec))
            asyncio.get_running_loop().call_later(spec.cancel_after_s, job.cancel)
            with suppress(asyncio.CancelledError):
                how = await job
            how = how or "cancelled"
        else:
            how = await self._attempt(spec)
            for _ in range(REFUSED_AGAIN):
                if how == "refused":
                    await asyncio.sleep(self._chance.uniform(*REFUSED_PAUSE_S))
                    how = await self._attempt(spec)
            if spec.kind == "rerun" and how == "settled":
                how = await self._attempt(spec)
        await self._log.write("done", task=spec.name, how=how)

    async def _attempt(self, spec: Spec) -> str:
        """Reserve, work, publish, settle; how it ended."""
        granted, rid = await self._reserve(spec)
        if not granted:
            return "refused"
        attempt = Attempt(rid)
        try:
            self._reached("reserved")
            if spec.kind == "void":
                await asyncio.sleep(spec.pause_s)
                await self._void(rid)
                return "voided"
            for number, micro in enumerate(spec.units):
                await self._unit(spec, attempt, number, micro)
            if spec.kind == "conflict":
                await self._contradict(spec, attempt)
            await self._settle(attempt, final=True)
            self._reached("settled")
        except asyncio.CancelledError:
            if attempt.units:  # published, or about to be: never void; the log's clock ends the hold
                await self._publish_rest(attempt)
                self._log.note("end", rid=rid, how="left")
            else:
                await self._void(rid)
            raise
        self._log.note("end", rid=rid, how="settled")
        return "settled"

    async def _unit(self, spec: Spec, attempt: Attempt, number: int, micro: int) -> None:
        await asyncio.sleep(spec.pause_s)
        # Who is to die right after it renews with each task: a few renew by themselves, and in a short race
        # those may all have been refused.
        if spec.kind == "renew" or self._kill_at == "renewed":
            await self._renew(attempt.rid)
            self._reached("renewed")
        if spec.kind == "long":
            await asyncio.sleep(self._chance.uniform(*OUTLIVE_S) * self._plan.ttl_s)
        await self._work(attempt, Unit(spec.event_id(number), spec.name, spec.sku(number), micro))
        if spec.kind == "parts":
            await self._settle(attempt, final=False)

    async def _work(self, attempt: Attempt, unit: Unit) -> None:
        """Do it, say so, publish it."""
        attempt.units.append(unit)
        facts = {"task": unit.task, "event": unit.event_id, "sku": unit.sku, "micro": unit.micro}
        await self._log.write("work", rid=attempt.rid, **facts)
        self._reached("worked")
        await self._publish_unit(attempt, unit)

    async def _work_unreserved(self, spec: Spec) -> None:
        attempt = Attempt(None)
        for number, micro in enumerate(spec.units):
            await asyncio.sleep(spec.pause_s)
            await self._work(attempt, Unit(spec.event_id(number), spec.name, spec.sku(number), micro))

    async def _contradict(self, spec: Spec, attempt: Attempt) -> None:
        """Other credits under an id that Kafka has."""
        self._log.note("conflict", rid=attempt.rid, event=spec.event_id(0), micro=spec.conflict)
        unit = Unit(spec.event_id(0), spec.name, spec.sku(0), spec.conflict)
        attempt.others.append((await self._publish(attempt.rid, unit), spec.conflict))

    # -- Kafka

    async def _publish_unit(self, attempt: Attempt, unit: Unit) -> None:
        sending = asyncio.ensure_future(self._publish(attempt.rid, unit))
        await asyncio.sleep(0)
        self._reached("published")
        unit.place = await sending
        place = {"partition": unit.place.partition, "offset": unit.place.offset}
        self._log.note("ack", rid=attempt.rid, event=unit.event_id, micro=unit.micro, **place)
        self._reached("acknowledged")

    async def _publish_rest(self, attempt: Attempt) -> None:
        waiting = [unit for unit in attempt.units if unit.place is None]
        await asyncio.gather(*(self._publish_unit(attempt, unit) for unit in waiting))

    async def _publish(self, rid: str | None, unit: Unit) -> Acknowledged:
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Any] = loop.create_future()

        def answer(outcome: object) -> None:
            if not answered.done():
                answered.set_result(outcome)

        event = UsageEvent(
            event_id=unit.event_id,
            client_id=self._plan.client_id,
            correlation_id=unit.task,
            sku=unit.sku,
            credits_micro=unit.micro,
            occurred_at=now_ms(),
            source=f"racer-{self._plan.slot}",
            reservation_id=rid,
        )
        self._producer.forward(event, lambda outcome: loop.call_soon_threadsafe(answer, outcome))
        outcome = await answered
        if not isinstance(outcome, Acknowledged):
            raise outcome
        return outcome

    # -- credits

    async def _reserve(self, spec: Spec) -> tuple[bool, str]:
        """Asked for until somebody decides."""
        deadline = time.monotonic() + TRIES_S
        while True:
            self._attempts[spec.name] += 1
            rid = f"{spec.name}:{self._attempts[spec.name]}"
            try:
                decided = await self._reserve_once(spec, rid)
            except asyncio.CancelledError:
                await self._void(rid)
                raise
            if decided is not None:
                return decided, rid
            await self._void(rid)  # it may have been granted, and only the answer is missing
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody decided about {spec.name} for {TRIES_S:.0f} s")

    async def _reserve_once(self, spec: Spec, rid: str) -> bool | None:
        log, plan, micro = self._log, self._plan, spec.reserve
        await log.write("ask", rid=rid, task=spec.name, micro=micro)
        asked, stop = now_ms(), time.monotonic() + SAME_ID_S
        while True:
            try:
                got = await self._buckets.reserve(
                    plan.client_id, Decimal(micro).scaleb(-6), reservation_id=rid, ttl_s=plan.ttl_s
                )
            except CreditsExhausted as error:
                log.note("refused", rid=rid, micro=micro, available=int(error.available.scaleb(6)))
                log.note("end", rid=rid, how="refused")
                return False
            except QuotaUnavailable:
                if time.monotonic() > stop:
                    return None
                await asyncio.sleep(PAUSE_S)
                continue
            assert (got.covered, got.done) == (True, False), got
            log.note("granted", rid=rid, micro=micro, until=asked + int(plan.ttl_s * 1_000))
            return True

    async def _settle(self, attempt: Attempt, *, final: bool) -> None:
        """Name what was not named yet; the last call names everything again."""
        units = attempt.units if final else attempt.units[attempt.settled :]
        places = [(unit.place, unit.micro) for unit in units] + (attempt.others if final else [])
        named = [[place.partition, place.offset, micro] for place, micro in places]
        self._log.note("settle", rid=attempt.rid, parts=named, final=final)
        parts = [Part(self._plan.topic_id, *one) for one in named]
        await _until_decided(
            lambda: self._buckets.settle(attempt.rid, parts, final=final, client_id=self._plan.client_id)
        )
        attempt.settled = len(attempt.units)

    async def _renew(self, rid: str) -> None:
        asked = now_ms()
        try:
            await _until_decided(
                lambda: self._buckets.renew(rid, self._plan.ttl_s, client_id=self._plan.client_id)
            )
        except ReservationLapsed:
            self._log.note("lapsed", rid=rid)
        else:
            self._log.note("renewed", rid=rid, until=asked + int(self._plan.ttl_s * 1_000))

    async def _void(self, rid: str) -> None:
        self._log.note("void", rid=rid)
        await _until_decided(lambda: self._buckets.void(rid, client_id=self._plan.client_id))
        self._log.note("end", rid=rid, how="voided")

    def _reached(self, step: str) -> None:
        """Die here, if the plan says so."""
        if step != self._kill_at:
            return
        self._left -= 1
        if self._left <= 0:
            self._log.write_now("kill", kind=step)
            os.kill(os.getpid(), signal.SIGKILL)


async def _until_decided(call: Callable[[], Awaitable[object]]) -> None:
    deadline = time.monotonic() + TRIES_S
    while True:
        try:
            await call()
        except QuotaUnavailable:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(PAUSE_S)
        else:
            return


async def race(plan: RacerPlan) -> None:
    """One life."""
    settings = load_settings()
    path = Path(plan.log)
    lines = list(read_lines(path))
    log = TaskLog(path)
    life = sum(line["do"] == "start" for line in lines)
    log.write_now("start", life=life)
    leases = None
    if plan.lease_ttl_s:
        leases = LeasePlan(calls_per_s=5.0, share_max=plan.lease_share, ttl_s=plan.lease_ttl_s)
    connection = CreditBuckets.connect(
        settings.redis.url, namespace=settings.redis.namespace, timeout_ms=DECISION_MS, leases=leases
    )
    with UsageProducer(settings) as producer:
        async with connection as buckets:
            racer = Racer(plan, log, buckets, producer, life)
            done = await racer.recover(lines)
            await racer.run(done)
    log.write_now("finish", life=life)


if __name__ == "__main__":
    asyncio.run(race(RacerPlan.load(Path(sys.argv[1]))))
