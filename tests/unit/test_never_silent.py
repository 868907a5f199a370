"""Every envelope that is given up is told once: by whoever takes it, or else by the next flush, close or `with`."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import pickle
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from types import NoneType
from typing import Any

import pytest

import kbatch
from kbatch import Envelope, SenderMode, aio
from kbatch._recovery._user_calls import UserCalls
from kbatch._sending._given_up import GivenUp
from kbatch._sending._queue import Ended, Entry
from kbatch.testing import MemoryProducer
from kbatch.testing.aio import MemoryProducer as AioMemoryProducer

from ..injection import Injected, Injector
from ..waiting import later, until

PERMANENT = "TOPIC_AUTHORIZATION_FAILED"
HANG_S = 30.0


def envelopes(*keys: str) -> list[Envelope[Any]]:
    return [Envelope(data=key.encode(), key=key) for key in keys]


def keys(error: kbatch.UndeliveredError) -> list[Any]:
    return [envelope.key for envelope, _ in error.failures]


_made: list[kbatch.BatchedSender] = []


@pytest.fixture(autouse=True)
def _closes_senders() -> Iterator[None]:
    """Also of a test that fails."""
    yield
    while _made:
        with contextlib.suppress(kbatch.UndeliveredError):
            _made.pop().close(0)


def sender_of(producer: MemoryProducer, **options: Any) -> kbatch.BatchedSender:
    agent = kbatch.SendingAgent(producer, "orders", **options)
    _made.append(kbatch.BatchedSender(agent, batch_size=10, batch_timeout_ms=1))
    return _made[-1]


def end(thing: Any, how: str) -> None:
    if how == "with":
        with thing:
            pass
    else:
        getattr(thing, how)(30)


async def end_on_loop(thing: Any, how: str) -> None:
    if how == "with":
        async with thing:
            pass
    else:
        await getattr(thing, how)(30)


# -- senders


@pytest.mark.parametrize("how", ["flush", "drain", "close", "with"])
def test_what_a_sender_gave_up_is_raised_once(how: str) -> None:
    with MemoryProducer() as producer:
        sender = sender_of(producer)
        producer.fail(PERMANENT, times=2, when=lambda envelope: envelope.key in ("b", "d"))
        for envelope in envelopes("a", "b", "c", "d"):
            sender.send(envelope)
        with pytest.raises(kbatch.UndeliveredError, match=r"^2 envelopes were given up; the first: .*FAILED") as caught:
            end(sender, how)
        assert keys(caught.value) == ["b", "d"]
        assert caught.value.count == 2
        again = pickle.loads(pickle.dumps(caught.value))
        assert (str(again), again.count, keys(again)) == (str(caught.value), 2, ["b", "d"])
        assert [error for _, error in again.failures] == [error for _, error in caught.value.failures]
        assert [envelope.key for envelope, _ in sender.agent.recent_failures] == ["b", "d"]
        assert sender.close() == (0 if how == "flush" else 2)  # told already
    assert [envelope.key for envelope in producer.envelopes] == ["a", "c"]


def test_a_failure_before_a_flush_is_told_by_the_end_of_the_block() -> None:
    with MemoryProducer() as producer:
        sender = sender_of(producer)
        for _ in range(3):
            sender.send(Envelope("an order", key=1))  # type: ignore[arg-type]
        until(lambda: len(sender) == 0, "the end")
        with pytest.raises(kbatch.UndeliveredError, match="3 envelopes were given up; the first: ") as caught:
            end(sender, "with")
        assert [type(error) for _, error in caught.value.failures] == [kbatch.SerializationError] * 3


@pytest.mark.parametrize("takes", [True, False])
def test_on_failed_takes_it_unless_it_raises(takes: bool) -> None:
    told: list[Any] = []

    def on_failed(envelope: Envelope[Any], error: kbatch.KbatchError) -> None:
        told.append(envelope.key)
        if not takes and envelope.key == "b":
            raise OSError("no disk")

    with MemoryProducer() as producer:
        producer.fail(PERMANENT, times=None)
        sender = sender_of(producer, on_failed=on_failed)
        for envelope in envelopes("a", "b"):
            sender.send(envelope)
        if takes:
            assert sender.flush() == 0
        else:
            with pytest.raises(kbatch.UndeliveredError) as caught:
                sender.flush()
            assert keys(caught.value) == ["b"]
        with sender:
            pass
    assert told == ["a", "b"]


def test_a_dead_letter_takes_it() -> None:
    with MemoryProducer() as producer:
        producer.fail(PERMANENT, times=1)
        with sender_of(producer, dead_letter_topic="dead") as sender:
            sender.send(envelopes("a")[0])
            assert sender.flush() == 0
    assert [record.topic() for record in producer.records] == ["dead"]


def test_a_dead_letter_on_its_way_at_the_end_of_closing_may_be_stored(caplog: pytest.LogCaptureFixture) -> None:
    told: list[kbatch.KbatchError] = []
    with MemoryProducer() as producer:
        producer.fail(PERMANENT, times=1)
        producer.hold()
        sender = sender_of(producer, dead_letter_topic="dead", on_failed=lambda _, error: told.append(error))
        sender.send(envelopes("a")[0])
        until(lambda: producer.stats()["in_flight"] == 1, "it is in flight")
        producer.release(1)
        until(lambda: producer.stats()["batches"] == 2, "its dead letter is")
        assert sender.close(0) == 1
        until(lambda: len(told) == 1, "it is told")
        producer.release()
        producer.flush()
    assert [record.topic() for record in producer.records] == ["dead"]
    assert isinstance(told[0], kbatch.DeliveryError)
    assert (told[0].name, told[0].possibly_persisted) == (PERMANENT, False)
    assert "a dead letter could not be sent: " in caplog.text
    assert "it may be stored all the same" in caplog.text


def test_what_is_given_up_at_the_deadline_of_closing_is_raised() -> None:
    with MemoryProducer() as producer:
        producer.down(timeout=0)
        sender = sender_of(producer)
        for envelope in envelopes("a", "b"):
            sender.send(envelope)
        with pytest.raises(kbatch.UndeliveredError) as caught:
            sender.close(0)
        assert keys(caught.value) == ["a", "b"]
        assert sender.close() == 2


def test_an_error_of_the_block_comes_first_and_the_rest_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with MemoryProducer() as producer:
        producer.fail(PERMANENT)
        sender = sender_of(producer)
        sender.send(envelopes("a")[0])
        with pytest.raises(LookupError) as caught, sender:
            raise LookupError
        check_beside(caught.value, "nobody was told: 1 envelope was given up", caplog)
        assert sender.close() == 1


def test_an_error_of_a_producers_block_comes_first(caplog: pytest.LogCaptureFixture) -> None:
    producer = MemoryProducer()
    producer.fail(PERMANENT)
    pending = producer.submit("orders", envelopes("a"))
    with pytest.raises(LookupError) as caught, producer:
        raise LookupError
    check_beside(caught.value, "nobody was told: 1 message was not acknowledged", caplog)
    assert producer.close() == 0
    assert pending.report.failed == 1


def check_beside(error: BaseException, text: str, caplog: pytest.LogCaptureFixture) -> None:
    notes = getattr(error, "__notes__", [])
    assert len(notes) == (sys.version_info >= (3, 11))
    for said in (*notes, *caplog.messages[-1:]):
        assert said.startswith(text)


def test_the_first_1000_are_kept_and_all_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with MemoryProducer() as producer:
        sender = sender_of(producer)
        for number in range(1_500):
            sender.send(Envelope(object(), key=str(number)))  # cannot be mapped
        with pytest.raises(kbatch.UndeliveredError) as caught:
            sender.close()
        assert caught.value.count == 1_500
        assert keys(caught.value) == [str(number) for number in range(1_000)]
        assert [envelope.key for envelope, _ in sender.agent.recent_failures] == [
            str(number) for number in range(500, 1_500)
        ]
    logged = [
        record for record in caplog.records if re.search("given up; the first, .* with the key '0'", record.message)
    ]
    assert [record.levelno for record in logged] == [logging.ERROR]


@pytest.mark.parametrize("how", ["flush", "drain", "close", "with"])
def test_the_sender_of_event_loops_raises_as_well(how: str) -> None:
    async def main() -> None:
        async with AioMemoryProducer() as producer:
            agent = aio.SendingAgent(producer, "orders")
            sender = aio.BatchedSender(agent, batch_size=10, batch_timeout_ms=1)
            producer.fail(PERMANENT, times=1)
            await sender.send(envelopes("a")[0])
            with pytest.raises(kbatch.UndeliveredError) as caught:
                await end_on_loop(sender, how)
            assert keys(caught.value) == ["a"]
            await sender.close()

    asyncio.run(main())


# -- producers


@pytest.mark.parametrize("how", ["flush", "close", "close, kept", "with", "with, kept"])
def test_a_submitted_batch_that_nobody_looked_at_is_told_by_its_producer(how: str) -> None:
    producer = MemoryProducer()
    producer.fail(PERMANENT, times=2, when=lambda envelope: envelope.key in ("b", "d"))
    how, _, kept = how.partition(", ")
    pending = producer.submit("orders", envelopes("a", "b", "c", "d"))
    if not kept:
        del pending
    with pytest.raises(kbatch.UndeliveredError, match=r"^2 messages were not acknowledged; the first: ") as caught:
        end(producer, how)
    assert keys(caught.value) == ["b", "d"]
    assert {error.name for _, error in caught.value.failures if isinstance(error, kbatch.DeliveryError)} == {PERMANENT}
    if kept:
        assert pending.report.failed == 2
    with producer:
        pass
    assert producer.close() == 0


async def answer_of(pending: kbatch.PendingBatch) -> kbatch.DeliveryReport:
    return await pending


@pytest.mark.parametrize("look", ["wait", "report", "callback", "done callback", "await"])
def test_a_batch_that_was_looked_at_is_told_there_alone(look: str) -> None:
    reports = []
    with MemoryProducer() as producer:
        producer.fail(PERMANENT, times=None)
        callback = reports.append if look == "callback" else None
        pending = producer.submit("orders", envelopes("a"), callback=callback)
        if look == "done callback":
            pending.add_done_callback(lambda done: reports.append(done.report))
        assert producer.flush() == 0
        if look == "wait":
            reports.append(pending.wait())
        elif look == "report":
            reports.append(pending.report)
        elif look == "await":
            reports.append(asyncio.run(answer_of(pending)))
        del pending
        assert producer.flush() == 0
    assert [report.failed for report in reports] == [1]


def test_a_batch_that_is_still_there_may_be_looked_at_after_flush() -> None:
    with MemoryProducer() as producer:
        producer.fail(PERMANENT, times=None)
        first, second = (producer.submit("orders", envelopes(key)) for key in "ab")
        assert producer.flush() == 0
        assert first.report.failed == 1
        del first, second
        with pytest.raises(kbatch.UndeliveredError) as caught:
            producer.flush()
        assert keys(caught.value) == ["b"]


class Looker:
    """Looks at a batch when the garbage collector comes for the last of so many times."""

    def __init__(self, batch: kbatch.PendingBatch, times: int) -> None:
        self.batch, self.times = batch, times
        self.cycle = self

    def __del__(self) -> None:
        if self.times > 1:
            Looker(self.batch, self.times - 1)
        else:
            self.batch._look()


def test_a_batch_that_is_looked_at_while_its_failures_are_noted_is_told_there_alone() -> None:
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()  # for good: what the whole run froze before cannot be told from it
    for times in range(1, 41):
        with MemoryProducer() as producer:
            producer.fail(PERMANENT, times=1)
            producer.hold()
            batch = producer.submit("orders", envelopes("a"))
            Looker(batch, times)
            gc.set_threshold(1, 1, 1)
            try:
                producer.release()
            finally:
                gc.set_threshold(*before)
            for _ in range(times):
                gc.collect()


def test_a_wait_that_timed_out_was_no_look() -> None:
    with MemoryProducer() as producer:
        producer.fail(PERMANENT, times=None)
        producer.hold()
        with pytest.raises(kbatch.BatchPendingError):
            producer.send_batch("orders", envelopes("a"), timeout=0.01)
        producer.release()
        with pytest.raises(kbatch.UndeliveredError) as caught:
            producer.flush()
        assert keys(caught.value) == ["a"]


@pytest.mark.parametrize("how", ["flush", "close", "with"])
def test_what_a_cancelled_task_cannot_tell_is_told_by_the_producer(how: str) -> None:
    async def main() -> None:
        producer = AioMemoryProducer()
        producer.fail(PERMANENT, times=1)
        producer.hold()
        task = asyncio.create_task(producer.send_batch("orders", envelopes("a")))
        while not producer.in_flight:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        producer.release()
        with pytest.raises(kbatch.UndeliveredError) as caught:
            await end_on_loop(producer, how)
        assert keys(caught.value) == ["a"]
        assert await producer.close() == 0

    asyncio.run(main())


def test_what_send_batch_has_returned_is_told() -> None:
    with MemoryProducer() as producer:
        producer.fail(PERMANENT, times=None)
        assert producer.send_batch("orders", envelopes("a")).failed == 1
        assert producer.flush() == 0


def test_a_producer_keeps_1000_of_many_batches_and_counts_all() -> None:
    producer = MemoryProducer()
    producer.fail(PERMANENT, times=None)
    for _ in range(3):
        producer.submit("orders", envelopes(*map(str, range(600))))
    with pytest.raises(kbatch.UndeliveredError) as caught:
        producer.close()
    assert caught.value.count == 1_800
    assert keys(caught.value) == [*map(str, range(600)), *map(str, range(400))]


def test_nothing_is_pinned_by_what_nobody_looked_at() -> None:
    class Message:
        pass

    producer = MemoryProducer(encoder=lambda message, context: b"x")
    producer.fail(PERMANENT, times=None)
    message = Message()
    forgotten = weakref.ref(message)
    pending = producer.submit("orders", [Envelope(message)])
    gone = weakref.ref(pending)
    del message, pending
    with pytest.raises(kbatch.UndeliveredError):
        producer.flush()
    gc.disable()
    try:
        assert gone() is None
        assert forgotten() is None
    finally:
        gc.enable()
    producer.close()


@pytest.mark.parametrize("how", ["flush", "close", "with"])
def test_the_producer_of_event_loops_raises_as_well(how: str) -> None:
    async def main() -> None:
        producer = AioMemoryProducer()
        producer.fail(PERMANENT, times=1)
        await producer.submit("orders", envelopes("a"))
        with pytest.raises(kbatch.UndeliveredError) as caught:
            await end_on_loop(producer, how)
        assert keys(caught.value) == ["a"]
        assert await producer.close() == 0

    asyncio.run(main())


def test_the_callback_of_event_loops_takes_it() -> None:
    async def main() -> None:
        reports: list[kbatch.DeliveryReport] = []
        async with AioMemoryProducer() as producer:
            producer.fail(PERMANENT, times=1)
            await producer.submit("orders", envelopes("a"), callback=reports.append)
            assert await producer.flush() == 0
        assert [report.failed for report in reports] == [1]

    asyncio.run(main())


@pytest.mark.parametrize("how", ["send_batch", "wait", "flush"])
def test_an_exception_between_two_lines_loses_nothing(how: str) -> None:
    line, was_interrupted = 0, True
    while was_interrupted:
        line += 1
        producer = MemoryProducer()
        producer.fail(PERMANENT)
        told = []

        def send(producer: MemoryProducer = producer, told: list[int] = told) -> Any:
            if how == "send_batch":
                return producer.send_batch("orders", envelopes("a"))
            if how == "wait":
                return producer.submit("orders", envelopes("a")).wait()
            producer.submit("orders", envelopes("a"))
            try:
                producer.flush()
            except kbatch.UndeliveredError as error:
                told.append(error.count)
            return None

        reports: list[Any] = []
        injector = Injector(line)
        assert isinstance(injector.run(lambda send=send, reports=reports: reports.append(send())), (Injected, NoneType))
        was_interrupted = injector.place is not None
        told += [report.failed for report in reports if report is not None]
        was_taken = producer.stats()["batches"] > 0
        for _ in range(2):
            try:
                producer.close()
            except kbatch.UndeliveredError as error:
                told.append(error.count)
        assert told == [1] * was_taken, f"line {line}"
    assert line > 5


PROGRAM = """
import kbatch
from kbatch.testing import MemoryProducer
producer = MemoryProducer()
producer.fail("TOPIC_AUTHORIZATION_FAILED", times=None)
if {sender}:
    sender = kbatch.BatchedSender(kbatch.SendingAgent(producer, "orders"))
    sender.send(kbatch.Envelope(data=b"a"))
else:
    pending = producer.submit("orders", [kbatch.Envelope(data=b"a")])
"""


@pytest.mark.parametrize("sender", [True, False])
def test_the_end_of_the_interpreter_logs_what_nobody_was_told_of(sender: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(sender=sender)], capture_output=True, text=True, check=True, timeout=60
    )
    what = "envelope was given up" if sender else "message was not acknowledged"
    assert done.stderr.count(f"nobody was told: 1 {what}; the first: ") == 1, done.stderr


def test_a_topic_raises_at_the_end_of_its_senders_block() -> None:
    with MemoryProducer() as producer:
        producer.fail(PERMANENT)
        topic = kbatch.KafkaTopic("orders", mode=SenderMode.BUFFERED, producer=producer)
        with pytest.raises(kbatch.UndeliveredError), topic.create_sender() as sender:
            sender.send(envelopes("a")[0])


@pytest.mark.parametrize("how", ["with", "close"])
@pytest.mark.parametrize(("close_timeout_s", "released_after_s"), [(0.05, 15), (60, 0.2)])
def test_leaving_the_block_of_a_sender_waits_for_its_close_timeout(
    how: str, close_timeout_s: float, released_after_s: float
) -> None:
    with MemoryProducer() as producer:
        producer.hold()
        agent = kbatch.SendingAgent(producer, "orders")
        sender = kbatch.BatchedSender(agent, batch_timeout_ms=1, close_timeout_s=close_timeout_s)
        for envelope in envelopes("a", "b"):
            sender.send(envelope)
        lost: list[Any] = []
        with later(released_after_s, producer.release):  # who waits longer has them sent
            try:
                end(sender, "with") if how == "with" else sender.close()
            except kbatch.UndeliveredError as error:
                lost = keys(error)
        sent = [envelope.key for envelope in producer.envelopes]
        producer.release()
        assert (sent, lost) == ((["a", "b"], []) if close_timeout_s > released_after_s else ([], ["a", "b"]))


def test_many_failures_of_batches_that_are_forgotten_take_no_memory() -> None:
    with MemoryProducer() as producer:
        producer.fail(PERMANENT, times=None)
        for _ in range(8_000):
            producer.submit("orders", [Envelope(0)])
        assert producer._core.flush(30) == 0
        gc.collect()
        producer.submit("orders", [Envelope(0)])
        lots = [each for each in gc.get_objects() if type(each).__name__ == "_Lot"]
        assert len(lots) < 5_000
        del lots
        with pytest.raises(kbatch.UndeliveredError) as error:
            producer.flush()
        assert error.value.count == 8_001


def test_large_envelopes_are_kept_to_a_bound() -> None:
    with MemoryProducer() as producer:
        producer.fail(PERMANENT, times=None)
        agent = kbatch.SendingAgent(producer, "orders")
        sender = kbatch.BatchedSender(agent)
        for _ in range(100):
            sender.send(Envelope(data=b"x" * 400_000))
        with pytest.raises(kbatch.UndeliveredError) as error:
            sender.close()
        assert error.value.count == 100
        assert len(error.value.failures) == len(agent.recent_failures) == 16 * 1024 * 1024 // 400_000


class Frozen(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        if name == "__notes__":
            raise AttributeError(name)
        super().__setattr__(name, value)


@pytest.mark.parametrize("how", ["no notes", "a filter that raises"])
def test_the_error_of_a_block_is_replaced_by_nothing(how: str) -> None:
    def filter_that_raises(record: logging.LogRecord) -> bool:
        raise ZeroDivisionError

    logger = logging.getLogger("kbatch")
    producer = MemoryProducer()
    producer.fail(PERMANENT)
    producer.submit("orders", [Envelope(0)])
    assert producer._core.flush(30) == 0
    if how == "a filter that raises":
        logger.addFilter(filter_that_raises)
    try:
        with pytest.raises(Frozen), producer:
            raise Frozen
    finally:
        logger.removeFilter(filter_that_raises)


def test_a_callback_on_a_loop_that_is_closed_is_told_by_the_producer() -> None:
    async def main(producer: AioMemoryProducer) -> None:
        await producer.submit("orders", [Envelope(0)], callback=lambda report: None)

    async def close(producer: AioMemoryProducer) -> None:
        with pytest.raises(kbatch.UndeliveredError) as error:
            await producer.close()
        assert error.value.count == 1

    producer = AioMemoryProducer()
    producer.hold()
    producer.fail(PERMANENT)
    asyncio.run(main(producer))
    producer.release()
    until(lambda: len(producer) == 0, "the answer")
    asyncio.run(close(producer))


def test_an_awaiter_that_is_cancelled_takes_nothing_from_a_thread_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    may_look = threading.Event()
    look = kbatch.PendingBatch._look

    def late(self: Any, *arguments: Any) -> Any:
        if threading.current_thread() is waiting:
            assert may_look.wait(30)
        return look(self, *arguments)

    monkeypatch.setattr(kbatch.PendingBatch, "_look", late)
    reports: list[kbatch.DeliveryReport] = []

    async def main() -> None:
        nonlocal waiting
        producer = AioMemoryProducer()
        producer.fail(PERMANENT)
        producer.hold()
        batch = await producer.submit("orders", [Envelope(0)])
        waiting = threading.Thread(target=lambda: reports.append(batch.wait(30)))
        waiting.start()
        await asyncio.sleep(0.05)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(batch._answer()), 0.01)
        task = asyncio.ensure_future(batch._answer())
        await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        producer.release()
        while not batch.done():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        await producer.close()

    waiting: threading.Thread | None = None
    try:
        asyncio.run(main())
    finally:
        may_look.set()
    assert waiting is not None
    waiting.join(30)
    assert reports[0].failed == 1


@pytest.mark.parametrize("on_failed", [False, True])
def test_one_that_nothing_can_be_kept_of_for_want_of_memory_is_counted(
    monkeypatch: pytest.MonkeyPatch, on_failed: bool
) -> None:
    lacks = [MemoryError, MemoryError]
    taken: list[Any] = []
    keep = GivenUp._keep

    def lacking(self: GivenUp, *arguments: Any) -> None:
        if lacks:
            raise lacks.pop()
        keep(self, *arguments)

    def take(envelope: Envelope[Any], _: kbatch.KbatchError) -> None:
        if envelope.key == "first":
            lacks.pop()
            raise MemoryError
        taken.append(envelope.key)

    monkeypatch.setattr(GivenUp, "_keep", lacking)
    with MemoryProducer() as producer:
        producer.fail(PERMANENT, times=3)
        sender = sender_of(producer, on_failed=take if on_failed else None)
        for envelope in envelopes("first", "second", "third"):
            sender.send(envelope)
        with pytest.raises(kbatch.UndeliveredError) as raised:
            sender.flush(HANG_S)
        assert raised.value.count == (1 if on_failed else 3)
        assert keys(raised.value) == ([] if on_failed else ["second", "third"])
        assert taken == (["second", "third"] if on_failed else [])
        assert len(sender) == 0
        sender.close()


@pytest.mark.parametrize("is_raised_beside", [False, True])
def test_what_a_log_that_hangs_has_not_told_is_counted_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_raised_beside: bool
) -> None:
    ends = threading.Event()

    monkeypatch.setattr(GivenUp, "_log_first", lambda *_: ends.wait(HANG_S))
    monkeypatch.setattr("kbatch._sending._agent._LAST_NOTES_S", 0.05)
    text = "2 envelopes were not sent when the sender was closed"
    with MemoryProducer() as producer:
        producer.down(timeout=0)
        sender = sender_of(producer)
        try:
            for envelope in envelopes("a", "b"):
                sender.send(envelope)
            assert sender.close(0) == 2
            if is_raised_beside:
                error = LookupError()
                sender._check_sent(error)
                check_beside(error, f"nobody was told: {text}", caplog)
            else:
                with pytest.raises(kbatch.UndeliveredError, match=text) as raised:
                    sender._check_sent(None)
                assert raised.value.count == 2
        finally:
            ends.set()


def test_what_is_left_behind_a_callback_that_hangs_in_a_list_is_counted() -> None:
    class Buffer(list[int]):
        def _give_back(self, count: int, _: int) -> None:
            del self[:count]

    lost: list[int] = []
    given_up = GivenUp("orders", UserCalls(), lambda envelope, error: lost.append(given_up.lost()))
    given_up.buffer = Buffer(range(5))  # type: ignore[assignment]
    ended = [Ended(Entry(envelope, 0, 0.0, None, 1), kbatch.SenderError("")) for envelope in envelopes("a", "b", "c")]
    told = threading.Event()
    given_up.tell(ended, closing=False, then=told.set)
    assert told.wait(HANG_S)
    assert lost == [2, 2, 2]
    assert given_up.lost() == 2


def test_messages_that_librdkafka_keeps_are_told_beside_the_error_of_a_block(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with MemoryProducer() as producer:
        monkeypatch.setattr(producer._core, "without_outcome", lambda: 1)
        error = LookupError()
        producer._check_delivered(error)
        check_beside(error, "nobody was told: 1 message was still in flight when the producer was closed", caplog)
        monkeypatch.undo()
