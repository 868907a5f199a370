"""Carries out what `Failures` decides: again later, sent on, or the end. For the listeners of threads and of loops."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from kbatch._errors import KbatchError, named_exception_text, spares_brokers
from kbatch._fastmap import envelope_bytes, monotonic, wall_time
from kbatch._logs import tell
from kbatch._receiving._failures import is_outage
from kbatch._recovery._retry import RetryPolicy, entropy

if TYPE_CHECKING:
    from collections.abc import Callable

    from kbatch._fastmap import Envelope, ReceivedEnvelope
    from kbatch._receiving._failures import Failures
    from kbatch._receiving._lanes import Work
    from kbatch._recovery._deaths import Deaths

    Dead: TypeAlias = tuple[ReceivedEnvelope[Any], Exception]  # a record, and why it is a dead letter

__all__ = ["CopyTaker", "Failing", "OvertakenError", "Steps", "TakenFrom"]

_COPY_AGAIN = RetryPolicy(max_attempts=None, initial_backoff_s=0.2, max_backoff_s=5.0)
_TOLD_EVERY_S = 30.0  # of an outage


class OvertakenError(Exception):
    """Nothing was committed, and the records are another's now, or the listener stops."""


class Steps(Protocol):
    """What becomes of work that was taken: one of these, each time that it is taken. For any thread."""

    def done(self, work: Work) -> None:
        """It was handled, or its copy was stored: its offsets may be committed."""

    def fail(self, work: Work, error: BaseException) -> None:
        """It is not done, and never will be by this run, which ends with the error. If another step has come before, as
        of one that was interrupted, the run ends and the work stays as it is."""

    def put_off(self, work: Work, due: float) -> None:
        """It is to be taken again at this time. What is behind it in its lane waits."""


class TakenFrom(Steps, Protocol):
    """A run, to those who wait for its inbox."""

    def is_given_up(self, work: Work) -> bool:
        """Whether what handles it should rather end than wait for something."""

    def abandon(self, work: Work) -> None:
        """Nobody goes on with it, here."""

    def holds(self, work: Work) -> bool:
        """Whether its partition is still the member's as it was when its records came."""


class CopyTaker(Protocol):
    """Where copies go: `Copies`, `Transacting`, or a test's own."""

    def send(self, work: Work, answer: Callable[[KbatchError | OvertakenError | None], object]) -> None:
        """Stores `work.copy`; `answer` is called once."""


class Failing:
    """What a listener does when handling has failed. For any number of threads.

    Args:
        failures: Decides.
        copies: Takes what is sent on; ``None`` where nothing is.
        now, wall: A test's own clocks.
        deaths: Is told of dead letters.
    """

    def __init__(
        self,
        failures: Failures,
        copies: CopyTaker | None,
        now: Callable[[], float] = monotonic,
        wall: Callable[[], float] = wall_time,
        deaths: Deaths[Dead] | None = None,
    ) -> None:
        self._failures = failures
        self._deaths = deaths
        self._copies = copies
        self._now, self._wall = now, wall
        self._lock = threading.RLock()  # re-entrant: a signal handler may come from within
        self._counts = {"attempts_failed": 0, "to_retry": 0, "dead": 0}
        self._outage_told_at: float | None = None

    def stats(self) -> dict[str, int]:
        """``attempts_failed``, ``to_retry`` and ``dead``."""
        return self._counts.copy()

    # -- after each time that work was taken

    def handled(self, steps: Steps, work: Work) -> None:
        """The handler has returned."""
        if work.next_part():
            steps.put_off(work, self._now())
        else:
            steps.done(work)

    def failed(self, steps: Steps, work: Work, error: BaseException) -> bool:
        """The handler has raised, or the record could not be read. Whether no step was taken, since the work has a copy
        now, which is sent next."""
        if is_outage(error):
            work.outages += 1
        else:
            work.failures += 1
            work.outages = 0
            self._count("attempts_failed")
        fate = self._failures.judge(work.envelope, error, work.failures, work.outages, self._wall(), entropy)
        if fate.after_s is None and isinstance(error, Exception) and work.split():
            # One of a batch may be to blame, so each is handled alone.
            self._tell(work, f"a batch failed, and each of its records is handled alone: {fate.told}", error)
            steps.put_off(work, self._now())
            return False
        if not fate.is_outage or self._may_tell_outage():
            self._tell(work, fate.told, error if fate.after_s is None else None)
        if fate.copy is not None:
            work.copy, work.failures = fate.copy, 0
            if self._deaths is not None and isinstance(error, Exception) and not self._is_tried_again(fate.copy):
                work.cause = error
            return True
        if fate.after_s is not None:
            steps.put_off(work, self._now() + fate.after_s)
        else:
            steps.fail(work, error)
        return False

    def overtaken(self, steps: Steps, work: Work, error: Exception) -> None:
        """As `failed`, of work whose partition is this member's no more, or whose run is over: it is read again."""
        if not is_outage(error):
            self._count("attempts_failed")
        told = "left alone, since its partition was taken from this member meanwhile, or the listener has ended: "
        told += named_exception_text(error)
        self._tell(work, told, error)
        steps.put_off(work, self._now())

    def send_on(self, steps: Steps, work: Work) -> None:
        """Sends the copy that the work has, in place of handling it."""
        assert self._copies is not None
        self._copies.send(work, functools.partial(self.sent_on, steps, work))

    def sent_on(self, steps: Steps, work: Work, error: KbatchError | OvertakenError | None) -> None:
        """The copy is stored, or why not. On a thread of the producer, or on the one that sends."""
        try:
            self._judge_copy(steps, work, error)
        except BaseException as raised:  # no memory
            steps.fail(work, raised)

    def _judge_copy(self, steps: Steps, work: Work, error: KbatchError | OvertakenError | None) -> None:
        copy = work.copy
        assert copy is not None
        if error is None:
            self._count("to_retry" if self._is_tried_again(copy) else "dead")
            if work.cause is not None and self._deaths is not None:
                self._deaths.put([(work.envelope, work.cause)], envelope_bytes(work.envelope))
            work.cause = None  # its traceback has the work
            if work.next_part():
                work.copy = None
                steps.put_off(work, self._now())
            else:
                steps.done(work)
        elif isinstance(error, OvertakenError):
            steps.put_off(work, self._now())  # dropped: it is for another one to send it on
        elif spares_brokers(error) and not getattr(error, "retriable", False):
            self._tell(work, f"the listener ends, since {copy.topic} does not take it: {error}", None)
            steps.fail(work, error)
        else:
            work.failures += 1
            if self._may_tell_outage():
                self._tell(work, f"not stored in {copy.topic} yet, and sent again until it is: {error}", None)
            steps.put_off(work, self._now() + _COPY_AGAIN.delay_s(work.failures, entropy))

    def _is_tried_again(self, copy: Envelope[Any]) -> bool:
        return copy.topic in self._failures.delays

    # -- what is told

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def _may_tell_outage(self) -> bool:
        # Each record meets it.
        now = self._now()
        with self._lock:
            if self._outage_told_at is not None and now - self._outage_told_at < _TOLD_EVERY_S:
                return False
            self._outage_told_at = now
            return True

    def _tell(self, work: Work, told: str, error: BaseException | None) -> None:
        envelope = work.envelope
        place = (envelope.topic, envelope.partition, envelope.offset)
        tell("record %s [%d] at offset %d: %s", *place, told, exc_info=error)
