"""What users give to be called: refused at once if nothing would await it, told by its name if it raises."""

import asyncio
import functools
import logging
import sys
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

import kbatch
from kbatch import Envelope, OutgoingBatch, aio
from kbatch._callbacks import callback_name
from kbatch._fastmap import TokenRefresh
from kbatch.testing import MemoryProducer
from kbatch.testing.aio import MemoryProducer as AioMemoryProducer


async def coroutine_function(*_: object) -> None:
    pytest.fail("nobody awaits it")


async def generator_function(*_: object) -> Any:
    yield pytest.fail("nobody reads it")


class Later:
    async def __call__(self, *_: object) -> None:
        pytest.fail("nobody awaits it")

    async def method(self, *_: object) -> None:
        pytest.fail("nobody awaits it")


COROUTINES = {
    "function": coroutine_function,
    "generator": generator_function,
    "partial": functools.partial(coroutine_function),
    "object": Later(),
    "method": Later().method,
    "partial of an object": functools.partial(Later(), 1),
    "mock": mock.AsyncMock(),
}


@pytest.mark.parametrize("kind", COROUTINES)
def test_a_thread_takes_no_coroutine_function(kind: str) -> None:
    callback: Any = COROUTINES[kind]
    with MemoryProducer() as producer:
        with pytest.raises(TypeError, match="callback must not be a coroutine function"):
            producer.submit("orders", [Envelope(1)], callback=callback)
        assert producer.envelopes == ()
        pending = producer.submit("orders", [Envelope(1)])
        with pytest.raises(TypeError, match="callback must not be a coroutine function"):
            pending.add_done_callback(callback)
        with pytest.raises(kbatch.ConfigError, match="on_failed must not be a coroutine function"):
            kbatch.SendingAgent(producer, "orders", on_failed=callback)
        with pytest.raises(TypeError, match="when must not be a coroutine function"):
            producer.fail(when=callback)
        for option in ("encoder", "header_hook"):
            with pytest.raises(kbatch.ConfigError, match=f"{option} must not be a coroutine function"):
                MemoryProducer(**{option: callback})


def asyncios_own(kind: str) -> Any:
    """Functions that wake nobody when a thread calls them."""
    return {
        "queue": lambda: asyncio.Queue().put_nowait,
        "future": lambda: asyncio.get_running_loop().create_future().set_result,
    }[kind]()


@pytest.mark.parametrize("kind", ["queue", "future"])
def test_a_thread_takes_nothing_that_only_a_loop_may_call(kind: str) -> None:
    async def main() -> None:
        function = asyncios_own(kind)
        with MemoryProducer() as producer:
            with pytest.raises(TypeError, match=r"loop\.call_soon_threadsafe"):
                producer.submit("orders", [Envelope(1)], callback=function)
            assert producer.envelopes == ()
            with pytest.raises(TypeError, match=r"loop\.call_soon_threadsafe"):
                producer.submit("orders", [Envelope(1)]).add_done_callback(function)
            with pytest.raises(kbatch.ConfigError, match=r"loop\.call_soon_threadsafe"):
                MemoryProducer({"error_cb": function})

    asyncio.run(main())


def test_a_thread_may_call_what_reaches_the_loop() -> None:
    async def main() -> object:
        loop, reports = asyncio.get_running_loop(), asyncio.Queue[object]()
        with MemoryProducer() as producer:
            callback = functools.partial(loop.call_soon_threadsafe, reports.put_nowait)
            producer.submit("orders", [Envelope(1)], callback=callback)
            return await reports.get()

    assert asyncio.run(main())


def test_asyncio_wait_wakes_up_or_says_what_it_takes() -> None:
    async def main() -> None:
        async with AioMemoryProducer() as producer:
            producer.hold()
            pending: Any = await producer.submit("orders", [Envelope(1)])
            if sys.version_info >= (3, 11):  # asyncio.wait made tasks of them before
                with pytest.raises(TypeError, match=r"asyncio\.wait takes asyncio\.ensure_future"):
                    await asyncio.wait([pending])
            waits = asyncio.ensure_future(pending)
            producer.release()
            done, _ = await asyncio.wait([waits])
            assert done == {waits}

    asyncio.run(main())


@pytest.mark.parametrize("wrong", [5, "on_report", object()])
def test_what_cannot_be_called_is_refused(wrong: Any) -> None:
    async def main() -> None:
        async with AioMemoryProducer() as producer:
            with pytest.raises(TypeError, match="callback must be callable, not "):
                await producer.submit("orders", [Envelope(1)], callback=wrong)
            assert producer.envelopes == ()

    with MemoryProducer() as producer:
        with pytest.raises(TypeError, match="callback must be callable, not "):
            producer.submit("orders", [Envelope(1)], callback=wrong)
        assert producer.envelopes == ()
        with pytest.raises(TypeError, match="callback must be callable, not "):
            producer.submit("orders", [Envelope(1)]).add_done_callback(wrong)
    asyncio.run(main())


class Half(kbatch.SenderCallback):
    async def mark_timed_out(self, batch: OutgoingBatch, error: kbatch.KbatchError) -> None:  # type: ignore[override]
        pytest.fail("nobody awaits it")


@pytest.mark.parametrize("callback", [aio.SenderCallback(), Half()])
@pytest.mark.parametrize("kind", ["sender", "agent"])
def test_a_thread_takes_no_contract_with_coroutines(kind: str, callback: Any) -> None:
    with MemoryProducer() as producer:
        sender: Any = kbatch.KafkaSender(producer, "orders")
        if kind == "agent":
            sender = kbatch.SendingAgent(producer, "orders")
        for _ in range(2):
            with pytest.raises(TypeError, match="has coroutine methods, which nothing awaits here"):
                sender.send_batch(callback, OutgoingBatch([Envelope(1)]))
        assert producer.envelopes == ()
        if kind == "agent":
            sender.close()


def test_what_turns_out_to_make_a_coroutine_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def sneaky(*_: object) -> Any:
        return coroutine_function()

    class Sneaky(kbatch.SenderCallback):
        mark_successful = sneaky

    with MemoryProducer() as producer:
        producer.submit("orders", [Envelope(1)], callback=sneaky)
        producer.submit("orders", [Envelope(1)]).add_done_callback(sneaky)
        kbatch.KafkaSender(producer, "orders").send_batch(Sneaky(), OutgoingBatch([Envelope(1)]))
        agent = kbatch.SendingAgent(producer, "orders", on_failed=sneaky)
        with kbatch.BatchedSender(agent) as sender:
            sender.send(Envelope(object()))
            with pytest.raises(kbatch.UndeliveredError):
                sender.flush(30)
    failed = [record for record in caplog.records if record.exc_info]
    assert len(failed) == 4
    assert all("made a coroutine" in str(record.exc_info[1]) for record in failed if record.exc_info)


# -- names


def boom(*_: object) -> Any:
    raise ZeroDivisionError


class Boom:
    def __call__(self, *_: object) -> Any:
        raise ZeroDivisionError

    def method(self, *_: object) -> Any:
        raise ZeroDivisionError


NAMES: dict[str, tuple[Callable[..., Any], str]] = {
    "function": (boom, "boom"),
    "partial": (functools.partial(functools.partial(boom, "secret"), "another"), "boom"),
    "object": (Boom(), "Boom"),
    "method": (Boom().method, "Boom.method"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_the_name_of_what_asks_for_a_token_is_the_users(kind: str) -> None:
    callback, name = NAMES[kind]
    assert callback_name(TokenRefresh(callback, None, lambda: None)) == name


def failures(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


@pytest.mark.parametrize("kind", NAMES)
def test_a_callback_that_raises_is_told_by_its_name(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    callback, name = NAMES[kind]

    async def main() -> None:
        async with AioMemoryProducer() as producer:
            await producer.submit("orders", [Envelope(1)], callback=callback)

    with MemoryProducer() as producer:
        producer.submit("orders", [Envelope(1)], callback=callback)
        producer.submit("orders", [Envelope(1)]).add_done_callback(callback)
    asyncio.run(main())
    assert failures(caplog) == [f"a callback failed: {name}"] * 3


@pytest.mark.parametrize("kind", NAMES)
def test_a_senders_callbacks_that_raise_are_told_by_their_names(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    callback, name = NAMES[kind]

    async def main() -> None:
        sender = aio.BatchedSender(aio.SendingAgent(AioMemoryProducer(), "orders", on_failed=callback))
        await sender.send(Envelope(object()))
        with pytest.raises(kbatch.UndeliveredError):
            await sender.close()

    agent = kbatch.SendingAgent(MemoryProducer(), "orders", on_failed=callback)
    sender = kbatch.BatchedSender(agent)
    sender.send(Envelope(object()))
    with pytest.raises(kbatch.UndeliveredError):
        sender.close()
    asyncio.run(main())
    told = failures(caplog)
    assert len(told) == 2
    assert all(text.startswith(f"on_failed failed: {name}; ") for text in told)


def test_a_contract_that_raises_is_told_by_its_name(caplog: pytest.LogCaptureFixture) -> None:
    class Outbox(kbatch.SenderCallback):
        mark_successful = boom

    with MemoryProducer() as producer:
        kbatch.KafkaSender(producer, "orders").send_batch(Outbox(), OutgoingBatch([Envelope(1)]))
    (text,) = failures(caplog)
    assert "a sender callback failed: test_a_contract_that_raises_is_told_by_its_name.<locals>.Outbox." in text
    assert ".mark_successful; " in text


# -- cancelled


@pytest.mark.parametrize("awaits", [False, True])
def test_a_callback_that_ends_cancelled_is_told(awaits: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def cancelled(*_: object) -> None:
        if awaits:
            task = asyncio.create_task(asyncio.sleep(30))
            asyncio.get_running_loop().call_soon(task.cancel)
            await task
        raise asyncio.CancelledError

    async def main() -> None:
        async with AioMemoryProducer() as producer:
            await producer.submit("orders", [Envelope(1)], callback=cancelled)

    asyncio.run(main())
    assert failures(caplog) == [
        "a callback failed: test_a_callback_that_ends_cancelled_is_told.<locals>.cancelled",
    ]


def test_a_callback_that_is_cancelled_before_it_began_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def never(*_: object) -> None:
        pytest.fail("it was cancelled")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        create_task = loop.create_task
        made: list[asyncio.Task[Any]] = []

        def cancelled(*arguments: Any, **options: Any) -> asyncio.Task[Any]:
            made.append(create_task(*arguments, **options))
            made[0].cancel()
            return made[0]

        async with AioMemoryProducer() as producer:
            producer.hold()
            pending = await producer.submit("orders", [Envelope(1)], callback=never)
            loop.create_task = cancelled  # type: ignore[method-assign, assignment]
            producer.release()
            await pending
            while not made or not made[0].done():
                await asyncio.sleep(0)
            loop.create_task = create_task  # type: ignore[method-assign]

    asyncio.run(main())
    assert failures(caplog) == [
        "a callback was cancelled before it began: "
        "test_a_callback_that_is_cancelled_before_it_began_is_told.<locals>.never"
    ]


class Cancelling(aio.SenderCallback):
    def __init__(self, awaits: str) -> None:
        self.awaits = awaits

    async def mark_successful(self, batch: OutgoingBatch, report: kbatch.DeliveryReport) -> None:
        if self.awaits == "something":
            await asyncio.sleep(0)
        elif self.awaits == "a task that is cancelled":
            task = asyncio.create_task(asyncio.sleep(30))
            asyncio.get_running_loop().call_soon(task.cancel)
            await task
        raise asyncio.CancelledError


@pytest.mark.parametrize(
    "awaits",
    [
        "nothing",
        "something",
        pytest.param(
            "a task that is cancelled",
            marks=pytest.mark.skipif(
                not hasattr(asyncio.Task, "cancelling"),
                reason="platform: before Python 3.11 a task cannot tell that it was not meant",
            ),
        ),
    ],
)
def test_a_contract_that_ends_cancelled_cancels_nobody(awaits: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with AioMemoryProducer() as producer:
            await aio.KafkaSender(producer, "orders").send_batch(Cancelling(awaits), OutgoingBatch([Envelope(1)]))

    asyncio.run(main())
    (text,) = failures(caplog)
    assert "a sender callback failed: Cancelling.mark_successful; " in text


def test_a_blocking_contract_that_ends_cancelled_cancels_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Blocking(kbatch.SenderCallback):
        def mark_successful(self, batch: OutgoingBatch, report: kbatch.DeliveryReport) -> None:
            raise asyncio.CancelledError

    with MemoryProducer() as producer:
        kbatch.KafkaSender(producer, "orders").send_batch(Blocking(), OutgoingBatch([Envelope(1)]))
    assert ".mark_successful; " in failures(caplog)[0]


@pytest.mark.parametrize("kind", ["encoder", "header_hook"])
def test_what_maps_and_ends_cancelled_cancels_nobody(kind: str) -> None:
    def cancelled(*_: object) -> Any:
        raise asyncio.CancelledError("its own")

    options: dict[str, Any] = {kind: cancelled}
    told: list[str] = []

    class Recorder(aio.SenderCallback):
        async def mark_serialization_failure(self, batch: OutgoingBatch, error: kbatch.KbatchError) -> None:
            told.append(str(error))

    async def main() -> None:
        async with AioMemoryProducer(**options) as producer:
            for send in (producer.send_batch, producer.submit):
                with pytest.raises(kbatch.SerializationError, match="its own"):
                    await send("orders", [Envelope(1)])
            await aio.KafkaSender(producer, "orders").send_batch(Recorder(), OutgoingBatch([Envelope(1)]))

    asyncio.run(main())
    assert len(told) == 1
    with MemoryProducer(**options) as producer, pytest.raises(kbatch.SerializationError, match="its own"):
        producer.send_batch("orders", [Envelope(1)])


@pytest.fixture(params=[aio.KafkaSender, aio.SendingAgent], ids=["sender", "agent"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("ignores", [False, True])
def test_who_is_cancelled_while_a_contract_runs_is_cancelled_and_the_contract_with_it(kind: Any, ignores: bool) -> None:
    calls: list[str] = []

    class Slow(aio.SenderCallback):
        async def mark_successful(self, batch: OutgoingBatch, report: kbatch.DeliveryReport) -> None:
            calls.append("called")
            began.set()
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                calls.append("cancelled")
                if not ignores:
                    raise

        async def mark_processing_failure(self, batch: OutgoingBatch, error: kbatch.KbatchError) -> None:
            calls.append("another")

        mark_serialization_failure = mark_processing_failure

    async def main() -> None:
        async with AioMemoryProducer() as producer:
            sender = kind(producer, "orders")
            sending = asyncio.create_task(sender.send_batch(Slow(), OutgoingBatch([Envelope(1)])))
            while not began.is_set():
                await asyncio.sleep(0)
            sending.cancel()
            if ignores:
                await sending
            else:
                with pytest.raises(asyncio.CancelledError):
                    await sending
            assert await producer.flush() == 0
            if kind is aio.SendingAgent:
                await sender.close()

    began = threading.Event()
    asyncio.run(main())
    assert calls == ["called", "cancelled"]


def test_who_is_cancelled_before_the_first_step_has_an_answer_and_nothing_sent(kind: Any) -> None:
    answers: list[kbatch.KbatchError] = []

    class Recorder(aio.SenderCallback):
        async def mark_processing_failure(self, batch: OutgoingBatch, error: kbatch.KbatchError) -> None:
            await asyncio.sleep(0)
            answers.append(error)

    async def main() -> None:
        async with AioMemoryProducer() as producer:
            sender = kind(producer, "orders")
            sending = asyncio.create_task(sender.send_batch(Recorder(), OutgoingBatch([Envelope(1)])))
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            if kind is aio.SendingAgent:
                await sender.close()
            assert producer.envelopes == ()

    asyncio.run(main())
    (error,) = answers
    assert type(error).__name__ == "BatchInterruptedError"
    assert error.report is not None
    assert error.report.failed == 1
