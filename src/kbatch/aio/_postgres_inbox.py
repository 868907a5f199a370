"""The inbox in PostgreSQL for asyncio."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from kbatch._database._postgres import AioPostgresDatabase, is_asyncpg
from kbatch._inbox._base import check_group
from kbatch._inbox._postgres import BasePostgresInbox
from kbatch._inbox._postgres_marks import Marks
from kbatch.aio._inbox import AwaitableInbox

if TYPE_CHECKING:
    from collections.abc import Iterable

    import asyncpg
    import psycopg
    import sqlalchemy.ext.asyncio

    from kbatch._fastmap import Envelope
    from kbatch._inbox._tables import PostgresInboxTables

__all__ = ["PostgresInbox"]


class PostgresInbox(AioPostgresDatabase, BasePostgresInbox, AwaitableInbox):
    """Knows which ids a consumer group has handled, in tables of the PostgreSQL database that its handlers write.

    Takes what `kbatch.PostgresInbox` takes.
    """

    _shown = "kbatch.aio.PostgresInbox"
    _tables: PostgresInboxTables

    async def accept(
        self,
        connection: psycopg.AsyncConnection[Any]
        | asyncpg.Connection[Any]
        | sqlalchemy.ext.asyncio.AsyncConnection
        | sqlalchemy.ext.asyncio.AsyncSession,
        envelope: Envelope[Any],
        *,
        group: str,
    ) -> bool:
        """Marks an envelope's id as handled by a group, within the transaction that `connection` is in.

        Takes, returns and raises what `kbatch.PostgresInbox.accept` does, but for the connection: it is one of asyncpg,
        in a transaction, or of psycopg 3 for asyncio, or a connection or session of SQLAlchemy 2 for asyncio that uses
        one of them. If the task is cancelled, the id may be marked: roll back.
        """
        return (await self.accept_many(connection, (envelope,), group=group))[0]

    async def accept_many(
        self,
        connection: psycopg.AsyncConnection[Any]
        | asyncpg.Connection[Any]
        | sqlalchemy.ext.asyncio.AsyncConnection
        | sqlalchemy.ext.asyncio.AsyncSession,
        envelopes: Iterable[Envelope[Any]],
        *,
        group: str,
    ) -> list[bool]:
        """As `accept`, for many: whether each is new. Of those with the same id only the first one may be."""
        check_group(group)
        driver = await self._driver_aio(connection)
        self._check_aio(driver)
        marks = Marks(envelopes)
        self._check_aio(driver)  # a generator may have ended the transaction
        if not marks.ids:
            return []
        statement, parameters = self._parameters(marks, group)
        mark = self._mark_by_asyncpg if is_asyncpg(driver) else self._mark_by_psycopg
        count, marked = await mark(driver, statement, parameters)
        return marks.found(count, marked) if count else [False] * len(marks.ids)

    async def _mark_by_psycopg(
        self, connection: psycopg.AsyncConnection[Any], statement: str, parameters: tuple[Any, ...]
    ) -> tuple[int, str | bytes | None]:
        import psycopg
        from psycopg.rows import tuple_row

        try:
            cursor = psycopg.AsyncRawCursor(connection, row_factory=tuple_row)
            await cursor.execute(statement.encode(), parameters)
            found = (cursor.rowcount, None) if statement is self._mark_one else (await cursor.fetchall())[0]
            if not found[0]:
                await cursor.execute(self._meta_statement.encode())
                self._check_look(await cursor.fetchone())
        except psycopg.Error as error:
            raise self._tables.as_inbox_error(error) from error
        return found

    async def _mark_by_asyncpg(
        self, connection: asyncpg.Connection[Any], statement: str, parameters: tuple[Any, ...]
    ) -> tuple[int, str | bytes | None]:
        import asyncpg

        try:
            if statement is self._mark_one:
                told = await connection.execute(statement, *parameters)
                count, marked = int(told.rpartition(" ")[2]), None
            else:
                count, marked = await connection.fetchrow(statement, *parameters)
            if not count:
                self._check_look(await connection.fetchrow(self._meta_statement))
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, asyncio.TimeoutError) as error:
            raise self._tables.as_inbox_error(error) from error
        return count, marked
