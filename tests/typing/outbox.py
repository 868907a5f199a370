"""What type checkers see of an outbox and its relay."""

import sqlite3
from typing import Any

import psycopg
import sqlalchemy.ext.asyncio
import sqlalchemy.orm
from typing_extensions import assert_type

import kbatch
from kbatch import aio


def outbox(connection: sqlite3.Connection, order: object, settings: dict[str, str], producer: kbatch.Producer) -> None:
    outbox = kbatch.SqliteOutbox("shop.db", wire="raw", max_message_bytes=2_000)
    assert_type(outbox.add(connection, (kbatch.Envelope(order) for _ in range(3)), topic="orders"), int)
    assert_type(outbox.ddl(), str)
    assert_type(outbox.status(count_up_to=10).oldest_age_s, float)
    (letter,) = outbox.dead_letters.find(kbatch.OutboxQuery(topic="orders"), limit=1)
    assert_type(letter, kbatch.DeadLetter)
    assert_type(letter.envelope, kbatch.Envelope[Any])
    assert_type(outbox.dead_letters.replay(kbatch.OutboxQuery(numbers=[letter.number])), int)
    assert_type(outbox.scheduled.find(after=None), list[kbatch.ScheduledMessage])
    outbox.dead_letters.find(after=outbox.scheduled.find()[0])  # type: ignore[arg-type]
    outbox.dead_letters.discard("orders")  # type: ignore[arg-type]
    with kbatch.Relay(outbox, settings, retry=kbatch.RetryPolicy()) as relay:
        assert_type(relay, kbatch.Relay)
        assert_type(relay.drain(1.5), int)
        assert_type(relay.stats(), dict[str, int])
    kbatch.Relay(outbox, producer)
    kbatch.Relay("shop.db", settings)  # type: ignore[arg-type]
    outbox.add("shop.db", [kbatch.Envelope(order)])  # type: ignore[arg-type]
    outbox.add(connection, [kbatch.Envelope(order)], "orders")  # type: ignore[call-arg]


def postgres(session: sqlalchemy.orm.Session, envelopes: list[kbatch.Envelope[bytes]]) -> None:
    outbox = kbatch.PostgresOutbox("postgresql://localhost/shop", schema="shop", wire="raw")
    with psycopg.connect("postgresql://localhost/shop") as connection:
        assert_type(outbox.add(connection, envelopes, topic="orders", serialize_keys=True), int)
    assert_type(outbox.add(session, envelopes), int)
    assert_type(outbox.add(session.connection(), envelopes), int)
    outbox.add("connection", envelopes)  # type: ignore[arg-type]
    kbatch.Relay(outbox, {"bootstrap.servers": "localhost:9092"})


async def postgres_of_asyncio(
    connection: psycopg.AsyncConnection[dict[str, object]],
    session: sqlalchemy.ext.asyncio.AsyncSession,
    envelopes: list[kbatch.Envelope[bytes]],
) -> None:
    outbox = aio.PostgresOutbox("postgresql://localhost/shop")
    await outbox.create()
    assert_type(await outbox.add(connection, envelopes, topic="orders"), int)
    assert_type(await outbox.add(session, envelopes), int)
    assert_type(await outbox.add(await session.connection(), envelopes), int)
    assert_type(await outbox.status(), kbatch.OutboxStatus)
    kbatch.Relay(outbox, {"bootstrap.servers": "localhost:9092"})
