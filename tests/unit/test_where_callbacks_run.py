"""On which thread or event loop a sender's callbacks run, and what becomes of what they cannot be told."""

import asyncio
import contextlib
import threading
from typing import Any

import pytest

import kbatch
from kbatch import Envelope, aio
from kbatch.testing import MemoryProducer
from kbatch.testing.aio import MemoryProducer as AioMemoryProducer

from ..waiting import until

UNMAPPABLE = object()


def test_on_failed_is_called_on_a_thread_that_senders_share() -> None:
    told: list[str] = []
    agent = kbatch.SendingAgent(
        MemoryProducer(), "orders", on_failed=lambda *_: told.append(threading.current_thread().name)
    )
    with kbatch.BatchedSender(agent) as sender:
        sender.send(Envelope(UNMAPPABLE))
    assert told == ["kbatch-sender-callbacks"]


def test_the_callbacks_of_all_senders_share_one_thread() -> None:
    threads: set[threading.Thread] = set()
    producer = MemoryProducer()
    agents = [
        kbatch.SendingAgent(producer, f"t{n}", on_failed=lambda *_: threads.add(threading.current_thread()))
        for n in range(20)
    ]
    with contextlib.ExitStack() as stack:
        for agent in agents:
            sender = stack.enter_context(kbatch.BatchedSender(agent, batch_timeout_ms=0))
            sender.send(Envelope(UNMAPPABLE))
            assert sender.flush(30) == 0
        assert len(threads) == 1
    until(lambda: not threads.pop().is_alive(), "the end of the thread")


@pytest.mark.parametrize("waits_for", ["callback", "flush", "close"])
def test_a_callback_that_waits_holds_up_its_own_sender_only(waits_for: str) -> None:
    others_turn = threading.Event()
    producer = MemoryProducer()

    def wait(*_: object) -> None:
        if waits_for == "callback":
            assert others_turn.wait(30)
        else:
            getattr(other, waits_for)(30)

    def on_failed(*_: object) -> None:
        others_turn.set()

    other = kbatch.BatchedSender(kbatch.SendingAgent(producer, "other", on_failed=on_failed), batch_timeout_ms=0)
    agent = kbatch.SendingAgent(producer, "orders", on_failed=wait)
    with other, kbatch.BatchedSender(agent, batch_timeout_ms=0) as sender:
        producer.hold()
        producer.fail("TOPIC_AUTHORIZATION_FAILED")
        other.send(Envelope(1))
        until(lambda: producer.in_flight, "the other's envelope in flight")
        sender.send(Envelope(UNMAPPABLE))
        producer.release()
        assert sender.flush(30) == 0
        assert others_turn.is_set()


def test_on_failed_is_called_on_the_loop_of_the_first_envelope() -> None:
    told: list[tuple[str, threading.Thread, asyncio.AbstractEventLoop]] = []

    def plain(envelope: Envelope[Any], error: kbatch.KbatchError) -> None:
        told.append(("plain", threading.current_thread(), asyncio.get_running_loop()))

    async def coroutine(envelope: Envelope[Any], error: kbatch.KbatchError) -> None:
        await asyncio.sleep(0)
        told.append(("coroutine", threading.current_thread(), asyncio.get_running_loop()))

    async def main() -> asyncio.AbstractEventLoop:
        for on_failed in (plain, coroutine):
            async with aio.BatchedSender(
                aio.SendingAgent(AioMemoryProducer(), "orders", on_failed=on_failed)
            ) as sender:
                await sender.send(Envelope(UNMAPPABLE))
        return asyncio.get_running_loop()

    loop = asyncio.run(main())
    here = threading.current_thread()
    assert told == [("plain", here, loop), ("coroutine", here, loop)]


def test_what_the_loop_cannot_be_told_since_it_is_closed_is_kept_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    producer = AioMemoryProducer()
    producer.hold()
    producer.fail("TOPIC_AUTHORIZATION_FAILED")
    agent = aio.SendingAgent(producer, "orders", on_failed=lambda *_: None)
    sender = aio.BatchedSender(agent, batch_timeout_ms=0)

    async def begin() -> None:
        await sender.send(Envelope(1, key="k"))
        while not producer.in_flight:
            await asyncio.sleep(0.001)

    asyncio.run(begin())
    producer.release()
    until(lambda: agent.recent_failures, "what was given up")
    assert [envelope.key for envelope, _ in agent.recent_failures] == ["k"]
    with pytest.raises(kbatch.UndeliveredError):
        asyncio.run(sender.close())
    assert "on_failed failed" in caplog.text


def test_what_no_loop_can_be_told_since_there_was_none_yet_is_kept_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    agent = aio.SendingAgent(AioMemoryProducer(), "orders", on_failed=lambda *_: pytest.fail("on which loop?"))
    sender = aio.BatchedSender(agent, batch_timeout_ms=0)
    assert sender.try_send(Envelope(UNMAPPABLE, key="k"))
    until(lambda: agent.recent_failures, "what was given up")
    assert [envelope.key for envelope, _ in agent.recent_failures] == ["k"]
    with pytest.raises(kbatch.UndeliveredError):
        asyncio.run(sender.close())
    assert "on_failed failed" in caplog.text


def test_a_batch_of_a_loop_calls_done_callbacks_on_a_thread() -> None:
    called: list[threading.Thread] = []

    async def main() -> None:
        async with AioMemoryProducer() as producer:
            pending = await producer.submit("orders", [Envelope(1)])
            pending.add_done_callback(lambda _: called.append(threading.current_thread()))

    asyncio.run(main())
    assert [thread.name for thread in called] == ["kbatch-callbacks"]


def test_a_task_that_does_nothing_but_send_lets_others_run() -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def main() -> None:
        async with (
            AioMemoryProducer() as producer,
            aio.BatchedSender(aio.SendingAgent(producer, "orders"), batch_timeout_ms=60_000) as sender,
        ):
            beside = asyncio.create_task(others())
            await sender.send(Envelope("the first one starts the sender"))
            before = turns
            for n in range(20_000):
                await sender.send(Envelope(n))
            assert turns > before
            beside.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["function", "on a loop", "coroutine function"])
def test_on_state_change_is_told_the_old_and_the_new_state(kind: str) -> None:
    told: list[tuple[kbatch.CircuitState, kbatch.CircuitState]] = []
    threads: set[str] = set()
    options = {"failures_to_open": 1, "probe_interval_s": 0.01, "retry": kbatch.RetryPolicy(initial_backoff_s=0.01)}

    def plain(old: kbatch.CircuitState, new: kbatch.CircuitState) -> None:
        told.append((old, new))
        threads.add(threading.current_thread().name)

    async def coroutine(old: kbatch.CircuitState, new: kbatch.CircuitState) -> None:
        await asyncio.sleep(0)
        plain(old, new)

    async def main() -> None:
        producer = AioMemoryProducer()
        producer.fail("NOT_ENOUGH_REPLICAS")
        on_state_change = plain if kind == "on a loop" else coroutine
        agent = aio.SendingAgent(producer, "orders", on_state_change=on_state_change, **options)
        async with aio.BatchedSender(agent, batch_timeout_ms=0) as sender:
            await sender.send(Envelope(1))
            assert await sender.flush(30) == 0
            while len(told) < 3:
                await asyncio.sleep(0.001)

    if kind == "function":
        producer = MemoryProducer()
        producer.fail("NOT_ENOUGH_REPLICAS")
        agent = kbatch.SendingAgent(producer, "orders", on_state_change=plain, **options)
        with kbatch.BatchedSender(agent, batch_timeout_ms=0) as sender:
            sender.send(Envelope(1))
            assert sender.flush(30) == 0
            until(lambda: len(told) == 3, "what is told")
    else:
        asyncio.run(main())
    closed, opened, half_open = (kbatch.CircuitState[name] for name in ("CLOSED", "OPEN", "HALF_OPEN"))
    assert told == [(closed, opened), (opened, half_open), (half_open, closed)]
    assert threads == {"kbatch-sender-callbacks" if kind == "function" else threading.current_thread().name}
