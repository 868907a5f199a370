"""Batches on their way: mapped, handed to librdkafka, and settled when each of their envelopes has its outcome."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from kbatch._codes import TIMED_OUT
from kbatch._errors import (
    DeliveryError,
    KbatchError,
    NotYetDueError,
    ProducerError,
    SenderError,
    SerializationError,
    has_culprit,
    is_abort,
    is_outage,
    named_exception_text,
    spares_brokers,
)
from kbatch._fastmap import monotonic
from kbatch._pending import PendingBatch
from kbatch._sending._queue import ExpiredError

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable

    from kbatch._fastmap import Accumulator
    from kbatch._recovery._gate import Gate, Verdict
    from kbatch._report import DeliveryReport
    from kbatch._sending._queue import Flight, SendQueue

__all__ = ["Flights"]


class Flights:
    """Sends the flights of a queue by the producer behind a gate.

    Args:
        news: Where the call that settles a flight is put, by the dispatcher's thread.
        counts: Of envelopes: "acked", "expired", "retried", "dead_letters".

    Attributes:
        tries_buffered_next: The next trial of the circuit is to be what was never sent.
    """

    def __init__(
        self,
        queue: SendQueue,
        buffer: Accumulator | None,
        gate: Gate,
        *,
        topic: str | None,
        max_in_flight: int,
        news: deque[Callable[[], None]],
        counts: dict[str, int],
    ) -> None:
        self.tries_buffered_next = False
        self._queue = queue
        self._buffer = buffer
        self._gate = gate
        self._topic = topic
        self._max_in_flight = max_in_flight
        self._news = news
        self._counts = counts
        self._answered_already: set[Flight] = set()
        self._last_success = -math.inf

    def may_depart(self) -> bool:
        """Whether another one may be sent."""
        return self._queue.in_flight < self._max_in_flight and self._gate.may_send()

    def send(self, flight: Flight) -> None:
        """Hands a flight to the drainer, or puts it back, or settles it at once."""
        queue, gate = self._queue, self._gate
        try:
            flight.trial = gate.admit()
        except SenderError:  # a send_batch was faster, or closing has begun
            queue.put_back(flight)
            return
        producer = gate.handle.producer
        rejected: list[tuple[int, SerializationError | NotYetDueError]] = []
        try:
            pending = PendingBatch(producer._core)
            pending._look()  # the agent tells of failures itself
            producer._core.map(pending, self._topic, flight.envelopes, rejected)
            if self._buffer is not None:
                self._buffer._learn_message_bytes(*pending.encoded_messages)
            producer._send_detached(pending, waker=functools.partial(self._on_settled, flight, pending, rejected))
        except ProducerError as error:
            queue.put_back(flight)
            gate.note_refusal(producer, error, flight.trial)
        except BaseException as error:  # a header_hook that fails, no memory, no threads, a sys.exit() in an encoder
            reason: KbatchError
            if isinstance(error, KbatchError):
                reason = error
            else:
                reason = SenderError(f"the producer could not take the batch: {named_exception_text(error)}")
                reason.__cause__ = error
            gate.note("nothing", flight.trial, monotonic())
            gate.last_error = reason
            failures = [(index, reason) for index in range(len(flight.envelopes))]
            ended, again = len(queue.ended), not gate.closed
            queue.settled(flight, failures, monotonic(), again=again)
            if again:
                self._counts["retried"] += len(failures) - (len(queue.ended) - ended)

    def _on_settled(
        self, flight: Flight, pending: PendingBatch, rejected: list[tuple[int, SerializationError | NotYetDueError]]
    ) -> None:
        # On the dispatcher's thread, which must not wait for us.
        self._news.append(functools.partial(self._settle, flight, pending, rejected))
        self._gate.flag.set()

    def _settle(
        self, flight: Flight, pending: PendingBatch, rejected: list[tuple[int, SerializationError | NotYetDueError]]
    ) -> None:
        queue, gate = self._queue, self._gate
        if flight in self._answered_already:  # it has its outcome
            self._answered_already.remove(flight)
            return
        report = pending.report
        now = monotonic()
        failures: list[tuple[int, KbatchError]] = []
        if report.failed:
            reasons = dict(rejected)
            failures = [(index, reasons.get(index, error)) for index, error in report.errors.items()]
        again = gate.is_alive()
        if not again:
            failures = [(index, self._as_refusal(error)) for index, error in failures]
        ended = len(queue.ended)
        late = _expired_but_perhaps_stored(flight, report)
        queue.settled(flight, failures + late, now, again=again)
        if report.acked:
            self._last_success = now
        if failures:
            gate.last_error = failures[-1][1]
        verdict = _verdict(flight, report.acked, failures, self._last_success) if again else "nothing"
        if flight.trial:
            self.tries_buffered_next = verdict != "succeeded" and flight.entries is not None
        gate.note(verdict, flight.trial, now, flight.envelopes)
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
            return self._gate.refusal(error)
        return error

    def give_up(self) -> None:
        """After the end of closing: what is still in flight has no outcome that is known."""
        for flight in self._queue.flights():
            self._answered_already.add(flight)
            failures = [
                (index, DeliveryError(TIMED_OUT, possibly_persisted=True)) for index in range(len(flight.envelopes))
            ]
            self._queue.settled(flight, failures, monotonic(), again=False)


def _verdict(flight: Flight, acked: int, failures: list[tuple[int, KbatchError]], last_success: float) -> Verdict:
    """What the end of a flight says about the brokers.

    An envelope that fails again and again counts as often only if that is for want of a broker, and nothing else has
    been stored since it failed first. Else one that no broker takes would stop all others. A dead letter never counts.
    """
    if acked:
        return "succeeded"
    guilt = has_culprit([error for _, error in failures])
    for index, error in failures:
        # A clock that was set back refuses what was due, and never failed.
        if isinstance(error, NotYetDueError) or spares_brokers(error) or (guilt and is_abort(error)):
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


def _stored_letters(flight: Flight, failures: list[tuple[int, KbatchError]]) -> int:
    if flight.entries is None:
        return 0
    letters = sum(1 for entry in flight.entries if entry.origin is not None)
    return letters - sum(1 for index, _ in failures if flight.entries[index].origin is not None)
