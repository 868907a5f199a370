"""What type checkers see of an outbox and its relay."""

import sqlite3
from datetime import datetime
from typing import Any

from typing_extensions import assert_type

import kbatch
import kbatch.aio


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


async def of_loops(number: int, envelope: kbatch.Envelope[Any], due_at: datetime) -> None:
    threads, loops = kbatch.PostgresOutbox("postgresql://"), kbatch.aio.PostgresOutbox("postgresql://")
    assert_type(threads.dead_letters, kbatch.DeadLetters)
    assert_type(threads.scheduled.cancel(kbatch.OutboxQuery()), int)
    assert_type(loops.dead_letters, kbatch.aio.DeadLetters)
    assert_type(await loops.dead_letters.find(limit=None), list[kbatch.DeadLetter])
    assert_type(await loops.dead_letters.summary(), list[kbatch.DeadLetterCount])
    await loops.dead_letters.replay_edited(number, envelope)
    assert_type(await loops.scheduled.reschedule(kbatch.OutboxQuery(), due_at), int)
    await loops.scheduled.cancel()  # type: ignore[call-arg]
