"""A connection of kbatch's own to PostgreSQL. It needs psycopg."""

from __future__ import annotations

import contextlib
import threading
import types
import weakref
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg.rows import tuple_row

from kbatch._errors import type_name
from kbatch._fastmap import monotonic

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from typing import TypeVar

    from kbatch._errors import KbatchError

    _T = TypeVar("_T")

__all__ = ["OwnConnection", "SilentServerError", "connect", "not_begun", "run_raw", "taken_over", "writing"]

_lock = threading.RLock()  # re-entrant: a signal handler may come from within
_taken_over: weakref.WeakSet[psycopg.Connection[Any]] = weakref.WeakSet()

_CONNECT_S = 10
_IDLE_S = 20  # after which the server rolls back the transaction of a process that was stopped
_SILENCE_S = 25  # no answer of the server comes later: it ends what takes longer


class SilentServerError(psycopg.OperationalError):
    """No answer has come. It is not known whether the statement was carried out, and the connection is of no use."""


class OwnConnection(psycopg.Connection[Any]):
    """One on which no call waits for ever: a server, or what is between, may be silent.

    Attributes:
        is_given: User code has it now, whose statements may take as long as they do.
        given: The user's own face of it, if there is one, which warns when it is forgotten before it is closed.
    """

    is_given = False
    given: psycopg.Connection[Any] | None = None

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


def taken_over(given: object, error: type[KbatchError]) -> OwnConnection:
    """What a user's function has made, in autocommit mode and with psycopg's defaults, whatever it had.

    Raises:
        error: It is no new connection that is of use. It is closed, unless it was there before.
        psycopg.Error: It is lost.
    """
    if not isinstance(given, psycopg.Connection):
        if isinstance(given, types.CoroutineType):
            given.close()  # else it would be missed that nobody awaits it
        raise error(f"connect must return a psycopg.Connection, not {type_name(given)}")
    with _lock:
        is_new = given not in _taken_over
        _taken_over.add(given)
    if not is_new:
        raise error("connect must return a new connection each time: it has returned this one before")
    try:
        fault = _fault_of(given)
        if fault is not None:
            raise error(f"connect must return a connection of its own, open and in no transaction: {fault}")
        own = OwnConnection(given.pgconn)  # another face of libpq's connection
        own._autocommit, own.prepare_threshold, own.given = True, None, given
        if given.info.encoding != "utf-8":
            own.execute("SET client_encoding TO 'UTF8'")
    except BaseException:
        given.close()
        raise
    return own


def _fault_of(given: psycopg.Connection[Any]) -> str | None:
    if given.closed:
        return "this one is closed"
    if getattr(given, "_pool", None) is not None:
        return "this one is a pool's"
    if given.pgconn.pipeline_status != PipelineStatus.OFF:
        return "this one is in pipeline mode"
    if given.info.transaction_status is not TransactionStatus.IDLE:
        return "this one is in a transaction, which connect has to commit"
    return None


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
