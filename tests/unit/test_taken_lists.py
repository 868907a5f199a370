"""kbatch.aio reads a list when it is called, whenever its task begins, and says so to who asks what it is."""

import asyncio
import inspect
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

import kbatch
from kbatch import Envelope, OutgoingBatch, aio
from kbatch.testing.aio import MemoryProducer as AioMemoryProducer

KINDS: dict[str, Callable[[list[Envelope[Any]]], Any]] = {"list": list, "deque": deque, "dict": dict.fromkeys}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["send_batch", "submit"])
def test_a_list_may_be_used_again_when_the_call_has_returned(how: str, kind: str) -> None:
    async def main() -> None:
        async with AioMemoryProducer() as producer:
            buffer = KINDS[kind]([Envelope(1), Envelope(2)])
            taken = buffer.keys() if kind == "dict" else buffer
            task = asyncio.create_task(getattr(producer, how)("orders", taken))
            buffer.clear()
            report = await task
            assert (await report if how == "submit" else report).acked == 2
            assert [envelope.message for envelope in producer.envelopes] == [1, 2]

    asyncio.run(main())


def test_a_list_of_a_sender_may_be_used_again_when_the_call_has_returned() -> None:
    async def main() -> None:
        async with AioMemoryProducer() as producer:
            buffer = [Envelope(1), Envelope(2)]
            sending = asyncio.create_task(
                aio.KafkaSender(producer, "orders").send_batch(aio.SenderCallback(), OutgoingBatch(buffer))
            )
            buffer.clear()
            await sending
            assert len(producer.envelopes) == 2

    asyncio.run(main())


def test_a_generator_is_read_by_the_task() -> None:
    read: list[int] = []

    def generate() -> Iterator[Envelope[int]]:
        for n in range(3):
            read.append(n)
            yield Envelope(n)

    async def main() -> None:
        async with AioMemoryProducer() as producer:
            sending = producer.send_batch("orders", generate())
            assert read == []
            assert (await sending).acked == 3

    asyncio.run(main())


@pytest.mark.parametrize("name", ["send_batch", "submit"])
def test_they_are_seen_as_coroutine_functions(name: str) -> None:
    method = getattr(aio.Producer, name)
    assert inspect.iscoroutinefunction(method) is (sys.version_info >= (3, 12))
    if sys.version_info < (3, 12):
        assert asyncio.iscoroutinefunction(method)
    assert isinstance(getattr(mock.create_autospec(aio.Producer, instance=True), name), mock.AsyncMock) or isinstance(
        getattr(mock.MagicMock(spec=aio.Producer), name), mock.AsyncMock
    )


@pytest.mark.parametrize(
    "how", ["send_batch", "submit", "flush", "close", "KafkaSender", "agent", "inline", "buffered"]
)
def test_without_a_loop_of_asyncio_the_error_says_so_and_nothing_is_left_unawaited(how: str) -> None:
    """As under trio, which runs coroutines itself. Warnings are errors."""
    producer = AioMemoryProducer()
    agent = aio.SendingAgent(producer, "orders")
    batch = OutgoingBatch([Envelope(1)])
    calls: dict[str, Callable[[], Any]] = {
        "send_batch": lambda: producer.send_batch("orders", [Envelope(1)]),
        "submit": lambda: producer.submit("orders", [Envelope(1)], callback=print),
        "flush": lambda: aio.BatchedSender(agent).flush(),
        "close": lambda: producer.close(),
        "KafkaSender": lambda: aio.KafkaSender(producer, "orders").send_batch(Quiet(), batch),
        "agent": lambda: agent.send_batch(Quiet(), batch),
        "inline": lambda: aio.InlineSender(producer, "orders").send(Envelope(1)),
        "buffered": lambda: aio.BatchedSender(agent).send(Envelope(1)),
    }
    told: list[kbatch.KbatchError] = []

    class Quiet(kbatch.SenderCallback):
        def mark_processing_failure(self, batch: OutgoingBatch, error: kbatch.KbatchError) -> None:
            told.append(error)

        mark_serialization_failure = mark_processing_failure

    coroutine = calls[how]()
    if how in ("KafkaSender", "agent"):
        with pytest.raises(StopIteration):
            coroutine.send(None)
        assert "kbatch.aio needs a running event loop of asyncio" in str(told[0])
    else:
        with pytest.raises(RuntimeError, match=r"kbatch\.aio needs a running event loop of asyncio"):
            coroutine.send(None)
    assert producer.envelopes == ()
