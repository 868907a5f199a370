"""Durable senders: what `send` has returned for is in the outbox, and what was told as not added is not."""

import asyncio
import contextlib
import functools
import gc
import os
import signal
import sqlite3
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kbatch
from kbatch import (
    ConfigError,
    DurableSender,
    Envelope,
    ForkError,
    KafkaTopic,
    OutboxError,
    OutboxTimeoutError,
    SenderClosedError,
    SenderMode,
    SerializationError,
    aio,
)
from kbatch._outbox import _group, _shared
from tests import outboxes
from tests.injection import Injector
from tests.outboxes import Outbox, in_sqlite
from tests.waiting import later, until

SERVERS = {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}
METHODS = ("map", "open_writer", "open_store", "watch", "unwatch")  # of an outbox
PAST = datetime.now(timezone.utc) - timedelta(days=1)


@pytest.fixture
def outbox(new_outbox: Callable[..., Outbox]) -> Outbox:
    return new_outbox(wire="raw")


@pytest.fixture(autouse=True)
def nothing_goes_on() -> Iterator[None]:
    yield
    gc.collect()
    until(lambda: not threads(), "the end of all threads")
    assert not list(_shared._shared.values())


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name in ("kbatch-outbox", "kbatch-relay")]


@pytest.fixture
def sender(outbox: Outbox) -> Iterator[DurableSender]:
    with DurableSender(outbox, "orders") as sender:
        yield sender


async def print_later(before: object, after: object) -> None:
    print(before, after)


def envelope(number: int, **options: Any) -> Envelope:
    return Envelope(data=b"%d" % number, key=f"k{number % 5}", **options)


def numbers(outbox: Outbox) -> list[int]:
    return [int(body or b"") for body in outboxes.bodies(outbox)]


class Slow:
    """An outbox whose writers wait before they commit, until they may go on."""

    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox
        self.waits = threading.Event()
        self.goes_on = threading.Event()
        self.groups: list[int] = []
        self.fails: OutboxError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.outbox, name)

    def open_writer(self) -> "SlowWriter":
        return SlowWriter(self, self.outbox.open_writer())


class SlowWriter:
    def __init__(self, slow: Slow, writer: Any) -> None:
        self.slow, self.writer = slow, writer

    def commit(self, take: Callable[[], Sequence[Any]]) -> bool:
        def taken() -> Sequence[Any]:
            group = take()
            self.slow.groups.append(len(group))
            self.slow.waits.set()
            self.slow.goes_on.wait()
            if self.slow.fails is not None:
                raise self.slow.fails
            return group

        done: bool = self.writer.commit(taken)
        return done

    def close(self) -> None:
        self.writer.close()


@pytest.fixture
def slow(outbox: Outbox) -> Iterator[Slow]:
    slow = Slow(outbox)
    yield slow
    slow.goes_on.set()


def in_thread(function: Callable[[], object]) -> tuple[threading.Thread, list[Any]]:
    """What it returned or raised, once the thread has ended."""
    answers: list[Any] = []

    def run() -> None:
        try:
            answers.append(function())
        except BaseException as error:
            answers.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, answers


# -- what is added


def test_what_send_has_returned_for_is_committed(outbox: Outbox, sender: DurableSender) -> None:
    for number in range(5):
        assert sender.send(envelope(number)) is True
        assert numbers(outbox) == list(range(number + 1))


def test_what_threads_send_at_once_shares_transactions_and_loses_nothing(slow: Slow, outbox: Outbox) -> None:
    slow.goes_on.set()
    with DurableSender(slow, "orders") as sender:

        def work(first: int) -> None:
            for number in range(first, first + 40):
                sender.send(envelope(number))

        started = [in_thread(lambda n=n: work(100 * n)) for n in range(16)]  # type: ignore[misc]
        for thread, _ in started:
            thread.join()
        assert [answers for _, answers in started] == [[None]] * 16
    assert sorted(numbers(outbox)) == sorted(100 * n + m for n in range(16) for m in range(40))
    assert sum(slow.groups) == 640
    assert len(slow.groups) < 500
    for n in range(16):
        mine = [number for number in numbers(outbox) if number // 100 == n]
        assert mine == sorted(mine)


def test_senders_of_one_outbox_share_a_thread_and_its_transactions(slow: Slow) -> None:
    with DurableSender(slow, "orders") as one, DurableSender(slow, "others") as other:
        first = in_thread(lambda: one.send(envelope(0)))
        assert slow.waits.wait(30)
        rest = [in_thread(lambda: one.send(envelope(1))), in_thread(lambda: other.send(envelope(2)))]
        until(lambda: len(one._waiting) + len(other._waiting) == 3, "all of them")
        assert threads() == ["kbatch-outbox"]
        slow.goes_on.set()
        for thread, answers in [first, *rest]:
            thread.join()
            assert answers == [True]
    assert slow.groups == [1, 2]


def test_an_envelope_that_cannot_be_mapped_is_told_to_its_caller_alone(outbox: Outbox, sender: DurableSender) -> None:
    with pytest.raises(SerializationError, match="message"):
        sender.send(Envelope(object()))
    with pytest.raises(SerializationError, match=r"max_message_bytes|more than"):
        sender.send(Envelope(data=b"x" * 1_000_001))
    with pytest.raises(SerializationError):
        sender.send("order")  # type: ignore[arg-type]
    assert sender.send(envelope(1))
    assert numbers(outbox) == [1]


def test_one_whose_deliver_by_has_passed_is_not_added(outbox: Outbox, sender: DurableSender) -> None:
    assert sender.send(envelope(1, deliver_by=PAST)) is False
    assert numbers(outbox) == []


def test_one_that_is_scheduled_waits_in_the_outbox(outbox: Outbox, sender: DurableSender) -> None:
    assert sender.send(envelope(1, scheduled_time=datetime.now(timezone.utc) + timedelta(days=1)))
    assert (outbox.status().waiting, outbox.status().scheduled) == (0, 1)


def test_with_a_connection_it_joins_the_callers_transaction(outbox: Outbox, sender: DurableSender) -> None:
    with contextlib.suppress(KeyError), outboxes.transaction(outbox) as connection:
        assert sender.send(envelope(1), connection=connection)
        raise KeyError
    assert numbers(outbox) == []
    with outboxes.transaction(outbox) as connection:
        assert sender.send(envelope(2), connection=connection) is True
        assert sender.send(envelope(3, deliver_by=PAST), connection=connection) is False
        assert numbers(outbox) == []  # for others
    assert numbers(outbox) == [2]
    with outboxes.connected(outbox) as connection, pytest.raises(OutboxError, match="in no transaction"):
        sender.send(envelope(3), connection=connection)
    assert threads() == []


# -- what is refused


@in_sqlite
def test_a_timeout_while_another_connection_writes_adds_nothing_ever(outbox: Outbox, sender: DurableSender) -> None:
    with outboxes.transaction(outbox), pytest.raises(OutboxTimeoutError, match="it was not added") as caught:
        sender.send(envelope(1), timeout=0.3)
    assert caught.value.possibly_persisted is False
    assert isinstance(caught.value, TimeoutError)
    assert sender.send(envelope(2))
    assert numbers(outbox) == [2]


def test_a_timeout_during_the_transaction_may_have_added_it(slow: Slow, outbox: Outbox) -> None:
    with DurableSender(slow, "orders") as sender:
        with pytest.raises(OutboxTimeoutError, match="may be added all the same") as caught:
            sender.send(envelope(1), timeout=0.3)
        assert caught.value.possibly_persisted is True
        slow.goes_on.set()
        assert sender.send(envelope(2))
    assert numbers(outbox) == [1, 2]


@in_sqlite
def test_a_database_that_is_locked_is_waited_for_as_long_as_the_caller_says(
    outbox: Outbox, sender: DurableSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_group, "_PATIENCE_S", 0.5)
    with outboxes.transaction(outbox) as connection:
        patient = [in_thread(lambda n=n: sender.send(envelope(n), timeout=60)) for n in range(10)]  # type: ignore[misc]
        thread, answers = in_thread(lambda: sender.send(envelope(77)))
        thread.join()
        assert isinstance(answers[0], OutboxError)
        assert "another connection has written for 0.5 s; nothing was added" in str(answers[0])
        assert answers[0].possibly_persisted is False
        assert not any(answers for _, answers in patient)
        connection.execute("SELECT 1")
    for thread, answers in patient:
        thread.join()
        assert answers == [True]
    assert sorted(numbers(outbox)) == list(range(10))


def test_an_error_of_the_database_is_told_to_all_of_the_group(slow: Slow, outbox: Outbox) -> None:
    slow.fails = OutboxError("the disk is gone")
    with DurableSender(slow, "orders") as sender:
        first = in_thread(lambda: sender.send(envelope(0)))
        assert slow.waits.wait(30)
        rest = [in_thread(lambda n=n: sender.send(envelope(n))) for n in range(1, 6)]  # type: ignore[misc]
        until(lambda: len(sender._waiting) == 6, "all of them")
        slow.goes_on.set()
        for thread, answers in [first, *rest]:
            thread.join()
            assert [str(answer) for answer in answers] == ["the disk is gone"]
        slow.fails = None
        assert sender.send(envelope(7))
    assert numbers(outbox) == [7]


@in_sqlite
def test_a_full_disk_is_told_and_adds_nothing(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect
    is_full = True

    def limited(*arguments: Any, **keywords: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*arguments, **keywords)
        if is_full:
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    monkeypatch.setattr(sqlite3, "connect", limited)
    with DurableSender(outbox, "orders") as sender:
        with pytest.raises(OutboxError, match="make room on the disk") as caught:
            sender.send(Envelope(data=b"x" * 500_000))
        assert not caught.value.possibly_persisted
        is_full = False
        assert sender.send(envelope(1))
    assert numbers(outbox) == [1]


@in_sqlite
@pytest.mark.parametrize(
    ("says", "possibly"), [("disk I/O error", True), ("database or disk is full", False), ("database is locked", False)]
)
def test_an_error_of_the_commit_itself(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, says: str, possibly: bool
) -> None:
    class Failing(sqlite3.Connection):
        def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
            if sql == "COMMIT" and fails:
                fails.pop()
                raise sqlite3.OperationalError(says)
            return super().execute(sql, *arguments)

    fails = [True]
    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Failing))
    with DurableSender(outbox, "orders") as sender:
        with pytest.raises(OutboxError, match=says) as caught:
            sender.send(envelope(1))
        assert caught.value.possibly_persisted is possibly
        assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
        assert sender.send(envelope(2))
    assert numbers(outbox) == [2]


def test_tables_that_are_missing_are_told_and_later_found(tmp_path: Path) -> None:
    outbox = kbatch.SqliteOutbox(tmp_path / "none.db", wire="raw")
    with DurableSender(outbox, "orders") as sender:
        with pytest.raises(OutboxError, match=r"call create\(\)"):
            sender.send(envelope(1))
        outbox.create()
        assert sender.send(envelope(2))
    assert numbers(outbox) == [2]


def test_a_file_that_is_taken_away_is_told(outbox: Outbox, sender: DurableSender) -> None:
    sender.send(envelope(1))
    outboxes.query(outbox, "DROP TABLE {outbox}")
    with pytest.raises(OutboxError, match=r"call create\(\)"):
        sender.send(envelope(2))
    outbox.create()
    assert sender.send(envelope(3))
    assert numbers(outbox) == [3]


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        (("shop.db", "orders"), {}, "or a kbatch.stores.DurableOutbox, not str, which has no method map"),
        ((None, "orders"), {}, "outbox must be"),
        (("outbox", "a b"), {}, "topic must be 1 to 249 letters"),
        (("outbox", "orders"), {"close_timeout_s": -1}, "close_timeout_s must be seconds"),
    ],
)
def test_wrong_options(outbox: Outbox, arguments: Any, options: dict[str, Any], says: str) -> None:
    given = [outbox if value == "outbox" else value for value in arguments]
    for kind in (DurableSender, aio.DurableSender):
        with pytest.raises(ConfigError, match=says):
            kind(*given, **options)


def test_a_negative_time_is_refused(sender: DurableSender) -> None:
    for call in (lambda: sender.send(envelope(1), timeout=-1), lambda: sender.flush(-1), lambda: sender.close(-1)):
        with pytest.raises(ValueError, match="timeout must be seconds"):
            call()


# -- topics


@pytest.mark.parametrize("kind", [KafkaTopic, aio.KafkaTopic])
def test_a_topic_makes_them(outbox: Outbox, kind: Any) -> None:
    topic = kind("orders", SenderMode.DURABLE, outbox=outbox, close_timeout_s=7.0)
    assert topic == kind("orders", SenderMode.DURABLE, outbox=outbox, close_timeout_s=7.0)
    assert topic != kind("orders", SenderMode.DURABLE, outbox=kbatch.SqliteOutbox("other.db"), close_timeout_s=7.0)
    assert topic != kind("orders", SenderMode.DURABLE, outbox=outbox, config=SERVERS, close_timeout_s=7.0)
    assert topic.batch_size is None
    sender = topic.create_sender()
    assert type(sender) is (DurableSender if kind is KafkaTopic else aio.DurableSender)
    assert (sender.topic, sender._close_timeout) == ("orders", 7.0)
    assert repr(outbox) in repr(sender)
    sender._close(0)
    assert "closed" in repr(sender)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"outbox": None}, "outbox is missing: SenderMode.DURABLE sends through one"),
        ({"outbox": "shop.db"}, "or a kbatch.stores.DurableOutbox, not str, which has no method map"),
        ({"producer": kbatch.Producer(SERVERS)}, "producer: not with SenderMode.DURABLE"),
        ({"batch_size": 7, "strict_order": True}, "batch_size, strict_order: not with SenderMode.DURABLE"),
        ({"wire": "raw"}, "wire: not with SenderMode.DURABLE: the outbox maps"),
        ({"config": 7}, "config must be a mapping"),
        ({"config": {**SERVERS, "transactional.id": "x"}}, "must not have transactional.id"),
        ({"config": {**SERVERS, "enable.idempotence": False}}, "must not have enable.idempotence=false"),
        ({"relay": {}}, "relay: only with config="),
        ({"config": SERVERS, "relay": 7}, "relay must be a dict of keyword arguments of kbatch.Relay, not int"),
        ({"config": SERVERS, "relay": {"colour": 7}}, "relay: 'colour' is none of its options, which are retry, batch"),
        ({"config": SERVERS, "relay": {"producer": 7}}, "relay: 'producer' is none of its options"),
        ({"config": SERVERS, "relay": {"close_timeout_s": 7}}, "relay: close_timeout_s is that of the senders"),
        ({"config": SERVERS, "relay": {"batch_size": 0}}, "relay: batch_size must be an int from 1"),
        ({"config": SERVERS, "relay": {"on_state_change": print_later}}, "relay: on_state_change must not be"),
        ({"config": SERVERS, "relay": {"on_dead": asyncio.sleep}}, "relay: on_dead must not be"),
        (
            {
                "config": SERVERS,
                "relay": {"on_dead": print},
                "outbox": SimpleNamespace(**dict.fromkeys(METHODS, print)),
            },
            "relay: on_dead needs an outbox that has dead letters",
        ),
        ({"config": SERVERS, "relay": {"lease_s": 62.0}}, "relay: lease_s must be seconds, 64 at least"),
        ({"config": {**SERVERS, "partitioner": "random"}, "relay": {"strict_order": True}}, "relay: strict_order=True"),
        (
            {"config": {**SERVERS, "transactional.id": "x"}, "relay": {"fencing": "kafka"}},
            "must not have transactional",
        ),
        ({"mode": SenderMode.INLINE, "outbox": None, "config": SERVERS, "relay": {}}, "relay: not with SenderMode.INL"),
        ({"mode": SenderMode.BUFFERED, "config": SERVERS}, "outbox: not with SenderMode.BUFFERED"),
        ({"mode": SenderMode.INLINE, "config": SERVERS}, "outbox: not with SenderMode.INLINE"),
    ],
)
def test_what_a_topic_does_not_take(outbox: Outbox, options: dict[str, Any], says: str) -> None:
    for kind in (KafkaTopic, aio.KafkaTopic):
        with pytest.raises(ConfigError, match=says):
            kind("orders", **{"mode": SenderMode.DURABLE, "outbox": outbox, **options})


def test_relays_of_the_same_options_are_one_and_those_of_others_are_refused(outbox: Outbox) -> None:
    def topic(relay: Any, kind: Any = KafkaTopic) -> Any:
        return kind("orders", SenderMode.DURABLE, outbox=outbox, config=SERVERS, relay=relay)

    def told(before: object, after: object) -> None: ...

    assert topic(None) == topic({}) == topic({"batch_size": 2_000, "retry": None})
    options = {"batch_size": 7, "retry": kbatch.RetryPolicy(max_attempts=2), "on_state_change": told}
    assert topic(options) == topic(dict(options)) != topic(None)
    assert hash(topic(options)) == hash(topic(dict(options)))
    with topic(options).create_sender() as first:
        for kind in (KafkaTopic, aio.KafkaTopic):
            second = topic({**options, "retry": kbatch.RetryPolicy(max_attempts=2)}, kind).create_sender()
            assert second._shared is first._shared
            second._close(0)
            for others in (None, {**options, "batch_size": 8}, {**options, "fencing": "kafka"}):
                with pytest.raises(ConfigError, match="give both the same config= and relay="):
                    topic(others, kind).create_sender()
            with pytest.raises(ConfigError, match="give both the same config= and relay="):
                topic({**options, "on_state_change": lambda before, after: None}, kind).create_sender()


@in_sqlite
@pytest.mark.parametrize(("timeout", "for_flights"), [(30.0, 2.0), (1.0, 0.5), (0.0, 0.0)])
def test_a_relay_that_has_not_finished_has_some_of_the_time_for_what_is_in_flight(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, timeout: float, for_flights: float
) -> None:
    now = 1000.0
    calls: list[tuple[str, float]] = []

    class Busy:
        close_timeout_s = 30.0

        def finish(self) -> None:
            calls.append(("finish", now))

        def wait(self, end: float) -> None:
            nonlocal now
            now = max(now, end)
            calls.append(("wait", end))

        def stop(self, close_timeout_s: float) -> None:
            calls.append(("stop", close_timeout_s))

    monkeypatch.setattr(_shared, "monotonic", lambda: now)
    use: Any = _shared.OutboxUse(outbox)
    use.shared.relay = Busy()
    end = now + timeout
    use.release(end)
    assert calls == [("finish", 1000.0), ("wait", end - for_flights), ("stop", for_flights), ("wait", end + 3.0)]


def test_senders_of_one_outbox_share_a_relay_and_another_configuration_is_refused(outbox: Outbox) -> None:
    def topic(name: str, **config: Any) -> Any:
        return KafkaTopic(name, SenderMode.DURABLE, outbox=outbox, config={**SERVERS, **config}, close_timeout_s=0.0)

    first, second, plain = (
        topic("orders").create_sender(),
        topic("others").create_sender(),
        DurableSender(outbox, "orders"),
    )
    assert first._shared is second._shared is plain._shared
    with pytest.raises(ConfigError, match="give both the same config="):
        topic("third", **{"linger.ms": 5}).create_sender()
    first.send(envelope(1))
    until(lambda: sorted(threads()) == ["kbatch-outbox", "kbatch-relay"], "both threads")
    until(lambda: outbox.status().relays == 1, "its sign of life")
    first.close()
    assert sorted(threads()) == ["kbatch-outbox", "kbatch-relay"]
    second.close()
    until(lambda: threads() == ["kbatch-outbox"], "the end of the relay")
    assert outbox.status().relays == 0  # its buckets were given back
    other = topic("third", **{"linger.ms": 5}).create_sender()
    other.close()
    plain.close()
    until(lambda: threads() == [], "the end of the other")


# -- their life


def test_one_that_was_never_used_starts_nothing(outbox: Outbox) -> None:
    for options in ({}, {"config": SERVERS}):
        with KafkaTopic("orders", SenderMode.DURABLE, outbox=outbox, **options).create_sender() as sender:  # type: ignore[call-overload]
            assert sender.flush() == 0
        assert sender.close() == 0
    assert threads() == []


def test_a_closed_one_refuses(outbox: Outbox) -> None:
    with DurableSender(outbox, "orders") as sender:
        sender.send(envelope(1))
        assert not sender.closed
    assert sender.closed
    for options in ({}, {"connection": None}, {"connection": "x"}):
        with pytest.raises(SenderClosedError):
            sender.send(envelope(2), **options)
    assert sender.close() == 0
    with DurableSender(outbox, "orders") as other:
        other.send(envelope(3))
    assert numbers(outbox) == [1, 3]


@in_sqlite
def test_close_waits_for_callers_and_refuses_those_whose_transaction_has_not_begun(
    outbox: Outbox,
) -> None:
    sender = DurableSender(outbox, "orders")
    with outboxes.transaction(outbox):
        callers = [in_thread(lambda n=n: sender.send(envelope(n), timeout=60)) for n in range(5)]  # type: ignore[misc]
        until(lambda: len(sender._waiting) == 5, "all of them")
        assert sender.flush(0.1) == 5
        assert sender.close(0.1) == 5
        for thread, answers in callers:
            thread.join()
            assert isinstance(answers[0], SenderClosedError)
            assert "it was not added" in str(answers[0])
    assert numbers(outbox) == []


def test_close_lets_callers_have_their_answers(slow: Slow, outbox: Outbox) -> None:
    sender = DurableSender(slow, "orders")
    callers = [in_thread(lambda n=n: sender.send(envelope(n))) for n in range(5)]  # type: ignore[misc]
    until(lambda: len(sender._waiting) == 5, "all of them")
    with later(0.2, slow.goes_on.set):
        assert sender.close() == 0
    for thread, answers in callers:
        thread.join()
        assert answers == [True]
    assert sorted(numbers(outbox)) == list(range(5))


def test_flush_waits_for_the_calls_of_other_threads(slow: Slow, outbox: Outbox) -> None:
    with DurableSender(slow, "orders") as sender:
        thread, _ = in_thread(lambda: sender.send(envelope(1)))
        assert slow.waits.wait(30)
        assert sender.flush(0.05) == 1
        with later(0.1, slow.goes_on.set):
            assert sender.flush() == 0
        assert numbers(outbox) == [1]
        thread.join()


def test_one_that_is_forgotten_ends_its_thread(outbox: Outbox) -> None:
    sender = DurableSender(outbox, "orders")
    sender.send(envelope(1))
    end = weakref.ref(sender)
    del sender
    gc.collect()
    assert end() is None
    until(lambda: threads() == [], "the end of its thread")


def test_an_error_does_not_hold_the_envelope(slow: Slow) -> None:
    slow.fails = OutboxError("no")
    slow.goes_on.set()
    with DurableSender(slow, "orders") as sender:
        sent = envelope(1)
        before = sys.getrefcount(sent)
        gc.collect()
        gc.disable()
        try:
            told = None
            try:
                sender.send(sent)
            except OutboxError as error:
                told = error.with_traceback(None)
            assert told is not None
            slow.fails = None
            until(lambda: sys.getrefcount(sent) == before, "the end of its group")
        finally:
            gc.enable()


@in_sqlite
@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="platform: no signals to threads")
def test_ctrl_c_ends_the_wait(outbox: Outbox, sender: DurableSender) -> None:
    with outboxes.transaction(outbox):
        with later(0.3, lambda: signal.raise_signal(signal.SIGINT)), pytest.raises(KeyboardInterrupt):
            sender.send(envelope(1), timeout=60)
        assert not sender._waiting
    assert sender.send(envelope(2))
    assert numbers(outbox) == [2]  # its transaction had not begun


@in_sqlite
def test_a_signal_handler_may_send_and_close(outbox: Outbox) -> None:
    sender = DurableSender(outbox, "orders")
    answers: list[Any] = []

    def handle(*_: object) -> None:
        answers.append(sender.send(envelope(1), timeout=60))
        answers.append(sender.close(10))

    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with outboxes.transaction(outbox):
            held.set()
            let_go.wait()

    holder, _ = in_thread(hold)
    assert held.wait(30)
    before = signal.signal(signal.SIGTERM, handle)
    try:
        group = sender._shared.group

        def interrupt() -> None:
            until(lambda: group._queue or any(each.is_taken for each in sender._waiting), "the envelope")
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.2)  # the handler waits, too
            let_go.set()

        signaller, _ = in_thread(interrupt)
        assert sender.send(envelope(2), timeout=60)
        signaller.join()
    finally:
        signal.signal(signal.SIGTERM, before)
        let_go.set()
        holder.join()
    assert answers == [True, 0]
    assert sorted(numbers(outbox)) == [1, 2]


def test_an_exception_at_any_line_of_send_adds_it_or_does_not_and_leaves_nothing_behind(outbox: Outbox) -> None:
    places = 0
    with DurableSender(outbox, "orders") as sender:
        sender.send(envelope(0))
        for nth in range(1, 1000):
            before = len(numbers(outbox))
            injector = Injector(nth)
            injector.run(lambda nth=nth: sender.send(envelope(nth)))  # type: ignore[misc]
            assert sender.send(envelope(0))
            assert len(numbers(outbox)) - before in (1, 2), injector.place
            assert all(each.is_taken for each in sender._waiting)
            if injector.place is None:
                break
            places += 1
    assert places > 25


@in_sqlite
def test_an_exception_at_any_line_of_send_before_its_transaction_begins_adds_nothing_ever(outbox: Outbox) -> None:
    places: dict[int, str | None] = {}
    with DurableSender(outbox, "orders") as sender:
        sender.send(envelope(0))
        with outboxes.transaction(outbox):
            while None not in places.values():
                nth = len(places) + 1
                injector = Injector(nth)
                injector.run(lambda nth=nth: sender.send(envelope(nth), timeout=0.02))  # type: ignore[misc]
                places[nth] = injector.place
        assert sender.send(envelope(0))
        assert sender.flush(0.0) == 0  # nor does anybody wait for it
    assert len(places) > 25
    assert [places[number] for number in numbers(outbox) if number] == []


@pytest.fixture
def no_finalizers() -> Iterator[None]:
    """None runs in a thread that is traced."""
    gc.disable()
    yield
    gc.enable()


# A thread that dies on the way out leaves its connection to the garbage collector, of which its driver warns.
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
@pytest.mark.filterwarnings("ignore:.* was deleted while still open:ResourceWarning")
def test_an_exception_at_any_line_of_the_writers_thread_acknowledges_nothing_that_is_not_there(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, no_finalizers: None
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    monkeypatch.setattr("kbatch._sending._durable.BaseDurableSender._look_s", 0.02)
    places = 0
    for nth in range(1, 400, 3):
        injector = Injector(nth)

        def enter(*event: Any, injector: Injector = injector) -> Any:
            return injector._enter(*event) if threading.current_thread().name == "kbatch-outbox" else None

        with DurableSender(outbox, "orders") as sender:
            threading.settrace(enter)
            try:
                started = [in_thread(lambda n=n: sender.send(envelope(n))) for n in (3 * nth, 3 * nth + 1)]  # type: ignore[misc]
                for thread, _ in started:
                    thread.join()
            finally:
                threading.settrace(None)  # type: ignore[arg-type]
            healed = False
            for _ in range(3):  # it may be struck only now
                with contextlib.suppress(OutboxError):
                    healed = sender.send(envelope(3 * nth + 2))
            assert healed
        gc.collect()
        stored = numbers(outbox)
        for number, (_, answers) in zip((3 * nth, 3 * nth + 1), started, strict=True):
            (answer,) = answers
            if answer is True:
                assert number in stored, injector.place
            else:
                assert isinstance(answer, OutboxError), injector.place
                assert answer.possibly_persisted or number not in stored, injector.place
        if injector.place is None:
            break
        places += 1
    assert places > 15


def test_close_that_was_interrupted_at_any_line_is_called_again(outbox: Outbox) -> None:
    places = 0
    for nth in range(1, 1000):
        sender = DurableSender(outbox, "orders")
        sender.send(envelope(nth))
        injector = Injector(nth)
        injector.run(sender.close)
        again = threading.Thread(target=sender.close)  # a lock that is still held is not the thread's
        again.start()
        again.join()
        del sender
        if injector.place is None:
            break
        places += 1
    assert places > 15


@in_sqlite
def test_what_waits_behind_an_add_of_the_application_is_committed_after_it(
    outbox: Outbox, sender: DurableSender
) -> None:
    with outboxes.transaction(outbox) as connection:
        outbox.add(connection, [envelope(1)], topic="orders")
        thread, answers = in_thread(lambda: sender.send(envelope(2)))
        until(lambda: len(sender._waiting) == 1, "the sender")
    thread.join()
    assert answers == [True]
    assert numbers(outbox) == [1, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="platform: no fork")
def test_a_child_refuses_what_the_parent_has_used_and_may_use_what_was_not(outbox: Outbox) -> None:
    used, unused = DurableSender(outbox, "orders"), DurableSender(outboxes.same(outbox, wire="raw"), "orders")
    used.send(envelope(1))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with pytest.raises(ForkError, match="make a new one"):
                used.send(envelope(2))
            assert used.close() == 0
            assert used.flush() == 0
            del used
            gc.collect()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    used.send(envelope(3))
    used.close()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert unused.send(envelope(4))
            assert unused.close() == 0
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    unused.close()
    assert numbers(outbox) == [1, 3, 4]


# -- asyncio


def test_tasks_share_a_transaction_and_each_has_its_answer(slow: Slow, outbox: Outbox) -> None:
    async def main() -> None:
        async with aio.DurableSender(slow, "orders") as sender:
            first = asyncio.create_task(sender.send(envelope(0)))
            while not slow.waits.is_set():
                await asyncio.sleep(0.005)
            rest = [asyncio.create_task(sender.send(envelope(n))) for n in range(1, 60)]
            bad = asyncio.create_task(sender.send(Envelope(object())))
            await asyncio.sleep(0.05)
            slow.goes_on.set()
            assert await asyncio.gather(first, *rest) == [True] * 60
            with pytest.raises(SerializationError):
                await bad

    asyncio.run(main())
    assert numbers(outbox) == list(range(60))  # in the order of the calls
    assert slow.groups == [1, 59]


def test_threads_and_loops_share_one_thread(slow: Slow, outbox: Outbox) -> None:
    slow.goes_on.set()

    async def main(sender: aio.DurableSender, first: int) -> None:
        for number in range(first, first + 20):
            await sender.send(envelope(number))

    with DurableSender(slow, "orders") as blocking:
        of_loops = aio.DurableSender(slow, "orders")
        work = [in_thread(lambda n=n: asyncio.run(main(of_loops, 100 * n))) for n in range(3)]  # type: ignore[misc]
        work += [
            in_thread(lambda n=n: [blocking.send(envelope(1000 * n + m)) for m in range(20)])  # type: ignore[misc]
            for n in range(1, 4)
        ]
        for thread, answers in work:
            thread.join()
            assert not isinstance(answers[0], BaseException)
        of_loops._close(0)
    assert len(numbers(outbox)) == len(set(numbers(outbox))) == 120


def test_a_cancelled_task_adds_nothing_before_its_transaction_and_may_add_it_within(slow: Slow, outbox: Outbox) -> None:
    async def main() -> None:
        async with aio.DurableSender(slow, "orders") as sender:
            within = asyncio.create_task(sender.send(envelope(1)))
            while not slow.waits.is_set():
                await asyncio.sleep(0.005)
            before = asyncio.create_task(sender.send(envelope(2)))
            await asyncio.sleep(0.05)
            for task in (within, before):
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert not sender._waiting
            slow.goes_on.set()
            assert await sender.send(envelope(3))

    asyncio.run(main())
    assert numbers(outbox) == [1, 3]


def test_a_timeout_on_a_loop(slow: Slow, outbox: Outbox) -> None:
    async def main() -> None:
        async with aio.DurableSender(slow, "orders") as sender:
            with pytest.raises(OutboxTimeoutError) as within:
                await sender.send(envelope(1), timeout=0.2)
            assert within.value.possibly_persisted
            with pytest.raises(OutboxTimeoutError) as before:
                await sender.send(envelope(2), timeout=0.2)
            assert not before.value.possibly_persisted
            slow.goes_on.set()
            assert await sender.flush() == 0
            assert await sender.send(envelope(3), timeout=30)

    asyncio.run(main())
    assert numbers(outbox) == [1, 3]


def test_a_loop_that_ends_while_it_waits(slow: Slow, outbox: Outbox) -> None:
    sender = aio.DurableSender(slow, "orders")
    loop = asyncio.new_event_loop()
    task = loop.create_task(sender.send(envelope(1)))
    until(lambda: loop.run_until_complete(asyncio.sleep(0.005)) or slow.waits.is_set(), "its transaction")
    loop.close()
    slow.goes_on.set()
    until(lambda: numbers(outbox) == [1], "the commit")

    async def again() -> bool:
        return await sender.send(envelope(2))

    assert asyncio.run(again())
    asyncio.run(sender.close())
    assert numbers(outbox) == [1, 2]
    with contextlib.suppress(BaseException):
        task.cancel()
    task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_a_connection_on_a_loop(outbox: Outbox) -> None:
    async def main() -> None:
        async with aio.DurableSender(outbox, "orders") as sender:
            with outboxes.transaction(outbox) as connection:
                assert await sender.send(envelope(1), connection=connection)
            with pytest.raises(ValueError, match="timeout must be"):
                await sender.send(envelope(2), timeout=-1)
        with pytest.raises(SenderClosedError):
            await sender.send(envelope(3))

    asyncio.run(main())
    assert numbers(outbox) == [1]


# A thread that dies on the way out leaves its connection to the garbage collector, of which its driver warns.
@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
@pytest.mark.filterwarnings("ignore:.* was deleted while still open:ResourceWarning")
def test_a_thread_that_dies_without_a_word_keeps_nobody_waiting(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    monkeypatch.setattr(_group.Waiting, "settle", lambda self, error: (_ for _ in ()).throw(SystemExit))
    monkeypatch.setattr(_group.GroupCommit, "_refuse_all", lambda self: None)
    with DurableSender(outbox, "orders") as sender, pytest.raises(OutboxError, match="has died") as caught:
        sender.send(envelope(1))
    assert caught.value.possibly_persisted

    async def main() -> None:
        async with aio.DurableSender(outbox, "orders") as sender:
            with pytest.raises(OutboxError, match="has died"):
                await sender.send(envelope(2))

    asyncio.run(main())
    assert numbers(outbox) == [1, 2]
