"""An inbox in a SQLite database."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING, Any

from kbatch._database._sqlite import SqliteDatabase, end_if_interrupted, lacks_tables, take_back, tell_of_fault
from kbatch._database._tables import now_us
from kbatch._inbox._base import BaseInbox, InboxStatus, check_group, id_of, limits_of, time_of
from kbatch._inbox._session import InboxSession, ended_by_handler
from kbatch._inbox._tables import SqliteInboxTables

if TYPE_CHECKING:
    import os
    import uuid
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    import sqlalchemy.orm

    from kbatch._errors import InboxError
    from kbatch._fastmap import Envelope
    from kbatch._inbox._base import Partition

__all__ = ["BaseSqliteInbox", "SqliteInbox"]

_DELETED_AT_ONCE = 1000


class BaseSqliteInbox(SqliteDatabase, BaseInbox):
    """What the inboxes for threads and for asyncio have in common."""

    _shown = "kbatch.SqliteInbox"
    _added = "marks"
    _tables: SqliteInboxTables

    def __init__(
        self, path: str | os.PathLike[str], *, prefix: str = "kbatch_", retention_s: float | None = 604_800.0
    ) -> None:
        super().__init__(retention_s)
        self._set_path(path)
        self._tables = SqliteInboxTables(prefix)
        sql = self._tables.sql
        mark = (
            "INSERT INTO {inbox} (group_id, id, handled_at) "
            "SELECT ?, ?, ? FROM {meta} WHERE one = 1 AND version = {version}"
        )
        self._mark = sql(f"{mark} ON CONFLICT DO NOTHING")
        self._mark_if_known = sql(f"{mark} AND {self._if_known()} ON CONFLICT DO NOTHING")
        self._unmark = sql("DELETE FROM {inbox} WHERE group_id = ? AND id = ? AND handled_at = ?")

    # -- marking

    def _accept_all(self, connection: sqlite3.Connection, ids: Sequence[uuid.UUID], group: str) -> list[bool]:
        """Marks what an application has given, within its transaction."""
        self._check_connection(connection)  # a generator may have ended the transaction
        try:
            return self._mark_all(connection, ids, group)
        except sqlite3.Error as error:
            if lacks_tables(error):
                self._check_file_of(connection)
            end_if_interrupted(connection, error)
            raise self._tables.as_inbox_error(error, self._path) from error

    def _mark_all(self, connection: sqlite3.Connection, ids: Sequence[uuid.UUID], group: str) -> list[bool]:
        """All or none. It writes first: so the transaction has SQLite's one lock for writing."""
        if not ids:
            return []
        cursor = connection.cursor()
        cursor.row_factory = None
        handled_at = now_us()
        rows = [(group, each.bytes, handled_at) for each in ids]
        found: list[bool] = []
        begun = 0  # of so many it is not known that they are not marked
        try:
            for row in rows:
                begun += 1
                try:
                    marked = cursor.execute(self._mark_if_known, row).rowcount
                except sqlite3.DatabaseError as error:
                    if self._known not in str(error):
                        raise
                    self._set_known(connection)
                    marked = cursor.execute(self._mark, row).rowcount
                found.append(marked > 0)
            if not all(found):  # or the tables are another version's
                self._check_tables(cursor)
        except BaseException as error:
            if isinstance(error, sqlite3.Error):
                begun = len(found)  # SQLite has refused the last one
            if connection.in_transaction:  # SQLite may have ended it, as when the disk is full
                new = [row for row, is_new in zip(rows, found, strict=False) if is_new]
                self._take_back(cursor, new + rows[len(found) : begun])
            raise
        return found

    def _take_back(self, cursor: sqlite3.Cursor, rows: Sequence[tuple[str, bytes, int]]) -> None:
        try:
            if rows:
                cursor.executemany(self._unmark, rows)
        except BaseException:
            take_back(cursor.connection)
            raise

    # -- looking

    def _status(self, count_up_to: int) -> InboxStatus:
        with self._connection() as connection:
            self._check_tables(connection)
            statement = self._tables.sql("SELECT count(*) FROM (SELECT 1 FROM {inbox} LIMIT ?)")
            (handled,) = connection.execute(statement, (count_up_to,)).fetchone()
            safe = self._safe_until(connection)
        return InboxStatus(handled, {group: time_of(until) for group, until in safe.items()})

    def _safe_until(self, connection: sqlite3.Connection) -> dict[str, int]:
        return dict(
            connection.execute(
                self._tables.sql("SELECT group_id, min(safe_until) FROM {position} GROUP BY group_id")
            ).fetchall()
        )

    # -- retention

    def _purge(self, older_than_s: float | None, committed: Mapping[str, datetime] | None) -> int:
        age_us = self._age_us(older_than_s)
        deleted, last = 0, 0
        with self._connection() as connection:
            self._check_tables(connection)
            now = now_us()
            limits = limits_of(age_us, now, self._safe_until(connection), committed)
            newest = max(limits.values(), default=0)
            statement = self._tables.sql(
                "SELECT number, group_id, handled_at FROM {inbox} WHERE number > ? ORDER BY number LIMIT ?"
            )
            delete = self._tables.sql("DELETE FROM {inbox} WHERE number = ?")
            date_back = self._tables.sql("UPDATE {inbox} SET handled_at = ? WHERE number = ?")
            while rows := connection.execute(statement, (last, _DELETED_AT_ONCE)).fetchall():
                last = rows[-1][0]
                old = [(number,) for number, group, handled_at in rows if handled_at < limits.get(group, 0)]
                # Of a clock that was set back since. It was handled by now, and must not hold back what is behind it.
                future = [(now, number) for number, _, handled_at in rows if handled_at > now]
                if old or future:
                    connection.execute("BEGIN IMMEDIATE")
                    connection.executemany(delete, old)
                    connection.executemany(date_back, future)
                    connection.execute("COMMIT")
                    deleted += len(old)
                if newest <= rows[0][2] <= now:  # the rows are in the order in which they were handled
                    break
        return deleted

    def clock_us(self) -> int:
        """The clock by which ids are marked, in microseconds since 1970."""
        return now_us()

    def note_offsets(self, group: str, asked_at_us: int, offsets: Mapping[Partition, tuple[int, int]]) -> None:
        """What a listener tells: of partitions, the offset that the group has committed and the end of the log, which
        brokers were asked for after the time `asked_at_us`."""
        statement = self._tables.sql(_NOTE)
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            for (topic, partition), (committed, end) in sorted(offsets.items()):
                place = {"group": group, "topic": topic, "partition": partition}
                connection.execute(statement, {"done": committed, "last": end, "now": asked_at_us, **place})
            connection.execute("COMMIT")

    def check(self) -> None:
        """Looks whether the tables can be used; waits for the database.

        Raises:
            InboxError: The tables are missing or another version's; the database does not answer.
        """
        with self._connection() as connection:
            self._check_tables(connection)

    # -- listeners

    def open_session(self, group: str) -> InboxSession:
        """What a listener's worker handles envelopes with, on a thread. It makes a connection when it is needed."""
        tell_of_fault(sqlite3.sqlite_version)
        return SqliteInboxSession(self, group)


# As PostgreSQL's.
_NOTE = """
UPDATE {position} SET
    safe_until = CASE WHEN mark_at > :now OR safe_until > :now THEN 0
        WHEN mark_offset <= :done AND :done <= :last THEN mark_at ELSE safe_until END,
    mark_at = CASE WHEN mark_offset IS NULL OR mark_offset <= :done OR mark_offset > :last OR mark_at > :now
        THEN :now ELSE mark_at END,
    mark_offset = CASE WHEN mark_offset IS NULL OR mark_offset <= :done OR mark_offset > :last OR mark_at > :now
        THEN :last ELSE mark_offset END
WHERE group_id = :group AND topic = :topic AND partition = :partition
"""


class SqliteInboxSession(InboxSession):
    """`BEGIN IMMEDIATE` takes SQLite's one lock for writing at once: so no statement of a handler finds it taken."""

    def __init__(self, inbox: BaseSqliteInbox, group: str) -> None:
        super().__init__(group)
        self._inbox = inbox
        self._new_position = inbox._tables.sql(
            "INSERT INTO {position} (group_id, topic, partition) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
        )

    def _open(self) -> sqlite3.Connection:
        with self._inbox._checked_connection(of_many_threads=self._is_shared) as connection:
            return connection

    def _close(self, connection: sqlite3.Connection) -> None:
        with contextlib.suppress(sqlite3.Error):
            connection.close()

    def _begin(self, envelopes: Sequence[Envelope[Any]], partitions: Sequence[Partition]) -> Sequence[bool]:
        ids = [id_of(envelope) for envelope in envelopes]
        run = self._connection.execute
        try:
            run("BEGIN IMMEDIATE")
            marks = self._inbox._mark_all(self._connection, ids, self.group)
            for topic, partition in partitions:
                run(self._new_position, (self.group, topic, partition))
            run("SAVEPOINT kbatch_inbox")  # it is gone if the handler ends the transaction
        except sqlite3.Error as error:
            raise self._error(error) from error
        return marks

    def _commit(self) -> None:
        run = self._connection.execute
        if self._is_ended():
            raise ended_by_handler()
        try:
            run("COMMIT")
        except sqlite3.Error as error:
            if self._inbox._tables.is_outage(error):
                raise self._error(error) from error
            raise  # a constraint that is looked at now: the handler's work

    def _is_ended(self) -> bool:
        try:
            if not self._connection.in_transaction:
                return True
            self._connection.execute("RELEASE kbatch_inbox")
        except (sqlite3.OperationalError, sqlite3.ProgrammingError):
            return True
        return False

    def _after(self, error: BaseException) -> InboxError | None:
        if isinstance(error, sqlite3.OperationalError) and ("is full" in str(error) or "disk I/O" in str(error)):
            return self._error(error)
        return ended_by_handler() if self._is_ended() else None

    def _roll_back(self) -> None:
        self._connection.total_changes  # noqa: B018 it asks whether the connection is open
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def _error(self, error: sqlite3.Error) -> InboxError:
        return self._inbox._tables.as_inbox_error(error, self._inbox._path, own=True)


class SqliteInbox(BaseSqliteInbox):
    """Knows which ids a consumer group has handled, in tables of the SQLite database that its handlers write.

    Any number of threads may use one inbox, each with a connection of its own. `kbatch.aio.SqliteInbox` is for
    asyncio.

    Args:
        path: The database file. The application's connections must be to this file.
        prefix: What the names of the tables begin with.
        retention_s: How long a listener keeps an id after it was handled, at least; ``None``: for ever.

    Raises:
        ConfigError: A value out of its range, or of the wrong type.
    """

    def create(self) -> None:
        """Makes the database file and the tables, as far as they are missing, and sets the database to WAL mode.

        Raises:
            InboxError: The file is no database, or cannot be written; the tables are another version's; the file
                system has no WAL mode. Then no table was made.
        """
        self._create()

    def accept(
        self,
        connection: sqlite3.Connection | sqlalchemy.Connection | sqlalchemy.orm.Session,
        envelope: Envelope[Any],
        *,
        group: str,
    ) -> bool:
        """Marks an envelope's id as handled by a group, within the transaction that `connection` is in.

        If this raises, nothing was marked, and the transaction can go on, unless SQLite itself has ended it. A
        transaction should begin with ``BEGIN IMMEDIATE``: SQLite may refuse at once to let one write that has only read
        before.

        Args:
            connection: One of ``sqlite3``, to this inbox's file, in a transaction; or a connection or session of
                SQLAlchemy 2 that uses one, after its first statement that writes.
            envelope: What was received.
            group: The consumer group.

        Returns:
            False if the group has handled it before: there is nothing to be done.

        Raises:
            InboxError: The connection is in no transaction, closed, another thread's or to another file; the tables
                are missing or another version's; the database takes no writes.
        """
        return self.accept_many(connection, (envelope,), group=group)[0]

    def accept_many(
        self,
        connection: sqlite3.Connection | sqlalchemy.Connection | sqlalchemy.orm.Session,
        envelopes: Iterable[Envelope[Any]],
        *,
        group: str,
    ) -> list[bool]:
        """As `accept`, for many: whether each is new. Of those with the same id only the first one may be."""
        check_group(group)
        driver = self._driver(connection)
        return self._accept_all(driver, [id_of(envelope) for envelope in envelopes], group)

    def status(self, *, count_up_to: int = 100_000) -> InboxStatus:
        """What is in the inbox.

        Args:
            count_up_to: No more ids are counted, since counting reads the rows.

        Raises:
            InboxError: The tables are missing or another version's; the database does not answer.
        """
        return self._status(count_up_to)

    def purge(self, older_than_s: float | None = None, *, committed: Mapping[str, datetime] | None = None) -> int:
        """Deletes ids that were handled so many seconds ago, in batches of a transaction each.

        An id stays while its record may be read again. Of a group that a `Listener` reads with this inbox, that is
        known: what it had handled before a time that `status` tells was committed. Of other groups nothing is known
        and nothing deleted, unless `committed` says it.

        Args:
            older_than_s: By default the inbox's ``retention_s``, or 7 days.
            committed: By group, a time before which all that it handled is committed: no record of it is read again,
                however long its consumers were stopped. This counts more than what listeners have told.

        Returns:
            How many were deleted.

        Raises:
            InboxError: The tables are missing or another version's; the database does not answer.
        """
        return self._purge(older_than_s, committed)
