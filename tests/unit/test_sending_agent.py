"""What the thread of a sending agent does when others meddle at an awkward moment; no broker."""

import asyncio
import concurrent.futures
import contextvars
import operator
import os
import random
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

import kbatch
from kbatch import Envelope, SendingAgent, aio
from kbatch._fastmap import Accumulator
from kbatch._recovery._handle import ProducerHandle
from kbatch._sending._send_loop import SendLoop
from kbatch.testing import MemoryProducer
from kbatch.testing._memory import MemoryCore
from kbatch.testing.aio import MemoryProducer as AioMemoryProducer

from ..sending import KINDS, Driver
from ..waiting import until

PROBE = "kbatch-probe"
LATER = datetime(9000, 1, 1, tzinfo=timezone.utc)


def test_the_random_numbers_of_a_program_are_its_own() -> None:
    random.seed(7)
    expected = random.random()
    random.seed(7)
    with MemoryProducer() as producer:
        producer.fail(times=2)
        retry = kbatch.RetryPolicy(initial_backoff_s=0.001)
        with kbatch.BatchedSender(SendingAgent(producer, "orders", retry=retry, probe_interval_s=0.001)) as sender:
            sender.send(Envelope(1))
            assert sender.flush() == 0
        assert sender.stats()["retried"] == 2
    assert random.random() == expected


MOMENTS = {"_gate": "probe_if_due", "_send_loop": "_send_all", "_send_loop.endings": "see_off", "_watchers": "wake"}


@pytest.mark.parametrize(("part", "moment"), MOMENTS.items())
def test_closing_begins_while_the_thread_is_at_work(part: str, moment: str) -> None:
    told: list[tuple[Envelope[Any], kbatch.KbatchError]] = []
    answers: list[int] = []
    envelope = Envelope(1, scheduled_time=LATER)
    with MemoryProducer() as producer:
        agent = SendingAgent(producer, "orders", on_failed=lambda *what: told.append(what))
        sender = kbatch.BatchedSender(agent, batch_timeout_ms=0)
        sender.send(envelope)
        until(lambda: sender.stats()["scheduled"], "the envelope that waits for its time")
        closer = threading.Thread(target=lambda: answers.append(sender.close(0)))
        does = operator.attrgetter(part)(agent)
        work: Callable[..., None] = getattr(does, moment)

        def interrupted(*arguments: Any) -> None:
            work(*arguments)
            if closer.ident is None:
                closer.start()
                until(lambda: agent._gate.closed, "the beginning of the end")

        setattr(does, moment, interrupted)
        agent._gate.flag.set()
        until(lambda: answers, "the answer of close")
    assert answers == [1]
    assert len(told) == 1
    assert told[0][0] is envelope
    assert isinstance(told[0][1], kbatch.SenderClosedError)
    assert len(sender) == 0


def test_a_probe_that_outlives_its_sender_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def probe(*_: object) -> str:
        asked.set()
        assert go_on.wait(30)
        return "no"

    def of_the_sender() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name in ("kbatch-sender-callbacks", PROBE)]

    monkeypatch.setattr(MemoryCore, "probe", probe)
    with MemoryProducer() as producer:
        producer.down(timeout=0)
        agent = SendingAgent(producer, "orders", failures_to_open=1, probe_interval_s=0.001)
        sender = kbatch.BatchedSender(agent, batch_timeout_ms=0)
        sender.send(Envelope(1))
        assert asked.wait(30)
        with pytest.raises(kbatch.UndeliveredError, match="1 envelope was given up"):
            sender.close(0)
        assert of_the_sender() == [PROBE]
        go_on.set()
        until(lambda: not of_the_sender(), "the end of the threads")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["drain", "close"])
def test_a_sender_that_ended_before_its_first_envelope_has_nothing_to_flush(kind: str, end: str) -> None:
    with MemoryProducer() as producer, Driver(kind, producer, "orders", options={}) as driver:
        assert getattr(driver, end)() == 0
        assert driver.flush(None) == 0
        assert driver.drain(None) == driver.close() == 0


class EndsTooLate(concurrent.futures.Future[None]):
    """Its first wait is over in the moment in which it ends."""

    waited = False

    def result(self, timeout: float | None = None) -> None:
        if not self.waited:
            self.waited = True
            concurrent.futures.wait([self])
            raise concurrent.futures.TimeoutError
        super().result(timeout)


@pytest.mark.parametrize("kind_of_error", [None, TimeoutError, ZeroDivisionError])
def test_a_callback_ends_while_its_loop_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind_of_error: type[Exception] | None
) -> None:
    error = None if kind_of_error is None else kind_of_error("its own")
    told: list[Envelope[Any]] = []

    async def on_failed(envelope: Envelope[Any], _: kbatch.KbatchError) -> None:
        told.append(envelope)
        if error is not None:
            raise error

    async def main() -> aio.SendingAgent:
        async with AioMemoryProducer() as producer:
            agent = aio.SendingAgent(producer, "orders", on_failed=on_failed)
            async with aio.BatchedSender(agent, batch_timeout_ms=0) as sender:
                await sender.send(envelope)
                if error is None:
                    assert await sender.flush(30) == 0
                else:
                    with pytest.raises(kbatch.UndeliveredError) as caught:
                        await sender.flush(30)
                    assert [given_up for given_up, _ in caught.value.failures] == [envelope]
        return agent

    monkeypatch.setattr(concurrent.futures, "Future", EndsTooLate)
    envelope = Envelope(object())
    agent = asyncio.run(main())
    assert told == [envelope]
    assert [kept for kept, _ in agent.recent_failures] == ([] if error is None else [envelope])
    failures = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert failures == ([] if error is None else [error])


class Buffer(Accumulator):
    def _start(self) -> None:
        self._accept()


def test_the_age_of_a_batch_is_that_of_its_first_envelope() -> None:
    buffer = Buffer(batch_size=100, batch_bytes=10_000, batch_timeout_s=3600.0, max_buffered=100)
    buffer.send(Envelope(0))
    begin = buffer._due_in()
    for n in range(1, 4):
        time.sleep(0.002)
        buffer.send(Envelope(n))
        assert begin is not None
        due = buffer._due_in()
        assert due is not None
        assert due <= begin - 0.002
        begin = due


class Poison:
    """Its encoder raises this."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)

    def encode(self) -> bytes:
        if self.errors:
            raise self.errors.pop(0)
        return b"cured"


def encode(message: Any, _: object) -> bytes:
    return message.encode() if isinstance(message, Poison) else b"%d" % message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("kind_of_error", "times", "is_stored", "retried"),
    [
        (MemoryError, 1, True, 1),
        (MemoryError, 9, False, 2),
        (SystemExit, 1, False, 0),
        (KeyboardInterrupt, 1, False, 0),
    ],
    ids=["no memory for a moment", "never any memory", "sys.exit", "Ctrl-C"],
)
def test_an_encoder_that_fails_for_no_reason_of_its_own_costs_the_others_nothing(
    kind: str, kind_of_error: type[BaseException], times: int, is_stored: bool, retried: int
) -> None:
    poison = Poison(*(kind_of_error() for _ in range(times)))
    retry = kbatch.RetryPolicy(max_attempts=3, initial_backoff_s=0.001)
    with (
        MemoryProducer(encoder=encode) as producer,
        Driver(kind, producer, "orders", options={"batch_timeout_ms": 50}, retry=retry) as driver,
    ):
        driver.send_all([Envelope(0), Envelope(poison), *map(Envelope, range(1, 20))])
        assert driver.flush() == 0
        values = [record.value() for record in producer.records]
        assert sorted(values) == sorted([b"%d" % n for n in range(20)] + [b"cured"] * is_stored)
        assert driver.stats()["retried"] == retried
        assert [type(error.__cause__) for _, error in driver.given_up] == ([] if is_stored else [kind_of_error])
        assert driver.states == ["closed"]


def test_an_agent_has_one_sender() -> None:
    with MemoryProducer() as producer:
        agent = SendingAgent(producer, "orders")
        with kbatch.BatchedSender(agent), pytest.raises(kbatch.ConfigError, match="sender"):
            kbatch.BatchedSender(agent)


@pytest.mark.parametrize("module", [kbatch, aio], ids=["threads", "asyncio"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SendingAgent", {"retry": 3}),
        ("SendingAgent", {"max_in_flight_batches": 0}),
        ("SendingAgent", {"failures_to_open": True}),
        ("SendingAgent", {"probe_interval_s": 60}),
        ("SendingAgent", {"strict_order": 1}),
        ("SendingAgent", {"on_failed": 7}),
        ("SendingAgent", {"on_state_change": "x"}),
        ("SendingAgent", {"dead_letter_topic": "a b"}),
        ("BatchedSender", {"batch_size": 0}),
        ("BatchedSender", {"batch_bytes": 1.5}),
        ("BatchedSender", {"batch_timeout_ms": -1}),
        ("BatchedSender", {"max_buffered": 10}),
        ("BatchedSender", {"max_buffered_bytes": 10}),
        ("BatchedSender", {"close_timeout_s": "1"}),
    ],
    ids=str,
)
def test_an_option_of_the_wrong_type_or_out_of_its_range_is_named(
    module: Any, name: str, options: dict[str, Any]
) -> None:
    producer = MemoryProducer() if module is kbatch else AioMemoryProducer()
    takes = (producer, "orders") if name == "SendingAgent" else (module.SendingAgent(producer, "orders"),)
    with pytest.raises(kbatch.ConfigError, match=f"^{next(iter(options))}"):
        getattr(module, name)(*takes, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_is_encoded_again_for_each_retry(kind: str) -> None:
    encoded: list[int] = []

    def count(message: int, _: object) -> bytes:
        encoded.append(message)
        return b"%d" % len(encoded)

    retry = kbatch.RetryPolicy(initial_backoff_s=0.001)
    with (
        MemoryProducer(encoder=count) as producer,
        Driver(kind, producer, "orders", options={"batch_timeout_ms": 0}, retry=retry) as driver,
    ):
        producer.fail("NOT_ENOUGH_REPLICAS", times=2)
        driver.send(Envelope(7))
        assert driver.flush() == 0
        assert encoded == [7] * 3
        assert [record.value() for record in producer.records] == [b"3"]


def test_what_is_buffered_is_mapped_later_and_elsewhere() -> None:
    request = contextvars.ContextVar("request", default="none")
    called: list[tuple[str, bool]] = []

    def header_hook() -> None:
        called.append((request.get(), threading.current_thread() is threading.main_thread()))

    request.set("mine")
    order = {"id": 1}
    with MemoryProducer(header_hook=header_hook) as producer:
        sender = kbatch.BatchedSender(SendingAgent(producer, "orders"), batch_timeout_ms=60_000)
        with sender:
            sender.send(Envelope(order))
            order["id"] = 2
            sender.send(Envelope(order))
            assert sender.flush() == 0
        assert [record.value() for record in producer.records] == [b'{"id":2}'] * 2
        assert called == [("none", False)]
        producer.send_batch("orders", [Envelope(3)])
        producer.submit("orders", [Envelope(4)])
    assert called[1:] == [("mine", True)] * 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_lack_of_memory_when_something_is_given_up_tells_it_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    told: list[Any] = []
    with MemoryProducer() as producer:
        producer.fail("MSG_SIZE_TOO_LARGE", times=None)
        agent = SendingAgent(
            producer, "orders", on_failed=lambda envelope, _: told.append(envelope.message), dead_letter_topic="dead"
        )
        sender = kbatch.BatchedSender(agent, batch_timeout_ms=50)
        assert not agent._has_thread()
        log, left = agent._calls.log, [2]

        def without_memory(*arguments: Any, **more: Any) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise MemoryError
            log(*arguments, **more)

        agent._calls.log = without_memory  # type: ignore[method-assign]
        for n in range(5):
            sender.send(Envelope(n))
        until(lambda: len(told) == 5, "what is told")
        sender.close(30)
    assert sorted(told) == list(range(5))
    assert len(sender) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="platform: no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_may_start_what_its_parent_could_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: MemoryCore) -> None:
        raise RuntimeError("no threads")

    producer = MemoryProducer()
    sender = kbatch.BatchedSender(SendingAgent(producer, "orders"), batch_timeout_ms=0)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryCore, "start", refuse)
        with pytest.raises(RuntimeError, match="no threads"):
            sender.send(Envelope(1))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sender.send(Envelope(1))
            status = sender.flush(20)
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    sender.close()
    producer.close()


def test_a_handler_that_sends_while_the_thread_is_made_has_no_second_one_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made, at_work = threading.Thread.__init__, set()
    go_round = SendLoop.round
    moments = ["while the first one is made"]

    def make(self: threading.Thread, *arguments: Any, **keywords: Any) -> None:
        made(self, *arguments, **keywords)
        if keywords.get("name") == "kbatch-sender" and moments:
            moments.clear()
            sender.send(Envelope("handler's"))
            until(lambda: at_work, "the thread that the handler's envelope needs")

    def noted(self: SendLoop) -> float | None:
        at_work.add(threading.current_thread())
        return go_round(self)

    with MemoryProducer() as producer:
        sender = kbatch.BatchedSender(SendingAgent(producer, "orders"), batch_timeout_ms=0)
        monkeypatch.setattr(threading.Thread, "__init__", make)
        monkeypatch.setattr(SendLoop, "round", noted)
        sender.send(Envelope("caller's"))
        assert sender.close() == 0
    assert [each.message for each in producer.envelopes] == ["handler's", "caller's"]
    assert len(at_work) == 1


def test_a_start_that_fails_leaves_the_thread_that_a_handler_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    starts: list[threading.Thread] = []

    def fails_after_a_handler_has_sent(self: threading.Thread) -> None:
        if self.name == "kbatch-sender":
            starts.append(self)
            if len(starts) == 1:
                sender.send(Envelope("handler's"))
                raise MemoryError
        start(self)

    with MemoryProducer() as producer:
        sender = kbatch.BatchedSender(agent := SendingAgent(producer, "orders"), batch_timeout_ms=0)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fails_after_a_handler_has_sent)
            with pytest.raises(MemoryError):
                sender.send(Envelope("caller's"))
        assert agent._thread is starts[-1]
        sender.send(Envelope("another"))
        assert sender.close() == 0
    assert [each.message for each in producer.envelopes] == ["handler's", "another"]


@pytest.mark.parametrize("jumps_at_once", [False, True])
def test_a_clock_that_is_set_back_after_an_envelope_was_due_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, jumps_at_once: bool
) -> None:
    """The sender's thread sees it due, and the mapper does not."""
    ahead_s = [10.0 if jumps_at_once else 0.0]
    monkeypatch.setattr("kbatch._sending._send_loop.wall_time", lambda: time.time() + ahead_s[0])
    with MemoryProducer() as producer:
        changes: list[Any] = []
        agent = SendingAgent(
            producer, "orders", failures_to_open=1, on_state_change=lambda *states: changes.append(states)
        )
        with kbatch.BatchedSender(agent, batch_timeout_ms=0) as sender:
            due = datetime.now(timezone.utc) + timedelta(seconds=2)
            sender.send(Envelope(1, scheduled_time=due))
            if not jumps_at_once:
                until(lambda: sender.stats()["scheduled"] == 1, "it waits")
                ahead_s[0] = 10.0
                agent._gate.flag.set()
            until(lambda: isinstance(agent.last_error, kbatch.NotYetDueError), "it was refused")
            ahead_s[0] = 0.0
            until(lambda: sender.stats()["acked"] == 1, "it is sent when it is due")
        assert (changes, agent._gate.death) == ([], None)
        assert [record.value() for record in producer.records] == [b"1"]


def test_a_batch_that_the_producer_does_not_take_counts_as_a_failure_that_is_told() -> None:
    failures = [2]

    def header_hook() -> None:
        if failures[0]:
            failures[0] -= 1
            raise LookupError("no request")

    policy = kbatch.RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.01)
    with MemoryProducer(header_hook=header_hook) as producer:
        agent = SendingAgent(producer, "orders", retry=policy)
        with kbatch.BatchedSender(agent, batch_timeout_ms=0) as sender:
            sender.send(Envelope(1))
            assert sender.flush(20) == 0
        assert "no request" in str(agent.last_error)
        assert (sender.stats()["retried"], sender.stats()["acked"]) == (2, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_batch_goes_by_the_producer_that_took_the_place_of_a_dead_one(kind: str) -> None:
    # Another sender has it replaced while the batch is mapped.
    made: Any = (MemoryProducer if kind == "threads" else AioMemoryProducer)(header_hook=lambda: replace())
    handle = ProducerHandle(made, given=False)
    other, use = handle.acquire(), handle.acquire()

    def replace() -> None:
        handle.replace(made)

    told: list[Any] = []

    class Told(kbatch.SenderCallback):
        def mark_successful(self, batch: kbatch.OutgoingBatch, report: kbatch.DeliveryReport) -> None:
            told.append(report.acked)

        def mark_processing_failure(self, batch: kbatch.OutgoingBatch, error: kbatch.KbatchError) -> None:
            told.append(error)

    batch = kbatch.OutgoingBatch([Envelope(1), Envelope(2)])
    if kind == "threads":
        agent = SendingAgent(use, "orders")
        agent.send_batch(Told(), batch)
        agent.close()
    else:

        async def send() -> None:
            agent = aio.SendingAgent(use, "orders")
            await agent.send_batch(Told(), batch)
            await agent.close()

        asyncio.run(send())
    assert made.closed
    assert told == [2]
    other.release(0)


def test_a_line_of_the_log_for_which_there_is_no_memory_ends_no_sender() -> None:
    with MemoryProducer() as producer:
        agent = SendingAgent(producer, "orders")

        def no_memory(*_: Any) -> None:
            raise MemoryError

        agent._calls.put = no_memory  # type: ignore[method-assign]
        agent._calls.log(30, "a line")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_fails_tells_what_waits_whatever_else_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    crash = SendLoop._crash

    def without_memory(loop: Any, error: BaseException) -> None:
        def no_memory(*_: Any, **__: Any) -> None:
            raise MemoryError

        monkeypatch.setattr(loop._calls, "log", no_memory)
        crash(loop, error)

    def fails(loop: Any) -> float:
        raise RuntimeError("a defect")

    monkeypatch.setattr(SendLoop, "_crash", without_memory)
    with MemoryProducer() as producer:
        agent = SendingAgent(producer, "orders", on_failed=lambda envelope, _: told.append(envelope.message))
        with kbatch.BatchedSender(agent, batch_timeout_ms=60_000) as sender:
            for n in range(3):
                sender.send(Envelope(n))
            monkeypatch.setattr(SendLoop, "_step", fails)
            agent._gate.flag.set()
            until(lambda: sorted(told) == [0, 1, 2], "they are told")
