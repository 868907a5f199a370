"""What fails is freed by its references, without a garbage collection: nothing holds itself by a traceback."""

import asyncio
import contextlib
import gc
import weakref
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kbatch
from kbatch import Envelope, OutgoingBatch, _fastmap, aio
from kbatch.testing import MemoryProducer, MockCluster
from kbatch.testing._memory import BaseMemoryProducer
from kbatch.testing.aio import MemoryProducer as AioMemoryProducer
from tests import outboxes
from tests.waiting import until

UNMAPPABLE = Envelope(object())


class Ignoring(kbatch.SenderCallback):
    def mark_processing_failure(self, batch: OutgoingBatch, error: kbatch.KbatchError) -> None:
        pass

    mark_serialization_failure = mark_processing_failure


class AioIgnoring(aio.SenderCallback):
    async def mark_processing_failure(self, batch: OutgoingBatch, error: kbatch.KbatchError) -> None:
        pass

    mark_serialization_failure = mark_processing_failure


def fail(producer: BaseMemoryProducer) -> None:
    producer.fail("NOT_ENOUGH_REPLICAS")


def refuse_all(producer: BaseMemoryProducer) -> None:
    producer.fail("MSG_SIZE_TOO_LARGE", times=2)


def do_nothing(producer: BaseMemoryProducer) -> None:
    pass


def made_of(garbage: list[Any]) -> set[str]:
    return {type(each).__qualname__ for each in garbage} | {
        each.f_code.co_qualname if hasattr(each.f_code, "co_qualname") else each.f_code.co_name
        for each in garbage
        if hasattr(each, "f_code")
    }


@pytest.fixture
def uncollected() -> Iterator[Callable[[], set[str]]]:
    """What the garbage collector would have to free since the last call."""

    def look() -> set[str]:
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            gc.collect()
            return made_of(gc.garbage)
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.collect()

    gc.collect()
    gc.freeze()  # what tests before this one have left may become garbage only now
    gc.disable()
    try:
        yield look
    finally:
        gc.enable()


def inline(producer: Any) -> Callable[[Envelope[Any]], object]:
    return kbatch.InlineSender(producer, "orders").send


def batch(producer: Any) -> Callable[[Envelope[Any]], object]:
    return lambda envelope: producer.send_batch("orders", [envelope]).raise_for_errors()


def submit(producer: Any) -> Callable[[Envelope[Any]], object]:
    return lambda envelope: producer.submit("orders", [envelope]).wait().raise_for_errors()


def contract(producer: Any) -> Callable[[Envelope[Any]], object]:
    sender = kbatch.KafkaSender(producer, "orders")
    return lambda envelope: sender.send_batch(Ignoring(), OutgoingBatch([envelope]))


FAULTS = [
    pytest.param(do_nothing, Envelope(1), id="nothing fails"),
    pytest.param(fail, Envelope(1), id="not acknowledged"),
    pytest.param(refuse_all, Envelope(1), id="sent again alone"),
    pytest.param(do_nothing, UNMAPPABLE, id="cannot be mapped"),
    pytest.param(lambda producer: producer.close(), Envelope(1), id="closed"),
]


@pytest.mark.parametrize("way", [inline, batch, submit, contract])
@pytest.mark.parametrize(("fault", "envelope"), FAULTS)
def test_what_a_thread_sends(
    way: Any,
    fault: Callable[[BaseMemoryProducer], object],
    envelope: Envelope[Any],
    uncollected: Callable[[], set[str]],
) -> None:
    producer = MemoryProducer()
    send = way(producer)

    def once() -> None:
        fault(producer)
        with contextlib.suppress(kbatch.KbatchError):
            send(envelope)

    once()
    uncollected()
    once()
    assert uncollected() == set()
    producer.close()


def aio_inline(producer: Any) -> Callable[[Envelope[Any]], Awaitable[object]]:
    return aio.InlineSender(producer, "orders").send


def aio_batch(producer: Any) -> Callable[[Envelope[Any]], Awaitable[object]]:
    async def send(envelope: Envelope[Any]) -> None:
        (await producer.send_batch("orders", [envelope])).raise_for_errors()

    return send


def aio_contract(producer: Any) -> Callable[[Envelope[Any]], Awaitable[object]]:
    sender = aio.KafkaSender(producer, "orders")
    return lambda envelope: sender.send_batch(AioIgnoring(), OutgoingBatch([envelope]))


AIO_FAULTS = [*FAULTS[:-1], pytest.param(lambda producer: producer._core.close(), Envelope(1), id="closed")]


@pytest.mark.parametrize("way", [aio_inline, aio_batch, aio_contract])
@pytest.mark.parametrize(("fault", "envelope"), AIO_FAULTS)
def test_what_a_task_sends(
    way: Any,
    fault: Callable[[BaseMemoryProducer], object],
    envelope: Envelope[Any],
    uncollected: Callable[[], set[str]],
) -> None:
    async def main() -> None:
        producer = AioMemoryProducer()
        send = way(producer)

        async def once() -> None:
            fault(producer)
            with contextlib.suppress(kbatch.KbatchError):
                await send(envelope)

        await once()
        uncollected()
        await once()
        assert uncollected() == set()
        await producer.close()

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["function", "coroutine function"])
def test_what_a_callback_raises(kind: str, uncollected: Callable[[], set[str]]) -> None:
    async def on_failed(envelope: Envelope[Any], error: kbatch.KbatchError) -> None:
        raise ZeroDivisionError

    def plain(envelope: Envelope[Any], error: kbatch.KbatchError) -> None:
        raise ZeroDivisionError

    async def main() -> None:
        callback: Any = plain if kind == "function" else on_failed
        sender = aio.BatchedSender(
            aio.SendingAgent(AioMemoryProducer(), "orders", on_failed=callback), batch_timeout_ms=0
        )

        async def once() -> None:
            await sender.send(UNMAPPABLE)
            with pytest.raises(kbatch.UndeliveredError):
                await sender.flush(30)

        await once()
        uncollected()
        await once()
        assert {name for name in uncollected() if "LoopCalls" in name or "on_failed" in name} == set()
        await sender.close()

    asyncio.run(main())


@pytest.mark.parametrize("is_closed", [False, True])
@pytest.mark.parametrize("fencing", [None, "kafka"])
def test_a_forgotten_relay_and_its_producer(
    tmp_path: Path, fencing: Any, is_closed: bool, uncollected: Callable[[], set[str]]
) -> None:
    outbox = outboxes.made(tmp_path)
    with MockCluster() as cluster:  # to which a fencing one tells its name
        relay = kbatch.Relay(outbox, {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0}, fencing=fencing)
        assert relay.drain(60) == 0
        if is_closed:
            relay.close()
        producer = weakref.ref(relay._use.handle.producer)
        del relay
        until(lambda: producer() is None and not _fastmap.pinned_buffers(), "the end of its producer")
    assert uncollected() == set()


def test_a_forgotten_durable_sender_of_tasks(tmp_path: Path, uncollected: Callable[[], set[str]]) -> None:
    outbox = outboxes.made(tmp_path)

    async def main() -> None:
        sender = aio.DurableSender(outbox, "orders")
        assert await sender.send(Envelope(1))
        forgotten = weakref.ref(sender)
        del sender
        await asyncio.sleep(0)
        assert forgotten() is None

    asyncio.run(main())
    assert uncollected() == set()


def test_a_durable_sender_forgets_a_loop_that_is_closed(tmp_path: Path) -> None:
    sender = aio.DurableSender(outboxes.made(tmp_path), "orders")
    loop = asyncio.new_event_loop()
    assert loop.run_until_complete(sender.send(Envelope(1)))
    loop.close()
    forgotten = weakref.ref(loop)
    del loop

    def is_forgotten() -> bool:
        gc.collect()
        return forgotten() is None

    until(is_forgotten, "the committing thread, which has told of the envelope, forgets it, too")
    asyncio.run(sender.close())


def test_each_loop_of_a_durable_sender_has_one_timer(tmp_path: Path) -> None:
    sender = aio.DurableSender(outboxes.made(tmp_path), "orders")
    loops: list[Any] = [asyncio.new_event_loop() for _ in range(2)]
    for _ in range(10):
        for loop in loops:
            assert loop.run_until_complete(sender.send(Envelope(1)))
    assert [len(loop._scheduled) for loop in loops] == [1, 1]
    loops[0].run_until_complete(sender.close())
    for loop in loops:
        loop.close()
