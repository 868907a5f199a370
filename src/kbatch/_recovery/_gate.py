"""Whether a producer may be sent by now: the circuit breaker, the probe behind it, and the producer's replacement.

Knows no queue. A sender asks the gate before each batch, and tells it the answer.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import TYPE_CHECKING, Literal

from kbatch._callbacks import callback_name
from kbatch._errors import (
    BatchInterruptedError,
    CircuitOpenError,
    KbatchError,
    NotYetDueError,
    ProducerClosedError,
    ProducerError,
    ProducerFencedError,
    SenderClosedError,
    SerializationError,
    can_be_replaced,
    named_exception_text,
    spare_brokers,
)
from kbatch._fastmap import Flag, monotonic
from kbatch._recovery._circuit import CircuitBreaker, CircuitState
from kbatch._recovery._retry import entropy
from kbatch._text import buffered, counted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence, Sized
    from typing import Protocol

    from kbatch._base_producer import BaseProducer
    from kbatch._fastmap import Answer, Envelope, Trial
    from kbatch._recovery._handle import ProducerHandle
    from kbatch._recovery._user_calls import UserCalls
    from kbatch._report import DeliveryReport

    class Prober(Protocol):
        """Calls what it is given soon, on a thread where it may block."""

        def put(self, function: Callable[[], None], /) -> None: ...


__all__ = ["Gate", "Verdict", "verdict_of_answer"]

Verdict = Literal["succeeded", "failed", "nothing"]

_REMIND_EVERY_S = 60.0
_PROBE_TIMEOUT_S = 2.0


class Gate:
    """Lets batches through to the producer of a handle as long as brokers take them.

    Any thread may call it. Its answers may be old when they come: only `admit` has the last word.

    Args:
        handle: Acquired for the owner of the gate, who releases it.
        topic: Where batches go by default; ``None`` if to several.
        name: What the log calls the sender; by default its topic.
        calls: For `on_state_change`, and for the log.
        prober: For probes, which block.
        clock: A test's own; callers tell the time as `now` where they have it.

    Attributes:
        flag: Set when there may be something to do: the next batch, a probe, a replacement.
        lock: Guards the circuit and the end. Re-entrant: a signal handler may come here from within.
        death: Why nothing can be sent any more.
        closed: Whether nothing is to be sent any more.
        broken: A producer that can send no more, and is to be replaced once what it has sent is settled.
        last_error: Why an envelope failed the last time that one did.
        tries_again: The next trial is the first since a probe succeeded.
        buffer: What is buffered while the circuit is open, for the log.
    """

    def __init__(
        self,
        handle: ProducerHandle,
        topic: str | None,
        calls: UserCalls,
        prober: Prober,
        *,
        failures_to_open: int,
        probe_interval_s: float,
        max_probe_interval_s: float,
        on_state_change: Callable[[CircuitState, CircuitState], object] | None = None,
        clock: Callable[[], float] = monotonic,
        name: str | None = None,
    ) -> None:
        self.handle = handle
        self.lock = threading.RLock()
        self.circuit = CircuitBreaker(
            failures_to_open=failures_to_open,
            probe_interval_s=probe_interval_s,
            max_probe_interval_s=max_probe_interval_s,
            random=entropy,
        )
        self.flag = Flag()
        self.death: KbatchError | None = None
        self.closed = False
        self.broken: BaseProducer | None = None
        self.last_error: KbatchError | None = None
        self.tries_again = False
        self.buffer: Sized = ()
        self._topic = self._failed_topic = topic
        self._name = topic if name is None else name
        self._calls = calls
        self._prober = prober
        self._on_state_change = on_state_change
        self._clock = clock
        self._opened_at = self._reminded_at = 0.0
        self._has_successor = False
        # Of the circuit, to be told: from which state to which, and what is logged.
        self._changes: deque[tuple[CircuitState, CircuitState, int, str, tuple[object, ...]]] = deque()

    @property
    def flag(self) -> Flag:
        return self._flag

    @flag.setter
    def flag(self, flag: Flag) -> None:
        self._flag = self.circuit.trials.flag = flag

    # -- batches

    def may_send(self) -> bool:
        """Whether a batch would be let through."""
        return self.is_alive() and self.broken is None and self.circuit.may_send()

    def is_alive(self) -> bool:
        """Whether batches will be let through now or later."""
        return self.death is None and not self.closed

    def admit(self) -> Trial | None:
        """Lets a batch through. The circuit's trial, if it is that: to be kept, and given with the answer.

        Raises:
            SenderClosedError: Nothing will be sent any more.
            CircuitOpenError: The circuit is open, or another batch is the trial, or the producer is to be replaced.
        """
        with self.lock:
            if not self.is_alive():
                raise self.refusal()
            if self.broken is not None:
                raise CircuitOpenError("the producer can send no more, and is to be replaced: nothing was sent")
            if not self.circuit.may_send():
                raise CircuitOpenError("the circuit breaker is open: nothing was sent")
            return self.circuit.sent()

    def note(
        self, verdict: Verdict, trial: Trial | None, now: float, envelopes: Sequence[Envelope[object]] = ()
    ) -> None:
        """Learns what the answer of a batch says about the brokers; of `envelopes`, where to ask if it failed."""
        if verdict == "failed" and envelopes:  # before the lock: it may be long
            own = all(envelope.topic in (None, self._topic) for envelope in envelopes)
            self._failed_topic = self._topic if own else None
        with self.lock:
            before = self.circuit.state
            if verdict == "succeeded":
                self.circuit.succeeded(trial, now)
            elif verdict == "failed":
                self.circuit.failed(trial, now)
            else:
                self.circuit.said_nothing(trial)
            self._note_change(before)
        self._tell_changes_soon()
        if trial:
            self.flag.set()  # the next trial may be another's, who waits

    def note_answer(self, producer: BaseProducer, answer: Answer) -> None:
        """Learns from what the callback of a batch was told, which is not sent again."""
        verdict = verdict_of_answer(answer.argument)
        # A batch that could not be mapped may not even give its envelopes.
        envelopes = answer.batch.envelopes if verdict == "failed" else ()
        self.note(verdict, answer.trial, self._clock(), envelopes)
        if can_be_replaced(answer.argument):
            self.give_up(producer)

    def note_refusal(self, producer: BaseProducer, error: ProducerError, trial: Trial | None) -> None:
        """Learns why a producer took nothing of a batch."""
        fate = self.handle.fate(producer, error)
        if fate == "replace" or (fate == "end" and not isinstance(error, (ProducerClosedError, ProducerFencedError))):
            self._calls.log(logging.WARNING, "a producer can send no more: %s", error)
            self.give_up(producer)
            self.note("failed", trial, self._clock())
            return
        self.note("nothing", trial, self._clock())
        if fate == "end" and not self.closed:
            self.end(error)

    # -- the producer

    def must_replace(self) -> bool:
        """Whether `replace` is to be called, once nothing is in flight."""
        return self.broken is not None and self.is_alive()

    def replace(self, *, transactional_id: str | None = None) -> None:
        """Has the producer replaced that can send no more; with another ``transactional.id``, if one is given."""
        broken, self.broken = self.broken, None
        if broken is None:
            return
        try:
            self.handle.replace(broken, transactional_id=transactional_id)
        except Exception as error:
            self._calls.log(logging.ERROR, "a producer in its fatal state could not be replaced", exc_info=error)
            self.end(ProducerError(f"a producer could not be replaced: {named_exception_text(error)}"))

    def give_up(self, producer: BaseProducer) -> None:
        """Learns that a producer can send no more, and is to be replaced."""
        if self.handle.producer is producer:
            self.broken = producer
            self.flag.set()

    # -- the end

    def close(self) -> None:
        """Nothing is let through any more."""
        with self.lock:
            self.closed = True
        self.flag.set()

    def end(self, error: KbatchError) -> None:
        """Nothing can be sent any more, for good."""
        if self.death is None:
            self.death = error
            self._calls.log(logging.ERROR, "a sender to %r has ended: %s", self._name, error)
        self.flag.set()

    def refusal(self, last: KbatchError | None = None) -> KbatchError:
        """Why nothing is taken any more, or why an envelope is not sent again whose last attempt failed with `last`."""
        death = self.death
        text = "the sender is closed" if death is None else f"the sender has ended: {death}"
        error = SenderClosedError(text if last is None else f"{text}; the last attempt failed: {last}")
        error.__cause__ = last or death
        return error

    # -- the circuit

    def probe_at(self) -> float | None:
        """When `probe_if_due` is to be called; ``None`` if not before something else has come."""
        return self.circuit.probe_at() if self.is_alive() else None

    def probe_if_due(self, now: float) -> None:
        """Has the brokers asked whether they take batches again, if it is time to."""
        with self.lock:
            at = self.circuit.probe_at()
            if at is None or now < at:
                return
            self.circuit.probe_started()
        try:
            self._prober.put(self._probe)
        except BaseException:
            with self.lock:
                self.circuit.probed(False, now)
            raise

    def open_for_s(self, now: float) -> float:
        """For how long brokers have taken nothing, as far as is known; 0.0 unless the circuit is open."""
        with self.lock:
            return now - self._opened_at if self.circuit.state is CircuitState.OPEN else 0.0

    def hurry(self, now: float, at_most_s: float) -> None:
        """Probes now if the circuit is open, and from now on at least that often."""
        with self.lock:
            self.circuit.hurry(now, at_most_s)

    def _probe(self) -> None:
        reason: str | None = "not asked"
        producer = self.handle.producer
        try:
            # Of several topics one may be gone; then it is enough that brokers answer, and the trial shows the rest.
            reason = producer._core.probe(self._failed_topic or "", _PROBE_TIMEOUT_S)
        except ProducerClosedError as error:
            reason = str(error)
            if self.handle.fate(producer, error) == "end" and not self.closed:
                self.end(error)
        except Exception as error:
            reason = named_exception_text(error)
        finally:
            with self.lock:
                before = self.circuit.state
                self.circuit.probed(reason is None, self._clock())
                self._note_change(before)
            self.flag.set()
            self._tell_changes_soon()
            if reason is not None:
                self._log_probe(reason)  # last: without memory it raises

    def _log_probe(self, reason: str) -> None:
        now = self._clock()
        level = logging.DEBUG
        if now - self._reminded_at >= _REMIND_EVERY_S:
            self._reminded_at, level = now, logging.WARNING
        text = "the circuit breaker of %r has been open for %.0f s, %s buffered; a probe failed: %s"
        self._calls.log(level, text, self._name, now - self._opened_at, buffered(len(self.buffer)), reason)

    def note_successor(self) -> None:
        """Learns that another gate takes its place, whose circuit is closed: to the user they are one."""
        with self.lock:
            self._has_successor = True
            before = self.circuit.state
            if before is not CircuitState.CLOSED:
                text = "the circuit breaker of %r is closed: another sender begins"
                self._changes.append((before, CircuitState.CLOSED, logging.WARNING, text, (self._name,)))
        self._tell_changes_soon()

    def _note_change(self, before: CircuitState) -> None:
        # Under the lock, so that the changes are told in their order.
        state = self.circuit.state
        if state is before or self._has_successor:
            return
        arguments: tuple[object, ...]
        if state is CircuitState.OPEN:
            if before is CircuitState.CLOSED:
                self._opened_at = self._reminded_at = self._clock()
            level = logging.WARNING
            text = (
                "the circuit breaker of %r is open: %s in a row failed, the last with %s; nothing is sent "
                "until a probe succeeds"
            )
            arguments = (self._name, counted(self.circuit.failures, "batch", "batches"), self.last_error)
        else:
            self.tries_again = state is CircuitState.HALF_OPEN
            level = logging.WARNING if state is CircuitState.CLOSED else logging.INFO  # as that of its opening
            text, arguments = "the circuit breaker of %r is %s", (self._name, state.value)
        self._changes.append((before, state, level, text, arguments))
        self.flag.set()

    def _tell_changes_soon(self) -> None:
        # Not under the lock: without a thread to be had, the user's functions are called here.
        if self._changes:
            self._calls.put(self._tell_changes)

    def _tell_changes(self) -> None:
        while self._changes:
            before, state, level, text, arguments = self._changes.popleft()
            self._calls.log(level, text, *arguments)
            if self._on_state_change is None:
                continue
            try:
                self._calls.call(self._on_state_change, before, state)
            except BaseException as error:  # also a sys.exit(): what comes next is to be told
                name = callback_name(self._on_state_change)
                self._calls.log(logging.ERROR, "on_state_change failed: %s", name, exc_info=error)


def verdict_of_answer(told: KbatchError | DeliveryReport) -> Verdict:
    """What the answer of a batch that is not sent again says about the brokers."""
    if isinstance(told, ProducerError) and not can_be_replaced(told):
        return "nothing"  # refused as a whole, and by no broker: closed, forked, no memory, no thread
    if isinstance(told, (SerializationError, NotYetDueError, BatchInterruptedError)):
        return "nothing"
    report = told.report if isinstance(told, KbatchError) else told
    if report is not None and (report.acked or not report.failed):
        return "succeeded" if report.acked else "nothing"
    return "failed" if report is None or not spare_brokers(list(report.errors.values())) else "nothing"
