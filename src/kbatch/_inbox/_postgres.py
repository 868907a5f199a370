"""An inbox in a PostgreSQL database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kbatch._database._postgres import PostgresDatabase
from kbatch._inbox._base import BaseInbox, InboxStatus, check_group, limits_of, time_of
from kbatch._inbox._postgres_marks import Marks
from kbatch._inbox._slots import OTHER_SLOT, SLOTS, slot_name
from kbatch._inbox._tables import PostgresInboxTables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from datetime import datetime

    import psycopg
    import sqlalchemy.orm

    from kbatch._fastmap import Envelope
    from kbatch._inbox._base import Partition
    from kbatch._inbox._session import InboxSession

__all__ = ["BasePostgresInbox", "PostgresInbox"]

_NOW_US = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"

# A mark is the end of the log at some time. Once the group has committed up to there, all that it had handled by that
# time is committed, whoever did it. A mark beyond the end is of a topic that was made anew. One of the future is of a
# clock that was set back since: what was handled after it may bear an earlier time, so nothing is known any more.
_NOTE = """
UPDATE {position} AS kept SET
    safe_until = CASE WHEN mark_at > $2 OR safe_until > $2 THEN 0
        WHEN mark_offset <= committed AND committed <= log_end THEN mark_at ELSE safe_until END,
    mark_at = CASE WHEN mark_offset IS NULL OR mark_offset <= committed OR mark_offset > log_end OR mark_at > $2
        THEN $2 ELSE mark_at END,
    mark_offset = CASE WHEN mark_offset IS NULL OR mark_offset <= committed OR mark_offset > log_end OR mark_at > $2
        THEN log_end ELSE mark_offset END
FROM unnest($3::text[], $4::text::integer[], $5::text::bigint[], $6::text::bigint[])
    AS found (name, number, committed, log_end)
WHERE group_id = $1 AND topic = name AND partition = number
"""


class BasePostgresInbox(PostgresDatabase, BaseInbox):
    """What the inboxes for threads and for asyncio have in common."""

    _shown = "kbatch.PostgresInbox"
    _added = "marks"
    _tables: PostgresInboxTables

    def __init__(
        self,
        conninfo: str | None = None,
        *,
        connect: Callable[[], psycopg.Connection[Any]] | None = None,
        schema: str = "public",
        prefix: str = "kbatch_",
        retention_s: float | None = 604_800.0,
    ) -> None:
        super().__init__(retention_s)
        self._tables = PostgresInboxTables(schema, prefix)
        self._set_database(conninfo, connect)
        # Through text, since some drivers ask for other types.
        self._mark_one = self._marking("$1", "$2::text", "$3::text")
        self._mark_many = self._marking("$1::text", "$2::text", "$3::text", "$4::integer")
        self._meta_statement = self._meta()

    def ddl(self) -> str:
        """The statements that make the tables, for those who do so themselves. Executed again, they change nothing.

        The schema must be there, and all need ``USAGE`` on it. Whoever marks needs ``INSERT`` and ``SELECT`` on
        ``inbox``, and ``SELECT`` on ``inbox_meta``; listeners need ``SELECT``, ``INSERT`` and ``UPDATE`` on
        ``inbox_position``, too. Whoever purges, as listeners do unless ``retention_s`` is ``None``, needs ``SELECT`` on
        ``inbox_meta`` and ``inbox_position``, and ``SELECT``, ``UPDATE``, ``DELETE`` and ``TRUNCATE`` on the tables of
        the days, ``inbox_day_00`` to ``inbox_day_31``, and on ``inbox_other``.
        """
        return self._tables.ddl()

    def _marking(self, slots: str, group: str, ids: str, count: str | None = None) -> str:
        """The statement that marks one id, whose count of rows tells whether it was new; or, with a `count`, an array
        of distinct ids, which returns how many were new and, unless all were, which."""
        right = self._tables.sql("{meta} AS meta WHERE one = 1 AND version = {version} ON CONFLICT DO NOTHING")
        into = self._tables.sql("INSERT INTO {inbox} (slot, group_id, id)")
        if count is None:
            return f"{into} SELECT {slots}::smallint, {group}, {ids}::uuid FROM {right}"
        return (
            f"WITH marked AS ({into} SELECT row.slot, {group}, row.id "
            f"FROM unnest({slots}::smallint[], {ids}::uuid[]) AS row (slot, id), {right} RETURNING id) "
            f"SELECT count(*), CASE WHEN count(*) < {count} THEN array_agg(id)::text END FROM marked"
        )

    def _parameters(self, marks: Marks, group: str) -> tuple[str, tuple[Any, ...]]:
        if len(marks.ids) == 1:
            return self._mark_one, (marks.slots[0], group, marks.ids[0])
        slots, ids = marks.array_texts()
        return self._mark_many, (slots, group, ids, len(marks.distinct))

    # -- with a connection of its own

    def _status(self, count_up_to: int) -> InboxStatus:
        from kbatch._database._postgres_connection import run_raw

        with self._connection() as connection:
            self._check_tables(connection)
            statement = self._tables.sql("SELECT count(*) FROM (SELECT FROM {inbox} LIMIT $1) AS handled")
            ((handled,),) = run_raw(connection, statement, (count_up_to,))
            safe = self._safe_until(connection)
        return InboxStatus(handled, {group: time_of(until) for group, until in safe.items()})

    def _safe_until(self, connection: psycopg.Connection[Any]) -> dict[str, int]:
        from kbatch._database._postgres_connection import run_raw

        statement = self._tables.sql("SELECT group_id, min(safe_until) FROM {position} GROUP BY group_id")
        return {group: int(until) for group, until in run_raw(connection, statement)}

    def _purge(self, older_than_s: float | None, committed: Mapping[str, datetime] | None) -> int:
        from kbatch._database._postgres_connection import run_raw
        from kbatch._inbox._postgres_purge import Purge

        age_us = self._age_us(older_than_s)
        with self._connection() as connection:
            self._check_tables(connection)
            ((now_us,),) = run_raw(connection, f"SELECT {_NOW_US}")
            limits = limits_of(age_us, now_us, self._safe_until(connection), committed)
            purge = Purge(connection, self._tables, limits)
            day = now_us // 86_400_000_000
            # The days of which all ids are so old. A day has a slot again after all others.
            last = (now_us - age_us) // 86_400_000_000 - 1
            first = day + 2 - SLOTS
            for each in range(first, last + 1):
                purge.empty(slot_name(each % SLOTS))
            for slot in (OTHER_SLOT, *(range(SLOTS) if last < first else ())):
                purge.delete(slot_name(slot))
        return purge.deleted

    def clock_us(self) -> int:
        """The clock by which ids are marked, in microseconds since 1970."""
        from kbatch._database._postgres_connection import run_raw

        with self._connection() as connection:
            ((now_us,),) = run_raw(connection, f"SELECT {_NOW_US}")
        return int(now_us)

    def note_offsets(self, group: str, asked_at_us: int, offsets: Mapping[Partition, tuple[int, int]]) -> None:
        """What a listener tells: of partitions, the offset that the group has committed and the end of the log, which
        brokers were asked for after the time `asked_at_us`."""
        from kbatch._database._postgres_connection import run_raw, writing

        found = [(*partition, *told) for partition, told in sorted(offsets.items())]
        if found:
            topics, partitions, committed, ends = (list(each) for each in zip(*found, strict=True))
            numbers = [f"{{{','.join(map(str, each))}}}" for each in (partitions, committed, ends)]
            with self._connection() as connection, writing(connection):
                run_raw(connection, self._tables.sql(_NOTE), (group, asked_at_us, topics, *numbers))

    def check(self) -> None:
        """Looks whether the tables can be used; waits for the database.

        Raises:
            InboxError: The tables are missing or another version's; the database does not answer.
        """
        with self._checked_connection() as connection:
            connection.close()

    def open_session(self, group: str) -> InboxSession:
        """What a listener's worker handles envelopes with, on a thread. It makes a connection when it is needed.

        Raises:
            InboxError: psycopg is not installed.
        """
        try:
            from kbatch._inbox._postgres_worker import PostgresInboxSession
        except ImportError as error:
            raise self._tables.error(
                f"the inbox {self._tables!r} needs psycopg for a connection of its own: pip install "
                f"'kbatch-kafka[postgres]' ({error})"
            ) from error
        return PostgresInboxSession(self, group)


class PostgresInbox(BasePostgresInbox):
    """Knows which ids a consumer group has handled, in tables of the PostgreSQL database that its handlers write.

    Any number of threads may use one inbox, each with a connection of its own. PostgreSQL 13 or later; the package
    ``psycopg`` 3.2 or later, which ``pip install 'kbatch-kafka[postgres]'`` brings. `kbatch.aio.PostgresInbox` is for
    asyncio.

    Args:
        conninfo: Where the database is, as for ``psycopg.connect``: for listeners, `create`, `status` and `purge`. The
            application's connections must be to this database.
        connect: Makes a new psycopg connection, in place of `conninfo`: for passwords that expire, or a TLS context. It
            is called without arguments for each connection that kbatch needs, on several threads, also after a loss.
            It must return one of its own, in no transaction: kbatch uses it with psycopg's defaults and in autocommit
            mode, and closes it. What it raises counts as a database that does not answer, and it is called again. Let
            it have a ``connect_timeout`` and ``keepalives_idle``, as kbatch's own connections do.
        schema: Where the tables are. It must be there.
        prefix: What the names of the tables begin with.
        retention_s: How long a listener keeps an id after it was handled, at least; ``None``: for ever.

    Raises:
        ConfigError: A value out of its range, or of the wrong type.
    """

    def create(self) -> None:
        """Makes the tables, as far as they are missing.

        Raises:
            InboxError: The tables are another version's; the schema is missing; the database does not answer. Then
                no table was made.
        """
        self._create()

    def accept(
        self,
        connection: psycopg.Connection[Any] | sqlalchemy.Connection | sqlalchemy.orm.Session,
        envelope: Envelope[Any],
        *,
        group: str,
    ) -> bool:
        """Marks an envelope's id as handled by a group, within the transaction that `connection` is in.

        It waits for another transaction that marks the same id, until that has ended. After an error of the database
        the transaction must be rolled back, as after any statement that fails.

        Args:
            connection: One of psycopg 3, or a connection or session of SQLAlchemy 2 that uses it, to this inbox's
                database. If it is not in a transaction yet and not in autocommit mode, this begins one, as any
                statement does.
            envelope: What was received.
            group: The consumer group.

        Returns:
            False if the group has handled it before: there is nothing to be done.

        Raises:
            InboxError: The connection is in autocommit mode, closed or in a transaction that has failed; the tables
                are missing or another version's; the database takes no writes.
        """
        return self.accept_many(connection, (envelope,), group=group)[0]

    def accept_many(
        self,
        connection: psycopg.Connection[Any] | sqlalchemy.Connection | sqlalchemy.orm.Session,
        envelopes: Iterable[Envelope[Any]],
        *,
        group: str,
    ) -> list[bool]:
        """As `accept`, for many: whether each is new. Of those with the same id only the first one may be."""
        check_group(group)
        driver = self._driver(connection)
        self._check_psycopg(driver)
        marks = Marks(envelopes)
        self._check_psycopg(driver)  # a generator may have ended the transaction
        if not marks.ids:
            return []
        import psycopg
        from psycopg.rows import tuple_row

        statement, parameters = self._parameters(marks, group)
        try:
            cursor = psycopg.RawCursor(driver, row_factory=tuple_row)
            cursor.execute(statement.encode(), parameters)
            count, marked = (cursor.rowcount, None) if len(marks.ids) == 1 else cursor.fetchall()[0]
            if not count:
                self._check_look(cursor.execute(self._meta_statement.encode()).fetchone())
                return [False] * len(marks.ids)
        except psycopg.Error as error:
            raise self._tables.as_inbox_error(error) from error
        return marks.found(count, marked)

    def status(self, *, count_up_to: int = 100_000) -> InboxStatus:
        """What is in the inbox.

        Args:
            count_up_to: No more ids are counted, since counting reads the rows.

        Raises:
            InboxError: The tables are missing or another version's; the database does not answer.
        """
        return self._status(count_up_to)

    def purge(self, older_than_s: float | None = None, *, committed: Mapping[str, datetime] | None = None) -> int:
        """Removes ids that were handled so many seconds ago.

        An id stays while its record may be read again. Of a group that a `Listener` reads with this inbox, that is
        known: what it had handled before a time that `status` tells was committed. Of other groups nothing is known
        and nothing removed, unless `committed` says it.

        Ids of UUID version 7 lie in a table for each day of theirs. Such a table is emptied as a whole, once all that
        it has may go: others that mark ids of that day, and `status`, wait while its rows are counted, some tenths of a
        second for a million. What cannot be emptied yet, and other ids, are deleted in batches of a transaction each.
        An id may stay a day longer than it has to.

        Args:
            older_than_s: By default the inbox's ``retention_s``, or 7 days. Above 29 days ids are deleted in batches.
            committed: By group, a time before which all that it handled is committed: no record of it is read again,
                however long its consumers were stopped. This counts more than what listeners have told.

        Returns:
            How many were removed.

        Raises:
            InboxError: The tables are missing or another version's; the database does not answer.
        """
        return self._purge(older_than_s, committed)
