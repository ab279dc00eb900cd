"""The ports of the local stack, and how to move them: METERLINE_PORT_KAFKA, METERLINE_PORT_REDIS, ..."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

from meterline.errors import UserError

__all__ = ["HOST", "Ports", "free_ports", "is_free", "port_variable"]

HOST = "127.0.0.1"
"""Nothing in the local stack has a password, so nothing listens beyond this machine."""

PORT_MIN, PORT_MAX = 1_024, 32_767
"""Above are Linux's ports for outgoing connections: a probe of a closed port there can connect to itself."""

FREE_PORT_TRIES_MAX = 1_000


@dataclass(frozen=True, slots=True)
class Ports:
    """One port for each listener. The defaults are those of docker-compose.yml too."""

    kafka: int = 19_092
    kafka_controller: int = 19_093
    clickhouse: int = 19_000
    clickhouse_http: int = 18_123
    redis: int = 16_379
    stripe: int = 12_111

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """The defaults, each moved by its variable.

        Raises:
            UserError: a variable isn't a port that can be used.
        """
        moved = {}
        for field in fields(cls):
            variable = port_variable(field.name)
            if not (value := environment.get(variable, "")):
                continue
            if not value.isdecimal() or not PORT_MIN <= int(value) <= PORT_MAX:
                raise UserError(f"{variable} is {value!r}; it must be a port from {PORT_MIN} to {PORT_MAX}")
            moved[field.name] = int(value)
        return cls(**moved)

    @classmethod
    def free(cls) -> Self:
        """Ports nobody listens on at this moment: for tests, several stacks beside one another."""
        return cls(*free_ports(len(fields(cls))))


def free_ports(count: int) -> list[int]:
    """So many different ports nobody listens on at this moment.

    Raises:
        UserError: none were found.
    """
    found: list[int] = []
    for _ in range(FREE_PORT_TRIES_MAX):
        port = random.SystemRandom().randint(20_000, PORT_MAX)
        if port not in found and is_free(port):
            found.append(port)
        if len(found) == count:
            return found
    raise UserError("No free ports between 20000 and 32767")


def port_variable(name: str) -> str:
    """The environment variable that moves a port."""
    return f"METERLINE_PORT_{name.upper()}"


def is_free(port: int) -> bool:
    """Whether a server could listen here. As servers do, it overlooks connections that are just closing."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
