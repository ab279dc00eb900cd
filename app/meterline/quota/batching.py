"""Concurrent calls of a process, carried to Redis together.

Calls are collected and travel as one script call for each client, all clients of a batch in one pipeline.
An idle process does not wait: a call leaves at the end of the loop's turn it was made in. While a batch is on
its way, the next is collected until that one returns or the window ends.

Every operation of a bucket may be repeated. So a batch whose answer was lost (a connection that broke, a
server that restarted, a script it no longer knows) is sent again unchanged, until its time is up.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import (
    AskError,
    AuthenticationError,
    MovedError,
    NoScriptError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from meterline import metrics
from meterline.errors import UserError
from meterline.quota.availability import Availability, Unreachable
from meterline.quota.operations import Op, flattened
from meterline.quota.scripts import is_passing
from meterline.quota.server import Server

__all__ = ["SHARED_OPS_MIN", "Batcher"]

BATCHES_WAITING_MAX: Final = 400
"""More wait for Redis only when it is in trouble; further calls are told so at once."""
SHARED_OPS_MIN: Final = 16
"""Of a part: a call of its own costs the server as much as about eight operations."""
CLIENTS_REMEMBERED_MAX: Final = 10_000
"""Clients whose packed keys are kept: about 600 bytes each."""
RETRY_PAUSE_S: Final = 0.005
"""Between two attempts of one batch: a restarting server refuses connections in microseconds."""
FIRST_ATTEMPT_SHARE: Final = 0.5
"""Of a call's time. A server that said nothing for so long on one connection is asked again on a new one."""

CLOSE_POLL_S: Final = 0.001
"""Nothing tells when the last lane is idle: once in a process's life it is looked for."""

Call = tuple[str, Op, "asyncio.Future[bytes]"]
"""Client, operation, who waits for the answer."""


class _Group:
    """What one script call carries: operations of one client."""

    __slots__ = ("client_id", "futures", "ops")

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id
        self.ops: list[Op] = []
        self.futures: list[asyncio.Future[bytes]] = []

    def resolve(self, answers: Sequence[bytes]) -> None:
        for future, answer in zip(self.futures, answers, strict=True):
            if not future.done():
                future.set_result(answer)

    def fail(self, error: Exception) -> None:
        for future in self.futures:
            if not future.done():
                future.set_exception(error)

    def split(self) -> list[_Group]:
        """Each operation in a call of its own."""
        singles = []
        for op, future in zip(self.ops, self.futures, strict=True):
            single = _Group(self.client_id)
            single.ops.append(op)
            single.futures.append(future)
            singles.append(single)
        return singles


class Batcher:
    """Lanes to one server. Each lane is a connection with at most one batch on its way."""

    def __init__(
        self,
        server: Server,
        *,
        window_s: float,
        timeout_s: float,
        lanes: int,
        batch_ops_max: int,
        moved: Callable[[], None],
    ) -> None:
        """Start the lanes.

        Args:
            server: where the buckets are.
            window_s: how long a batch is collected while another is on its way.
            timeout_s: how long one call may take, collecting and repeating included.
            lanes: connections. With one the server and this process take turns; four keep both at work.
            batch_ops_max: bound of what the server does in one go, other processes waiting.
            moved: called when another server of a cluster has a client's keys.
        """
        self._moved = moved
        self.availability = Availability(self.ping)
        self.server = server
        self._window_s = window_s
        self._timeout_s = timeout_s
        self._batch_ops_max = batch_ops_max
        self._loop = asyncio.get_running_loop()
        self._filling: list[Call] = []
        self._filling_since = self._urgent_since = 0.0
        self._urgent: list[Call] = []
        self._full: deque[tuple[list[Call], float]] = deque()
        self._due: asyncio.Handle | None = None
        self._idle: list[asyncio.Future[None]] = []
        self._digest = ""
        self._heads: dict[str, bytes] = {}
        self._lanes = [self._loop.create_task(self._run_lane()) for _ in range(lanes)]

    def submit(self, client_id: str, op: Op) -> asyncio.Future[bytes]:
        """Send one operation with the next batch.

        Returns:
            The answer of the script; or the exception `Unreachable`, or what the script refused it with.
        """
        future: asyncio.Future[bytes] = self._loop.create_future()
        filling = self._filling
        filling.append((client_id, op, future))
        size = len(filling)
        if size == 1:
            self._filling_since = self._loop.time()
        if size == self._batch_ops_max:
            if len(self._full) >= BATCHES_WAITING_MAX:
                filling.pop()
                raise Unreachable(f"{BATCHES_WAITING_MAX} batches of calls are waiting for Redis")
            self._full.append((filling, self._filling_since))
            self._filling = []
        self._wake_lane()
        return future

    def submit_first(self, client_id: str, op: Op) -> asyncio.Future[bytes]:
        """As `submit`, before all that waits: for the few messages many others depend on."""
        future: asyncio.Future[bytes] = self._loop.create_future()
        if not self._urgent:
            self._urgent_since = self._loop.time()
        self._urgent.append((client_id, op, future))
        self._wake_lane()
        return future

    def _wake_lane(self) -> None:
        if self._due is None and self._idle:
            self._due = (
                self._loop.call_later(self._window_s, self._dispatch)
                if len(self._idle) < len(self._lanes)
                else self._loop.call_soon(self._dispatch)
            )

    async def ping(self) -> None:
        """One exchange on a connection of its own.

        Raises:
            Unreachable: no answer in time.
        """
        try:
            async with self.server.connected(self._timeout_s) as connection:
                await self._load(connection)
        except (RedisError, OSError, TimeoutError) as error:
            raise Unreachable(_said(error)) from None

    async def close(self) -> None:
        """Let what is on its way arrive, within the time a call may take; fail the rest."""
        deadline = self._loop.time() + self._timeout_s
        while (  # noqa: ASYNC110 - nothing tells it
            self._has_calls() or len(self._idle) < len(self._lanes)
        ) and self._loop.time() < deadline:
            await asyncio.sleep(CLOSE_POLL_S)
        await self.availability.stop()
        for lane in self._lanes:
            lane.cancel()
        await asyncio.gather(*self._lanes, return_exceptions=True)
        error = Unreachable("the buckets were closed by this process")
        while self._has_calls():
            _fail(_grouped(self._take()[0]), error)

    def _dispatch(self) -> None:
        self._due = None
        self._share_out()
        # One lane for each full batch, and one for the rest.
        for _ in range(len(self._full) + bool(self._filling or self._urgent)):
            if not self._idle:
                return
            self._idle.pop().set_result(None)

    def _share_out(self) -> None:
        """Give each idle lane a part of a crowd: the server works on one while this process packs another.

        In one batch they would all be answered together, call again together, and go on in step for ever:
        this process and the server would take turns.
        """
        calls = self._filling
        parts = min(len(self._idle) - len(self._full), len(calls) // SHARED_OPS_MIN)
        if parts < 2:
            return
        size = -(-len(calls) // parts)
        self._full += [
            (calls[first : first + size], self._filling_since) for first in range(0, len(calls), size)
        ]
        self._filling = []

    async def _run_lane(self) -> None:
        lane = _Lane(self.server.new_connection)
        try:
            while True:
                if not self._has_calls():
                    ready: asyncio.Future[None] = self._loop.create_future()
                    self._idle.append(ready)
                    await ready
                calls, since = self._take()
                if calls:
                    await self._carry(lane, _grouped(calls), since + self._timeout_s)
        finally:
            await lane.drop()

    def _take(self) -> tuple[list[Call], float]:
        """The oldest calls, and when the first of them was made."""
        urgent, since = self._urgent, self._urgent_since
        if urgent:
            self._urgent = []
        if self._full:
            calls, called = self._full.popleft()
        else:
            calls, called = self._filling, self._filling_since
            self._filling = []
            if self._due is not None:
                self._due.cancel()
                self._due = None
        if urgent and calls:
            return urgent + calls, min(since, called)
        return (urgent, since) if urgent else (calls, called)

    def _has_calls(self) -> bool:
        return bool(self._filling or self._full or self._urgent)

    async def _carry(self, lane: _Lane, groups: list[_Group], deadline: float) -> None:
        """Exchange one batch, again and unchanged until it is answered or its time is up."""
        started = time.perf_counter()
        reason = "no answer"
        attempt_s = self._timeout_s * FIRST_ATTEMPT_SHARE
        try:
            async with asyncio.timeout_at(deadline):
                while groups:
                    try:
                        async with asyncio.timeout(attempt_s):
                            groups = await self._exchange(lane, groups)
                            continue
                    except AuthenticationError as error:
                        reason = _said(error)
                        break
                    except (RedisError, OSError, TimeoutError) as error:
                        # Whether it was done is unknown, and answers still to come can't be told apart.
                        reason, attempt_s = _said(error), self._timeout_s
                        await lane.drop()
                    await asyncio.sleep(RETRY_PAUSE_S)
        except TimeoutError:
            await lane.drop()
        except asyncio.CancelledError:
            _fail(groups, Unreachable("the buckets were closed by this process"))
            raise
        except Exception as error:  # noqa: BLE001 - who waits is told; the lane goes on for the others
            await lane.drop()
            _fail(groups, error)
            return
        if groups:
            self.availability.failed(reason)
            _fail(
                groups,
                Unreachable(f"Redis does not answer within {self._timeout_s * 1_000:.0f} ms: {reason}"),
            )
        else:
            self.availability.succeeded()
            metrics.QUOTA_CALL_SECONDS.observe(time.perf_counter() - started)

    async def _exchange(self, lane: _Lane, groups: list[_Group]) -> list[_Group]:
        """Send a pipeline and hand out its answers.

        Returns:
            What must be sent again.
        """
        connection = lane.connection or await lane.connect()
        if not self._digest:
            await self._load(connection)
        digest = self._digest
        await connection.send_packed_command([self._packed(group) for group in groups], check_health=False)
        again: list[_Group] = []
        forgotten = False
        for group in groups:
            try:
                answers = await connection.read_response(disable_decoding=True)
            except NoScriptError:
                forgotten = True
                again.append(group)
            except MovedError:
                # Nothing was done. Until the way is known again it is as if the server were away.
                self._moved()
                group.fail(
                    Unreachable(f"another server of the Redis Cluster has {group.client_id}'s credits now")
                )
            except ResponseError as error:
                if is_passing(error) or isinstance(error, AskError | TryAgainError):  # a slot is on its way
                    raise
                if len(group.ops) == 1:
                    group.fail(UserError(f"Redis refused an operation of {group.client_id}: {error}"))
                else:
                    # Nothing of the call was done. Which of its operations is to blame shows by itself.
                    again += group.split()
            else:
                group.resolve(answers)
        if forgotten and self._digest == digest:
            # The server was restarted, or another one took over: the script knows the server it was made for.
            await self._load(connection)
        return again

    async def _load(self, connection: AbstractConnection) -> None:
        self._digest = await self.server.load_script(connection)
        self._heads.clear()

    def _packed(self, group: _Group) -> bytes:
        heads = self._heads
        head = heads.get(group.client_id)
        if head is None:
            if len(heads) >= CLIENTS_REMEMBERED_MAX:
                heads.clear()
            head = heads[group.client_id] = self.server.call_head(self._digest, group.client_id)
        sources, operations = flattened(group.ops)
        return b"%b$%d\r\n%b\r\n$%d\r\n%b\r\n" % (head, len(sources), sources, len(operations), operations)


class _Lane:
    """One connection, made when it is needed."""

    def __init__(self, new_connection: Callable[[], AbstractConnection]) -> None:
        self.connection: AbstractConnection | None = None
        self._new_connection = new_connection

    async def connect(self) -> AbstractConnection:
        """A new connection; kept once it stands."""
        connection = self._new_connection()
        try:
            await connection.connect()  # type: ignore[no-untyped-call]  # redis-py's
        except BaseException:  # cancelled, too: no socket stays open
            await connection.disconnect(nowait=True)
            raise
        self.connection = connection
        return connection

    async def drop(self) -> None:
        """Close it: nothing that still arrives on it is read."""
        connection, self.connection = self.connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)


def _grouped(calls: list[Call]) -> list[_Group]:
    """By client, each client's operations in the order they were called."""
    groups: dict[str, _Group] = {}
    for client_id, op, future in calls:
        group = groups.get(client_id)
        if group is None:
            group = groups[client_id] = _Group(client_id)
        group.ops.append(op)
        group.futures.append(future)
    return list(groups.values())


def _fail(groups: list[_Group], error: Exception) -> None:
    for group in groups:
        group.fail(error)


def _said(error: BaseException) -> str:
    return str(error) or ("no answer" if isinstance(error, TimeoutError) else type(error).__name__)
