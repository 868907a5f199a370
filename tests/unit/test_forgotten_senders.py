"""Senders that nobody closes: what they hold is sent, they are collected, and a warning tells of them."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

import kbatch
from kbatch import Envelope, aio
from kbatch.testing import MemoryProducer

from ..sending import KINDS, Driver
from ..waiting import until


def of_senders() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kbatch-sender")]


@pytest.fixture
def producer() -> Iterator[MemoryProducer]:
    with MemoryProducer() as producer:
        yield producer


def forget(kind: str, producer: Any, use: Any, **options: Any) -> None:
    """Makes a sender, has it used, forgets it, and waits until it has been collected."""
    driver = Driver(kind, producer, "orders", options=options)
    ends = weakref.ref(driver.agent), weakref.ref(driver.sender)
    use(driver)
    driver.forget()
    until(lambda: gc.collect() >= 0 and [end() for end in ends] == [None, None], "the end of the sender")


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_holds_nothing(kind: str, producer: MemoryProducer) -> None:
    def use(driver: Driver) -> None:
        driver.send(Envelope(1))
        assert driver.flush() == 0

    with pytest.warns(ResourceWarning, match=r"^unclosed <kbatch\..*BatchedSender to 'orders', 0 buffered, "):
        forget(kind, producer, use)
    until(lambda: not of_senders(), "the end of its threads")
    assert not producer.closed


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_holds_is_sent(kind: str, producer: MemoryProducer) -> None:
    def use(driver: Driver) -> None:
        driver.send_all(Envelope(n) for n in range(25))
        assert len(driver) >= 5

    with pytest.warns(ResourceWarning, match="unclosed"):
        forget(kind, producer, use, batch_size=10, batch_timeout_ms=200)
    assert [record.value() for record in producer.records] == [b"%d" % n for n in range(25)]
    until(lambda: not of_senders(), "the end of its threads")


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_was_never_used_or_was_closed_is_told_of_by_nobody(kind: str, producer: MemoryProducer) -> None:
    def send_and_close(driver: Driver) -> None:
        driver.send(Envelope(1))
        assert driver.close() == 0

    for use in (lambda driver: None, send_and_close):
        forget(kind, producer, use)


def test_the_producer_of_its_topic_ends_with_it(kafka_cluster: kbatch.testing.MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    topic = kbatch.KafkaTopic(
        "orders", mode=kbatch.SenderMode.BUFFERED, config={"bootstrap.servers": kafka_cluster.bootstrap_servers}
    )
    sender = topic.create_sender()
    sender.send(Envelope(1))
    assert sender.flush(30) == 0
    made = sender._agent._handle.producer
    del sender
    with pytest.warns(ResourceWarning, match="unclosed"):
        gc.collect()
    until(lambda: made.closed, "the end of its producer")


@pytest.mark.parametrize("mode", [kbatch.SenderMode.INLINE, kbatch.SenderMode.BUFFERED])
@pytest.mark.parametrize("module", [kbatch, aio])
def test_one_that_was_never_used_keeps_no_producer_from_its_end(module: Any, mode: kbatch.SenderMode) -> None:
    topic = module.KafkaTopic("orders", mode=mode, config={"bootstrap.servers": "127.0.0.1:1", "log_level": 0})
    forgotten, other = topic.create_sender(), topic.create_sender()
    made = other._handle.producer if mode is kbatch.SenderMode.INLINE else other._agent._handle.producer
    made._core.start()
    del forgotten
    gc.collect()
    assert not made.closed
    closing = other.close()
    if module is aio:
        asyncio.run(closing)
    assert made.closed


@pytest.mark.parametrize("mode", [kbatch.SenderMode.INLINE, kbatch.SenderMode.BUFFERED])
@pytest.mark.parametrize("module", [kbatch, aio])
def test_the_producer_of_the_only_one_is_collected_with_it(module: Any, mode: kbatch.SenderMode) -> None:
    topic = module.KafkaTopic("orders", mode=mode, config={"bootstrap.servers": "127.0.0.1:1"})
    sender = topic.create_sender()
    made = weakref.ref((sender._handle if mode is kbatch.SenderMode.INLINE else sender._agent._handle).producer)
    del sender
    gc.collect()
    assert made() is None
    again = topic.create_sender()  # with a producer of its own
    closing = again.close()
    if module is aio:
        asyncio.run(closing)


@pytest.mark.parametrize("mode", [kbatch.SenderMode.INLINE, kbatch.SenderMode.BUFFERED])
def test_one_that_was_closed_gives_its_producer_back_once(mode: kbatch.SenderMode) -> None:
    topic = kbatch.KafkaTopic("orders", mode=mode, config={"bootstrap.servers": "127.0.0.1:1", "log_level": 0})
    closed, other = topic.create_sender(), topic.create_sender()
    handle: Any = (other if mode is kbatch.SenderMode.INLINE else other._agent)._handle  # type: ignore[union-attr]
    handle.producer._core.start()
    closed.close()
    del closed
    gc.collect()
    assert len(handle._users) == 1
    assert not handle.producer.closed
    other.close()
    assert handle.producer.closed
