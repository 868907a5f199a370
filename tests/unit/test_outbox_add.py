"""Adding to an outbox within the application's own transaction, and what is refused."""

import contextlib
import functools
import itertools
import os
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

import kbatch
from kbatch import ConfigError, Envelope, OutboxError, SerializationError, SqliteOutbox, Tombstone
from kbatch._database._sqlite import tell_of_fault
from kbatch._fastmap import packed_key_hash, unpack_record
from tests import outboxes
from tests.injection import Injector
from tests.outboxes import Outbox, in_sqlite

FUTURE = datetime.now(timezone.utc) + timedelta(days=1)
PAST = datetime.now(timezone.utc) - timedelta(days=1)


@pytest.fixture
def outbox(new_outbox: Callable[..., Any]) -> Any:
    return new_outbox()


def envelopes(count: int, first: int = 0) -> list[Envelope]:
    return [Envelope(data=b"%d" % n, key=f"k{n % 5}") for n in range(first, first + count)]


# -- what is stored


def test_what_was_committed_is_there_as_it_goes_on_the_wire(outbox: Outbox) -> None:
    order = Envelope({"n": 1}, key="schlüssel", topic="orders", partition=3, timestamp=7, headers={"trace": "x"})
    assert outboxes.add(outbox, [order, Tombstone("gone", topic="other")], topic=None) == 2
    (first, second) = outboxes.query(outbox, "SELECT id, packed, deliver_by FROM {outbox} ORDER BY seq")
    assert getattr(first[0], "bytes", first[0]) == order.id.bytes
    topic, partition, timestamp, key, value, headers = unpack_record(first[1])
    assert (topic, partition, timestamp, key, value) == ("orders", 3, 7, "schlüssel".encode(), b'{"n":1}')
    assert ("trace", b"x") in headers
    assert unpack_record(second[1])[0] == "other"
    assert unpack_record(second[1])[4] is None
    assert (first[2], second[2]) == (None, None)


def test_what_was_rolled_back_is_not(outbox: Outbox) -> None:
    with outboxes.transaction(outbox) as connection:
        outbox.add(connection, envelopes(3), topic="orders")
        connection.execute("ROLLBACK")
        connection.execute("BEGIN")
    assert outbox.status().waiting == 0
    assert outboxes.add(outbox, envelopes(2)) == 2
    assert outboxes.bodies(outbox) == [b"0", b"1"]


def test_numbers_grow_and_are_never_given_twice_even_if_all_rows_are_gone(outbox: Outbox) -> None:
    seen: list[int] = []
    for _ in range(4):
        outboxes.add(outbox, envelopes(10))
        seen += [seq for (seq,) in outboxes.query(outbox, "SELECT seq FROM {outbox} ORDER BY seq")]
        outboxes.query(outbox, "DELETE FROM {outbox}")
    assert seen == sorted(set(seen))


def test_a_key_has_one_bucket_and_keys_are_spread_over_all(outbox: Outbox) -> None:
    for _ in range(2):
        outboxes.add(outbox, [Envelope(data=b"", key=f"customer-{n}") for n in range(5000)])
    buckets: dict[bytes | None, set[int]] = {}
    for bucket, packed in outboxes.query(outbox, "SELECT bucket, packed FROM {outbox}"):
        buckets.setdefault(unpack_record(packed)[3], set()).add(bucket)
    assert all(len(of_key) == 1 for of_key in buckets.values())
    sizes = Counter(bucket for of_key in buckets.values() for bucket in of_key)
    assert set(sizes) == set(range(64))
    assert max(sizes.values()) < 3 * 5000 / 64


def test_the_buckets_of_version_1(outbox: Outbox) -> None:
    # They are stored: another hash would move keys whose records wait. Computed by hash_of below.
    def mixed(value: int) -> int:
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            value = (value ^ value >> 33) * factor % 2**64
        return value ^ value >> 33

    def hash_of(content: bytes) -> int:
        value = 14695981039346656037
        for byte in content:
            value = (value ^ byte) * 1099511628211 % 2**64
        return mixed(value)

    keyed = Envelope(data=b"", key="schlüssel")
    to_partition = Envelope(data=b"", partition=258)
    neither = Envelope(data=b"")
    outboxes.add(outbox, [keyed, to_partition, neither])
    rows = outboxes.query(outbox, "SELECT bucket, packed FROM {outbox} ORDER BY seq")
    expected = [
        hash_of(b"orders\0" + "schlüssel".encode()),
        hash_of(b"orders\x01\x02\x01\0\0"),
        hash_of(b"orders\x02" + neither.id.bytes),
    ]
    assert [bucket for bucket, _ in rows] == [value % 64 for value in expected]
    signed = [value - 2**64 if value >= 2**63 else value for value in expected]
    assert [packed_key_hash(packed) for _, packed in rows] == [signed[0], signed[1], None]


def test_an_expired_envelope_is_left_out_and_the_time_of_others_is_kept(outbox: Outbox) -> None:
    assert outboxes.add(outbox, [Envelope(data=b"a", deliver_by=PAST), Envelope(data=b"b", deliver_by=FUTURE)]) == 1
    ((deliver_by,),) = outboxes.query(outbox, "SELECT deliver_by FROM {outbox}")
    assert deliver_by == int(FUTURE.timestamp() * 1e6)


def scheduled(outbox: Outbox) -> list[Any]:
    return outboxes.query(
        outbox,
        "SELECT seq, packed, due_at, attempts, key_hash, deliver_by FROM {later} WHERE scheduled = 1 ORDER BY seq",
    )


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_scheduled_waits_apart_until_its_time(outbox: Outbox, count: int) -> None:
    later = [Envelope(data=b"%d" % n, key="k", scheduled_time=FUTURE + timedelta(seconds=n)) for n in range(count)]
    now = [Envelope(data=b"now", key="k", scheduled_time=PAST)] if count > 1 else []
    assert outboxes.add(outbox, [*later, *now]) == count + len(now)
    rows = scheduled(outbox)
    assert [unpack_record(packed)[4] for _, packed, *_ in rows] == [b"%d" % n for n in range(count)]
    assert [due_at for _, _, due_at, *_ in rows] == [
        -(-int((FUTURE + timedelta(seconds=n)).timestamp() * 1e6) // 1000) for n in range(count)
    ]
    assert {row[3:] for row in rows} == {(0, None, None)}
    assert outboxes.bodies(outbox) == [b"now"] * len(now)
    assert (outbox.status().waiting, outbox.status().later, outbox.status().scheduled) == (len(now), 0, count)


def test_a_record_that_is_scheduled_has_the_timestamp_of_its_time_unless_it_has_one(outbox: Outbox) -> None:
    outboxes.add(outbox, [Envelope(data=b"", scheduled_time=FUTURE)])
    outboxes.add(outbox, [Envelope(data=b"", scheduled_time=FUTURE, timestamp=7, deliver_by=FUTURE)])
    outboxes.add(outbox, [Envelope(data=b"", scheduled_time=PAST)])
    timestamps = [unpack_record(packed)[2] for _, packed, *_ in scheduled(outbox)]
    assert timestamps == [int(FUTURE.timestamp() * 1e6) // 1000, 7]
    assert [row[-1] for row in scheduled(outbox)] == [None, int(FUTURE.timestamp() * 1e6)]
    ((packed,),) = outboxes.query(outbox, "SELECT packed FROM {outbox}")
    assert unpack_record(packed)[2] > PAST.timestamp() * 1000 + 1


def test_what_is_scheduled_is_rolled_back_with_the_rest(outbox: Outbox) -> None:
    with outboxes.transaction(outbox) as connection:
        outbox.add(connection, [Envelope(data=b"", scheduled_time=FUTURE)], topic="orders")
        connection.execute("ROLLBACK")
        connection.execute("BEGIN")
    assert outbox.status().scheduled == 0


def test_an_empty_list_adds_nothing(outbox: Outbox) -> None:
    assert outboxes.add(outbox, []) == 0
    assert outboxes.add(outbox, [Envelope(data=b"a", deliver_by=PAST)]) == 0


def test_two_outboxes_of_one_database_are_apart(tmp_path: Path) -> None:
    first, second = outboxes.made(tmp_path), outboxes.made(tmp_path, prefix="other_")
    outboxes.add(first, envelopes(2))
    assert (first.status().waiting, second.status().waiting) == (2, 0)


def test_options_of_mapping_are_a_producers(new_outbox: Callable[..., Outbox]) -> None:
    outbox = new_outbox(
        wire="cloudevents",
        source="/shop",
        encoder=lambda message, context: b"<%s>" % message.encode(),
        header_hook=lambda: {"ce_trace": "t"},
    )
    outboxes.add(outbox, [Envelope("x", message_type="order")])
    ((packed,),) = outboxes.query(outbox, "SELECT packed FROM {outbox}")
    *_, value, headers = unpack_record(packed)
    assert value == b"<x>"
    assert {("ce_source", b"/shop"), ("ce_trace", b"t")} <= set(headers)


# -- transactions of sqlite3 in each of its modes

ISOLATION = ["", "DEFERRED", "IMMEDIATE", "EXCLUSIVE", None]


@in_sqlite
@pytest.mark.parametrize("isolation_level", ISOLATION)
@pytest.mark.parametrize("commits", [True, False])
def test_it_joins_the_transaction_of_each_isolation_level(
    outbox: SqliteOutbox, isolation_level: Any, commits: bool
) -> None:
    outboxes.query(outbox, "CREATE TABLE orders (n)")
    connection = sqlite3.connect(outbox._path, isolation_level=isolation_level)
    if isolation_level is None:
        connection.execute("BEGIN")
    connection.execute("INSERT INTO orders VALUES (1)")
    outbox.add(connection, envelopes(3), topic="orders")
    assert connection.in_transaction
    assert outbox.status().waiting == 0  # for others
    if commits:
        connection.commit()
    else:
        connection.rollback()
    connection.close()
    assert outbox.status().waiting == (3 if commits else 0)
    assert len(outboxes.query(outbox, "SELECT * FROM orders")) == (1 if commits else 0)


@in_sqlite
@pytest.mark.skipif(sys.version_info < (3, 12), reason="platform: sqlite3.connect(autocommit=…) is of Python 3.12")
@pytest.mark.parametrize("autocommit", [True, False])
def test_it_joins_the_transaction_of_each_autocommit(outbox: SqliteOutbox, autocommit: bool) -> None:
    connection = sqlite3.connect(outbox._path, autocommit=autocommit)  # type: ignore[call-arg, unused-ignore]
    if autocommit:
        with pytest.raises(OutboxError, match="in no transaction"):
            outbox.add(connection, envelopes(1), topic="orders")
        connection.execute("BEGIN")
    outbox.add(connection, envelopes(3), topic="orders")
    assert outbox.status().waiting == 0
    connection.execute("COMMIT") if autocommit else connection.commit()
    connection.close()
    assert outbox.status().waiting == 3


@in_sqlite
def test_a_connection_with_factories_of_its_own(outbox: SqliteOutbox) -> None:
    with outboxes.transaction(outbox) as connection:
        connection.row_factory = sqlite3.Row
        connection.text_factory = bytes
        assert outbox.add(connection, envelopes(2), topic="orders") == 2


@in_sqlite
def test_a_connection_that_converts_columns_by_their_types(outbox: SqliteOutbox) -> None:
    sqlite3.register_converter("INTEGER", lambda value: b"converted " + value)
    try:
        connection = sqlite3.connect(outbox._path, isolation_level=None, detect_types=sqlite3.PARSE_DECLTYPES)
        connection.execute("BEGIN")
        assert outbox.add(connection, envelopes(2), topic="orders") == 2
        connection.close()
    finally:
        sqlite3.converters.pop("INTEGER")  # type: ignore[attr-defined]


@in_sqlite
def test_a_temporary_table_of_the_same_name_is_not_meant(outbox: SqliteOutbox) -> None:
    with outboxes.transaction(outbox) as connection:
        connection.execute("CREATE TEMP TABLE kbatch_outbox (x)")
        assert outbox.add(connection, envelopes(2), topic="orders") == 2


# -- what is refused


def refused(outbox: Any, connection: Any, what: Any = None, **arguments: Any) -> str:
    with pytest.raises((OutboxError, SerializationError, kbatch.NotYetDueError, TypeError)) as caught:
        outbox.add(connection, envelopes(3) if what is None else what, **{"topic": "orders", **arguments})
    return str(caught.value)


@in_sqlite
@pytest.mark.parametrize("isolation_level", ISOLATION)
def test_no_transaction(outbox: SqliteOutbox, isolation_level: Any) -> None:
    connection = sqlite3.connect(outbox._path, isolation_level=isolation_level)
    assert "BEGIN IMMEDIATE" in refused(outbox, connection)
    assert not connection.in_transaction
    connection.close()


@in_sqlite
def test_a_closed_connection_another_threads_and_what_is_none(outbox: SqliteOutbox) -> None:
    connection = sqlite3.connect(outbox._path)
    connection.execute("BEGIN")
    told: list[str] = []
    thread = threading.Thread(target=lambda: told.append(refused(outbox, connection)))
    thread.start()
    thread.join()
    assert "in the thread that made it" in told[0]
    connection.close()
    assert "is open" in refused(outbox, connection)
    assert refused(outbox, "shop.db") == "connection must be a sqlite3.Connection, not str"


@in_sqlite
def test_a_connection_to_another_database(outbox: SqliteOutbox, tmp_path: Path) -> None:
    other = outboxes.made(tmp_path, "other.db")
    with outboxes.transaction(other) as connection:
        assert "give a connection to that file" in refused(outbox, connection)
    assert other.status().waiting == 0
    connection = sqlite3.connect(":memory:", isolation_level=None)
    for statement in outbox.ddl().split(";\n"):
        connection.execute(statement)
    connection.execute("BEGIN")
    assert "a database in memory" in refused(outbox, connection)
    connection.close()


@in_sqlite
@pytest.mark.parametrize("attached", [False, True])
def test_a_connection_to_another_database_without_the_tables(outbox: SqliteOutbox, attached: bool) -> None:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    if attached:
        connection.execute("ATTACH ? AS shop", (outbox._path,))
    connection.execute("BEGIN IMMEDIATE")
    assert "give a connection to that file" in refused(outbox, connection)
    connection.close()


@in_sqlite
def test_a_connection_by_another_name_of_the_file(outbox: SqliteOutbox, tmp_path: Path) -> None:
    os.symlink(outbox._path, tmp_path / "link.db")
    for _ in range(2):
        connection = sqlite3.connect(tmp_path / "link.db", isolation_level=None)
        connection.execute("BEGIN")
        assert outbox.add(connection, envelopes(1), topic="orders") == 1
        connection.execute("COMMIT")
        connection.close()


@in_sqlite
def test_a_connection_where_one_to_the_right_file_was_before(outbox: SqliteOutbox, tmp_path: Path) -> None:
    other = outboxes.made(tmp_path, "other.db")
    connection = sqlite3.connect(outbox._path, isolation_level=None)
    for path in (outbox._path, other._path, outbox._path, other._path):
        connection.close()
        connection.__init__(path, isolation_level=None)  # type: ignore[misc]
        connection.execute("BEGIN")
        if path == outbox._path:
            assert outbox.add(connection, envelopes(1), topic="orders") == 1
            assert "give a connection to that file" in refused(other, connection)
            connection.execute("COMMIT")
        else:
            assert "give a connection to that file" in refused(outbox, connection)
    connection.close()
    assert (outbox.status().waiting, other.status().waiting) == (2, 0)


@in_sqlite
@pytest.mark.skipif(sys.version_info < (3, 11), reason="platform: deserialize is of Python 3.11")
def test_a_connection_that_got_another_database_in_memory(outbox: SqliteOutbox) -> None:
    with outboxes.transaction(outbox) as connection:
        outbox.add(connection, envelopes(1), topic="orders")
        connection.execute("COMMIT")
        connection.deserialize(connection.serialize())  # type: ignore[attr-defined, unused-ignore]
        with pytest.raises(sqlite3.OperationalError, match="unable to open"):  # a database in WAL mode cannot be one
            connection.execute("SELECT * FROM kbatch_outbox")
        connection.execute("BEGIN")
        assert "unable to open" in refused(outbox, connection)
    assert outbox.status().waiting == 1


@in_sqlite
def test_a_connection_that_allows_no_functions(outbox: SqliteOutbox) -> None:
    def allowed(action: int, *_: Any) -> int:
        return sqlite3.SQLITE_DENY if action == 31 else sqlite3.SQLITE_OK  # SQLITE_FUNCTION

    with outboxes.transaction(outbox) as connection:
        connection.set_authorizer(allowed)
        for n in range(3):
            assert outbox.add(connection, envelopes(1, first=n), topic="orders") == 1
    assert outboxes.bodies(outbox) == [b"0", b"1", b"2"]


@in_sqlite
def test_one_envelope_takes_two_statements(outbox: SqliteOutbox) -> None:
    statements: list[str] = []
    with outboxes.transaction(outbox) as connection:
        outbox.add(connection, envelopes(1), topic="orders")
        connection.set_trace_callback(statements.append)
        outbox.add(connection, envelopes(1), topic="orders")
        connection.set_trace_callback(None)
    assert [statement.split()[0] for statement in statements] == ["UPDATE", "INSERT"]


@pytest.mark.parametrize("count", [1, 3])
def test_tables_that_change_between_two_adds_of_a_connection(outbox: Outbox, count: int) -> None:
    with outboxes.transaction(outbox) as connection:
        outbox.add(connection, envelopes(count), topic="orders")
        for change, back, says in (
            ("UPDATE {meta} SET version = 2", "UPDATE {meta} SET version = 1", "tables of version 2"),
            ("UPDATE {meta} SET buckets = 32", "UPDATE {meta} SET buckets = 64", "has 32 buckets"),
        ):
            connection.execute(outbox._tables.sql(change))
            assert says in refused(outbox, connection, envelopes(count))
            connection.execute(outbox._tables.sql(back))
            outbox.add(connection, envelopes(count), topic="orders")
    outboxes.query(outbox, "DROP TABLE {outbox}")
    with outboxes.transaction(outbox) as connection:
        assert "call create()" in refused(outbox, connection, envelopes(count))
        connection.execute("ROLLBACK")
        connection.execute("BEGIN")
    outbox.create()
    outboxes.add(outbox, envelopes(count))
    assert outbox.status().waiting == count


@pytest.mark.parametrize("count", [1, 3])
def test_a_savepoint_that_is_rolled_back_takes_its_rows_alone(outbox: Outbox, count: int) -> None:
    other = outboxes.same(outbox)
    with outboxes.transaction(outbox) as connection:
        connection.execute("SAVEPOINT first")
        outbox.add(connection, envelopes(count, first=10), topic="orders")  # the first one of this connection
        connection.execute("ROLLBACK TO first")
        outbox.add(connection, envelopes(count), topic="orders")
        connection.execute("SAVEPOINT second")
        outbox.add(connection, envelopes(count, first=20), topic="orders")
        connection.execute("ROLLBACK TO second")
        other.add(connection, envelopes(count, first=count), topic="orders")
        outbox.add(connection, envelopes(count, first=2 * count), topic="orders")
    assert outboxes.bodies(outbox) == [b"%d" % n for n in range(3 * count)]
    numbers = outboxes.query(outbox, "SELECT seq FROM {outbox}")
    assert len(set(numbers)) == 3 * count


def test_tables_that_are_missing(tmp_path: Path) -> None:
    outbox = SqliteOutbox(tmp_path / "shop.db")
    with outboxes.transaction(outbox) as connection:
        assert "call create()" in refused(outbox, connection)
        connection.execute("CREATE TABLE orders (n)")  # the transaction goes on
    assert outboxes.query(outbox, "SELECT name FROM sqlite_master") == [("orders",)]
    for call in (outbox.status, outbox.open_store):
        with pytest.raises(OutboxError, match=r"call create\(\)"):
            call()
    missing = SqliteOutbox(tmp_path / "none.db")
    for call in (missing.status, missing.open_store):
        with pytest.raises(OutboxError, match=r"there is no database .*none.db; call create\(\)"):
            call()
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("UPDATE {meta} SET version = 2", "tables of version 2"),
        ("UPDATE {meta} SET buckets = 32", "has 32 buckets"),
        ("DELETE FROM {meta}", r"call create\(\)"),
    ],
)
def test_tables_of_another_version(outbox: Outbox, change: str, says: str) -> None:
    outboxes.query(outbox, change)
    with outboxes.transaction(outbox) as connection, pytest.raises(OutboxError, match=says):
        outbox.add(connection, envelopes(1), topic="orders")
    for call in (outbox.status, outbox.open_store, *([] if "DELETE" in change else [outbox.create])):
        with pytest.raises(OutboxError, match=says):
            call()


def test_bad_envelopes_add_nothing_and_the_transaction_goes_on(outbox: Outbox) -> None:
    def failing() -> Iterator[Envelope]:
        yield Envelope(data=b"x")
        raise KeyError("in the middle")

    with outboxes.transaction(outbox) as connection:
        outbox.add(connection, envelopes(2), topic="orders")
        assert "envelope 1" in refused(outbox, connection, [Envelope(data=b""), Envelope(data=b"x" * 1_000_001)])
        assert "no topic" in refused(outbox, connection, [Envelope(data=b"")], topic=None)
        assert "envelope 1" in refused(outbox, connection, [Envelope(data=b""), object()])
        assert "iterable of kbatch.Envelope" in refused(outbox, connection, Envelope(data=b""))
        with pytest.raises(KeyError, match="in the middle"):
            outbox.add(connection, failing(), topic="orders")
        outbox.add(connection, envelopes(1, first=7), topic="orders")
    assert outboxes.bodies(outbox) == [b"0", b"1", b"7"]


def test_a_generator_that_ends_the_transaction(outbox: Outbox) -> None:
    with outboxes.transaction(outbox) as connection:

        def ending() -> Iterator[Envelope]:
            yield Envelope(data=b"x")
            connection.execute("COMMIT")

        assert "in no transaction" in refused(outbox, connection, ending())
        connection.execute("BEGIN")
    assert outbox.status().waiting == 0


@in_sqlite
def test_a_write_that_fails_in_the_middle_adds_nothing(outbox: SqliteOutbox) -> None:
    with outboxes.transaction(outbox) as connection:
        outbox.add(connection, envelopes(2), topic="orders")
        connection.execute(
            outbox._tables.sql(
                "CREATE TEMP TRIGGER third BEFORE INSERT ON {outbox} WHEN (SELECT count(*) FROM {outbox}) = 4 "
                "BEGIN SELECT raise(ABORT, 'no room'); END"
            )
        )
        assert "no room" in refused(outbox, connection, envelopes(5))
        connection.execute("DROP TRIGGER third")
        outbox.add(connection, envelopes(1, first=7), topic="orders")
    assert outboxes.bodies(outbox) == [b"0", b"1", b"7"]


class Python312Connection(sqlite3.Connection):
    """As one that was made with ``autocommit=True``, from Python 3.12 on."""

    autocommit = True

    def rollback(self) -> None:
        """Does nothing."""


@in_sqlite
@pytest.mark.parametrize("factory", [sqlite3.Connection, Python312Connection])
def test_what_cannot_be_deleted_again_is_rolled_back(outbox: SqliteOutbox, factory: type[sqlite3.Connection]) -> None:
    connection = sqlite3.connect(outbox._path, isolation_level=None, factory=factory)
    with contextlib.closing(connection):
        for event, when in (("INSERT", "new.seq = 3"), ("DELETE", "old.seq = 2")):
            connection.execute(
                outbox._tables.sql(
                    f"CREATE TEMP TRIGGER no_{event} BEFORE {event} ON {{outbox}} WHEN {when} "
                    f"BEGIN SELECT raise(ABORT, 'no {event}'); END"
                )
            )
        connection.execute("BEGIN IMMEDIATE")
        assert "no DELETE" in refused(outbox, connection, envelopes(5))
        assert not connection.in_transaction
    assert outbox.status().waiting == 0


@in_sqlite
@pytest.mark.parametrize("table", ["outbox", "later"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_statement_that_sqlite_refuses_before_any_row_adds_nothing(
    outbox: SqliteOutbox, table: str, count: int
) -> None:
    scheduled = [Envelope(data=b"%d" % n, scheduled_time=FUTURE) for n in range(count)]
    with outboxes.transaction(outbox) as connection:
        outbox.add(connection, envelopes(1, first=7), topic="orders")
        connection.execute(outbox._tables.sql(f"ALTER TABLE {{{table}}} RENAME COLUMN created_at TO another"))
        assert "no column named created_at" in refused(outbox, connection, [*envelopes(count), *scheduled])
        connection.execute(outbox._tables.sql(f"ALTER TABLE {{{table}}} RENAME COLUMN another TO created_at"))
    assert outboxes.bodies(outbox) == [b"7"]
    assert outbox.status().scheduled == 0


@in_sqlite
@pytest.mark.parametrize("count", [1, 3])
def test_a_row_that_has_the_number_already_stays(outbox: SqliteOutbox, count: int) -> None:
    with outboxes.transaction(outbox) as connection:
        outbox.add(connection, [Envelope(data=b"there", key="k", topic="orders")])
        connection.execute(outbox._tables.sql("UPDATE {meta} SET last_seq = ?"), (1 - count,))
        mine = [Envelope(data=b"%d" % n, key="k", topic="orders") for n in range(count)]
        assert "UNIQUE" in refused(outbox, connection, mine)
        connection.execute(outbox._tables.sql("UPDATE {meta} SET last_seq = 1"))
        outbox.add(connection, envelopes(1, first=7), topic="orders")
    assert outboxes.bodies(outbox) == [b"there", b"7"]


@in_sqlite
@pytest.mark.parametrize("count", [1, 3])
def test_a_progress_handler_that_interrupts_at_any_time_leaves_nothing(outbox: SqliteOutbox, count: int) -> None:
    for calls in range(1000):
        asked = itertools.count()
        with contextlib.closing(sqlite3.connect(outbox._path)) as connection:
            connection.execute(outbox._tables.sql("UPDATE {meta} SET version = 1"))
            connection.set_progress_handler(lambda: next(asked) >= calls, 5)  # noqa: B023
            try:
                outbox.add(connection, envelopes(count), topic="orders")
            except OutboxError:
                connection.set_progress_handler(None, 0)
                connection.commit()
            else:
                break
        assert outbox.status().waiting == 0
    assert calls > 5


@in_sqlite
@pytest.mark.parametrize("count", [1, 3])
def test_an_exception_at_any_line_leaves_all_or_nothing(outbox: SqliteOutbox, count: int) -> None:
    places = 0
    with outboxes.transaction(outbox) as connection:
        for nth in range(1, 1000):
            before = connection.execute(outbox._tables.sql("SELECT count(*) FROM {outbox}")).fetchone()[0]
            injector = Injector(nth)
            injector.run(lambda: outbox.add(connection, envelopes(count), topic="orders"))
            after = connection.execute(outbox._tables.sql("SELECT count(*) FROM {outbox}")).fetchone()[0]
            assert after - before in (0, count), injector.place
            if injector.place is None:
                break
            places += 1
    assert places > 20


@in_sqlite
def test_a_database_that_is_locked_is_told_with_what_to_do(outbox: SqliteOutbox) -> None:
    reader = sqlite3.connect(outbox._path, isolation_level=None, timeout=0)
    reader.execute("BEGIN")
    reader.execute(outbox._tables.sql("SELECT * FROM {outbox}")).fetchall()
    with outboxes.transaction(outbox):
        assert "BEGIN IMMEDIATE" in refused(outbox, reader)
    reader.close()


@in_sqlite
def test_a_full_disk(outbox: SqliteOutbox) -> None:
    with outboxes.transaction(outbox) as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        assert "make room on the disk" in refused(outbox, connection, [Envelope(data=b"x" * 100_000)] * 2)
        if not connection.in_transaction:
            connection.execute("BEGIN")
    assert outbox.status().waiting == 0


@in_sqlite
@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="platform: no permissions of files")
def test_a_connection_that_only_reads(outbox: SqliteOutbox) -> None:
    connection = sqlite3.connect(f"file:{outbox._path}?mode=ro", uri=True, isolation_level=None)
    connection.execute("BEGIN")
    assert "open the database for writing" in refused(outbox, connection)
    connection.close()


def test_a_file_that_is_no_database_and_a_folder_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database " * 100)
    with pytest.raises(OutboxError, match="give the path of a SQLite database"):
        SqliteOutbox(tmp_path / "text.db").create()
    with pytest.raises(OutboxError, match="the folder must be there"):
        SqliteOutbox(tmp_path / "none" / "shop.db").create()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prefix": 'a"b'}, "prefix must begin a table's name"),
        ({"prefix": ""}, "prefix must begin a table's name"),
        ({"prefix": "7a"}, "prefix must begin a table's name"),
        ({"prefix": "a" * 48}, "64 characters, and 63 are allowed"),
        ({"prefix": "sqlite_"}, "SQLite keeps for itself"),
        ({"path": "a\0b"}, "no NUL character"),
        ({"prefix": None}, "prefix must begin a table's name"),
        ({"path": ":memory:"}, "a database in memory"),
        ({"path": ""}, "a database in memory"),
        ({"path": 7}, "not int"),
        ({"max_message_bytes": 999}, "from 1,000"),
        ({"max_message_bytes": True}, "from 1,000"),
        ({"wire": "avro"}, "wire must be one of"),
        ({"encoder": 7}, "encoder must be"),
        ({"source": 7}, "source must be str"),
        ({"header_hook": 7}, "header_hook"),
    ],
)
def test_wrong_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SqliteOutbox(**{"path": "shop.db", **options})


# -- tables


@in_sqlite
def test_create_may_be_called_again_and_changes_nothing(outbox: SqliteOutbox) -> None:
    outboxes.add(outbox, envelopes(3))
    outbox.create()
    assert outbox.status().waiting == 3
    assert outboxes.query(outbox, "SELECT last_seq FROM {meta}") == [(3,)]
    assert outboxes.query(outbox, "PRAGMA journal_mode") == [("wal",)]


def test_create_makes_no_table_beside_those_of_another_version(outbox: Outbox) -> None:
    outboxes.query(outbox, "DROP TABLE {dead}")
    outboxes.query(outbox, "UPDATE {meta} SET version = 2")
    with pytest.raises(OutboxError, match="tables of version 2"):
        outbox.create()
    assert not outboxes.has_table(outbox, "dead")


class WithoutWal(sqlite3.Connection):
    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        return super().execute("PRAGMA journal_mode" if "journal_mode" in sql else sql, *arguments)


def test_a_file_system_without_wal_mode_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=WithoutWal))
    with pytest.raises(OutboxError, match="stays in 'delete'; put the file on a local disk"):
        SqliteOutbox(tmp_path / "shop.db").create()


@in_sqlite
def test_the_log_of_the_database_is_cut_after_a_reader_had_kept_it_growing(
    outbox: SqliteOutbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kbatch._database._sqlite._LONGEST_WAL", 100_000)
    store = outbox.open_store()
    reader = sqlite3.connect(outbox._path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute(outbox._tables.sql("SELECT * FROM {outbox}")).fetchall()
    for _ in range(3):
        outboxes.add(outbox, [Envelope(data=b"x" * 900_000)])
    assert os.path.getsize(outbox._path + "-wal") > 2_700_000
    reader.close()
    for _ in range(3):
        store.renew("relay", 60.0, release=(), avoid=())
        outboxes.query(outbox, "PRAGMA wal_checkpoint")
    assert os.path.getsize(outbox._path + "-wal") <= 100_000
    store.close()


@in_sqlite
def test_ddl_makes_the_same_tables(tmp_path: Path, outbox: SqliteOutbox) -> None:
    by_hand = SqliteOutbox(tmp_path / "by_hand.db")
    with contextlib.closing(sqlite3.connect(by_hand._path)) as connection:
        for _ in range(2):
            connection.executescript(by_hand.ddl())
    schema = "SELECT type, name, sql FROM sqlite_master ORDER BY name"
    assert outboxes.query(by_hand, schema) == outboxes.query(outbox, schema)
    assert outboxes.add(by_hand, envelopes(2)) == 2
    assert len(outboxes.query(outbox, "SELECT * FROM {lease}")) == 64


@in_sqlite
def test_the_hot_table_has_no_index_but_its_key(outbox: SqliteOutbox) -> None:
    ((indexes,),) = outboxes.query(
        outbox, "SELECT count(*) FROM pragma_index_list('kbatch_outbox') WHERE origin != 'pk'"
    )
    assert indexes == 0


def test_status_counts_up_to_a_bound_and_tells_the_oldest(outbox: Outbox) -> None:
    assert outbox.status() == kbatch.OutboxStatus(0, 0, 0, 0.0, 0)
    for first in range(0, 30, 10):
        outboxes.add(outbox, envelopes(10, first))
    outboxes.query(outbox, "UPDATE {outbox} SET created_at = created_at - 3600000000 WHERE seq = 1")
    assert outbox.status(count_up_to=20).waiting == 20
    status = outbox.status()
    assert status.waiting == 30
    assert 3600 <= status.oldest_age_s < 7200


def test_threads_add_at_the_same_time(outbox: Outbox) -> None:
    numbers = itertools.count()

    def work() -> None:
        for _ in range(20):
            outboxes.add(outbox, envelopes(3, first=next(numbers) * 3))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(int, outboxes.bodies(outbox))) == list(range(240))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("version", "is_told"),
    [
        ("3.51.2", True),
        ("3.51.3", False),
        ("3.50.7", False),
        ("3.50.6", True),
        ("3.44.6", False),
        ("3.7.0", True),
    ],
)
def test_a_version_of_sqlite_that_may_damage_the_database_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str, is_told: bool
) -> None:
    monkeypatch.setattr("kbatch._database._sqlite._told_of_fault", False)
    for _ in range(2):
        tell_of_fault(version)
    assert len(caplog.records) == (1 if is_told else 0)


@in_sqlite
@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("session", [True, False])
def test_it_joins_the_transaction_of_sqlalchemy(outbox: SqliteOutbox, session: bool, commits: bool) -> None:
    sqlalchemy = pytest.importorskip("sqlalchemy", reason="platform: it has no wheel here")
    orm = pytest.importorskip("sqlalchemy.orm")
    outboxes.query(outbox, "CREATE TABLE orders (n)")
    engine = sqlalchemy.create_engine(f"sqlite:///{outbox._path}")
    with orm.Session(engine) if session else engine.connect() as connection:
        assert "BEGIN IMMEDIATE" in refused(outbox, connection)
        connection.execute(sqlalchemy.text("INSERT INTO orders VALUES (1)"))
        assert outbox.add(connection, envelopes(3), topic="orders") == 3
        assert outbox.status().waiting == 0  # for others
        connection.commit() if commits else connection.rollback()
    engine.dispose()
    assert outbox.status().waiting == (3 if commits else 0)
    assert len(outboxes.query(outbox, "SELECT * FROM orders")) == (1 if commits else 0)
