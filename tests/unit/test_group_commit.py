"""Group commit: each caller has its answer, what waits goes into one transaction, whatever fails."""

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from kbatch import DurableSender, OutboxError, SenderClosedError
from kbatch._fastmap import Flag
from kbatch._outbox import _group
from kbatch._outbox._group import GroupCommit, Waiting
from tests.injection import Injector
from tests.waiting import until


class Outbox:
    """Its writers keep what is committed. `fault` is called at their steps, with the step's name."""

    def __init__(self) -> None:
        self.groups: list[list[Any]] = []
        self.opened = self.closed = 0
        self.busy = threading.Event()  # while another connection writes
        self.hold = threading.Event()  # while this is not set, a commit goes on
        self.hold.set()
        self.fault: Callable[[str], object] = lambda step: None

    def __repr__(self) -> str:
        return "<an outbox>"

    def open_writer(self) -> "Writer":
        self.fault("open")
        self.opened += 1
        return Writer(self)


class Writer:
    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox

    def commit(self, take: Callable[[], Sequence[Any]]) -> bool:
        outbox = self.outbox
        outbox.fault("begin")
        if outbox.busy.is_set():
            threading.Event().wait(0.005)
            return False
        group = list(take())
        outbox.fault("insert")
        outbox.hold.wait()
        outbox.fault("commit")
        outbox.groups.append(group)
        outbox.fault("committed")
        return True

    def close(self) -> None:
        self.outbox.closed += 1
        self.outbox.fault("close")


def put(group: GroupCommit, what: Any, *, patient: bool = False) -> tuple[Waiting, Flag]:
    done = Flag()
    waiting = Waiting(what, done.set, patient=patient)
    group.put(waiting)
    return waiting, done


def added(group: GroupCommit, *numbers: Any) -> list[Any]:
    """The errors of each, or None."""
    waiting = [put(group, number) for number in numbers]
    for each, done in waiting:
        assert done.wait(30)
        assert each.is_over
    return [each.error for each, _ in waiting]


def answered(group: GroupCommit, waiting: Waiting) -> None:
    until(lambda: waiting.is_over or group.has_lost(waiting), "an answer")


def ended(group: GroupCommit) -> None:
    group.end()
    until(lambda: not group.has_thread(), "the end of its thread")


def test_what_comes_while_a_group_is_committed_is_the_next_one() -> None:
    outbox = Outbox()
    group = GroupCommit(outbox)
    outbox.hold.clear()
    first = put(group, 0)
    until(lambda: first[0].is_taken, "the first group")
    rest = [put(group, number) for number in range(1, 50)]
    outbox.hold.set()
    assert all(done.wait(30) for _, done in [first, *rest])
    assert outbox.groups == [[0], list(range(1, 50))]
    ended(group)
    assert (outbox.opened, outbox.closed) == (1, 1)


def test_its_thread_begins_with_the_first_one_and_one_that_was_never_used_has_none() -> None:
    outbox = Outbox()
    group = GroupCommit(outbox)
    group.end()
    assert not group.has_thread()
    assert outbox.opened == 0
    with pytest.raises(SenderClosedError):
        put(group, 0)


@pytest.mark.parametrize("step", ["begin", "insert", "commit", "committed"])
def test_an_error_goes_to_all_callers_of_the_group_and_to_nobody_else(step: str) -> None:
    outbox = Outbox()
    group = GroupCommit(outbox)
    outbox.busy.set()
    waiting = [put(group, number, patient=True) for number in range(5)]
    reason = ValueError("the database's own")
    error = OutboxError("no", possibly_persisted=step == "commit")
    error.__cause__ = reason

    def fault(at: str) -> None:
        if at == step:
            raise error

    outbox.fault = fault
    outbox.busy.clear()
    assert all(done.wait(30) for _, done in waiting)
    outbox.fault = lambda step: None
    told = [each.error for each, _ in waiting]
    assert all(type(each) is OutboxError and str(each) == "no" for each in told)
    assert len({id(each) for each in told}) == 5  # each has a traceback of its own
    assert all(each is not None and each.__cause__ is reason for each in told)
    assert {each.possibly_persisted for each in told if isinstance(each, OutboxError)} == {step == "commit"}
    assert added(group, 7) == [None]
    assert outbox.opened == 2  # a connection that failed is not used again
    ended(group)


def test_an_outbox_that_cannot_be_opened_is_told_and_tried_again_for_the_next_caller() -> None:
    outbox = Outbox()
    group = GroupCommit(outbox)

    def fault(step: str) -> None:
        raise OutboxError("there is no database")

    outbox.fault = fault
    assert [str(error) for error in added(group, 1)] == ["there is no database"]
    outbox.fault = lambda step: None
    assert added(group, 2) == [None]
    assert outbox.groups == [[2]]
    ended(group)


def test_what_nobody_expects_is_told_as_possibly_persisted_once_it_was_taken() -> None:
    outbox = Outbox()
    group = GroupCommit(outbox)
    for step, possibly in (("open", False), ("commit", True)):

        def fault(at: str, step: str = step) -> None:
            if at == step:
                raise MemoryError("none left")

        outbox.fault = fault
        (error,) = added(group, 1)
        assert isinstance(error, OutboxError)
        assert "MemoryError: none left" in str(error)
        assert error.possibly_persisted is possibly
    ended(group)


def test_what_was_withdrawn_is_never_added() -> None:
    outbox = Outbox()
    group = GroupCommit(outbox)
    outbox.busy.set()
    waiting = [put(group, number, patient=True) for number in range(6)]
    assert [each.withdraw() for each, _ in waiting[::2]] == [True] * 3
    assert not waiting[0][0].withdraw()
    outbox.busy.clear()
    assert all(done.wait(30) for _, done in waiting[1::2])
    assert outbox.groups == [[1, 3, 5]]
    assert not waiting[1][0].withdraw()
    assert not any(each.is_over for each, _ in waiting[::2])
    ended(group)


def test_while_another_writes_the_patient_wait_and_others_are_refused_after_their_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_group, "_PATIENCE_S", 0.2)
    outbox = Outbox()
    group = GroupCommit(outbox)
    outbox.busy.set()
    patient, impatient = put(group, 1, patient=True), put(group, 2)
    assert impatient[1].wait(30)
    assert "another connection has written for 0.2 s; nothing was added" in str(impatient[0].error)
    assert not patient[0].is_over
    outbox.busy.clear()
    assert patient[1].wait(30)
    assert (patient[0].error, outbox.groups) == (None, [[1]])
    ended(group)


def test_what_was_refused_or_withdrawn_does_not_stay_behind_one_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_group, "_PATIENCE_S", 0.05)
    outbox = Outbox()
    group = GroupCommit(outbox)
    outbox.busy.set()
    first = put(group, 0, patient=True)
    rest = [put(group, number, patient=number % 2 == 0) for number in range(1, 20)]
    last = put(group, 20, patient=True)
    assert all(each.withdraw() for each, _ in rest[1::2])
    assert all(done.wait(30) for _, done in rest[::2])
    until(lambda: len(group._queue) == 2, "only those who wait")
    outbox.busy.clear()
    assert first[1].wait(30)
    assert last[1].wait(30)
    assert [number for each in outbox.groups for number in each] == [0, 20]
    ended(group)


def test_what_waits_when_the_thread_ends_with_the_last_sender_is_told_that_it_is_closed() -> None:
    group = GroupCommit(Outbox())
    batch: Any = b"x"
    waiting = Waiting(batch, lambda: None, patient=True)
    group._queue.append(waiting)  # when its thread had ended, and was about to refuse what is left
    sender = DurableSender.__new__(DurableSender)
    shared: Any = SimpleNamespace(group=group, outbox=group._outbox)
    sender._shared = shared
    group.end()
    with pytest.raises(SenderClosedError):
        sender._answer(waiting, None)
    assert waiting.is_withdrawn


def test_its_end_commits_what_waits_and_takes_nothing_more() -> None:
    outbox = Outbox()
    group = GroupCommit(outbox)
    outbox.busy.set()
    waiting = [put(group, number, patient=True) for number in range(3)]
    group.end()
    with pytest.raises(SenderClosedError):
        put(group, 7)
    outbox.busy.clear()
    assert all(done.wait(30) for _, done in waiting)
    until(lambda: not group.has_thread(), "the end of its thread")
    assert [number for each in outbox.groups for number in each] == [0, 1, 2]
    assert outbox.closed == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("step", ["open", "begin", "insert", "commit", "committed"])
def test_a_thread_that_dies_tells_those_who_wait_and_another_takes_its_place(step: str) -> None:
    outbox = Outbox()
    group = GroupCommit(outbox)

    def fault(at: str) -> None:
        if at == step:
            outbox.fault = lambda step: None
            raise SystemExit

    outbox.fault = fault
    (error,) = added(group, 1)
    assert isinstance(error, OutboxError)
    assert error.possibly_persisted is (step in ("insert", "commit", "committed"))
    assert added(group, 2) == [None]
    assert outbox.groups[-1] == [2]
    ended(group)
    assert outbox.closed >= outbox.opened  # what it had begun holds nobody up


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_tells_also_those_of_the_next_group() -> None:
    outbox = Outbox()
    group = GroupCommit(outbox)
    outbox.hold.clear()
    first = put(group, 1)
    until(lambda: first[0].is_taken, "the first group")
    rest = [put(group, number) for number in (2, 3)]

    def fault(at: str) -> None:
        if at == "commit":
            raise SystemExit

    outbox.fault = fault
    outbox.hold.set()
    for waiting, done in rest:
        assert done.wait(30)
        assert "has ended; nothing was added" in str(waiting.error)
    outbox.fault = lambda step: None
    assert added(group, 4) == [None]
    assert outbox.groups == [[4]]
    ended(group)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_takes_nothing_of_the_next_ones_queue() -> None:
    outbox = Outbox()
    group = GroupCommit(outbox)
    later: list[tuple[Waiting, Flag]] = []

    def come() -> None:
        later.append(put(group, 2))
        until(lambda: later[0][0].is_taken, "the next thread")
        later.append(put(group, 3))

    comer = threading.Thread(target=come)

    def wake() -> None:  # in the thread that dies, while it refuses what is left
        comer.start()
        comer.join(0.3)

    def fault(at: str) -> None:
        if at == "begin":
            raise SystemExit
        if at == "close":
            outbox.fault = lambda step: None
            batch: Any = 1
            group.put(Waiting(batch, wake, patient=True))

    outbox.fault = fault
    _, first_done = put(group, 0)
    assert first_done.wait(30)
    until(lambda: comer.ident is not None, "its end")
    comer.join(30)
    for waiting, done in later:
        assert done.wait(5)
        assert waiting.error is None
    assert sorted(number for each in outbox.groups for number in each) == [2, 3]
    ended(group)


def test_a_wake_up_that_fails_keeps_no_answer_from_the_others() -> None:
    outbox = Outbox()
    group = GroupCommit(outbox)
    outbox.busy.set()

    def fail() -> None:
        raise RuntimeError("its loop is gone")

    batch: Any = 1
    bad = Waiting(batch, fail, patient=True)
    group.put(bad)
    good = put(group, 2, patient=True)
    outbox.busy.clear()
    assert good[1].wait(30)
    assert (bad.is_over, good[0].error) == (True, None)
    ended(group)


def test_a_connection_that_does_not_close_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    outbox = Outbox()
    group = GroupCommit(outbox)

    def fault(step: str) -> None:
        if step == "close":
            raise OutboxError("cut")

    outbox.fault = fault
    assert added(group, 1) == [None]
    ended(group)
    assert "did not close: OutboxError: cut" in caplog.text


def test_an_exception_at_any_line_of_put_leaves_a_group_that_works() -> None:
    places = 0
    for nth in range(1, 200):
        outbox = Outbox()
        group = GroupCommit(outbox)
        injector = Injector(nth)
        injector.run(lambda group=group: put(group, 1))
        assert added(group, 2) == [None], injector.place
        assert [number for each in outbox.groups for number in each][-1] == 2
        ended(group)
        if injector.place is None:
            break
        places += 1
    assert places > 8


def test_an_exception_at_any_line_of_its_thread_leaves_no_caller_without_an_answer() -> None:
    places = 0
    hook = threading.excepthook
    threading.excepthook = lambda arguments: None
    try:
        for nth in range(1, 300):
            outbox = Outbox()
            group = GroupCommit(outbox)
            injector = Injector(nth)
            threading.settrace(injector._enter)  # of the writer's thread, which begins now
            try:
                waiting = [put(group, number) for number in range(3)]
            finally:
                threading.settrace(None)  # type: ignore[arg-type]
            for number, (each, _) in enumerate(waiting):
                answered(group, each)
                may_be_stored = each.error is None if each.is_over else not each.withdraw()
                may_be_stored = may_be_stored or getattr(each.error, "possibly_persisted", False)
                is_stored = any(number in found for found in outbox.groups)
                assert may_be_stored or not is_stored, injector.place
                assert is_stored or not each.is_over or each.error is not None, injector.place
            for _ in range(2):  # it may die only with the first of these
                late, _ = put(group, 9)
                answered(group, late)
            if injector.place is None:
                ended(group)
                break
            # On a slow machine what came before was one group: it dies only now, and refuses who comes meanwhile.
            until(lambda group=group: added(group, 10) == [None], f"what comes after {injector.place}")  # type: ignore[misc]
            ended(group)
            places += 1
    finally:
        threading.excepthook = hook
    assert places > 15


def test_many_threads_at_once_lose_nothing_and_share_transactions() -> None:
    outbox = Outbox()
    group = GroupCommit(outbox)
    outbox.fault = lambda step: threading.Event().wait(0.001) if step == "commit" else None

    def work(first: int) -> None:
        for number in range(first, first + 50):
            assert added(group, number) == [None]

    threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = [number for each in outbox.groups for number in each]
    assert sorted(numbers) == sorted(1000 * n + m for n in range(20) for m in range(50))
    assert len(outbox.groups) < 500
    for n in range(20):  # of one thread in its order
        mine = [number for number in numbers if number // 1000 == n]
        assert mine == sorted(mine)
    ended(group)
