"""What became of rows, until the database has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbatch._fastmap import monotonic
from kbatch._logs import Reminder, tell
from kbatch._outbox._store import HeldKey, RefusedWriteError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from kbatch._outbox._leases import Leases
    from kbatch._outbox._store import Failure, OutboxStore, Place
    from kbatch._recovery._deaths import Deaths

    # Is told of buckets that others have. Not kept: it is a method of what keeps this.
    OnLost = Callable[[Collection[int]], object]

__all__ = ["Unwritten"]

_TRY_AGAIN_S = 0.25


class Unwritten:
    """Answers that are not written yet. They stay here until they are, or until their bucket is another relay's: a
    database that does not answer is asked again.

    It is true if there is any.

    Args:
        leases: Without a lease nothing is written.
        on_lost: Told of the buckets whose lease the database says is lost.
        deaths: Told of the rows that were written as dead.

    Attributes:
        done, failures: Of rows in the hot table.
        done_later, failures_later: Of rows that came from `OutboxStore.read_due`.
        failures_at: When failures that the database has refused are tried again.
        refusal: Of the database, to write a failure.
        lets_go: Of a key that waits something was written, so that others of it may go on.
    """

    def __init__(self, leases: Leases, deaths: Deaths[int] | None) -> None:
        self.done: list[Place] = []
        self.done_later: list[Place] = []
        self.failures: list[Failure] = []
        self.failures_later: list[Failure] = []
        self.failures_at = 0.0
        self.refusal = Reminder()
        self.lets_go = False
        self._leases = leases
        self._deaths = deaths

    def __bool__(self) -> bool:
        return bool(self.done or self.done_later or self.failures or self.failures_later)

    def begin(self) -> None:
        """At the start of a run: what the database has refused in the last one it may take now."""
        self.failures_at = 0.0
        self.refusal.told_at = None

    def add(self, done: Sequence[Place], failures: Sequence[Failure], *, is_due: bool) -> None:
        """Learns what became of rows, which `is_due` says are of `later`."""
        if is_due:
            self.done_later += done
            self.failures_later += failures
        else:
            self.done += done
            self.failures += failures

    def write_at(self) -> float:
        """When it is to be written; in the past for now."""
        return 0.0 if self.done or self.done_later else self.failures_at

    def places(self) -> set[Place]:
        """The rows that it is about."""
        places = {*self.done, *self.done_later}
        for failures in (self.failures, self.failures_later):
            places.update((failure.bucket, failure.seq) for failure in failures)
        return places

    def busy(self, leaving: Collection[int]) -> set[int]:
        """The buckets that it is about. What the database refuses keeps none of `leaving`: the next relay sends it
        again."""
        busy = {place[0] for places in (self.done, self.done_later) for place in places}
        failed = {failure.bucket for failures in (self.failures, self.failures_later) for failure in failures}
        busy |= failed.difference(leaving) if monotonic() < self.failures_at else failed
        return busy

    def held_keys(self) -> list[HeldKey]:
        """The keys of rows that are on their way to `later`."""
        return [
            HeldKey(failure.bucket, failure.key_hash, failure.seq)
            for failure in self.failures
            if failure.due_in_s is not None and failure.key_hash is not None
        ]

    def forget(self, buckets: Collection[int]) -> None:
        """What is of these buckets is never written."""
        self.done = [place for place in self.done if place[0] not in buckets]
        self.done_later = [place for place in self.done_later if place[0] not in buckets]
        self.failures = [failure for failure in self.failures if failure.bucket not in buckets]
        self.failures_later = [failure for failure in self.failures_later if failure.bucket not in buckets]

    def clear(self) -> None:
        """Nothing of it is ever written."""
        self.done, self.done_later, self.failures, self.failures_later = [], [], [], []

    def write(self, store: OutboxStore, on_lost: OnLost) -> None:
        """Writes it, but for failures that the database refuses. An `OutboxError` leaves here what was not written."""
        if not self:
            return
        if monotonic() < self.failures_at:
            self._settle(store, on_lost, self.done, self.done_later, [], [])
            return
        try:
            self._settle(store, on_lost, self.done, self.done_later, self.failures, self.failures_later)
        except RefusedWriteError:
            self._write_apart(store, on_lost)

    def _write_apart(self, store: OutboxStore, on_lost: OnLost) -> None:
        """What is done first, then failures by halves: a row that the database lets nobody move stops no other."""
        self._settle(store, on_lost, self.done, self.done_later, [], [])
        for is_due in (False, True):
            failures = self.failures_later if is_due else self.failures
            if failures:
                self._move(store, on_lost, failures, is_due)

    def _move(self, store: OutboxStore, on_lost: OnLost, failures: list[Failure], is_due: bool) -> bool:
        """Whether the database lets these be moved. The first one that it refuses is found by halves."""
        try:
            self._settle(store, on_lost, [], [], [] if is_due else failures, failures if is_due else [])
        except RefusedWriteError as error:
            if len(failures) == 1:
                waiting = self.failures_later if is_due else self.failures
                waiting.append(waiting.pop(waiting.index(failures[0])))  # the others have their turn first
                self.failures_at = monotonic() + _TRY_AGAIN_S
                if self.refusal.tells_now(monotonic()):
                    tell("a relay cannot move what a broker has refused, and tries again: %s", error)
                return False
            half = len(failures) // 2
            return self._move(store, on_lost, failures[:half], is_due) and self._move(
                store, on_lost, failures[half:], is_due
            )
        return True

    def _settle(
        self,
        store: OutboxStore,
        on_lost: OnLost,
        done: Sequence[Place],
        done_later: Sequence[Place],
        failures: Sequence[Failure],
        failures_later: Sequence[Failure],
    ) -> None:
        """Writes all of what is done or none, and some of the failures."""
        buckets = {place[0] for places in (done, done_later) for place in places}
        buckets.update(failure.bucket for each in (failures, failures_later) for failure in each)
        if not buckets:
            return
        lost = store.settle(
            self._leases.tokens_of(buckets),
            done=done,
            done_later=done_later,
            failures=failures,
            failures_later=failures_later,
        )
        self.lets_go = self.lets_go or bool(done_later or failures_later)
        if self._deaths is not None:  # first: interrupted after it, it is told twice
            dead = [each for each in (*failures, *failures_later) if each.due_in_s is None and each.bucket not in lost]
            if dead:
                self._deaths.put(failure.seq for failure in dead)
        written = {*failures, *failures_later}
        self.done, self.done_later = [] if done else self.done, [] if done_later else self.done_later
        self.failures = [failure for failure in self.failures if failure not in written]
        self.failures_later = [failure for failure in self.failures_later if failure not in written]
        if lost:
            on_lost(lost)
