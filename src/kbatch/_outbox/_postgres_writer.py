"""How DURABLE senders add to an outbox in PostgreSQL."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import psycopg

from kbatch._errors import OutboxError
from kbatch._fastmap import monotonic
from kbatch._outbox._postgres_session import BEGIN_WRITING, IDENTITY, PostgresSession

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kbatch._fastmap import MappedBatch
    from kbatch._outbox._postgres_tables import PostgresTables

__all__ = ["PostgresWriter"]

_IDLE_S = 10  # after which the server rolls back a transaction whose COMMIT did not arrive
_LOOK_UP_S = 20.0  # for what became of a transaction: longer than that
_LOOK_AGAIN_S = 0.1

_BEGIN = (
    f"{BEGIN_WRITING}SET LOCAL idle_in_transaction_session_timeout = '{_IDLE_S}s';SELECT pg_current_xact_id()::text"
)


class PostgresWriter(PostgresSession):
    """A connection of its own, whose transactions have nothing but rows of the outbox.

    When the connection is lost before COMMIT has its answer, another one asks what became of the transaction, by its
    number.

    Args:
        connection: In autocommit mode. It is the writer's from now on.
        connected: Another connection, for a ``with`` block.
        insert: Adds batches within the connection's transaction.
        tell: Called after each commit.
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        tables: PostgresTables,
        connected: Callable[[], contextlib.AbstractContextManager[psycopg.Connection[Any]]],
        insert: Callable[[psycopg.Connection[Any], Sequence[MappedBatch]], object],
        tell: Callable[[bool], object],
    ) -> None:
        super().__init__(connection, tables)
        self._connected = connected
        self._insert = insert
        self._tell = tell
        self._server: str | None = None
        with contextlib.suppress(psycopg.Error):  # some services do not let users ask
            ((self._server,),) = self._run(f"SELECT {IDENTITY}")

    def commit(self, take: Callable[[], Sequence[MappedBatch]]) -> bool:
        """As `OutboxWriter.commit`. It waits for nobody."""
        with self._errors():
            ((number,),) = self._begun(_BEGIN)
            try:
                batches = take()
                if batches:
                    self._insert(self._connection, batches)
            except BaseException:
                self._roll_back()
                raise
        self._commit(number)
        self._tell(True)
        return True

    def _commit(self, number: str) -> None:
        try:
            with self._errors():
                tag = self._connection.execute("COMMIT").statusmessage
        except OutboxError as error:
            cause = error.__cause__
            if isinstance(cause, psycopg.Error) and not self._is_in_doubt(cause):
                raise
            self._connection.close()
            was_committed = self._was_committed(number)
            if was_committed is None:
                raise self._in_doubt(error) from cause
            if not was_committed:
                raise
        else:
            if tag != "COMMIT":
                raise OutboxError(f"the outbox {self._tables!r}: the server has answered COMMIT with {tag}")

    def _was_committed(self, number: str) -> bool | None:
        """Whether a transaction was committed; ``None`` if the server does not know, or does not answer."""
        end = monotonic() + _LOOK_UP_S
        while self._server is not None and monotonic() < end:
            with contextlib.suppress(OutboxError), self._connected() as connection:
                cursor = psycopg.RawCursor(connection)
                cursor.execute(f"SELECT pg_xact_status($1::text::xid8), {IDENTITY}".encode(), (number,))
                ((status, server),) = cursor.fetchall()
                if server != self._server or status is None:
                    break
                if status != "in progress":  # else the server does not know yet that the connection is lost
                    return bool(status == "committed")
            threading.Event().wait(_LOOK_AGAIN_S)
        return None
