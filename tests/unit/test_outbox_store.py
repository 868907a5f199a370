"""What a relay does in each database: leases by tokens, reading above floors, and writing only what its leases allow.

Every `OutboxStore` has to pass these tests.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from kbatch import Envelope, OutboxError
from kbatch._fastmap import packed_key_hash
from kbatch._outbox._store import Failure, HeldKey, OutboxStore, Reading, RefusedWriteError
from tests import outboxes
from tests.outboxes import Outbox, in_sqlite
from tests.relays import numbered

NOTHING: dict[str, Any] = {"done": [], "done_later": [], "failures": [], "failures_later": []}


@pytest.fixture
def outbox(new_outbox: Callable[..., Outbox]) -> Outbox:
    return new_outbox()


@pytest.fixture
def store(outbox: Outbox) -> Iterator[OutboxStore]:
    store = outbox.open_store()
    yield store
    store.close()


def hands(renewed: tuple[dict[int, int], int]) -> tuple[dict[int, int], int]:
    """How often each bucket has changed hands. A token of PostgreSQL says besides on which server."""
    leases, share = renewed
    return {bucket: token % 2**63 for bucket, token in leases.items()}, share


def renew(store: OutboxStore, owner: str, **options: Any) -> tuple[dict[int, int], int]:
    leases, share = store.renew(owner, 60.0, **{"release": (), "avoid": (), **options})
    return dict(leases), share


def read(
    store: OutboxStore,
    floors: Mapping[int, int],
    *,
    limit: int = 10_000,
    max_bytes: int = 10**9,
    in_flight: Collection[tuple[int, int]] = (),
) -> Reading:
    return store.read(floors, limit=limit, max_bytes=max_bytes, in_flight=lambda: in_flight)


def placed(outbox: Outbox, table: str = "outbox") -> list[tuple[int, int]]:
    return outboxes.query(outbox, f"SELECT bucket, seq FROM {{{table}}} ORDER BY seq")


# -- leases


def test_the_first_relay_gets_all_buckets_and_keeps_its_tokens(store: OutboxStore) -> None:
    first = renew(store, "first")
    assert hands(first) == (dict.fromkeys(range(64), 1), 64)
    assert renew(store, "first") == first


def test_a_second_relay_gets_what_the_first_one_gives_up(store: OutboxStore) -> None:
    renew(store, "first")
    assert renew(store, "second") == ({}, 32)
    mine, share = renew(store, "first", release=range(32))
    assert (set(mine), share) == (set(range(32, 64)), 32)  # and takes none of them back
    assert hands(renew(store, "second")) == (dict.fromkeys(range(32), 2), 32)
    store.leave("second", keep=(30, 31))
    mine, share = renew(store, "first", avoid=(0, 1))
    assert (set(mine), share) == ({*range(2, 30), *range(32, 64)}, 64)  # 30 and 31 were not given back


def test_a_lease_that_ran_out_is_another_one_when_it_is_taken_again(outbox: Outbox, store: OutboxStore) -> None:
    renew(store, "first")
    outboxes.query(outbox, "UPDATE {lease} SET until = 0 WHERE bucket < 2")
    mine, _ = hands(renew(store, "first", avoid=(1,)))
    assert (mine[0], 1 in mine, mine[2]) == (2, False, 1)


@in_sqlite
def test_a_lease_that_runs_out_while_it_is_renewed_is_not_told(outbox: Outbox) -> None:
    store: Any = outbox.open_store()
    renew(store, "first")
    connection = store._connection
    expire = outbox._tables.sql("UPDATE {lease} SET until = 0 WHERE bucket = 5")

    class Late:
        in_transaction = property(lambda self: connection.in_transaction)

        def execute(self, sql: str, *arguments: Any) -> Any:
            if sql.startswith("UPDATE") and "SET until = ?, length" in sql:
                connection.execute(expire)
            return connection.execute(sql, *arguments)

    store._connection = Late()
    mine, _ = renew(store, "first", avoid=(5,))
    connection.close()
    assert set(mine) == set(range(64)) - {5}


def test_a_relay_that_is_gone_counts_until_its_lease_ran_out(outbox: Outbox, store: OutboxStore) -> None:
    renew(store, "first")
    renew(store, "second")
    assert renew(store, "first")[1] == 32
    outboxes.query(outbox, "UPDATE {relay} SET until = 0 WHERE owner = 'second'")
    assert renew(store, "first")[1] == 64


@pytest.mark.parametrize(("back_s", "is_free"), [(-50, False), (0, False), (50, False), (70, True), (3600, True)])
def test_a_lease_of_before_the_clock_was_set_back_has_run_out(
    outbox: Outbox, store: OutboxStore, back_s: int, is_free: bool
) -> None:
    outboxes.add(outbox, numbered(range(1)))
    first, _ = renew(store, "first")  # for 60 seconds
    for table in ("lease", "relay"):
        outboxes.query(outbox, f"UPDATE {{{table}}} SET until = until + {back_s * 1000}")
    assert outbox.status().relays == (0 if is_free else 1)
    assert (store.settle(first, **NOTHING) == set(first)) is is_free
    assert hands(renew(store, "second")) == ((dict.fromkeys(range(64), 2), 64) if is_free else ({}, 32))


def test_what_was_put_off_before_the_clock_was_set_back_is_due(outbox: Outbox, store: OutboxStore) -> None:
    outboxes.add(outbox, numbered(range(3), keys=3))
    outboxes.move_to_later(outbox, 1, 3)
    outboxes.query(outbox, "UPDATE {later} SET due_at = {now} + (seq - 1) * 50000")
    due = store.read_due(range(64), avoid=(), longest_s=60.0, limit=10)
    assert [row.seq for row in due] == [1, 3]


def test_nobody_gives_up_what_another_has(store: OutboxStore) -> None:
    mine, _ = renew(store, "first")
    store.leave("second", keep=())
    assert renew(store, "first")[0] == mine


# -- reading


def test_rows_are_read_above_the_floors_by_bucket_and_number(outbox: Outbox, store: OutboxStore) -> None:
    outboxes.add(outbox, numbered(range(300), keys=300))
    all_rows = sorted(placed(outbox))
    reading = read(store, dict.fromkeys(range(64), 0))
    assert [row[:2] for row in reading.rows] == all_rows
    assert reading.floors == {bucket: max(seq for of, seq in all_rows if of == bucket) for bucket, _ in all_rows}
    assert reading.ended == set(range(64))
    # What other transactions of the server may yet bring to light below the floors is read again, but not what is in
    # flight.
    in_flight = {row[:2] for row in reading.rows}
    again = store.read(reading.floors, limit=1000, max_bytes=10**9, in_flight=lambda: in_flight)
    assert (again.rows, again.ended) == ([], set(reading.floors))


def test_a_full_bucket_leaves_room_for_the_others(outbox: Outbox, store: OutboxStore) -> None:
    outboxes.add(outbox, numbered(range(5000), keys=1))
    outboxes.add(outbox, numbered(range(100), keys=100))
    (full,) = {bucket for bucket, seq in placed(outbox) if seq == 1}
    floors = {full: 0, **dict.fromkeys(set(range(64)) - {full}, 0)}
    reading = read(store, floors, limit=1000)
    assert len({row[0] for row in reading.rows}) > 20
    assert len(reading.rows) == 1000  # what the others leave of their share
    assert [row[1] for row in reading.rows if row[0] == full] == list(range(1, reading.floors[full] + 1))
    assert [row[:2] for row in reading.rows[:50]] == [(full, seq) for seq in range(1, 51)]
    assert reading.ended == set(range(64)) - {full}


def test_reading_ends_at_its_bytes_and_its_rows(outbox: Outbox, store: OutboxStore) -> None:
    outboxes.add(outbox, [Envelope(data=b"x" * 1000, key="one") for _ in range(30)])
    (bucket,) = {bucket for bucket, _ in placed(outbox)}
    assert len(read(store, {bucket: 0}, limit=100, max_bytes=2500).rows) == 3
    reading = read(store, {bucket: 0}, limit=7)
    assert (len(reading.rows), reading.floors) == (7, {bucket: 7})


# -- writing


def failure(outbox: Outbox, seq: int, due_in_s: float | None, attempts: int = 1) -> Failure:
    ((bucket, packed),) = outboxes.query(outbox, f"SELECT bucket, packed FROM {{outbox}} WHERE seq = {seq}")
    return Failure(bucket, seq, due_in_s, attempts, "refused", packed_key_hash(packed))


def test_what_failed_is_in_one_table_at_a_time_with_all_that_it_had(outbox: Outbox, store: OutboxStore) -> None:
    outboxes.add(outbox, numbered(range(4), keys=4))
    places = placed(outbox)
    before = outboxes.query(outbox, "SELECT id, packed, created_at, deliver_by FROM {outbox} ORDER BY seq")
    mine, _ = renew(store, "first")
    failures = [failure(outbox, 2, 0.0), failure(outbox, 3, 3600.0), failure(outbox, 4, None, 20)]
    assert store.settle(mine, **{**NOTHING, "done": places[:1], "failures": failures}) == set()
    assert (placed(outbox), placed(outbox, "later"), placed(outbox, "dead")) == ([], places[1:3], places[3:])
    kept = [
        row
        for table in ("later", "dead")
        for row in outboxes.query(outbox, f"SELECT id, packed, created_at, deliver_by FROM {{{table}}} ORDER BY seq")
    ]
    assert kept == before[1:]
    assert outboxes.query(outbox, "SELECT attempts, last_error FROM {dead}") == [(20, "refused")]

    (due,) = store.read_due(range(64), avoid=(), longest_s=3600.0, limit=10)
    assert (due.bucket, due.seq, due.attempts, due.key_hash) == (*places[1], 1, failures[0].key_hash)
    assert store.left() == 2
    again = failures[0]._replace(due_in_s=3600.0, attempts=2)
    assert store.settle(mine, **{**NOTHING, "failures_later": [again]}) == set()
    assert store.read_due(range(64), avoid=(), longest_s=3600.0, limit=10) == []
    store.settle(mine, **{**NOTHING, "failures_later": [again._replace(due_in_s=None)], "done_later": places[2:3]})
    assert (placed(outbox, "later"), placed(outbox, "dead")) == ([], [places[1], places[3]])
    assert store.left() == 0


def test_of_a_key_only_the_lowest_that_waits_is_due(outbox: Outbox, store: OutboxStore) -> None:
    outboxes.add(outbox, [*numbered(range(3), keys=1), Envelope(data=b"a"), Envelope(data=b"b")])
    mine, _ = renew(store, "first")
    failures = [failure(outbox, seq, 3600.0 if seq == 1 else 0.0) for seq in range(1, 6)]
    store.settle(mine, **{**NOTHING, "failures": failures})
    assert sorted(row.seq for row in store.read_due(range(64), avoid=(), longest_s=3600.0, limit=10)) == [4, 5]
    bucket, key_hash = failures[0].bucket, failures[0].key_hash
    assert key_hash is not None
    assert store.held_keys(range(64)) == [HeldKey(bucket, key_hash, 1)]
    store.settle(mine, **{**NOTHING, "done_later": [(bucket, 1)]})
    assert sorted(row.seq for row in store.read_due(range(64), avoid=(), longest_s=3600.0, limit=10)) == [2, 4, 5]
    others = set(range(64)) - {of for of, _ in placed(outbox, "later")}
    assert store.read_due(others, avoid=(), longest_s=3600.0, limit=10) == []


def test_what_is_due_for_the_longest_comes_first_and_what_is_in_flight_takes_nobodys_place(
    outbox: Outbox, store: OutboxStore
) -> None:
    outboxes.add(outbox, numbered(range(6), keys=6))
    outboxes.move_to_later(outbox, 1, 6)
    outboxes.query(outbox, "UPDATE {later} SET due_at = 10 - seq")
    first = store.read_due(range(64), avoid=(), longest_s=3600.0, limit=2)
    assert [row.seq for row in first] == [6, 5]
    avoid = {(row.bucket, row.seq) for row in first}
    assert [row.seq for row in store.read_due(range(64), avoid=avoid, longest_s=3600.0, limit=3)] == [4, 3, 2]


def test_what_is_not_due_is_not_read(outbox: Outbox) -> None:
    store = outbox.open_store()
    plans = outboxes.explained(store)
    store.read_due(range(64), avoid=(), longest_s=60.0, limit=10)
    store.close()
    assert ["kbatch_outbox_later_at" in plan for plan in plans] == [True, True]


def test_rows_are_found_by_the_primary_key_whatever_the_statistics_say(outbox: Outbox, store: OutboxStore) -> None:
    outboxes.query(outbox, "ANALYZE")  # of empty tables
    outboxes.add(outbox, numbered(range(3000), keys=300))
    mine, _ = renew(store, "first")
    plans = outboxes.explained(store)
    reading = read(store, dict.fromkeys(range(64), 0))
    store.settle(mine, **{**NOTHING, "done": [row[:2] for row in reading.rows]})
    assert plans
    for plan in plans:
        assert not re.search("SCAN (?!place)|Seq Scan on (?!kbatch_outbox_lease)|Sort", plan), plan


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE {lease} SET until = 0",  # nobody else has taken it
        "UPDATE {lease} SET token = token + 1",
        "UPDATE {lease} SET owner = NULL, until = 0",
    ],
)
def test_nothing_is_written_of_a_bucket_whose_lease_does_not_hold(
    outbox: Outbox, store: OutboxStore, change: str
) -> None:
    outboxes.add(outbox, numbered(range(40), keys=40))
    places = placed(outbox)
    mine, _ = renew(store, "first")
    lost = places[0][0]
    later = [failure(outbox, seq, 0.0) for _, seq in places[20:]]
    store.settle(mine, **{**NOTHING, "failures": later})
    outboxes.query(outbox, f"{change} WHERE bucket = {lost}")
    dead = [failure(outbox, seq, None) for _, seq in places[10:20]]
    done = {"done": places[:10], "failures": dead, "done_later": places[20:30]}
    put_off = [each._replace(due_in_s=3600.0, attempts=9) for each in later[10:]]
    assert store.settle(mine, **done, failures_later=put_off) == {lost}
    assert placed(outbox) == [place for place in places[:20] if place[0] == lost]
    assert placed(outbox, "dead") == [place for place in places[10:20] if place[0] != lost]
    kept = [place for place in places[20:30] if place[0] == lost]
    assert placed(outbox, "later") == kept + places[30:]
    attempts = dict(outboxes.query(outbox, "SELECT seq, attempts FROM {later}"))
    assert [attempts[seq] for bucket, seq in places[30:]] == [1 if bucket == lost else 9 for bucket, _ in places[30:]]


def test_a_write_that_fails_changes_nothing(outbox: Outbox, store: OutboxStore) -> None:
    outboxes.add(outbox, numbered(range(4), keys=4))
    places = placed(outbox)
    mine, _ = renew(store, "first")
    outboxes.refuse_rows(outbox, "dead")
    with pytest.raises(OutboxError, match="no room"):
        store.settle(mine, **{**NOTHING, "done": places[:3], "failures": [failure(outbox, 4, None)]})
    assert placed(outbox) == places
    outboxes.take_rows(outbox, "dead")
    store.settle(mine, **{**NOTHING, "done": places[:3], "failures": [failure(outbox, 4, None)]})
    assert placed(outbox, "dead") == places[3:]


def test_a_store_that_is_closed_says_so(store: OutboxStore) -> None:
    store.close()
    with pytest.raises(OutboxError, match="is open"):
        store.left()
    with pytest.raises(OutboxError, match="is open"):
        renew(store, "first")


# -- what is scheduled


def schedule(outbox: Outbox, numbers: range, due_in_s: float, **options: Any) -> None:
    """Rows that are due in so many seconds."""
    moment = datetime.now(timezone.utc) + timedelta(days=1)
    outboxes.add(outbox, numbered(numbers, scheduled_time=moment, **options))
    outboxes.query(
        outbox,
        f"UPDATE {{later}} SET due_at = {{now}} + {int(due_in_s * 1000)} "
        "WHERE scheduled = 1 AND due_at > {now} + 80000000",
    )


def admit(
    store: OutboxStore, leases: Mapping[int, int], *, asked: Mapping[int, int] | None = None, limit: int = 100
) -> int:
    places = store.due_scheduled(list(leases if asked is None else asked), avoid=(), limit=limit)
    return store.admit_scheduled(leases, places)


def test_what_is_scheduled_is_admitted_when_it_is_due_and_not_before(outbox: Outbox, store: OutboxStore) -> None:
    mine, _ = renew(store, "relay")
    schedule(outbox, range(3), -1.0)
    schedule(outbox, range(3, 6), 3600.0)
    outboxes.add(outbox, numbered(range(6, 9)))
    assert store.left() == 6
    assert admit(store, mine) == 3
    assert admit(store, mine) == 0
    assert outboxes.bodies(outbox) == [b"6", b"7", b"8", b"0", b"1", b"2"]  # with new numbers
    assert outbox.status().scheduled == 3
    assert store.left() == 6
    admitted = outboxes.query(outbox, "SELECT seq FROM {outbox} ORDER BY seq")
    outboxes.add(outbox, numbered(range(1)))
    assert outboxes.query(outbox, "SELECT max(seq) FROM {outbox}") > admitted[-1:]
    assert outbox.status().oldest_age_s < 60


def test_the_earliest_is_admitted_first_and_a_limit_holds(outbox: Outbox, store: OutboxStore) -> None:
    mine, _ = renew(store, "relay")
    for number in range(5):
        schedule(outbox, range(number, number + 1), -10.0 - number, keys=1)
    assert admit(store, mine, limit=3) == 3
    assert outboxes.bodies(outbox) == [b"4", b"3", b"2"]
    assert admit(store, mine, limit=3) == 2
    assert outboxes.bodies(outbox) == [b"4", b"3", b"2", b"1", b"0"]


def test_what_is_scheduled_is_admitted_by_who_has_the_lease_alone(outbox: Outbox, store: OutboxStore) -> None:
    mine, _ = renew(store, "relay")
    schedule(outbox, range(20), -1.0)
    assert admit(store, {}, asked=mine) == 0
    assert admit(store, {bucket: token + 1 for bucket, token in mine.items()}) == 0
    outboxes.query(outbox, "UPDATE {lease} SET until = 0")
    assert admit(store, mine) == 0
    assert outbox.status().scheduled == 20


@pytest.mark.parametrize("back_s", [60, 86_400])
def test_what_is_scheduled_is_not_due_because_the_clock_was_set_back(
    outbox: Outbox, store: OutboxStore, back_s: int
) -> None:
    mine, _ = renew(store, "relay")
    schedule(outbox, range(3), 1.0 + back_s)  # as it looks after the clock was set back by so much
    outboxes.add(outbox, numbered(range(10, 13)))
    outboxes.move_to_later(outbox, 4, 6)
    outboxes.query(outbox, f"UPDATE {{later}} SET due_at = {{now}} + {1000 + back_s * 1000} WHERE scheduled = 0")
    due = store.read_due(range(64), avoid=(), longest_s=10.0, limit=100)
    assert sorted(row.seq for row in due) == [4, 5, 6]
    assert admit(store, mine) == 0


def test_what_is_scheduled_holds_no_key(outbox: Outbox, store: OutboxStore) -> None:
    schedule(outbox, range(3), 3600.0)
    assert store.held_keys(range(64)) == []


def test_what_is_scheduled_and_what_waits_are_found_by_indexes_of_their_own(outbox: Outbox) -> None:
    schedule(outbox, range(30), 3600.0)
    store = outbox.open_store()
    plans = outboxes.explained(store)
    store.read_due(range(64), avoid=(), longest_s=60.0, limit=100)
    store.due_scheduled(range(64), avoid=(), limit=100)
    store.close()
    assert len(plans) == 3
    for plan in plans:
        assert "kbatch_outbox_later_at" in plan, plan


def test_what_was_put_off_or_cancelled_since_it_was_looked_for_is_not_admitted(
    outbox: Outbox, store: OutboxStore
) -> None:
    mine, _ = renew(store, "relay")
    schedule(outbox, range(6), -1.0)
    places = store.due_scheduled(list(mine), avoid=(), limit=100)
    assert [seq for _, seq in places] == [1, 2, 3, 4, 5, 6]
    assert store.due_scheduled(list(mine), avoid=places[:5], limit=1) == places[5:]
    outboxes.query(outbox, "UPDATE {later} SET due_at = {now} + 3600000 WHERE seq = 2")
    outboxes.query(outbox, "DELETE FROM {later} WHERE seq = 3")
    assert store.admit_scheduled(mine, places) == 4
    assert outboxes.bodies(outbox) == [b"0", b"3", b"4", b"5"]
    assert outboxes.bodies(outbox, "later") == [b"1"]


def test_what_is_scheduled_and_refused_is_moved_with_none_of_the_others(outbox: Outbox, store: OutboxStore) -> None:
    mine, _ = renew(store, "relay")
    schedule(outbox, range(3), -1.0)
    outboxes.refuse_rows(outbox, "outbox", number=5)
    places = store.due_scheduled(list(mine), avoid=(), limit=100)
    with pytest.raises(RefusedWriteError):
        store.admit_scheduled(mine, places)
    assert (len(placed(outbox)), outbox.status().scheduled) == (0, 3)
