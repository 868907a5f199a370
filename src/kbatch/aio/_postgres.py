"""The outbox in PostgreSQL for asyncio."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from kbatch._database._postgres import AioPostgresDatabase, is_asyncpg
from kbatch._outbox._postgres import BasePostgresOutbox
from kbatch._outbox._postgres_rows import COPIED, copy_stream
from kbatch.aio._outbox import AwaitableOutbox

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    import asyncpg
    import psycopg
    import sqlalchemy.ext.asyncio

    from kbatch._fastmap import Envelope
    from kbatch._outbox._postgres_rows import NewRows
    from kbatch._outbox._postgres_tables import PostgresTables

__all__ = ["PostgresOutbox"]


class PostgresOutbox(AioPostgresDatabase, BasePostgresOutbox, AwaitableOutbox):
    """Takes envelopes within transactions of the application, in tables of its PostgreSQL database.

    Takes what `kbatch.PostgresOutbox` takes. A `kbatch.aio.Relay` sends them, or a `kbatch.Relay` in a thread or a
    process of its own.
    """

    _shown = "kbatch.aio.PostgresOutbox"
    _tables: PostgresTables

    async def add(
        self,
        connection: psycopg.AsyncConnection[Any]
        | asyncpg.Connection[Any]
        | sqlalchemy.ext.asyncio.AsyncConnection
        | sqlalchemy.ext.asyncio.AsyncSession,
        envelopes: Iterable[Envelope[Any]],
        *,
        topic: str | None = None,
        serialize_keys: bool = False,
    ) -> int:
        """Adds envelopes within the transaction that `connection` is in: they are sent if it is committed.

        Takes, returns and raises what `kbatch.PostgresOutbox.add` does, but for the connection: it is one of asyncpg,
        in a transaction, or of psycopg 3 for asyncio, or a connection or session of SQLAlchemy 2 for asyncio that uses
        one of them. The envelopes are mapped at once, without a pause for other tasks. If the task is cancelled, all
        of them may have been added: roll back.
        """
        driver = await self._driver_aio(connection)
        self._check_aio(driver)
        rows = self._rows((self._pool.map(self._mapper, topic, envelopes),))
        self._check_aio(driver)  # an encoder or a generator may have ended the transaction
        if rows.total:
            await (self._write_asyncpg if is_asyncpg(driver) else self._write_psycopg)(driver, rows, serialize_keys)
        self._tell_watchers()
        return rows.total

    async def _write_psycopg(
        self, connection: psycopg.AsyncConnection[Any], rows: NewRows, serialize_keys: bool
    ) -> None:
        import psycopg
        from psycopg.rows import tuple_row

        try:
            cursor = psycopg.AsyncRawCursor(connection, row_factory=tuple_row)
            if serialize_keys:
                await cursor.execute(self._lock_keys.encode(), (self._keys_of(rows),))
            for statement, parameters, given in self._inserts(rows):
                count = (await cursor.execute(statement.encode(), parameters)).rowcount
                if not count:
                    await cursor.execute(self._look.encode())
                    self._check_look(await cursor.fetchone())
                self._check_count(count, given)
            if rows.are_copied:
                await cursor.execute(self._look.encode())
                self._check_look(await cursor.fetchone())
                async with cursor.copy(self._copy.encode()) as copy:
                    for piece in copy_stream(rows.hot):
                        await copy.write(piece)
                self._check_count(cursor.rowcount, len(rows.hot))
        except psycopg.Error as error:
            raise self._tables.as_outbox_error(error) from error

    async def _write_asyncpg(self, connection: asyncpg.Connection[Any], rows: NewRows, serialize_keys: bool) -> None:
        import asyncpg

        async def pieces() -> AsyncIterator[bytes]:
            for piece in copy_stream(rows.hot):
                yield piece

        try:
            if serialize_keys:
                await connection.execute(self._lock_keys, self._keys_of(rows))
            for statement, parameters, given in self._inserts(rows):
                count = _told(await connection.execute(statement, *parameters))
                if not count:
                    self._check_look(await connection.fetchrow(self._look))
                self._check_count(count, given)
            if rows.are_copied:
                self._check_look(await connection.fetchrow(self._look))
                told = await connection.copy_to_table(
                    self._tables.bare["outbox"],
                    schema_name=self._tables.schema,
                    columns=COPIED.split(", "),
                    source=pieces(),
                    format="binary",
                )
                self._check_count(_told(told), len(rows.hot))
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, asyncio.TimeoutError) as error:
            raise self._tables.as_outbox_error(error) from error


def _told(tag: str) -> int:
    """How many rows a statement has inserted, by what the server says."""
    return int(tag.rpartition(" ")[2])
