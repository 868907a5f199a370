"""What no broker takes stops nobody else, nothing is given up before its time, and closing leaves little behind.

Producers in memory: `fail` with `when` is a partition or a topic that refuses what others would take.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import threading
import time
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

import kbatch
from kbatch import Envelope, RetryPolicy, aio
from kbatch._sending import _stalls
from kbatch.testing import MemoryProducer
from kbatch.testing.aio import MemoryProducer as AioMemoryProducer

from ..sending import KINDS, Driver
from ..waiting import until

SOON = RetryPolicy(max_attempts=None, initial_backoff_s=0.001, max_backoff_s=0.01)
LATER = datetime(9000, 1, 1, tzinfo=timezone.utc)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def open_driver(kind: str, producer: MemoryProducer, **options: Any) -> Driver:
    options = {"retry": SOON, "probe_interval_s": 0.01, "max_probe_interval_s": 0.05, **options}
    return Driver(kind, producer, "orders", options={"batch_timeout_ms": 0, "batch_size": 10}, **options)


def is_bad(envelope: Envelope[Any]) -> bool:
    return envelope.key == "bad"


def keys(producer: MemoryProducer) -> list[Any]:
    return [envelope.key for envelope in producer.envelopes]


# -- one that is refused again and again


@pytest.mark.parametrize("error", ["NOT_ENOUGH_REPLICAS", "UNKNOWN_TOPIC_OR_PART", "_UNKNOWN_PARTITION"])
def test_refusals_of_one_envelope_count_once(kind: str, error: str) -> None:
    with MemoryProducer() as producer, open_driver(kind, producer) as driver:
        producer.fail(error, times=None, when=is_bad)
        driver.send(Envelope(0, key="bad"))
        until(lambda: driver.stats()["retried"] >= 20, "many attempts")
        driver.send(Envelope(1, key="good"))
        until(lambda: keys(producer) == ["good"], "the good one")
        assert driver.states == ["closed"]
        driver.close(0)


@pytest.mark.parametrize("error", ["_MSG_TIMED_OUT", "_TRANSPORT"])
def test_an_outage_of_one_envelope_counts_again_unless_others_are_stored(kind: str, error: str) -> None:
    with MemoryProducer() as producer, open_driver(kind, producer) as driver:
        producer.fail(error, times=None, when=is_bad)
        driver.send(Envelope(0, key="bad"))
        until(lambda: "open" in driver.states, "an open circuit: as far as one sees no broker answers")
        driver.send(Envelope(1, key="good"))
        until(lambda: driver.states[-1] == "closed", "a trial of the other")
        before = len(driver.states)
        retried = driver.stats()["retried"]
        until(lambda: driver.stats()["retried"] >= retried + 20, "many attempts")
        assert driver.states[before:] == []  # one was stored since it failed first
        assert keys(producer) == ["good"]
        driver.close(0)


def test_a_partition_that_takes_nothing_beside_one_that_does(kind: str) -> None:
    """The trial is what failed first; if it fails, the next one is what was never sent."""
    with MemoryProducer() as producer, open_driver(kind, producer, failures_to_open=1) as driver:
        producer.down(timeout=0)
        driver.send(Envelope(0, key="bad"))
        until(lambda: "open" in driver.states, "an open circuit")
        producer.up()
        producer.fail("NOT_ENOUGH_REPLICAS", times=None, when=is_bad)
        for n in range(100):
            driver.send(Envelope(n, key="good"))
        driver.send(Envelope(1, key="bad"))
        until(lambda: len(producer.envelopes) == 100, "the good ones")
        assert keys(producer) == ["good"] * 100
        producer.up()
        assert driver.flush() == 0
        assert [envelope.message for envelope in producer.envelopes[100:]] == [0, 1]
        until(lambda: driver.states[-1] == "closed", "what the callback is told")


def test_the_trial_is_what_failed_first_whatever_its_back_off(kind: str) -> None:
    retry = RetryPolicy(None, initial_backoff_s=1000, max_backoff_s=1000)
    with MemoryProducer() as producer, open_driver(kind, producer, failures_to_open=3, retry=retry) as driver:
        producer.down(timeout=0)
        for n in range(3):
            driver.send(Envelope(n, key=str(n)))
            until(lambda n=n: driver.stats()["retried"] == n + 1, "its failure")
        until(lambda: "open" in driver.states, "an open circuit")
        driver.send(Envelope(3, key="3"))
        producer.up()
        assert driver.flush() == 0
        assert keys(producer) == ["0", "1", "2", "3"]


def test_dead_letters_that_find_no_topic_stop_nothing(kind: str) -> None:
    with (
        MemoryProducer() as producer,
        open_driver(kind, producer, failures_to_open=1, dead_letter_topic="dead") as driver,
    ):
        producer.fail("UNKNOWN_TOPIC_OR_PART", times=None, when=lambda envelope: envelope.topic == "dead")
        producer.fail("POLICY_VIOLATION", when=is_bad)
        driver.send(Envelope(0, key="bad"))
        until(lambda: driver.stats()["retried"] >= 10, "attempts to send the dead letter")
        states = list(driver.states)  # the refusal itself is the brokers'
        for n in range(20):
            driver.send(Envelope(n, key="good"))
            until(lambda n=n: len(producer.envelopes) == n + 1, "the good one")
        assert driver.states[:1] == states[:1] == ["closed"]
        assert keys(producer) == ["good"] * 20
        assert driver.stats()["dead_letters"] == 0
        driver.close(0)


# -- ages


def test_the_age_of_one_is_not_that_of_another(kind: str) -> None:
    """While the circuit is open a batch is filled for as long as it takes."""
    told: list[tuple[float, Any]] = []

    def on_failed(envelope: Envelope[Any], error: kbatch.KbatchError) -> None:
        told.append((time.monotonic() - begun[envelope.message], type(error)))

    begun: dict[Any, float] = {}
    retry = RetryPolicy(None, max_age_s=0.3, initial_backoff_s=0.01)
    with (
        MemoryProducer() as producer,
        Driver(
            *(kind, producer, "orders"),
            options={"batch_timeout_ms": 1},
            retry=retry,
            failures_to_open=1,
            on_failed=on_failed,
        ) as driver,
    ):
        producer.down(timeout=0)
        driver.send(Envelope(-1, scheduled_time=LATER))
        begun[-1] = begun[-3] = time.monotonic()
        begun[-2] = time.monotonic()
        driver.send(Envelope(-2))
        until(lambda: driver.agent.state is kbatch.CircuitState.OPEN, "an open circuit")
        driver.send(Envelope(-3, scheduled_time=LATER))
        for n in range(60):
            begun[n] = time.monotonic()
            driver.send(Envelope(n))
            time.sleep(0.01)
        until(lambda: len(told) == 61, "the end of all")
        assert min(age for age, _ in told) >= 0.3
        assert {kind for _, kind in told} == {kbatch.DeliveryError, kbatch.CircuitOpenError}
        # One that is told is counted until its callback has returned.
        until(lambda: len(driver) == 2, "the count of all that is told")
        assert driver.stats()["scheduled"] == 2
        driver.close(0)


def test_what_waits_for_a_slot_grows_old_as_well(kind: str) -> None:
    retry = RetryPolicy(max_age_s=0.05)
    with (
        MemoryProducer() as producer,
        open_driver(kind, producer, retry=retry, max_in_flight_batches=1) as driver,
    ):
        producer.hold()
        for n in range(30):
            driver.send(Envelope(n))
        until(lambda: len(driver.given_up) > 10, "the end of those that were not sent")
        assert driver.reasons == ["SenderError"] * len(driver.given_up)
        assert driver.agent.state is kbatch.CircuitState.CLOSED
        producer.release()
        assert driver.flush() == 0
        assert len(producer.envelopes) + len(driver.given_up) == 30


# -- closing


def test_closing_does_not_wait_for_a_back_off_or_a_probe(kind: str) -> None:
    retry = RetryPolicy(None, initial_backoff_s=1000, max_backoff_s=1000)
    with (
        MemoryProducer() as producer,
        open_driver(
            kind, producer, retry=retry, failures_to_open=2, probe_interval_s=1000, max_probe_interval_s=1000
        ) as driver,
    ):
        producer.down(timeout=0)
        for n in range(30):
            driver.send(Envelope(n))
        until(lambda: driver.agent.state is kbatch.CircuitState.OPEN, "an open circuit")
        producer.up()
        assert driver.close() == 0
        assert len(producer.envelopes) == 30


def test_close_counts_what_is_refused_meanwhile() -> None:
    producer = MemoryProducer()
    sender = kbatch.BatchedSender(kbatch.SendingAgent(producer, "orders"), batch_timeout_ms=1000)
    producer.fail("POLICY_VIOLATION", times=2)
    for n in range(5):
        sender.send(Envelope(n))
    with pytest.raises(kbatch.UndeliveredError, match="2 envelopes") as raised, sender:
        pass
    assert raised.value.count == 2
    assert sender.close() == 2
    assert len(producer.envelopes) == 3


def test_what_closing_gives_up_says_so(kind: str) -> None:
    with MemoryProducer() as producer, open_driver(kind, producer, retry=RetryPolicy(None)) as driver:
        producer.down(timeout=0)
        for n in range(30):
            driver.send(Envelope(n))
        until(lambda: driver.stats()["retried"], "a failure")
        assert driver.close(0) == 30
        assert driver.reasons == ["SenderClosedError"] * 30
        causes = {getattr(error.__cause__, "name", None) for _, error in driver.given_up}
        assert "_MSG_TIMED_OUT" in causes
        assert any("the last attempt failed: " in str(error) for _, error in driver.given_up)


def test_what_may_be_stored_is_told_so_however_it_ends(kind: str) -> None:
    """Also if a later attempt failed for sure."""
    with MemoryProducer() as producer, open_driver(kind, producer, retry=RetryPolicy(3, None, 0.001)) as driver:
        producer.fail("NOT_ENOUGH_REPLICAS", possibly_persisted=True)
        producer.fail("NOT_ENOUGH_REPLICAS", times=2)
        driver.send(Envelope(0))
        assert driver.flush() == 0
        producer.fail("_TRANSPORT", possibly_persisted=True)
        producer.fail("_TRANSPORT", times=None)
        driver.send(Envelope(1))
        until(lambda: driver.stats()["retried"] >= 4, "two failures")
        assert driver.close(0) == 1
        errors = [error for _, error in driver.given_up]
        assert [type(error) for error in errors] == [kbatch.DeliveryError] * 2
        assert [error.possibly_persisted for error in errors if isinstance(error, kbatch.DeliveryError)] == [True] * 2
        cause = errors[1].__cause__  # None if its next attempt was under way at the end
        assert cause is None or isinstance(cause, kbatch.SenderClosedError)


def test_ctrl_c_ends_closing() -> None:
    producer = MemoryProducer()
    told: list[Envelope[Any]] = []
    agent = kbatch.SendingAgent(producer, "orders", on_failed=lambda envelope, _: told.append(envelope))
    sender = kbatch.BatchedSender(agent, batch_timeout_ms=0)
    producer.hold()
    for n in range(3):
        sender.send(Envelope(n))
    until(lambda: producer.in_flight, "what is in flight")
    main = threading.get_ident()
    timer = threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        sender.close(3600)
    timer.join()
    assert len(told) == sender.close() == 3
    producer.release()
    producer.close()


def test_ctrl_c_ends_the_wait_for_room() -> None:
    with MemoryProducer() as producer:
        producer.hold()
        with kbatch.BatchedSender(kbatch.SendingAgent(producer, "orders"), batch_size=1, max_buffered=1) as sender:
            sender.send(Envelope(0))
            main = threading.get_ident()
            timer = threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                sender.send(Envelope(1))
            timer.join()
            producer.release()
        assert [envelope.message for envelope in producer.envelopes] == [0]


# -- what is told


def test_why_the_circuit_is_open_is_told(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with MemoryProducer() as producer, open_driver(kind, producer, failures_to_open=1) as driver:
        assert driver.agent.last_error is None
        producer.fail("NOT_ENOUGH_REPLICAS")
        driver.send(Envelope(0))
        assert driver.flush() == 0
        until(lambda: driver.states[-2:] == ["half-open", "closed"], "what the callback is told")
        error = driver.agent.last_error
        assert isinstance(error, kbatch.DeliveryError)
        assert error.name == "NOT_ENOUGH_REPLICAS"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert "1 batch in a row failed, the last with" in warnings[0]
    assert "NOT_ENOUGH_REPLICAS" in warnings[0]
    assert warnings[1].endswith("is closed")


def test_brokers_that_do_not_answer_are_told_of(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    def warnings() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    with MemoryProducer() as producer, open_driver(kind, producer, stalled_after_s=0.05) as driver:
        assert driver.agent.waiting_for_s == 0.0
        producer.hold()
        driver.send(Envelope(0))
        until(warnings, "the warning")
        assert driver.agent.waiting_for_s >= 0.05
        driver.send(Envelope(1))
        assert "1 batch is in flight" in warnings()[0]
        producer.release()
        assert driver.flush() == 0
        until(lambda: len(warnings()) == 2, "the end of it")
        assert driver.agent.waiting_for_s == 0.0
        assert driver.given_up == []
    assert warnings()[0].startswith("brokers have not answered for 'orders' for 0 s")
    assert warnings()[1] == "brokers answer for 'orders' again"


def test_brokers_that_go_on_not_answering_are_told_of_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert _stalls.REMIND_EVERY_S == 60
    monkeypatch.setattr(_stalls, "REMIND_EVERY_S", 0.02)
    with MemoryProducer() as producer, open_driver("threads", producer, stalled_after_s=0.05) as driver:
        producer.hold()
        driver.send(Envelope(0))
        until(lambda: sum("have not answered" in record.getMessage() for record in caplog.records) >= 3, "reminders")
        producer.release()


def test_what_expires_after_it_may_have_been_stored_is_told(kind: str) -> None:
    soon = datetime.now(timezone.utc) + timedelta(seconds=1.5)
    retry = RetryPolicy(initial_backoff_s=2.0, max_backoff_s=2.0, jitter=0.0)
    with MemoryProducer() as producer, open_driver(kind, producer, retry=retry) as driver:
        producer.fail(
            "REQUEST_TIMED_OUT",
            possibly_persisted=True,
            stored=False,
            when=lambda envelope: envelope.message == "perhaps",
        )
        producer.fail("NOT_ENOUGH_REPLICAS", when=lambda envelope: envelope.message == "not")
        driver.send_all([Envelope("perhaps", deliver_by=soon), Envelope("not", deliver_by=soon)])
        assert driver.flush() == 0
        until(lambda: driver.given_up, "what is told")
        assert len(driver.given_up) == 1
        envelope, error = driver.given_up[0]
        assert envelope.message == "perhaps"
        assert isinstance(error, kbatch.DeliveryError)
        assert (error.name, error.possibly_persisted) == ("REQUEST_TIMED_OUT", True)
        assert "deliver_by" in str(error.__cause__)
        stats = driver.sender.stats()
        assert (stats["expired"], stats["failed"], stats["retried"], stats["buffered"]) == (1, 1, 2, 0)
    assert producer.records == ()


def test_a_state_change_callback_that_raises_is_logged_by_its_name(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    def on_state_change(*_: object) -> None:
        raise ZeroDivisionError

    with (
        MemoryProducer() as producer,
        open_driver(kind, producer, failures_to_open=1, on_state_change=on_state_change) as driver,
    ):
        producer.fail("NOT_ENOUGH_REPLICAS")
        driver.send(Envelope(0))
        assert driver.flush() == 0
        until(lambda: driver.agent.state is kbatch.CircuitState.CLOSED, "a closed circuit")
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    name = "test_a_state_change_callback_that_raises_is_logged_by_its_name.<locals>.on_state_change"
    assert messages == [f"on_state_change failed: {name}"] * 3


def test_a_callback_whose_task_is_cancelled_at_once_holds_nothing_up(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        told: list[Any] = []

        async def on_failed(envelope: Envelope[Any], _: kbatch.KbatchError) -> None:
            told.append(envelope.key)

        loop = asyncio.get_running_loop()
        create_task = loop.create_task
        cancelled: list[asyncio.Task[Any]] = []

        def cancel_first(coroutine: Any, **options: Any) -> asyncio.Task[Any]:
            task = create_task(coroutine, **options)
            if not cancelled and "LoopCalls" in coroutine.__qualname__:
                cancelled.append(task)
                task.cancel()
            return task

        loop.create_task = cancel_first  # type: ignore[method-assign, assignment]
        async with AioMemoryProducer() as producer:
            agent = aio.SendingAgent(producer, "orders", on_failed=on_failed)
            sender = aio.BatchedSender(agent, batch_timeout_ms=0, batch_size=1)
            for key in ("first", "second"):
                await sender.send(Envelope(object(), key=key))
            with pytest.raises(kbatch.UndeliveredError) as caught:
                await sender.flush(30)
            assert [envelope.key for envelope, _ in caught.value.failures] == ["first"]
            assert cancelled
            assert [envelope.key for envelope, _ in agent.recent_failures] == ["first"]
            assert told == ["second"]
            await sender.close()

    asyncio.run(main())
    assert "on_failed failed" in caplog.text


# -- many that wait


def test_flushes_leave_batches_whole(kind: str) -> None:
    """Each has its envelope go out with the next slot; it closes no batch of one."""
    with MemoryProducer() as producer, open_driver(kind, producer, max_in_flight_batches=1) as driver:
        producer.hold()
        driver.send(Envelope(0))
        until(lambda: producer.in_flight, "what takes the slot")
        for n in range(1, 31):
            driver.send(Envelope(n))
            assert driver.flush(0) > 0
        producer.release()
        assert driver.flush() == 0
        assert producer.stats()["batches"] == 4


def test_many_flushes_end_in_any_order() -> None:
    async def main() -> None:
        async with AioMemoryProducer() as producer:
            sender = aio.BatchedSender(aio.SendingAgent(producer, "orders"), batch_timeout_ms=0)
            producer.hold()
            flushes = []
            for n in range(300):
                await sender.send(Envelope(n))
                flushes.append(asyncio.create_task(sender.flush(30)))
                await asyncio.sleep(0)
            for n in range(0, 300, 2):
                flushes[n].cancel()
            producer.release()
            answers = await asyncio.gather(*flushes, return_exceptions=True)
            assert answers[1::2] == [0] * 150
            assert all(isinstance(answer, asyncio.CancelledError) for answer in answers[::2])
            assert sender._agent._watchers.waiting == []
            await sender.close()

    asyncio.run(main())


def test_tasks_that_wait_for_room_take_no_threads() -> None:
    async def main() -> None:
        async with AioMemoryProducer() as producer:
            sender = aio.BatchedSender(aio.SendingAgent(producer, "orders"), batch_size=1, max_buffered=1)
            producer.hold()
            await sender.send(Envelope(0))
            while not producer.in_flight:  # it has its timer then
                await asyncio.sleep(0.001)
            threads = threading.active_count()
            tasks = [asyncio.create_task(sender.send(Envelope(n))) for n in range(1, 101)]
            await asyncio.sleep(0.05)
            assert not any(task.done() for task in tasks)
            assert threading.active_count() <= threads
            producer.release()
            await asyncio.gather(*tasks)
            assert await sender.close() == 0
            assert [envelope.message for envelope in producer.envelopes] == list(range(101))

    asyncio.run(asyncio.wait_for(main(), 60))


def test_flushes_that_time_out_again_and_again_leave_little_behind(kind: str) -> None:
    with MemoryProducer() as producer, open_driver(kind, producer) as driver:
        producer.hold()
        driver.send(Envelope(0))
        for _ in range(1000):
            assert driver.flush(0) == 1
        until(lambda: not driver.agent._watchers.newcomers, "the thread's look at them")
        assert len(driver.agent._watchers.waiting) <= 302
        producer.release()
        assert driver.flush() == 0


def test_asking_again_and_again_for_the_end_leaves_the_back_off(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hurried: list[float] = []
    with MemoryProducer() as producer, open_driver(kind, producer, retry=RetryPolicy(None)) as driver:
        producer.down(timeout=0)
        driver.send(Envelope(0))
        until(lambda: driver.stats()["retried"], "a failure")
        monkeypatch.setattr(driver.agent._send_loop.queue, "hurry", lambda now, at_most_s: hurried.append(at_most_s))
        for _ in range(20):
            assert driver.drain(0.001) == 1
        until(lambda: hurried, "the hurry")
        assert driver.close(0) == 1
    assert hurried == [1.0]


@pytest.mark.parametrize("max_age_s", [1e10, float("inf")])
def test_an_age_that_nothing_reaches(kind: str, max_age_s: float) -> None:
    retry = RetryPolicy(max_age_s=max_age_s)
    with (
        MemoryProducer() as producer,
        open_driver(kind, producer, retry=retry, max_in_flight_batches=1) as driver,
    ):
        producer.hold()
        for n in range(30):
            driver.send(Envelope(n))
        until(lambda: producer.in_flight, "the first")
        driver.agent._send_loop.endings.expire_every_s = 0.0  # as if time passed
        driver.agent._send_loop.endings.next_expiry = 0.0
        assert driver.flush(0.05) > 0
        producer.release()
        assert driver.flush() == 0
        assert driver.given_up == []


def test_a_sender_that_is_forgotten_right_after_an_envelope_sends_it() -> None:
    producer = MemoryProducer()
    for n in range(10):
        sender = kbatch.BatchedSender(kbatch.SendingAgent(producer, "orders"), batch_timeout_ms=0)
        sender.send(Envelope(n))
        assert sender.flush(30) == 0  # now its thread waits, and keeps it weakly
        sender.send(Envelope(n))
        del sender
        with pytest.warns(ResourceWarning):
            until(_collected, "the end of the sender")
        assert len(producer.envelopes) == 2 * n + 2
    producer.close()


def _collected() -> bool:
    gc.collect()
    return not any(thread.name == "kbatch-sender" for thread in threading.enumerate())


def test_what_is_scheduled_is_not_waited_for_by_flush_while_much_of_it_is_held(kind: str) -> None:
    with MemoryProducer() as producer, open_driver(kind, producer) as driver:
        due = datetime.now(timezone.utc) + timedelta(hours=1)
        driver.send_all(Envelope(n, scheduled_time=due) for n in range(1000))
        until(lambda: driver.stats()["scheduled"] == 1000, "what is held")
        driver.send(Envelope(1))
        assert driver.flush() == 0
        assert [envelope.message for envelope in producer.envelopes] == [1]
        assert driver.close(0) == 1000
