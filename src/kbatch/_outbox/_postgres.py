"""An outbox in a PostgreSQL database."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from kbatch._database._postgres import PostgresDatabase
from kbatch._database._tables import age_s
from kbatch._errors import ConfigError, OutboxError, type_name
from kbatch._fastmap import packed_key_hash
from kbatch._outbox._base import BaseOutbox, BlockingOutbox, OutboxStatus
from kbatch._outbox._postgres_rows import COPIED, NewRows, array_text, copy_stream, joined, pieces
from kbatch._outbox._postgres_tables import PostgresTables
from kbatch._outbox._store import BUCKETS
from kbatch._text import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import msgspec
    import psycopg
    import sqlalchemy.orm

    from kbatch._fastmap import Envelope, MappedBatch
    from kbatch._outbox._postgres_listener import PostgresListener
    from kbatch._outbox._postgres_rows import Row
    from kbatch._outbox._store import OutboxAdmin, OutboxStore, OutboxWriter, ScheduledRow
    from kbatch._wire import HeadersLike, WireFormat

__all__ = ["BasePostgresOutbox", "PostgresOutbox"]


class BasePostgresOutbox(PostgresDatabase, BaseOutbox):
    """What the outboxes for threads and for asyncio have in common."""

    _shown = "kbatch.PostgresOutbox"
    _added = "messages"
    _tables: PostgresTables

    def __init__(
        self,
        conninfo: str | None = None,
        *,
        connect: Callable[[], psycopg.Connection[Any]] | None = None,
        schema: str = "public",
        prefix: str = "kbatch_",
        wire: str | WireFormat = "kbatch",
        encoder: msgspec.json.Encoder | msgspec.msgpack.Encoder | Callable[[Any, Any], bytes | None] | None = None,
        source: str | None = None,
        header_hook: Callable[[], HeadersLike | None] | None = None,
        max_message_bytes: int = 1_000_000,
        notify: bool = False,
    ) -> None:
        super().__init__(wire, encoder, source, header_hook, max_message_bytes, keeps_scheduled=True)
        if not isinstance(notify, bool):
            raise ConfigError(f"notify must be bool, not {type_name(notify)}")
        self._notify = notify
        self._listener: PostgresListener | None = None
        self._listening = threading.RLock()
        self._tables = PostgresTables(schema, prefix)
        self._set_database(conninfo, connect)
        sql = self._tables.sql
        # A transaction has its number before a row of it has one: else a relay could not know below which numbers
        # rows may come to light. PostgreSQL looks at what no row decides before it looks at any row.
        right = "{meta} AS meta WHERE one = 1 AND version = {version} AND buckets = {buckets}"
        right += " AND pg_current_xact_id() IS NOT NULL"
        # Once for each statement, in the same way; PostgreSQL sends one for each transaction.
        told = f"(SELECT count(pg_notify('{self._tables.channel}', '')) FROM {{relay}} WHERE listens = 1 AND {{lives}})"
        if notify:
            right += f" AND {told} >= 0"
        into = "INSERT INTO {outbox} (bucket, id, packed, deliver_by, created_at) SELECT "
        self._insert_one = sql(
            f"{into} $1::smallint, encode($2::bytea, 'hex')::uuid, $3::bytea, $4::bigint, $5::bigint FROM {right}"
        )
        # Through text, since some drivers ask for lists where a parameter is an array.
        arrays = "$1::text::smallint[], $2::text::integer[], $3::text::integer[], $4::text::bigint[]"
        self._insert = sql(
            f"{into} row.bucket, encode(substr($5::bytea, row.place, 16), 'hex')::uuid, "
            f"substr($5::bytea, row.place + 16, row.size), row.deliver_by, $6::bigint "
            f"FROM unnest({arrays}) AS row (bucket, place, size, deliver_by), {right}"
        )
        self._insert_scheduled = sql(
            "INSERT INTO {later} (bucket, seq, id, packed, deliver_by, created_at, due_at, attempts, last_error, "
            "scheduled) SELECT row.bucket, {next_number}, encode(substr($5::bytea, row.place, 16), 'hex')::uuid, "
            "substr($5::bytea, row.place + 16, row.size), row.deliver_by, $6::bigint, row.due_at, 0, '', 1 "
            f"FROM unnest({arrays}, $7::text::bigint[]) AS row (bucket, place, size, deliver_by, due_at), {right}"
        )
        looked = "version, buckets, pg_current_xact_id()::text" + (f", {told}" if notify else "")
        self._look = sql(f"SELECT {looked} FROM {{meta}} WHERE one = 1")
        # In one order, so that no two transactions wait for each other. A lock has the number of a topic and key.
        numbers = "SELECT DISTINCT number FROM unnest($1::text::bigint[]) AS number ORDER BY number OFFSET 0"
        self._lock_keys = f"SELECT pg_advisory_xact_lock(number) FROM ({numbers}) AS sorted"
        self._copy = sql(f"COPY {{outbox}} ({COPIED}) FROM STDIN (FORMAT binary)")

    def ddl(self) -> str:
        """The statements that make the tables, for those who do so themselves. Executed again, they change nothing.

        The schema must be there, and all need ``USAGE`` on it. Whoever adds needs ``INSERT`` on the table ``outbox``,
        ``USAGE`` on its sequence and ``SELECT`` on ``outbox_meta``, and ``INSERT`` on ``outbox_later`` for what is
        scheduled; relays, and who looks after dead letters, need ``SELECT``, ``INSERT``, ``UPDATE`` and ``DELETE`` on
        all of the tables, and ``USAGE`` on the sequence. Leave its ``CACHE`` at 1: with more, records of a key are sent
        in another order than that in which they were added.
        """
        return self._tables.ddl()

    def open_store(self) -> OutboxStore:
        """The connection of a relay, which closes it.

        Raises:
            OutboxError: The tables are missing or another version's; the database does not answer; psycopg is not
                installed.
        """
        with self._checked_connection() as connection:
            from kbatch._outbox._postgres_store import PostgresStore

            return PostgresStore(connection, self._tables, listens=self._notify)

    def open_writer(self) -> OutboxWriter:
        """The connection of this process's DURABLE senders, who close it.

        Raises:
            OutboxError: As of `open_store`.
        """
        with self._checked_connection() as connection:
            from kbatch._outbox._postgres_writer import PostgresWriter

            return PostgresWriter(connection, self._tables, self._connection, self._insert_all, self._tell_watchers)

    def watch(self, watcher: Callable[[bool], object]) -> None:
        """As `BaseOutbox.watch`. With ``notify=True`` it knows of the commits of other processes."""
        super().watch(watcher)
        if self._notify:
            from kbatch._outbox._postgres_listener import PostgresListener

            with self._listening:
                if self._listener is None or not self._listener.is_alive():
                    self._listener = PostgresListener(self._connection, self._tables, self._tell_watchers)
                    self._listener.start()

    def unwatch(self, watcher: Callable[[bool], object]) -> None:
        """As `BaseOutbox.unwatch`."""
        super().unwatch(watcher)
        with self._listening:
            if not self._watchers and self._listener is not None:
                self._listener.stop()
                self._listener = None

    def open_admin(self) -> OutboxAdmin:
        """As `BaseOutbox.open_admin`."""
        with self._checked_connection() as connection:
            from kbatch._outbox._postgres_admin import PostgresAdmin

            return PostgresAdmin(connection, self._tables)

    def _status(self, count_up_to: int) -> OutboxStatus:
        statement = self._tables.sql(
            "SELECT (SELECT count(*) FROM (SELECT FROM {outbox} LIMIT $1) AS waiting), "
            "(SELECT count(*) FROM (SELECT FROM {later} WHERE scheduled = 0 LIMIT $1) AS later), "
            "(SELECT count(*) FROM (SELECT FROM {dead} LIMIT $1) AS dead), "
            "(SELECT count(*) FROM (SELECT FROM {later} WHERE scheduled = 1 LIMIT $1) AS scheduled), "
            "(SELECT min(created_at) FROM generate_series(0, {buckets} - 1) AS each, LATERAL ("
            "SELECT created_at FROM {outbox} WHERE bucket = each::smallint ORDER BY seq LIMIT 1) AS oldest), "
            "(SELECT count(*) FROM {relay} WHERE {lives}), "
            "(SELECT n_dead_tup FROM pg_stat_all_tables WHERE schemaname = $2 AND relname = $3)"
        )
        with self._connection() as connection:
            self._check_tables(connection)
            import psycopg

            cursor = psycopg.RawCursor(connection)
            named = (self._tables.schema, self._tables.bare["outbox"])
            cursor.execute(statement.encode(), (count_up_to, *named))
            waiting, later, dead, scheduled, oldest, relays, unvacuumed = cursor.fetchall()[0]
        return OutboxStatus(
            waiting, later, dead, age_s(oldest), relays, unvacuumed=unvacuumed or 0, scheduled=scheduled
        )

    # -- with a connection of the application

    def _rows(self, batches: Sequence[MappedBatch]) -> NewRows:
        scheduled: list[ScheduledRow] = []
        return NewRows(self._pool.rows(batches, 0, BUCKETS, scheduled), scheduled)

    def _keys_of(self, rows: NewRows) -> str:
        numbers = (packed_key_hash(row[3]) for row in rows.hot)
        return array_text(number for number in numbers if number is not None)

    def _inserts(self, rows: NewRows) -> Iterable[tuple[str, tuple[Any, ...], int]]:
        """The statements that insert rows but for those that are copied, and how many rows each has. None is inserted
        if the tables are another version's."""
        hot, scheduled = rows
        if scheduled:
            return self._inserts_of_both([] if rows.are_copied else hot, scheduled)
        return (self._statement(hot),) if hot and not rows.are_copied else ()

    def _inserts_of_both(
        self, hot: list[Row], scheduled: list[ScheduledRow]
    ) -> Iterator[tuple[str, tuple[Any, ...], int]]:
        if hot:
            yield self._statement(hot)
        for some in pieces(scheduled):
            due_at = array_text(row[6] for row in some)
            yield self._insert_scheduled, (*joined(some), some[0][4], due_at), len(some)

    def _statement(self, rows: list[Row]) -> tuple[str, tuple[Any, ...], int]:
        bucket, _, id_bytes, packed, created_at, deliver_by = rows[0]
        if len(rows) == 1:
            return self._insert_one, (bucket, id_bytes, packed, deliver_by, created_at), 1
        return self._insert, (*joined(rows), created_at), len(rows)

    def _check_count(self, count: int, given: int) -> None:
        if count != given:
            raise OutboxError(
                f"the outbox {self._tables!r} has taken {count} of {counted(given, 'row')}: a trigger or a rule of "
                "the table keeps the others out; roll back"
            )

    def _insert_all(self, connection: psycopg.Connection[Any], batches: Sequence[MappedBatch]) -> None:
        self._write(connection, self._rows(batches), False)

    def _write(self, connection: psycopg.Connection[Any], rows: NewRows, serialize_keys: bool) -> None:
        import psycopg

        try:
            cursor = psycopg.RawCursor(connection, row_factory=psycopg.rows.tuple_row)
            if serialize_keys:
                cursor.execute(self._lock_keys.encode(), (self._keys_of(rows),))
            for statement, parameters, given in self._inserts(rows):
                count = cursor.execute(statement.encode(), parameters).rowcount
                if not count:
                    self._check_look(cursor.execute(self._look.encode()).fetchone())
                self._check_count(count, given)
            if rows.are_copied:
                self._check_look(cursor.execute(self._look.encode()).fetchone())
                with cursor.copy(self._copy.encode()) as copy:
                    for piece in copy_stream(rows.hot):
                        copy.write(piece)
                self._check_count(cursor.rowcount, len(rows.hot))
        except psycopg.Error as error:
            raise self._tables.as_outbox_error(error) from error


class PostgresOutbox(BasePostgresOutbox, BlockingOutbox):
    """Takes envelopes within transactions of the application, in tables of its PostgreSQL database; a `Relay` sends
    them.

    An envelope is mapped when it is added, and stored as it goes on the wire. Any number of threads may use one
    outbox, each with a connection of its own. PostgreSQL 13 or later; the package ``psycopg`` 3.2 or later, which
    ``pip install 'kbatch-kafka[postgres]'`` brings. `kbatch.aio.PostgresOutbox` is for asyncio.

    Args:
        conninfo: Where the database is, as for ``psycopg.connect``: for relays, `create` and `status`. The
            application's connections must be to this database.
        connect: Makes a new psycopg connection, in place of `conninfo`: for passwords that expire, or a TLS context. It
            is called without arguments for each connection that kbatch needs, on several threads, also after a loss.
            It must return one of its own, in no transaction: kbatch uses it with psycopg's defaults and in autocommit
            mode, and closes it. What it raises counts as a database that does not answer, and it is called again. Let
            it have a ``connect_timeout`` and ``keepalives_idle``, as kbatch's own connections do.
        schema: Where the tables are. It must be there.
        prefix: What the names of the tables begin with.
        wire, encoder, source, header_hook: As for `Producer`.
        max_message_bytes: The largest record that is taken. It should be the relay's ``message.max.bytes`` at most, and
            the ``max.message.bytes`` of the topics.
        notify: What is added tells relays that are idle, by ``NOTIFY``, so that they look at once and not within 0.1 s.
            Both the application's outbox and the relay's need it; whoever adds needs ``SELECT`` on ``outbox_relay``.
            A relay has one more connection for it, which a pool in transaction mode cannot give: then it polls.
            PostgreSQL lets transactions that tell commit one at a time, so more than 200 rows a second tell nobody.

    Raises:
        ConfigError: A value out of its range, or of the wrong type.
    """

    def create(self) -> None:
        """Makes the tables, as far as they are missing.

        Raises:
            OutboxError: The tables are another version's; the schema is missing; the database does not answer. Then
                no table was made.
        """
        self._create()

    def add(
        self,
        connection: psycopg.Connection[Any] | sqlalchemy.Connection | sqlalchemy.orm.Session,
        envelopes: Iterable[Envelope[Any]],
        *,
        topic: str | None = None,
        serialize_keys: bool = False,
    ) -> int:
        """Adds envelopes within the transaction that `connection` is in: they are sent if it is committed.

        One with a future ``scheduled_time`` is sent then, by the database's clock, as if it was added at that time: it
        holds back no other of its key until then.

        All of them are mapped before anything is written: if that raises, the transaction can go on. After an error of
        the database it must be rolled back, as after any statement that fails.

        Args:
            connection: One of psycopg 3, or a connection or session of SQLAlchemy 2 that uses it, to this outbox's
                database. If it is not in a transaction yet and not in autocommit mode, this begins one, as any
                statement does.
            envelopes: Any iterable; it is read once. Of one topic and key (or partition, without a key) they are sent
                in the order in which they were added, if transactions with the same key follow each other: as when
                each has locked a row of the key's before.
            topic: Where envelopes without a topic of their own go; ``None`` if each has one.
            serialize_keys: Transactions with the same key follow each other: each waits here until the others have
                ended. For applications in which they would not do so anyway. It takes an advisory lock for each key;
                by its defaults a server has room for some 6,000 at a time (``max_locks_per_transaction``).
                A transaction that adds more than once may wait for another that waits for it; PostgreSQL ends one.

        Returns:
            How many were added: all but those whose ``deliver_by`` has passed.

        Raises:
            SerializationError: An envelope could not be mapped, or is too large.
            OutboxError: The connection is in autocommit mode, closed or in a transaction that has failed; the tables
                are missing or another version's; the database takes no writes.
        """
        driver = self._driver(connection)
        self._check_psycopg(driver)
        rows = self._rows((self._pool.map(self._mapper, topic, envelopes),))
        self._check_psycopg(driver)  # an encoder or a generator may have ended the transaction
        count = rows.total
        if count:
            self._write(driver, rows, serialize_keys)
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
