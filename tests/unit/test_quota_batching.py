"""How calls travel: together, in order, again and unchanged after a lost answer, never too long."""

from __future__ import annotations

import asyncio
import json

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import MovedError, NoScriptError, ReadOnlyError, ResponseError

from meterline.errors import UserError
from meterline.quota.availability import FAILURES_MAX, Unreachable
from meterline.quota.batching import SHARED_OPS_MIN, Batcher
from meterline.quota.server import Server

WINDOW_S = 0.002
TIMEOUT_S = 0.2


class Line(Server):
    """A server that is told how to behave: what it was sent, and what it does with the next calls."""

    def __init__(self):
        self.calls = []
        self.moved = []
        self.called = asyncio.Event()
        self.connections = 0
        self.loads = 0
        self.next = []
        self.answer_after_s = 0.0

    def new_connection(self):
        return Connection(self)

    async def load_script(self, _connection):
        self.loads += 1
        return f"digest-{self.loads}"

    def call_head(self, digest, client_id):
        return f"{digest} {client_id} ".encode()


class Connection:
    def __init__(self, line):
        self._line = line
        self._unanswered = []

    async def connect(self):
        self._line.connections += 1
        if self._line.next and self._line.next[0] == "refuse":
            self._line.next.pop(0)
            raise RedisConnectionError("refused")

    async def disconnect(self, *, nowait=False):
        assert nowait
        self._unanswered = []

    async def send_packed_command(self, packed, *, check_health):
        assert not check_health
        for one in packed:
            head, _, _, operations, _ = one.split(b"\r\n")
            digest, client_id, _ = head.decode().split(" ")
            call = (digest, client_id, operations.decode())
            self._line.calls.append(call)
            self._line.called.set()
            self._unanswered.append(call)

    async def read_response(self, *, disable_decoding):
        assert disable_decoding
        await asyncio.sleep(self._line.answer_after_s)
        _, client_id, operations = self._unanswered.pop(0)
        behaviour = self._line.next.pop(0) if self._line.next else None
        if isinstance(behaviour, Exception):
            raise behaviour
        if behaviour == "silence":
            await asyncio.sleep(60)
        kinds = [value for value in json.loads(operations) if value != "poison"]
        if len(kinds) < len(json.loads(operations)):
            raise ResponseError("ERR poison")
        return [f"{client_id} {kind}".encode() for kind in kinds]


def run(scenario, **options):
    async def whole():
        line = Line()
        own = {"window_s": WINDOW_S, "timeout_s": TIMEOUT_S, "lanes": 2, "batch_ops_max": 8}
        batcher = Batcher(line, **(own | {"moved": lambda: line.moved.append(1)} | options))
        await asyncio.sleep(0)  # the lanes are waiting now
        try:
            await scenario(line, batcher)
        finally:
            await batcher.close()

    asyncio.run(whole())


def test_a_client_that_another_server_of_a_cluster_has_is_not_decided_and_its_way_asked_for():
    async def scenario(line, batcher):
        line.next = [MovedError("6918 127.0.0.1:7001")]
        calls = [batcher.submit("a", '"1"'), batcher.submit("b", '"2"')]
        with pytest.raises(Unreachable, match="another server of the Redis Cluster"):
            await calls[0]
        assert await calls[1] == b"b 2"
        assert line.moved == [1]
        assert len(line.calls) == 2

    run(scenario)


def test_calls_of_one_turn_travel_together_by_client_and_in_order():
    async def scenario(line, batcher):
        calls = [("a", '"1"'), ("b", '"2"'), ("a", '"3"')]
        answers = await asyncio.gather(*(batcher.submit(*call) for call in calls))

        assert answers == [b"a 1", b"b 2", b"a 3"]
        assert line.calls == [("digest-1", "a", '["1","3"]'), ("digest-1", "b", '["2"]')]

    run(scenario)


def test_calls_made_while_a_batch_is_under_way_are_collected():
    async def scenario(line, batcher):
        line.answer_after_s = 0.3
        first = batcher.submit("a", '"1"')
        await line.called.wait()
        others = [batcher.submit("a", f'"{n}"') for n in (2, 3)]
        await asyncio.sleep(0)
        others.append(batcher.submit("a", '"4"'))
        await asyncio.gather(first, *others)

        assert [call[2] for call in line.calls] == ['["1"]', '["2","3","4"]']

    run(scenario, window_s=0.1, timeout_s=5.0)  # far apart, however late a busy machine wakes us


def test_a_crowd_is_shared_out_over_idle_lanes():
    """In one batch it would stay in step for ever, and the server would wait while its answers are read."""

    async def scenario(line, batcher):
        line.answer_after_s = 0.05
        await asyncio.gather(*(batcher.submit("a", f'"{n}"') for n in range(2 * SHARED_OPS_MIN)))

        assert [len(json.loads(call[2])) for call in line.calls] == [SHARED_OPS_MIN] * 2
        assert line.connections == 2

    run(scenario, batch_ops_max=256)


def test_a_batch_is_bounded():
    async def scenario(line, batcher):
        await asyncio.gather(*(batcher.submit("a", f'"{n}"') for n in range(20)))

        assert [len(json.loads(call[2])) for call in line.calls] == [8, 8, 4]

    run(scenario)


def test_an_urgent_call_travels_before_those_that_wait():
    async def scenario(line, batcher):
        waiting = [batcher.submit("a", f'"{n}"') for n in range(20)]
        urgent = batcher.submit_first("a", '"urgent"')
        await urgent

        assert json.loads(line.calls[0][2])[0] == "urgent"
        await asyncio.gather(*waiting)

    run(scenario)


@pytest.mark.parametrize(
    "trouble", [RedisConnectionError("reset"), ReadOnlyError("READONLY no"), OSError("gone")]
)
def test_after_a_lost_answer_the_same_call_is_sent_again(trouble):
    async def scenario(line, batcher):
        line.next = [trouble]
        assert await batcher.submit("a", '"1"') == b"a 1"

        assert line.calls == [("digest-1", "a", '["1"]')] * 2
        assert line.connections == 2
        assert not batcher.availability.tripped

    run(scenario)


def test_a_client_that_was_answered_is_not_asked_again():
    async def scenario(line, batcher):
        line.next = [None, RedisConnectionError("reset")]
        answers = await asyncio.gather(batcher.submit("a", '"1"'), batcher.submit("b", '"2"'))

        assert answers == [b"a 1", b"b 2"]
        # The first was answered, but which answer would come next on this connection is not known.
        assert [call[1] for call in line.calls] in (["a", "b", "b"], ["a", "b", "a", "b"])

    run(scenario)


def test_a_restarted_server_gets_the_script_again():
    async def scenario(line, batcher):
        await batcher.submit("a", '"1"')
        line.next = [NoScriptError("NOSCRIPT")]
        assert await batcher.submit("a", '"2"') == b"a 2"

        assert [call[0] for call in line.calls] == ["digest-1", "digest-1", "digest-2"]
        assert line.loads == 2

    run(scenario)


def test_an_operation_a_server_refuses_does_not_fail_its_neighbours():
    async def scenario(_line, batcher):
        calls = (batcher.submit("a", op) for op in ('"1"', '"poison"', '"2"'))
        answers = await asyncio.gather(*calls, return_exceptions=True)

        assert (answers[0], answers[2]) == (b"a 1", b"a 2")
        assert isinstance(answers[1], UserError)

    run(scenario)


def test_silence_on_one_connection_is_broken_on_another():
    async def scenario(line, batcher):
        line.next = ["silence"]

        assert await batcher.submit("a", '"1"') == b"a 1"
        assert line.connections == 2

    run(scenario)


def test_no_call_takes_longer_than_its_time():
    async def scenario(line, batcher):
        line.next = ["silence"] * 50
        loop = asyncio.get_running_loop()
        started = loop.time()
        calls = [batcher.submit("a", f'"{n}"') for n in range(30)]
        for call in calls:
            with pytest.raises(Unreachable, match="200 ms"):
                await call

        assert loop.time() - started < 2 * TIMEOUT_S

    run(scenario)


def test_calls_that_keep_coming_are_given_their_own_time():
    """More calls than a batch takes, all the time: none of them is older than it is."""

    async def scenario(line, batcher):
        line.answer_after_s = 0.005
        deadline = asyncio.get_running_loop().time() + 2 * TIMEOUT_S

        async def caller():
            while asyncio.get_running_loop().time() < deadline:
                await batcher.submit("a", '"1"')

        await asyncio.gather(*(caller() for _ in range(30)))

    run(scenario)


def test_the_breaker_opens_after_failures_in_a_row_and_closes_by_itself():
    async def scenario(line, batcher):
        line.next = ["silence"] * 100
        for number in range(FAILURES_MAX):
            assert not batcher.availability.tripped
            with pytest.raises(Unreachable):
                await batcher.submit("a", f'"{number}"')
        assert batcher.availability.tripped

        line.next = []
        async with asyncio.timeout(5):
            while batcher.availability.tripped:  # noqa: ASYNC110 - the breaker tells nobody
                await asyncio.sleep(0.01)
        assert await batcher.submit("a", '"1"') == b"a 1"

    run(scenario, timeout_s=0.1)


def test_a_probe_that_fails_leaves_the_breaker_open():
    async def scenario(line, batcher):
        line.next = ["refuse"]
        batcher.availability.trip("a test")
        async with asyncio.timeout(5):
            while line.next:  # noqa: ASYNC110 - until the probe was refused
                await asyncio.sleep(0.01)

        assert batcher.availability.tripped
        assert "refused" in batcher.availability.reason

    run(scenario)


def test_what_waits_when_the_buckets_are_closed_is_told_so():
    async def scenario(line, batcher):
        line.next = ["silence"] * 50
        call = batcher.submit("a", '"1"')
        await asyncio.sleep(0.01)
        await batcher.close()

        with pytest.raises(Unreachable):
            await call

    run(scenario, timeout_s=0.05)
