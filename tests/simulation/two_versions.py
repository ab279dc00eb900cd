"""A version of the program that simulated processes run, when not all of them run the same."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from meterline.domain.reasons import Reason
from meterline.metering import state
from meterline.metering.meter import DeadLetter, Meter
from meterline.metering.sliced_index import SlicedIndex
from meterline.metering.slices import SliceFiles

UNLUCKY_MICRO = 13
"""Credits that an event of the newer rules may not have."""
REFUSED = Reason.INVALID_FIELD


class Program:
    """One version: which formats and rules it knows."""

    def __init__(self, *, newer_format=False, newer_rules=False):
        self._format = state.FORMAT_VERSION + newer_format
        self._rules = state.RULE_VERSION + newer_rules
        self.newer_rules_from = state.RULE_VERSION + 1

    @contextmanager
    def runs(self):
        """While a process of this version is at work."""
        with ExitStack() as stack:
            stack.enter_context(patch.object(state, "FORMAT_VERSION", self._format))
            stack.enter_context(patch.object(state, "RULE_VERSION", self._rules))
            yield

    def make_meter(self, partition, settings, decode, meta):
        """The plain meter; with the rules of this version."""
        return RulesMeter(self, partition, settings, decode, meta)


class RulesMeter(Meter):
    """Decides each record by the rules that hold at its offset."""

    def __init__(self, program, partition, settings, decode, meta):
        super().__init__(partition, settings, decode, meta, SlicedIndex(SliceFiles.of(settings)))
        self._newer = program.newer_rules_from

    def _read(self, record):
        read = super()._read(record)
        _, event = read
        if isinstance(event, DeadLetter) or self.meta.rules_at(record.offset) < self._newer:
            return read
        if event.credits_micro == UNLUCKY_MICRO:
            return record, DeadLetter(record, REFUSED, "an unlucky amount", event.client_id.encode())
        return read
