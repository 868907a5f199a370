"""A batch of rows on its way, and what its answer means for each of them. No threads, no clock, no database."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kbatch._codes import TIMEOUT_CODES, WHOLE_BATCH_CODES, blamed
from kbatch._errors import DeliveryError, KbatchError, is_outage, spare_brokers
from kbatch._outbox._store import Failure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kbatch._errors import DeserializationError, SerializationError
    from kbatch._fastmap import Trial
    from kbatch._outbox._store import Place
    from kbatch._pending import PendingBatch
    from kbatch._recovery._gate import Verdict
    from kbatch._recovery._retry import RetryPolicy

__all__ = ["Answers", "Judge", "RowFlight"]


@dataclass(eq=False)
class RowFlight:
    """Rows that are sent together.

    Attributes:
        is_due: They come from those that wait for their next attempt, and each is alone in its record batch.
        attempts: Of each, how often it was refused; empty for none.
        tokens: Of each bucket the token of the lease when they were handed over.
    """

    places: list[Place]
    packed: list[bytes]
    deliver_by: list[int | None] | None
    tokens: dict[int, int]
    is_due: bool = False
    attempts: list[int] = field(default_factory=list)
    trial: Trial | None = None
    pending: PendingBatch | None = None
    rejected: list[tuple[int, SerializationError | DeserializationError]] = field(default_factory=list)


@dataclass
class Answers:
    """What becomes of the rows of a flight.

    Attributes:
        done: To be deleted: acknowledged, or expired.
        failures: To be moved.
        moved: How many of `failures` are "refused", "put_off" without an attempt counted, and "dead".
        unsent: Stay where they are and are sent again.
        verdict: What the flight says about the brokers.
    """

    done: list[Place]
    failures: list[Failure]
    moved: dict[str, int]
    unsent: list[Place]
    verdict: Verdict
    acked: int
    expired: int
    last_error: KbatchError | None


class Judge:
    """Decides about what was not acknowledged.

    What no broker answered for stays in its place, and counts no attempt; if it was due, it is due again later, so that
    others are due before it. What has timed out before, while other
    records of its flight were acknowledged, or while a probe has shown that brokers answer, is put off, so that one
    partition without a leader does not stop all others; that counts no attempt either. A refusal counts one. What can
    never be accepted is dead at once.

    Args:
        key_of: The number of the key of packed bytes.
        random: From 0 to 1, for the back-off.
    """

    def __init__(self, policy: RetryPolicy, key_of: Callable[[bytes], int | None], random: Callable[[], float]) -> None:
        self._policy = policy
        self._key_of = key_of
        self._random = random
        self._timed_out: set[Place] = set()

    def forget(self) -> None:
        """Forgets what has timed out."""
        self._timed_out.clear()

    def answers(self, flight: RowFlight) -> Answers:
        """What becomes of the rows of a settled flight."""
        assert flight.pending is not None
        report = flight.pending.report
        if not report.failed:
            if self._timed_out:
                self._timed_out.difference_update(flight.places)
            verdict: Verdict = "succeeded" if report.acked else "nothing"
            return Answers(flight.places, [], {}, [], verdict, report.acked, report.expired, None)
        reasons: Mapping[int, KbatchError] = {**report.errors, **dict(flight.rejected)}
        failures: list[Failure] = []
        moved = {"refused": 0, "put_off": 0, "dead": 0}
        unsent: list[Place] = []
        is_partial = bool(report.acked) or flight.trial is not None
        for index, error in reasons.items():
            failure = self._failure(flight, index, error, is_partial)
            if failure is None:
                unsent.append(flight.places[index])
                continue
            failures.append(failure)
            counted = failure.attempts > (flight.attempts[index] if flight.attempts else 0)
            moved["dead" if failure.due_in_s is None else "refused" if counted else "put_off"] += 1
        done = [place for index, place in enumerate(flight.places) if index not in reasons]
        self._timed_out.difference_update(done, ((failure.bucket, failure.seq) for failure in failures))
        for index, error in reasons.items():
            if isinstance(error, DeliveryError) and error.code in TIMEOUT_CODES:
                self._timed_out.add(flight.places[index])
        last = reasons[max(reasons)]
        verdict = self._verdict(flight, report.acked, reasons)
        return Answers(done, failures, moved, unsent, verdict, report.acked, report.expired, last)

    def _verdict(self, flight: RowFlight, acked: int, reasons: Mapping[int, KbatchError]) -> Verdict:
        if acked:
            return "succeeded"
        # What is due is what failed before. If it counted, a topic that refuses everything would stop all others.
        if flight.is_due and flight.trial is None:
            return "nothing"
        return "nothing" if spare_brokers(reasons.values()) else "failed"

    def _failure(self, flight: RowFlight, index: int, error: KbatchError, is_partial: bool) -> Failure | None:
        """Where a row goes; ``None`` if it stays."""
        bucket, seq = place = flight.places[index]
        attempts = flight.attempts[index] if flight.attempts else 0
        due_in_s: float | None
        if not isinstance(error, DeliveryError):  # damaged, or larger than this producer sends
            due_in_s, attempts = None, attempts + 1
        elif is_outage(error) or blamed(error.code) == "cluster":
            again = is_partial and place in self._timed_out and error.code in TIMEOUT_CODES
            if not (again or flight.is_due):
                return None
            due_in_s = self._policy.delay_s(max(attempts, 1), self._random)
        elif error.code in WHOLE_BATCH_CODES and not flight.is_due:
            due_in_s = 0.0  # it may have been refused for another of its record batch: the next time it is alone
        else:
            attempts += 1
            most = self._policy.max_attempts
            is_final = blamed(error.code) == "envelope" and not error.retriable
            is_last = most is not None and attempts >= most
            due_in_s = None if is_final or is_last else self._policy.delay_s(attempts, self._random)
        try:
            key_hash = self._key_of(flight.packed[index])
        except (TypeError, ValueError):
            key_hash = None
        return Failure(bucket, seq, due_in_s, attempts, str(error), key_hash)
