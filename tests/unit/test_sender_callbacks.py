"""What on_failed may do with its own sender."""

import asyncio
import contextvars
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import kbatch
from kbatch import Envelope, aio
from kbatch.aio._batched import LoopCalls
from kbatch.testing import MemoryProducer
from kbatch.testing.aio import MemoryProducer as AioMemoryProducer

UNMAPPABLE = object()

METHODS = ["flush", "drain", "close"]


def eagerly(loop: asyncio.AbstractEventLoop) -> None:
    if sys.version_info >= (3, 12):
        loop.set_task_factory(asyncio.eager_task_factory)


TASKS = [
    pytest.param(lambda loop: None, id="tasks"),
    pytest.param(
        eagerly,
        id="eager tasks",
        marks=pytest.mark.skipif(sys.version_info < (3, 12), reason="platform: no eager tasks before Python 3.12"),
    ),
]

# Ways in which a coroutine waits for another.
WAYS: dict[str, Callable[[Coroutine[Any, Any, Any]], Any]] = {
    "itself": lambda work: work,
    "gather": lambda work: asyncio.gather(work),
    "wait_for": lambda work: asyncio.wait_for(work, 30),
    "create_task": asyncio.create_task,
    "a task of a task": lambda work: asyncio.create_task(in_a_task(work)),
}


async def in_a_task(work: Coroutine[Any, Any, Any]) -> Any:
    return await asyncio.create_task(work)


@pytest.mark.parametrize("method", METHODS)
def test_it_must_not_wait_for_itself(method: str) -> None:
    errors: list[BaseException] = []

    def on_failed(envelope: Envelope[Any], error: kbatch.KbatchError) -> None:
        try:
            getattr(sender, method)()
        except kbatch.SenderError as refusal:
            errors.append(refusal)

    with kbatch.BatchedSender(kbatch.SendingAgent(MemoryProducer(), "orders", on_failed=on_failed)) as sender:
        sender.send(Envelope(UNMAPPABLE))
        assert sender.flush(30) == 0
        assert "must not be called by one that has not ended" in str(errors[0])
        sender.send(Envelope(1))


def test_it_may_send() -> None:
    producer = MemoryProducer()

    def on_failed(envelope: Envelope[Any], error: kbatch.KbatchError) -> None:
        sender.send(envelope.replace(message="instead"))

    with kbatch.BatchedSender(kbatch.SendingAgent(producer, "orders", on_failed=on_failed)) as sender:
        sender.send(Envelope(UNMAPPABLE))
        assert sender.flush(30) == 0
        assert sender.flush(30) == 0  # what was sent before the first has ended
        assert [envelope.message for envelope in producer.envelopes] == ["instead"]


@pytest.mark.parametrize("method", METHODS)
def test_a_coroutine_must_not_wait_for_itself_but_its_tasks_may(method: str) -> None:
    async def main() -> None:
        errors: list[BaseException] = []
        tasks: list[asyncio.Task[int]] = []

        async def on_failed(envelope: Envelope[Any], error: kbatch.KbatchError) -> None:
            try:
                await getattr(sender, method)()
            except kbatch.SenderError as refusal:
                errors.append(refusal)
            tasks.append(asyncio.get_running_loop().create_task(getattr(sender, method)()))

        sender = aio.BatchedSender(aio.SendingAgent(AioMemoryProducer(), "orders", on_failed=on_failed))
        await sender.send(Envelope(UNMAPPABLE))
        assert await sender.flush(30) == 0
        assert "must not be called by one that has not ended" in str(errors[0])
        assert await tasks[0] == 0
        await sender.close()

    asyncio.run(main())


@pytest.mark.parametrize("prepare", TASKS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_a_coroutine_must_not_wait_for_itself_in_a_task_of_its_own_either(
    method: str, way: str, prepare: Callable[[Any], None]
) -> None:
    async def main() -> None:
        prepare(asyncio.get_running_loop())
        errors: list[BaseException] = []

        async def on_failed(envelope: Envelope[Any], error: kbatch.KbatchError) -> None:
            try:
                await WAYS[way](getattr(sender, method)())
            except kbatch.SenderError as refusal:
                errors.append(refusal)

        sender = aio.BatchedSender(aio.SendingAgent(AioMemoryProducer(), "orders", on_failed=on_failed))
        await sender.send(Envelope(UNMAPPABLE))
        assert await sender.flush(30) == 0
        assert len(errors) == 1
        await sender.close()

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("prepare", TASKS)
def test_a_task_of_a_callback_that_has_ended_may_wait(prepare: Callable[[Any], None]) -> None:
    async def main() -> None:
        prepare(asyncio.get_running_loop())
        ended = asyncio.Event()
        tasks: list[asyncio.Task[int]] = []

        async def later() -> int:
            await ended.wait()
            return await sender.flush(30)

        async def on_failed(envelope: Envelope[Any], error: kbatch.KbatchError) -> None:
            tasks.append(asyncio.create_task(later()))

        sender = aio.BatchedSender(aio.SendingAgent(AioMemoryProducer(), "orders", on_failed=on_failed))
        await sender.send(Envelope(UNMAPPABLE))
        assert await sender.flush(30) == 0
        ended.set()
        assert await tasks[0] == 0
        await sender.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def of_another_thread(method: Callable[[], object], *, carry: bool) -> None:
    with ThreadPoolExecutor(1) as pool:
        (pool.submit(contextvars.copy_context().run, method) if carry else pool.submit(method)).result(60)


@pytest.mark.parametrize("method", METHODS)
def test_it_must_not_wait_for_itself_in_a_thread_that_has_its_context(method: str) -> None:
    errors: list[BaseException] = []

    def on_failed(envelope: Envelope[Any], error: kbatch.KbatchError) -> None:
        try:
            of_another_thread(getattr(sender, method), carry=True)
        except kbatch.SenderError as refusal:
            errors.append(refusal)

    with kbatch.BatchedSender(kbatch.SendingAgent(MemoryProducer(), "orders", on_failed=on_failed)) as sender:
        sender.send(Envelope(UNMAPPABLE))
        assert sender.flush(30) == 0
        assert len(errors) == 1


@pytest.mark.parametrize("kind", ["encoder", "header_hook"])
def test_what_maps_must_not_wait_for_its_sender(kind: str) -> None:
    errors: list[BaseException] = []

    def wait(*_: object) -> Any:
        for carry in (None, True):
            try:
                sender.flush() if carry is None else of_another_thread(sender.flush, carry=True)
            except kbatch.SenderError as refusal:
                errors.append(refusal)
        return b"" if kind == "encoder" else None

    options: dict[str, Any] = {kind: wait}
    with kbatch.BatchedSender(kbatch.SendingAgent(MemoryProducer(**options), "orders")) as sender:
        sender.send(Envelope(1))
        assert sender.flush(30) == 0
        assert len(errors) == 2


@pytest.mark.parametrize("carry", [False, True])
def test_a_producers_callback_closes_it_without_waiting_for_itself(carry: bool) -> None:
    producer = MemoryProducer()
    closed = threading.Event()

    def close(report: kbatch.DeliveryReport) -> None:
        if carry:
            of_another_thread(lambda: producer.close(1000), carry=True)
        else:
            producer.close(1000)
        closed.set()

    producer.submit("orders", [Envelope(1)], callback=close)
    assert closed.wait(60)
    producer.close()


@pytest.mark.parametrize("prepare", TASKS)
@pytest.mark.parametrize("way", WAYS)
def test_a_producers_coroutine_closes_it_without_waiting_for_itself(way: str, prepare: Callable[[Any], None]) -> None:
    async def main() -> None:
        prepare(asyncio.get_running_loop())
        producer = AioMemoryProducer()
        closed = asyncio.Event()

        async def close(report: kbatch.DeliveryReport) -> None:
            assert await WAYS[way](producer.close(1000)) in (0, [0])
            closed.set()

        await producer.submit("orders", [Envelope(1)], callback=close)
        await closed.wait()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_callback_that_is_submitted_by_a_callback_comes_from_it() -> None:
    """The first one waits for the second, which closes."""

    async def main() -> None:
        producer = AioMemoryProducer()
        closed, ended = asyncio.Event(), asyncio.Event()

        async def close(report: kbatch.DeliveryReport) -> None:
            assert await producer.close(1000) == 0
            closed.set()

        async def submit(report: kbatch.DeliveryReport) -> None:
            await producer.submit("orders", [Envelope(2)], callback=close)
            await closed.wait()
            ended.set()

        await producer.submit("orders", [Envelope(1)], callback=submit)
        await ended.wait()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_callbacks_that_submit_callbacks_remember_no_more_than_those_that_run() -> None:
    async def main() -> None:
        producer = AioMemoryProducer()
        lengths: list[int] = []
        ended = asyncio.Event()

        async def again(report: kbatch.DeliveryReport) -> None:
            (calls,) = [len(value) for var, value in contextvars.copy_context().items() if var.name == "kbatch_calls"]
            lengths.append(calls)
            if len(lengths) == 50:
                ended.set()
            else:
                await producer.submit("orders", [Envelope(1)], callback=again)

        await producer.submit("orders", [Envelope(1)], callback=again)
        await ended.wait()
        assert max(lengths) <= 2
        await producer.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_what_came_by_try_send_from_a_thread_first_is_told_on_the_loop_that_comes() -> None:
    async def main() -> None:
        told: list[Any] = []

        async def on_failed(envelope: Envelope[Any], error: kbatch.KbatchError) -> None:
            told.append(envelope.key)

        agent = aio.SendingAgent(AioMemoryProducer(), "orders", on_failed=on_failed)
        sender = aio.BatchedSender(agent, batch_timeout_ms=0)
        await asyncio.to_thread(sender.try_send, Envelope(1))
        await sender.send(Envelope(UNMAPPABLE, key="sent"))
        assert await sender.flush(30) == 0
        assert told == ["sent"]
        await sender.close()

        agent = aio.SendingAgent(AioMemoryProducer(), "orders", on_failed=on_failed)
        sender = aio.BatchedSender(agent, batch_timeout_ms=60_000)
        await asyncio.to_thread(sender.try_send, Envelope(UNMAPPABLE, key="tried"))
        assert await sender.flush(30) == 0
        assert told == ["sent", "tried"]
        await sender.close()

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("may_say_why", [True, False])
def test_a_callbacks_task_that_cannot_be_made_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch, may_say_why: bool
) -> None:
    """Its envelope is told otherwise, and the callbacks go on."""
    if not may_say_why:

        def no_memory(error: BaseException) -> str:
            raise MemoryError

        monkeypatch.setattr("kbatch.aio._batched.named_exception_text", no_memory)
    told: list[Any] = []

    async def on_failed(envelope: Envelope[Any], error: kbatch.KbatchError) -> None:
        told.append(envelope.message)

    async def run() -> None:
        refused = [1]

        def make(loop: Any, coroutine: Any, **more: Any) -> Any:
            if refused[0] and coroutine.__qualname__.startswith("LoopCalls.call"):
                refused[0] -= 1
                raise MemoryError
            return asyncio.Task(coroutine, loop=loop, **more)

        asyncio.get_running_loop().set_task_factory(make)
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # it is told of the second MemoryError
        async with AioMemoryProducer() as producer:
            agent = aio.SendingAgent(producer, "orders", on_failed=on_failed)
            async with aio.BatchedSender(agent, batch_timeout_ms=0) as sender:
                await sender.send(Envelope(UNMAPPABLE))
                with pytest.raises(kbatch.UndeliveredError):  # which on_failed was not told of
                    await sender.flush(20)
                assert len(agent.recent_failures) == 1
                await sender.send(Envelope(UNMAPPABLE))
                assert await sender.flush(20) == 0
        assert refused == [0]
        assert len(told) == 1

    asyncio.run(run())


def test_a_loop_does_not_wait_for_itself_when_no_thread_can_be_had() -> None:
    async def run() -> None:
        calls = LoopCalls()
        calls.loop = asyncio.get_running_loop()
        with pytest.raises(RuntimeError, match="no thread"):
            calls.call(print)

    asyncio.run(run())


def test_an_agent_of_an_event_loop_refuses_in_a_forked_child_before_it_takes_a_lock() -> None:
    """A thread of the parent may have held it, so the loop of the child would hang."""
    told: list[Any] = []

    class Callback(aio.SenderCallback):
        async def mark_successful(self, batch: kbatch.OutgoingBatch, report: kbatch.DeliveryReport) -> None:
            told.append(report.acked)

        async def mark_processing_failure(self, batch: kbatch.OutgoingBatch, error: kbatch.KbatchError) -> None:
            told.append(type(error))

    async def run() -> None:
        async with AioMemoryProducer() as producer:
            agent = aio.SendingAgent(producer, "orders")
            await agent.send_batch(Callback(), kbatch.OutgoingBatch([Envelope(1)]))
            pid, agent._pid = agent._pid, -1  # as if this were a child
            await agent.send_batch(Callback(), kbatch.OutgoingBatch([Envelope(2)]))
            agent._pid = pid
            await agent.close()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert told == [1, kbatch.ForkError]
