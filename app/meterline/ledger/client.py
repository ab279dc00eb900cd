"""The connection to ClickHouse, and what its errors mean for the work that met them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from clickhouse_driver import Client
from clickhouse_driver.errors import Error, ErrorCodes, PartiallyConsumedQueryError, ServerException

from meterline.errors import MeterlineError, RetryLater, UserError, WorkerMustExit
from meterline.ledger.blocks import BlockClient
from meterline.settings import ClickHouseSettings

__all__ = ["Client", "LedgerNotMigrated", "connect", "explained", "ledger_errors", "translate"]

ROWS_PER_BLOCK_MAX = 100_000
"""Far below the 1,048,576 rows at which a server splits an insert: a block is one part of each partition."""

DETAIL_CHARS_MAX = 500
"""A server's message may carry its whole stack trace; the cause stands at the start."""

HEALING = frozenset(
    {
        ErrorCodes.TIMEOUT_EXCEEDED,
        ErrorCodes.CANNOT_ALLOCATE_MEMORY,
        ErrorCodes.TOO_MANY_SIMULTANEOUS_QUERIES,
        ErrorCodes.SOCKET_TIMEOUT,
        ErrorCodes.NETWORK_ERROR,
        ErrorCodes.NO_ZOOKEEPER,
        ErrorCodes.ABORTED,
        ErrorCodes.MEMORY_LIMIT_EXCEEDED,
        ErrorCodes.TABLE_IS_READ_ONLY,
        ErrorCodes.NOT_ENOUGH_SPACE,
        ErrorCodes.TOO_MANY_PARTS,
        ErrorCodes.ALL_CONNECTION_TRIES_FAILED,
        ErrorCodes.TOO_LESS_LIVE_REPLICAS,
        ErrorCodes.UNSATISFIED_QUORUM_FOR_PREVIOUS_WRITE,
        ErrorCodes.REPLICA_IS_NOT_IN_QUORUM,
        ErrorCodes.UNKNOWN_STATUS_OF_INSERT,
        ErrorCodes.QUERY_WAS_CANCELLED,
        439,  # CANNOT_SCHEDULE_TASK, newer than the driver's list
        745,  # SERVER_OVERLOADED, likewise
        ErrorCodes.KEEPER_EXCEPTION,
        1000,  # POCO_EXCEPTION: mostly the network or the disk
        1001,  # STD_EXCEPTION: mostly memory
        1002,  # UNKNOWN_EXCEPTION
    }
)
"""Errors of a server that is busy, starting, or cut off from its own parts: the same query works later."""

MISSING = frozenset(
    {
        ErrorCodes.UNKNOWN_TABLE,
        ErrorCodes.UNKNOWN_DATABASE,
        ErrorCodes.NO_SUCH_COLUMN_IN_TABLE,
        ErrorCodes.UNKNOWN_IDENTIFIER,
    }
)
"""A database, table or column that `meterline migrate` would have made."""


class LedgerNotMigrated(WorkerMustExit):
    """The ledger's tables are missing or older than this version."""


def connect(settings: ClickHouseSettings) -> Client:
    """A client of the ledger's database. It connects at its first query, and is used by one thread at a time.

    Errors of its queries are the driver's; wrap the work in `ledger_errors`.
    """
    return BlockClient(
        settings.host,
        port=settings.port,
        database=settings.database,
        user=settings.user,
        password=settings.password.get_secret_value(),
        secure=settings.secure,
        connect_timeout=settings.connect_timeout_s,
        send_receive_timeout=settings.send_receive_timeout_s,
        settings={
            "insert_block_size": ROWS_PER_BLOCK_MAX,
            # An acknowledged insert must be a stored one, whatever the server's profile prefers.
            "async_insert": 0,
            # A backlog, or a repaired log, may span more than the 100 days a server allows by default.
            "max_partitions_per_insert_block": 0,
        },
    )


def translate(error: Exception) -> MeterlineError:
    """The error that decides the route of the work: `RetryLater`, or `WorkerMustExit` if it cannot heal."""
    if isinstance(error, MeterlineError):
        return error
    detail = str(error).split("Stack trace", maxsplit=1)[0].strip()[:DETAIL_CHARS_MAX]
    if isinstance(error, ServerException):
        if error.code in HEALING:
            return RetryLater(f"ClickHouse: {detail}")
        if error.code in MISSING:
            return LedgerNotMigrated(
                f"the ledger is not migrated to this version (run `meterline migrate`): {detail}"
            )
        return WorkerMustExit(f"ClickHouse refused the query: {detail}")
    if isinstance(error, OSError | EOFError | PartiallyConsumedQueryError) or _lost_connection(error):
        return RetryLater(f"ClickHouse does not answer: {detail or type(error).__name__}")
    # What is left was raised while values were turned into bytes: a wrong type, or a number out of range.
    return WorkerMustExit(f"these values do not fit the table: {type(error).__name__}: {detail}")


def _lost_connection(error: Exception) -> bool:
    """Whether the driver met a broken or garbled connection (its own errors that are not a server's)."""
    return isinstance(error, Error) and error.code in {
        ErrorCodes.NETWORK_ERROR,
        ErrorCodes.SOCKET_TIMEOUT,
        ErrorCodes.UNEXPECTED_PACKET_FROM_SERVER,
        ErrorCodes.UNKNOWN_PACKET_FROM_SERVER,
        ErrorCodes.CHECKSUM_DOESNT_MATCH,
    }


@contextmanager
def ledger_errors() -> Iterator[None]:
    """Raise the driver's errors as ours.

    Raises:
        RetryLater: ClickHouse is away or busy.
        LedgerNotMigrated: a table or column is missing.
        WorkerMustExit: the query is wrong, or the server refuses it for good.
    """
    try:
        yield
    except Exception as error:  # `translate` tells them apart; each is raised again
        raise translate(error) from error


@contextmanager
def explained(settings: ClickHouseSettings) -> Iterator[None]:
    """`ledger_errors` for a person at a terminal.

    Raises:
        UserError: ClickHouse is away or not migrated; the text says what to do.
    """
    try:
        with ledger_errors():
            yield
    except LedgerNotMigrated as error:
        raise UserError(
            f"The ledger in database `{settings.database}` at {settings.host}:{settings.port} is not there or"
            " is older than this version. Run `meterline migrate`."
        ) from error
    except RetryLater as error:
        raise UserError(
            f"ClickHouse at {settings.host}:{settings.port} does not answer ({error}).\n"
            "Start the local stack with `meterline up`, or point METERLINE_CLICKHOUSE__HOST and"
            " METERLINE_CLICKHOUSE__PORT at your server."
        ) from error
