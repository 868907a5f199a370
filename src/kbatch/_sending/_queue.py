"""What a sender sends next: retries, what waits for the order of its key, what is scheduled for later.

No threads, no I/O and no clock: each call says what time it is (``now``, seconds of a monotonic clock; ``wall``,
seconds since 1970). In the usual case, when nothing has failed, a batch passes through as it is and nothing is done per
envelope.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from kbatch._codes import TIMED_OUT
from kbatch._errors import (
    DeliveryError,
    NotYetDueError,
    SenderError,
    SerializationError,
    aborts,
    has_culprit,
    is_abort,
    is_for_whole_batch,
    is_outage,
    spares_brokers,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from kbatch._errors import KbatchError
    from kbatch._fastmap import Envelope, Trial
    from kbatch._recovery._retry import RetryPolicy

__all__ = ["Ended", "Entry", "ExpiredError", "Flight", "SendQueue"]


class Formed(Protocol):
    """A batch as it comes; `FormedBatch` is one."""

    @property
    def envelopes(self) -> list[Envelope[Any]]: ...
    @property
    def first_seq(self) -> int: ...
    @property
    def accepted_at(self) -> float: ...
    @property
    def scheduled(self) -> bool: ...
    @property
    def sizes(self) -> Sizes: ...


class Sizes(Protocol):
    """What each envelope of a batch was counted as when it was taken, and is given back as."""

    @property
    def total(self) -> int: ...
    def __getitem__(self, index: int, /) -> int: ...


class Entry:
    """An envelope that has failed before, or that waits for something."""

    __slots__ = (
        *("accepted_at", "apart", "attempts", "envelope", "error", "failed_at", "failures", "group", "origin"),
        *("possibly_persisted", "seq", "setbacks", "size"),
    )

    def __init__(
        self, envelope: Envelope[Any], seq: int, accepted_at: float, group: Hashable | None, size: int
    ) -> None:
        self.envelope = envelope
        self.size = size  # bytes, as it was counted when it was taken
        self.seq = seq  # the order of sending
        self.accepted_at = accepted_at
        self.group = group  # what its order is kept in
        self.attempts = 0  # that count
        self.failures = 0  # all
        self.setbacks = 0  # those that were not its own fault
        self.failed_at: float | None = None  # for the first time
        self.error: KbatchError | None = None  # the last
        self.possibly_persisted = False  # by one of its attempts
        self.apart = False  # it had its transaction aborted, so that it must not go with others again
        self.origin: Ended | None = None  # of a dead letter


class ExpiredError(SenderError):
    """Of an envelope whose ``deliver_by`` has passed, and that may have been stored by an earlier attempt."""


class Ended(NamedTuple):
    """An envelope that is not sent again."""

    entry: Entry
    error: KbatchError

    @classmethod
    def of(cls, entry: Entry, error: KbatchError) -> Ended:
        """Told with `error`, unless an earlier attempt may have been stored and `error` does not say so."""
        if entry.possibly_persisted and not (isinstance(error, DeliveryError) and error.possibly_persisted):
            last = error if isinstance(error, DeliveryError) else entry.error
            code = last.code if isinstance(last, DeliveryError) else TIMED_OUT
            cause, error = error, DeliveryError(code, possibly_persisted=True)
            error.__cause__ = cause
        return cls(entry, error)


class Flight:
    """Envelopes that are sent together."""

    __slots__ = ("accepted_at", "departed_at", "entries", "envelopes", "isolated", "seqs", "sizes", "trial")

    def __init__(
        self,
        envelopes: Sequence[Envelope[Any]],
        seqs: Sequence[int],
        accepted_at: float,
        sizes: Sizes | list[int],
        entries: list[Entry] | None = None,
        *,
        isolated: bool = False,
    ) -> None:
        self.sizes = sizes
        self.envelopes = envelopes
        self.seqs = seqs
        self.accepted_at = accepted_at
        self.entries = entries  # of envelopes that have one
        self.isolated = isolated  # nothing else is in flight meanwhile
        self.trial: Trial | None = None  # of the circuit breaker; the agent's own
        self.departed_at = 0.0

    @property
    def bytes(self) -> int:
        """What its envelopes were counted as."""
        return sum(self.sizes) if isinstance(self.sizes, list) else self.sizes.total


class _Lane:
    """The envelopes of one group that wait behind one of them."""

    __slots__ = ("busy", "due", "entries")

    def __init__(self) -> None:
        self.entries: list[Entry] = []  # by seq
        self.due = 0.0  # when the first may be sent
        self.busy = False  # strict order: one of the group is in flight, or about to be

    def insert(self, entry: Entry) -> bool:
        """Whether it became the first."""
        if not self.entries or self.entries[-1].seq < entry.seq:
            self.entries.append(entry)
        else:
            insort(self.entries, entry, key=attrgetter("seq"))
        return self.entries[0] is entry


class SendQueue:
    """The envelopes of one sender that are not in the buffer any more, and which of them to send when.

    Order is kept per *group*: the envelopes of one topic and key, or of one topic and partition if they have no key.
    Others have no order among them once one has failed. When an envelope fails and is to be sent again, those of its
    group that were not sent yet wait behind it. With `strict_order` at most one envelope of a group is in flight,
    so that those which are already under way cannot overtake it either.

    A broker refuses a record batch as a whole (see DESIGN.md), so an envelope that failed with a code of
    `WHOLE_BATCH_CODES` may be innocent. Such envelopes are sent again with nothing else in flight, in halves of halves,
    until those that are refused alone are found.

    A transaction is aborted for one of its envelopes. The others go again at once. Its causes go *apart*,
    with none but their like and what waits behind them.
    """

    def __init__(
        self,
        topic: str | None,
        policy: RetryPolicy,
        *,
        batch_size: int,
        batch_bytes: int,
        strict_order: bool,
        keep_scheduled: bool,
        random: Callable[[], float],
    ) -> None:
        self.ended: list[Ended] = []  # `Endings.see_off` takes them out
        self.in_flight = 0  # flights
        self._topic = topic
        self._policy = policy
        self._batch_size = batch_size
        self._batch_bytes = batch_bytes
        self._strict = strict_order
        self._keep_scheduled = keep_scheduled
        self._random = random
        self._flights: dict[Flight, None] = {}  # in their order
        self._isolating = False
        self._suspects: list[list[Entry]] = []  # the last is the next
        self._ready: deque[Entry] = deque()
        self._lanes: dict[Hashable, _Lane] = {}
        # (due, seq, group of a lane or None, entry without a lane or None); a lane's timer counts if it is the lane's
        # due
        self._timers: list[tuple[float, int, Hashable | None, Entry | None]] = []
        self._scheduled: list[tuple[float, int, Entry]] = []  # by time since 1970
        self._looked = (0.0, 0.0)  # at these, by both clocks: `now` and `wall`
        # Of the entries without an outcome and of flights without entries: the (first) numbers, but not those that are
        # kept for their time; and a heap that has all of them, and others that are dropped when they are met.
        self._open: set[int] = set()
        self._by_age: list[int] = []
        self._longest_delay_s = policy.max_backoff_s

    # -- sending

    def wants_batch(self) -> bool:
        """Whether `take` may be called: nothing older is ready."""
        return not self._ready and not self._suspects and not self._isolating

    def take(self, batch: Formed, now: float, wall: float) -> Flight | None:
        """A batch that comes from the buffer; what of it may be sent now, if anything."""
        envelopes = batch.envelopes
        seqs: Sequence[int] = range(batch.first_seq, batch.first_seq + len(envelopes))
        sizes: Sizes | list[int] = batch.sizes
        if self._lanes or self._strict or (batch.scheduled and self._keep_scheduled):
            envelopes, seqs, sizes = self._divert(batch, wall)
            if not envelopes:
                return None
        return self._depart(Flight(envelopes, seqs, batch.accepted_at, sizes), now)

    def next_flight(self, now: float, wall: float) -> Flight | None:
        """What waits here and may be sent now."""
        if self._is_blocked():
            return None
        suspects = self._next_suspects(now)
        if suspects:
            self._isolating = True
            return self._depart(_flight_of(suspects, isolated=True), now)
        self._call_due(now, wall)
        chosen: list[Entry] = []
        size = 0
        while self._ready and len(chosen) < self._batch_size:
            entry = self._ready.popleft()
            lane = None if self._strict or entry.group is None else self._lanes.get(entry.group)
            if lane is not None:
                lane.insert(entry)  # one before it has failed meanwhile
                continue
            if self._end_if_too_old(entry, now):
                continue
            size += entry.size
            if chosen and (size > self._batch_bytes or not _may_join(entry, chosen)):
                self._ready.appendleft(entry)
                break
            chosen.append(entry)
        return self._depart(_flight_of(chosen), now) if chosen else None

    def expire_batch(self, batch: Formed, now: float, wall: float, error: KbatchError) -> None:
        """A batch that comes from the buffer too late: ends what of it does not wait for its time, nor did lately."""
        for seq, envelope in enumerate(batch.envelopes, batch.first_seq):
            entry = Entry(envelope, seq, batch.accepted_at, None, batch.sizes[seq - batch.first_seq])
            due = envelope.scheduled_time if batch.scheduled and self._keep_scheduled else None
            if due is not None and not self._is_past(max(entry.accepted_at, now - (wall - due.timestamp())), now):
                entry.group = self._group(envelope)
                self._keep_until_due(entry)
            else:
                self._end(entry, error)

    def put_back(self, flight: Flight) -> None:
        """A flight that was not sent after all."""
        self._land(flight)
        entries = [self._entry(flight, index) for index in range(len(flight.envelopes))]
        if flight.isolated:
            self._suspects.append(entries)
        else:
            self._ready.extendleft(reversed(entries))

    def settled(self, flight: Flight, failures: Sequence[tuple[int, KbatchError]], now: float, *, again: bool) -> None:
        """A flight has settled: these of its envelopes failed, the others are done with.

        Unless `again`, none is sent again.
        """
        self._land(flight)
        again_at: dict[int, float] = {}
        suspects: list[Entry] = []
        failed: set[int] = set()
        guilt = has_culprit([error for _, error in failures])
        for index, error in failures:
            entry = self._entry(flight, index)
            if again and self._keep_scheduled and _was_early(error):
                self._keep_until_due(entry)  # the clock was set back
                continue
            if not isinstance(error, ExpiredError):
                entry.error = error
            entry.failures += 1
            innocent = guilt and is_abort(error)
            entry.apart = guilt and aborts(error)
            entry.setbacks += not (innocent or spares_brokers(error))
            if entry.failed_at is None:
                entry.failed_at = now
            entry.possibly_persisted |= isinstance(error, DeliveryError) and error.possibly_persisted
            if not again or not self._may_go_again(entry, error, flight, now):
                self._end(entry, error)
                continue
            failed.add(index)
            lane = None if entry.group is None else self._lanes.get(entry.group)
            behind = lane is not None and lane.entries and lane.entries[0].seq < entry.seq
            if is_for_whole_batch(error) and not behind:
                suspects.append(entry)
                continue
            if innocent:
                self._wait_until(now, entry)
                continue
            due = again_at.get(entry.setbacks)
            if due is None:  # one for all, so that what failed together goes again together
                delay_s = min(self._policy.delay_s(max(1, entry.setbacks), self._random), self._longest_delay_s)
                due = again_at[entry.setbacks] = now + delay_s
            self._wait_until(due, entry)
        if suspects:
            self._suspect(suspects, flight.isolated)
        if flight.entries is not None:
            for index, entry in enumerate(flight.entries):
                if index not in failed:
                    self._open.discard(entry.seq)
        if self._strict:
            for index in range(len(flight.envelopes)):
                if index not in failed:
                    group = flight.entries[index].group if flight.entries else self._group(flight.envelopes[index])
                    if group is not None:
                        self._free(group)

    def add_dead_letter(self, envelope: Envelope[Any], origin: Ended, now: float) -> None:
        """An envelope that is to be sent instead of one that ended."""
        entry = self._opened(Entry(envelope, origin.entry.seq, now, None, origin.entry.size))
        entry.origin = origin
        self._ready.append(entry)

    # -- when the circuit breaker is to be closed, or the sender

    def hasten(self, now: float) -> None:
        """What waits for its next attempt may have it now, the oldest first."""
        hastened: list[tuple[float, int, Hashable | None, Entry | None]] = []
        for group, lane in self._lanes.items():
            if lane.entries and not lane.busy:
                lane.due = now
                hastened.append((now, lane.entries[0].seq, group, None))
        hastened += [(now, entry.seq, None, entry) for _, _, _, entry in self._timers if entry is not None]
        self._timers = hastened
        heapq.heapify(self._timers)

    def hurry(self, now: float, at_most_s: float) -> None:
        """As `hasten`; and from now on no attempt is put off for longer than so many seconds."""
        self._longest_delay_s = min(self._longest_delay_s, at_most_s)
        self.hasten(now)

    def step_aside(self, now: float) -> None:
        """What is ready lets a batch of `take` go first, as far as the order of its group allows."""
        ready, self._ready = self._ready, deque()
        for entry in ready:
            self._wait_until(now, entry)

    # -- time

    def due_at(self, now: float, wall: float) -> float | None:
        """When `next_flight` should be asked again, if nothing else happens."""
        if self._is_blocked():
            return None
        if self._ready or self._suspects:
            return now
        due = self._timers[0][0] if self._timers else None
        if self._scheduled:
            at = now + max(0.0, self._scheduled[0][0] - wall)
            due = at if due is None else min(due, at)
        return due

    def expire(self, now: float, wall: float) -> None:
        """Ends what is too old to be sent again, while nothing is sent."""
        if self._policy.max_age_s is None:
            return
        self._call_all_scheduled(now, wall)
        for group, lane in list(self._lanes.items()):
            first = lane.entries[0] if lane.entries else None
            lane.entries = [entry for entry in lane.entries if not self._end_if_too_old(entry, now, owns_lane=False)]
            if not lane.entries and not lane.busy:
                del self._lanes[group]
            elif lane.entries and lane.entries[0] is not first:
                self._set_due(group, lane, now)
        suspects, self._suspects = self._suspects, []
        for group_of_them in suspects:
            kept = [entry for entry in group_of_them if not self._end_if_too_old(entry, now)]
            if kept:
                self._suspects.append(kept)
        ready, self._ready = self._ready, deque()
        self._ready.extendleft([entry for entry in reversed(ready) if not self._end_if_too_old(entry, now)])
        self._timers = [timer for timer in self._timers if timer[3] is None or not self._end_if_too_old(timer[3], now)]
        heapq.heapify(self._timers)

    # -- as a whole

    @property
    def scheduled(self) -> int:
        """How many envelopes wait for their `scheduled_time`."""
        return len(self._scheduled)

    def oldest(self) -> int | None:
        """The lowest number of those that have no outcome, the scheduled ones not counted."""
        while self._by_age and self._by_age[0] not in self._open:
            heapq.heappop(self._by_age)
        return self._by_age[0] if self._by_age else None

    def flights(self) -> list[Flight]:
        """What is in flight, in the order of departure."""
        return list(self._flights)

    def oldest_departure(self) -> float | None:
        """When the first that is in flight departed; from any thread."""
        flights = self.flights()
        return flights[0].departed_at if flights else None

    def take_out_all(self) -> list[Entry]:
        """Takes out all that waits here."""
        entries = sorted(self._all_waiting(), key=attrgetter("seq"))
        self._suspects.clear()
        self._ready.clear()
        self._lanes.clear()
        self._timers.clear()
        self._scheduled.clear()
        self._open.difference_update(entry.seq for entry in entries)
        return entries

    # -- inside

    def _all_waiting(self) -> Iterator[Entry]:
        yield from chain.from_iterable(self._suspects)
        yield from self._ready
        for lane in self._lanes.values():
            yield from lane.entries
        for _, _, _, entry in self._timers:
            if entry is not None:
                yield entry
        for _, _, entry in self._scheduled:
            yield entry

    def _depart(self, flight: Flight, now: float) -> Flight:
        flight.departed_at = now
        self._flights[flight] = None
        self.in_flight += 1
        if flight.entries is None:
            self._note_open(flight.seqs[0])
        return flight

    def _note_open(self, seq: int) -> None:
        self._open.add(seq)
        heapq.heappush(self._by_age, seq)
        if len(self._by_age) > 2 * len(self._open) + 1000:
            self._by_age = sorted(self._open)

    def _opened(self, entry: Entry) -> Entry:
        self._note_open(entry.seq)
        return entry

    def _end(self, entry: Entry, error: KbatchError) -> None:
        self._open.discard(entry.seq)
        self.ended.append(Ended.of(entry, error))

    def _land(self, flight: Flight) -> None:
        del self._flights[flight]
        self.in_flight -= 1
        if flight.isolated:
            self._isolating = False
        if flight.entries is None:
            self._open.discard(flight.seqs[0])

    def _entry(self, flight: Flight, index: int) -> Entry:
        if flight.entries is not None:
            return flight.entries[index]
        envelope = flight.envelopes[index]
        group, size = self._group(envelope), flight.sizes[index]
        return self._opened(Entry(envelope, flight.seqs[index], flight.accepted_at, group, size))

    def _group(self, envelope: Envelope[Any]) -> Hashable | None:
        key, topic = envelope.key, envelope.topic
        if topic is not None and not isinstance(topic, str):
            return None  # refused when it is mapped
        within: Hashable
        if key is None:
            within = envelope.partition
            if within is None:
                return None
        elif isinstance(key, str):
            within = key.encode("utf-8", "surrogatepass")  # the same record key as these bytes
        elif isinstance(key, bytes):
            within = bytes(key)
        else:
            return None  # refused when it is mapped
        return topic or self._topic, within

    def _divert(self, batch: Formed, wall: float) -> tuple[list[Envelope[Any]], list[int], list[int]]:
        """What of a batch may be sent now, its numbers and its sizes; the rest waits here."""
        envelopes: list[Envelope[Any]] = []
        seqs: list[int] = []
        sizes: list[int] = []
        for seq, envelope in enumerate(batch.envelopes, batch.first_seq):
            group, size = self._group(envelope), batch.sizes[seq - batch.first_seq]
            if batch.scheduled and self._is_early(envelope, wall):
                self._keep_until_due(Entry(envelope, seq, batch.accepted_at, group, size))
                continue
            if group is not None:
                lane = self._lanes.get(group)
                if lane is not None:
                    lane.insert(self._opened(Entry(envelope, seq, batch.accepted_at, group, size)))
                    continue
                if self._strict:
                    self._lanes[group] = lane = _Lane()
                    lane.busy = True
            envelopes.append(envelope)
            seqs.append(seq)
            sizes.append(size)
        return envelopes, seqs, sizes

    def _is_early(self, envelope: Envelope[Any], wall: float) -> bool:
        due = envelope.scheduled_time
        return self._keep_scheduled and due is not None and due.timestamp() > wall

    def _may_go_again(self, entry: Entry, error: KbatchError, flight: Flight, now: float) -> bool:
        if isinstance(error, ExpiredError):
            return False
        if isinstance(error, SerializationError) and error.index is not None:
            if not isinstance(error.__cause__, MemoryError):  # there may be some later
                return False
        elif isinstance(error, DeliveryError):
            if is_for_whole_batch(error):
                return not (flight.isolated and len(flight.envelopes) == 1)
            if not error.retriable and not error.fatal:
                return False
        if not is_outage(error):
            entry.attempts += 1
            if self._policy.max_attempts is not None and entry.attempts >= self._policy.max_attempts:
                return False
        return not self._is_past_max_age(entry, now)

    def _is_blocked(self) -> bool:
        return self._isolating or (bool(self._suspects) and self.in_flight > 0)

    def _suspect(self, suspects: list[Entry], isolated: bool) -> None:
        size = (len(suspects) + 1) // 2
        if not isolated:  # perhaps of several flights
            size = max([size, *map(len, self._suspects)])
            suspects = sorted(chain(suspects, *self._suspects), key=attrgetter("seq"))
            self._suspects.clear()
        pieces = [suspects[start : start + size] for start in range(0, len(suspects), size)]
        self._suspects.extend(reversed(pieces))

    def _next_suspects(self, now: float) -> list[Entry]:
        """Those that are sent next with nothing else in flight: not those behind an earlier one of their group."""
        if self._suspects and not self._strict:
            ready, self._ready = self._ready, deque()
            for entry in ready:
                if entry.group is None:
                    self._ready.append(entry)
                else:
                    self._wait_until(now, entry)
        while self._suspects:
            chosen: list[Entry] = []
            for entry in self._suspects.pop():
                lane = None if self._strict or entry.group is None else self._lanes.get(entry.group)
                if lane is not None and lane.entries[0].seq < entry.seq:
                    lane.insert(entry)
                elif not self._end_if_too_old(entry, now):
                    chosen.append(entry)
            if chosen:
                return chosen
        return []

    def _wait_until(self, due: float, entry: Entry) -> None:
        group = entry.group
        if group is None:
            heapq.heappush(self._timers, (due, entry.seq, None, entry))
            return
        lane = self._lanes.get(group)
        if lane is None:
            lane = self._lanes[group] = _Lane()
        lane.busy = False
        if lane.insert(entry) or self._strict:
            self._set_due(group, lane, due)

    def _keep_until_due(self, entry: Entry) -> None:
        due = entry.envelope.scheduled_time
        assert due is not None
        self._open.discard(entry.seq)
        heapq.heappush(self._scheduled, (due.timestamp(), entry.seq, entry))

    def _set_due(self, group: Hashable, lane: _Lane, due: float) -> None:
        lane.due = due
        heapq.heappush(self._timers, (due, lane.entries[0].seq, group, None))

    def _call_due(self, now: float, wall: float) -> None:
        if self._timers and self._timers[0][0] <= now and not self._strict:
            self._line_up_ready()
        while self._timers and self._timers[0][0] <= now:
            due, _, group, entry = heapq.heappop(self._timers)
            if entry is not None:
                self._ready.append(entry)
                continue
            assert group is not None
            lane = self._lanes.get(group)
            if lane is None or lane.busy or lane.due != due or not lane.entries:
                continue
            if self._strict:
                lane.busy = True
                self._ready.append(lane.entries.pop(0))
            else:
                self._ready.extend(lane.entries)
                del self._lanes[group]
        self._call_all_scheduled(now, wall)

    def _call_all_scheduled(self, now: float, wall: float) -> None:
        while self._scheduled and self._scheduled[0][0] <= wall:
            due, _, entry = heapq.heappop(self._scheduled)
            # Its age counts from when it could be sent. A clock that jumped ahead makes it no older than it is.
            entry.accepted_at = max(entry.accepted_at, now - (wall - due))
            looked_at, looked_wall = self._looked
            if due > looked_wall:  # it was not due then
                entry.accepted_at = max(entry.accepted_at, looked_at)
            self._call_scheduled(self._opened(entry))
        self._looked = now, wall

    def _line_up_ready(self) -> None:
        """What is ready goes to the lane of its group, if there is one, so that it leaves in the order of the group."""
        if not self._lanes:
            return
        ready, self._ready = self._ready, deque()
        for entry in ready:
            lane = None if entry.group is None else self._lanes.get(entry.group)
            if lane is None:
                self._ready.append(entry)
            else:
                lane.insert(entry)

    def _call_scheduled(self, entry: Entry) -> None:
        if self._strict and entry.group is not None:
            lane = self._lanes.get(entry.group)
            if lane is not None:
                lane.insert(entry)
                return
            self._lanes[entry.group] = lane = _Lane()
            lane.busy = True
        self._ready.append(entry)

    def _free(self, group: Hashable) -> None:
        lane = self._lanes.get(group)
        if lane is None:  # all was given up meanwhile
            return
        if lane.entries:
            self._ready.append(lane.entries.pop(0))
        else:
            del self._lanes[group]

    def _is_past_max_age(self, entry: Entry, now: float) -> bool:
        return self._is_past(entry.accepted_at, now)

    def _is_past(self, since: float, now: float) -> bool:
        return self._policy.max_age_s is not None and now - since >= self._policy.max_age_s

    def _end_if_too_old(self, entry: Entry, now: float, *, owns_lane: bool = True) -> bool:
        if not self._is_past_max_age(entry, now):
            return False
        error = entry.error or SenderError(f"not sent within max_age_s={self._policy.max_age_s}")
        self._end(entry, error)
        if self._strict and owns_lane and entry.group is not None:
            self._free(entry.group)
        return True


def _flight_of(entries: list[Entry], *, isolated: bool = False) -> Flight:
    return Flight(
        [entry.envelope for entry in entries],
        [entry.seq for entry in entries],
        entries[0].accepted_at,
        [entry.size for entry in entries],
        entries,
        isolated=isolated,
    )


def _was_early(error: KbatchError) -> bool:
    return isinstance(error, NotYetDueError)


def _may_join(entry: Entry, chosen: list[Entry]) -> bool:
    """Whether an envelope may share a transaction with those that were chosen before it."""
    if not chosen[0].apart:
        return not entry.apart
    return entry.apart or (entry.group is not None and any(each.group == entry.group for each in chosen))
