"""The gate before a producer, without threads and brokers, and with a clock that the tests turn."""

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

import kbatch
from kbatch import CircuitState, Envelope
from kbatch._batch_sender import answer_refusal
from kbatch._recovery._gate import Gate, verdict_of_answer
from kbatch._recovery._handle import ProducerHandle
from kbatch._recovery._user_calls import UserCalls
from kbatch.testing import MemoryProducer

CLOSED, OPEN, HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN


class CallsAtOnce(UserCalls):
    """What is put is called by whoever puts it."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int, str]] = []

    def put(self, function: Callable[..., object], *arguments: object) -> None:
        function(*arguments)

    def log(self, level: int, text: str, *arguments: object, exc_info: BaseException | None = None) -> None:
        self.logged.append((level, text % arguments))


class Probes:
    """What is put is called when the test says so."""

    def __init__(self) -> None:
        self.put_ones: list[Callable[[], None]] = []

    def put(self, function: Callable[[], None], /) -> None:
        self.put_ones.append(function)

    def run(self) -> None:
        self.put_ones.pop(0)()


class Scene:
    """A gate with two failures to its opening, and all that it touches."""

    def __init__(self, topic: str | None = "orders") -> None:
        self.now = 1000.0
        self.producer: Any = MemoryProducer()
        self.handle = ProducerHandle.of(self.producer)
        self.use = self.handle.acquire()
        self.calls = CallsAtOnce()
        self.probes = Probes()
        self.changes: list[tuple[CircuitState, CircuitState]] = []
        self.gate = Gate(
            self.handle,
            topic,
            self.calls,
            self.probes,
            failures_to_open=2,
            probe_interval_s=1.0,
            max_probe_interval_s=4.0,
            on_state_change=lambda *change: self.changes.append(change),
            clock=lambda: self.now,
        )

    @property
    def state(self) -> CircuitState:
        return self.gate.circuit.state

    def fail(self, *envelopes: Envelope[Any]) -> None:
        self.gate.note("failed", self.gate.admit(), self.now, envelopes)

    def open(self) -> None:
        self.fail()
        self.fail()
        assert self.state is OPEN

    def probe(self) -> None:
        at = self.gate.probe_at()
        assert at is not None
        self.now = max(self.now, at)
        self.gate.probe_if_due(self.now)
        self.probes.run()


def test_failures_in_a_row_close_it_and_a_probe_and_a_trial_open_it_again() -> None:
    scene = Scene()
    gate = scene.gate
    scene.fail()
    assert gate.may_send()
    scene.fail()
    assert not gate.may_send()
    with pytest.raises(kbatch.CircuitOpenError):
        gate.admit()
    scene.producer.down()
    scene.probe()
    assert scene.state is OPEN
    scene.producer.up()
    scene.probe()
    assert scene.state is HALF_OPEN
    assert gate.tries_again
    trial = gate.admit()
    assert trial is not None
    with pytest.raises(kbatch.CircuitOpenError):
        gate.admit()  # there is one trial at a time
    gate.note("succeeded", trial, scene.now)
    assert gate.may_send()
    assert gate.admit() is None
    assert scene.changes == [(CLOSED, OPEN), (OPEN, HALF_OPEN), (HALF_OPEN, CLOSED)]
    assert [level for level, _ in scene.calls.logged] == [
        logging.WARNING,
        logging.DEBUG,
        logging.INFO,
        logging.WARNING,
    ]


def test_a_probe_is_not_put_before_its_time_nor_twice() -> None:
    scene = Scene()
    scene.gate.probe_if_due(scene.now)
    scene.open()
    at = scene.gate.probe_at()
    assert at is not None
    scene.gate.probe_if_due(at - 0.001)
    assert scene.probes.put_ones == []
    for _ in range(2):
        scene.gate.probe_if_due(at)
    assert len(scene.probes.put_ones) == 1
    assert scene.gate.probe_at() is None


def test_what_wants_to_probe_and_cannot_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    scene.open()

    def refuse(_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(scene.probes, "put", refuse)
        with pytest.raises(MemoryError):
            scene.gate.probe_if_due(scene.now + 10)
    scene.probe()
    assert scene.state is HALF_OPEN


def test_a_probe_that_cannot_be_put_is_noted_with_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    scene.open()
    free: list[bool] = []

    def refuse(_: object) -> None:
        raise MemoryError

    def probed(succeeded: bool, now: float) -> None:
        thread = threading.Thread(target=lambda: free.append(scene.gate.lock.acquire(blocking=False)))
        thread.start()
        thread.join()

    monkeypatch.setattr(scene.probes, "put", refuse)
    monkeypatch.setattr(scene.gate.circuit, "probed", probed)
    with pytest.raises(MemoryError):
        scene.gate.probe_if_due(scene.now + 10)
    assert free == [False]


@pytest.mark.parametrize(("topics", "asked"), [((None, "orders"), "orders"), ((None, "other"), ""), (("x", "y"), "")])
def test_the_probe_asks_for_the_topic_that_failed(
    monkeypatch: pytest.MonkeyPatch, topics: tuple[str | None, ...], asked: str
) -> None:
    scene = Scene()
    seen: list[str] = []
    monkeypatch.setattr(type(scene.producer._core), "probe", lambda self, topic, timeout: seen.append(topic))
    for _ in range(2):
        scene.fail(*(Envelope(1, topic=topic) for topic in topics))
    scene.probe()
    assert seen == [asked]


def test_a_probe_whose_failure_cannot_be_logged_is_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    scene.producer.down()
    scene.open()

    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(scene.calls, "log", refuse)
        with pytest.raises(MemoryError):
            scene.probe()
    scene.producer.up()
    scene.probe()
    assert scene.state is HALF_OPEN


def test_a_reminder_is_logged_once_a_minute() -> None:
    scene = Scene()
    scene.gate.buffer = range(7)
    scene.producer.down()
    scene.open()
    scene.calls.logged.clear()
    for later in (1, 30, 61, 62, 122):
        scene.now = 1000.0 + later
        scene.probe()
    assert [level for level, _ in scene.calls.logged] == [
        logging.DEBUG,
        logging.DEBUG,
        logging.WARNING,
        logging.DEBUG,
        logging.WARNING,
    ]
    assert "has been open for 122 s, 7 envelopes are buffered; a probe failed" in scene.calls.logged[-1][1]


def test_a_producer_in_its_fatal_state_is_replaced_once() -> None:
    scene = Scene()
    gate, dead = scene.gate, scene.producer
    gate.note_refusal(dead, kbatch.ProducerFatalError("made up", code=45), gate.admit())
    assert gate.broken is dead
    assert not gate.may_send()
    assert gate.must_replace()
    with pytest.raises(kbatch.CircuitOpenError, match="is to be replaced"):
        gate.admit()
    gate.replace()
    successor = scene.handle.producer
    assert successor is not dead
    assert gate.may_send()
    gate.note_refusal(dead, kbatch.ProducerClosedError("closed"), gate.admit())  # a batch that came too late
    assert gate.may_send()
    assert not gate.must_replace()
    gate.replace()
    assert scene.handle.producer is successor
    scene.use.release(0)


@pytest.mark.parametrize(
    "error", [kbatch.ProducerClosedError("closed"), kbatch.ProducerFencedError("fenced", code=-144)]
)
def test_a_producer_that_nothing_can_take_the_place_of_is_the_end(error: kbatch.ProducerError) -> None:
    scene = Scene()
    scene.gate.note_refusal(scene.producer, error, scene.gate.admit())
    assert not scene.gate.is_alive()
    assert not scene.gate.must_replace()
    with pytest.raises(kbatch.SenderClosedError, match="the sender has ended"):
        scene.gate.admit()
    assert scene.calls.logged == [(logging.ERROR, f"a sender to 'orders' has ended: {error}")]


def test_a_replacement_that_fails_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    gate = scene.gate
    gate.note_refusal(scene.producer, kbatch.ProducerFatalError("made up", code=45), gate.admit())

    def fail(self: object) -> None:
        raise OSError("no files")

    monkeypatch.setattr(type(scene.producer), "_twin", fail)
    gate.replace()
    assert not gate.is_alive()
    assert "could not be replaced" in str(gate.refusal())


def test_one_that_is_closed_lets_nothing_through_and_probes_nothing() -> None:
    scene = Scene()
    scene.open()
    scene.gate.close()
    assert scene.gate.probe_at() is None
    with pytest.raises(kbatch.SenderClosedError, match="the sender is closed"):
        scene.gate.admit()
    scene.gate.note_refusal(scene.producer, kbatch.ProducerClosedError("closed"), None)
    assert scene.gate.death is None


def test_a_state_change_callback_that_raises_changes_nothing() -> None:
    scene = Scene()

    def fail(*_: object) -> None:
        raise SystemExit

    scene.gate._on_state_change = fail
    scene.open()
    assert scene.calls.logged[-1][1].startswith("on_state_change failed: ")
    scene.probe()
    assert scene.state is HALF_OPEN


def test_what_an_answer_says_about_the_brokers() -> None:
    with MemoryProducer() as producer:
        assert verdict_of_answer(producer.send_batch("orders", [Envelope(1)])) == "succeeded"
        for code, verdict in (("NOT_ENOUGH_REPLICAS", "failed"), ("MSG_SIZE_TOO_LARGE", "nothing")):
            producer.fail(code)
            report = producer.send_batch("orders", [Envelope(1)])
            assert verdict_of_answer(report) == verdict
    for by_nobody in (kbatch.ProducerClosedError("closed"), kbatch.ProducerError("no memory"), kbatch.ForkError()):
        with MemoryProducer() as producer:
            told = answer_refusal(producer, kbatch.OutgoingBatch([Envelope(1)]), by_nobody, False)[1]
        assert verdict_of_answer(told) == "nothing"
    assert verdict_of_answer(kbatch.ProducerFatalError("made up", code=45)) == "failed"
    assert verdict_of_answer(kbatch.BatchInterruptedError("Ctrl-C")) == "nothing"


@pytest.mark.parametrize("by", ["note", "probe"])
def test_users_are_told_of_a_change_of_state_without_the_lock(by: str) -> None:
    scene = Scene()
    free: list[bool] = []

    def look() -> None:
        free.append(scene.gate.lock.acquire(blocking=False))
        if free[-1]:
            scene.gate.lock.release()

    def changed(*_: object) -> None:
        looks = threading.Thread(target=look)
        looks.start()
        looks.join()

    if by == "probe":
        scene.open()
    scene.gate._on_state_change = changed
    if by == "note":
        scene.open()
    else:
        scene.probe()
    assert free == [True]


def test_changes_of_state_are_told_in_their_order_though_a_later_one_is_put_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene()
    put_ones: list[Callable[..., object]] = []
    monkeypatch.setattr(scene.calls, "put", lambda function, *_: put_ones.append(function))
    scene.open()
    scene.probe()
    for function in reversed(put_ones):
        function()
    assert scene.changes == [(CLOSED, OPEN), (OPEN, HALF_OPEN)]


def test_a_change_of_state_that_could_not_be_put_is_told_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()

    def refuse(*_: object) -> None:
        raise MemoryError

    scene.fail()
    with monkeypatch.context() as patch:
        patch.setattr(scene.calls, "put", refuse)
        with pytest.raises(MemoryError):
            scene.fail()
    scene.probe()
    assert scene.changes == [(CLOSED, OPEN), (OPEN, HALF_OPEN)]
