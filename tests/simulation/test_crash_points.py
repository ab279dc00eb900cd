"""No moment to die or to sleep is forgotten: every named step of the code, every message of a history."""

from __future__ import annotations

import re
from pathlib import Path

from tests.simulation.histories import METERING_STEPS
from tests.simulation.scenes import scene
from tests.simulation.world import RESTART_S

from meterline.streaming.steps import Step

PACKAGES = ("streaming", "metering")
SOURCE = Path(__file__).parents[2] / "app" / "meterline"
SLEEP_S = 4.0
"""Longer than a session: the others have gone on meanwhile."""


def announced():
    """The steps that the code of a metering worker announces."""
    texts = [path.read_text("utf-8") for package in PACKAGES for path in (SOURCE / package).rglob("*.py")]
    return {Step[name] for text in texts for name in re.findall(r"reached\(Step\.([A-Z_]+)\)", text)}


def story(told):
    """A few events in two partitions, one copy, one late, one refused; then it ends by itself."""
    told.publish("first", 1_000)
    told.publish("second", 200, partition=1)
    told.advance(0.9)
    told.publish("first", 1_000)
    told.publish("third", 30, ago_ms=1_200)
    told.publish("second", 999, partition=1)
    told.advance(1.2)


def test_every_step_the_code_announces_is_one_to_die_at():
    """A new step without a crash makes this red; and a step that a history never comes to."""
    with scene(waits=False) as told:
        story(told)
        told.credits_at_rest()

        assert announced() == set(METERING_STEPS) == told.world.reached_steps


def messages():
    """How many a whole story takes."""
    with scene(waits=False) as told:
        story(told)
        return told.world.messages


def test_a_death_at_any_message_changes_no_credit():
    """The server has done what was asked, and the process never learns of it."""
    for fatal in range(1, messages() + 1):
        with scene(waits=False) as told:
            world = told.world

            def die(process, number, fatal=fatal, world=world):
                if number == fatal:
                    world.end(process, RESTART_S)

            world.on_served = die
            story(told)

            assert told.credits_at_rest() == {"acme": 1_230}, f"killed at message {fatal}"
            assert told.counted(0)[:2] == (2, 1)
            assert told.counted(1) == (1, 0, 1)


def test_a_sleep_at_any_message_changes_no_credit():
    """It goes on with what it believes, long after its partitions were given to another."""
    for sleepy in range(1, messages() + 1):
        with scene(waits=False) as told:
            world = told.world

            def sleep(process, number, sleepy=sleepy, world=world):
                if number == sleepy:
                    process.stop()
                    world.later(SLEEP_S, process.wake)

            world.on_sent = sleep
            story(told)
            told.advance(SLEEP_S)

            assert told.credits_at_rest() == {"acme": 1_230}, f"asleep at message {sleepy}"
