"""What type checkers see of an inbox and a listener with one."""

import sqlite3
from datetime import datetime
from typing import Any

import aiosqlite
import psycopg
import sqlalchemy.ext.asyncio
import sqlalchemy.orm
from typing_extensions import assert_type

import kbatch
from kbatch import aio


def threads(connection: sqlite3.Connection, order: kbatch.Envelope[int], now: datetime) -> None:
    inbox = kbatch.SqliteInbox("shop.db", retention_s=None)
    assert_type(inbox.accept(connection, order, group="billing"), bool)
    assert_type(inbox.accept_many(connection, (order for _ in range(3)), group="billing"), list[bool])
    assert_type(inbox.purge(3600.0, committed={"billing": now}), int)
    assert_type(inbox.status(count_up_to=10), kbatch.InboxStatus)
    assert_type(inbox.ddl(), str)
    session = inbox.open_session("billing")
    assert_type(session.handle(order, lambda envelope, connection: None), bool)
    assert_type(session.handle_batch([order], lambda envelopes, connection: None), int)
    inbox.accept("shop.db", order, group="billing")  # type: ignore[arg-type]
    inbox.accept(connection, order)  # type: ignore[call-arg]
    kbatch.Listener({}, ["orders"], print, inbox=inbox)
    kbatch.Listener({}, ["orders"], print, on_dead=lambda envelope, error: print(envelope.offset, error.args))
    kbatch.Listener({}, ["orders"], print, inbox="shop.db")  # type: ignore[arg-type]


def postgres(connection: psycopg.Connection[Any], session: sqlalchemy.orm.Session, order: kbatch.Envelope[int]) -> None:
    inbox = kbatch.PostgresInbox("postgresql://localhost/shop", schema="shop")
    assert_type(inbox.accept(connection, order, group="billing"), bool)
    assert_type(inbox.accept_many(session, [order], group="billing"), list[bool])
    kbatch.Listener({}, ["orders"], print, inbox=inbox)


async def sqlite_of_asyncio(
    connection: aiosqlite.Connection, session: sqlalchemy.ext.asyncio.AsyncSession, order: kbatch.Envelope[int]
) -> None:
    async def handle(envelope: kbatch.ReceivedEnvelope[int], connection: sqlite3.Connection) -> None: ...

    inbox = aio.SqliteInbox("shop.db", retention_s=None)
    assert_type(await inbox.accept(connection, order, group="billing"), bool)
    assert_type(await inbox.accept_many(session, [order], group="billing"), list[bool])
    assert_type(await inbox.purge(3600.0), int)
    assert_type(await inbox.status(), kbatch.InboxStatus)
    kbatch.Listener({}, ["orders"], print, inbox=inbox)
    aio.Listener({}, ["orders"], handle, inbox=inbox)


async def loops(
    connection: psycopg.AsyncConnection[Any],
    session: sqlalchemy.ext.asyncio.AsyncSession,
    order: kbatch.Envelope[int],
    error: kbatch.InboxError,
) -> None:
    async def handle(envelope: kbatch.ReceivedEnvelope[int], connection: psycopg.AsyncConnection[Any]) -> None: ...

    inbox = aio.PostgresInbox("postgresql://localhost/shop")
    assert_type(await inbox.accept(connection, order, group="billing"), bool)
    assert_type(await inbox.accept_many(session, [order], group="billing"), list[bool])
    assert_type(await inbox.purge(), int)
    assert_type(error.is_outage, bool)
    aio.Listener({}, ["orders"], handle, inbox=inbox)
    aio.Listener({}, ["orders"], handle, inbox=kbatch.SqliteInbox("shop.db"))
