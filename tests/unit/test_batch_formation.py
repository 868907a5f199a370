"""How envelopes one at a time become batches: `Accumulator`, against a slow model."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import kbatch
from kbatch import Envelope
from kbatch._fastmap import Accumulator, Flag, FormedBatch, RoomWaiter
from tests.waiting import until

PATIENCE_S = 30.0  # only a hang reaches it
NEVER_S = 1e6


class Sender(Accumulator):
    starts = 0

    def _start(self) -> None:
        self.starts += 1
        self._accept()

    def _refuse(self) -> None:
        raise kbatch.SenderClosedError("the sender is closed")


def make(
    *,
    batch_size: int = 1000,
    batch_bytes: int = 10**6,
    batch_timeout_s: float = NEVER_S,
    max_buffered: int = 10**6,
    max_buffered_bytes: int = 10**9,
) -> Sender:
    return Sender(
        batch_size=batch_size,
        batch_bytes=batch_bytes,
        batch_timeout_s=batch_timeout_s,
        max_buffered=max_buffered,
        max_buffered_bytes=max_buffered_bytes,
    )


def sized(size: int) -> Envelope[Any]:
    return Envelope(data=bytes(size))


def take_all(sender: Sender) -> list[FormedBatch]:
    batches = []
    while (batch := sender._next_batch()) is not None:
        batches.append(batch)
    return batches


# -- any order of events


LOOKS = 7  # what {"a": 1} looks like: 2, a letter, a number


class Accumulators(RuleBasedStateMachine):
    """Envelopes come, some wait for room, batches go, and room comes back."""

    @initialize(
        batch_size=st.integers(1, 4),
        batch_bytes=st.integers(1, 12),
        max_buffered=st.integers(1, 9),
        max_buffered_bytes=st.integers(1, 60),
        at_once=st.booleans(),
    )
    def start(
        self, batch_size: int, batch_bytes: int, max_buffered: int, max_buffered_bytes: int, at_once: bool
    ) -> None:
        self.max_buffered_bytes = max_buffered_bytes
        self.buffered_bytes = 0
        self.outside_sizes: list[int] = []
        self.batch_size, self.batch_bytes, self.max_buffered, self.at_once = (
            batch_size,
            batch_bytes,
            max_buffered,
            at_once,
        )
        self.sender = make(
            batch_size=batch_size,
            batch_bytes=batch_bytes,
            batch_timeout_s=0 if at_once else NEVER_S,
            max_buffered=max_buffered,
            max_buffered_bytes=max_buffered_bytes,
        )
        self.message_bytes = 0  # not known
        self.encoded_bytes = self.encoded = 0.0
        self.accepted: list[Envelope[Any]] = []
        self.closed: list[list[tuple[Envelope[Any], int]]] = []
        self.filling: list[tuple[Envelope[Any], int]] = []
        self.waiters: list[tuple[Envelope[Any], int, RoomWaiter]] = []
        self.buffered = self.outside = 0  # outside: taken out, not given back
        self.refusing = self.hastened = False
        self.woken: list[Envelope[Any]] = []
        self.expected_woken: list[Envelope[Any]] = []
        self.taken: list[Envelope[Any]] = []

    envelopes = st.one_of(
        st.builds(
            lambda size, key: (Envelope(data=bytes(size), key=key), size + len(key or "")),
            st.integers(0, 14),
            st.sampled_from([None, "", "k", b"kk"]),
        ),
        st.just(0).map(lambda _: (kbatch.Tombstone("key"), 3)),
        st.just(0).map(lambda _: (Envelope({"a": 1}), None)),
        st.integers(0, 5).map(lambda size: (Envelope(data=memoryview(bytearray(size))), size)),
    )

    def size_of(self, drawn: tuple[Envelope[Any], int | None]) -> int:
        if drawn[1] is not None:
            return drawn[1]
        return self.message_bytes if 2 * self.message_bytes >= LOOKS else LOOKS

    def has_room(self, size: int) -> bool:
        if self.buffered >= self.max_buffered:
            return False
        if self.buffered and self.buffered_bytes + size > self.max_buffered_bytes:
            self.hastened = self.hastened or bool(self.filling)
            return False
        return True

    def append(self, envelope: Envelope[Any], size: int) -> None:
        if self.filling and sum(of for _, of in self.filling) + size > self.batch_bytes:
            self.close()
        self.filling.append((envelope, size))
        self.accepted.append(envelope)
        self.buffered += 1
        self.buffered_bytes += size
        if len(self.filling) == self.batch_size or sum(of for _, of in self.filling) >= self.batch_bytes:
            self.close()

    def close(self) -> None:
        if self.filling:
            self.closed.append(self.filling)
            self.filling = []
        self.hastened = False

    def make_room(self) -> None:
        while self.waiters and not self.refusing and self.has_room(self.waiters[0][1]):
            envelope, size, _ = self.waiters.pop(0)
            self.append(envelope, size)
            self.expected_woken.append(envelope)

    @precondition(lambda self: not self.refusing)
    @rule(drawn=envelopes)
    def one_is_sent(self, drawn: tuple[Envelope[Any], int | None]) -> None:
        has_room = not self.waiters and self.has_room(self.size_of(drawn))
        assert self.sender.try_send(drawn[0]) is has_room
        if has_room:
            self.append(drawn[0], self.size_of(drawn))

    @precondition(lambda self: not self.refusing and (self.buffered >= self.max_buffered or self.waiters))
    @rule(drawn=envelopes)
    def one_lines_up(self, drawn: tuple[Envelope[Any], int | None]) -> None:
        envelope = drawn[0]
        waiter = self.sender._line_up(envelope, lambda: self.woken.append(envelope))
        assert not waiter.taken
        self.waiters.append((envelope, self.size_of(drawn), waiter))

    @precondition(lambda self: self.waiters)
    @rule(data=st.data())
    def one_leaves_the_line(self, data: st.DataObject) -> None:
        _, _, waiter = self.waiters.pop(data.draw(st.integers(0, len(self.waiters) - 1)))
        self.sender._leave_line(waiter)
        assert not waiter.taken
        self.make_room()  # there may be room for what waited behind it

    @rule()
    def the_batch_is_closed(self) -> None:
        self.sender._close_filling()
        self.close()

    @rule()
    def the_batch_is_hastened(self) -> None:
        assert self.sender._hasten_filling() == len(self.accepted)
        self.hastened = bool(self.filling)

    @rule()
    def a_batch_is_taken(self) -> None:
        if not self.closed and (self.at_once or self.hastened):
            self.close()
        batch = self.sender._next_batch()
        if not self.closed:
            assert batch is None
            return
        assert batch is not None
        expected = self.closed.pop(0)
        assert [each.id for each in batch.envelopes] == [other.id for other, _ in expected]
        assert [batch.sizes[at] for at in range(len(expected))] == [size for _, size in expected]
        assert batch.sizes.total == sum(size for _, size in expected)
        assert batch.first_seq == len(self.taken)
        assert not batch.scheduled
        self.taken += batch.envelopes
        self.outside += len(expected)
        self.outside_sizes += [size for _, size in expected]

    @precondition(lambda self: self.outside)
    @rule(data=st.data())
    def some_are_given_back(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, self.outside))
        self.outside -= count
        self.buffered -= count
        size = sum(self.outside_sizes[:count])
        del self.outside_sizes[:count]
        self.buffered_bytes -= size
        self.sender._give_back(count, size)
        self.make_room()

    @rule(mean=st.integers(4, 15), count=st.integers(0, 3))  # others depend on how closely one looks
    def it_learns_what_messages_take(self, mean: int, count: int) -> None:
        self.sender._learn_message_bytes(mean * count, count)
        if count:
            self.encoded_bytes = self.encoded_bytes * 0.9 + mean * count
            self.encoded = self.encoded * 0.9 + count
            self.message_bytes = int(self.encoded_bytes / self.encoded + 0.5)

    @precondition(lambda self: len(self.accepted) > 10 and not self.refusing)
    @rule()
    def it_refuses(self) -> None:
        self.refusing = True
        self.expected_woken += [envelope for envelope, _, _ in self.waiters]
        left, self.waiters = self.waiters, []
        self.sender._stop_accepting()
        self.close()
        assert not any(waiter.taken for _, _, waiter in left)
        with pytest.raises(kbatch.SenderClosedError):
            self.sender.send(sized(1))

    @invariant()
    def counts(self) -> None:
        if not hasattr(self, "sender"):
            return
        assert len(self.sender) == self.buffered <= self.max_buffered
        assert self.sender._buffered_bytes == self.buffered_bytes
        assert self.buffered <= 1 or self.buffered_bytes <= self.max_buffered_bytes
        assert self.sender.accepted == len(self.accepted)
        assert all(one is other for one, other in zip(self.woken, self.expected_woken, strict=True))
        oldest = self.sender._first_seq()
        if self.closed or self.filling:
            assert oldest == len(self.taken)
            due_s = self.sender._due_in()
            assert due_s is not None
            assert (due_s == 0) == bool(self.closed or self.at_once or self.hastened)
        else:
            assert (oldest, self.sender._due_in()) == (None, None)

    def teardown(self) -> None:
        if not hasattr(self, "sender"):
            return
        self.the_batch_is_closed()
        while self.closed:
            self.a_batch_is_taken()
        assert [one.id for one in self.taken] == [other.id for other in self.accepted]


TestAccumulators = Accumulators.TestCase


# -- each rule by example


def test_the_first_envelope_starts_it_once() -> None:
    sender = make()
    assert (sender.starts, sender._is_used, bool(sender), len(sender)) == (0, False, True, 0)
    for _ in range(3):
        sender.send(sized(1))
    assert (sender.starts, sender._is_used, len(sender)) == (1, True, 3)


def test_a_batch_is_closed_by_count_or_before_it_has_too_many_bytes() -> None:
    sender = make(batch_size=3, batch_bytes=10)
    for size in (1, 1, 1, 6, 5, 20, 10, 4, 4):
        sender.send(sized(size))
    assert [[len(bytes(e.data or b"")) for e in batch.envelopes] for batch in take_all(sender)] == [
        [1, 1, 1],
        [6],
        [5],
        [20],
        [10],
    ]
    sender._close_filling()
    assert [batch.first_seq for batch in take_all(sender)] == [7]


def test_the_age_is_that_of_the_first_and_a_trickle_does_not_put_it_off() -> None:
    sender = make()
    sender.send(sized(1))
    due_s = sender._due_in()
    assert due_s is not None
    for _ in range(50):
        sender.send(sized(1))
        later_s = sender._due_in()
        assert later_s is not None
        assert later_s < due_s
        due_s = later_s
    assert sender._next_batch() is None
    sender._close_filling()
    assert [len(batch.envelopes) for batch in take_all(sender)] == [51]


def test_no_envelope_of_a_batch_is_older_than_it_says() -> None:
    sender = make()
    sender.send(sized(1))
    time.sleep(0.01)
    before = time.monotonic()
    sender.send(sized(1))
    sender._close_filling()
    batch = sender._next_batch()
    assert batch is not None
    assert before <= batch.accepted_at <= time.monotonic()


def test_what_is_too_old_is_taken_out_when_all_of_its_batch_is() -> None:
    patient = make()
    patient.send(sized(1))
    patient._close_older(0)  # not yet due
    assert patient._pop_older(0) is None
    sender = make(batch_timeout_s=0)
    sender.send(sized(1))
    sender._close_older(3600)
    assert sender._pop_older(0) is None  # not closed yet
    sender._close_older(0)
    sender.send(sized(1))
    for endless in (3600, 1e300, math.inf):
        assert sender._pop_older(endless) is None
    batch = sender._pop_older(0)
    assert batch is not None
    assert (batch.first_seq, len(batch.envelopes)) == (0, 1)
    assert sender._pop_older(0) is None
    assert sender._first_seq() == 1


def test_many_that_wait_for_room_may_leave_in_any_order() -> None:
    sender = make(max_buffered=1)
    sender.send(sized(1))
    woken: list[int] = []
    waiters = [sender._line_up(sized(1), functools.partial(woken.append, n)) for n in range(1000)]
    leaving = random.Random(5).sample(range(1000), 990)
    for n in leaving:
        sender._leave_line(waiters[n])
        sender._leave_line(waiters[n])  # once more does nothing
    rest = sorted(set(range(1000)) - set(leaving))
    for _ in rest:
        assert not sender.try_send(sized(1))
        sender._give_back(1, 1)
    assert woken == rest
    assert [waiters[n].taken for n in rest] == [True] * 10
    sender._give_back(1, 1)
    assert sender.try_send(sized(1))


def test_who_lines_up_when_it_has_just_been_closed_is_woken() -> None:
    sender = make(max_buffered=1)
    sender.send(sized(1))
    sender._stop_accepting()
    woken: list[None] = []
    assert not sender._line_up(sized(1), lambda: woken.append(None)).taken
    assert woken == [None]


def test_who_holds_something_is_kept_by_the_signal_that_its_thread_waits_for() -> None:
    sender = make()
    kept, thread_waits_for = weakref.ref(sender), sender.flag
    sender.send(sized(1))
    del sender
    gc.collect()
    assert kept() is not None
    thread_waits_for.keep(None)
    gc.collect()
    assert kept() is None


def test_it_is_due_at_its_age_and_not_before() -> None:
    sender = make(batch_timeout_s=0.01)
    sender.send(sized(1))
    until(lambda: sender._due_in() == 0, "the age of the batch")
    assert sender._next_batch() is not None
    assert sender._next_batch() is None


def test_there_is_a_signal_for_the_first_of_a_batch_and_for_each_that_is_closed() -> None:
    sender = make(batch_size=3)
    for is_news in (True, False, True, True, False, True):
        sender.send(sized(1))
        assert sender.flag.wait(0) is is_news
    assert not sender.flag.wait(0)


def test_a_batch_knows_whether_one_of_it_is_scheduled() -> None:
    from datetime import datetime, timezone

    sender = make(batch_size=2)
    sender.send(sized(1))
    sender.send(Envelope(data=b"", scheduled_time=datetime(2100, 1, 1, tzinfo=timezone.utc)))
    sender.send(sized(1))
    sender.send(sized(1))
    assert [batch.scheduled for batch in take_all(sender)] == [True, False]


@pytest.mark.parametrize("wrong", [None, 5, "text", b"", {}, Envelope])
def test_what_is_no_envelope_is_refused_and_nothing_starts(wrong: Any) -> None:
    sender = make()
    for call in (sender.send, sender.try_send):
        with pytest.raises(TypeError, match=r"expected a kbatch\.Envelope, not "):
            call(wrong)
    assert (sender.starts, len(sender), sender._next_batch()) == (0, 0, None)


def test_full_is_said_with_its_time_and_the_envelope_is_not_taken() -> None:
    sender = make(max_buffered=1)
    sender.send(sized(1))
    assert not sender.try_send(sized(1))
    with pytest.raises(kbatch.SenderFullError, match=r"within 0 s: 1 have no outcome yet"):
        sender.send(sized(1), timeout=0)
    with pytest.raises(ValueError, match="timeout must be seconds, 0 or more"):
        sender.send(sized(1), timeout=-1)
    sender._close_filling()
    sender._give_back(len(take_all(sender)), sender._buffered_bytes)
    assert (len(sender), sender.accepted) == (0, 1)  # nobody is in the line any more
    assert sender.try_send(sized(1))


def test_full_means_not_taken_if_room_comes_while_the_error_is_made() -> None:
    class Seconds(float):
        def __format__(self, spec: str) -> str:
            sender._give_back(1, sender._buffered_bytes)  # as another thread would, which gets the GIL
            return super().__format__(spec)

    sender = make(max_buffered=1, batch_size=1)
    sender.send(sized(1))
    with pytest.raises(kbatch.SenderFullError):
        sender.send(sized(2), timeout=Seconds(0))
    assert [len(batch.envelopes) for batch in take_all(sender)] == [1]
    assert (len(sender), sender.accepted) == (0, 1)


def in_threads(*calls: Callable[[], object]) -> list[threading.Thread]:
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    return threads


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_threads_that_wait_are_served_in_their_order() -> None:
    sender = make(max_buffered=1)
    sender.send(sized(0))
    flags = [Flag() for _ in range(5)]
    waiters = [sender._line_up(sized(n), flag) for n, flag in enumerate(flags, 1)]
    served: list[int] = []

    def wait(n: int) -> None:
        assert flags[n].wait(PATIENCE_S)
        served.append(n)

    threads = in_threads(*[lambda n=n: wait(n) for n in range(5)])
    for n in range(5):
        sender._give_back(1, 1)
        assert [waiter.taken for waiter in waiters] == [other <= n for other in range(5)]
        until(lambda n=n: len(served) == n + 1, "the waiter is woken")  # type: ignore[misc]
    join(threads)
    assert served == list(range(5))
    sender._close_filling()
    assert [len(bytes(e.data or b"")) for batch in take_all(sender) for e in batch.envelopes] == list(range(6))


def test_many_threads_with_little_room_lose_nothing_and_keep_their_order() -> None:
    sender = make(batch_size=7, max_buffered=10, batch_timeout_s=0)
    seen: list[tuple[int, int]] = []

    def send(thread: int) -> None:
        for n in range(300):
            sender.send(Envelope((thread, n)), timeout=PATIENCE_S)

    threads = in_threads(*[lambda thread=thread: send(thread) for thread in range(4)])
    while len(seen) < 1200:
        assert len(sender) <= 10
        batch = sender._next_batch()
        if batch is None:
            sender.flag.wait(0.01)
            continue
        assert batch.first_seq == len(seen)
        seen += [envelope.message for envelope in batch.envelopes]
        sender._give_back(len(batch.envelopes), batch.sizes.total)
    join(threads)
    for thread in range(4):
        assert [n for of, n in seen if of == thread] == list(range(300))
    assert len(sender) == 0


def test_those_that_wait_are_told_when_it_is_closed() -> None:
    sender = make(max_buffered=1)
    sender.send(sized(1))
    refused: list[Exception] = []

    def send() -> None:
        try:
            sender.send(sized(1), timeout=PATIENCE_S)
        except kbatch.SenderClosedError as error:
            refused.append(error)

    threads = in_threads(send, send)
    until(lambda: all(thread.is_alive() for thread in threads), "the threads run")
    sender._stop_accepting()
    join(threads)
    assert (len(refused), sender.accepted, sender._is_refusing) == (2, 1, True)
    assert [len(batch.envelopes) for batch in take_all(sender)] == [1]


# -- called from within


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> None:
    """What earlier tests of the process have left is looked at no more: some of these collect hundreds of times."""
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def collecting_at_once() -> Iterator[None]:
    """The garbage collector runs, and with it finalizers, whenever something is made that it tracks."""
    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        yield
    finally:
        gc.set_threshold(*before)


class Chatty:
    """Sends when it is collected."""

    def __init__(self, sender: Sender, count: list[int]) -> None:
        self.sender, self.count = sender, count
        self.cycle = self

    def __del__(self) -> None:
        if self.sender.try_send(Envelope("farewell")):
            self.count[0] += 1


def test_a_finalizer_may_send_in_the_middle_of_a_send() -> None:
    sender = make(batch_size=3)
    farewells = [0]
    with collecting_at_once():
        for n in range(2000):
            Chatty(sender, farewells)
            sender.send(Envelope(n))
    gc.collect()
    sender._close_filling()
    batches = take_all(sender)
    messages = [envelope.message for batch in batches for envelope in batch.envelopes]
    assert farewells[0] == 2000 == messages.count("farewell")
    assert [message for message in messages if message != "farewell"] == list(range(2000))
    assert [batch.first_seq for batch in batches] == [
        sum(len(other.envelopes) for other in batches[:n]) for n in range(len(batches))
    ]
    assert all(0 < len(batch.envelopes) <= 3 for batch in batches)
    assert len(sender) == sender.accepted == 4000


class Closer:
    """Closes a sender when it is collected."""

    def __init__(self, sender: Sender) -> None:
        self.sender = sender
        self.cycle = self

    def __del__(self) -> None:
        self.sender._stop_accepting()


def test_a_finalizer_may_close_it_while_who_waits_gets_its_room() -> None:
    for _ in range(200):
        sender = make(batch_size=1, max_buffered=1)
        sender.send(Envelope(1))
        take_all(sender)
        woken: list[bool] = []
        waiter = sender._line_up(Envelope(2), lambda woken=woken: woken.append(True))
        Closer(sender)
        with collecting_at_once():
            sender._give_back(1, 1)
        gc.collect()
        assert woken == [True]
        assert sender._is_refusing
        assert len(sender) == (1 if waiter.taken else 0)


def test_a_finalizer_that_sends_in_the_middle_of_a_send_takes_no_room_twice() -> None:
    for _ in range(200):
        sender = make(max_buffered=1)
        farewells = [0]
        Chatty(sender, farewells)
        with collecting_at_once():
            taken = sender.try_send(Envelope(1))
        gc.collect()
        assert taken + farewells[0] == len(sender) == 1


class Leaver:
    """Has what waits for room wait no longer when it is collected, as its thread does when its time is over."""

    def __init__(self, sender: Sender, waiter: RoomWaiter, refused: list[bool]) -> None:
        self.sender, self.waiter, self.refused = sender, waiter, refused
        self.cycle = self

    def __del__(self) -> None:
        self.sender._leave_line(self.waiter)
        self.refused.append(not self.waiter.taken)


def test_what_leaves_the_line_while_it_is_given_room_is_not_taken() -> None:
    for _ in range(200):
        sender = make(batch_size=1, max_buffered=1)
        sender.send(Envelope(1))
        take_all(sender)
        refused: list[bool] = []
        waiter = sender._line_up(Envelope(2), lambda: None)
        Leaver(sender, waiter, refused)
        with collecting_at_once():
            sender._give_back(1, 1)
        gc.collect()
        assert refused == [not waiter.taken]
        assert len(sender) == (1 if waiter.taken else 0)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="platform: no interval timers")
def test_a_signal_handler_may_send_in_the_middle_of_a_send() -> None:
    sender = make(batch_size=5)
    interrupted = 0

    def handler(*_: Any) -> None:
        nonlocal interrupted
        sender.send(Envelope("signal"))
        interrupted += 1

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    sent = 0
    try:
        while interrupted < 100:
            sender.send(Envelope(sent))
            sent += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    sender._close_filling()
    messages = [envelope.message for batch in take_all(sender) for envelope in batch.envelopes]
    assert messages.count("signal") == interrupted
    assert [message for message in messages if message != "signal"] == list(range(sent))


def test_the_length_of_a_key_is_not_asked_of_its_class() -> None:
    sender = make(max_buffered=1)

    class Key(str):
        def __len__(self) -> int:
            sender.try_send(sized(1))
            return 1

    assert sender.try_send(Envelope(data=b"", key=Key("k")))
    assert (len(sender), sender._buffered_bytes) == (1, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="platform: no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_in_a_child_it_refuses_if_it_was_used_before_the_fork() -> None:
    used, unused = make(), make()
    used.send(sized(1))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            try:
                used.send(sized(1))
            except kbatch.ForkError:
                unused.send(sized(1))
                status = 0 if (used._is_forked, len(used), len(unused), unused._is_forked) == (True, 1, 1, False) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    used.send(sized(1))
    assert (used._is_forked, len(used), unused._is_used) == (False, 2, False)


def test_what_it_lets_go_is_freed() -> None:
    sender = make(batch_size=2)
    body = os.urandom(5)
    references = sys.getrefcount(body)
    for _ in range(4):
        sender.send(Envelope(data=body))
    assert sys.getrefcount(body) > references
    sender._give_back(4, 4)
    take_all(sender)
    assert sys.getrefcount(body) == references


@pytest.mark.parametrize("wait", [False, True])
def test_a_body_that_may_change_is_copied(wait: bool) -> None:
    sender = make(max_buffered=1, batch_size=1)
    body = bytearray(b"one")
    if wait:
        sender.send(Envelope(data=b"first"))
        sender._line_up(Envelope(data=memoryview(body)), Flag())
    else:
        sender.send(Envelope(data=body))
    body[:] = b"two"
    sender._give_back(1, 1)
    assert take_all(sender)[-1].envelopes[0].data == b"one"
