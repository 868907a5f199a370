"""What is on its way to a broker in memory: it waits for room, is in flight, times out or is answered."""

from __future__ import annotations

import functools
import math
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kbatch._codes import (
    MSG_TIMED_OUT,
    NOT_PERSISTED,
    POSSIBLY_PERSISTED,
    PURGE_INFLIGHT,
    PURGE_QUEUE,
    TIMED_OUT_QUEUE,
)
from kbatch._fastmap import Flag, monotonic
from kbatch.testing._memory_broker import Mapped, MemoryBroker, Outcome

if TYPE_CHECKING:
    from kbatch._fastmap import Batch, Envelope
    from kbatch.testing._memory import MemoryCore

__all__ = ["SHARE", "MemoryLine", "Sent"]

# A topic's share of the room, as `line.pxi` gives it.
SHARE = 4
_ALWAYS = 64
_MOST_ALWAYS = 128


@dataclass(eq=False)
class Sent:
    """A batch that was accepted and has no answer yet."""

    core: MemoryCore
    batch: Batch
    envelopes: tuple[Envelope[Any], ...]
    mapped: list[Mapped]
    enqueued: Callable[[], object] | None  # told when the batch waits for room no longer
    over_at: float  # when it times out
    is_in_flight: bool = False  # otherwise it waits for room
    may_have_arrived: bool = False

    def __post_init__(self) -> None:
        self.messages = Counter(record[0] for record in self.mapped if record is not None)  # by topic

    def settle(self, outcomes: list[Outcome]) -> None:
        self.core.settle_in_memory(self.batch, outcomes)
        self.tell_enqueued()  # who hears of it may look for the outcomes

    def fail(self, code: int) -> None:
        persistence = POSSIBLY_PERSISTED if self.may_have_arrived else NOT_PERSISTED
        if self.core.transactional and code == MSG_TIMED_OUT:
            persistence = NOT_PERSISTED  # the transaction is aborted
        self.settle([(code, persistence, -1 if record is None else record[1], -1) for record in self.mapped])

    def give_up(self) -> None:
        self.fail(PURGE_INFLIGHT if self.may_have_arrived else PURGE_QUEUE)

    def time_out(self) -> None:
        self.fail(MSG_TIMED_OUT if self.is_in_flight else TIMED_OUT_QUEUE)

    def tell_enqueued(self) -> None:
        if self.enqueued is not None:
            self.enqueued()
            self.enqueued = None


class MemoryLine(MemoryBroker):
    """A broker in memory and what is on its way to it. `lock` is to be held for every call but `wait_until`.

    A batch is in flight as a whole. It stays in `_sents` until it has its answer.
    """

    def __init__(self, partitions: int, partitioner: str) -> None:
        super().__init__(partitions, partitioner)
        # Not a Condition: its `__enter__` is Python code, and Ctrl-C at its end would leave it locked for ever.
        self.lock = threading.RLock()  # `when` may ask a producer
        self.holds = False
        self.is_down = False
        self._outage_s: float | None = None  # after which what is sent times out, if before delivery.timeout.ms
        self._sents: dict[Sent, None] = {}
        self._waiting: dict[Sent, None] = {}  # those of them that wait for room
        self._watchers: list[Flag] = []
        self._timer: threading.Thread | None = None
        self._timer_wakes_at = math.inf
        self._tick = Flag()

    # -- what comes

    def take(self, sent: Sent) -> None:
        """If this raises, `abandon` is to follow."""
        self._sents[sent] = self._waiting[sent] = None
        self._move_up()
        self._mind_time_of(sent)

    def has_some_of(self, core: MemoryCore) -> bool:
        return any(sent.core is core for sent in self._unanswered())

    def waits_for_room(self, sent: Sent) -> bool:
        return sent in self._sents and not sent.is_in_flight and not sent.batch.done()

    def in_flight(self) -> list[Sent]:
        return [sent for sent in self._unanswered() if sent.is_in_flight]

    def messages_without_room(self, core: MemoryCore) -> int:
        return sum(sent.messages.total() for sent in self._waiting if sent.core is core and self.waits_for_room(sent))

    def _unanswered(self) -> list[Sent]:
        # Ctrl-C may have come between an answer and the end of `_end`.
        return [sent for sent in self._sents if not sent.batch.done()]

    def _move_up(self) -> None:
        """What waits for room and has it departs, unless another batch of one of its topics waits longer."""
        stuck: set[tuple[MemoryCore, str]] = set()
        for sent in list(self._waiting):
            if not self.waits_for_room(sent):
                self._waiting.pop(sent, None)
                continue
            topics = {(sent.core, topic) for topic in sent.messages}
            if stuck.isdisjoint(topics) and self._has_room(sent):
                self._waiting.pop(sent, None)  # before it departs: `when` may send, and come here
                self._depart(sent)
            else:
                stuck |= topics

    def _has_room(self, sent: Sent) -> bool:
        core = sent.core
        if not sent.messages:
            return True
        most_used = core.without_outcome() - sent.messages.total()  # with what waits
        if not core.transactional and (SHARE + 1) * (most_used + 1) <= SHARE * core.room:
            return True  # wherever the others go to
        own: Counter[str] = Counter()
        for other in self.in_flight():
            if other.core is core:
                own += other.messages
        if core.transactional:
            return not own  # one transaction at a time
        used = own.total()
        always = max(1, min(min(core.room, core.queue_messages - used) // _ALWAYS, _MOST_ALWAYS))
        return all(
            max(max(0, SHARE * (core.room - used) - own[topic]) // (SHARE + 1), always - own[topic]) > 0
            for topic in sent.messages
        )

    def _depart(self, sent: Sent) -> None:
        sent.mapped = self.place(sent.mapped)
        if not sent.messages or not (self.holds or self.is_down):
            self._answer(sent)
            return
        now = monotonic()
        sent.over_at = now + sent.core.delivery_timeout_s
        if self.is_down and self._outage_s is not None:
            sent.over_at = min(sent.over_at, now + self._outage_s)
        sent.may_have_arrived = not self.is_down
        sent.is_in_flight = True
        sent.tell_enqueued()
        if sent.over_at <= now:
            self._end(sent, sent.time_out)
        self._mind_time_of(sent)

    # -- answers

    def _answer(self, sent: Sent) -> None:
        def answer() -> None:
            faults = self.judge(sent.envelopes, sent.mapped)
            sent.may_have_arrived = True
            sent.settle(self.receive(sent.envelopes, sent.mapped, faults, transaction=sent.core.transactional))

        try:
            self._end(sent, answer)
        except BaseException:  # Ctrl-C, or what a test's own `when` raises
            if not sent.batch.done():
                self._end(sent, sent.give_up)
            raise

    def _end(self, sent: Sent, settle: Callable[[], object]) -> None:
        try:
            settle()
        finally:
            if sent.batch.done():
                self._sents.pop(sent, None)
                self._waiting.pop(sent, None)
            self._tell()

    def release(self, batches: int | None) -> None:
        if batches is None:
            self.holds = False
        if self.is_down:
            return
        for sent in self.in_flight()[:batches]:
            if not sent.batch.done():
                self._answer(sent)
        self._move_up()

    def go_down(self, outage_s: float | None) -> None:
        self.is_down = True
        self._outage_s = outage_s
        now = monotonic()
        for sent in self.in_flight():
            if outage_s is not None:
                sent.over_at = min(sent.over_at, now + outage_s)
            self._mind_time_of(sent)
        self.expire()

    def come_up(self) -> None:
        self.is_down = False
        for sent in self.in_flight():
            sent.may_have_arrived = True
        if not self.holds:
            self.release(None)

    def abandon(self, batch: Batch) -> bool:
        """Sends nothing of a batch that waits for room. False if it is not there at all."""
        found = [sent for sent in self._sents if sent.batch is batch]
        for sent in found:
            if not (sent.is_in_flight or sent.batch.done()):
                self._end(sent, sent.give_up)
        self._move_up()
        return bool(found)

    def purge(self, core: MemoryCore) -> None:
        for sent in self.in_flight():
            if sent.core is core:
                self._end(sent, sent.give_up)
        self._move_up()

    def end_all(self, core: MemoryCore, code: int | None = None) -> None:
        """With an error, or else as given up."""
        for sent in self._unanswered():
            if sent.core is core:
                self._end(sent, sent.give_up if code is None else functools.partial(sent.fail, code))

    # -- waiting

    def wait_until(self, is_so: Callable[[], bool], timeout: float | None) -> bool:
        """Waits without the lock until `is_so`, which is asked with it; false after `timeout` seconds. Ctrl-C works."""
        end = math.inf if timeout is None else monotonic() + timeout
        flag = Flag()
        with self.lock:
            self._watchers.append(flag)
        try:
            while True:
                with self.lock:
                    if is_so():
                        return True
                left = end - monotonic()
                if left <= 0:
                    return False
                flag.wait(left)
        finally:
            with self.lock:
                self._watchers.remove(flag)

    def tell(self) -> None:
        """Something has changed for those that wait."""
        with self.lock:
            self._tell()

    def _tell(self) -> None:
        for flag in self._watchers:
            flag.set()
        if not self._sents:
            self._tick.set()  # the timer's thread ends

    # -- time-outs

    def _mind_time_of(self, sent: Sent) -> None:
        if sent not in self._sents or sent.over_at >= self._timer_wakes_at:
            return
        if self._timer is None:
            timer = threading.Thread(target=self._run_timer, name="kbatch-memory-timer", daemon=True)
            timer.start()  # it waits for the lock
            self._timer = timer
        else:
            self._tick.set()
        self._timer_wakes_at = sent.over_at

    def _run_timer(self) -> None:
        while (left := self._time_left()) is not None:  # this frame holds no batch while it waits
            self._tick.wait(left, interruptible=False)

    def _time_left(self) -> float | None:
        with self.lock:
            self.expire()
            self._timer_wakes_at = min((sent.over_at for sent in self._unanswered()), default=math.inf)
            if self._timer_wakes_at == math.inf:
                self._timer = None
                return None
            return max(0.0, self._timer_wakes_at - monotonic())

    def expire(self) -> None:
        """What is over its time has its answer."""
        now = monotonic()
        for sent in self._unanswered():
            if sent.over_at <= now and not sent.batch.done():
                self._end(sent, sent.time_out)
        self._move_up()
