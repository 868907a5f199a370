"""A listener's worker and its inbox in PostgreSQL. It needs psycopg."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from kbatch._database._postgres_connection import SilentServerError, not_begun, run_raw, writing
from kbatch._inbox._postgres_marks import Marks
from kbatch._inbox._session import InboxSession, ended_by_handler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kbatch._database._postgres_connection import OwnConnection
    from kbatch._errors import InboxError
    from kbatch._fastmap import Envelope
    from kbatch._inbox._base import Partition
    from kbatch._inbox._postgres import BasePostgresInbox

__all__ = ["PostgresInboxSession"]

_LOCK_S = 10  # for another session that marks the same id
# The handler has left its transaction idle, or open, for longer than the server's own settings let it.
_TOOK_TOO_LONG = ("25P03", "25P04")

# A setting that ends with the transaction tells whether it is still the same one.
_BEGIN = (
    "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; SET LOCAL synchronous_commit = on; "
    f"SET LOCAL kbatch.inbox = 'open'; SET LOCAL lock_timeout = '{_LOCK_S}s'; "
)
_IS_OPEN = "SELECT 1 / (coalesce(current_setting('kbatch.inbox', true), '') = 'open')::integer"
_GO_ON = "; SET LOCAL lock_timeout = DEFAULT"


class PostgresInboxSession(InboxSession):
    """Begins the transaction and marks in one round trip, and commits in one."""

    _connection: OwnConnection

    def __init__(self, inbox: BasePostgresInbox, group: str) -> None:
        super().__init__(group)
        self._inbox = inbox
        self._of_loop: psycopg.AsyncConnection[Any] | None = None

    def _open(self) -> OwnConnection:
        with self._inbox._checked_connection() as connection:
            self._literal = sql.Literal(self.group).as_string(connection)
            return connection

    def _for_loop(self) -> psycopg.AsyncConnection[Any]:
        of_loop = self._of_loop
        if of_loop is None or of_loop.pgconn is not self._connection.pgconn:
            # One connection of libpq with two faces, which are used by turns.
            of_loop = psycopg.AsyncConnection(self._connection.pgconn)
            of_loop._autocommit = True
            of_loop.prepare_threshold = None
            self._of_loop = of_loop
        return of_loop

    def _is_lost(self) -> bool:
        """The connection is closed, and not by the handler."""
        of_loop = self._of_loop
        by_loop = of_loop is not None and of_loop.pgconn is self._connection.pgconn and not of_loop.broken
        return self._connection.broken and not by_loop

    def _close(self, connection: OwnConnection) -> None:
        with contextlib.suppress(psycopg.Error):
            connection.close()

    def _begin(self, envelopes: Sequence[Envelope[Any]], partitions: Sequence[Partition]) -> Sequence[bool]:
        marks = Marks(envelopes)
        if len(marks.ids) == 1:
            statement = self._inbox._marking(str(marks.slots[0]), self._literal, f"'{marks.ids[0]}'")
        else:
            slots, ids = marks.array_texts()
            statement = self._inbox._marking(f"'{slots}'", self._literal, f"'{ids}'", str(len(marks.distinct)))
        connection = self._connection
        count, marked = 0, None
        try:
            if partitions:
                self._note(partitions)
            cursor = psycopg.RawCursor(connection, row_factory=tuple_row)  # whatever a handler has set
            cursor.execute((_BEGIN + statement + _GO_ON).encode(), prepare=False)  # several at once
            while True:
                if cursor.description is not None:
                    count, marked = cursor.fetchall()[0]
                elif (cursor.statusmessage or "").startswith("INSERT"):
                    count = cursor.rowcount
                if not cursor.nextset():
                    break
            if not count:
                self._inbox._check_tables(connection)
                return [False] * len(marks.ids)
        except psycopg.Error as error:
            raise self._inbox._tables.as_inbox_error(not_begun(connection, error)) from error
        connection.is_given = True
        return marks.found(count, marked)

    def _note(self, partitions: Sequence[Partition]) -> None:
        """Tells that the group handles these. In a transaction of its own: the others of its first message would wait
        for the handler."""
        statement = self._inbox._tables.sql(
            "INSERT INTO {position} (group_id, topic, partition) "
            "SELECT $1, name, number FROM unnest($2::text[], $3::text::integer[]) AS new (name, number) "
            "ON CONFLICT DO NOTHING"
        )
        topics, numbers = zip(*partitions, strict=True)
        with writing(self._connection):
            run_raw(self._connection, statement, (self.group, list(topics), f"{{{','.join(map(str, numbers))}}}"))
        self._known.update(partitions)

    def _commit(self) -> None:
        connection = self._connection
        connection.is_given = False
        self._check_open()
        if connection.info.transaction_status is TransactionStatus.INERROR:
            raise psycopg.errors.InFailedSqlTransaction(
                "a statement of the handler has failed, and the handler has gone on: let it raise, or use "
                "`with connection.transaction():` around what may fail"
            )
        try:
            connection.execute(f"{_IS_OPEN}; COMMIT".encode(), prepare=False)
        except psycopg.errors.DivisionByZero:
            raise ended_by_handler() from None
        except psycopg.Error as error:
            if self._is_outage(error):
                raise self._outage(error) from error
            raise  # a constraint that is looked at now, or it took too long: the handler's work

    def _check_open(self) -> None:
        connection = self._connection
        if self._is_lost():
            lost = psycopg.OperationalError("the connection is lost")
            raise self._inbox._tables.as_inbox_error(lost) from lost
        if connection.closed or connection.info.transaction_status is TransactionStatus.IDLE:
            raise ended_by_handler()

    def _is_outage(self, error: BaseException) -> bool:
        if _took_too_long(error):
            return False
        # Others without a code are of psycopg itself, about what the handler did.
        return (
            self._is_lost()
            or isinstance(error, SilentServerError)
            or (isinstance(error, psycopg.Error) and bool(error.sqlstate) and self._inbox._tables.is_outage(error))
        )

    def _outage(self, error: BaseException) -> InboxError:
        """What is told when the connection was lost, and an error was raised that may be about something else."""
        tables = self._inbox._tables
        told = tables.as_inbox_error(error)
        return told if told.is_outage else tables.as_inbox_error(psycopg.OperationalError("the connection is lost"))

    def _after(self, error: BaseException) -> InboxError | None:
        connection = self._connection
        connection.is_given = False
        if self._is_lost():
            return None if _took_too_long(error) else self._outage(error)
        if connection.closed or connection.info.transaction_status is TransactionStatus.IDLE:
            return ended_by_handler()
        if connection.info.transaction_status is TransactionStatus.INTRANS:
            try:
                connection.execute(_IS_OPEN.encode())
            except psycopg.errors.DivisionByZero:
                return ended_by_handler()
            except psycopg.Error as lost:
                return None if _took_too_long(lost) else self._outage(lost)
        return None

    def _roll_back(self) -> None:
        connection = self._connection
        connection.is_given = False
        if connection.info.transaction_status is not TransactionStatus.IDLE or connection.closed:
            connection.execute("ROLLBACK")


def _took_too_long(error: BaseException) -> bool:
    return getattr(error, "sqlstate", None) in _TOOK_TOO_LONG
