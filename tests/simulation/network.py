"""Requests between simulated processes and servers: each takes time, may arrive and be answered in vain."""

from __future__ import annotations


class LostAnswerError(Exception):
    """The connection broke: whether the server did what was asked is unknown."""


class Connection:
    """One process's connection to one server: requests and answers keep their order.

    A request that was sent arrives, even if the process is dead by then. An answer to a stopped process waits.
    """

    def __init__(self, world, process):
        self._world = world
        self._process = process
        self._arrival = self._answer = 0.0

    async def call(self, serve, loses=None):
        """Let the server do something, return what it returns or raise what it raises.

        Args:
            serve: what the server does when the request arrives.
            loses: asked when it arrives: "request" or "answer" if the connection breaks there, else None.
        """
        world = self._world
        if not self._process.is_responsive:
            await self._process.woken()  # stopped amid a callback: nothing leaves it until it goes on
        future = self._process.loop.create_future()
        world.messages += 1
        number = world.messages
        self._arrival = max(self._arrival, world.now + world.latency())
        world.at(self._arrival, lambda: self._arrive(number, serve, loses, future))
        world.sent(self._process, number)
        return await future

    def _arrive(self, number, serve, loses, future):
        world = self._world
        lost = loses() if loses else None
        result = error = None
        try:
            if lost != "request":
                result = serve()
        except Exception as raised:  # noqa: BLE001 - it is the answer
            error = raised
        if lost:
            error = LostAnswerError()
        world.served(self._process, number)
        self._answer = max(self._answer, world.now + world.latency())
        world.at(self._answer, lambda: self._reply(future, result, error))

    def _reply(self, future, result, error):
        if not self._process.is_alive or future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
