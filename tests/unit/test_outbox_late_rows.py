"""Rows of PostgreSQL that come to light below those that were read: none is missed, and the order of a key holds."""

import contextlib
import itertools
import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kbatch import Envelope, OutboxQuery, PostgresOutbox
from kbatch._fastmap import unpack_record
from tests import outboxes
from tests.outboxes import connected, transaction
from tests.relays import numbered
from tests.waiting import until


@pytest.fixture(scope="module")
def conninfo(new_postgres: Callable[[], Any]) -> str:
    """Of a server without the transactions of other tests."""
    found: str = new_postgres().conninfo
    return found


@pytest.fixture
def outbox(conninfo: str) -> PostgresOutbox:
    outbox = PostgresOutbox(conninfo, schema=outboxes.new_schema(conninfo), wire="raw")
    outbox.create()
    return outbox


class Reader:
    """Reads as a relay does: above its floors, and what it has read is in flight until it is deleted."""

    def __init__(self, outbox: PostgresOutbox) -> None:
        self.outbox = outbox
        self.store: Any = outbox.open_store()
        self.floors = dict.fromkeys(range(64), 0)
        self.in_flight: list[tuple[int, int]] = []
        self.statements: list[str] = []
        self.ranges = 0
        self.buckets_of: list[int] = []  # each statement, how many
        run = self.store._run

        def watched(statement: str, parameters: Any = None) -> Any:
            if parameters:
                self.statements.append(statement)
                self.buckets_of.append(len({*parameters[0].strip("{}").split(",")}))
                self.ranges += parameters[0].count(",") + 1
            return run(statement, parameters)

        self.store._run = watched

    def read(self, limit: int = 10_000) -> list[int]:
        """The bodies of the rows that were read, which are numbers."""
        reading = self.store.read(self.floors, limit=limit, max_bytes=10**9, in_flight=lambda: set(self.in_flight))
        assert all(self.floors[bucket] <= floor for bucket, floor in reading.floors.items())
        assert {row[0] for row in reading.rows} <= set(reading.floors)
        self.floors.update(reading.floors)
        self.in_flight += [row[:2] for row in reading.rows]
        return [int(unpack_record(row[2])[4] or b"") for row in reading.rows]

    def looked_back(self) -> bool:
        """Whether the last reading looked below the floors."""
        return self.statements[-1] == self.store._read_but

    def delete(self, count: int) -> None:
        places = ", ".join(map(str, self.in_flight[:count]))
        if places:
            outboxes.query(self.outbox, f"DELETE FROM {{outbox}} WHERE (bucket, seq) IN ({places})")
        del self.in_flight[:count]


@pytest.fixture
def reader(outbox: PostgresOutbox) -> Iterator[Reader]:
    reader = Reader(outbox)
    yield reader
    reader.store.close()


def test_what_commits_late_is_read_before_later_rows_of_its_key(outbox: PostgresOutbox, reader: Reader) -> None:
    with transaction(outbox) as late:
        outbox.add(late, numbered([1], keys=1), topic="orders")
        outboxes.add(outbox, numbered([5], keys=1), topic="others")
        outboxes.add(outbox, numbered(range(10, 300), keys=200), topic="orders")
        assert sorted(reader.read()) == [5, *range(10, 300)]
        late.execute("COMMIT")
        outboxes.add(outbox, numbered([2], keys=1))
        late.execute("BEGIN")
    assert reader.read() == [1, 2]
    assert reader.read() == []


def test_what_commits_late_is_read_before_later_rows_of_its_key_however_many_they_are(
    outbox: PostgresOutbox, reader: Reader
) -> None:
    with transaction(outbox) as late:
        outbox.add(late, numbered(range(200), keys=1), topic="orders")
        outboxes.add(outbox, numbered([1000], keys=1))
        assert reader.read() == [1000]
    outboxes.add(outbox, numbered([2000], keys=1))
    seen: list[int] = []
    for limit in (30, 30, 100, 1000):
        seen += reader.read(limit)
    assert seen == [*range(200), 2000]


def test_what_was_deleted_lies_below_the_floors_and_what_commits_late_is_read_all_the_same(
    outbox: PostgresOutbox, reader: Reader
) -> None:
    outboxes.add(outbox, numbered(range(500), keys=200))
    outboxes.query(outbox, "DELETE FROM {outbox}")
    with transaction(outbox) as late:
        outbox.add(late, numbered(range(1000, 1100), keys=100), topic="orders")
        outboxes.add(outbox, numbered([5000], keys=1))
        assert reader.read() == [5000]
        assert set(reader.floors.values()) == {601}
    assert sorted(reader.read()) == [*range(1000, 1100)]
    assert reader.read() == []
    outboxes.add(outbox, numbered(range(6000, 6100), keys=100))
    assert sorted(reader.read()) == [*range(6000, 6100)]


def test_a_reading_that_takes_long_ends_with_some_buckets_and_the_next_goes_on(
    outbox: PostgresOutbox, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    outboxes.add(outbox, numbered(range(640), keys=640))
    now = 0.0

    def slow_clock() -> float:
        nonlocal now
        now += 0.7
        return now

    monkeypatch.setattr("kbatch._outbox._postgres_store.monotonic", slow_clock)
    found: list[int] = []
    readings = 0
    while len(found) < 640:
        found += reader.read()
        reader.floors = dict(sorted(reader.floors.items(), key=lambda each: each[1]))  # as `Floors` has them
        readings += 1
    assert sorted(found) == [*range(640)]
    assert readings > 10
    assert reader.store._at_once == 1
    monkeypatch.undo()
    for _ in range(7):
        assert reader.read() == []
    assert reader.store._at_once == 64


def test_what_may_pass_by_much_that_was_deleted_begins_with_few_buckets(
    outbox: PostgresOutbox, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kbatch._outbox._postgres_store._FAR", 50)
    monkeypatch.setattr("kbatch._outbox._postgres_store._QUICK_S", 1e9)
    monkeypatch.setattr("kbatch._outbox._postgres_store._SLOW_S", 1e9)

    def first_statement() -> int:
        reader.buckets_of.clear()
        reader.read()
        return reader.buckets_of[0]

    for _ in range(3):  # nothing was ever added: all floors stay 0
        reader.read()
    assert first_statement() == 64
    outboxes.add(outbox, numbered(range(500), keys=200))
    reader.read()
    assert first_statement() == 64
    assert min(reader.floors.values()) == 500
    reader.floors = dict.fromkeys(range(64), 470)  # what was put back
    assert first_statement() == 64
    reader.floors[40] = 400  # a key was let go
    assert first_statement() == 4
    assert first_statement() == 64
    reader.floors = dict.fromkeys(range(64), 0)  # a look at all, or a replay
    assert first_statement() == 4
    with transaction(outbox) as late:
        outbox.add(late, numbered([1], keys=1), topic="orders")
        for n in range(10):
            outboxes.add(outbox, numbered(range(20), keys=200))
            outboxes.query(outbox, "DELETE FROM {outbox}")
            assert first_statement() == 64, n
    assert first_statement() == 4  # what it was open for long is read once more
    assert first_statement() == 64


def test_a_transaction_that_began_after_all_that_have_ended_is_waited_for(
    outbox: PostgresOutbox, reader: Reader
) -> None:
    with connected(outbox) as first, transaction(outbox) as late:
        first.execute("BEGIN")
        outbox.add(first, numbered([1], keys=1), topic="orders")
        outbox.add(late, numbered([2], keys=1), topic="orders")
        outbox.add(first, numbered([3], keys=1), topic="orders")
        first.execute("COMMIT")
        assert reader.read() == [1, 3]
    assert reader.read() == [2]


def test_a_reading_is_one_snapshot(outbox: PostgresOutbox, reader: Reader) -> None:
    with transaction(outbox) as late:
        outbox.add(late, numbered([1], keys=1), topic="orders")
        outboxes.add(outbox, numbered([5], keys=1))
        assert reader.read() == [5]
        run = reader.store._run

        def interrupted(statement: str, parameters: Any = None) -> Any:
            if parameters:  # the snapshot is taken, and the rows are not read yet
                reader.store._run = run
                late.execute("COMMIT")
                outboxes.add(outbox, numbered([2], keys=1))
                late.execute("BEGIN")
            return run(statement, parameters)

        reader.store._run = interrupted
        seen = reader.read()
        assert reader.store._run is run
    assert seen + reader.read() == [1, 2]


def test_what_is_in_flight_is_not_read_again(outbox: PostgresOutbox, reader: Reader) -> None:
    with transaction(outbox) as late:
        outbox.add(late, numbered([1], keys=1), topic="orders")
        outboxes.add(outbox, numbered(range(2, 50), keys=1))
        assert reader.read() == list(range(2, 50))
        reader.delete(10)
    assert reader.read() == [1]


@pytest.mark.parametrize("count", [1, 3, 100])
def test_a_transaction_whose_row_has_a_number_but_is_not_written_yet_is_waited_for(
    outbox: PostgresOutbox, reader: Reader, count: int
) -> None:
    name = outboxes.in_schema(outbox, "waits")
    outboxes.add(
        outbox, numbered([500])
    )  # PostgreSQL writes down 32 numbers ahead, for which a transaction has its own
    assert reader.read() == [500]
    with contextlib.ExitStack() as undo:
        holder = undo.enter_context(connected(outbox))
        holder.execute("SELECT pg_advisory_lock(11)")
        outboxes.run(
            outbox,
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN PERFORM pg_advisory_xact_lock_shared(11); RETURN NEW; END $$",
            f"CREATE TRIGGER waits BEFORE INSERT ON {outbox._tables.names['outbox']} "
            f"FOR EACH ROW WHEN (NEW.seq = 2) EXECUTE FUNCTION {name}()",
        )
        thread = threading.Thread(target=outboxes.add, args=(outbox, numbered(range(count), keys=1)))
        thread.start()
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 11 AND NOT granted"
        until(lambda: holder.execute(waiting).fetchone() == (1,), "the insert of its first row")
        outboxes.add(outbox, numbered([1000], keys=1))
        assert reader.read() == [1000]
        holder.execute("SELECT pg_advisory_unlock(11)")
        thread.join()
        assert reader.read() == list(range(count))


def test_a_transaction_that_stays_open_is_looked_for_only_once_it_has_ended(
    outbox: PostgresOutbox, reader: Reader
) -> None:
    seen: list[int] = []
    with transaction(outbox) as late:
        for n in range(30):
            if n % 10 == 0:
                outbox.add(late, numbered([700_000 + n], keys=7), topic="orders")
            outboxes.add(outbox, numbered(range(100 * n, 100 * n + 100), keys=7))
            read = reader.read()
            for key in range(7):
                of_key = [number for number in read if number % 7 == key]
                assert of_key == sorted(of_key)
            seen += read
            reader.delete(len(read))
            assert sum(map(len, reader.store._gaps._of.values())) <= 2 * 64
        reader.ranges = 0
        for _ in range(5):
            assert reader.read() == []
            assert not reader.looked_back()
        assert reader.ranges == 5 * 64
    assert sorted(seen) == list(range(3000))
    assert sorted(reader.read()) == [700_000, 700_010, 700_020]
    assert reader.store._gaps._of == {}


def test_a_snapshot_that_is_pinned_elsewhere_has_nothing_looked_for(outbox: PostgresOutbox, reader: Reader) -> None:
    with connected(outbox) as pinned:
        pinned.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        pinned.execute(outbox._tables.sql("SELECT count(*) FROM {outbox}"))
        for n in range(5):
            outboxes.add(outbox, numbered([n]))
            assert reader.read() == [n]
            assert not reader.looked_back()


def test_numbers_that_were_rolled_back_are_passed_over(outbox: PostgresOutbox, reader: Reader) -> None:
    with connected(outbox) as connection:
        for n in range(10):
            connection.execute("BEGIN")
            outbox.add(connection, numbered(range(n, n + 1), keys=1), topic="orders")
            assert reader.read() == []
            connection.execute("ROLLBACK" if n % 2 else "COMMIT")
            assert reader.read() == ([] if n % 2 else [n])
    assert reader.store._gaps._of == {}


def test_what_a_session_adds_by_numbers_that_it_had_taken_before_is_found(
    outbox: PostgresOutbox, caplog: pytest.LogCaptureFixture
) -> None:
    outboxes.query(outbox, "ALTER TABLE {outbox} ALTER COLUMN seq SET CACHE 50")
    reader = Reader(outbox)
    with connected(outbox._conninfo) as session:
        for number in range(10):
            with session.transaction():
                outbox.add(session, numbered([number]), topic="orders")
            assert reader.read() == [number]
    reader.store.close()
    assert "has a CACHE" in caplog.text


def test_rows_of_savepoints_and_of_prepared_transactions_are_found(outbox: PostgresOutbox, reader: Reader) -> None:
    name = outboxes.in_schema(outbox, "prepared").replace('"', "").replace("'", "")
    with connected(outbox) as connection:
        connection.execute("BEGIN")
        for n in range(5):
            connection.execute("SAVEPOINT one")
            outbox.add(connection, numbered([n], keys=1), topic="orders")
            connection.execute("SAVEPOINT two")
            outbox.add(connection, numbered([100 + n], keys=1), topic="orders")
            connection.execute("ROLLBACK TO SAVEPOINT two")
            outboxes.add(outbox, numbered([1000 + n], keys=1))
            assert reader.read() == [1000 + n]
        connection.execute(f"PREPARE TRANSACTION '{name}'")
        outboxes.add(outbox, numbered([2000], keys=1))
        assert reader.read() == [2000]
        connection.execute(f"COMMIT PREPARED '{name}'")
    assert reader.read() == list(range(5))


def test_a_store_that_was_opened_anew_reads_all_from_floors_of_0(outbox: PostgresOutbox, reader: Reader) -> None:
    with transaction(outbox) as late:
        outbox.add(late, numbered([1], keys=1), topic="orders")
        outboxes.add(outbox, numbered([2], keys=1))
        assert reader.read() == [2]
    again = Reader(outbox)
    assert again.read() == [1, 2]
    again.store.close()


def test_what_is_replayed_is_read_with_what_commits_late(outbox: PostgresOutbox, reader: Reader) -> None:
    with transaction(outbox) as late:
        outbox.add(late, numbered([1], keys=1), topic="orders")
        outboxes.add(outbox, numbered([2, 3], keys=1))
        assert reader.read() == [2, 3]
        outboxes.move_to_dead(outbox, "seq = 2")
        before = reader.store.changes()
        assert outbox.dead_letters.replay(OutboxQuery()) == 1
        assert reader.read() == []
        assert reader.store.changes() != before
        reader.floors = dict.fromkeys(range(64), 0)  # what a relay does then
        assert reader.read() == [2, 3]
        reader.delete(4)
    assert reader.read() == [1]
    assert reader.store._gaps._of == {}


@pytest.mark.parametrize("seed", range(6))
def test_whatever_order_transactions_end_in(outbox: PostgresOutbox, reader: Reader, seed: int) -> None:
    seeded = random.Random(seed)
    numbers = itertools.count()
    committed: list[int] = []
    seen: list[int] = []
    key_of: dict[int, str] = {}
    free = {f"k{n}" for n in range(8)}  # the application's transactions of one key follow each other

    with contextlib.ExitStack() as undo:
        connections = [undo.enter_context(connected(outbox)) for _ in range(5)]
        began: dict[Any, tuple[set[str], list[int]]] = {}

        def end(connection: Any) -> None:
            keys, added = began.pop(connection)
            free.update(keys)
            if seeded.random() < 0.2:
                connection.execute("ROLLBACK")
            else:
                connection.execute("COMMIT")
                committed.extend(added)

        def step() -> None:
            connection = seeded.choice(connections)
            if connection not in began:
                connection.execute("BEGIN")
                began[connection] = (set(), [])
            keys, added = began[connection]
            choice = seeded.random()
            if choice < 0.25:
                end(connection)
                return
            if free and choice < 0.5:
                keys.add(free.pop())
            count = seeded.choice([1, 2, 70]) if keys else 0
            new = [next(numbers) for _ in range(count)]
            added += new
            of_new = [seeded.choice(sorted(keys)) for _ in new]
            key_of.update(zip(new, of_new, strict=True))
            outbox.add(
                connection,
                [Envelope(data=b"%d" % n, key=key) for n, key in zip(new, of_new, strict=True)],
                topic="orders",
            )

        for _ in range(120):
            step()
            if seeded.random() < 0.4:
                seen.extend(reader.read(limit=seeded.choice([1, 7, 60, 1000])))
                reader.delete(seeded.choice([0, 0, 5, 100]))
        for connection in list(began):
            end(connection)
        while read := reader.read(limit=50):
            seen.extend(read)
    assert sorted(seen) == sorted(committed)
    of_key: dict[str, list[int]] = defaultdict(list)
    for number in seen:
        of_key[key_of[number]].append(number)
    expected: dict[str, list[int]] = defaultdict(list)
    for number in sorted(committed, key=committed.index):
        expected[key_of[number]].append(number)
    assert of_key == expected
