"""Requests to two real LLM services, or a generated sample of the same shape where the traces are missing."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from heapq import merge
from pathlib import Path

from meterline.errors import UserError

__all__ = ["Request", "read_requests"]

SERVICES = ("code", "conv")
COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]

SAMPLE_REQUESTS = 20_000
SAMPLE_SPAN_S = 3_500.0
"""As the traces: an hour."""
SAMPLE_SEED = 2023


@dataclass(frozen=True, slots=True, order=True)
class Request:
    """One request a service answered. `number` is its row in the trace."""

    at: datetime
    service: str
    number: int
    prompt_tokens: int
    generated_tokens: int


def read_requests(folder: Path | None) -> tuple[list[Request], str]:
    """All requests of both services, in order of time, and where they come from.

    Args:
        folder: holds `azure_llm_2023_code.csv` and `azure_llm_2023_conv.csv`; None: the sample.

    Raises:
        UserError: a file is missing, or is no such trace.
    """
    if folder is None:
        return sorted(_sample()), "a generated sample of LLM requests"
    traces = [_read_trace(folder / f"azure_llm_2023_{service}.csv", service) for service in SERVICES]
    return list(merge(*map(sorted, traces))), "requests to Azure's LLM services, November 2023"


def _read_trace(file: Path, service: str) -> list[Request]:
    try:
        with file.open(newline="") as text:
            rows = csv.reader(text)
            if next(rows, None) != COLUMNS:
                raise UserError(f"{file} is no trace: its columns must be {', '.join(COLUMNS)}")
            return [
                # Seven decimal places; fromisoformat reads six.
                Request(
                    datetime.fromisoformat(at[:26]).replace(tzinfo=UTC), service, n, int(prompt), int(made)
                )
                for n, (at, prompt, made) in enumerate(rows, start=1)
            ]
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read as a trace: {error}") from None


def _sample() -> Iterator[Request]:
    """The same every time: long prompts and short answers for code, the other way round for talk."""
    chance = random.Random(SAMPLE_SEED)  # noqa: S311 - a sample, no secret
    start = datetime(2023, 11, 16, 18, tzinfo=UTC)
    for number in range(1, SAMPLE_REQUESTS + 1):
        service = chance.choices(SERVICES, weights=(3, 7))[0]
        prompt, made = (2_000, 25) if service == "code" else (900, 200)
        yield Request(
            start + timedelta(seconds=chance.uniform(0, SAMPLE_SPAN_S)),
            service,
            number,
            1 + int(chance.lognormvariate(math.log(prompt), 0.7)),
            1 + int(chance.lognormvariate(math.log(made), 0.7)),
        )
