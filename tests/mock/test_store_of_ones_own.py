"""A third store, `tests/memory_outbox.py`: it passes the public suites; relays and DURABLE senders work with it."""

import asyncio
import contextlib
import threading
import uuid
from typing import Any

import pytest

from kbatch import KafkaTopic, Listener, OutboxQuery, Producer, Relay, RetryPolicy, SenderMode, aio
from kbatch.testing import MockCluster
from kbatch.testing.compliance import DeadLetterCompliance, InboxCompliance, OutboxCompliance
from tests.inboxes import consumer
from tests.memory_inbox import MemoryInbox, Tables
from tests.memory_outbox import MemoryOutbox
from tests.relays import check_history, numbered
from tests.waiting import until

from .clients import read_back


class InMemory:
    @pytest.fixture
    def outbox(self) -> MemoryOutbox:
        return MemoryOutbox()

    def let_time_pass(self, outbox: MemoryOutbox, seconds: float) -> None:
        outbox.ahead_ms += int(seconds * 1000)

    def refuse_row(self, outbox: MemoryOutbox, table: str, message_id: uuid.UUID) -> None:
        outbox.refused[table] = message_id.bytes

    def take_rows(self, outbox: MemoryOutbox, table: str) -> None:
        del outbox.refused[table]


class TestOutboxInMemory(InMemory, OutboxCompliance):
    pass


class TestDeadLettersInMemory(InMemory, DeadLetterCompliance):
    pass


class TestInboxInMemory(InboxCompliance):
    @pytest.fixture
    def inbox(self) -> MemoryInbox:
        return MemoryInbox()

    def write(self, inbox: MemoryInbox, connection: Tables, number: int) -> None:
        connection.effects.append(number)

    def written(self, inbox: MemoryInbox) -> list[int]:
        return inbox.tables.effects

    def let_time_pass(self, inbox: MemoryInbox, seconds: float) -> None:
        inbox.ahead_us += int(seconds * 1e6)


def config(cluster: MockCluster) -> dict[str, Any]:
    return {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0, "delivery.timeout.ms": 3000}


def add(outbox: MemoryOutbox, *envelopes: Any) -> None:
    with outbox.transaction() as tables:
        outbox.add(tables, envelopes, topic="orders")


def test_its_dead_letters_are_told(kafka_cluster: MockCluster) -> None:
    outbox, told = MemoryOutbox(), []
    kafka_cluster.create_topic("orders", 1)
    kafka_cluster.set_topic_error("orders", "TOPIC_AUTHORIZATION_FAILED")
    add(outbox, *numbered(range(3)))
    with Relay(outbox, config(kafka_cluster), retry=RetryPolicy(max_attempts=1), on_dead=told.append) as relay:
        assert relay.drain(30) == 0
    assert sorted(told, key=lambda letter: letter.number) == sorted(
        outbox.dead_letters.find(), key=lambda letter: letter.number
    )
    assert len(told) == 3


def test_a_listener_takes_it(kafka_cluster: MockCluster) -> None:
    inbox = MemoryInbox()
    orders = numbered(range(20), message_type="order")

    def handle(envelope: Any, tables: Tables) -> None:
        tables.effects.append(envelope.message)

    with Producer(config(kafka_cluster)) as producer:
        assert producer.send_batch("orders", [*orders, *orders])
    listener = Listener(consumer(kafka_cluster), ["orders"], handle, types={"order": int}, inbox=inbox, concurrency=4)
    thread = threading.Thread(target=listener.run)
    thread.start()
    until(lambda: listener.stats()["handled"] == 40, "all of them")
    listener.stop()
    thread.join()
    assert sorted(inbox.tables.effects) == list(range(20))


def test_a_listener_of_asyncio_takes_it(kafka_cluster: MockCluster) -> None:
    inbox = MemoryInbox()
    orders = numbered(range(20), message_type="order")

    async def handle(envelope: Any, tables: Tables) -> None:
        await asyncio.sleep(0)
        tables.effects.append(envelope.message)

    with Producer(config(kafka_cluster)) as producer:
        assert producer.send_batch("orders", [*orders, *orders])

    async def work() -> None:
        options = {"types": {"order": int}, "inbox": inbox, "concurrency": 4}
        listener = aio.Listener(consumer(kafka_cluster), ["orders"], handle, **options)
        task = asyncio.create_task(listener.run())
        while listener.stats()["handled"] < 40 and not task.done():
            await asyncio.sleep(0.01)
        listener.stop()
        await task

    asyncio.run(work())
    assert sorted(inbox.tables.effects) == list(range(20))


def test_relays_send_from_it_side_by_side(kafka_cluster: MockCluster) -> None:
    outbox = MemoryOutbox(wire="raw")
    kafka_cluster.create_topic("orders", partitions=3)
    relays = [Relay(outbox, config(kafka_cluster)) for _ in range(2)]
    threads = [threading.Thread(target=relay.run) for relay in relays]
    for thread in threads:
        thread.start()
    for first in range(0, 2000, 50):
        add(outbox, *numbered(range(first, first + 50)))
        with contextlib.suppress(RuntimeError), outbox.transaction() as tables:
            outbox.add(tables, numbered(range(9000, 9010)), topic="orders")
            raise RuntimeError  # rolled back
    until(lambda: not outbox.tables.outbox, "all of them in Kafka")
    for relay, thread in zip(relays, threads, strict=True):
        relay.stop()
        thread.join()
        relay.close()
    check_history(range(2000), read_back(kafka_cluster.bootstrap_servers, "orders"))
    assert all(held.owner is None for held in outbox.tables.leases.values())


def test_what_brokers_refuse_dies_there_and_is_replayed(kafka_cluster: MockCluster) -> None:
    outbox = MemoryOutbox(wire="raw")
    kafka_cluster.create_topic("orders", partitions=3)
    kafka_cluster.set_topic_error("orders", "TOPIC_AUTHORIZATION_FAILED")
    add(outbox, *numbered(range(30)))
    retry = RetryPolicy(max_attempts=2, initial_backoff_s=0.02, max_backoff_s=0.05)
    with Relay(outbox, config(kafka_cluster), retry=retry) as relay:
        assert relay.drain(60) == 0
        assert {letter.attempts for letter in outbox.dead_letters.find()} == {2}
    kafka_cluster.set_topic_error("orders", 0)
    assert outbox.dead_letters.replay(OutboxQuery()) == 30
    with Relay(outbox, config(kafka_cluster)) as relay:
        assert relay.drain(60) == 0
    check_history(range(30), read_back(kafka_cluster.bootstrap_servers, "orders"))


def test_durable_senders_send_through_it(kafka_cluster: MockCluster) -> None:
    outbox = MemoryOutbox(wire="raw")
    kafka_cluster.create_topic("orders", partitions=3)
    options: dict[str, Any] = {"outbox": outbox, "config": config(kafka_cluster)}
    with KafkaTopic("orders", SenderMode.DURABLE, **options).create_sender() as sender:
        for envelope in numbered(range(100)):
            assert sender.send(envelope)
        with outbox.transaction() as tables:
            assert sender.send(numbered([100])[0], connection=tables)

    async def main() -> None:
        async with aio.KafkaTopic("orders", SenderMode.DURABLE, **options).create_sender() as sender:
            assert all(await asyncio.gather(*(sender.send(each) for each in numbered(range(101, 200)))))

    asyncio.run(main())
    with Relay(outbox, config(kafka_cluster)) as relay:
        assert relay.drain(60) == 0
    check_history(range(200), read_back(kafka_cluster.bootstrap_servers, "orders"))
