"""The threads that make the calls of many senders."""

import gc
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kbatch._fastmap import CallQueue, SharedThreads, comes_from
from tests.waiting import until

HANG_S = 30.0


@pytest.fixture
def threads() -> Iterator[SharedThreads]:
    made = SharedThreads("tests-shared", 0.01)
    yield made
    gc.collect()
    until(lambda: running() == 0, "the end of the threads")


def running() -> int:
    return sum(thread.name == "tests-shared" for thread in threading.enumerate())


def blocked(queue: CallQueue) -> Callable[[], None]:
    """Has a call of the queue begin; what ends it."""
    begun, go_on = threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        assert go_on.wait(HANG_S)

    queue.put(call)
    assert begun.wait(HANG_S)
    return go_on.set


def test_calls_that_are_not_slow_share_one_thread() -> None:
    threads = SharedThreads("tests-shared", HANG_S)
    queues = [CallQueue(threads) for _ in range(20)]
    told: list[tuple[int, int]] = []
    by: set[threading.Thread] = set()

    def call(queue: int, n: int) -> None:
        by.add(threading.current_thread())
        told.append((queue, n))

    for n in range(50):
        for number, queue in enumerate(queues):
            queue.put(call, number, n)
    until(lambda: len(told) == 1000, "the calls")
    assert len(by) == 1
    for number in range(20):
        assert [n for queue, n in told if queue == number] == list(range(50))
    for queue in queues:
        queue.join(HANG_S)
    assert running() == 0


def test_a_call_that_does_not_end_holds_up_its_own_queue_only(threads: SharedThreads) -> None:
    queues = [CallQueue(threads) for _ in range(5)]
    ends, told = [], []
    for number, queue in enumerate(queues):
        ends.append(blocked(queue))  # each begins while those before it are at a stand
        queue.put(told.append, number)
    assert told == []
    assert running() <= 7
    for number in (3, 0, 4, 1, 2):
        ends[number]()
        until(lambda number=number: told[-1:] == [number], "the next call of that queue")  # type: ignore[misc]
    until(lambda: running() == 1, "the end of the threads that are too many")
    for queue in queues:
        queue.join(HANG_S)
    assert running() == 0


def test_calls_of_one_queue_are_never_made_side_by_side(threads: SharedThreads) -> None:
    queues = [CallQueue(threads) for _ in range(4)]
    at_work = [0] * len(queues)
    told: list[tuple[int, int]] = []
    pause = threading.Event()

    def call(queue: int, n: int) -> None:
        at_work[queue] += 1
        assert at_work[queue] == 1
        pause.wait(0.02 if n % 3 == 0 else 0)  # so that each takes the place of others
        told.append((queue, n))
        at_work[queue] -= 1

    for n in range(15):
        for number, queue in enumerate(queues):
            queue.put(call, number, n)
    for queue in queues:
        queue.join(HANG_S)
    for number in range(len(queues)):
        assert [n for queue, n in told if queue == number] == list(range(15))


def test_what_a_call_puts_comes_after_it(threads: SharedThreads) -> None:
    queue, other = CallQueue(threads), CallQueue(threads)
    told: list[str] = []

    def call() -> None:
        assert comes_from(queue)
        assert not comes_from(other)
        queue.put(told.append, "second")
        queue.join(HANG_S)  # it does not wait for itself
        told.append("first")

    queue.put(call)
    queue.join(HANG_S)
    assert told == ["first", "second"]


def test_an_exception_does_not_end_the_calls(threads: SharedThreads, caplog: pytest.LogCaptureFixture) -> None:
    queue, told = CallQueue(threads), []

    def fail(error: BaseException) -> None:
        raise error

    for error in (ValueError("own"), SystemExit(1), KeyboardInterrupt()):
        queue.put(fail, error)
    queue.put(told.append, 1)
    queue.join(HANG_S)
    assert told == [1]
    assert caplog.text.count("a callback failed") == 3


def test_a_join_waits_for_its_own_queue_only(threads: SharedThreads) -> None:
    slow, queue, told = CallQueue(threads), CallQueue(threads), []
    end = blocked(slow)
    queue.put(told.append, 1)
    queue.join(HANG_S)
    assert told == [1]
    slow.join(0)
    assert running() > 0
    end()
    slow.join(HANG_S)


def test_what_is_put_after_the_end_is_called_by_a_thread_that_ends(threads: SharedThreads) -> None:
    queue = CallQueue(threads)
    by: list[threading.Thread] = []
    queue.join(HANG_S)
    for count in (1, 2):
        queue.put(lambda: by.append(threading.current_thread()))
        until(lambda count=count: len(by) == count and not by[-1].is_alive(), "the end of the thread")  # type: ignore[misc]


@pytest.mark.parametrize("in_cycle", [False, True])
def test_a_queue_that_is_forgotten_keeps_no_thread(threads: SharedThreads, in_cycle: bool) -> None:
    queue, told = CallQueue(threads), []
    cycle: list[object] = [queue]
    if in_cycle:
        cycle.append(cycle)
    queue.put(told.append, 1)
    until(lambda: told, "the call")
    assert running() == 1
    del queue, cycle
    gc.collect()
    until(lambda: running() == 0, "the end of the thread")


@pytest.mark.parametrize("begins", [False, True])
def test_a_start_that_was_interrupted_is_made_good(
    monkeypatch: pytest.MonkeyPatch, threads: SharedThreads, begins: bool
) -> None:
    queue = CallQueue(threads)
    ran: list[int] = []
    start = threading.Thread.start

    def interrupted(self: threading.Thread) -> None:
        if begins:
            start(self)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(MemoryError):
            queue.put(ran.append, 1)
    queue.put(ran.append, 2)
    queue.put(ran.append, 3)
    queue.join(HANG_S)
    assert ran == [2, 3]  # what could not be put is not called


@pytest.mark.parametrize("active", [False, True])
def test_without_a_thread_to_be_had_whoever_puts_makes_the_call(
    monkeypatch: pytest.MonkeyPatch, threads: SharedThreads, active: bool
) -> None:
    slow, queue, told = CallQueue(threads), CallQueue(threads), []
    end = blocked(slow) if active else None

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        queue.put(lambda: told.append(threading.current_thread()))
    assert told == [threading.current_thread()]
    if end is not None:
        end()
    queue.put(lambda: told.append(threading.current_thread()))
    queue.join(HANG_S)
    slow.join(HANG_S)
    assert len(set(told)) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("at_work", [False, True])
def test_a_forked_child_makes_calls_of_its_own_and_none_of_the_parents(threads: SharedThreads, at_work: bool) -> None:
    slow, queue = CallQueue(threads), CallQueue(threads)
    end = blocked(slow)
    told: list[str] = []
    if at_work:
        slow.put(told.append, "the parent's")
    else:
        end()
        until(lambda: running() == 1, "the end of the others")
    pid = os.fork()
    if not pid:
        try:
            threads.forget()
            gc.collect()
            slow.put(told.append, "the child's")
            queue.put(told.append, "the child's")
            slow.join(HANG_S)
            queue.join(HANG_S)
            os._exit(0 if told == ["the child's"] * 2 else 1)
        finally:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    end()
    slow.join(HANG_S)
    assert told == ["the parent's"] * at_work


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_call_that_forks_is_the_last_one_in_the_child(threads: SharedThreads) -> None:
    queue, other = CallQueue(threads), CallQueue(threads)
    reader, writer = os.pipe()
    told: list[str] = []

    def call() -> None:
        queue.put(told.append, "its own")
        other.put(told.append, "another's")
        pid = os.fork()
        if not pid:
            threads.forget()
            try:
                os.write(writer, b"in the child")
            finally:
                os.close(writer)
            return
        os.close(writer)
        told.append(f"child ended with {os.waitpid(pid, 0)[1]}")

    queue.put(call)
    queue.join(HANG_S)
    other.join(HANG_S)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b"in the child"
    assert told[0].startswith("child ended") or told[0] == "another's"
    assert sorted(told)[1:] == ["child ended with 0", "its own"]


def test_a_call_that_comes_while_the_first_thread_begins_waits_for_nobody() -> None:
    for _ in range(30):
        threads = SharedThreads("tests-shared", 0.001)
        queues = [CallQueue(threads) for _ in range(3)]
        called = [threading.Event() for _ in queues]
        together = threading.Barrier(len(queues))

        def call(number: int, called: list[threading.Event] = called) -> None:
            called[number].set()
            for each in called:
                assert each.wait(HANG_S)

        def put(number: int, queues: list[CallQueue] = queues, together: threading.Barrier = together) -> None:
            together.wait(HANG_S)
            queues[number].put(call, number)

        putters = [threading.Thread(target=put, args=(number,)) for number in range(len(queues))]
        for putter in putters:
            putter.start()
        for putter in putters:
            putter.join()
        for queue in queues:
            queue.join(HANG_S)
        assert all(each.is_set() for each in called)
    assert running() == 0


def test_a_thread_that_one_call_starts_takes_another_first(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = SharedThreads("tests-shared", 0.001)
    queues = [CallQueue(threads) for _ in range(3)]
    ends = [blocked(queues[0])]
    start = threading.Thread.start

    def started(self: threading.Thread) -> None:
        start(self)
        if len(ends) == 1:
            time.sleep(0.05)  # until it stands by
            ends.append(blocked(queues[1]))

    monkeypatch.setattr(threading.Thread, "start", started)
    ends.append(blocked(queues[2]))
    assert len(ends) == 3
    for end in ends:
        end()
    for queue in queues:
        queue.join(HANG_S)
    assert running() == 0


def starts_of(threads_name: str, before: Callable[[int], None]) -> Callable[[threading.Thread], None]:
    """A `threading.Thread.start` that calls `before` with the number of the start."""
    start, numbers = threading.Thread.start, itertools.count()

    def started(self: threading.Thread) -> None:
        if self.name == threads_name:
            before(next(numbers))
        start(self)

    return started


def out_of_memory_once(number: int) -> None:
    if number == 0:
        raise MemoryError


def test_what_must_be_told_waits_for_no_other_call_though_memory_lacked_once(
    monkeypatch: pytest.MonkeyPatch, threads: SharedThreads
) -> None:
    slow, queue, told = CallQueue(threads), CallQueue(threads), []
    end = blocked(slow)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", starts_of("tests-shared", out_of_memory_once))
        queue.put_surely(told.append, 1)
        until(lambda: told, "the call")
    end()
    slow.join(HANG_S)
    queue.join(HANG_S)
    assert told == [1]


def test_a_call_that_was_put_with_the_first_one_waits_no_longer_though_memory_lacked_once(
    monkeypatch: pytest.MonkeyPatch, threads: SharedThreads
) -> None:
    slow, queue, told = CallQueue(threads), CallQueue(threads), []
    go_on = threading.Event()
    queue.put(told.append, 1)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # the thread waits when it gives the GIL up, and gets it back after both are put
    try:
        until(lambda: told, "the call")
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", starts_of("tests-shared", out_of_memory_once))
            slow.put(lambda: go_on.wait(HANG_S))
            queue.put(told.append, 2)
            until(lambda: len(told) == 2, "the call")
    finally:
        sys.setswitchinterval(interval)
        go_on.set()
    slow.join(HANG_S)
    queue.join(HANG_S)


def test_a_call_that_comes_while_a_second_thread_cannot_begin_has_one_of_its_own(
    monkeypatch: pytest.MonkeyPatch, threads: SharedThreads
) -> None:
    slow, queue, handlers, told = CallQueue(threads), CallQueue(threads), CallQueue(threads), []
    end = blocked(slow)

    def put_by_handler(number: int) -> None:
        if number == 0:
            handlers.put(told.append, "handler's")
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", starts_of("tests-shared", put_by_handler))
        with pytest.raises(MemoryError):
            queue.put(told.append, "not put")
        until(lambda: told, "the call")
    end()
    for each in (slow, queue, handlers):
        each.join(HANG_S)
    assert told == ["handler's"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_a_handler_that_forks_while_a_thread_begins_leaves_the_child_its_call(
    monkeypatch: pytest.MonkeyPatch, threads: SharedThreads, second: bool, fails: bool
) -> None:
    slow, queue = CallQueue(threads), CallQueue(threads)
    end = blocked(slow) if second else None
    told: list[int] = []
    pids: list[int] = []

    def fork(number: int) -> None:
        if number == 0:
            pids.append(os.fork())
            if not pids[0]:
                threads.forget()
            if fails:
                raise MemoryError

    try:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", starts_of("tests-shared", fork))
            queue.put_surely(told.append, 1)
        queue.join(HANG_S)
        if not pids[0]:
            until(lambda: running() == 0, "the end of the threads")
            os._exit(0 if told == [1] else 1)
    finally:
        if not pids[0]:
            os._exit(2)
    assert os.waitpid(pids[0], 0)[1] == 0
    assert told == [1]
    if end is not None:
        end()
        slow.join(HANG_S)


def test_a_join_ends_when_another_queue_begins_to_need_the_thread(
    monkeypatch: pytest.MonkeyPatch, threads: SharedThreads
) -> None:
    queue, other, told = CallQueue(threads), CallQueue(threads), []
    queue.put(told.append, 1)
    until(lambda: told, "the call")
    joiner = threading.Thread(target=queue.join, args=(None,), daemon=True)
    moments = ["when it looks whether a thread has ended, or waits for that"]

    def first(name: str) -> Callable[..., object]:
        method = getattr(threading.Thread, name)

        def called(self: threading.Thread, *arguments: object) -> object:
            if self.name == "tests-shared" and threading.current_thread() is joiner and moments:
                moments.clear()
                other.put(told.append, 2)
            return method(self, *arguments)

        return called

    with monkeypatch.context() as patch:
        for name in ("join", "is_alive"):
            patch.setattr(threading.Thread, name, first(name))
        joiner.start()
        until(lambda: not joiner.is_alive(), "the end of the join")
    other.join(HANG_S)
    assert told == [1, 2]


def test_a_thread_that_began_while_another_start_looked_is_waited_for_too(
    monkeypatch: pytest.MonkeyPatch, threads: SharedThreads
) -> None:
    slow, queue, other = CallQueue(threads), CallQueue(threads), CallQueue(threads)
    ends = [blocked(slow)]
    putter = threading.current_thread()
    held: list[threading.Thread] = []
    joined, is_alive, join, run = (
        threading.Event(),
        threading.Thread.is_alive,
        threading.Thread.join,
        threading.Thread.run,
    )

    def look(self: threading.Thread) -> bool:
        if self.name == "tests-shared" and threading.current_thread() is putter and len(ends) == 1:
            ends.append(lambda: None)
            ends.append(blocked(other))  # by a thread that becomes the active one, so that another second one begins
        return is_alive(self)

    def run_and_stay(self: threading.Thread) -> None:
        stays = self.name == "tests-shared" and not held
        if stays:
            held.append(self)
        run(self)
        if stays:
            assert joined.wait(HANG_S)

    def join_noted(self: threading.Thread, timeout: float | None = None) -> None:
        if self in held:
            joined.set()
        join(self, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "run", run_and_stay)
        patch.setattr(threading.Thread, "is_alive", look)
        queue.put(int)
        for end in ends:
            end()
        patch.setattr(threading.Thread, "join", join_noted)
        for each in (slow, other, queue):
            each.join(HANG_S)
    was_joined = joined.is_set()
    joined.set()
    assert len(ends) == 3
    assert was_joined
