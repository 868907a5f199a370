"""What sends a sender's batches, and sees to those that fail."""

from __future__ import annotations

import functools
import os
import threading
import warnings
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from kbatch._base_producer import BaseProducer
from kbatch._batch_sender import answer_refusal, answer_report, send_answered
from kbatch._checks import check_topic
from kbatch._errors import ConfigError, ForkError, KbatchError, ProducerClosedError, SenderClosedError, SenderError
from kbatch._fastmap import AnsweringSender, Call, CallQueue, Flag, comes_from, monotonic
from kbatch._options import AgentOptions, shows, taken
from kbatch._producer import Producer
from kbatch._recovery._circuit import CircuitState
from kbatch._recovery._gate import Gate
from kbatch._recovery._handle import ProducerHandle, ProducerUse
from kbatch._recovery._user_calls import UserCalls
from kbatch._sending._given_up import GivenUp
from kbatch._sending._send_loop import OVER, SendLoop
from kbatch._sending._watchers import NONE_LEFT, Watchers
from kbatch._threads import PROBES

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Never, Unpack

    from kbatch._batch_sender import Told
    from kbatch._fastmap import Accumulator, Answer, Envelope, Undelivered
    from kbatch._options import AgentKeywords
    from kbatch._report import DeliveryReport
    from kbatch._sending._watchers import Watcher

__all__ = ["BaseSendingAgent", "SendingAgent"]

_LAST_WORDS_S = 1.0  # for callbacks, after the deadline of closing
_LAST_NOTES_S = 10.0  # the same without on_failed: no code of users can hang, but the machine may be busy


class BaseSendingAgent:
    """An agent, but for what waits and for how user callbacks are called."""

    _shown = "kbatch.SendingAgent"
    _producer_class: type[BaseProducer] = Producer
    _calls_class: type[UserCalls] = UserCalls
    _options_class: type[AgentOptions[Never]] = AgentOptions

    @shows(AgentOptions)
    def __init__(
        self,
        producer: BaseProducer | ProducerUse,
        topic: str | None,
        **keywords: Unpack[AgentKeywords[Never]],
    ) -> None:
        (given,) = taken(self, keywords, AgentOptions)
        options: AgentOptions[Never] = self._options_class(**given)
        if topic is not None:
            check_topic("topic", topic)
            if options.dead_letter_topic == topic:
                raise ConfigError(f"dead_letter_topic must not be the topic itself, {topic!r}")
        if not isinstance(producer, (self._producer_class, ProducerUse)):
            shown = getattr(producer, "_shown", type(producer).__name__)
            raise ConfigError(f"producer must be a {self._producer_class._shown}, not {shown}")
        if options.strict_order:
            _check_strict(producer.handle.producer if isinstance(producer, ProducerUse) else producer)
        self.topic = topic
        self._use = producer if isinstance(producer, ProducerUse) else ProducerHandle.of(producer).acquire()
        self._handle = self._use.handle
        self._options = options
        self._calls = self._calls_class()
        self._prober = CallQueue(PROBES)
        self._gate = Gate(
            self._handle,
            topic,
            self._calls,
            self._prober,
            failures_to_open=options.failures_to_open,
            probe_interval_s=options.probe_interval_s,
            max_probe_interval_s=options.max_probe_interval_s,
            on_state_change=options.on_state_change,
        )
        self._given_up = GivenUp(topic, self._calls, options.on_failed)
        self._watchers = Watchers()
        self._counts = dict.fromkeys(("acked", "expired", "retried", "dead_letters"), 0)
        self._news: deque[Callable[[], None]] = deque()  # for the thread
        self._buffer: Accumulator | None = None
        self._send_loop: SendLoop | None = None  # the thread's
        self._thread: threading.Thread | None = None
        self._pid: int | None = None  # where it was started
        self._ending = False

    @property
    def state(self) -> CircuitState:
        """The state of the circuit breaker."""
        return self._gate.circuit.state

    @property
    def recent_failures(self) -> tuple[tuple[Envelope[Any], KbatchError], ...]:
        """The last 1,000 envelopes that were given up and the reasons, the oldest first, unless ``on_failed`` took
        them; fewer if they hold more than 16 MiB."""
        return self._given_up.recent()

    @property
    def last_error(self) -> KbatchError | None:
        """Why an envelope failed the last time that one did, whether or not it was sent again; ``None`` before."""
        return self._gate.last_error

    @property
    def waiting_for_s(self) -> float:
        """For how long the oldest batch in flight has been without an answer; 0.0 if none is."""
        return 0.0 if self._send_loop is None else self._send_loop.stalls.waiting_for_s()

    @property
    def _undelivered(self) -> Undelivered:
        return self._given_up.undelivered

    def __repr__(self) -> str:
        return f"<{self._shown} to {self.topic!r}, circuit breaker {self.state.value}>"

    # -- for BatchedSender

    def _bind(self, buffer: Accumulator) -> None:
        """Takes the batches of `buffer` from now on."""
        with self._gate.lock:
            if self._buffer is not None or self._thread is not None:
                raise ConfigError("the agent has a sender already, or has sent a batch; make an agent for each sender")
            self._buffer = self._given_up.buffer = self._gate.buffer = buffer
            self._gate.flag = buffer.flag

    def _is_forked(self) -> bool:
        return self._pid is not None and self._pid != os.getpid()

    def _start(self) -> None:
        if self._is_forked():  # before the lock, which a thread of the parent may have held
            raise ForkError(
                "this sender was used before the fork and its threads are not in this process; make a new one"
            )
        self._pid = os.getpid()
        try:
            with self._gate.lock:
                if self._gate.closed:
                    raise SenderClosedError("the sender is closed")
                self._start_once()
                if self._buffer is not None:
                    self._buffer._accept()
        except BaseException:
            with self._gate.lock:
                if not self._has_thread():  # a forked child may start it
                    self._pid = None
            raise

    def _start_once(self) -> None:
        self._pid = os.getpid()  # another thread's start may have failed meanwhile
        if not self._has_thread():
            self._handle.producer._core.start()
            loop, flag, pid = self._make_send_loop(), self._gate.flag, os.getpid()

            def wake(_: object) -> None:
                if os.getpid() == pid:  # in a forked child a thread of the parent may have held its lock
                    flag.set()

            thread = threading.Thread(
                target=_run,
                args=(weakref.ref(self, wake), flag, self._use, (self._calls, self._prober)),
                name="kbatch-sender",
                daemon=True,
            )
            if self._has_thread():
                return  # a signal handler or a finalizer has sent
            self._send_loop, self._thread = loop, thread
            try:
                thread.start()
            except BaseException:
                if thread.ident is None and self._thread is thread:  # else Ctrl-C came when it had begun
                    self._thread = None
                raise

    def _make_send_loop(self) -> SendLoop:
        return SendLoop(
            self._buffer,
            self._gate,
            self._calls,
            self._given_up,
            self._watchers,
            self._options,
            topic=self.topic,
            news=self._news,
            counts=self._counts,
        )

    def _has_thread(self) -> bool:
        # Ctrl-C may have come before it began; if it begins all the same, it sees that it is not the agent's.
        return self._thread is not None and self._thread.ident is not None

    def _refusal(self) -> KbatchError:
        """Why nothing is taken any more."""
        return self._gate.refusal()

    def _check_caller(self) -> None:
        """Raises in a callback, and in what it has called or made: what they waited for would wait for its end."""
        if self._is_own():
            raise SenderError(
                "flush, drain and close wait for the sender's callbacks, so they must not be called by one that has "
                "not ended, nor in a task or thread to which its context was copied"
            )

    def _is_own(self) -> bool:
        """Whether the caller comes from a thread of the sender."""
        return self._calls.are_of_caller() or (self._thread is not None and comes_from(self._thread))

    def _when_done(self, seq: int | None, wake: Callable[[], None]) -> Watcher:
        """Calls `wake` once every envelope before `seq` has its outcome, those that are scheduled for later not
        counted.

        With ``None``, once there is none at all.
        """
        watcher = self._watchers.add(NONE_LEFT if seq is None else seq, wake)
        self._gate.flag.set()
        return watcher

    def _left(self, seq: int) -> int:
        """How many of the envelopes before `seq` may have no outcome, without those scheduled for later."""
        buffer, loop = self._buffer, self._send_loop
        assert buffer is not None
        return 0 if loop is None else max(0, min(len(buffer) - loop.queue.scheduled, seq))

    def _hurry(self) -> None:
        """What is left is to be sent soon: closing has begun."""
        self._news.append(self._hurry_now)
        self._gate.flag.set()

    def _hurry_now(self) -> None:
        assert self._send_loop is not None
        self._send_loop.hurry()

    def _end(self, timeout: float) -> int:
        """Gives up what was not sent, for good. How many envelopes that were."""
        end = monotonic() + timeout
        self._begin_end(timeout)
        return self._await_end(end + (_LAST_WORDS_S if self._given_up.has_callback else _LAST_NOTES_S))

    def _begin_end(self, timeout: float) -> None:
        if self._is_forked():
            return  # what was taken is the parent's
        with self._gate.lock:
            self._gate.close()
            self._ending = True
        try:
            # If the producer is ours, what is in flight has its outcome when this returns; else it goes on.
            self._use.release(timeout)
        finally:
            if self._thread is not None and self._thread.is_alive():  # else nobody takes it, and it keeps the agent
                self._news.append(self._give_up_flights)
                self._gate.flag.set()

    def _give_up_flights(self) -> None:
        assert self._send_loop is not None
        self._send_loop.flights.give_up()

    def _await_end(self, end: float) -> int:
        if self._is_forked():
            return 0
        thread = self._thread
        if thread is not None and thread.ident is not None and not comes_from(thread):
            thread.join(_seconds_until(end))
        self._prober.stop()
        self._calls.join(_seconds_until(end))
        return self._given_up.not_sent + self._given_up.uncounted()

    def _lost(self) -> int:
        """After the end: how many envelopes nobody is told of, after a crash or if a thread hangs."""
        return self._given_up.lost()

    def _stats(self) -> dict[str, int]:
        scheduled = in_flight = 0
        if self._send_loop is not None:
            scheduled, in_flight = self._send_loop.queue.scheduled, self._send_loop.queue.in_flight
        counts = {**self._counts, "failed": self._given_up.failed}
        return {**counts, "scheduled": scheduled, "in_flight_batches": in_flight}

    def __del__(self, warn: Callable[..., None] = warnings.warn) -> None:
        if getattr(self, "_ending", True):  # the constructor may have raised
            return
        if self._has_thread() and not self._is_forked():  # its thread releases the producer
            warn(f"unclosed {self if self._buffer is None else self._buffer!r}", ResourceWarning, source=self)


def _run(
    reference: weakref.ref[BaseSendingAgent],
    flag: Flag,
    use: ProducerUse,
    calls: tuple[UserCalls | CallQueue, ...],
) -> None:
    """An agent's thread. It holds only a weak reference while nothing depends on it: a forgotten agent is collected."""
    with Call(threading.current_thread()):  # encoders and hooks
        while (agent := reference()) is not None:
            loop = agent._send_loop
            if agent._thread is not threading.current_thread() or loop is None:
                return  # its start was interrupted, and another took its place
            pause = loop.round()
            if pause == OVER:
                flag.keep(None)
                return
            flag.keep(None)  # before the look: an envelope that comes after it keeps the agent by the flag
            if loop.is_idle():
                del agent
            del loop
            if pause != 0.0:
                flag.wait(pause, interruptible=False)
    use.release(0.0)
    for each in calls:
        each.stop()


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

    `send_batch` sends a batch under the circuit breaker, but does not send it again: for a caller that keeps it, such
    as an outbox. While the circuit is open, ``mark_circuit_open`` is called at once, and nothing is sent.

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
        on_failed: Called with an envelope that was given up and the reason, on a thread that senders share, where it
            must not wait for its sender: until it has ended, ``flush``, ``drain`` and ``close`` raise `SenderError`
            there, and in tasks and threads to which its context was copied. The calls of a sender come one at a time,
            in order; one that takes long does not hold up those of other senders. By default an error is logged, and
            `recent_failures` holds the last 1,000.
        dead_letter_topic: Where envelopes that are given up are sent, with the reason in headers. `on_failed` is then
            called for those only that cannot be sent there: they cannot be mapped, that topic fails as well, or the
            sender is closed. A dead letter that is on its way when closing gives up may be stored all the same.
        on_state_change: Called with the old and the new `CircuitState`, on the same thread.

    Raises:
        ConfigError: A value of the wrong type or out of its range.
    """

    # `send_batch` is `AnsweringSender`'s, in `native/answer.pxi`: it calls these three.

    def _send_answered(self, answer: Answer) -> Told:
        self._start()
        answer.trial = self._gate.admit()
        while True:
            producer: Any = self._handle.producer
            answer.then = functools.partial(self._gate.note_answer, producer)
            try:
                return send_answered(producer, self.topic, answer)
            except ProducerClosedError as error:
                if self._handle.fate(producer, error) != "successor":
                    raise

    def _refuse_answered(self, answer: Answer, error: BaseException) -> Told:
        return answer_refusal(self._handle.producer, answer.batch, error, answer.mapping)

    def _tell(self, report: DeliveryReport) -> Told:
        return answer_report(report)

    def close(self) -> None:
        """Ends an agent that has no `BatchedSender`, whose own ``close`` does this."""
        self._end(0)


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
