"""One run of a listener: what is read, what is under way, what is committed. One thread polls, any may handle."""

from __future__ import annotations

import logging
import sys
import threading
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from kbatch._codes import END_CODES, LISTENER_CODES, OVERTAKEN_CODES, UNKNOWN_TOPIC_CODES
from kbatch._errors import ListenerError, ProducerClosedError
from kbatch._fastmap import Flag, envelope_bytes, monotonic, wall_time
from kbatch._librdkafka import error_text
from kbatch._logs import tell
from kbatch._receiving._consumer import END, ConsumerCallError
from kbatch._receiving._delayed import Delayed
from kbatch._receiving._lanes import Work
from kbatch._receiving._missing import MissingTopics
from kbatch._receiving._positions import Positions
from kbatch._text import counted, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from kbatch._fastmap import ReceivedEnvelope
    from kbatch._receiving._consumer import ConsumerCore
    from kbatch._receiving._failures import Failures
    from kbatch._receiving._lanes import Waiting
    from kbatch._receiving._positions import Partition

__all__ = ["Limits", "Reading"]

_POLL_S = 0.05  # after so long without a record the group is asked what is new
_GATHER_S = 0.005  # for more room than a little
_COMMIT_POLL_S = 0.002
_LOOK_S = 1.0  # between two looks at handlers that take long
_REMIND_EVERY_S = 60.0
_COMMIT_TIMEOUT_S = 5.0
_LAST_COMMIT_S = 1.0  # also when the time to close is over
_RECORD_BYTES = 300  # that an envelope takes, besides what its record has


class Limits(NamedTuple):
    """What bounds a run."""

    records: int
    size: int  # bytes
    commit_interval_s: float
    close_timeout_s: float
    max_poll_interval_s: float


class Reading:
    """One run of a listener.

    Args:
        core: Its consumer; this run closes it.
        lane: What the records of one lane have in common, of an envelope; ``None``: it waits for nobody.
        failures: Which records are to wait for their time, and the topics that they are read from besides.
        wake: Called under the lock with how many calls of handlers may begin.
        give_up: Called when the time to close is over, if handlers still run.
        commits: Whether it commits what is done; else whoever handles it has done so.
    """

    def __init__(
        self,
        core: ConsumerCore,
        topics: list[str],
        waiting: Waiting,
        limits: Limits,
        lane: Callable[[ReceivedEnvelope], Hashable],
        failures: Failures,
        wake: Callable[[int], object],
        give_up: Callable[[], object] | None = None,
        *,
        commits: bool = True,
    ) -> None:
        self.core = core
        self._commits = commits
        self._topics = [*topics, *failures.delays]
        self._failures = failures
        self._limits = limits
        self._lane = lane
        self._wake = wake
        self._give_up = give_up
        self._flag = Flag()  # the thread that polls waits for it while a rebalance does
        self.is_stopping = False
        self._is_hurried = False  # it ends without waiting for handlers
        self.error: BaseException | None = None  # the first
        # Under the lock, all below. The lock is C's: Ctrl-C leaves it as it is.
        self.lock = threading.RLock()
        self._waiting = waiting
        self._positions = Positions()
        self._running: set[Work] = set()
        self._running_of: Counter[Partition] = Counter()
        self._in_flight = 0
        self._kept = 0  # of these are done, and held until the rest of their batch is
        self._size = 0
        self._counts: Counter[Partition] = Counter()  # in flight, of each partition
        self._sizes: Counter[Partition] = Counter()
        self._full: dict[Partition, tuple[int, int]] = {}  # not read until no more records, and bytes, are in flight
        self._reopened: list[Partition] = []
        self._waits_for_room = False
        self._is_finished = False  # what has not ended until now is read again
        self._is_over = False
        self._is_ended = False  # its consumer is closed
        self.handled = self.failed = self.rebalances = self.abandoned = 0
        # Of the thread that polls.
        self._leaving: set[Partition] | None = None  # a rebalance waits for their handlers
        self._leave_at = 0.0
        self._committing: list[tuple[str, int, int]] = []  # on their way
        self._next_commit = self._next_look = 0.0
        self._has_gathered = False
        self._delayed = Delayed()
        self._missing = MissingTopics(core)
        self._mean_size = 1_000_000.0  # bytes of a record, until one has come
        self._complaints: dict[tuple[object, ...], float] = {}

    # -- for any thread, and for a signal handler

    def stop(self, *, hurried: bool = False) -> None:
        """Lets the run end: no handler begins any more."""
        self.is_stopping = True
        if hurried:
            self._is_hurried = True
        self._nudge()

    def _nudge(self) -> None:
        self._flag.set()
        self.core.wake()

    def stats(self) -> dict[str, int]:
        with self.lock:
            return {
                "handled": self.handled,
                "failed": self.failed,
                "in_flight": self._in_flight - self._kept,
                "in_flight_bytes": self._size,
                "running": sum(work.left for work in self._running),
                "partitions": len(self._positions.partitions()),
                "full_partitions": len(self._full),
                "rebalances": self.rebalances,
                "abandoned": self.abandoned,
            }

    def lag(self) -> dict[Partition, int]:
        with self.lock:
            reached = self._positions.reached()
        if not reached:
            return {}
        try:
            ends = self.core.ends(reached)
        except ProducerClosedError:
            return {}
        return {partition: max(0, end - reached[partition]) for partition, end in ends.items()}

    def offsets(self) -> dict[Partition, tuple[int, int]]:
        """Of the partitions that are read, what the group has committed, and where the log ends. Brokers are asked for
        both: what a member knows of a partition may be old, and others may have handled it since."""
        with self.lock:
            partitions = self._positions.partitions()
        try:
            committed = self.core.committed(partitions, _COMMIT_TIMEOUT_S) if partitions else {}
            # In this order, so that none is behind what was committed.
            asked = [(*each, END) for each in committed]
            ends = self.core.offsets_for_times(asked, _COMMIT_TIMEOUT_S) if asked else {}
        except ProducerClosedError:
            return {}
        return {each: (committed[each], end) for each, end in ends.items()}

    # -- for those who handle: `done` or `put_off` comes once for what was taken; else `fail` or `abandon`, which end no
    # work that is not under way

    def is_given_up(self, work: Work) -> bool:
        """Whether what handles it should rather end than wait for something."""
        with self.lock:
            leaving = self._leaving is not None and work.partition in self._leaving
            return self.is_stopping or leaving or work.partition not in self._positions

    def holds(self, work: Work) -> bool:
        """Whether its partition is still the member's as it was when its records came, and the run has not ended."""
        with self.lock:
            return not self._is_finished and self._positions.holds(work.partition, work.places[0])

    def take(self, otherwise: Callable[[], object] | None = None) -> Work | None:
        """What is to be handled now; without it, under the lock, `otherwise` is called."""
        with self.lock:
            work = None if self.is_stopping else self._waiting.take(monotonic())
            if work is None:
                if otherwise is not None and not self._is_over:
                    otherwise()
                return None
            try:
                work.begun_at = monotonic()
                self._running_of[work.partition] += len(work.places)
                self._running.add(work)
                return work
            except BaseException as error:  # nobody has it
                self._fail(work, error)
                raise

    def is_over(self) -> bool:
        return self._is_over

    def done(self, work: Work) -> None:
        """It was handled: its offsets may be committed."""
        with self.lock:
            for place in work.places:
                self._positions.end(place)
            self.handled += work.left
            self._end_work(work)
            if work.copy is not None and len(self._waiting):  # this thread may be the producer's, and takes nothing
                self._wake(1)

    def fail(self, work: Work, error: BaseException) -> None:
        """It was not handled, and never will be by this run, which ends."""
        with self.lock:
            is_first = self._fail(work, error)
        if not is_first:  # a handler of logs may wait for the lock
            _tell_of_another(error)

    def _fail(self, work: Work, error: BaseException) -> bool:
        is_first = self._note_error(error)
        if work in self._running:  # no step was taken
            self.failed += work.left
            self._end_work(work)
        return is_first

    def put_off(self, work: Work, due: float) -> None:
        """It is to be taken again at this time. No thread waits for it, and what is behind it in its lane does."""
        now = monotonic()
        with self.lock:
            self._end_parts(work)
            is_leaving = self._leaving is not None and work.partition in self._leaving
            if self.is_stopping or is_leaving or not self._positions.holds(work.partition, work.places[0]):
                self._end_work(work)  # it is read again, here or elsewhere
                return
            self._leave_running(work)
            self._waiting.put_off(work, due)
            if due <= now:
                self._waiting.ripen(now)
                self._wake(1)

    def abandon(self, work: Work) -> None:
        """Its handler was ended when the time to close was over."""
        with self.lock:
            if work in self._running:
                self.abandoned += work.left
                self._end_work(work)

    def end_with(self, error: BaseException) -> None:
        if not self._note_error(error):
            _tell_of_another(error)

    def _note_error(self, error: BaseException) -> bool:
        """Whether it ends for no other error."""
        if self.error is None:
            self.error = error
        self.stop()
        return self.error is error

    def tell_unless(self, raised: BaseException) -> None:
        """Tells what it has ended for, if something else is raised."""
        if self.error is not None and self.error is not raised:
            _tell_of_another(self.error)

    def _end_parts(self, work: Work) -> None:
        # It comes here again each time that the next one is put off.
        while work.ended < (work.part or 0):
            self._positions.end(work.places[work.ended])
            work.ended += 1
            self.handled += 1
            self._kept += 1

    def _end_work(self, work: Work) -> None:
        self._leave_running(work)
        self._waiting.end(work, monotonic())
        self._release(work)

    def _leave_running(self, work: Work) -> None:
        self._running.discard(work)
        self._running_of[work.partition] -= len(work.places)
        if not self._running_of[work.partition]:
            del self._running_of[work.partition]
            if self._leaving is not None or (self.is_stopping and not self._running):
                self._nudge()

    def _release(self, work: Work) -> None:
        partition, records, limits = work.partition, len(work.places), self._limits
        self._in_flight -= records
        self._kept -= work.ended
        self._size -= work.size
        self._counts[partition] -= records
        self._sizes[partition] -= work.size
        marks = self._full.get(partition)
        if marks is not None and self._is_open_again(partition, marks):
            del self._full[partition]
            self._reopened.append(partition)
            self._nudge()
        if not self._counts[partition]:
            del self._counts[partition], self._sizes[partition]
        if self._waits_for_room and self._in_flight <= limits.records * 7 // 8 and self._size <= limits.size * 7 // 8:
            self._waits_for_room = False
            self._nudge()

    def _is_open_again(self, partition: Partition, marks: tuple[int, int]) -> bool:
        return (
            self._counts[partition] <= marks[0]
            and self._sizes[partition] <= marks[1]
            and self._positions.spread(partition) <= self._most_spread() // 2
        )

    def _most_spread(self) -> int:
        return 10 * self._limits.records

    # -- the thread that polls

    def run(self) -> None:
        """Reads until `stop`, or an error. Waits for handlers, commits, and closes the consumer."""
        try:
            self._run()
        except ProducerClosedError:  # at the end of the interpreter
            closed = ListenerError("the listener's consumer was closed under it")
            self.tell_unless(closed)
            raise closed from None
        except BaseException as error:
            self.tell_unless(error)
            raise

    def _run(self) -> None:
        try:
            try:
                self._poll()
            finally:
                self.is_stopping = True
                self._drain()
        finally:
            try:
                self._finish()
            finally:
                self.close()

    def close(self) -> None:
        """Nothing is read any more, or ever was. Those who wait for work are told."""
        if not self._is_ended:
            self.is_stopping = True
            self._missing.stop()
            with self.lock:
                self._is_over = True
                self._wake(sys.maxsize)  # all that wait: nothing will come
            self.core.close(_LAST_COMMIT_S if self._is_hurried else _COMMIT_TIMEOUT_S)
            self._is_ended = True

    def _poll(self) -> None:
        if self.is_stopping:
            return
        now = monotonic()
        self._next_commit, self._next_look = now + self._limits.commit_interval_s, now + _LOOK_S
        self._subscribe()
        while not self.is_stopping:
            self._turn()
            if self._missing.have_come and self._leaving is None:
                self._missing.have_come = False
                self._subscribe()

    def _subscribe(self) -> None:
        try:
            self.core.subscribe(self._topics, self._failures.delays)  # whose records were committed where they failed
        except ConsumerCallError as error:
            raise ListenerError(f"the topics cannot be subscribed to: {error.args[2]}", code=error.args[0]) from None

    def _drain(self) -> None:
        """Waits for the handlers that run. The group goes on to be polled."""
        deadline = monotonic() + self._limits.close_timeout_s
        with self.lock:
            self._drop(None)
        is_given_up = False
        while self._running:
            if monotonic() >= deadline or self._is_hurried:
                if is_given_up or self._give_up is None:
                    break
                is_given_up, self._is_hurried = True, False
                self._give_up()
                deadline = monotonic() + _LAST_COMMIT_S
            self._turn()

    def _finish(self) -> None:
        """Commits what was done, and says what was not."""
        with self.lock:
            self._is_finished = True
            left = sorted(self._running, key=lambda work: work.begun_at)
            self.abandoned += sum(work.left for work in left)
        if left:
            tell(
                "a listener of %s has ended while handlers still ran, and did not commit what they handle: it is read "
                "again (%s)",
                ", ".join(self._topics),
                "; ".join(_shown(work) for work in left[:10]) + ("; …" if len(left) > 10 else ""),
            )
        if self.core.started() and not self.core.closed():
            self._commit_and_wait(None, _LAST_COMMIT_S if left or self._is_hurried else _COMMIT_TIMEOUT_S)
            if self._leaving is not None:
                self.core.answer()

    def _turn(self) -> None:
        """One look at everything."""
        now = monotonic()
        with self.lock:
            due = self._waiting.ripen(now)
            room = 0 if self.is_stopping else self._room()
            if room <= 0:
                self._waiting.hurry()
            # Rather some records at a time than one by one.
            gathers = 0 < room < self._limits.records // 8 and not self._has_gathered
            self._has_gathered = gathers
            self._waits_for_room = room <= 0 or gathers
            reopened, self._reopened = self._reopened, []
            ready = len(self._waiting)
            if ready:
                self._wake(ready)
        if reopened:
            self.core.read([each for each in reopened if each in self._positions and each not in self._delayed])
        timeout = _POLL_S if due is None else min(_POLL_S, max(0.0, due - now))
        if room > 0 and self._leaving is None and (taken := self._accept_due(now, room)):
            room, timeout = room - taken, 0.0  # the next turn looks how much is left
        if self._committing:
            timeout = min(timeout, 10 * _COMMIT_POLL_S)
        if gathers:
            room, timeout = 0, min(timeout, _GATHER_S)
        if self._leaving is not None:
            self._flag.wait(timeout)
            self._look(0, 0.0)
            self._leave_when_drained()
        else:
            self._look(room, timeout)
        now = monotonic()
        self._take_commit_answer()
        if now >= self._next_commit and not self._committing:
            self._next_commit = now + self._limits.commit_interval_s
            self._begin_commit()
        if now >= self._next_look:
            self._next_look = now + _LOOK_S
            self._tell_of_long_ones(now)

    def _room(self) -> int:
        limits = self._limits
        records, size = limits.records - self._in_flight, limits.size - self._size
        if records <= 0 or size <= 0:
            return 0
        return min(records, max(1, int(size / 4 / self._mean_size)))

    def _look(self, most: int, timeout: float) -> None:
        envelopes, errors = self.core.poll(most, timeout)
        if envelopes:
            self._accept(envelopes)
        for error in errors:
            self._hear(*error)
        change = self.core.rebalance()
        if change is not None and self._leaving is None:
            self._rebalance(*change)

    def _puts_off(self, envelope: ReceivedEnvelope, now: float) -> bool:
        """Whether it waits for its time, or behind one that does."""
        left_s = self._failures.due_in_s(envelope, wall_time())
        partition = (envelope.topic, envelope.partition)
        if not left_s and partition not in self._delayed:
            return False
        if self._delayed.add(partition, envelope, now + left_s):
            self.core.read([partition], False)
        return True

    def _accept_due(self, now: float, most: int) -> int:
        due = self._delayed.take_due(now, most)
        if due:
            self._begin(due, now)
            self.core.read([each for each in self._delayed.take_empty() if each not in self._full])
        return len(due)

    def _accept(self, envelopes: list[ReceivedEnvelope]) -> None:
        now = monotonic()
        if self._failures.delays:
            for envelope in envelopes:
                self._failures.identify(envelope)
            envelopes = [envelope for envelope in envelopes if not self._puts_off(envelope, now)]
        if envelopes:
            self._begin(envelopes, now)

    def _begin(self, envelopes: list[ReceivedEnvelope], now: float) -> None:
        touched = set()
        size = 0
        with self.lock:
            for envelope in envelopes:
                partition = (envelope.topic, envelope.partition)
                place = self._positions.begin(partition, envelope.offset)
                if place is None:
                    continue
                own = envelope_bytes(envelope) + _RECORD_BYTES
                size += own
                work = Work(partition, (envelope,), (place,), own, self._lane(envelope))
                self._counts[partition] += 1
                self._sizes[partition] += own
                touched.add(partition)
                self._in_flight += 1
                self._size += own
                if self.is_stopping:
                    self._release(work)
                else:
                    self._waiting.add(work, now)
            full = [] if self.is_stopping else self._fill(touched)
            ready = len(self._waiting)
            if ready:
                self._wake(ready)
        self._mean_size = max(1.0, (self._mean_size + size / len(envelopes)) / 2)
        if full:
            self.core.read(full, False)

    def _fill(self, touched: Iterable[Partition]) -> list[Partition]:
        """Those that are not to be read further: one alone may not take all the room."""
        limits = self._limits
        if len(self._positions) < 2:
            touched = [each for each in touched if self._positions.spread(each) >= self._most_spread()]
        free = max(1, (limits.records - self._in_flight) // 2)
        free_size = max(1, (limits.size - self._size) // 2)
        full = []
        for partition in touched:
            count, size = self._counts[partition], self._sizes[partition]
            is_wide = self._positions.spread(partition) >= self._most_spread()
            if (count >= free or size >= free_size or is_wide) and partition not in self._full:
                self._full[partition] = (count // 2, size // 2)
                self._waiting.hurry(partition)
                full.append(partition)
        return full

    def _hear(self, code: int, text: str, topic: str | None, partition: int, offset: int) -> None:
        if code in END_CODES:
            return
        name, _ = error_text(code)
        text = printable(text)
        if code in LISTENER_CODES:
            where = "" if topic is None else f" ({topic}" + (f" [{partition}])" if partition >= 0 else ")")
            self.end_with(ListenerError(f"the consumer cannot go on: {text}{where} ({name})", code=code))
        else:
            if code in UNKNOWN_TOPIC_CODES and topic is not None and offset < 0 and not topic.startswith("^"):
                self._missing.add(topic)  # and this is not about a record
            place = "" if topic is None else f" ({topic})"
            self._complain((code, topic), "a consumer of %s: %s%s (%s)", ", ".join(self._topics), text, place, name)

    def _complain(self, what: tuple[object, ...], text: str, *arguments: object) -> None:
        """Logs a warning, but not the same one again and again."""
        now = monotonic()
        if now >= self._complaints.get(what, 0.0):
            if len(self._complaints) > 1_000:
                self._complaints.clear()
            self._complaints[what] = now + _REMIND_EVERY_S
            tell(text, *arguments)

    def _tell_of_long_ones(self, now: float) -> None:
        with self.lock:
            long = [
                work
                for work in self._running
                if not work.is_told and now - work.begun_at >= self._limits.max_poll_interval_s / 2
            ]
        for work in long:
            work.is_told = True
            tell(
                "a handler has run for %d s: %s. What comes behind it is not committed, and if its partition is to be "
                "given to another member, that one handles the record, too",
                now - work.begun_at,
                _shown(work),
            )

    # -- rebalances

    def _rebalance(self, gives: bool, partitions: list[Partition]) -> None:
        if gives:
            with self.lock:
                self._positions.give(partitions)
            self.rebalances += 1
            self.core.answer()
            return
        limit = min(self._limits.close_timeout_s, self._limits.max_poll_interval_s / 2)
        with self.lock:
            self._leaving = set(partitions)  # nothing of them begins any more, nor what is put off
            self._drop(self._leaving)
        self._leave_at = monotonic() + limit
        self._leave_when_drained()

    def _leave_when_drained(self) -> None:
        """What runs of the partitions may end, and is committed with the rest; then they are another's."""
        leaving = self._leaving
        if leaving is None:
            return
        if self.core.assignment_lost():  # also since they began to leave
            # They are another's already: nothing of them may be committed.
            self._take_away(leaving)
            return
        with self.lock:
            left = [work for work in self._running if work.partition in leaving]
        if left and monotonic() < self._leave_at:
            return
        if left:
            tell(
                "a listener gives partitions to another member while handlers still run: their records are handled "
                "again (%s)",
                "; ".join(_shown(work) for work in left[:10]),
            )
        self._commit_and_wait(leaving, _COMMIT_TIMEOUT_S)
        self._take_away(leaving)

    def _take_away(self, partitions: set[Partition]) -> None:
        with self.lock:
            self._drop(partitions)  # a record may have come by the group's queue since they began to leave
            self._positions.take(partitions)
        self.core.answer()
        self._leaving = None

    def _drop(self, partitions: set[Partition] | None) -> None:
        """Forgets what waits, of these partitions or of all. It is read again, here or elsewhere."""
        for work in self._waiting.drop(partitions):
            self._release(work)
        for partition in self._positions.partitions() if partitions is None else partitions:
            self._full.pop(partition, None)
        self._reopened = [each for each in self._reopened if partitions is not None and each not in partitions]
        self._delayed.forget(self._positions.partitions() if partitions is None else partitions)

    # -- commits

    def _begin_commit(self) -> None:
        if not self._commits:
            return
        with self.lock:
            offsets = self._positions.collect()
        if offsets:
            self._committing = offsets
            code = self.core.begin_commit(offsets)
            if code:
                self._take_failed_commit([(topic, number, code) for topic, number, _ in offsets])

    def _take_commit_answer(self) -> None:
        if self._committing:
            failed = self.core.commit_answer(self._committing)
            if failed:
                self._take_failed_commit(failed)
            elif failed is not None:
                self._committing = []

    def _take_failed_commit(self, failed: list[tuple[str, int, int]]) -> None:
        """Of those on their way these were not committed, for the reason of a code each."""
        self._committing = []
        with self.lock:
            self._positions.give_back(failed)
        for code, count in Counter(code for *_, code in failed).items():
            name, text = error_text(code)
            if code in LISTENER_CODES:
                self.end_with(ListenerError(f"offsets cannot be committed: {text} ({name})", code=code))
            elif code not in OVERTAKEN_CODES:
                self._complain(
                    ("commit", code),
                    "a consumer of %s could not commit %s, and tries again: %s (%s)",
                    ", ".join(self._topics),
                    counted(count, "offset"),
                    text,
                    name,
                )

    def _commit_and_wait(self, partitions: Iterable[Partition] | None, timeout: float) -> None:
        """Commits what is done of these partitions, or of all, and waits for the answer."""
        if not self._commits:
            return
        deadline = monotonic() + timeout
        while self._committing and monotonic() < deadline:
            self._take_commit_answer()
            if self._committing:
                self._flag.wait(_COMMIT_POLL_S)
        with self.lock:
            self._positions.give_back(self._committing)
            offsets = self._positions.collect(partitions)
        if not offsets:
            return
        failed = self.core.commit(offsets, max(0.1, deadline - monotonic()))
        if failed:
            with self.lock:
                self._positions.give_back(offsets)
            *_, code = failed[0]
            if code not in OVERTAKEN_CODES:
                name, text = error_text(code)
                tell(
                    "a consumer of %s could not commit %s: what was handled is read again: %s (%s)",
                    ", ".join(self._topics),
                    counted(len(failed), "offset"),
                    text,
                    name,
                )


def _tell_of_another(error: BaseException) -> None:
    tell("a listener ends for another error already; this one came, too", level=logging.ERROR, exc_info=error)


def _shown(work: Work) -> str:
    topic, partition = work.partition
    first, last = work.places[0].offset, work.places[-1].offset
    return f"{topic} [{partition}] at offset {first}" + (f" to {last}" if last != first else "")
