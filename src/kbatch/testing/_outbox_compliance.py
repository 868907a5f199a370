"""What every outbox promises to relays, to DURABLE senders and to those who look after dead letters.

The names are those of Wolverine's suites for nodes, message stores and dead letter administration, as far as kbatch has
what they test. Left out, with the reasons:

- Incoming messages, those that are handled, and duplicates: they are an inbox's, which is another store.
- Fetch by owner, discard and reassign outgoing: no row has an owner. A relay has buckets, and who takes a bucket has
  its rows: `test_eject_a_stale_one`, `test_every_bucket_survives_the_loss_of_the_nodes_that_held_it`.
- Write, add and remove assignments: there is no leader that writes them. Each node takes and gives up its own.
- Old node records, zero retention, clearing all: a renewal removes lines that have run out, and nothing clears an
  outbox but its owner's SQL.
- Pausing stops at once: that is `Relay.stop`, and no call of a store.
- The replayable flag: there is none. A replay moves letters at once, in one transaction.
- Rows of transactions that end in another order than they took their numbers: only the store's author can have two of
  the application's transactions open. ``docs/stores.md`` says what a store must promise there.
"""

import contextlib
import random
import threading
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, cast

import pytest

import kbatch
from kbatch._fastmap import packed_key_hash, unpack_record, wall_time
from kbatch.stores import (
    BUCKETS,
    Failure,
    HeldKey,
    KeptRow,
    MappedBatch,
    OutboxAdmin,
    OutboxStore,
    Place,
    Reading,
    RefusedWriteError,
    StoredRow,
    Table,
)

__all__ = ["DeadLetterCompliance", "OutboxCompliance"]

_ALL = kbatch.OutboxQuery()
_EVERY = range(BUCKETS)
_HOUR_S = 3600.0
_LEASE_S = 60.0
_NOTHING: dict[str, Any] = {"done": [], "done_later": [], "failures": [], "failures_later": []}


# -- what tests do


def _numbered(numbers: Iterable[int], keys: int = 20, **options: Any) -> list[kbatch.Envelope[Any]]:
    """Envelopes whose bodies are numbers; of each key these grow."""
    return [kbatch.Envelope(data=b"%d" % n, key=f"k{n % keys}", **options) for n in numbers]


def _keyed(*keys: str, **options: Any) -> list[kbatch.Envelope[Any]]:
    return [kbatch.Envelope(data=key.encode(), key=key, **options) for key in keys]


def _add(outbox: Any, envelopes: Iterable[kbatch.Envelope[Any]], topic: str = "orders") -> None:
    """By a writer, which need not be able to write at once."""
    mapped = [batch for each in envelopes if (batch := outbox.map(topic, each)) is not None]
    with contextlib.closing(outbox.open_writer()) as writer:
        for _ in range(100):
            if writer.commit(lambda: mapped):
                return
    raise AssertionError("the writer never could write")


def _renew(store: OutboxStore, owner: str, lease_s: float = _LEASE_S, **options: Any) -> tuple[dict[int, int], int]:
    leases, share = store.renew(owner, lease_s, **{"release": (), "avoid": (), **options})
    assert len(leases) == len({bucket for bucket, _ in leases})
    return dict(leases), share


def _read(
    store: OutboxStore,
    floors: Mapping[int, int],
    *,
    limit: int = 100_000,
    max_bytes: int = 10**9,
    in_flight: Collection[Place] = (),
) -> Reading:
    return store.read(floors, limit=limit, max_bytes=max_bytes, in_flight=lambda: in_flight)


def _hot(outbox: Any) -> list[StoredRow]:
    """What is to be sent, by its numbers."""
    with contextlib.closing(outbox.open_store()) as store:
        return sorted(_read(store, dict.fromkeys(_EVERY, 0)).rows, key=lambda row: row[1])


def _kept(outbox: Any, table: Table) -> list[KeptRow]:
    """The rows of a table, by their numbers."""
    with contextlib.closing(outbox.open_admin()) as admin:
        found = cast("OutboxAdmin", admin).page(table, None, since_ms=None, until_ms=None, limit=100_000)
    return sorted(found, key=lambda row: row.seq)


def _places(rows: Iterable[Any]) -> list[Place]:
    return [(row.bucket, row.seq) if isinstance(row, KeptRow) else (row[0], row[1]) for row in rows]


def _bodies(rows: Iterable[Any]) -> list[bytes | None]:
    packed = [cast("bytes", row.packed) if isinstance(row, KeptRow) else row[2] for row in rows]
    return [unpack_record(each)[4] for each in packed]


def _failed(row: StoredRow, due_in_s: float | None, attempts: int = 1, error: str = "refused") -> Failure:
    return Failure(row[0], row[1], due_in_s, attempts, error, packed_key_hash(row[2]))


def _seqs(rows: Iterable[Any]) -> list[int]:
    return [row.seq for row in rows]


def _read_due(
    store: OutboxStore, *, avoid: Collection[Place] = (), longest_s: float = _HOUR_S, limit: int = 100
) -> Any:
    return store.read_due(_EVERY, avoid=avoid, longest_s=longest_s, limit=limit)


def _admit(store: OutboxStore, leases: Mapping[int, int], *, limit: int = 100) -> int:
    return store.admit_scheduled(leases, store.due_scheduled(_EVERY, avoid=(), limit=limit))


def _in(seconds: float) -> datetime:
    return datetime.fromtimestamp(wall_time() + seconds, timezone.utc)


def _holding(store: OutboxStore, leases: Mapping[int, int]) -> set[int]:
    """The buckets whose leases hold."""
    return set(leases) - store.settle(leases, **_NOTHING)


class _Hooks:
    """What the author of a store tells the suite."""

    @pytest.fixture
    def outbox(self) -> Any:
        """An empty outbox whose tables are there, as `kbatch.stores.OutboxBase` describes it."""
        raise NotImplementedError("a subclass of OutboxCompliance has a fixture `outbox`")

    def let_time_pass(self, outbox: Any, seconds: float) -> None:
        """Puts the database's clock ahead, also by a negative time; or moves all times that are stored the other way:
        when leases and relays' own lines end, when what waits is due, when what is dead has died."""
        raise NotImplementedError("a subclass of OutboxCompliance has let_time_pass")

    def refuse_row(self, outbox: Any, table: str, message_id: uuid.UUID) -> None:
        """Has the database refuse to insert the row with this id into ``"outbox"``, the hot table, or ``"dead"``."""
        pytest.skip("this store is not asked to refuse rows: refuse_row is not overridden")

    def take_rows(self, outbox: Any, table: str) -> None:
        """After `refuse_row`, has them succeed again."""
        raise NotImplementedError("a subclass with refuse_row has take_rows, too")

    @pytest.fixture
    def store(self, outbox: Any) -> Iterator[OutboxStore]:
        """A relay's connection."""
        with contextlib.closing(outbox.open_store()) as store:
            yield store

    def _bury(self, outbox: Any, *envelopes: kbatch.Envelope[Any], error: str = "refused") -> None:
        """Has them die at once, with all that is to be sent; then an hour passes."""
        _add(outbox, envelopes)
        with contextlib.closing(outbox.open_store()) as store:
            leases, _ = _renew(store, "undertaker")
            failures = [_failed(row, None, 3, error) for row in _read(store, dict.fromkeys(_EVERY, 0)).rows]
            assert store.settle(leases, **{**_NOTHING, "failures": failures}) == set()
            store.leave("undertaker", keep=())
        self.let_time_pass(outbox, _HOUR_S)


class OutboxCompliance(_Hooks):
    """What relays and DURABLE senders need of an outbox. A subclass has the fixture ``outbox`` and `let_time_pass`, and
    `refuse_row` with `take_rows` if its database can refuse a row."""

    # -- nodes: relays and their buckets

    def test_none_on_a_blank_slate(self, store: OutboxStore) -> None:
        assert (store.run_out(), store.left()) == (set(), 0)
        assert _holding(store, {bucket: token for bucket in _EVERY for token in (0, 1)}) == set()
        store.leave("nobody", keep=())

    def test_the_only_known_node_holds_all_buckets(self, store: OutboxStore) -> None:
        first, share = _renew(store, "first")
        assert (set(first), share) == (set(_EVERY), BUCKETS)
        assert 0 not in first.values()
        assert _holding(store, first) == set(_EVERY)

    def test_a_health_check_keeps_its_leases(self, outbox: Any, store: OutboxStore) -> None:
        first, _ = _renew(store, "first")
        for _ in range(3):
            self.let_time_pass(outbox, _LEASE_S / 2)
            assert _renew(store, "first") == (first, BUCKETS)
        assert _holding(store, first) == set(_EVERY)

    def test_hand_over_between_nodes(self, store: OutboxStore) -> None:
        first, _ = _renew(store, "first")
        assert _renew(store, "second") == ({}, BUCKETS // 2)
        mine, share = _renew(store, "first", release=range(32))
        assert (mine, share) == ({bucket: first[bucket] for bucket in range(32, 64)}, 32)  # and none is taken back
        theirs, _ = _renew(store, "second")
        assert set(theirs) == set(range(32))
        assert all(theirs[bucket] != first[bucket] for bucket in theirs)
        assert _holding(store, first) == set(range(32, 64))

    def test_a_node_takes_no_bucket_that_it_avoids(self, store: OutboxStore) -> None:
        assert set(_renew(store, "first", avoid=(0, 1))[0]) == set(range(2, 64))

    def test_a_second_node_is_balanced(self, store: OutboxStore) -> None:
        owners = ["first", "second", "third"]
        held: dict[str, dict[int, int]] = {owner: {} for owner in owners}
        for _ in range(3):
            for owner in owners:
                share = _renew(store, owner, release=())[1]
                surplus = sorted(held[owner])[: max(0, len(held[owner]) - share)]
                held[owner], share = _renew(store, owner, release=surplus)
        assert Counter(len(leases) for leases in held.values()) == {20: 1, 22: 2}
        assert {bucket for leases in held.values() for bucket in leases} == set(_EVERY)

    def test_delete_one(self, store: OutboxStore) -> None:
        _renew(store, "second")
        _renew(store, "first")
        store.leave("second", keep=(30, 31))
        mine, share = _renew(store, "first")
        assert (set(mine), share) == (set(_EVERY) - {30, 31}, BUCKETS)  # these were not given back

    def test_nobody_gives_up_what_another_has(self, store: OutboxStore) -> None:
        first, _ = _renew(store, "first")
        store.leave("second", keep=())
        _renew(store, "third", release=_EVERY)
        assert _renew(store, "first")[0] == first
        assert _holding(store, first) == set(_EVERY)

    def test_eject_a_stale_one(self, outbox: Any, store: OutboxStore) -> None:
        first, _ = _renew(store, "first")
        assert _renew(store, "second") == ({}, 32)
        self.let_time_pass(outbox, _LEASE_S + 1)
        assert store.run_out() == {"first"}
        assert _holding(store, first) == set()  # also before somebody takes them
        second, share = _renew(store, "second")
        assert (set(second), share) == (set(_EVERY), BUCKETS)
        assert all(second[bucket] != first[bucket] for bucket in _EVERY)
        assert store.run_out() == set()

    def test_registering_again_after_an_ejection(self, outbox: Any, store: OutboxStore) -> None:
        first, _ = _renew(store, "first")
        self.let_time_pass(outbox, _LEASE_S + 1)
        again, share = _renew(store, "first", avoid=(1,))
        assert (set(again), share) == (set(_EVERY) - {1}, BUCKETS)
        assert all(again[bucket] != first[bucket] for bucket in again)  # what it had was lost in between
        assert _holding(store, first) == set()

    def test_only_owners_that_are_fenced_lose_their_leases(self, outbox: Any, store: OutboxStore) -> None:
        _renew(store, "first")
        _renew(store, "first", release=range(32))
        _renew(store, "second", avoid=range(32, 64))
        self.let_time_pass(outbox, _LEASE_S + 1)
        assert store.run_out() == {"first", "second"}
        assert _renew(store, "third", fenced=()) == ({}, BUCKETS)
        assert set(_renew(store, "third", fenced=("second",))[0]) == set(range(32))
        assert set(_renew(store, "first", fenced=())[0]) == set(range(32, 64))  # its own

    def test_every_bucket_survives_the_loss_of_the_nodes_that_held_it(self, outbox: Any, store: OutboxStore) -> None:
        # Start several, take away the first, take away another.
        owners = ["first", "second", "third"]
        seen: list[dict[int, int]] = []
        while owners:
            for _ in range(3):
                for owner in owners:
                    leases, share = _renew(store, owner)
                    leases, _ = _renew(store, owner, release=sorted(leases)[share:])
                    seen.append(leases)
            held = [_renew(store, owner)[0] for owner in owners]
            assert sorted(bucket for leases in held for bucket in leases) == list(_EVERY), owners
            self.let_time_pass(outbox, _LEASE_S / 2)
            for owner in owners[1:]:
                _renew(store, owner)
            self.let_time_pass(outbox, _LEASE_S / 2 + 1)
            owners.pop(0)
        assert all(_holding(store, leases) == set() for leases in seen)

    def test_a_bucket_is_held_by_one_only(self, outbox: Any, store: OutboxStore) -> None:
        seeded = random.Random(15)
        told: dict[str, dict[int, int]] = {owner: {} for owner in ("a", "b", "c", "d")}
        for _ in range(40):
            owner = seeded.choice(list(told))
            step = seeded.random()
            if step < 0.1:
                store.leave(owner, keep=seeded.sample(_EVERY, 5))
            elif step < 0.3:
                self.let_time_pass(outbox, seeded.choice([1.0, 20.0, 30.0, _LEASE_S + 1]))
            else:
                told[owner], _ = _renew(store, owner, release=seeded.sample(_EVERY, seeded.choice([0, 10, 40])))
            held = [_holding(store, leases) for leases in told.values()]
            assert sum(map(len, held)) == len(set().union(*held)), held

    def test_take_over_with_racing_nodes(self, outbox: Any, store: OutboxStore) -> None:
        told: dict[str, dict[int, int]] = {}
        failed: list[BaseException] = []

        def race(owner: str) -> None:
            try:
                with contextlib.closing(outbox.open_store()) as mine:
                    leases: dict[int, int] = {}
                    share = BUCKETS
                    for _ in range(8):
                        leases, share = _renew(mine, owner, release=sorted(leases)[share:])
                    told[owner] = leases
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=race, args=(f"node {n}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failed == []
        held = [_holding(store, leases) for leases in told.values()]
        assert held == [set(leases) for leases in told.values()]
        assert sum(map(len, held)) == len(set().union(*held))
        assert store.run_out() == set()  # nobody who lives was removed

    @pytest.mark.parametrize(("back_s", "is_free"), [(-40, False), (0, False), (50, False), (70, True), (3600, True)])
    def test_a_lease_of_before_the_clock_was_set_back_has_run_out(
        self, outbox: Any, store: OutboxStore, back_s: int, is_free: bool
    ) -> None:
        first, _ = _renew(store, "first")
        self.let_time_pass(outbox, -back_s)
        assert _holding(store, first) == (set() if is_free else set(_EVERY))
        second, share = _renew(store, "second")
        assert (set(second), share) == ((set(_EVERY), BUCKETS) if is_free else (set(), 32))

    # -- message store: what is added

    def test_store_one_outgoing(self, outbox: Any) -> None:
        deliver_by = _in(_HOUR_S)
        envelope = kbatch.Envelope(data=b"one", key="k", partition=2, headers={"h": "v"}, deliver_by=deliver_by)
        _add(outbox, [envelope])
        (row,) = _hot(outbox)
        topic, partition, _, key, value, headers = unpack_record(row[2])
        assert (topic, partition, key, value, dict(headers)["h"]) == ("orders", 2, b"k", b"one", b"v")
        assert (row[0] in _EVERY, row[1] > 0) == (True, True)
        assert row[3] == (deliver_by - datetime(1970, 1, 1, tzinfo=timezone.utc)) // timedelta(microseconds=1)

    def test_store_many_outgoing(self, outbox: Any) -> None:
        _add(outbox, _numbered(range(300), keys=100))
        _add(outbox, _numbered(range(300, 600), keys=100))
        rows = _hot(outbox)
        assert _bodies(rows) == [b"%d" % n for n in range(600)]
        assert len({row[1] for row in rows}) == 600
        of_key = [{row[0] for row in rows[n::100]} for n in range(100)]
        assert all(len(buckets) == 1 for buckets in of_key)  # a key is in one bucket
        assert len(set().union(*of_key)) > 30

    def test_nothing_is_stored_of_a_transaction_that_fails(self, outbox: Any) -> None:
        def fail() -> Sequence[MappedBatch]:
            raise RuntimeError("no")

        with contextlib.closing(outbox.open_writer()) as writer:
            with pytest.raises(RuntimeError, match="no"):
                writer.commit(fail)
            assert writer.commit(lambda: [outbox.map("orders", _keyed("a")[0])])
        assert _bodies(_hot(outbox)) == [b"a"]

    def test_what_has_expired_is_not_stored(self, outbox: Any) -> None:
        assert outbox.map("orders", kbatch.Envelope(data=b"1", deliver_by=_in(-1.0))) is None

    def test_relays_of_the_process_are_told_of_what_is_committed(self, outbox: Any) -> None:
        told: list[bool] = []
        outbox.watch(told.append)
        _add(outbox, _keyed("a"))
        assert True in told
        outbox.unwatch(told.append)
        outbox.unwatch(told.append)
        told.clear()
        _add(outbox, _keyed("a"))
        assert told == []

    def test_no_number_is_given_twice(self, outbox: Any, store: OutboxStore) -> None:
        leases, _ = _renew(store, "relay")
        before: set[int] = set()
        for _ in range(3):
            _add(outbox, _keyed("a", "b"))
            rows = _hot(outbox)
            assert before.isdisjoint({row[1] for row in rows})
            before |= {row[1] for row in rows}
            store.settle(leases, **{**_NOTHING, "done": _places(rows)})
        assert len(before) == 6

    # -- what is read

    def test_load_outgoing_by_bucket_and_number(self, outbox: Any, store: OutboxStore) -> None:
        _add(outbox, _numbered(range(300), keys=300))
        reading = _read(store, dict.fromkeys(_EVERY, 0))
        places = _places(reading.rows)
        for bucket in _EVERY:
            mine = [seq for of, seq in places if of == bucket]
            assert mine == sorted(mine)
            assert not mine or reading.floors[bucket] >= mine[-1]
        assert (len(set(places)), reading.ended) == (300, set(_EVERY))
        assert max(reading.floors.values()) <= max(seq for _, seq in places)  # what comes later is above
        # What others may yet bring to light below the floors is read again, but not what is in flight.
        again = _read(store, reading.floors, in_flight=set(places))
        assert (again.rows, again.ended) == ([], set(reading.floors))
        _add(outbox, _keyed("new"))
        assert _bodies(_read(store, {**dict.fromkeys(_EVERY, 0), **reading.floors}, in_flight=set(places)).rows) == [
            b"new"
        ]

    def test_a_full_bucket_leaves_room_for_the_others(self, outbox: Any, store: OutboxStore) -> None:
        _add(outbox, _numbered(range(5000), keys=1))
        _add(outbox, _numbered(range(100), keys=100))
        rows = _hot(outbox)
        full = rows[0][0]
        of_full = [row[1] for row in rows if row[0] == full]
        reading = _read(store, {full: 0, **dict.fromkeys(_EVERY, 0)}, limit=1000)
        assert len({row[0] for row in reading.rows}) > 20
        assert len(reading.rows) == 1000  # what the others leave of their share
        mine = [row[1] for row in reading.rows if row[0] == full]
        assert mine == of_full[: len(mine)]
        assert (reading.floors[full], reading.ended) == (mine[-1], set(_EVERY) - {full})

    def test_reading_ends_at_its_bytes_and_its_rows(self, outbox: Any, store: OutboxStore) -> None:
        _add(outbox, [kbatch.Envelope(data=b"x" * 1000, key="one") for _ in range(30)])
        rows = _hot(outbox)
        bucket = rows[0][0]
        few = _read(store, {bucket: 0}, max_bytes=2500)
        assert (1 <= len(few.rows) <= 3, few.ended) == (True, set())
        reading = _read(store, {bucket: 0}, limit=7)
        assert (_places(reading.rows), reading.floors) == (_places(rows[:7]), {bucket: rows[6][1]})

    def test_fetch_of_a_buckets_own_rows_only(self, outbox: Any, store: OutboxStore) -> None:
        _add(outbox, _numbered(range(100), keys=100))
        assert {row[0] for row in _read(store, dict.fromkeys(range(10), 0)).rows} <= set(range(10))
        assert _read(store, {}) == ([], {}, set())

    # -- what is written

    def test_counts(self, outbox: Any, store: OutboxStore) -> None:
        _add(outbox, _numbered(range(4), keys=4))
        leases, _ = _renew(store, "relay")
        rows = _hot(outbox)
        assert store.left() > 0
        failures = [_failed(rows[0], _HOUR_S), _failed(rows[1], None)]
        store.settle(leases, **{**_NOTHING, "done": _places(rows[2:]), "failures": failures})
        assert store.left() > 0  # one waits for its next attempt
        store.settle(leases, **{**_NOTHING, "done_later": _places(rows[:1])})
        _add(outbox, _numbered(range(1), scheduled_time=_in(_HOUR_S)))
        assert store.left() == 0  # but for the dead and what is scheduled for later
        self.let_time_pass(outbox, _HOUR_S + 1)
        assert store.left() > 0

    def test_delete_one_and_many_outgoing(self, outbox: Any, store: OutboxStore) -> None:
        _add(outbox, _numbered(range(100)))
        leases, _ = _renew(store, "relay")
        rows = _hot(outbox)
        assert store.settle(leases, **{**_NOTHING, "done": _places(rows[50:51])}) == set()
        assert _hot(outbox) == rows[:50] + rows[51:]
        store.settle(leases, **{**_NOTHING, "done": _places(rows[:50])})
        assert _hot(outbox) == rows[51:]

    def test_move_to_dead_letters_with_all_that_it_had(self, outbox: Any, store: OutboxStore) -> None:
        envelopes = [each.replace(deliver_by=_in(_HOUR_S)) for each in _keyed("a", "b", "c", "d")]
        _add(outbox, envelopes)
        rows = _hot(outbox)
        leases, _ = _renew(store, "relay")
        failures = [_failed(rows[1], 0.0), _failed(rows[2], _HOUR_S), _failed(rows[3], None, 20)]
        assert store.settle(leases, **{**_NOTHING, "done": _places(rows[:1]), "failures": failures}) == set()
        later, dead = _kept(outbox, "later"), _kept(outbox, "dead")
        assert (_hot(outbox), _places(later), _places(dead)) == ([], _places(rows[1:3]), _places(rows[3:]))
        for row, kept, envelope in zip(rows[1:], [*later, *dead], envelopes[1:], strict=True):
            assert (kept.packed, kept.deliver_by, kept.id) == (row[2], row[3], envelope.id.bytes)
            assert isinstance(kept.created_at, int)
            assert abs(kept.created_at - wall_time() * 1e6) < 3_600_000_000
        assert [(each.attempts, each.error) for each in dead] == [(20, "refused")]
        assert abs(dead[0].at_ms - wall_time() * 1000) < 3_600_000

    def test_move_to_dead_letters_with_a_missing_source(self, outbox: Any, store: OutboxStore) -> None:
        # As after a commit whose answer was lost.
        _add(outbox, _keyed("a", "b"))
        rows = _hot(outbox)
        leases, _ = _renew(store, "relay")
        written = {"done": _places(rows[:1]), "failures": [_failed(rows[1], None)]}
        for _ in range(2):
            assert store.settle(leases, **{**_NOTHING, **written}) == set()
        assert (_hot(outbox), _places(_kept(outbox, "dead"))) == ([], _places(rows[1:]))
        gone = {"done_later": _places(rows), "failures_later": [_failed(rows[0], None), _failed(rows[1], 0.0)]}
        assert store.settle(leases, **{**_NOTHING, **gone}) == set()
        assert (_kept(outbox, "later"), _places(_kept(outbox, "dead"))) == ([], _places(rows[1:]))

    def test_increment_attempts(self, outbox: Any, store: OutboxStore) -> None:
        _add(outbox, _keyed("a"))
        (row,) = _hot(outbox)
        leases, _ = _renew(store, "relay")
        store.settle(leases, **{**_NOTHING, "failures": [_failed(row, 0.0)]})
        (due,) = _read_due(store)
        assert due == (row[0], row[1], row[2], row[3], 1, packed_key_hash(row[2]))
        store.settle(leases, **{**_NOTHING, "failures_later": [_failed(row, 10.0, 2, "once more")]})
        assert _read_due(store) == []
        self.let_time_pass(outbox, 11.0)
        _renew(store, "relay")
        assert [each.attempts for each in _read_due(store)] == [2]
        assert [each.error for each in _kept(outbox, "later")] == ["once more"]
        store.settle(_renew(store, "relay")[0], **{**_NOTHING, "failures_later": [_failed(row, None, 3)]})
        assert (_kept(outbox, "later"), [each.attempts for each in _kept(outbox, "dead")]) == ([], [3])

    def test_of_a_key_only_the_lowest_that_waits_is_due(self, outbox: Any, store: OutboxStore) -> None:
        _add(outbox, [*_numbered(range(3), keys=1), kbatch.Envelope(data=b"a"), kbatch.Envelope(data=b"b")])
        rows = _hot(outbox)
        leases, _ = _renew(store, "relay")
        failures = [_failed(row, _HOUR_S if row is rows[0] else 0.0) for row in rows]
        store.settle(leases, **{**_NOTHING, "failures": failures})
        assert sorted(_seqs(_read_due(store))) == [rows[3][1], rows[4][1]]
        bucket, key_hash = failures[0].bucket, failures[0].key_hash
        assert key_hash is not None
        assert store.held_keys(_EVERY) == [HeldKey(bucket, key_hash, rows[0][1])]
        assert store.held_keys(sorted(set(_EVERY) - {bucket})) == []
        store.settle(leases, **{**_NOTHING, "done_later": _places(rows[:1])})
        assert sorted(_seqs(_read_due(store))) == [rows[1][1], rows[3][1], rows[4][1]]
        others = set(_EVERY) - {row[0] for row in rows}
        assert store.read_due(sorted(others), avoid=(), longest_s=_HOUR_S, limit=10) == []

    def test_what_is_due_for_the_longest_comes_first_and_what_is_in_flight_takes_nobodys_place(
        self, outbox: Any, store: OutboxStore
    ) -> None:
        _add(outbox, _numbered(range(6), keys=6))
        rows = _hot(outbox)
        leases, _ = _renew(store, "relay")
        failures = [_failed(row, 10.0 - n) for n, row in enumerate(rows)]
        store.settle(leases, **{**_NOTHING, "failures": failures})
        self.let_time_pass(outbox, 20.0)
        first = _read_due(store, limit=2)
        assert _places(first) == _places(rows[:3:-1])
        assert _places(_read_due(store, avoid=set(_places(first)), limit=3)) == _places(rows[3:0:-1])

    def test_what_was_put_off_before_the_clock_was_set_back_is_due(self, outbox: Any, store: OutboxStore) -> None:
        _add(outbox, _numbered(range(3), keys=3))
        rows = _hot(outbox)
        leases, _ = _renew(store, "relay", lease_s=1000.0)
        failures = [_failed(row, 50.0 * n) for n, row in enumerate(rows)]
        store.settle(leases, **{**_NOTHING, "failures": failures})
        assert _seqs(_read_due(store, longest_s=60.0)) == [rows[0][1], rows[2][1]]

    def test_nothing_is_written_of_a_bucket_whose_lease_does_not_hold(self, outbox: Any, store: OutboxStore) -> None:
        _add(outbox, _numbered(range(40), keys=40))
        rows = _hot(outbox)
        lost = rows[0][0]
        leases, _ = _renew(store, "first")
        later = [_failed(row, 0.0) for row in rows[20:]]
        store.settle(leases, **{**_NOTHING, "failures": later})
        for how in ("given up", "another's", "run out"):
            if how == "given up":
                _renew(store, "first", release=(lost,))
            elif how == "another's":
                other, _ = _renew(store, "second", lease_s=1.0, avoid=set(_EVERY) - {lost})
                assert set(other) == {lost}
            else:
                self.let_time_pass(outbox, 2.0)
                leases = {**leases, **other}
            written: dict[str, Any] = {
                "done": _places(row for row in rows[:10] if row[0] == lost),
                "done_later": _places(row for row in rows[20:30] if row[0] == lost),
                "failures": [_failed(row, None) for row in rows[10:20] if row[0] == lost],
                "failures_later": [each._replace(attempts=9) for each in later[10:] if each.bucket == lost],
            }
            assert store.settle(leases, **written) == {lost}, how
        dead = [_failed(row, None) for row in rows[10:20]]
        put_off = [each._replace(due_in_s=_HOUR_S, attempts=9) for each in later[10:]]
        assert store.settle(
            leases, done=_places(rows[:10]), done_later=_places(rows[20:30]), failures=dead, failures_later=put_off
        ) == {lost}
        assert _hot(outbox) == [row for row in rows[:20] if row[0] == lost]
        assert _places(_kept(outbox, "dead")) == _places(row for row in rows[10:20] if row[0] != lost)
        kept = _kept(outbox, "later")
        assert _places(kept) == _places([*(row for row in rows[20:30] if row[0] == lost), *rows[30:]])
        assert all(each.attempts == (1 if each.bucket == lost else 9) for each in kept)

    def test_a_write_that_fails_changes_nothing(self, outbox: Any, store: OutboxStore) -> None:
        envelopes = _numbered(range(4), keys=4)
        _add(outbox, envelopes)
        rows = _hot(outbox)
        leases, _ = _renew(store, "relay")
        self.refuse_row(outbox, "dead", envelopes[3].id)
        written = {**_NOTHING, "done": _places(rows[:2]), "failures": [_failed(row, None) for row in rows[2:]]}
        with pytest.raises(RefusedWriteError):
            store.settle(leases, **written)
        assert (_hot(outbox), _kept(outbox, "dead")) == (rows, [])
        self.take_rows(outbox, "dead")
        store.settle(leases, **written)
        assert _places(_kept(outbox, "dead")) == _places(rows[2:])

    def test_a_store_that_is_closed_says_so(self, outbox: Any) -> None:
        store = outbox.open_store()
        store.close()
        for call in (store.left, store.changes, lambda: _renew(store, "relay")):
            with pytest.raises(kbatch.OutboxError):
                call()

    # -- what is scheduled

    def test_schedule_execution(self, outbox: Any, store: OutboxStore) -> None:
        leases, _ = _renew(store, "relay", lease_s=10 * _HOUR_S)
        _add(outbox, _numbered(range(3), scheduled_time=_in(_HOUR_S)))
        _add(outbox, _numbered(range(3, 6), scheduled_time=_in(5 * _HOUR_S)))
        _add(outbox, _numbered(range(6, 9)))
        assert (_bodies(_hot(outbox)), _admit(store, leases)) == ([b"6", b"7", b"8"], 0)
        assert store.held_keys(_EVERY) == []  # it holds back no other of its key
        assert _read_due(store) == []
        self.let_time_pass(outbox, _HOUR_S + 1)
        assert (_admit(store, leases), _admit(store, leases)) == (3, 0)
        assert _bodies(_hot(outbox)) == [b"6", b"7", b"8", b"0", b"1", b"2"]  # with new numbers
        assert _bodies(_kept(outbox, "later")) == [b"3", b"4", b"5"]
        _add(outbox, _numbered(range(9, 10)))
        assert _bodies(_hot(outbox))[-1] == b"9"

    def test_the_earliest_is_admitted_first_and_a_limit_holds(self, outbox: Any, store: OutboxStore) -> None:
        leases, _ = _renew(store, "relay", lease_s=10 * _HOUR_S)
        for number in range(5):
            _add(outbox, _numbered([number], keys=1, scheduled_time=_in(_HOUR_S - 60 * number)))
        self.let_time_pass(outbox, _HOUR_S + 1)
        assert _admit(store, leases, limit=3) == 3
        assert _bodies(_hot(outbox)) == [b"4", b"3", b"2"]
        assert _admit(store, leases, limit=3) == 2
        assert _bodies(_hot(outbox)) == [b"4", b"3", b"2", b"1", b"0"]

    def test_what_is_scheduled_is_admitted_by_who_has_the_lease_alone(self, outbox: Any, store: OutboxStore) -> None:
        _add(outbox, _numbered(range(20), scheduled_time=_in(_HOUR_S)))
        self.let_time_pass(outbox, _HOUR_S + 1)
        leases, _ = _renew(store, "relay")
        assert _admit(store, {}) == 0
        assert _admit(store, {bucket: token + 1 for bucket, token in leases.items()}) == 0
        self.let_time_pass(outbox, _LEASE_S + 1)
        assert _admit(store, leases) == 0
        assert (len(_hot(outbox)), len(_kept(outbox, "later"))) == (0, 20)

    @pytest.mark.parametrize("back_s", [60, 86_400])
    def test_what_is_scheduled_is_not_due_because_the_clock_was_set_back(
        self, outbox: Any, store: OutboxStore, back_s: int
    ) -> None:
        _add(outbox, _numbered(range(10, 13)))
        rows = _hot(outbox)
        leases, _ = _renew(store, "relay")
        store.settle(leases, **{**_NOTHING, "failures": [_failed(row, 1.0) for row in rows]})
        _add(outbox, _numbered(range(3), scheduled_time=_in(_HOUR_S)))
        self.let_time_pass(outbox, -back_s)
        assert sorted(_seqs(_read_due(store, longest_s=10.0))) == [row[1] for row in rows]
        leases, _ = _renew(store, "relay")
        assert _admit(store, leases) == 0

    def test_what_was_put_off_or_cancelled_since_it_was_looked_for_is_not_admitted(
        self, outbox: Any, store: OutboxStore
    ) -> None:
        _add(outbox, _numbered(range(6), scheduled_time=_in(_HOUR_S)))
        self.let_time_pass(outbox, _HOUR_S + 1)
        leases, _ = _renew(store, "relay")
        places = store.due_scheduled(_EVERY, avoid=(), limit=100)
        assert places == _places(_kept(outbox, "later"))
        assert store.due_scheduled(_EVERY, avoid=places[:5], limit=1) == places[5:]
        with contextlib.closing(outbox.open_admin()) as admin:
            admin.reschedule([places[1]], int((wall_time() + 10 * _HOUR_S) * 1000))
            admin.delete("later", [places[2]])
        assert store.admit_scheduled(leases, places) == 4
        assert _bodies(_hot(outbox)) == [b"0", b"3", b"4", b"5"]
        assert _bodies(_kept(outbox, "later")) == [b"1"]

    def test_what_is_scheduled_and_refused_is_moved_with_none_of_the_others(
        self, outbox: Any, store: OutboxStore
    ) -> None:
        envelopes = _numbered(range(3), scheduled_time=_in(_HOUR_S))
        _add(outbox, envelopes)
        self.let_time_pass(outbox, _HOUR_S + 1)
        leases, _ = _renew(store, "relay")
        self.refuse_row(outbox, "outbox", envelopes[1].id)
        with pytest.raises(RefusedWriteError):
            _admit(store, leases)
        assert (_hot(outbox), len(_kept(outbox, "later"))) == ([], 3)
        self.take_rows(outbox, "outbox")
        assert _admit(store, leases) == 3


class DeadLetterCompliance(_Hooks):
    """What those who look after dead letters, and what waits, need of an outbox. It takes what `OutboxCompliance`
    takes; the outbox has ``dead_letters`` and ``scheduled``, as those that derive from `kbatch.stores.OutboxBase`."""

    # -- finding

    def test_load_dead_letters(self, outbox: Any) -> None:
        self._bury(outbox, kbatch.Envelope({"n": 1}, key="k", partition=2, message_type="order.placed"), error="why")
        (letter,) = outbox.dead_letters.find()
        assert (letter.topic, letter.partition, letter.key) == ("orders", 2, b"k")
        assert (letter.message_type, letter.attempts, letter.error) == ("order.placed", 3, "why")
        assert abs(letter.died_at - _in(0.0)) < timedelta(hours=2)
        envelope = letter.envelope
        assert (envelope.id, envelope.data, envelope.key, envelope.topic) == (letter.id, b'{"n":1}', b"k", "orders")

    def test_load_dead_letters_with_a_limit(self, outbox: Any) -> None:
        for key in "abcdefgh":
            self._bury(outbox, *_keyed(key))
        letters = outbox.dead_letters
        found: list[Any] = []
        while page := letters.find(limit=3, after=found[-1] if found else None):
            assert len(page) <= 3
            found += page
        assert [letter.key for letter in found] == [key.encode() for key in "abcdefgh"]  # in the order of death
        numbers = [letter.number for letter in found]
        assert [letter.number for letter in letters.find(limit=None)] == numbers
        some = kbatch.OutboxQuery(numbers=[numbers[6], numbers[2], max(numbers) + 5, numbers[4], -1, 2**63, 2**70])
        assert [letter.key for letter in letters.find(some)] == [b"c", b"e", b"g"]
        assert [letter.key for letter in letters.find(some, after=found[2])] == [b"e", b"g"]

    def test_letters_that_died_in_the_same_millisecond_are_all_found(self, outbox: Any) -> None:
        self._bury(outbox, *_numbered(range(9), keys=9))
        found: list[KeptRow] = []
        with contextlib.closing(outbox.open_admin()) as admin:
            after = None
            while page := admin.page("dead", after, since_ms=None, until_ms=None, limit=2):
                found += page
                after = page[-1].position
        assert sorted(_bodies(found), key=lambda body: body or b"") == [b"%d" % n for n in range(9)]
        assert [row.position for row in found] == sorted(row.position for row in found)

    def test_load_by_exception_type_by_message_type_and_by_time(self, outbox: Any) -> None:
        first = kbatch.Envelope(data=b"1", key="a", topic="orders", message_type="placed")
        self._bury(outbox, first)
        self._bury(
            outbox,
            kbatch.Envelope(data=b"2", key="a", topic="bills", message_type="placed"),
            error="Message is TOO LARGE",
        )
        self._bury(outbox, kbatch.Envelope(data=b"3", key="b", topic="bills", message_type="paid"))
        letters = outbox.dead_letters.find()
        numbers = [letter.number for letter in letters]
        second, third = (letter.died_at for letter in letters[1:])
        query = kbatch.OutboxQuery
        for asked, expected in (
            (_ALL, [1, 2, 3]),
            (query(ids=[first.id, uuid.uuid4()]), [1]),
            (query(topic="bills"), [2, 3]),
            (query(message_type="placed"), [1, 2]),
            (query(error="too large"), [2]),
            (query(since=second), [2, 3]),
            (query(until=second), [1]),
            (query(since=second, until=third), [2]),
            (query(numbers=numbers[::2], since=second), [3]),
            (query(numbers=numbers[::2], until=second), [1]),
            (query(topic="bills", message_type="placed"), [2]),
            (query(topic="bills", numbers=numbers[:1]), []),
            (query(numbers=[]), []),
        ):
            found = outbox.dead_letters.find(asked)
            assert [numbers.index(letter.number) + 1 for letter in found] == expected, asked

    def test_summaries_with_no_options(self, outbox: Any) -> None:
        assert outbox.dead_letters.summary() == []
        self._bury(outbox, *_keyed("a", "b", "c", message_type="placed"))
        self._bury(outbox, *_keyed("d", topic="bills"), error="too large")
        assert outbox.dead_letters.summary() == [("orders", "placed", "refused", 3), ("bills", "bytes", "too large", 1)]

    def test_summaries_after_before_and_within_a_time_range(self, outbox: Any) -> None:
        for key in "abcd":
            self._bury(outbox, *_keyed(key))
        second, fourth = (outbox.dead_letters.find()[n].died_at for n in (1, 3))

        def count(**times: datetime) -> int:
            query = kbatch.OutboxQuery(since=times.get("since"), until=times.get("until"))
            return sum(each.letters for each in outbox.dead_letters.summary(query))

        assert (count(since=second), count(until=second), count(since=second, until=fourth)) == (3, 1, 2)

    def test_big_queries(self, outbox: Any) -> None:
        self._bury(outbox, *_numbered(range(5_000), topic="orders"), *_keyed("x", topic="bills"))
        orders = kbatch.OutboxQuery(topic="orders")
        found = outbox.dead_letters.find(orders, limit=None)
        assert (outbox.dead_letters.summary(orders)[0].letters, len(found)) == (5_000, 5_000)
        some = [letter.number for letter in found[:2_000]]
        assert outbox.dead_letters.replay(kbatch.OutboxQuery(numbers=some)) == 2_000
        assert outbox.dead_letters.discard(orders) == 3_000
        assert (len(_hot(outbox)), _bodies(_kept(outbox, "dead"))) == (2_000, [b"x"])

    # -- replaying and discarding

    def test_replay_by_query(self, outbox: Any, store: OutboxStore) -> None:
        self._bury(outbox, *_keyed("a", "b", "c"))
        _add(outbox, _keyed("a", "d"))
        letters = {letter.key: letter.number for letter in outbox.dead_letters.find()}
        before = store.changes()
        some = kbatch.OutboxQuery(numbers=[letters[b"c"], letters[b"a"]])
        assert outbox.dead_letters.replay(some) == 2
        assert store.changes() != before  # relays look again
        rows = _hot(outbox)
        assert (_bodies(rows), _bodies(_kept(outbox, "dead"))) == ([b"a", b"c", b"a", b"d"], [b"b"])
        assert [row[1] for row in rows[:2]] == [letters[b"a"], letters[b"c"]]  # its old place
        assert rows[0][0] == rows[2][0]
        assert outbox.dead_letters.replay(some) == 0

    def test_what_has_expired_is_not_replayed(self, outbox: Any) -> None:
        self._bury(outbox, *_keyed("a"), *_keyed("b", deliver_by=_in(_HOUR_S)))
        places = _places(_kept(outbox, "dead"))
        with contextlib.closing(outbox.open_admin()) as admin:
            assert admin.replay(places, int((wall_time() + 2 * _HOUR_S) * 1e6)) == 1
        assert (_bodies(_hot(outbox)), _bodies(_kept(outbox, "dead"))) == ([b"a"], [b"b"])

    def test_edit_and_replay_a_dead_letter(self, outbox: Any, store: OutboxStore) -> None:
        self._bury(outbox, *_keyed("a", "b"))
        first = _kept(outbox, "dead")[0]
        letter = next(each for each in outbox.dead_letters.find() if each.number == first.seq)
        before = store.changes()
        outbox.dead_letters.replay_edited(letter.number, letter.envelope.replace(key="z", data=b"mended"))
        assert store.changes() != before
        (row,) = _hot(outbox)
        assert (row[1], _bodies([row])) == (first.seq, [b"mended"])
        _add(outbox, _keyed("z"))
        assert len({each[0] for each in _hot(outbox)}) == 1  # where its key is
        assert _bodies(_kept(outbox, "dead")) == [b"b"]

    def test_an_edit_that_cannot_be_sent_changes_nothing(self, outbox: Any) -> None:
        self._bury(outbox, *_keyed("a"))
        letters = outbox.dead_letters
        (letter,) = letters.find()
        with pytest.raises(kbatch.SerializationError, match="topic"):
            letters.replay_edited(letter.number, kbatch.Envelope(data=b"1"))
        with pytest.raises(kbatch.OutboxError, match="expired"):
            letters.replay_edited(letter.number, letter.envelope.replace(deliver_by=_in(-_HOUR_S)))
        with pytest.raises(kbatch.OutboxError, match="there is no dead letter"):
            letters.replay_edited(letter.number + 1, letter.envelope)
        assert (_hot(outbox), _bodies(_kept(outbox, "dead"))) == ([], [b"a"])

    def test_discard_by_query(self, outbox: Any, store: OutboxStore) -> None:
        self._bury(outbox, *_keyed("a", "b"))
        self._bury(outbox, *_keyed("c", topic="bills"))
        before = store.changes()
        bills = kbatch.OutboxQuery(topic="bills")
        assert (outbox.dead_letters.discard(bills), outbox.dead_letters.discard(bills)) == (1, 0)
        assert _bodies(_kept(outbox, "dead")) == [b"a", b"b"]
        assert (outbox.dead_letters.discard(_ALL), _kept(outbox, "dead")) == (2, [])
        assert store.changes() == before  # no relay has to look again

    def test_delete_a_dead_letter_by_id(self, outbox: Any) -> None:
        envelopes = _keyed("a", "b")
        self._bury(outbox, *envelopes)
        assert outbox.dead_letters.discard(kbatch.OutboxQuery(ids=[envelopes[0].id])) == 1
        assert _bodies(_kept(outbox, "dead")) == [b"b"]

    def test_a_replay_that_fails_changes_nothing(self, outbox: Any, store: OutboxStore) -> None:
        envelopes = _keyed("a", "b")
        self._bury(outbox, *envelopes)
        before = store.changes()
        self.refuse_row(outbox, "outbox", envelopes[1].id)
        with pytest.raises(kbatch.OutboxError):
            outbox.dead_letters.replay(_ALL)
        assert (_hot(outbox), _bodies(_kept(outbox, "dead")), store.changes()) == ([], [b"a", b"b"], before)

    # -- what waits

    def test_query_scheduled_by_message_type(self, outbox: Any) -> None:
        _add(outbox, _keyed("a", message_type="placed", scheduled_time=_in(2 * _HOUR_S)))
        _add(outbox, _keyed("b", message_type="paid", scheduled_time=_in(_HOUR_S)))
        found = outbox.scheduled.find()
        assert [each.key for each in found] == [b"b", b"a"]  # those first that are due first
        assert [each.key for each in outbox.scheduled.find(limit=1, after=found[0])] == [b"a"]
        assert [each.key for each in outbox.scheduled.find(kbatch.OutboxQuery(message_type="placed"))] == [b"a"]
        assert abs(found[0].due_at - _in(_HOUR_S)) < timedelta(minutes=5)

    def test_summarize_scheduled(self, outbox: Any, store: OutboxStore) -> None:
        assert outbox.scheduled.summary() == []
        _add(outbox, _keyed("a", "b"))
        leases, _ = _renew(store, "relay")
        store.settle(leases, **{**_NOTHING, "failures": [_failed(row, _HOUR_S) for row in _hot(outbox)]})
        _add(outbox, _keyed("c", "d", "e", message_type="placed", scheduled_time=_in(_HOUR_S)))
        _add(outbox, _keyed("f", topic="bills", scheduled_time=_in(_HOUR_S)))
        first, second, third = outbox.scheduled.summary()
        assert (first, third) == (("orders", "placed", "", 3), ("bills", "bytes", "", 1))
        assert (second.topic, second.message_type, second.messages) == ("orders", "bytes", 2)
        assert second.error == outbox.scheduled.find(kbatch.OutboxQuery(message_type="bytes"))[0].error != ""
        assert outbox.scheduled.summary(kbatch.OutboxQuery(topic="bills")) == [third]
        assert outbox.dead_letters.summary() == []

    def test_cancel_scheduled_by_id_and_by_type(self, outbox: Any) -> None:
        envelopes = _keyed("a", "b", "c", message_type="placed", scheduled_time=_in(_HOUR_S))
        _add(outbox, [*envelopes, *_keyed("d", message_type="paid", scheduled_time=_in(_HOUR_S))])
        assert outbox.scheduled.cancel(kbatch.OutboxQuery(ids=[envelopes[1].id])) == 1
        assert outbox.scheduled.cancel(kbatch.OutboxQuery(message_type="placed")) == 2
        assert _bodies(_kept(outbox, "later")) == [b"d"]

    def test_reschedule(self, outbox: Any, store: OutboxStore) -> None:
        _add(outbox, _keyed("a", "b", scheduled_time=_in(10 * _HOUR_S)))
        leases, _ = _renew(store, "relay")
        before = store.changes()
        first = _kept(outbox, "later")[0]
        assert outbox.scheduled.reschedule(kbatch.OutboxQuery(numbers=[first.seq]), _in(-1.0)) == 1
        assert store.changes() == before
        assert (_admit(store, leases), _bodies(_hot(outbox))) == (1, [b"a"])
        assert outbox.scheduled.reschedule(kbatch.OutboxQuery(numbers=[first.seq]), _in(-1.0)) == 0

    def test_relays_look_again_after_what_held_a_key_was_cancelled(self, outbox: Any, store: OutboxStore) -> None:
        _add(outbox, [*_keyed("a"), kbatch.Envelope(data=b"without a key")])
        rows = _hot(outbox)
        leases, _ = _renew(store, "relay")
        store.settle(leases, **{**_NOTHING, "failures": [_failed(row, _HOUR_S) for row in rows]})
        before = store.changes()
        assert outbox.scheduled.cancel(kbatch.OutboxQuery(numbers=[rows[1][1]])) == 1
        assert store.changes() == before
        assert outbox.scheduled.cancel(kbatch.OutboxQuery(numbers=[rows[0][1]])) == 1
        assert store.changes() != before
        assert (store.held_keys(_EVERY), store.left()) == ([], 0)
