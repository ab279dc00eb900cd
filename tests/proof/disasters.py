"""What happens to Redis and Kafka during a race, and to workers that finish tasks meanwhile."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.proof.meter_worker import MeterPlan
from tests.proof.pipeline import Pipeline, wait_for
from tests.proof.quota_checker import Verdict, judge_finished
from tests.proof.quota_evidence import Observer, gather, read_bucket
from tests.proof.race import Race
from tests.proof.task_log import read_lines
from tests.proof.tasks import MICRO

__all__ = ["FlushedRedis", "KafkaAway", "KilledRedis"]

OPEN_RESERVATIONS_MIN = 400
OPEN_BEFORE = 480
"""Some end while metering stands still."""
IN_FLIGHT_S = 2.0
"""Metering stands still so long before Redis is flushed: that much usage is published and not accounted. Less
than its session time-out."""
REBUILD_TRIES = 3
"""It refuses while it sees no heartbeat for 5 s: on a busy machine the worker may need longer to notice."""
AWAY_S = 60.0
BEFORE_MIN, BEGIN_S_MAX = 20, 90.0
"""Tasks finished before Kafka goes away."""
AFTER_S, END_S_MAX = 2.0, 240.0
"""Workers go on a little when Kafka is back, then finish: what is spooled is published first."""
REDIS_DOWN_S = 1.0
GRANTED = 1_000_000 * MICRO
QUIET_S = 90.0


@dataclass(slots=True)
class KilledRedis:
    """SIGKILL under load, started again on what was on its disk."""

    happened: str = ""
    problems: list[str] = field(default_factory=list)

    def __call__(self, race: Race, observer: Observer) -> None:
        if self.happened or not observer.samples:
            return
        if observer.samples[-1].available < race.rules.granted * 2 // 3:
            held = observer.held
            race.pipeline.kill_service("redis")
            time.sleep(REDIS_DOWN_S)
            race.pipeline.start_services()
            self.happened = f"redis killed with {held} reservations open, and started again"


@dataclass(slots=True)
class FlushedRedis:
    """FLUSHALL with many reservations open and seconds of usage on their way; then `quota rebuild`."""

    happened: str = ""
    problems: list[str] = field(default_factory=list)

    def __call__(self, race: Race, observer: Observer) -> None:
        if self.happened or observer.held < OPEN_BEFORE:
            return
        pipeline = race.pipeline
        metering = pipeline.workers["metering"]
        metering.signal(signal.SIGSTOP)
        try:
            time.sleep(IN_FLIGHT_S)
            held = observer.held
            if held < OPEN_RESERVATIONS_MIN:
                self.problems.append(f"only {held} reservations were open when Redis was flushed")
            with pipeline.redis() as redis:
                redis.flushall()
        finally:
            metering.signal(signal.SIGCONT)
        for _ in range(REBUILD_TRIES):
            said = pipeline.cli("rebuild", "--reason", "flushed by the proof", "--by", "proof")
            if said.returncode == 0:
                break
        if said.returncode:
            self.problems.append(f"quota rebuild ended with {said.returncode}: {said.stdout + said.stderr}")
        self.happened = (
            f"redis flushed with {held} reservations open, {IN_FLIGHT_S:.0f} s of usage unaccounted"
        )


@dataclass(slots=True)
class _Worker:
    plan: MeterPlan
    file: Path
    process: subprocess.Popen[bytes] | None = None


class KafkaAway:
    """Workers finish tasks through `Meter` while Kafka is away for a minute, and are killed and restarted."""

    def __init__(self, pipeline: Pipeline, workers: int = 2, away_s: float = AWAY_S) -> None:
        self.client_id = f"kafka-away-{uuid.uuid4().hex[:8]}"
        self.kills: Counter[str] = Counter()
        self.finished_meanwhile = 0
        self.verdict: Verdict | None = None
        self._pipeline, self._away_s = pipeline, away_s
        self._folder = pipeline.folder / self.client_id
        self._folder.mkdir()
        self._stop = self._folder / "stop"
        self._environment = pipeline.environment | {
            "METERLINE_QUOTA__SPOOL_DIR": str(self._folder / "spool"),
            "METERLINE_QUOTA__RESERVATION_TTL_S": "10",
        }
        self._workers = []
        for slot in range(workers):
            log = str(self._folder / f"meter-{slot}.log")
            plan = MeterPlan(slot, self.client_id, log, str(self._stop))
            file = self._folder / f"meter-{slot}.json"
            plan.save(file)
            self._workers.append(_Worker(plan, file))

    def run(self) -> Verdict:
        """All of it, and the verdict."""
        pipeline = self._pipeline
        pipeline.grant(self.client_id, GRANTED)
        try:
            problems = self._live_through_it()
        finally:
            for worker in self._workers:
                if worker.process is not None and worker.process.poll() is None:
                    worker.process.kill()
                    worker.process.wait()
        wait_for(self._is_quiet, QUIET_S)
        lines = [line for path in self._logs() for line in read_lines(path)]
        events = [line["events"] for line in lines if line["do"] == "finished"]
        finished = {event: micro for some in events for event, micro in some}
        self.verdict = judge_finished(gather(pipeline.places, self.client_id, self._logs()), finished)
        self.verdict.problems += problems
        return self.verdict

    def _live_through_it(self) -> list[str]:
        """What went wrong meanwhile."""
        for worker in self._workers:
            self._start(worker)
        if not wait_for(lambda: self._finished() > BEFORE_MIN, BEGIN_S_MAX):
            return ["the workers finish nothing"]
        self._pipeline.kill_service("kafka")
        before = self._finished()
        for share, victims in ((0.25, self._workers[:1]), (0.5, self._workers), (0.25, [])):
            time.sleep(share * self._away_s)
            for worker in victims:
                self._kill(worker)
                self._start(worker)
        self.finished_meanwhile = self._finished() - before
        self._pipeline.start_services()
        time.sleep(AFTER_S)
        self._stop.touch()
        codes = {worker.plan.slot: worker.process.wait(END_S_MAX) for worker in self._workers}
        problems = [
            f"worker {slot} ended with {code}: {self._tail(slot)}" for slot, code in codes.items() if code
        ]
        if not self.finished_meanwhile:
            problems.append("no task was finished while Kafka was away")
        return problems

    def _logs(self) -> list[Path]:
        return [Path(worker.plan.log) for worker in self._workers]

    def _finished(self) -> int:
        return sum(line["do"] == "finished" for path in self._logs() for line in read_lines(path))

    def _start(self, worker: _Worker) -> None:
        with worker.file.with_suffix(".out").open("ab") as out:
            worker.process = subprocess.Popen(
                [sys.executable, "-m", "tests.proof.meter_worker", str(worker.file)],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    def _kill(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.wait()
        self.kills["meter worker"] += 1

    def _tail(self, slot: int) -> str:
        return self._workers[slot].file.with_suffix(".out").read_text(errors="replace")[-2_000:]

    def _is_quiet(self) -> bool:
        with self._pipeline.redis() as redis:
            bucket = read_bucket(redis, self._pipeline.places.namespace, self.client_id)
        return bucket.consumed > 0 and bucket.provisional == 0 and bucket.reserved == 0
