"""An outbox in a SQLite database."""

from __future__ import annotations

import sqlite3
from operator import length_hint
from typing import TYPE_CHECKING, Any

from kbatch._database._sqlite import SqliteDatabase, end_if_interrupted, lacks_tables, take_back, tell_of_fault
from kbatch._database._tables import age_s
from kbatch._outbox._base import BaseOutbox, BlockingOutbox, OutboxStatus
from kbatch._outbox._sqlite_admin import SqliteAdmin
from kbatch._outbox._sqlite_store import SqliteStore
from kbatch._outbox._sqlite_tables import SqliteTables
from kbatch._outbox._sqlite_writer import SqliteWriter
from kbatch._outbox._store import BUCKETS

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Sequence

    import msgspec
    import sqlalchemy.orm

    from kbatch._fastmap import Envelope, MappedBatch
    from kbatch._outbox._store import NewRow, OutboxAdmin, OutboxStore, OutboxWriter, ScheduledRow
    from kbatch._wire import HeadersLike, WireFormat

__all__ = ["BaseSqliteOutbox", "SqliteOutbox"]


class BaseSqliteOutbox(SqliteDatabase, BaseOutbox):
    """What the outboxes for threads and for asyncio have in common."""

    _shown = "kbatch.SqliteOutbox"
    _added = "messages"
    _tables: SqliteTables

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        prefix: str = "kbatch_",
        wire: str | WireFormat = "kbatch",
        encoder: msgspec.json.Encoder | msgspec.msgpack.Encoder | Callable[[Any, Any], bytes | None] | None = None,
        source: str | None = None,
        header_hook: Callable[[], HeadersLike | None] | None = None,
        max_message_bytes: int = 1_000_000,
    ) -> None:
        super().__init__(wire, encoder, source, header_hook, max_message_bytes, keeps_scheduled=True)
        self._set_path(path)
        self._tables = SqliteTables(prefix)
        sql = self._tables.sql
        right = "one = 1 AND version = {version} AND buckets = {buckets}"
        self._take_numbers = sql(f"UPDATE {{meta}} SET last_seq = last_seq + ? WHERE {right}")
        self._take_numbers_if_known = f"{self._take_numbers} AND {self._if_known()}"
        # CAST, since a connection may convert what comes from a column of a type.
        self._last_number = sql("SELECT CAST(last_seq AS INTEGER) FROM {meta} WHERE one = 1")
        self._insert_one = sql(
            "INSERT INTO {outbox} (bucket, seq, id, packed, created_at, deliver_by) "
            "VALUES (?, ? + (SELECT last_seq FROM {meta} WHERE one = 1), ?, ?, ?, ?)"
        )
        self._insert = sql(
            "INSERT INTO {outbox} (bucket, seq, id, packed, created_at, deliver_by) VALUES (?, ?, ?, ?, ?, ?)"
        )
        self._delete = sql("DELETE FROM {outbox} WHERE bucket = ? AND seq = ?")
        self._delete_scheduled = sql("DELETE FROM {later} WHERE bucket = ? AND seq = ?")
        self._insert_scheduled = sql(
            "INSERT INTO {later} (bucket, seq, id, packed, created_at, deliver_by, due_at, attempts, last_error, "
            "scheduled) VALUES (?, ?, ?, ?, ?, ?, ?, 0, '', 1)"
        )

    # -- adding

    def _add(self, connection: sqlite3.Connection, batch: MappedBatch) -> int:
        """Adds what an application has given, within its transaction."""
        self._check_connection(connection)  # an encoder or a generator may have ended the transaction
        try:
            return self._write(connection, (batch,), self._pool.count(batch))
        except sqlite3.Error as error:
            if lacks_tables(error):
                self._check_file_of(connection)
            end_if_interrupted(connection, error)
            raise self._tables.as_outbox_error(error, self._path) from error

    def _insert_all(self, connection: sqlite3.Connection, batches: Sequence[MappedBatch]) -> None:
        self._write(connection, batches, sum(map(self._pool.count, batches)))

    def _write(self, connection: sqlite3.Connection, batches: Sequence[MappedBatch], count: int) -> int:
        if not count:
            return 0
        cursor = connection.cursor()
        if count == 1:
            rows = self._pool.rows(batches, 0, BUCKETS, [])
            if rows:  # it is not scheduled
                self._take(cursor, 1)
                cursor.execute(self._insert_one, rows[0])
                return 1
        self._take(cursor, count)
        cursor.row_factory = None
        (last_seq,) = cursor.execute(self._last_number).fetchone()
        scheduled: list[ScheduledRow] = []
        rows = self._pool.rows(batches, last_seq - count + 1, BUCKETS, scheduled)
        self._insert_rows(cursor, rows, scheduled)
        return len(rows) + len(scheduled)

    def _take(self, cursor: sqlite3.Cursor, count: int) -> None:
        """Takes numbers, the last of which is then ``meta.last_seq``.

        It writes first: so the transaction has SQLite's one lock for writing, and nobody else takes numbers.
        """
        try:
            taken = cursor.execute(self._take_numbers_if_known, (count,)).rowcount
        except sqlite3.DatabaseError as error:
            if self._known not in str(error):
                raise
            self._set_known(cursor.connection)
            taken = cursor.execute(self._take_numbers, (count,)).rowcount
        if taken != 1:
            cursor.row_factory = None
            self._check_tables(cursor)
            raise self._tables.lacks_meta(self._path)

    def _insert_rows(self, cursor: sqlite3.Cursor, rows: list[NewRow], scheduled: list[ScheduledRow]) -> None:
        # All or none. A savepoint would do, and costs a copy of each page that is written.
        of_rows, of_scheduled = iter(rows), iter(scheduled)
        is_scheduled = False  # what is being inserted
        try:
            if rows:
                cursor.executemany(self._insert, of_rows)
            if scheduled:
                is_scheduled = True
                cursor.executemany(self._insert_scheduled, of_scheduled)
        except BaseException as error:
            if cursor.connection.in_transaction:  # SQLite may have ended it, as when the disk is full
                later = scheduled[: len(scheduled) - length_hint(of_scheduled)]
                hot = rows[: len(rows) - length_hint(of_rows)]
                begun = later if is_scheduled else hot
                if begun and isinstance(error, sqlite3.Error):  # else SQLite has refused the statement, and no row
                    begun.pop()  # the one that SQLite has refused
                self._take_back(cursor, hot, later)
            raise

    def _take_back(self, cursor: sqlite3.Cursor, rows: list[NewRow], scheduled: list[ScheduledRow]) -> None:
        try:
            if rows:
                cursor.executemany(self._delete, [row[:2] for row in rows])
            if scheduled:  # else its table need not be there
                cursor.executemany(self._delete_scheduled, [row[:2] for row in scheduled])
        except BaseException:
            # Half of them must not be committed.
            take_back(cursor.connection)
            raise

    # -- looking

    def _status(self, count_up_to: int) -> OutboxStatus:
        sql = self._tables.sql
        with self._connection() as connection:
            self._check_tables(connection)
            kinds = ("{outbox}", "{later} WHERE scheduled = 0", "{dead}", "{later} WHERE scheduled = 1")
            waiting, later, dead, scheduled = (
                connection.execute(
                    sql(f"SELECT count(*) FROM (SELECT 1 FROM {kind} LIMIT ?)"), (count_up_to,)
                ).fetchone()[0]
                for kind in kinds
            )
            ages = (
                connection.execute(
                    sql("SELECT created_at FROM {outbox} WHERE bucket = ? ORDER BY seq LIMIT 1"), (bucket,)
                ).fetchone()
                for bucket in range(BUCKETS)
            )
            oldest = min((age[0] for age in ages if age is not None), default=None)
            relays = connection.execute(sql("SELECT count(*) FROM {relay} WHERE {lives}")).fetchone()[0]
        return OutboxStatus(waiting, later, dead, age_s(oldest), relays, scheduled=scheduled)

    def open_store(self) -> OutboxStore:
        """The connection of a relay, which closes it.

        Raises:
            OutboxError: The tables are missing or another version's; the database does not answer.
        """
        tell_of_fault(sqlite3.sqlite_version)
        with self._checked_connection() as connection:
            return SqliteStore(connection, self._tables, self._path)

    def open_writer(self) -> OutboxWriter:
        """The connection of this process's DURABLE senders, who close it.

        Raises:
            OutboxError: The tables are missing or another version's; the database does not answer.
        """
        tell_of_fault(sqlite3.sqlite_version)
        with self._checked_connection() as connection:
            return SqliteWriter(connection, self._tables, self._path, self._insert_all, self._tell_watchers)

    def open_admin(self) -> OutboxAdmin:
        """As `BaseOutbox.open_admin`."""
        with self._checked_connection() as connection:
            return SqliteAdmin(connection, self._tables, self._path)


class SqliteOutbox(BaseSqliteOutbox, BlockingOutbox):
    """Takes envelopes within transactions of the application, in tables of its SQLite database; a `Relay` sends them.

    An envelope is mapped when it is added, and stored as it goes on the wire. Any number of threads may use one
    outbox, each with a connection of its own. `kbatch.aio.SqliteOutbox` is for asyncio.

    Args:
        path: The database file. The application's connections and the relay's must be to this file.
        prefix: What the names of the tables begin with.
        wire, encoder, source, header_hook: As for `Producer`.
        max_message_bytes: The largest record that is taken. It should be the relay's ``message.max.bytes`` at most, and
            the ``max.message.bytes`` of the topics.

    Raises:
        ConfigError: A value out of its range, or of the wrong type.
    """

    def create(self) -> None:
        """Makes the database file and the tables, as far as they are missing, and sets the database to WAL mode.

        Raises:
            OutboxError: The file is no database, or cannot be written; the tables are another version's; the file
                system has no WAL mode. Then no table was made.
        """
        self._create()

    def add(
        self,
        connection: sqlite3.Connection | sqlalchemy.Connection | sqlalchemy.orm.Session,
        envelopes: Iterable[Envelope[Any]],
        *,
        topic: str | None = None,
    ) -> int:
        """Adds envelopes within the transaction that `connection` is in: they are sent if it is committed.

        One with a future ``scheduled_time`` is sent then, by the database's clock, as if it was added at that time: it
        holds back no other of its key until then.

        All of them are mapped before anything is written. If this raises, none of them was added, and the transaction
        can go on, unless SQLite itself has ended it. After an exception of a signal handler, such as Ctrl-C, all of
        them may have been added: roll back. A transaction that only reads before should begin with ``BEGIN IMMEDIATE``:
        SQLite may refuse at once to let it write.

        Args:
            connection: One of ``sqlite3``, to this outbox's file, in a transaction; or a connection or session of
                SQLAlchemy 2 that uses one, after its first statement that writes.
            envelopes: Any iterable; it is read once. Of one topic and key (or partition, without a key) they are sent
                in the order in which transactions with them were written.
            topic: Where envelopes without a topic of their own go; ``None`` if each has one.

        Returns:
            How many were added: all but those whose ``deliver_by`` has passed.

        Raises:
            SerializationError: An envelope could not be mapped, or is too large.
            OutboxError: The connection is in no transaction, closed, another thread's or to another file; the tables
                are missing or another version's; the database takes no writes.
        """
        driver = self._driver(connection)
        count = self._add(driver, self._pool.map(self._mapper, topic, envelopes))
        self._tell_watchers()
        return count

    def status(self, *, count_up_to: int = 100_000) -> OutboxStatus:
        """What is in the outbox.

        Args:
            count_up_to: Of each kind no more are counted, since counting reads the rows.

        Raises:
            OutboxError: The tables are missing or another version's; the database does not answer.
        """
        return self._status(count_up_to)
