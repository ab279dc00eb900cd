"""A simulated consumer group: who has which partitions, and what a rebalance asks of the members."""

from __future__ import annotations

SESSION_S = 3.0
"""A member that isn't heard of for so long is removed."""


class Group:
    """The coordinator. All members give up everything in a rebalance, and get it back after it (eager)."""

    def __init__(self, world, partitions):
        self._world = world
        self._partitions = partitions
        self.members = {}
        """Name -> process; a restarted process takes the place of its predecessor (static membership)."""
        self.assigned = {}
        self._awaited = None
        """Members that have not joined again; None when no rebalance is on."""

    @property
    def is_rebalancing(self):
        return self._awaited is not None

    def join(self, process):
        """A process asks for partitions: at its start, or again in a rebalance."""
        known = self.members.get(process.name)
        self.members[process.name] = process
        if self._awaited is not None:
            self._awaited.discard(process.name)
            self._end_if_all_joined()
        elif known is not None and known is not process and process.name in self.assigned:
            process.receive(self.assigned[process.name])
        else:
            self._begin(joined=process)
            self._end_if_all_joined()

    def leave(self, process):
        """Gone of its own will, or removed."""
        if self.members.get(process.name) is not process:
            return
        del self.members[process.name]
        self.assigned.pop(process.name, None)
        if self._awaited is None:
            self._begin()
        else:
            self._awaited.discard(process.name)
        self._end_if_all_joined()

    def rebalance(self):
        """For a reason of the coordinator's own."""
        if self._awaited is None and self.members:
            self._begin()

    def silent(self, process):
        """No heartbeat from now on: it is removed when the session ends, if nobody took its place."""
        since = process.silences

        def look():
            if process.silences == since and not process.is_responsive:
                self.leave(process)

        self._world.later(SESSION_S, look)

    def heard(self, process):
        """A stopped process goes on: its first heartbeat tells it whether it is still a member."""
        if self.members.get(process.name) is not process or self._awaited is not None:
            process.revoke()

    def _begin(self, joined=None):
        """All but who has joined already must let go and join again."""
        self._awaited = {name for name, process in self.members.items() if process is not joined}
        for name in sorted(self._awaited):
            self.members[name].revoke()

    def _end_if_all_joined(self):
        if self._awaited:
            return
        self._awaited = None
        names = sorted(self.members)
        # Who comes first changes, so that partitions move also when nobody came or went.
        turn = self._world.random.randrange(len(names)) if names else 0
        self.assigned = {name: set() for name in names}
        for number, partition in enumerate(self._partitions):
            if names:
                self.assigned[names[(number + turn) % len(names)]].add(partition)
        for name in names:
            self.members[name].receive(self.assigned[name])
