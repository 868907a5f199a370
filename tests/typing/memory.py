"""Producers in memory in a user's own test."""

from typing import Any

from typing_extensions import assert_type

import kbatch
from kbatch import aio
from kbatch.testing import MemoryProducer, MemoryRecord
from kbatch.testing.aio import MemoryProducer as AioMemoryProducer


def place_order(producer: kbatch.Producer) -> None: ...


async def place_orders(producer: aio.Producer) -> None: ...


def test_orders() -> None:
    with MemoryProducer({"message.max.bytes": 1_000}, partitions=3, wire="raw") as producer:
        assert_type(producer, MemoryProducer)
        place_order(producer)
        kbatch.KafkaSender(producer, "orders")
        assert_type(producer.envelopes, tuple[kbatch.Envelope[Any], ...])
        assert_type(producer.in_flight, tuple[kbatch.Envelope[Any], ...])
        assert_type(producer.records, tuple[MemoryRecord, ...])
        assert_type(kbatch.read_envelope(producer.records[0]), kbatch.Envelope[Any])
        assert_type(producer.records[0].timestamp(), tuple[int, int])
        producer.fail("NOT_ENOUGH_REPLICAS", times=None, when=lambda envelope: envelope.key == "bad")
        producer.fail(-192, possibly_persisted=True, stored=False)
        producer.down()
        producer.down(timeout=0)
        producer.up()
        producer.hold()
        producer.release(1)
        producer.fatal("_FENCED")
        producer.clear()


async def test_orders_with_asyncio() -> None:
    async with AioMemoryProducer() as producer:
        await place_orders(producer)
        aio.KafkaSender(producer, "orders")
        assert_type(producer.records, tuple[MemoryRecord, ...])


# What the checker must refuse.
place_order(AioMemoryProducer())  # type: ignore[arg-type]
MemoryProducer(max_in_flight="3")  # type: ignore[arg-type]
MemoryProducer().fail(when=lambda: True)  # type: ignore[arg-type, misc]
