"""What type checkers see of an outbox and its relay."""

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
    assert_type(outbox.scheduled.summary()[0].messages, int)
    outbox.dead_letters.find(after=outbox.scheduled.find()[0])  # type: ignore[arg-type]
    outbox.dead_letters.discard("orders")  # type: ignore[arg-type]
    with kbatch.Relay(outbox, settings, retry=kbatch.RetryPolicy()) as relay:
        assert_type(relay, kbatch.Relay)
        assert_type(relay.drain(1.5), int)
        assert_type(relay.stats(), dict[str, int])
        assert_type(relay.state, kbatch.CircuitState)
        assert_type(relay.last_error, kbatch.KbatchError | None)
    kbatch.Relay(outbox, producer, on_state_change=lambda before, after: print(before.value, after.value))
    kbatch.Relay(outbox, producer, on_dead=lambda letter: print(letter.died_at))
    kbatch.Relay(outbox, producer, on_dead=lambda letter: print(letter.no))  # type: ignore[attr-defined]
    kbatch.Relay(outbox, producer, batch_size="7")  # type: ignore[arg-type]
    kbatch.Relay(outbox, producer, colour="red")  # type: ignore[call-arg]
    kbatch.Relay("shop.db", settings)  # type: ignore[arg-type]
    outbox.add("shop.db", [kbatch.Envelope(order)])  # type: ignore[arg-type]
    outbox.add(connection, [kbatch.Envelope(order)], "orders")  # type: ignore[call-arg]


def durable(connection: sqlite3.Connection, order: object, settings: dict[str, str]) -> None:
    outbox = kbatch.SqliteOutbox("shop.db")
    topic = kbatch.KafkaTopic("orders", kbatch.SenderMode.DURABLE, outbox=outbox, config=settings)
    with topic.create_sender() as sender:
        assert_type(sender, kbatch.DurableSender)
        assert_type(sender.send(kbatch.Envelope(order), timeout=1.5), bool)
        assert_type(sender.send(kbatch.Envelope(order), connection=connection), bool)
        assert_type(sender.flush(), int)
    fenced = kbatch.KafkaTopic(
        "orders",
        kbatch.SenderMode.DURABLE,
        outbox=outbox,
        config=settings,
        relay={"fencing": "kafka", "retry": kbatch.RetryPolicy(), "lease_s": 120},
    )
    assert_type(fenced.create_sender(), kbatch.DurableSender)
    kbatch.KafkaTopic("orders", kbatch.SenderMode.DURABLE, outbox=outbox, relay={})  # type: ignore[call-overload]
    kbatch.KafkaTopic("orders", kbatch.SenderMode.DURABLE, outbox=outbox, config=settings, relay={"colour": 1})  # type: ignore[call-overload]
    kbatch.KafkaTopic("orders", kbatch.SenderMode.DURABLE, outbox=outbox, close_timeout_s=1.0)
    kbatch.KafkaTopic("orders", kbatch.SenderMode.DURABLE, outbox="shop.db")  # type: ignore[call-overload]
    kbatch.DurableSender(outbox, None, close_timeout_s=1.0)


async def on_a_loop(order: object, settings: dict[str, str]) -> None:
    outbox = kbatch.SqliteOutbox("shop.db")
    topic = aio.KafkaTopic(
        "orders", kbatch.SenderMode.DURABLE, outbox=outbox, config=settings, relay={"strict_order": True}
    )
    async with topic.create_sender() as sender:
        assert_type(sender, aio.DurableSender)
        assert_type(await sender.send(kbatch.Envelope(order)), bool)
        assert_type(await sender.close(1.5), int)
    async with aio.Relay(outbox, settings, strict_order=True, fencing="kafka") as relay:
        assert_type(relay, aio.Relay)
        assert_type(await relay.drain(1.5), int)
        await relay.run()
        relay.stop()
        assert_type(relay.stats(), dict[str, int])


async def sqlite_of_asyncio(
    connection: aiosqlite.Connection,
    session: sqlalchemy.ext.asyncio.AsyncSession,
    envelopes: list[kbatch.Envelope[bytes]],
    settings: dict[str, str],
) -> None:
    outbox = aio.SqliteOutbox("shop.db", wire="raw", max_message_bytes=2_000)
    await outbox.create()
    assert_type(await outbox.add(connection, envelopes, topic="orders"), int)
    assert_type(await outbox.add(session, envelopes), int)
    assert_type(await outbox.add(await session.connection(), envelopes), int)
    assert_type((await outbox.status()).waiting, int)
    assert_type(await outbox.dead_letters.find(), list[kbatch.DeadLetter])
    await outbox.add(sqlite3.connect("shop.db"), envelopes)  # type: ignore[arg-type]
    kbatch.Relay(outbox, settings)
    aio.Relay(outbox, settings)
    aio.DurableSender(outbox, "orders")
    aio.KafkaTopic("orders", kbatch.SenderMode.DURABLE, outbox=outbox, config=settings)


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


async def of_loops(number: int, envelope: kbatch.Envelope[Any], due_at: datetime) -> None:
    kbatch.PostgresOutbox(connect=lambda: psycopg.connect(password="made"))
    kbatch.PostgresOutbox(connect=lambda: "postgresql://")  # type: ignore[arg-type,return-value]
    threads, loops = kbatch.PostgresOutbox("postgresql://"), aio.PostgresOutbox("postgresql://")
    assert_type(threads.dead_letters, kbatch.DeadLetters)
    assert_type(threads.scheduled.cancel(kbatch.OutboxQuery()), int)
    assert_type(loops.dead_letters, aio.DeadLetters)
    assert_type(await loops.dead_letters.find(limit=None), list[kbatch.DeadLetter])
    assert_type(await loops.dead_letters.summary(), list[kbatch.DeadLetterCount])
    assert_type(await loops.scheduled.summary(), list[kbatch.ScheduledCount])
    await loops.dead_letters.replay_edited(number, envelope)
    assert_type(await loops.scheduled.reschedule(kbatch.OutboxQuery(), due_at), int)
    await loops.scheduled.cancel()  # type: ignore[call-arg]
