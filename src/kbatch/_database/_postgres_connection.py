"""A connection of kbatch's own to PostgreSQL. It needs psycopg."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from kbatch._fastmap import monotonic

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from typing import TypeVar

    from kbatch._errors import KbatchError

    _T = TypeVar("_T")

__all__ = ["OwnConnection", "SilentServerError", "connect", "not_begun", "run_raw", "writing"]

_CONNECT_S = 10
_IDLE_S = 20  # after which the server rolls back the transaction of a process that was stopped
_SILENCE_S = 25  # no answer of the server comes later: it ends what takes longer


class SilentServerError(psycopg.OperationalError):
    """No answer has come. It is not known whether the statement was carried out, and the connection is of no use."""


class OwnConnection(psycopg.Connection[Any]):
    """One on which no call waits for ever: a server, or what is between, may be silent.

    Attributes:
        is_given: User code has it now, whose statements may take as long as they do.
    """

    is_given = False

    def wait(self, gen: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.is_given:
            return super().wait(gen, *arguments, **keywords)
        return super().wait(_until(gen, monotonic() + _SILENCE_S), *arguments, **keywords)


def _until(steps: Generator[Any, Any, _T], end: float) -> Generator[Any, Any, _T]:
    """The same steps, until a time."""
    try:
        state = next(steps)
        while True:
            ready = yield state
            if not ready and monotonic() >= end:
                raise SilentServerError(f"no answer for {_SILENCE_S} s")
            state = steps.send(ready)
    except StopIteration as stop:
        result: _T = stop.value
        return result


def connect(conninfo: str, error: type[KbatchError]) -> OwnConnection:
    """A connection in autocommit mode.

    Raises:
        error: libpq does not understand `conninfo`.
        psycopg.Error: There is none to be had.
    """
    own: dict[str, Any] = {"fallback_application_name": "kbatch", "client_encoding": "utf8"}
    try:
        given = conninfo_to_dict(conninfo)
    except psycopg.ProgrammingError:
        # Not libpq's text, which shows what it does not understand: it may be a part of a password.
        raise error(
            "is conninfo right? It is neither a URL, as postgresql://user@host/database, in which special characters "
            "are written as %XX, nor text as host=… dbname=…"
        ) from None
    # A peer that is gone without a word is noticed, also while user code waits for it.
    wanted = {"connect_timeout": _CONNECT_S, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
    own.update({name: value for name, value in wanted.items() if name not in given})
    # Prepared statements would be another session's behind a pool, and their plans might be of an empty table.
    return OwnConnection.connect(conninfo, autocommit=True, prepare_threshold=None, **own)


def run_raw(connection: psycopg.Connection[Any], statement: str, parameters: Any = None) -> list[tuple[Any, ...]]:
    """The rows of a statement with ``$1``, or of the last one of several without parameters."""
    cursor = psycopg.RawCursor(connection, row_factory=tuple_row)
    cursor.execute(statement.encode(), parameters, binary=parameters is not None)
    while cursor.nextset():
        pass
    return cursor.fetchall() if cursor.description is not None else []


@contextlib.contextmanager
def writing(connection: OwnConnection) -> Iterator[None]:
    """A transaction that may write, and of which each statement sees what was committed before it, whatever are the
    defaults of the server."""
    connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
    connection.read_only = False
    with connection.transaction():
        connection.execute(f"SET LOCAL idle_in_transaction_session_timeout = '{_IDLE_S}s'")
        yield


def not_begun(connection: psycopg.Connection[Any], error: psycopg.Error) -> psycopg.Error:
    """What an error means of statements the first of which begins a transaction that writes. A standby refuses that by
    the code for what PostgreSQL does not support."""
    is_standby = error.sqlstate == "0A000" and connection.info.transaction_status is TransactionStatus.IDLE
    return psycopg.errors.ReadOnlySqlTransaction(str(error)) if is_standby else error
