"""What a relay does in its thread: rounds in which it reads, sends, and writes the answers."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
from typing import TYPE_CHECKING

from kbatch._errors import OutboxError, ProducerError, SenderError
from kbatch._fastmap import monotonic, packed_key_hash, wall_time
from kbatch._logs import Reminder, tell
from kbatch._outbox._admission import Admission
from kbatch._outbox._fences import Owner
from kbatch._outbox._flight import Judge, RowFlight
from kbatch._outbox._floors import Floors
from kbatch._outbox._leases import Leases, Times
from kbatch._outbox._relay_producer import MARGIN_S
from kbatch._outbox._store import BUCKETS
from kbatch._outbox._unwritten import Unwritten
from kbatch._pending import PendingBatch
from kbatch._recovery._circuit import CircuitState
from kbatch._recovery._retry import RetryPolicy, entropy
from kbatch._text import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from typing import TypeVar

    from kbatch._base_producer import BaseProducer
    from kbatch._options import RelayOptions
    from kbatch._outbox._store import Failure, OutboxStore, Place, RelayOutbox
    from kbatch._recovery._deaths import Deaths
    from kbatch._recovery._gate import Gate

    _T = TypeVar("_T")

__all__ = ["RelayLoop"]

_RENEW_EVERY_S = 1.0
_STAND_ASIDE_AFTER_S = 10.0
_LOOK_AT_ALL_EVERY_S = 30.0
_LOOK_PAUSE = 20  # times what its readings took, at least: they pass by what was deleted and not vacuumed
_SHORTEST_POLL_S = 0.005
_LONGEST_POLL_S = 0.1
_LOOK_AT_DUE_EVERY_S = 0.1
_TRY_STORE_AGAIN_S = 0.25
_BATCH_BYTES = 4_000_000
_MOST_DUE = 500
_LAST_WORDS_S = 2.0  # for the outcomes of what was given up


class RelayLoop:
    """Sends what is in an outbox, in the thread that calls `run`. Any thread may call `stop`, `finish` and `stats`.

    Args:
        gate: Before the relay's producer. Its flag is set when there may be something to do.
        put: Calls a function where it may block.
        deaths: Told of the rows that were given up.
        lease_s: As `lease_of` gives it.
        close_timeout_s: Seconds that the end of `run` waits for what is in flight.
    """

    def __init__(
        self,
        outbox: RelayOutbox,
        options: RelayOptions,
        gate: Gate,
        put: Callable[[Callable[[], object]], object],
        deaths: Deaths[int] | None,
        *,
        lease_s: float,
        close_timeout_s: float,
    ) -> None:
        policy = options.retry
        if policy is None:
            policy = RetryPolicy(max_attempts=20, initial_backoff_s=0.5, max_backoff_s=60.0)
        self._outbox = outbox
        self._gate = gate
        self._handle = gate.handle
        self._flag = gate.flag
        self._deaths = deaths
        self._batch_size = options.batch_size
        self._is_fencing = options.is_fencing
        self._max_flights = 1 if self._is_fencing else options.max_in_flight_batches
        self._max_delivery_s = self._handle.producer.max_delivery_s()
        self._lease_s = lease_s
        self._close_timeout_s = close_timeout_s
        self._renew_every_s = min(_RENEW_EVERY_S, (lease_s - self._max_delivery_s - MARGIN_S) / 2)
        self._owner = Owner(gate, put, is_fencing=self._is_fencing)
        self._judge = Judge(policy, packed_key_hash, entropy)
        self._longest_wait_s = policy.max_backoff_s
        self._leases = Leases(lease_s)
        self._floors = Floors(packed_key_hash, one_in_flight=options.strict_order)
        self._store: OutboxStore | None = None
        self._flights: dict[RowFlight, None] = {}
        self._unwritten = Unwritten(self._leases, deaths)
        self._admission = Admission(self._leases)
        self._counts = dict.fromkeys(("acked", "expired", "refused", "put_off", "dead", "lost_buckets"), 0)
        # How a run ends. Stopping: somebody wants that, whatever is left. Finishing: it ends by itself once nothing is
        # to be sent now. Ending: it hands nothing over, and waits for what is in flight. Giving up: it has waited long
        # enough, and has what is in flight purged.
        self._stopping = self._finishing = self._ending = self._gives_up = False
        self._is_finishing = False  # since the last round began
        self._end_by: float | None = None  # when `stop` wants it to end
        self._has_asked = False  # for leases, so that it may have some
        self._stands_aside = False  # it reaches no broker, and others have its buckets
        self._renew_at = self._look_at_all_at = self._read_at = self._due_at = self._store_at = 0.0
        self._look_began_at = self._look_took_s = 0.0
        self._changes: int | None = None  # as the store had it when all rows were last to be looked at again
        self._poll_s = _SHORTEST_POLL_S
        self._hint_s: float | None = None  # after which it looks again
        self._was_due = False  # what was sent last
        self._pid = 0  # of the last run
        self._trouble = Reminder()  # with the database

    # -- what other threads call

    def stop(self, timeout: float | None = None) -> None:
        """Has `run` end, or the next one at once.

        Args:
            timeout: Seconds that it waits for what is in flight, `close_timeout_s` at most.
        """
        if timeout is not None:
            self._end_by = monotonic() + timeout
        self._stopping = True
        self._flag.set()

    def finish(self) -> None:
        """Has `run` end once it has sent what is to be sent now, or cannot."""
        self._finishing = True
        self._flag.set()

    def stats(self) -> dict[str, int]:
        """As `Relay.stats`."""
        in_flight = sum(len(flight.places) for flight in list(self._flights))
        return {**self._counts, "in_flight": in_flight, "buckets": len(self._leases.tokens)}

    # -- a run

    def run(self, *, until_empty: bool, end: float | None, given_up: Callable[[], bool]) -> bool:
        """Sends until it is to end; then waits for what is in flight, and gives the buckets back.

        Args:
            until_empty: It ends when the outbox is empty.
            end: It ends at this time.
            given_up: Whether it is to end, as after `stop`. Who changes the answer sets the flag.

        Returns:
            Whether the outbox was seen empty.
        """
        is_over = False
        try:
            try:
                self._begin()
                while not (is_over or self._stopping or given_up()) and (end is None or monotonic() < end):
                    if self._finishing and not self._is_finishing:
                        self._is_finishing = True
                        self._read_at = monotonic()
                    pause = self._round()
                    is_over = until_empty and self._is_empty()
                    if self._is_finishing and self._is_idle():
                        break
                    if end is not None:
                        pause = min(pause, max(0.0, end - monotonic()))
                    if pause > 0.0 and not is_over:
                        self._flag.wait(pause)
            finally:
                self._end(end)
        finally:
            self._give_back()  # again, if that was interrupted
            self._stopping = self._finishing = self._is_finishing = False  # it may be run again
            self._end_by = None
        return is_over

    def _is_empty(self) -> bool:
        if self._flights or self._unwritten or self._store is None:
            return False
        return self._guarded(self._store.left, 1) == 0

    def _is_idle(self) -> bool:
        if self._flights or (self._unwritten and self._unwritten.write_at() <= monotonic()):
            return False  # what the database has refused keeps nobody waiting
        # Before its transactional id is initialised it has no lease, and will have some.
        is_to_have_leases = self._owner.is_to_be_named() and not self._has_asked
        has_leases = self._leases.tokens or is_to_have_leases
        can_send = self._gate.may_send() and has_leases and self._trouble.told_at is None
        return self._read_at == math.inf or not (can_send and self._has_room(self._unwritten.failures))

    def _begin(self) -> None:
        self._ending = self._gives_up = False
        self._floors.end(range(BUCKETS))  # what an interrupted end has left
        self._store = self._outbox.open_store()
        now = monotonic()
        self._renew_at = self._read_at = self._due_at = self._store_at = now
        self._begin_look()
        self._poll_s = _SHORTEST_POLL_S
        self._trouble.told_at = None
        self._stands_aside = False
        self._unwritten.begin()
        self._admission.begin()
        if self._pid != os.getpid():  # two children of a process that made it are two relays
            self._owner.begin()
            if self._deaths is not None:
                self._deaths.forget()
            self._pid = os.getpid()  # last: who was interrupted does it again, since owner and producer must match
        self._outbox.watch(self._on_add)

    def _on_add(self, is_committed: bool) -> None:
        # In a thread of the application, which has committed or will do so soon. While there is much to do it costs
        # nothing.
        if self._poll_s > _SHORTEST_POLL_S and self._pid == os.getpid():  # else the flag's lock may be held for ever
            self._poll_s = _SHORTEST_POLL_S
            self._hint_s = 0.0 if is_committed else _SHORTEST_POLL_S
            self._flag.set()

    def _round(self) -> float:
        """Does what is to be done now. Returns the seconds until there will be more, if nothing happens."""
        gate = self._gate
        now = monotonic()
        hint_s, self._hint_s = self._hint_s, None
        if hint_s is not None and not self._is_finishing:
            self._read_at = min(self._read_at, now + hint_s)
        self._take_settled()
        if gate.death is not None:
            raise gate.refusal()
        gate.probe_if_due(now)
        if self._stands_aside and gate.open_for_s(now) == 0.0:
            self._renew_at = now
        if gate.must_replace() and not self._flights:
            if not self._is_fencing:
                gate.replace()
            elif not self._unwritten or self._unwritten.write_at() > now:
                self._start_over()  # what cannot be moved its next owner sends again
        if self._owner.look():
            self._renew_at = now
        if now >= self._store_at:
            self._guarded(self._use_store, None)
        if self._deaths is not None:
            self._deaths.tell_again()
        due = [self._renew_at, self._look_at_all_at]
        if self._may_send():
            due += [self._due_at, self._admission.look_at]
            if self._has_room(self._unwritten.failures):
                due.append(self._read_at)
        probe_at = gate.probe_at()
        if probe_at is not None:
            due.append(probe_at)
        if self._unwritten:
            due.append(self._unwritten.write_at())
        pause = max(min(due), self._store_at) - monotonic()
        return min(max(pause, 0.0), _RENEW_EVERY_S)

    def _guarded(self, call: Callable[[], _T], otherwise: _T) -> _T:
        """Calls what uses the store. If the database does not answer, the store is opened again later."""
        try:
            if self._store is None:
                self._store = self._outbox.open_store()
                self._floors.start_again()  # what it would have found below the floors it does not know
                self._begin_look()
            result = call()
        except OutboxError as error:
            self._store_at = monotonic() + _TRY_STORE_AGAIN_S
            if self._trouble.tells_now(monotonic()):
                tell("a relay cannot use its outbox, and tries again: %s", error)
            self._close_store()
            return otherwise
        if self._trouble.told_at is not None:
            self._trouble.told_at = None
            tell("a relay can use its outbox again")
        return result

    def _close_store(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            with contextlib.suppress(OutboxError):
                store.close()

    def _use_store(self) -> None:
        assert self._store is not None
        if self._leases.tokens and self._leases.left_s(_times()) <= 0.0:
            self._lose(self._leases.forget())
        self._unwritten.write(self._store, self._note_lost)
        if self._unwritten.lets_go:
            self._let_go()
            self._unwritten.lets_go = False
            self._due_at = monotonic()
        now = monotonic()
        if now >= self._renew_at or (self._leases.leaving - self._busy()):
            self._renew()
        if now >= self._look_at_all_at and not self._has_to_pause(now):
            # Rows that others have put back without telling, and keys that others have let go.
            self._begin_look()
            self._admission.forget_refused()
            self._floors.start_ended_again()
            self._let_go()
        if monotonic() >= self._admission.look_at and self._may_send() and self._admission.admit(self._store):
            self._read_at = monotonic()
        # The circuit's trial is what was not refused before, if there is any: else one partition that takes nothing
        # would be the trial again and again.
        if self._gate.circuit.state is CircuitState.CLOSED and not self._was_due:
            self._send_due_if_time()
        for _ in range(self._max_flights):  # rows of held keys are read and not sent, however many there are
            if not (self._may_send() and self._has_room(self._unwritten.failures)) or monotonic() < self._read_at:
                break
            self._send_next()
            if monotonic() >= self._renew_at:  # a reading may take long: the next one has a whole lease
                break
        self._send_due_if_time()

    def _begin_look(self) -> None:
        self._look_began_at, self._look_took_s = monotonic(), 0.0
        self._look_at_all_at = self._look_began_at + _LOOK_AT_ALL_EVERY_S

    def _has_to_pause(self, now: float) -> bool:
        """Whether the last look at all took long, or still goes on, so that the next one has to wait."""
        self._look_at_all_at = max(self._look_at_all_at, self._look_began_at + _LOOK_PAUSE * self._look_took_s)
        return now < self._look_at_all_at

    def _send_due_if_time(self) -> None:
        now = monotonic()
        if now >= self._due_at and self._may_send():
            self._due_at = now + _LOOK_AT_DUE_EVERY_S
            # What failed before may fail again, which takes long: it leaves room, and a turn, for the others.
            flights = sum(flight.is_due for flight in self._flights)
            if flights < max(self._max_flights // 2, 1) and self._has_room(self._unwritten.failures_later):
                self._send_due()

    # -- leases

    def _busy(self, leaving: Collection[int] | None = None) -> set[int]:
        """Buckets of which something is in flight, or not written yet."""
        busy = {bucket for flight in self._flights for bucket in flight.tokens}
        busy |= self._unwritten.busy(self._leases.leaving if leaving is None else leaving)
        if self._is_undecided():
            busy.update(self._leases.tokens)
        return busy

    def _is_undecided(self) -> bool:
        transactions = self._handle.producer._transactions
        return transactions is not None and transactions.is_undecided

    def _renew(self) -> None:
        assert self._store is not None
        if not self._owner.is_named():
            self._renew_at = monotonic() + self._renew_every_s
            return
        busy = self._busy()
        if self._gate.open_for_s(monotonic()) >= _STAND_ASIDE_AFTER_S and not self._busy(self._leases.tokens):
            self._stand_aside()
            return
        self._stands_aside = False
        release = self._leases.leaving - busy
        asked = _times()
        self._has_asked = True
        # What is still in flight of a lost bucket must have its outcome before it is sent again.
        leases, share = self._store.renew(
            self._owner.name,
            self._lease_s,
            release=release,
            avoid=busy,
            fenced=self._owner.fenced(),
        )
        self._drop(release)
        self._renew_at = asked.monotonic + self._renew_every_s
        self._lose(self._leases.renewed(asked, leases, share))
        if self._owner.fence(self._store):
            self._renew_at = monotonic()
        fresh = {bucket for bucket in self._leases.tokens if not self._floors.knows(bucket)} - busy
        if fresh:
            if self._changes is None:
                self._changes = self._store.changes()  # nothing was read before
            self._floors.begin(fresh, self._store.held_keys(fresh))
            self._read_at = self._due_at = monotonic()

    def _stand_aside(self) -> None:
        """Gives all buckets to relays that reach brokers, as at its end, until a probe finds some."""
        self._renew_at = monotonic() + self._renew_every_s
        if self._stands_aside:
            return
        assert self._store is not None
        self._drop(self._leases.forget())  # first: of what others have nothing is read
        self._store.leave(self._owner.name, keep=())
        self._stands_aside = True
        tell("a relay reaches no broker, and leaves the outbox to others until it does: %r", self._outbox)

    def _start_over(self) -> None:
        """Goes on as another owner, since its producer is fenced, or can send no more."""
        self._lose(self._leases.forget())
        self._owner.start_over()

    def _drop(self, buckets: Collection[int]) -> None:
        self._leases.drop(buckets)
        self._floors.end(buckets)
        self._unwritten.forget(buckets)

    def _note_lost(self, buckets: Collection[int]) -> None:
        held = self._leases.tokens.keys() & buckets  # the others were lost before
        self._drop(buckets)
        self._lose(held)

    def _lose(self, buckets: Collection[int]) -> None:
        """What is in flight of these buckets is another relay's now: it is given up, and nothing is written of it."""
        if not buckets:
            return
        self._unwritten.forget(buckets)  # first, and the log last: whatever comes in between finds nothing to write
        self._floors.end(buckets)
        self._judge.forget()
        self._counts["lost_buckets"] += len(buckets)
        if any(bucket in buckets for flight in self._flights for bucket in flight.tokens):
            self._purge()
        tell(
            "a relay has lost the leases of %s: others may send what it had in flight once more",
            counted(len(buckets), "bucket"),
        )

    def _purge(self) -> None:
        for flight in list(self._flights):
            if flight.pending is not None:
                flight.pending.core.abandon(flight.pending)
                flight.pending.core.purge()

    # -- sending

    def _may_send(self) -> bool:
        return (
            not (self._stopping or self._ending)
            and len(self._flights) < self._max_flights
            and self._gate.may_send()
            and self._may_hand_over()
        )

    def _has_room(self, failures: Collection[Failure]) -> bool:
        # The database may refuse to move all that a broker refuses: then they would become more and more.
        return len(failures) < self._batch_size * self._max_flights

    def _may_hand_over(self) -> bool:
        # A relay that was stopped in between must not send late: what it hands over has its outcome within the lease.
        return self._leases.left_s(_times()) >= self._max_delivery_s + MARGIN_S

    def _send_next(self) -> None:
        assert self._store is not None
        floors = self._floors.floors(self._leases.to_read())
        in_flight = functools.cache(self._in_flight)
        began = monotonic()
        reading = self._store.read(floors, limit=self._batch_size, max_bytes=_BATCH_BYTES, in_flight=in_flight)
        if self._floors.is_of_a_look(reading):
            self._look_took_s += monotonic() - began
        if self._was_changed():
            return
        rows = self._floors.taken(reading, in_flight)
        if reading.rows:
            self._poll_s = _SHORTEST_POLL_S
        else:
            self._poll_s = min(2 * self._poll_s, _LONGEST_POLL_S)
        if reading.ended.issuperset(floors):
            # Who is to finish has seen what was there, and reads on only if some of it is to be sent again.
            self._read_at = math.inf if self._is_finishing else monotonic() + self._poll_s
        if not rows:
            return
        times = [row[3] for row in rows]
        self._hand_over(
            RowFlight(
                [row[:2] for row in rows],
                [row[2] for row in rows],
                times if any(times) else None,
                self._leases.tokens_of({row[0] for row in rows}),
            ),
            self._handle.producer,
        )

    def _send_due(self) -> None:
        assert self._store is not None
        buckets = self._leases.to_read()
        if not buckets:
            return
        in_flight = {place for flight in self._flights if flight.is_due for place in flight.places}
        in_flight.update((failure.bucket, failure.seq) for failure in self._unwritten.failures_later)
        rows = self._store.read_due(buckets, avoid=in_flight, longest_s=self._longest_wait_s, limit=_MOST_DUE)
        if self._was_changed():
            return
        hot = [zip(each.places, each.packed, strict=True) for each in self._flights if not each.is_due]
        rows = self._floors.first_of_keys(rows, itertools.chain(*hot))
        producer: BaseProducer | None
        if self._is_fencing:  # one that is refused would abort the others
            rows, producer = rows[:1], self._handle.producer
        else:
            producer = self._handle.solo() if rows else None
        if not rows or producer is None:
            return
        self._hand_over(
            RowFlight(
                [(row.bucket, row.seq) for row in rows],
                [row.packed for row in rows],
                [row.deliver_by for row in rows],
                self._leases.tokens_of({row.bucket for row in rows}),
                is_due=True,
                attempts=[row.attempts for row in rows],
            ),
            producer,
        )

    def _was_changed(self) -> bool:
        """Whether others have put rows back, or changed what waits. Asked after each reading: what was read is then
        not sent, since rows of a lower number may come before it. It is read again."""
        assert self._store is not None
        changes = self._store.changes()
        if changes == self._changes:
            return False
        self._floors.look_again()
        self._begin_look()
        self._let_go()
        self._read_at = self._due_at = monotonic()
        self._changes = changes  # last: who was interrupted looks again
        return True

    def _in_flight(self) -> set[Place]:
        """The rows that must not be sent now: in flight, or not written yet."""
        places = {place for flight in self._flights for place in flight.places}
        return places | self._unwritten.places()

    def _hand_over(self, flight: RowFlight, producer: BaseProducer) -> None:
        gate = self._gate
        try:
            flight.trial = gate.admit()
        except SenderError:
            self._put_back(flight)
            return
        try:
            flight.pending = PendingBatch(producer._core)
            producer._core.map_packed(flight.pending, flight.packed, flight.rejected, deliver_by=flight.deliver_by)
            if not self._may_hand_over():  # the reading, or the mapping, took too long
                self._put_back(flight)
                gate.note("nothing", flight.trial, monotonic())
                return
            self._flights[flight] = None
            self._was_due = flight.is_due
            producer._send_detached(flight.pending, waker=self._flag.set)
        except ProducerError as error:
            self._put_back(flight)
            if flight.is_due and producer is not self._handle.producer:
                self._handle.drop_solo(producer)
                gate.note("nothing", flight.trial, monotonic())
            else:
                self._owner.note_refusal(producer, error, flight.trial)
        except BaseException:
            if flight.pending is None or not flight.pending.begun:  # else its answer will come
                self._put_back(flight)
                gate.note("nothing", flight.trial, monotonic())
            raise

    def _put_back(self, flight: RowFlight) -> None:
        self._flights.pop(flight, None)
        if not flight.is_due:
            self._floors.landed(flight.places, flight.packed)
            self._floors.put_back(flight.places)
            self._read_at = min(self._read_at, monotonic() + self._poll_s)

    # -- answers

    def _take_settled(self) -> None:
        for flight in list(self._flights):
            if flight.pending is not None and flight.pending.done():
                self._settle(flight)

    def _settle(self, flight: RowFlight) -> None:
        answers = self._judge.answers(flight)
        tokens = self._leases.tokens
        lost = {bucket for bucket, token in flight.tokens.items() if tokens.get(bucket) != token}
        done, failures, unsent = answers.done, answers.failures, answers.unsent
        if lost:
            done = [place for place in done if place[0] not in lost]
            failures = [failure for failure in failures if failure.bucket not in lost]
            unsent = [place for place in unsent if place[0] not in lost]
        self._counts["acked"] += answers.acked
        self._counts["expired"] += answers.expired
        for kind, count in answers.moved.items():
            self._counts[kind] += count
        self._unwritten.add(done, failures, is_due=flight.is_due)
        if flight.is_due:
            if self._is_fencing:
                self._due_at = monotonic()  # it is alone, and others wait
        else:
            self._floors.put_back(unsent)
            for failure in failures:
                if failure.due_in_s is not None:
                    self._floors.hold(failure.bucket, failure.key_hash, failure.seq)
        self._flights.pop(flight, None)  # not before: what was interrupted is done once more
        if not flight.is_due and self._floors.landed(flight.places, flight.packed):
            self._read_at = monotonic()
        if failures or unsent:
            self._gate.last_error = answers.last_error
            self._read_at = monotonic()
        self._gate.note("nothing" if lost else answers.verdict, flight.trial, monotonic())
        if self._is_undecided():  # nothing more is handed over to it that would show this, if the circuit is open now
            self._gate.give_up(self._handle.producer)

    def _let_go(self) -> None:
        if self._floors.has_held():
            assert self._store is not None
            held = self._store.held_keys(list(self._leases.tokens))
            # Those of which a row is on its way to `later` are not there yet.
            self._floors.let_go(held + self._unwritten.held_keys())
            self._read_at = monotonic()

    # -- the end

    def _end(self, end: float | None = None) -> None:
        """Waits for what is in flight, until `end` at most, writes its answers, and gives the buckets back."""
        self._ending = True
        now = monotonic()
        longest = now + self._close_timeout_s
        if not self._await_answers(longest if end is None else min(longest, max(end, now))):
            # What librdkafka has given up it sends no more, so that others may have the buckets at once.
            self._gives_up = True
            self._await_answers(monotonic() + _LAST_WORDS_S)
        self._give_back()

    def _give_back(self) -> None:
        """Gives the buckets back of which nothing is open. Called again it does nothing."""
        self._outbox.unwatch(self._on_add)
        self._owner.close()
        if self._has_asked and not self._guarded(self._leave, False):
            self._guarded(self._leave, False)  # by another connection
        self._has_asked = False
        self._close_store()
        self._floors.end(self._leases.forget())
        self._unwritten.clear()
        self._judge.forget()

    def _leave(self) -> bool:
        assert self._store is not None
        # What was not settled within the time may still be stored: its buckets wait until the leases run out.
        self._store.leave(self._owner.name, keep=self._busy())
        return True

    def _await_answers(self, end: float) -> bool:
        """Whether everything that was in flight is written by then, or by the time that `stop` gave."""
        while self._flights or self._unwritten:
            self._take_settled()  # before the time is looked at: the database may have taken long, and all is answered
            now = monotonic()
            if self._end_by is not None and not self._gives_up:
                end = min(end, self._end_by)
            if now >= end:
                return not (self._flights or self._unwritten)
            if self._gives_up:
                self._purge()  # again: what moves from one of librdkafka's queues to another meanwhile is passed over
            if now >= self._store_at:
                self._guarded(self._use_store, None)
            if self._flights:
                self._flag.wait(min(end - now, 0.1))
            elif self._unwritten:
                if self._unwritten.write_at() > now:  # failures that were refused; the rows stay where they are
                    self._unwritten.clear()
                    return True
                self._flag.wait(max(0.0, min(end, self._store_at) - now))
        return True


def _times() -> Times:
    return Times(monotonic(), wall_time())
