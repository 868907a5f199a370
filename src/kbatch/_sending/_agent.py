"""The thread that sends a sender's batches, and sees to those that fail."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import random
import sys
import threading
import time
import warnings
import weakref
from bisect import bisect_left, insort
from collections import deque
from typing import TYPE_CHECKING, Any, Literal

from kbatch._base_producer import BaseProducer
from kbatch._batch_sender import answer_refusal, answer_report, send_answered
from kbatch._callbacks import callback_name, refuse_coroutine
from kbatch._codes import TIMED_OUT
from kbatch._errors import (
    BatchInterruptedError,
    CircuitOpenError,
    ConfigError,
    DeliveryError,
    ForkError,
    KbatchError,
    NotYetDueError,
    ProducerClosedError,
    ProducerError,
    ProducerFencedError,
    SenderClosedError,
    SenderError,
    SerializationError,
    can_be_replaced,
    exception_text,
    has_culprit,
    is_abort,
    is_outage,
    named_exception_text,
    spares_brokers,
    type_name,
)
from kbatch._fastmap import (
    KEPT_BYTES,
    AnsweringSender,
    Call,
    CallbackThread,
    Signal,
    Undelivered,
    comes_from,
    envelope_bytes,
    monotonic,
    wall_time,
)
from kbatch._options import AgentOptions, check_topic, shows, taken
from kbatch._pending import PendingBatch
from kbatch._producer import Producer
from kbatch._recovery._circuit import CircuitBreaker, CircuitState
from kbatch._recovery._dead_letter import dead_letter
from kbatch._recovery._handle import ProducerHandle
from kbatch._recovery._retry import RetryPolicy
from kbatch._sending._queue import Ended, Entry, ExpiredError, Flight, SendQueue
from kbatch._text import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Never, Unpack

    from kbatch._batch_sender import Told
    from kbatch._fastmap import Accumulator, Answer, Envelope, Trial
    from kbatch._options import AgentKeywords
    from kbatch._report import DeliveryReport

__all__ = ["BaseSendingAgent", "SendingAgent", "Verdict"]

_logger = logging.getLogger("kbatch")

Verdict = Literal["succeeded", "failed", "nothing"]

_KEPT_FAILURES = 1000
_LONG = 2000  # envelopes; the GIL is given up while more are mapped
_SLICE_S = 0.002
_PROBE_TIMEOUT_S = 2.0
_HURRY_S = 1.0  # while closing, the most between two attempts and two probes
_REMIND_EVERY_S = 60.0
_WITH_THE_LAST = sys.maxsize  # a number that no envelope reaches
_LOOK_AT_CLOCK_S = 30.0  # time since 1970 may jump
_LAST_WORDS_S = 1.0  # for callbacks, after the deadline of closing
_OVER = -1.0


class BaseSendingAgent:
    """An agent, but for what waits and for how user callbacks are called."""

    _shown = "kbatch.SendingAgent"
    _producer_class: type[BaseProducer] = Producer
    _options_class: type[AgentOptions[Never]] = AgentOptions

    @shows(AgentOptions)
    def __init__(
        self,
        producer: BaseProducer | ProducerHandle,
        topic: str | None,
        **keywords: Unpack[AgentKeywords[Never]],
    ) -> None:
        (given,) = taken(self, keywords, AgentOptions)
        options: AgentOptions[Never] = self._options_class(**given)
        if topic is not None:
            check_topic("topic", topic)
            if options.dead_letter_topic == topic:
                raise ConfigError(f"dead_letter_topic must not be the topic itself, {topic!r}")
        if not isinstance(producer, (self._producer_class, ProducerHandle)):
            shown = getattr(producer, "_shown", type(producer).__name__)
            raise ConfigError(f"producer must be a {self._producer_class._shown}, not {shown}")
        if options.strict_order:
            _check_strict(producer.producer if isinstance(producer, ProducerHandle) else producer)
        self.topic = topic
        if isinstance(producer, ProducerHandle):
            self._handle = producer  # acquired for this agent
        else:
            self._handle = ProducerHandle.of(producer)
            self._handle.acquire()
        self._policy = RetryPolicy() if options.retry is None else options.retry
        self._max_in_flight = options.max_in_flight_batches
        self._strict_order = options.strict_order
        self._on_failed = self._keep_failure if options.on_failed is None else options.on_failed
        self._dead_letter_topic = options.dead_letter_topic
        self._on_state_change = options.on_state_change
        self._kept: deque[tuple[Envelope[Any], KbatchError]] = deque(maxlen=_KEPT_FAILURES)
        self._kept_sizes: deque[int] = deque(maxlen=_KEPT_FAILURES)
        self._undelivered = Undelivered("envelopes were given up")  # what on_failed has not taken
        self._circuit = CircuitBreaker(
            failures_to_open=options.failures_to_open,
            probe_interval_s=options.probe_interval_s,
            max_probe_interval_s=options.max_probe_interval_s,
            random=random.random,
        )
        # Guards the circuit and the life. Re-entrant: a signal handler may come here from within.
        self._mu = threading.RLock()
        self._callbacks = CallbackThread("kbatch-sender-callbacks")
        self._prober = CallbackThread("kbatch-probe")
        self._buffer: Accumulator | None = None
        self._signal = self._circuit.trials.signal = Signal()
        self._queue: SendQueue | None = None
        self._thread: threading.Thread | None = None
        self._pid: int | None = None  # where it was started
        self._news: deque[Callable[[], None]] = deque()  # for the thread
        self._newcomers: deque[_Watcher] = deque()  # to be watchers
        self._watchers: list[tuple[int, int, _Watcher]] = []  # by number; the thread's own
        self._watched = 0  # ever
        self._many_watchers = 100  # when those that are gone are taken out
        self._hurries = False
        # Of what on_failed has, or will have: the lowest number, and all.
        self._untold: deque[tuple[int, list[Ended]]] = deque()
        self._broken: BaseProducer | None = None  # in its fatal state, to be replaced
        self._death: KbatchError | None = None  # nothing can be sent any more
        self._giving_up = False
        self._is_over = False  # the thread has ended, or is about to
        self._abandoned: set[Flight] = set()
        self._released = False
        self._not_sent = 0  # since closing began
        age = self._policy.max_age_s
        self._expire_every_s = None if age is None else min(1.0, max(0.01, age / 10))
        self._next_expiry = 0.0
        self._last_success = -math.inf
        self._last_error: KbatchError | None = None
        self._tries_buffered_next = False  # what the next trial of the circuit is; see `_next`
        self._hastens = False  # the first trial since a probe succeeded
        self._opened_at = self._reminded_at = 0.0
        self._stalled_after_s = options.stalled_after_s
        self._stall_logged_at: float | None = None  # the last time; None: nothing is stalled
        self._failed_topic = topic  # None: one of several
        self._counts = dict.fromkeys(("acked", "expired", "failed", "retried", "dead_letters"), 0)

    @property
    def state(self) -> CircuitState:
        """The state of the circuit breaker."""
        return self._circuit.state

    @property
    def recent_failures(self) -> tuple[tuple[Envelope[Any], KbatchError], ...]:
        """The last 1,000 envelopes that were given up and the reasons, the oldest first, unless ``on_failed`` took
        them; fewer if they hold more than 16 MiB."""
        return tuple(self._kept)

    @property
    def last_error(self) -> KbatchError | None:
        """Why an envelope failed the last time that one did, whether or not it was sent again; ``None`` before."""
        return self._last_error

    @property
    def waiting_for_s(self) -> float:
        """For how long the oldest batch in flight has been without an answer; 0.0 if none is."""
        queue = self._queue
        departed = None if queue is None else queue.oldest_departure()
        return 0.0 if departed is None else monotonic() - departed

    def __repr__(self) -> str:
        return f"<{self._shown} to {self.topic!r}, circuit breaker {self.state.value}>"

    # -- for a batch that is not sent again

    def _admit(self) -> Trial | None:
        """The circuit's trial, if a batch is that. Raises if it must not be sent."""
        with self._mu:
            if self._giving_up or self._death is not None:
                raise self._refusal()
            if not self._circuit.may_send():
                raise CircuitOpenError("the circuit breaker is open: nothing was sent")
            return self._circuit.sent()

    def _note_answer(self, producer: BaseProducer, answer: Answer) -> None:
        """Learns from what a batch's callback was told."""
        verdict = _verdict_of_answer(answer.outcome)
        if verdict == "failed":
            self._failed_topic = self._topic_to_ask(answer.batch.envelopes)
        self._note(verdict, answer.trial, monotonic())
        if can_be_replaced(answer.outcome):
            self._news.append(functools.partial(self._break, producer))
            self._signal.set()

    def _break(self, producer: BaseProducer) -> None:
        if self._handle.producer is producer:
            self._broken = producer

    # -- for BatchedSender

    def _bind(self, buffer: Accumulator) -> None:
        """Takes the batches of `buffer` from now on."""
        with self._mu:
            if self._buffer is not None or self._thread is not None:
                raise ConfigError("the agent has a sender already, or has sent a batch; make an agent for each sender")
            self._buffer = buffer
            self._signal = self._circuit.trials.signal = buffer.signal

    def _is_forked(self) -> bool:
        return self._pid is not None and self._pid != os.getpid()

    def _start(self) -> None:
        if self._is_forked():  # before the lock, which a thread of the parent may have held
            raise ForkError(
                "this sender was used before the fork and its threads are not in this process; make a new one"
            )
        self._pid = os.getpid()
        with self._mu:
            if self._giving_up:
                raise SenderClosedError("the sender is closed")
            self._start_once()
            if self._buffer is not None:
                self._buffer._accept()

    def _start_once(self) -> None:
        if not self._has_thread():
            producer = self._handle.producer
            producer._core.start()
            buffer = self._buffer
            if self._has_thread():
                return  # a signal handler has sent meanwhile
            self._queue = SendQueue(
                self.topic,
                self._policy,
                batch_size=1000 if buffer is None else buffer.batch_size,
                batch_bytes=1_000_000 if buffer is None else buffer.batch_bytes,
                strict_order=self._strict_order,
                hold_scheduled=not producer._carries_scheduled_time,
                random=random.random,
            )
            signal, pid = self._signal, os.getpid()

            def wake(_: object) -> None:
                if os.getpid() == pid:  # in a forked child a thread of the parent may have held its lock
                    signal.set()

            self._thread = thread = threading.Thread(
                target=_run,
                args=(weakref.ref(self, wake), signal, self._handle, (self._callbacks, self._prober)),
                name="kbatch-sender",
                daemon=True,
            )
            try:
                thread.start()
            except BaseException:
                if thread.ident is None:  # else Ctrl-C came when it had begun
                    self._thread = None
                raise

    def _has_thread(self) -> bool:
        # Ctrl-C may have come before it began; if it begins all the same, it sees that it is not the agent's.
        return self._thread is not None and self._thread.ident is not None

    def _refusal(self, last: KbatchError | None = None) -> KbatchError:
        """Why nothing is taken any more, or why an envelope is not sent again whose last attempt failed with `last`."""
        death = self._death
        text = "the sender is closed" if death is None else f"the sender has ended: {death}"
        error = SenderClosedError(text if last is None else f"{text}; the last attempt failed: {last}")
        error.__cause__ = last or death
        return error

    def _check_caller(self) -> None:
        """Raises in a callback, and in what it has called or made: what they waited for would wait for its end."""
        if self._is_own():
            raise SenderError(
                "flush, drain and close wait for the sender's callbacks, so they must not be called by one that has "
                "not ended, nor in a task or thread to which its context was copied"
            )

    def _is_own(self) -> bool:
        """Whether the caller comes from a thread of the sender."""
        return comes_from(self._callbacks) or (self._thread is not None and comes_from(self._thread))

    def _when_done(self, seq: int | None, wake: Callable[[], None]) -> _Watcher:
        """Calls `wake` once every envelope before `seq` has its outcome, those that are scheduled for later not
        counted.

        With ``None``, once there is none at all.
        """
        # No lock: a signal handler that closes may come in between, and waits for the thread.
        watcher = _Watcher(_WITH_THE_LAST if seq is None else seq, wake)
        self._newcomers.append(watcher)
        self._signal.set()
        if self._is_over:
            wake()
        return watcher

    def _left(self, seq: int) -> int:
        """How many of the envelopes before `seq` may have no outcome, without those scheduled for later."""
        buffer, queue = self._buffer, self._queue
        assert buffer is not None
        if queue is None:
            return 0
        return max(0, min(len(buffer) - queue.scheduled, seq))

    def _hurry(self) -> None:
        """What is left is to be sent soon: closing has begun."""
        self._news.append(self._hurry_now)
        self._signal.set()

    def _hurry_now(self) -> None:
        queue, now = self._queue, monotonic()
        assert queue is not None
        if self._hurries:  # else whoever asks again and again would leave no back-off at all
            return
        self._hurries = True
        queue.hurry(now, _HURRY_S)
        with self._mu:
            self._circuit.hurry(now, _HURRY_S)

    def _end(self, timeout: float) -> int:
        """Gives up what was not sent, for good. How many envelopes that were."""
        end = monotonic() + timeout
        self._begin_end(timeout)
        return self._await_end(end + _LAST_WORDS_S)

    def _begin_end(self, timeout: float) -> None:
        if self._is_forked():
            return  # what was taken is the parent's
        with self._mu:
            self._giving_up = True
            first, self._released = not self._released, True
        self._signal.set()
        if first:
            # If the producer is ours, what is in flight has its outcome when this returns; else it goes on.
            self._handle.release(timeout)
            self._news.append(self._abandon_flights)
            self._signal.set()

    def _await_end(self, end: float) -> int:
        if self._is_forked():
            return 0
        thread = self._thread
        if thread is not None and thread.ident is not None and not comes_from(thread):
            thread.join(_seconds_until(end))
        self._prober.stop()
        self._callbacks.join(_seconds_until(end))
        return self._not_sent + self._lost()

    def _lost(self) -> int:
        """After the end: how many envelopes on_failed is not told of, after a crash or if a thread hangs."""
        if self._buffer is None:
            return 0
        to_be_told = 0 if self._on_failed == self._keep_failure else sum(len(told) for _, told in list(self._untold))
        return max(0, len(self._buffer) - to_be_told)

    def _stats(self) -> dict[str, int]:
        queue = self._queue
        waiting = (0, 0) if queue is None else (queue.scheduled, queue.in_flight)
        return {**self._counts, "scheduled": waiting[0], "in_flight_batches": waiting[1]}

    # -- the thread

    def _turn(self) -> float | None:
        """Does what is to be done now. Returns the seconds until there will be more, if nothing happens; ``None``: for
        ever; `_OVER`: there will be nothing more."""
        pause: float | None = _OVER
        try:
            pause = self._step()
        except BaseException as error:
            self._crash(error)
            raise
        finally:
            if pause == _OVER:
                self._is_over = True
                for watcher in (*(watcher for _, _, watcher in self._watchers), *self._newcomers.copy()):
                    watcher.wake()
        return pause

    def _is_idle(self) -> bool:
        """Whether nobody's envelopes depend on the thread."""
        queue, buffer = self._queue, self._buffer
        return not (self._news or (queue is not None and queue.in_flight) or (buffer is not None and len(buffer)))

    def __del__(self, warn: Callable[..., None] = warnings.warn) -> None:
        if getattr(self, "_released", True):  # the constructor may have raised
            return
        if not self._has_thread():
            self._released = True
            self._handle.forget()
        elif not self._is_forked():  # its thread releases the producer
            warn(f"unclosed {self if self._buffer is None else self._buffer!r}", ResourceWarning, source=self)

    def _crash(self, error: BaseException) -> None:
        """After a defect, or without memory: nothing is taken any more, and as far as possible all is told."""
        self._death = ProducerError(f"a sender's thread failed: {type_name(error)}")
        if self._buffer is not None:
            self._buffer._stop_accepting()
        with contextlib.suppress(BaseException):
            self._log(logging.CRITICAL, "a sender's thread failed; nothing more is sent", exc_info=error)
            self._die(self._death)
        with contextlib.suppress(BaseException):
            self._abandon_flights()
            self._see_off(monotonic())

    def _step(self) -> float | None:
        queue = self._queue
        assert queue is not None
        while self._news:
            self._news.popleft()()
        now, wall = monotonic(), wall_time()
        giving_up = self._giving_up  # it may change on the way
        if self._death is not None or giving_up:
            self._give_up_waiting()
        else:
            self._probe_if_due(now)
            self._replace_if_settled()
            if self._expire_every_s is not None and now >= self._next_expiry:
                self._next_expiry = now + self._expire_every_s
                self._expire(now, wall)
            self._send_all(now, wall)
        self._look_for_stall(now)
        sent_away = self._see_off(now)
        self._tell_watchers()
        if giving_up and not queue.in_flight:
            return _OVER
        if self._news or queue.ended or sent_away or self._may_replace():
            return 0.0
        return self._idle_for(monotonic(), wall_time())

    def _idle_for(self, now: float, wall: float) -> float | None:
        """Seconds until there is something to do, if nothing happens; None: for ever."""
        queue = self._queue
        assert queue is not None
        due: list[float] = []
        if self._can_send():
            at = queue.due_at(now, wall)
            if at is not None:
                due.append(at - now)
            if queue.scheduled:
                due.append(_LOOK_AT_CLOCK_S)
            if self._buffer is not None and queue.wants_batch():
                buffer_due = self._buffer._due_in()
                if buffer_due is not None:
                    due.append(buffer_due)
        if self._death is None and not self._giving_up:
            probe_at = self._circuit.probe_at()
            if probe_at is not None:
                due.append(probe_at - now)
            if self._expire_every_s is not None and self._buffer is not None and len(self._buffer):
                due.append(self._next_expiry - now)
        stall_at = self._stall_at()
        if stall_at is not None:
            due.append(stall_at - now)
        return max(0.0, min(due)) if due else None

    def _can_send(self) -> bool:
        queue = self._queue
        assert queue is not None
        return (
            self._death is None
            and not self._giving_up
            and self._broken is None
            and queue.in_flight < self._max_in_flight
            and self._circuit.may_send()
        )

    def _send_all(self, now: float, wall: float) -> None:
        while self._can_send():
            flight = self._next(now, wall)
            if flight is None:
                return
            self._send(flight)

    def _next(self, now: float, wall: float) -> Flight | None:
        """What is sent next: what waits for another attempt, or else what is buffered.

        The trial of the circuit is what failed first, whatever its back-off. But that may be what cannot be stored for
        a reason that others do not share, such as a partition without a leader. So after a trial that did not succeed
        the next one is what was never sent, if there is such.
        """
        queue = self._queue
        assert queue is not None
        if self._circuit.state is CircuitState.HALF_OPEN:
            if self._tries_buffered_next:
                queue.step_aside(now)
                flight = self._next_buffered(now, wall)
                if flight is not None:
                    return flight
            if self._hastens:
                self._hastens = False
                queue.hasten(now)
        flight = queue.next_flight(now, wall)
        return self._next_buffered(now, wall) if flight is None else flight

    def _next_buffered(self, now: float, wall: float) -> Flight | None:
        queue = self._queue
        assert queue is not None
        flight = None
        while flight is None and self._buffer is not None and queue.wants_batch():
            batch = self._buffer._next_batch()
            if batch is None:
                break
            flight = queue.admit(batch, now, wall)
        return flight

    def _send(self, flight: Flight) -> None:
        queue = self._queue
        assert queue is not None
        with self._mu:
            if not self._circuit.may_send():  # a send_batch was faster
                queue.put_back(flight)
                return
            flight.trial = self._circuit.sent()
        producer = self._handle.producer
        rejected: list[tuple[int, SerializationError | NotYetDueError]] = []
        try:
            pending = PendingBatch(producer._core)
            pending._look()  # whoever the agent tells is told
            self._map(producer, pending, flight, rejected)
            producer._send_detached(pending, waker=functools.partial(self._on_settled, flight, pending, rejected))
        except ProducerFencedError as error:
            queue.put_back(flight)
            self._die(error)
        except ProducerClosedError as error:
            queue.put_back(flight)
            self._note("nothing", flight.trial, monotonic())
            if self._handle.producer is producer and not self._giving_up:
                self._die(error)
        except ProducerError as error:  # in its fatal state, or after a transaction whose end is not known
            queue.put_back(flight)
            self._log(logging.WARNING, "a producer can send no more: %s", error)
            self._broken = producer
            self._note("failed", flight.trial, monotonic())
        except BaseException as error:  # a header_hook that fails, no memory, no threads, a sys.exit() in an encoder
            reason: KbatchError
            if isinstance(error, KbatchError):
                reason = error
            else:
                reason = SenderError(f"the producer could not take the batch: {named_exception_text(error)}")
                reason.__cause__ = error
            self._note("nothing", flight.trial, monotonic())
            failures = [(index, reason) for index in range(len(flight.envelopes))]
            queue.settled(flight, failures, monotonic(), again=not self._giving_up)

    def _map(
        self,
        producer: BaseProducer,
        pending: PendingBatch,
        flight: Flight,
        rejected: list[tuple[int, SerializationError | NotYetDueError]],
    ) -> None:
        core = producer._core
        if len(flight.envelopes) <= _LONG:
            core.map(pending, self.topic, flight.envelopes, rejected)
        else:
            mapping = core.begin_mapping(pending, self.topic, flight.envelopes, rejected)
            while not core.map_slice(mapping, _SLICE_S):
                time.sleep(0)  # others may have the GIL
        if self._buffer is not None:
            self._buffer._learn_message_bytes(*pending.encoded_messages)

    def _on_settled(
        self, flight: Flight, pending: PendingBatch, rejected: list[tuple[int, SerializationError | NotYetDueError]]
    ) -> None:
        # On the dispatcher's thread, which must not wait for us.
        self._news.append(functools.partial(self._settle, flight, pending, rejected))
        self._signal.set()

    def _settle(
        self, flight: Flight, pending: PendingBatch, rejected: list[tuple[int, SerializationError | NotYetDueError]]
    ) -> None:
        queue = self._queue
        assert queue is not None
        if flight in self._abandoned:  # it has its outcome
            self._abandoned.remove(flight)
            return
        report = pending.report
        now = monotonic()
        failures: list[tuple[int, KbatchError]] = []
        if report.failed:
            reasons = dict(rejected)
            failures = [(index, reasons.get(index, error)) for index, error in report.errors.items()]
        again = self._death is None and not self._giving_up
        if not again:
            failures = [(index, self._as_refusal(error)) for index, error in failures]
        ended = len(queue.ended)
        late = _expired_but_perhaps_stored(flight, report)
        queue.settled(flight, failures + late, now, again=again)
        if report.acked:
            self._last_success = now
        if failures:
            self._last_error = failures[-1][1]
        verdict = _verdict(flight, report.acked, failures, self._last_success) if again else "nothing"
        if verdict == "failed":
            self._failed_topic = self._topic_to_ask(flight.envelopes)
        if flight.trial:
            self._tries_buffered_next = verdict != "succeeded" and flight.entries is not None
        self._note(verdict, flight.trial, now)
        done = len(report) - report.failed - len(late)
        letters = _stored_letters(flight, failures)
        self._counts["acked"] += report.acked - letters
        self._counts["dead_letters"] += letters
        self._counts["expired"] += done - report.acked
        if again:
            self._counts["retried"] += len(failures) + len(late) - (len(queue.ended) - ended)
        if self._buffer is not None and done:
            failed = sum(flight.sizes[index] for index, _ in failures + late)
            self._buffer._give_back(done, flight.bytes - failed)

    def _as_refusal(self, error: KbatchError) -> KbatchError:
        """What is told of an envelope that failed when all was given up, and that no broker can have stored."""
        if isinstance(error, DeliveryError) and error.retriable and not error.possibly_persisted:
            return self._refusal(error)
        return error

    # -- the circuit

    def _note(self, verdict: Verdict, trial: Trial | None, now: float) -> None:
        with self._mu:
            before = self._circuit.state
            if verdict == "succeeded":
                self._circuit.succeeded(trial, now)
            elif verdict == "failed":
                self._circuit.failed(trial, now)
            else:
                self._circuit.said_nothing(trial)
            self._tell_state(before)
        if trial:
            self._signal.set()  # the next trial may be the thread's, and this one was another's

    def _tell_state(self, before: CircuitState) -> None:
        state = self._circuit.state
        if state is before:
            return
        if state is CircuitState.OPEN:
            if before is CircuitState.CLOSED:
                self._opened_at = self._reminded_at = monotonic()
            self._log(
                logging.WARNING,
                "the circuit breaker of %r is open: %s in a row failed, the last with %s; nothing is sent "
                "until a probe succeeds",
                *(self.topic, counted(self._circuit.failures, "batch", "batches"), self._last_error),
            )
        else:
            self._hastens = state is CircuitState.HALF_OPEN
            level = logging.WARNING if state is CircuitState.CLOSED else logging.INFO  # whoever saw it open sees it end
            self._log(level, "the circuit breaker of %r is %s", self.topic, state.value)
        if self._on_state_change is not None:
            self._callbacks.put(self._tell_state_change, before, state)
        self._signal.set()

    def _tell_state_change(self, before: CircuitState, state: CircuitState) -> None:
        assert self._on_state_change is not None
        try:
            self._call_back(self._on_state_change, before, state)
        except BaseException as error:  # also a sys.exit(): whatever comes next is to be told
            name = callback_name(self._on_state_change)
            self._log(logging.ERROR, "on_state_change failed: %s", name, exc_info=error)

    def _topic_to_ask(self, envelopes: Sequence[Envelope[Any]]) -> str | None:
        return self.topic if all(envelope.topic in (None, self.topic) for envelope in envelopes) else None

    def _probe_if_due(self, now: float) -> None:
        with self._mu:
            at = self._circuit.probe_at()
            if at is None or now < at:
                return
            self._circuit.probe_started()
        try:
            self._prober.put(self._probe)
        except BaseException:
            self._circuit.probed(False, now)
            raise

    def _probe(self) -> None:
        reason: str | None = "not asked"
        producer = self._handle.producer
        try:
            # Of several topics one may be gone; then it is enough that brokers answer, and the trial shows the rest.
            reason = producer._core.probe(self._failed_topic or "", _PROBE_TIMEOUT_S)
        except ProducerClosedError as error:
            reason = str(error)
            if self._handle.producer is producer:
                self._news.append(functools.partial(self._die, error))
        except Exception as error:
            reason = named_exception_text(error)
        finally:
            if reason is not None:
                self._log_probe(reason)
            with self._mu:
                before = self._circuit.state
                self._circuit.probed(reason is None, monotonic())
                self._tell_state(before)
            self._signal.set()

    def _log_probe(self, reason: str) -> None:
        now = monotonic()
        level = logging.DEBUG
        if now - self._reminded_at >= _REMIND_EVERY_S:
            self._reminded_at, level = now, logging.WARNING
        held = 0 if self._buffer is None else len(self._buffer)
        text = "the circuit breaker of %r has been open for %.0f s, %s held; a probe failed: %s"
        self._log(level, text, self.topic, now - self._opened_at, _held(held), reason)

    def _stall_at(self) -> float | None:
        # When it is to be logged that brokers do not answer, unless they do by then.
        assert self._queue is not None
        departed = self._queue.oldest_departure()
        if departed is None:
            return None
        if self._stall_logged_at is None:
            return departed + self._stalled_after_s
        return max(departed + self._stalled_after_s, self._stall_logged_at + _REMIND_EVERY_S)

    def _look_for_stall(self, now: float) -> None:
        at = self._stall_at()
        if at is not None and now >= at:
            self._stall_logged_at = now
            text = "brokers have not answered for %r for %.0f s: %s in flight, %s held"
            held = 0 if self._buffer is None else len(self._buffer)
            assert self._queue is not None
            flying = counted(self._queue.in_flight, "batch is", "batches are")
            self._log(logging.WARNING, text, self.topic, self.waiting_for_s, flying, _held(held))
        elif self._stall_logged_at is not None and self.waiting_for_s < self._stalled_after_s:
            self._stall_logged_at = None
            self._log(logging.WARNING, "brokers answer for %r again", self.topic)

    def _may_replace(self) -> bool:
        queue = self._queue
        assert queue is not None
        alive = self._death is None and not self._giving_up
        return alive and self._broken is not None and not queue.in_flight

    def _replace_if_settled(self) -> None:
        if self._may_replace():
            broken, self._broken = self._broken, None
            assert broken is not None
            try:
                self._handle.replace(broken)
            except Exception as error:
                self._log(logging.ERROR, "a producer in its fatal state could not be replaced", exc_info=error)
                self._die(ProducerError(f"a producer could not be replaced: {named_exception_text(error)}"))

    # -- ends

    def _die(self, error: KbatchError) -> None:
        """Nothing can be sent any more, for good."""
        if self._death is None:
            self._death = error
            self._log(logging.ERROR, "a sender to %r has ended: %s", self.topic, error)
        self._give_up_waiting()
        self._see_off(monotonic())
        self._tell_watchers()

    def _give_up_waiting(self) -> None:
        queue, buffer = self._queue, self._buffer
        assert queue is not None
        entries = queue.give_up()
        if buffer is not None:
            buffer._stop_accepting()
            while (batch := buffer._next_batch()) is not None:
                entries += [
                    Entry(envelope, batch.first_seq + index, batch.accepted_at, None, batch.sizes[index])
                    for index, envelope in enumerate(batch.envelopes)
                ]
        for entry in entries:
            queue.ended.append(Ended.of(entry, self._refusal(entry.error)))

    def _abandon_flights(self) -> None:
        """After the end of closing: what is still in flight has no known outcome."""
        queue = self._queue
        assert queue is not None
        for flight in queue.flights():
            self._abandoned.add(flight)
            failures = [
                (index, DeliveryError(TIMED_OUT, possibly_persisted=True)) for index in range(len(flight.envelopes))
            ]
            queue.settled(flight, failures, monotonic(), again=False)

    def _expire(self, now: float, wall: float) -> None:
        queue, buffer, age = self._queue, self._buffer, self._policy.max_age_s
        assert queue is not None
        assert age is not None
        assert self._expire_every_s is not None
        queue.expire(now, wall)
        if buffer is None:
            return
        buffer._close_older(self._expire_every_s)  # else what came much later would be in one batch with it
        error: KbatchError = SenderError(f"not sent within max_age_s={age}")
        if self._circuit.state is not CircuitState.CLOSED:
            error = CircuitOpenError(f"not sent within max_age_s={age}: the circuit breaker is open")
        while (batch := buffer._pop_older(age)) is not None:
            queue.expire_batch(batch, wall, error)

    def _see_off(self, now: float) -> bool:
        """What has ended goes to the dead letters, or to `on_failed`. Whether there is a dead letter to send."""
        queue = self._queue
        assert queue is not None
        if not queue.ended:
            return False
        told: list[Ended] = []
        done = 0
        try:
            for end in queue.ended:
                if end.entry.origin is not None:
                    self._log(logging.ERROR, "a dead letter could not be sent: %s", end.error)
                    told.append(end.entry.origin)
                elif not self._send_to_dead_letters(end, now):
                    told.append(end)
                done += 1
        finally:  # without memory the others are the next call's
            del queue.ended[:done]
            if told:
                if self._giving_up or self._buffer is None or self._buffer._is_refusing:
                    self._not_sent += len(told)
                self._counts["failed"] += len(told)
                self._untold.append((min(end.entry.seq for end in told), told))
                self._callbacks.put_surely(self._tell_failed, told)
        return len(told) < done

    def _send_to_dead_letters(self, end: Ended, now: float) -> bool:
        if self._dead_letter_topic is None or self._death is not None or self._giving_up:
            return False
        try:
            entry = end.entry
            letter = dead_letter(entry.envelope, end.error, entry.failures, self._dead_letter_topic, self.topic)
        except Exception:  # headers that could not be mapped either
            return False
        if letter is None:
            return False
        assert self._queue is not None
        self._queue.add_dead_letter(letter, end, now)
        return True

    def _tell_failed(self, told: list[Ended]) -> None:
        if self._on_failed == self._keep_failure:
            first = told[0].entry.envelope
            self._log(
                logging.ERROR,
                "%s to %r %s given up; the first, %s with the key %r: %s",
                *(counted(len(told), "envelope"), self.topic, "was" if len(told) == 1 else "were"),
                *(first.id, first.key),
                _reason(told[0].error),
            )
        for end in told:
            try:
                self._call_back(self._on_failed, end.entry.envelope, end.error)
            except BaseException as error:  # also a sys.exit(): the others are to be told
                self._keep_failure(end.entry.envelope, end.error)
                text = "on_failed failed: %s; agent.recent_failures keeps envelope %s, which was given up: %s"
                name = callback_name(self._on_failed)
                self._log(logging.ERROR, text, name, end.entry.envelope.id, _reason(end.error), exc_info=error)
            finally:
                if self._buffer is not None:
                    # Not before: what a slow callback has not taken yet is held, too.
                    self._buffer._give_back(1, end.entry.size)
        self._untold.popleft()
        self._signal.set()

    def _log(self, level: int, text: str, *arguments: object, exc_info: BaseException | None = None) -> None:
        # On the thread of callbacks: a handler may send by this very sender, and wait for room.
        if not comes_from(self._callbacks):
            self._callbacks.put(self._log_now, level, text, arguments, exc_info)
            return
        with contextlib.suppress(BaseException):  # whatever a handler raises
            self._log_now(level, text, arguments, exc_info)

    def _log_now(self, level: int, text: str, arguments: tuple[object, ...], exc_info: BaseException | None) -> None:
        _logger.log(level, text, *arguments, exc_info=exc_info)

    def _keep_failure(self, envelope: Envelope[Any], error: KbatchError) -> None:
        self._kept.append((envelope, error))
        self._kept_sizes.append(envelope_bytes(envelope))
        while len(self._kept) > 1 and sum(self._kept_sizes) > KEPT_BYTES:
            self._kept.popleft()
            self._kept_sizes.popleft()
        self._undelivered.add(envelope, error)

    def _call_back(self, callback: Callable[..., object], *arguments: object) -> None:
        """Calls a user's callback, on the thread of callbacks, and returns when it has ended."""
        refuse_coroutine(callback(*arguments))

    def _tell_watchers(self) -> None:
        watchers = self._watchers
        while self._newcomers:
            self._watched += 1
            watcher = self._newcomers.popleft()
            insort(watchers, (watcher.seq, self._watched, watcher))
        if not watchers:
            return
        if self._buffer is None or len(self._buffer) == 0:
            before = _WITH_THE_LAST + 1
        elif watchers[0][0] == _WITH_THE_LAST:
            before = 0
        else:
            before = self._oldest() + 1
        count = bisect_left(watchers, (before,))
        done, watchers[:count] = watchers[:count], []
        for _, _, watcher in done:
            watcher.done = True
            watcher.wake()
        if len(watchers) > self._many_watchers:
            watchers[:] = [each for each in watchers if not each[2].gone]
            self._many_watchers = 100 + 2 * len(watchers)

    def _oldest(self) -> int:
        """The lowest number of an envelope without an outcome, unless it is scheduled for later; one less than
        `_WITH_THE_LAST` if there is none."""
        buffer, queue = self._buffer, self._queue
        assert buffer is not None
        assert queue is not None
        numbers = [seq for seq, _ in list(self._untold)]
        for seq in (queue.oldest(), buffer._first_seq()):
            if seq is not None:
                numbers.append(seq)
        return min(numbers, default=_WITH_THE_LAST - 1)


def _run(
    reference: weakref.ref[BaseSendingAgent],
    signal: Signal,
    handle: ProducerHandle,
    threads: tuple[CallbackThread, ...],
) -> None:
    """An agent's thread. While nothing depends on it, it keeps nobody who has forgotten the agent from losing it."""
    with Call(threading.current_thread()):  # encoders and hooks
        while (agent := reference()) is not None:
            if agent._thread is not threading.current_thread():
                return  # its start was interrupted, and another took its place
            pause = agent._turn()
            if pause == _OVER:
                signal.keep(None)
                return
            signal.keep(None)  # before the look: whoever sends after it keeps the agent by the signal
            if agent._is_idle():
                del agent
            if pause != 0.0:
                signal.wait(pause, interruptible=False)
    handle.release(0.0)
    for thread in threads:
        thread.stop()


class SendingAgent(AnsweringSender, BaseSendingAgent):
    """Sends the batches of a `BatchedSender`, sends again what failed, and stops sending while Kafka is away.

    Only envelopes that failed are sent again, never one that was acknowledged. One whose outcome is not known
    (``possibly_persisted``) is sent again too, and may then be stored twice; its id is the same. What cannot be mapped,
    or is refused for good, is not sent again. When an envelope is given up, `on_failed` is told, once.

    After `failures_to_open` failed batches in a row the circuit breaker opens: nothing is sent, and a probe that writes
    nothing asks whether the brokers know the topic and lead a partition of it. When they do, what failed first is the
    trial; if it succeeds all goes on. After a trial that failed the next one is what was never sent, so that one
    partition or topic that takes nothing does not stop the others. For the same reason an envelope that fails again
    counts again only if no broker answered and nothing else was stored since it failed first. A producer in its fatal
    state, or whose last transaction has no known end, is replaced by one with the same settings, once what it sent has
    settled; one that was fenced is not.

    Of one topic and key (or partition, without a key) the order of sending is the order in the log, until a delivery
    fails: then those that were not sent yet wait behind it, and those under way may overtake it.

    `send_batch` sends a batch under the circuit breaker, but does not send it again: for whoever keeps it, such as an
    outbox. While the circuit is open, ``mark_circuit_open`` is called at once, and nothing is sent.

    Args:
        producer: A `kbatch.Producer`, which stays the caller's.
        topic: Where envelopes without a topic of their own go; ``None`` if each has one.
        retry: When to send a failed envelope again, and when no more.
        failures_to_open: How many batches in a row must fail.
        probe_interval_s, max_probe_interval_s: Seconds from the opening to the probe, and at most between two; each one
            that fails doubles the time. A random half is taken off.
        max_in_flight_batches: How many batches are in flight at a time.
        strict_order: At most one envelope of a key is in flight, so that none is ever overtaken by a later one of its
            key. Slower where there are few keys: then a batch has few envelopes.
        stalled_after_s: A warning is logged when a batch has been in flight for so many seconds without an answer, once
            a minute until there is one. `waiting_for_s` tells the same to a metric. It takes no short
            ``delivery.timeout.ms`` to learn of an outage: that may store copies, as README says under "Duplicates".
        on_failed: Called with an envelope that was given up and the reason, on a thread of the agent, where it must not
            wait for its sender: until it has ended, ``flush``, ``drain`` and ``close`` raise `SenderError` there, and
            in tasks and threads to which its context was copied. By default an error is logged, and
            `recent_failures` holds the last 1,000.
        dead_letter_topic: Where envelopes that are given up are sent, with the reason in headers. `on_failed` is then
            called for those only that cannot be sent there: they cannot be mapped, that topic fails as well, or the
            sender is closed.
        on_state_change: Called with the old and the new `CircuitState`, on a thread of the agent.

    Raises:
        ConfigError: A value of the wrong type or out of its range.
    """

    def _send_answered(self, answer: Answer) -> Told:
        producer: Any = self._handle.producer
        self._start()
        answer.trial = self._admit()
        answer.then = functools.partial(self._note_answer, producer)
        return send_answered(producer, self.topic, answer)

    def _refuse_answered(self, answer: Answer, error: BaseException) -> Told:
        return answer_refusal(self._handle.producer, answer.batch, error, answer.mapping)

    def _tell(self, report: DeliveryReport) -> Told:
        return answer_report(report)

    def close(self) -> None:
        """Ends an agent that has no `BatchedSender`, whose own ``close`` does this."""
        self._end(0)


class _Watcher:
    """Somebody who waits until all before `seq` is done."""

    def __init__(self, seq: int, wake: Callable[[], None]) -> None:
        self.seq = seq
        self.wake = wake
        self.done = False
        self.gone = False  # it waits no longer


def _verdict_of_answer(outcome: KbatchError | DeliveryReport) -> Verdict:
    """What the answer of a batch that is not sent again says about the brokers."""
    if isinstance(outcome, (SerializationError, NotYetDueError, BatchInterruptedError)):
        return "nothing"
    report = outcome.report if isinstance(outcome, KbatchError) else outcome
    if report is not None and (report.acked or not report.failed):
        return "succeeded" if report.acked else "nothing"
    return "failed" if report is None or not _spare_brokers(list(report.errors.values())) else "nothing"


def _verdict(flight: Flight, acked: int, failures: list[tuple[int, KbatchError]], last_success: float) -> Verdict:
    """What the outcome of a flight says about the brokers.

    An envelope that fails again and again counts as often only if that is for want of a broker, and nothing else has
    been stored since it failed first. Else one that no broker takes would stop all others. A dead letter never counts.
    """
    if acked:
        return "succeeded"
    guilt = has_culprit([error for _, error in failures])
    for index, error in failures:
        if spares_brokers(error) or (guilt and is_abort(error)):
            continue
        entry = None if flight.entries is None else flight.entries[index]
        if entry is None:
            return "failed"
        if entry.origin is not None:
            continue
        assert entry.failed_at is not None
        if flight.trial or entry.setbacks == 1 or (is_outage(error) and entry.failed_at > last_success):
            return "failed"
    return "nothing"


def _expired_but_perhaps_stored(flight: Flight, report: DeliveryReport) -> list[tuple[int, KbatchError]]:
    entries = flight.entries
    if entries is None or report.acked + report.failed == len(report):
        return []
    reason = "deliver_by has passed; an earlier attempt may have been stored"
    return [(index, ExpiredError(reason)) for index in report.expired_indices if entries[index].possibly_persisted]


def _spare_brokers(errors: Sequence[KbatchError]) -> bool:
    guilt = has_culprit(errors)
    return all(spares_brokers(error) or (guilt and is_abort(error)) for error in errors)


def _stored_letters(flight: Flight, failures: list[tuple[int, KbatchError]]) -> int:
    if flight.entries is None:
        return 0
    letters = sum(1 for entry in flight.entries if entry.origin is not None)
    return letters - sum(1 for index, _ in failures if flight.entries[index].origin is not None)


def _held(count: int) -> str:
    return counted(count, "envelope is", "envelopes are")


def _reason(error: KbatchError) -> str:
    # Without the place in a batch, of which whoever sends single envelopes knows nothing.
    return error.reason if isinstance(error, (SerializationError, NotYetDueError)) else exception_text(error)


def _seconds_until(end: float) -> float:
    return min(max(0.0, end - monotonic()), threading.TIMEOUT_MAX)


def _check_strict(producer: BaseProducer) -> None:
    """Raises ConfigError where a record's key, or its partition, does not follow from the envelope's key."""
    reason = None
    if producer._has_custom_wire:
        reason = (
            "a wire object of your own, which may write another record key than the envelope's; use a built-in wire"
        )
    elif producer._parsed.native.get("partitioner") == "random":
        reason = "partitioner=random, which spreads a key over partitions; choose another partitioner"
    if reason is not None:
        raise ConfigError(f"strict_order=True contradicts {reason}")
