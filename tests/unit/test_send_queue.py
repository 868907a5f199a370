"""What a sender sends next, with a model of brokers and clocks that the tests turn; then each rule by example."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kbatch import DeliveryError, Envelope, KbatchError, NotYetDueError, RetryPolicy, SenderError, SerializationError
from kbatch._codes import ABORTED_CODE
from kbatch._sending._queue import Flight, SendQueue

NOW = 1_000.0
WALL = 1_800_000_000.0
TOO_LARGE = 10
INVALID_RECORD, INVALID_DIFFERENT_RECORD = 87, -138
RETRIABLE = 19  # NOT_ENOUGH_REPLICAS
PERMANENT = 29  # TOPIC_AUTHORIZATION_FAILED
OUTAGE = -192  # _MSG_TIMED_OUT
FATAL = 47  # INVALID_PRODUCER_EPOCH


@dataclass
class Batch:
    envelopes: list[Envelope[Any]]
    first_seq: int = 0
    accepted_at: float = NOW
    scheduled: bool = False

    @property
    def sizes(self) -> list[int]:
        return [size_of(envelope) for envelope in self.envelopes]


def size_of(envelope: Envelope[Any]) -> int:
    return len(bytes(envelope.data or b""))


def refusal(code: int) -> DeliveryError:
    return DeliveryError(code, possibly_persisted=False)


def unmapped(index: int, name: str = "message") -> SerializationError:
    return SerializationError("no", index=index, envelope_id=None, field=name)


def at(wall: float) -> datetime:
    return datetime.fromtimestamp(wall, timezone.utc)


def make_queue(
    policy: RetryPolicy | None = None,
    *,
    batch_size: int = 1000,
    batch_bytes: int = 1_000_000,
    strict_order: bool = False,
    keep_scheduled: bool = True,
    topic: str | None = "orders",
) -> SendQueue:
    return SendQueue(
        topic,
        policy or RetryPolicy(initial_backoff_s=1, max_backoff_s=8, jitter=0),
        batch_size=batch_size,
        batch_bytes=batch_bytes,
        strict_order=strict_order,
        keep_scheduled=keep_scheduled,
        random=lambda: 0.0,
    )


def waiting_in(queue: SendQueue) -> int:
    return sum(1 for _ in queue._all_waiting())


# -- any order of events


@dataclass(eq=False)
class Sent:
    """What the model knows of one envelope."""

    envelope: Envelope[Any]
    seq: int
    accepted_at: float
    group: object
    guilty: bool = False  # too large
    unmappable: bool = False
    due: float | None = None  # its scheduled_time, if that was in the future
    state: str = "waiting"  # or in flight, acknowledged, ended
    departures: int = 0
    attempts: int = 0
    failures: int = 0
    not_before: float = 0.0
    told: list[KbatchError] = field(default_factory=list)

    @property
    def is_free(self) -> bool:
        """Whether later ones need not wait for it: its turn was still to come."""
        return self.due is not None and self.departures == 0


class Queues(RuleBasedStateMachine):
    """Batches come, flights depart as a sender would have them, and settle in any order and with any outcome.

    The brokers refuse a whole flight if one of its envelopes is too large, unless that is refused for another reason.
    """

    max_in_flight = 3

    @initialize(
        strict=st.booleans(),
        keep=st.booleans(),
        dead_letters=st.booleans(),
        max_attempts=st.sampled_from([None, 1, 3]),
        max_age_s=st.sampled_from([None, None, 20.0]),
        batch_size=st.sampled_from([1, 2, 5, 100]),
        batch_bytes=st.sampled_from([1, 6, 1000]),
    )
    def start(
        self,
        strict: bool,
        keep: bool,
        dead_letters: bool,
        max_attempts: int | None,
        max_age_s: float | None,
        batch_size: int,
        batch_bytes: int,
    ) -> None:
        self.strict, self.keep, self.dead_letters = strict, keep, dead_letters
        self.policy = RetryPolicy(
            max_attempts=max_attempts, max_age_s=max_age_s, initial_backoff_s=1, max_backoff_s=8, jitter=0
        )
        self.batch_size, self.batch_bytes = batch_size, batch_bytes
        self.queue = make_queue(
            self.policy, strict_order=strict, keep_scheduled=keep, batch_size=batch_size, batch_bytes=batch_bytes
        )
        self.now, self.wall, self.longest_s = NOW, WALL, 8
        self.buffer: list[Batch] = []
        self.accepted = 0
        self.sent: dict[int, Sent] = {}  # by the id of the envelope; of each that the queue has, or has had
        self.kept: list[Envelope[Any]] = []  # an id is of one object as long as that lives
        self.flights: list[Flight] = []
        self.logs: dict[object, list[Sent]] = {}

    # -- envelopes come

    envelopes = st.tuples(
        st.sampled_from(["a", "a", b"a", "b", None, 0]),
        st.sampled_from(["good", "good", "good", "good", "good", "too large", "unmappable"]),
        st.sampled_from([None, None, None, 0, 3, 30]),
        st.integers(0, 4),
    )

    @rule(drawn=st.lists(envelopes, min_size=1, max_size=5))
    def batch_is_formed(self, drawn: list[tuple[Any, str, int | None, int]]) -> None:
        batch = Batch([], self.accepted, self.now)
        for where, kind, delay_s, size in drawn[: self.batch_size]:
            due = None if delay_s is None else at(self.wall + delay_s)
            partition = where if isinstance(where, int) else None
            key = where if partition is None else None
            envelope = Envelope(data=bytes(size), key=key, partition=partition, scheduled_time=due)
            group = key.encode() if isinstance(key, str) else where
            sent = Sent(envelope, self.accepted, self.now, group, kind == "too large", kind == "unmappable")
            self.sent[id(envelope)] = sent
            batch.envelopes.append(envelope)
            batch.scheduled |= due is not None
            sent.state = "buffered"
            self.accepted += 1
        self.buffer.append(batch)

    # -- flights

    def next(self) -> Flight | None:
        """As the agent has it."""
        if len(self.flights) >= self.max_in_flight:
            return None
        flight = self.queue.next_flight(self.now, self.wall)
        self.take_ended({"age"})
        if flight is not None:
            # A dead letter counts what its origin did.
            assert flight.isolated or len(flight.envelopes) == 1 or flight.bytes <= self.batch_bytes
            self.depart(flight)
            return flight
        return self.admit_next()

    def admit_next(self) -> Flight | None:
        if not self.buffer or not self.queue.wants_batch():
            return None
        batch = self.buffer.pop(0)
        for envelope in batch.envelopes:
            sent = self.sent[id(envelope)]
            sent.state = "waiting"
            if self.keep and envelope.scheduled_time is not None:
                due = envelope.scheduled_time.timestamp()
                sent.due = due if due > self.wall else None
        flight = self.queue.take(batch, self.now, self.wall)
        if flight is not None:
            self.depart(flight)
        return flight

    def depart(self, flight: Flight) -> None:
        assert 0 < len(flight.envelopes) <= self.batch_size
        assert not flight.isolated or not self.flights
        assert not any(other.isolated for other in self.flights)
        self.flights.append(flight)
        for seq, envelope in zip(flight.seqs, flight.envelopes, strict=True):
            sent = self.sent[id(envelope)]
            assert sent.seq == seq
            assert sent.state == "waiting", f"{sent} departs"
            assert sent.due is None or sent.due <= self.wall, f"{sent} departs at {self.wall}"
            if sent.group is None and not flight.isolated:
                assert sent.not_before <= self.now, f"{sent} departs at {self.now}"
            self.assert_in_order(sent)
            sent.state = "in flight"
            sent.departures += 1

    def assert_in_order(self, sent: Sent) -> None:
        if sent.group is None:
            return
        for other in self.sent.values():
            if other.group != sent.group:
                continue
            if self.strict:
                assert other.state != "in flight", f"{sent} departs beside {other}"
            if other.seq < sent.seq and other.state == "waiting" and not other.is_free:
                raise AssertionError(f"{sent} departs before {other}")

    @rule()
    def flight_departs(self) -> None:
        self.next()

    @rule()
    def flight_is_put_back(self) -> None:
        flight = self.next()
        if flight is None:
            return
        self.flights.remove(flight)
        self.queue.put_back(flight)
        for envelope in flight.envelopes:
            sent = self.sent[id(envelope)]
            sent.state = "waiting"
            sent.departures -= 1
            sent.not_before = 0.0

    @rule()
    def what_is_new_goes_first(self) -> None:
        """As the agent has it for the circuit breaker's trial, after one of what had failed before."""
        if self.flights:
            return
        self.queue.step_aside(self.now)
        self.admit_next()

    @rule(for_good=st.booleans())
    def nothing_is_put_off(self, for_good: bool) -> None:
        if for_good:
            self.longest_s = 1
            self.queue.hurry(self.now, 1)
        else:
            self.queue.hasten(self.now)
        for sent in self.sent.values():
            sent.not_before = min(sent.not_before, self.now)

    outcomes = st.sampled_from([None, None, RETRIABLE, PERMANENT, OUTAGE, FATAL])

    @precondition(lambda self: self.flights)
    @rule(data=st.data(), outcomes=st.just([]) | st.lists(outcomes, min_size=5, max_size=5))
    def flight_settles(self, data: st.DataObject, outcomes: list[int | None]) -> None:
        flight = self.flights[data.draw(st.integers(0, len(self.flights) - 1))]
        self.settle(flight, outcomes)

    def settle(self, flight: Flight, outcomes: list[int | None]) -> None:
        self.flights.remove(flight)
        flown = [self.sent[id(envelope)] for envelope in flight.envelopes]
        codes = [outcomes[n % len(outcomes)] if outcomes else None for n in range(len(flown))]
        too_large = any(sent.guilty and not sent.unmappable and not codes[n] for n, sent in enumerate(flown))
        failures: list[tuple[int, KbatchError]] = []
        ending: list[Sent] = []
        for n, sent in enumerate(flown):
            sent.state = "waiting"
            if sent.unmappable:
                failures.append((n, unmapped(n)))
                ending.append(sent)
                continue
            code = codes[n] or (TOO_LARGE if too_large else None)
            if code is None:
                sent.state = "acknowledged"
                self.logs.setdefault(sent.group, []).append(sent)
                continue
            failures.append((n, refusal(code)))
            if self.ends(sent, code, flight):
                ending.append(sent)
        self.queue.settled(flight, failures, self.now, again=True)
        assert [self.sent[id(end.entry.envelope)] for end in self.queue.ended] == ending
        self.take_ended({"outcome"})

    def ends(self, sent: Sent, code: int, flight: Flight) -> bool:
        if code == TOO_LARGE:
            alone = flight.isolated and len(flight.envelopes) == 1
            assert sent.guilty or not alone
            return alone
        if code == PERMANENT:
            return True
        sent.failures += 1
        sent.not_before = self.now + min(2 ** (sent.failures - 1), self.longest_s)
        sent.attempts += code == RETRIABLE
        if code == RETRIABLE and self.policy.max_attempts is not None and sent.attempts >= self.policy.max_attempts:
            return True
        return self.is_old(sent)

    def is_old(self, sent: Sent) -> bool:
        since = sent.accepted_at if sent.due is None else NOW + sent.due - WALL
        return self.policy.max_age_s is not None and self.now - since >= self.policy.max_age_s

    def take_ended(self, reasons: set[str]) -> None:
        ended, self.queue.ended = self.queue.ended, []
        for end in ended:
            sent = self.sent[id(end.entry.envelope)]
            assert sent.state == "waiting", f"{sent} ends"
            assert not sent.told
            assert end.entry.seq == sent.seq
            if "outcome" not in reasons:
                assert self.is_old(sent), f"{sent} ends at {self.now}"
            sent.state = "ended"
            sent.told.append(end.error)
            if self.dead_letters and end.entry.origin is None:
                letter: Envelope[Any] = Envelope(data=b"letter")
                self.sent[id(letter)] = Sent(letter, sent.seq, self.now, None)
                self.queue.add_dead_letter(letter, end, self.now)

    # -- time

    @rule(seconds=st.sampled_from([1, 2, 5, 15]))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds
        self.wall += seconds

    @rule()
    def what_is_too_old_expires(self) -> None:
        self.queue.expire(self.now, self.wall)
        self.take_ended({"age"})
        for sent in self.sent.values():
            if sent.state == "waiting" and (sent.due is None or sent.departures):
                assert not self.is_old(sent)

    # -- always

    def of_state(self, state: str) -> list[Sent]:
        return [sent for sent in self.sent.values() if sent.state == state]

    @invariant()
    def it_knows_what_it_has(self) -> None:
        if not hasattr(self, "queue"):
            return
        assert self.queue.in_flight == len(self.flights)
        assert set(self.queue.flights()) == set(self.flights)
        assert waiting_in(self.queue) == len(self.of_state("waiting"))
        assert self.queue.wants_batch() or self.of_state("waiting") or self.flights

    @invariant()
    def it_knows_the_oldest(self) -> None:
        if not hasattr(self, "queue"):
            return
        alive = self.of_state("waiting") + self.of_state("in flight")
        certain = {sent.seq for sent in alive if not sent.is_free}
        called = {sent.seq for sent in alive if sent.is_free and sent.due is not None and sent.due <= self.wall}
        oldest = self.queue.oldest()
        assert oldest == min(certain, default=None) or (oldest in called and oldest <= min(certain, default=oldest))

    @invariant()
    def strict_logs_are_in_order(self) -> None:
        if not getattr(self, "strict", False):
            return
        for group, log in self.logs.items():
            seqs = [sent.seq for sent in log if sent.due is None]
            assert group is None or seqs == sorted(seqs)

    def teardown(self) -> None:
        if not hasattr(self, "queue"):
            return
        if self.accepted % 3 == 0:
            self.everything_is_given_up()
        else:
            self.everything_drains()

    def everything_is_given_up(self) -> None:
        waiting = self.of_state("waiting")
        entries = self.queue.take_out_all()
        assert [entry.seq for entry in entries] == sorted(sent.seq for sent in waiting)
        assert {id(entry.envelope) for entry in entries} == {id(sent.envelope) for sent in waiting}
        assert (waiting_in(self.queue), self.queue.scheduled) == (0, 0)
        for flight in self.flights:
            failures = [(n, refusal(OUTAGE)) for n in range(len(flight.envelopes)) if n % 2]
            self.queue.settled(flight, failures, self.now, again=False)
            assert [end.entry.envelope for end in self.queue.ended] == list(flight.envelopes[1::2])
            self.queue.ended = []
        assert (waiting_in(self.queue), self.queue.in_flight, self.queue.oldest()) == (0, 0, None)

    def everything_drains(self) -> None:
        """Nothing is stuck: when all succeed that can, all that is due leaves, and each has one end."""
        for _ in range(10_000):
            if self.next() is not None:
                continue
            if self.flights:
                self.settle(self.flights[0], [])
                continue
            if self.buffer and self.queue.wants_batch():
                continue  # it waited as a whole
            due = self.queue.due_at(self.now, self.wall)
            if due is None:
                break
            self.wall += due - self.now
            self.now = due
        else:
            raise AssertionError("it goes round in circles")
        assert (self.buffer, waiting_in(self.queue), self.queue.in_flight, self.queue.oldest()) == ([], 0, 0, None)
        for sent in self.sent.values():
            assert sent.state in ("acknowledged", "ended"), f"{sent} is lost"
            assert len(sent.told) == (sent.state == "ended")
            assert sent.state == "ended" or not (sent.guilty or sent.unmappable)
        for log in self.logs.values():
            assert len({id(sent) for sent in log}) == len(log)


TestQueues = Queues.TestCase


# -- each rule by example


def keyed(*keys: str | None, size: int = 1) -> list[Envelope[Any]]:
    return [Envelope(data=bytes(size), key=key) for key in keys]


def admit(queue: SendQueue, batch: Batch, wall: float = WALL) -> Flight:
    flight = queue.take(batch, NOW, wall)
    assert flight is not None
    return flight


def after(queue: SendQueue, now: float, wall: float = WALL) -> list[int] | None:
    """The numbers that leave at that time, and are on their way then."""
    flight = queue.next_flight(now, wall)
    return None if flight is None else list(flight.seqs)


def fail(queue: SendQueue, flight: Flight, codes: dict[int, int], now: float = NOW, *, again: bool = True) -> None:
    queue.settled(flight, [(index, refusal(code)) for index, code in codes.items()], now, again=again)


def test_a_batch_passes_through_as_it_is() -> None:
    queue = make_queue()
    envelopes = keyed("a", "a", None)
    flight = admit(queue, Batch(envelopes, first_seq=7))
    assert flight.envelopes is envelopes
    assert list(flight.seqs) == [7, 8, 9]
    assert queue.wants_batch()
    queue.settled(flight, [], NOW, again=True)
    assert (queue.in_flight, waiting_in(queue), queue.ended, queue.due_at(NOW, WALL)) == (0, 0, [], None)


def test_only_what_failed_is_sent_again_and_not_before_its_time() -> None:
    queue = make_queue()
    fail(queue, admit(queue, Batch(keyed("a", None, "b"))), {1: RETRIABLE, 2: RETRIABLE})
    assert queue.due_at(NOW, WALL) == NOW + 1
    assert after(queue, NOW + 0.9) is None
    assert after(queue, NOW + 1) == [1, 2]


def test_later_ones_of_its_key_wait_behind_it_and_others_do_not() -> None:
    queue = make_queue()
    fail(queue, admit(queue, Batch(keyed("a"))), {0: RETRIABLE})
    assert list(admit(queue, Batch(keyed("a", "b", None, "a"), first_seq=1)).seqs) == [2, 3]
    assert after(queue, NOW + 1) == [0, 1, 4]


def test_what_is_ready_waits_behind_an_earlier_one_of_its_key_that_fails_meanwhile() -> None:
    queue = make_queue()
    first = admit(queue, Batch(keyed("a")))
    fail(queue, admit(queue, Batch(keyed("a"), first_seq=1)), {0: RETRIABLE})
    again = queue.next_flight(NOW + 1, WALL)
    assert again is not None
    queue.put_back(again)
    fail(queue, first, {0: RETRIABLE})
    assert after(queue, NOW + 1) == [0, 1]


def test_text_and_the_same_bytes_are_one_key_and_another_topic_is_another() -> None:
    queue = make_queue(strict_order=True)
    same: list[Envelope[Any]] = [Envelope(data=b"", key="ä"), Envelope(data=b"", key="ä".encode())]
    named: list[Envelope[Any]] = [Envelope(data=b"", key="ä", topic=topic) for topic in ("orders", "others")]
    assert list(admit(queue, Batch(same + named)).seqs) == [0, 3]


def test_without_a_key_the_order_is_that_of_the_partition() -> None:
    queue = make_queue(strict_order=True)
    envelopes: list[Envelope[Any]] = [Envelope(data=b"", partition=partition) for partition in (0, 0, 1, None, None)]
    assert list(admit(queue, Batch(envelopes)).seqs) == [0, 2, 3, 4]


def test_strict_order_has_one_of_a_key_in_flight() -> None:
    queue = make_queue(strict_order=True)
    flight = admit(queue, Batch(keyed("a", "a", "b", "a")))
    assert list(flight.seqs) == [0, 2]
    assert after(queue, NOW) is None
    queue.settled(flight, [], NOW, again=True)
    again = queue.next_flight(NOW, WALL)
    assert again is not None
    assert list(again.seqs) == [1]
    fail(queue, again, {0: RETRIABLE})
    assert after(queue, NOW) is None
    assert after(queue, NOW + 1) == [1]


def test_strict_order_goes_on_when_one_is_given_up() -> None:
    queue = make_queue(strict_order=True)
    fail(queue, admit(queue, Batch(keyed("a", "a"))), {0: PERMANENT})
    assert [end.entry.seq for end in queue.ended] == [0]
    assert after(queue, NOW) == [1]


def test_attempts_are_limited_and_an_outage_is_none() -> None:
    queue = make_queue(RetryPolicy(max_attempts=2, initial_backoff_s=1, max_backoff_s=1, jitter=0))
    flight = admit(queue, Batch(keyed("a")))
    for n, code in enumerate([OUTAGE, OUTAGE, FATAL, RETRIABLE, OUTAGE]):
        fail(queue, flight, {0: code}, NOW + n)
        assert not queue.ended
        again = queue.next_flight(NOW + n + 1, WALL)
        assert again is not None
        flight = again
    fail(queue, flight, {0: RETRIABLE}, NOW + 9)
    assert [end.error for end in queue.ended] == [refusal(RETRIABLE)]


def test_the_age_ends_it_where_it_waits_and_when_it_fails() -> None:
    policy = RetryPolicy(max_age_s=5, initial_backoff_s=1, max_backoff_s=1, jitter=0)
    queue = make_queue(policy)
    flights = [admit(queue, Batch(keyed(key), first_seq=seq)) for seq, key in enumerate(["a", None, "b"])]
    fail(queue, flights[0], {0: OUTAGE})
    fail(queue, flights[1], {0: OUTAGE})
    queue.expire(NOW + 4.9, WALL + 4.9)
    assert queue.ended == []
    queue.expire(NOW + 5, WALL + 5)
    assert [end.entry.seq for end in queue.ended] == [0, 1]
    fail(queue, flights[2], {0: OUTAGE}, NOW + 5)
    assert [end.entry.seq for end in queue.ended] == [0, 1, 2]
    assert waiting_in(queue) == 0


def test_what_cannot_be_mapped_or_is_refused_for_good_is_not_sent_again() -> None:
    queue = make_queue()
    flight = admit(queue, Batch(keyed("a", "a", "a")))
    rejected = unmapped(0)
    queue.settled(flight, [(0, rejected), (2, refusal(PERMANENT))], NOW, again=True)
    assert [(end.entry.seq, end.error) for end in queue.ended] == [(0, rejected), (2, refusal(PERMANENT))]
    assert waiting_in(queue) == 0


def test_what_is_scheduled_leaves_when_it_is_due_and_holds_nothing_up() -> None:
    queue = make_queue()
    envelopes: list[Envelope[Any]] = [
        Envelope(data=b"", key="a", scheduled_time=at(WALL + 60)),
        Envelope(data=b"", key="a"),
        Envelope(data=b"", key="a", scheduled_time=at(WALL)),
    ]
    assert list(admit(queue, Batch(envelopes, scheduled=True)).seqs) == [1, 2]
    assert (queue.scheduled, queue.due_at(NOW, WALL)) == (1, NOW + 60)
    assert after(queue, NOW + 59, WALL + 59) is None
    assert after(queue, NOW + 60, WALL + 60) == [0]


def test_the_age_of_what_is_scheduled_counts_from_its_time() -> None:
    queue = make_queue(RetryPolicy(max_age_s=5, jitter=0))
    late: list[Envelope[Any]] = [Envelope(data=b"", scheduled_time=at(WALL + 60))]
    assert queue.take(Batch(late, scheduled=True), NOW, WALL) is None
    flight = queue.next_flight(NOW + 61, WALL + 61)
    assert flight is not None
    fail(queue, flight, {0: RETRIABLE}, NOW + 64.9)
    assert queue.ended == []
    queue.expire(NOW + 65, WALL + 65)
    assert len(queue.ended) == 1


def test_what_is_held_where_the_clock_was_set_back_is_held_again() -> None:
    queue = make_queue()
    envelopes: list[Envelope[Any]] = [Envelope(data=b"", scheduled_time=at(WALL + 60))]
    flight = admit(queue, Batch(envelopes, scheduled=True), wall=WALL + 61)
    queue.settled(flight, [(0, NotYetDueError("not yet", index=0, envelope_id=None))], NOW, again=True)
    assert (queue.ended, queue.scheduled) == ([], 1)
    assert after(queue, NOW, WALL + 60) == [0]


def test_the_halves_of_what_was_too_large_go_alone() -> None:
    queue = make_queue()
    flight = admit(queue, Batch(keyed("a", "b", "c", "d")))
    other = admit(queue, Batch(keyed("e"), first_seq=4))
    fail(queue, flight, dict.fromkeys(range(4), TOO_LARGE))
    assert not queue.wants_batch()
    assert after(queue, NOW) is None  # not beside the other
    queue.settled(other, [], NOW, again=True)
    half = queue.next_flight(NOW, WALL)
    assert half is not None
    assert list(half.seqs) == [0, 1]
    assert half.isolated
    assert after(queue, NOW) is None
    queue.put_back(half)
    assert after(queue, NOW) == [0, 1]


def test_those_of_several_flights_that_were_too_large_keep_their_order() -> None:
    queue = make_queue()
    flights = [admit(queue, Batch(keyed("a", "b"), first_seq=seq)) for seq in (0, 2)]
    for flight in flights:
        fail(queue, flight, {0: TOO_LARGE, 1: TOO_LARGE})
    order: list[int] = []
    while (next_one := queue.next_flight(NOW, WALL)) is not None:
        order += next_one.seqs
        queue.settled(next_one, [], NOW, again=True)
    assert order == [0, 1, 2, 3]


def test_what_was_too_large_waits_behind_an_earlier_one_of_its_key_that_is_sent_again() -> None:
    queue = make_queue()
    first, second = (admit(queue, Batch(keyed("a"), first_seq=seq)) for seq in (0, 1))
    fail(queue, second, {0: TOO_LARGE})
    fail(queue, first, {0: RETRIABLE})
    assert after(queue, NOW) is None
    assert after(queue, NOW + 1) == [0, 1]


def test_the_guilty_are_found_in_few_flights_and_the_innocent_delivered() -> None:
    for guilty in ([0], [999], [500], [0, 999], [3, 4, 700], list(range(10, 20))):
        queue = make_queue(batch_bytes=10_000)
        flight: Flight | None = admit(queue, Batch(keyed(*["a", "b", None, "c"] * 250)))
        delivered: list[int] = []
        flights = 0
        while flight is not None:
            flights += 1
            refused = not set(guilty).isdisjoint(flight.seqs)
            delivered += [] if refused else flight.seqs
            fail(queue, flight, dict.fromkeys(range(len(flight.seqs)), TOO_LARGE) if refused else {})
            flight = queue.next_flight(NOW, WALL)
        assert sorted(end.entry.seq for end in queue.ended) == guilty
        assert delivered == sorted(set(range(1000)) - set(guilty))
        assert flights <= 2 * 10 * len(guilty) + 1


def test_a_flight_is_bounded_by_count_and_by_bytes() -> None:
    queue = make_queue(batch_size=3, batch_bytes=10)
    for size, counts in ((1, [3, 2]), (4, [2, 2, 1]), (50, [1] * 5)):
        flight = admit(queue, Batch(keyed(*[None] * 5, size=size)))
        fail(queue, flight, dict.fromkeys(range(5), RETRIABLE))
        assert [len(after(queue, NOW + 1) or []) for _ in counts] == counts
        assert after(queue, NOW + 1) is None


def test_what_was_put_back_is_the_next_to_leave() -> None:
    queue = make_queue()
    queue.put_back(admit(queue, Batch(keyed("a", None, "a"), first_seq=5)))
    assert (queue.in_flight, waiting_in(queue), queue.oldest()) == (0, 3, 5)
    assert not queue.wants_batch()
    assert after(queue, NOW) == [5, 6, 7]


def test_giving_up_takes_out_all_that_waits_and_a_flight_may_settle_later() -> None:
    for strict_order in (False, True):
        queue = make_queue(strict_order=strict_order)
        envelopes = keyed("a", "b", "a", None)
        envelopes.append(Envelope(data=b"", key="z", scheduled_time=at(WALL + 60)))
        flight = admit(queue, Batch(envelopes[:1]))
        fail(queue, admit(queue, Batch(envelopes[1:2], 1)), {0: RETRIABLE})
        queue.put_back(admit(queue, Batch(envelopes[2:], 2, scheduled=True)))
        waiting = [entry.seq for entry in queue.take_out_all()]
        assert waiting == [1, 2, 3, 4]
        assert waiting_in(queue) == 0
        fail(queue, flight, {0: OUTAGE}, again=False)
        assert [end.entry.seq for end in queue.ended] == [0]
        assert (waiting_in(queue), queue.in_flight, queue.oldest()) == (0, 0, None)


def test_a_dead_letter_is_an_envelope_of_its_own() -> None:
    queue = make_queue()
    fail(queue, admit(queue, Batch(keyed("a"), first_seq=3)), {0: PERMANENT})
    end = queue.ended.pop()
    queue.add_dead_letter(Envelope(data=b"letter"), end, NOW)
    assert queue.oldest() == 3
    assert queue.due_at(NOW, WALL) == NOW
    flight = queue.next_flight(NOW, WALL)
    assert flight is not None
    fail(queue, flight, {0: PERMANENT})
    assert queue.ended.pop().entry.origin is end


def test_what_was_counted_goes_with_an_envelope_to_its_end() -> None:
    """Through retries, lanes, dead letters, what was scheduled and what was given up."""
    queue = make_queue(RetryPolicy(2, initial_backoff_s=1, jitter=0))
    sizes = [len(key) + 10 for key in ("", "a", "a", "b", "c")]
    envelopes = [Envelope(data=bytes(size), key=f"{number % 2}") for number, size in enumerate(sizes)]
    flight = admit(queue, Batch(envelopes))
    assert flight.bytes == sum(sizes)
    fail(queue, flight, {1: RETRIABLE, 3: PERMANENT})
    assert [(end.entry.seq, end.entry.size) for end in queue.ended] == [(3, sizes[3])]
    end = queue.ended[0]
    queue.ended.clear()
    queue.add_dead_letter(Envelope(data=b"much longer than it was, with headers"), end, NOW)
    letter = queue.next_flight(NOW, WALL)
    assert letter is not None
    assert letter.bytes == sizes[3]
    again = queue.next_flight(NOW + 2, WALL)
    assert again is not None
    assert again.bytes == sizes[1]
    assert (
        queue.take(Batch([Envelope(data=b"xyz", scheduled_time=at(WALL + 60))], 5, scheduled=True), NOW, WALL) is None
    )
    assert [entry.size for entry in queue.take_out_all()] == [3]


def test_what_is_ready_waits_behind_one_of_its_key_that_fails_again() -> None:
    queue = make_queue(batch_size=2)
    first = queue.take(Batch([Envelope(data=b"%d" % number, key="a") for number in range(3)]), NOW, WALL)
    assert first is not None
    queue.settled(first, [(index, refusal(RETRIABLE)) for index in range(3)], NOW, again=True)
    second = queue.next_flight(NOW + 1, WALL)
    assert second is not None
    assert list(second.seqs) == [0, 1]  # the third is ready, but a batch is full
    queue.settled(second, [(index, refusal(RETRIABLE)) for index in range(2)], NOW + 1, again=True)
    assert queue.next_flight(NOW + 1, WALL) is None
    third = queue.next_flight(NOW + 3, WALL)
    assert third is not None
    assert list(third.seqs) == [0, 1]
    queue.settled(third, [], NOW + 3, again=True)
    last = queue.next_flight(NOW + 3, WALL)
    assert last is not None
    assert list(last.seqs) == [2]


def test_what_was_too_large_in_company_has_not_failed_by_itself() -> None:
    queue = make_queue()
    flight = admit(queue, Batch(keyed("a", "b")))
    fail(queue, flight, {0: TOO_LARGE, 1: TOO_LARGE})
    alone = queue.next_flight(NOW, WALL)
    assert alone is not None
    fail(queue, alone, {0: RETRIABLE})
    due = queue.due_at(NOW, WALL)
    assert due == NOW  # the other one, in its turn
    other = queue.next_flight(NOW, WALL)
    assert other is not None
    queue.settled(other, [], NOW, again=True)
    assert queue.due_at(NOW, WALL) == NOW + 1  # the first back-off


def test_what_is_due_grows_old_while_nothing_is_sent() -> None:
    queue = make_queue(RetryPolicy(max_age_s=5))
    batch = Batch([Envelope(data=b"", scheduled_time=at(WALL + 10))], scheduled=True)
    assert queue.take(batch, NOW, WALL) is None
    queue.expire(NOW + 14.9, WALL + 14.9)
    assert (queue.ended, queue.scheduled, queue.oldest()) == ([], 0, 0)
    queue.expire(NOW + 15, WALL + 15)
    assert [type(end.error) for end in queue.ended] == [SenderError]
    assert queue.oldest() is None


def test_a_clock_that_jumps_ahead_makes_nothing_older_than_it_is() -> None:
    queue = make_queue(RetryPolicy(max_age_s=60))
    batch = Batch([Envelope(data=b"", scheduled_time=at(WALL + 60))], scheduled=True)
    assert queue.take(batch, NOW, WALL) is None
    flight = queue.next_flight(NOW + 1, WALL + 3600)
    assert flight is not None
    assert list(flight.seqs) == [0]
    assert queue.ended == []


def test_what_was_long_taken_is_not_too_old_when_the_clock_jumps_past_its_time() -> None:
    queue = make_queue(RetryPolicy(max_age_s=60))
    batch = Batch([Envelope(data=b"", scheduled_time=at(WALL + 7200))], scheduled=True)
    assert queue.take(batch, NOW, WALL) is None
    queue.expire(NOW + 3600, WALL + 3600)
    flight = queue.next_flight(NOW + 3601, WALL + 7200 + 120)
    assert flight is not None
    assert queue.ended == []
    fail(queue, flight, {0: OUTAGE})
    queue.expire(NOW + 3659, WALL + 7378)
    assert queue.ended == []
    queue.expire(NOW + 3660, WALL + 7379)  # from here on it is as old as any other
    assert len(queue.ended) == 1


def test_what_waited_in_the_buffer_for_its_time_has_its_own_time_from_then() -> None:
    queue = make_queue(RetryPolicy(max_age_s=60))
    times = [at(WALL + 59), at(WALL + 70), at(WALL - 10), None]
    batch = Batch([Envelope(data=b"", scheduled_time=time) for time in times], scheduled=True)
    late = SenderError("late")
    queue.expire(NOW + 60, WALL + 60)
    queue.expire_batch(batch, NOW + 60, WALL + 60, late)
    assert [end.entry.seq for end in queue.ended] == [2, 3]
    queue.ended.clear()
    queue.expire(NOW + 118.9, WALL + 118.9)
    assert queue.ended == []
    queue.expire(NOW + 119, WALL + 119)
    assert [end.entry.seq for end in queue.ended] == [0]
    queue.ended.clear()
    queue.expire(NOW + 130, WALL + 130)
    assert [end.entry.seq for end in queue.ended] == [1]


# -- transactions


def aborted_by(queue: SendQueue, culprit: int) -> None:
    """A flight of three, aborted for one of them."""
    flight = queue.take(Batch([Envelope(data=b"x") for _ in range(3)]), NOW, WALL)
    assert flight is not None
    failures = [(n, refusal(RETRIABLE if n == culprit else ABORTED_CODE)) for n in range(3)]
    queue.settled(flight, failures, NOW, again=True)


def test_who_had_its_transaction_aborted_goes_apart_from_others() -> None:
    queue = make_queue()
    aborted_by(queue, culprit=1)
    innocent = queue.next_flight(NOW, WALL)
    assert innocent is not None
    assert list(innocent.seqs) == [0, 2]  # at once
    queue.settled(innocent, [(0, refusal(OUTAGE)), (1, refusal(OUTAGE))], NOW, again=True)
    flights = [queue.next_flight(NOW + 1, WALL + 1) for _ in range(3)]  # now all of them are due
    assert [list(flight.seqs) for flight in flights if flight is not None] == [[0], [1], [2]]


def test_an_abort_costs_the_innocent_no_attempt() -> None:
    queue = make_queue(RetryPolicy(max_attempts=1, initial_backoff_s=1, jitter=0))
    aborted_by(queue, culprit=0)
    assert [end.entry.seq for end in queue.ended] == [0]
    flight = queue.next_flight(NOW, WALL)
    assert flight is not None
    assert list(flight.seqs) == [1, 2]


def test_the_neighbours_of_an_invalid_record_are_looked_at_again() -> None:
    queue = make_queue()
    flight = queue.take(Batch([Envelope(data=b"x") for _ in range(3)]), NOW, WALL)
    assert flight is not None
    failures = [(n, refusal(INVALID_RECORD if n == 1 else INVALID_DIFFERENT_RECORD)) for n in range(3)]
    queue.settled(flight, failures, NOW, again=True)
    assert queue.ended == []
    sent: list[int] = []
    while (flight := queue.next_flight(NOW, WALL)) is not None:
        assert flight.isolated
        guilty = 1 in flight.seqs
        sent += flight.seqs
        failures = [(n, refusal(INVALID_RECORD)) for n in range(len(flight.seqs))] if guilty else []
        queue.settled(flight, failures, NOW, again=True)
    assert [end.entry.seq for end in queue.ended] == [1]
    assert {0, 2} <= set(sent)
