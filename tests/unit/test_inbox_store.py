"""What our inboxes have to do: the suite that every inbox has to pass, `accept`, and what is about our databases alone.

The names are those of the original's compliance suite of a message store, where an inbox has the thing. What it
stores of a message is that a group has handled it, so one test is several of the original's:

- store one incoming; store one that is handled; mark one handled; counts: `test_store_one_that_is_handled`
- store one that is a duplicate; incoming exists: `test_store_one_that_is_a_duplicate`
- a bulk with duplicates inside reports only those: `test_a_bulk_with_duplicates_inside_reports_only_those`
- mark several handled: `test_mark_several_handled`
- what is handled is removed in the end: `test_what_is_old_is_purged_of_a_group_that_is_said_to_have_committed_it`

Left out:

- outgoing messages, dead letters, what is scheduled: an outbox has these (`test_outbox_store.py`,
  `test_dead_letters.py`)
- load incoming, fetch by owner, discard and reassign: messages that are not handled are in Kafka, and the group's
  protocol says whose they are
- increment attempts, move incoming to dead letters, edit and replay them: a listener does these with topics of Kafka
  (`mock/test_listener_failures.py`, `mock/test_replay.py`)
- schedule execution: a listener sends what is to be tried later to a retry topic
"""

import contextlib
import random
import select
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

import kbatch
from kbatch import Envelope, InboxError
from kbatch.testing.compliance import InboxCompliance
from tests import inboxes, outboxes
from tests.inboxes import GROUP, Inbox, accept, ids, in_postgres, in_sqlite, transaction
from tests.outboxes import granted, in_schema, query, run

NOW = datetime.now(timezone.utc)
NewInbox = Callable[..., Inbox]


@pytest.fixture
def inbox(new_inbox: NewInbox) -> Inbox:
    return new_inbox()


@pytest.fixture
def effects(inbox: Inbox) -> str:
    return inboxes.effects(inbox)


def orders(count: int, first: int = 0) -> list[Envelope]:
    return [Envelope({"n": n}, key=f"k{n % 5}") for n in range(first, first + count)]


def read_from(topic: str, partition: int, offset: int = 0, **options: Any) -> Envelope:
    """As a listener reads it."""
    return Envelope(data=b"%d" % offset, topic=topic, partition=partition, **options)


# -- marks


def test_store_one_that_is_handled(inbox: Inbox) -> None:
    (order,) = orders(1)
    with transaction(inbox) as connection:
        assert inbox.accept(connection, order, group=GROUP)
    assert ids(inbox) == {order.id}
    assert inbox.status().handled == 1


def test_store_one_that_is_a_duplicate(inbox: Inbox) -> None:
    (order,) = orders(1)
    for expected in (True, False, False):
        with transaction(inbox) as connection:
            assert inbox.accept(connection, order, group=GROUP) is expected
            assert not inbox.accept(connection, order, group=GROUP)
    assert inbox.status().handled == 1


@pytest.mark.parametrize("count", [2, 1000])
def test_a_bulk_with_duplicates_inside_reports_only_those(inbox: Inbox, count: int) -> None:
    given = orders(count)
    bulk = given + given[: count // 2]
    assert accept(inbox, bulk) == [True] * count + [False] * (count // 2)
    assert ids(inbox) == {order.id for order in given}


def test_a_bulk_with_some_that_were_handled_reports_those(inbox: Inbox) -> None:
    given = orders(100)
    seeded = random.Random(7)
    known = set(seeded.sample(range(100), 40))
    assert accept(inbox, [given[n] for n in known]) == [True] * 40
    bulk = seeded.choices(range(100), k=300)
    seen = set(known)
    expected = []
    for n in bulk:
        expected.append(n not in seen)
        seen.add(n)
    assert accept(inbox, [given[n] for n in bulk]) == expected
    assert accept(inbox, [given[n] for n in known]) == [False] * 40


def test_each_group_handles_a_message_once(inbox: Inbox) -> None:
    given = orders(3)
    for group in ("billing", "shipping", 'it\'s "ours" $3 {x} %s ü'):
        assert accept(inbox, given, group) == [True] * 3
        assert accept(inbox, given, group) == [False] * 3
    assert inbox.status().handled == 9


def test_what_was_rolled_back_was_not_handled(inbox: Inbox) -> None:
    given = orders(3)
    assert accept(inbox, given, ends="ROLLBACK") == [True] * 3
    assert accept(inbox, given) == [True] * 3


def test_an_empty_list_marks_nothing(inbox: Inbox) -> None:
    assert accept(inbox, []) == []


def test_ids_of_all_kinds(inbox: Inbox) -> None:
    numbers = (0, 2**128 - 1, 7 << 76, 7 << 76 | 2 << 62, 1)
    each = [*(uuid.UUID(int=n) for n in numbers), uuid.uuid1(), uuid.uuid4(), kbatch.uuid7()]
    each += [inboxes.id_at(NOW + timedelta(days=days)) for days in range(-100, 100)]
    given = [Envelope(data=b"", id=one) for one in each]
    assert accept(inbox, given) == [True] * len(given)
    assert accept(inbox, given) == [False] * len(given)
    assert ids(inbox) == set(each)


def test_a_tombstone_is_handled_once(inbox: Inbox) -> None:
    gone = kbatch.Tombstone("k")
    assert accept(inbox, [gone, gone]) == [True, False]


def test_two_inboxes_of_one_database_are_apart(inbox: Inbox, new_inbox: NewInbox) -> None:
    place = {"schema": inbox._tables.schema} if isinstance(inbox, kbatch.PostgresInbox) else {}
    other = new_inbox(prefix="other_", **place)
    given = orders(2)
    assert accept(inbox, given) == accept(other, given) == [True, True]


def test_an_inbox_and_an_outbox_share_a_database(inbox: Inbox) -> None:
    outbox: Any = (
        kbatch.SqliteOutbox(inbox._path)
        if isinstance(inbox, kbatch.SqliteInbox)
        else kbatch.PostgresOutbox(inbox._conninfo, schema=inbox._tables.schema)
    )
    outbox.create()
    (order,) = orders(1)
    with transaction(inbox) as connection:
        assert inbox.accept(connection, order, group=GROUP)
        assert outbox.add(connection, [order], topic="orders") == 1
    assert (inbox.status().handled, outbox.status().waiting) == (1, 1)


def test_of_transactions_that_mark_the_same_ids_in_any_order_one_is_the_first(inbox: Inbox) -> None:
    given = orders(60)
    barrier = threading.Barrier(6)

    def work(seed: int) -> int:
        mine = random.Random(seed).sample(given, len(given))
        barrier.wait()
        return sum(sum(accept(inbox, mine[at : at + 20])) for at in range(0, 60, 20))

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(work, range(6))) == 60
    assert inbox.status().handled == 60


# -- what is refused


def test_tables_that_are_missing(new_inbox: NewInbox) -> None:
    inbox = new_inbox()
    run(inbox, f"DROP TABLE {inbox._tables.names['inbox']}")
    with transaction(inbox, "ROLLBACK") as connection, pytest.raises(InboxError, match=r"call create\(\)"):
        inbox.accept(connection, orders(1)[0], group=GROUP)
    inbox.create()
    assert accept(inbox, orders(1)) == [True]


@pytest.mark.parametrize(
    ("change", "says"),
    [("UPDATE {meta} SET version = 2", "tables of version 2"), ("DELETE FROM {meta}", r"call create\(\)")],
)
@pytest.mark.parametrize("count", [1, 3])
def test_tables_of_another_version(inbox: Inbox, change: str, says: str, count: int) -> None:
    query(inbox, change)
    with pytest.raises(InboxError, match=says), transaction(inbox) as connection:
        inbox.accept_many(connection, orders(count), group=GROUP)
    assert ids(inbox) == set()
    with pytest.raises(InboxError, match=says):
        inbox.open_session(GROUP).handle(orders(1)[0], print)
    with pytest.raises(InboxError, match=says):
        inbox.status()


def test_a_connection_in_no_transaction(inbox: Inbox) -> None:
    from tests.outboxes import connected

    with connected(inbox) as connection, pytest.raises(InboxError, match="in no transaction, so that the marks"):
        inbox.accept(connection, orders(1)[0], group=GROUP)
    assert ids(inbox) == set()


def test_a_closed_connection_and_what_is_none(inbox: Inbox) -> None:
    from tests.outboxes import connected

    with connected(inbox) as connection:
        connection.execute("BEGIN")
    with pytest.raises(InboxError, match="is open"):
        inbox.accept(connection, orders(1)[0], group=GROUP)
    with pytest.raises(TypeError, match=r"connection must be a"):
        inbox.accept("shop.db", orders(1)[0], group=GROUP)  # type: ignore[arg-type]


def test_what_is_no_envelope_and_no_group(inbox: Inbox) -> None:
    with transaction(inbox) as connection:
        with pytest.raises(TypeError, match=r"envelope must be a kbatch\.Envelope, not str"):
            inbox.accept(connection, "order", group=GROUP)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="group must be str, not int"):
            inbox.accept(connection, orders(1)[0], group=7)  # type: ignore[arg-type]
        for group in ("", "a\0b"):
            with pytest.raises(ValueError, match="name of a consumer group"):
                inbox.accept(connection, orders(1)[0], group=group)
    with pytest.raises(ValueError, match="name of a consumer group"):
        inbox.open_session("")


def test_a_generator_that_fails_in_the_middle_marks_nothing(inbox: Inbox) -> None:
    def failing() -> Any:
        yield from orders(3)
        raise KeyError("no more")

    with transaction(inbox) as connection:
        with pytest.raises(KeyError):
            inbox.accept_many(connection, failing(), group=GROUP)
        assert inbox.accept_many(connection, orders(2), group=GROUP) == [True, True]
    assert inbox.status().handled == 2


@pytest.mark.parametrize("retention_s", [0, -1, "7 days", True, float("nan")])
def test_wrong_options(retention_s: Any) -> None:
    for make in (
        lambda: kbatch.SqliteInbox("shop.db", retention_s=retention_s),
        lambda: kbatch.PostgresInbox("", retention_s=retention_s),
    ):
        with pytest.raises(kbatch.ConfigError, match="retention_s"):
            make()


def test_create_may_be_called_again_and_ddl_makes_the_same_tables(inbox: Inbox) -> None:
    given = orders(3)
    accept(inbox, given)
    inbox.create()
    for statement in inbox.ddl().split(";\n")[:-1]:
        run(inbox, statement)
    assert accept(inbox, given) == [False] * 3


def test_tables_are_made_by_several_at_a_time(new_inbox: NewInbox) -> None:
    inbox = new_inbox()
    if isinstance(inbox, kbatch.PostgresInbox):
        run(inbox, f"DROP TABLE {inbox._tables.names['inbox']}")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: inbox.create(), range(4)))
    assert accept(inbox, orders(1)) == [True]


# -- what a listener asks


class TestInboxStore(InboxCompliance):
    @pytest.fixture
    def inbox(self, new_inbox: NewInbox) -> Inbox:
        inbox = new_inbox()
        inboxes.effects(inbox)
        return inbox

    def _table(self, inbox: Inbox) -> str:
        return "effects" if isinstance(inbox, kbatch.SqliteInbox) else in_schema(inbox, "effects")

    def write(self, inbox: Inbox, connection: Any, number: int) -> None:
        connection.execute(f"INSERT INTO {self._table(inbox)} (n) VALUES ({number})")

    def written(self, inbox: Inbox) -> list[int]:
        return inboxes.numbers(inbox, self._table(inbox))

    def let_time_pass(self, inbox: Inbox, seconds: float) -> None:
        inboxes.let_time_pass(inbox, seconds)


# -- sessions


def writer(table: str) -> Callable[[Any, Any], None]:
    """A handler that writes the numbers of orders."""

    def handle(envelope: Envelope, connection: Any) -> None:
        connection.execute(f"INSERT INTO {table} (n) VALUES ({envelope.message['n']})")

    return handle


ENDINGS: dict[str, Callable[[Any], object]] = {
    "commit": lambda connection: connection.commit(),
    "rollback": lambda connection: connection.rollback(),
    "a statement": lambda connection: connection.execute("COMMIT"),
    "close": lambda connection: connection.close(),
    "a new one": lambda connection: (connection.execute("COMMIT"), connection.execute("BEGIN")),
}


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("how", ENDINGS)
def test_a_handler_that_ends_the_transaction_is_told_so(inbox: Inbox, effects: str, how: str, raises: bool) -> None:
    session = inbox.open_session(GROUP)
    first, second = orders(2)

    def handle(envelope: Envelope, connection: Any) -> None:
        writer(effects)(envelope, connection)
        ENDINGS[how](connection)
        if raises:
            raise KeyError

    with pytest.raises(InboxError, match="the handler has ended the transaction") as caught:
        session.handle(first, handle)
    assert not caught.value.is_outage
    assert session.handle(second, writer(effects))
    assert second.id in ids(inbox)
    session.close()


def test_a_savepoint_is_a_handlers_own(inbox: Inbox, effects: str) -> None:
    session = inbox.open_session(GROUP)

    def handle(envelope: Envelope, connection: Any) -> None:
        connection.execute("SAVEPOINT mine")
        writer(effects)(envelope, connection)
        connection.execute("ROLLBACK TO mine")
        writer(effects)(envelope, connection)

    assert session.handle(orders(1)[0], handle)
    assert inboxes.numbers(inbox, effects) == [0]
    session.close()


def test_a_constraint_that_is_looked_at_by_the_commit_is_the_handlers_fault(inbox: Inbox) -> None:
    tables = ("parents", "children")
    parents, children = tables if isinstance(inbox, kbatch.SqliteInbox) else (in_schema(inbox, name) for name in tables)
    run(inbox, f"CREATE TABLE {parents} (n integer PRIMARY KEY)")
    run(inbox, f"CREATE TABLE {children} (n integer REFERENCES {parents} (n) DEFERRABLE INITIALLY DEFERRED)")
    session = inbox.open_session(GROUP)
    (order,) = orders(1)

    def handle(envelope: Envelope, connection: Any) -> None:
        connection.execute(f"INSERT INTO {children} VALUES (1)")

    if isinstance(inbox, kbatch.SqliteInbox):
        session.handle(orders(1)[0], lambda envelope, connection: None)
        session._connection.execute("PRAGMA foreign_keys = ON")
    with pytest.raises(Exception, match=r"(?i)foreign key") as caught:
        session.handle(order, handle)
    assert not isinstance(caught.value, InboxError)
    assert order.id not in ids(inbox)
    session.close()


@in_postgres
def test_a_handler_that_goes_on_after_an_error_of_the_database_has_failed(inbox: Inbox, effects: str) -> None:
    import psycopg

    session = inbox.open_session(GROUP)
    (order,) = orders(1)

    def handle(envelope: Envelope, connection: Any) -> None:
        writer(effects)(envelope, connection)
        with contextlib.suppress(psycopg.Error):
            connection.execute("SELECT 1/0")

    with pytest.raises(psycopg.errors.InFailedSqlTransaction, match="the handler has gone on"):
        session.handle(order, handle)
    assert session.handle(order, writer(effects))
    assert inboxes.numbers(inbox, effects) == [0]
    session.close()


@in_sqlite
def test_a_writer_that_locks_sqlite_is_an_outage_and_not_the_handlers_fault(
    inbox: Inbox, effects: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kbatch._database._sqlite._BUSY_TIMEOUT_S", 0.05)
    session = inbox.open_session(GROUP)
    (order,) = orders(1)
    with transaction(inbox), pytest.raises(InboxError, match="locked") as caught:
        session.handle(order, writer(effects))
    assert caught.value.is_outage
    assert session.handle(order, writer(effects))
    session.close()


@in_sqlite
def test_a_database_that_is_full_is_an_outage(inbox: Inbox, effects: str) -> None:
    session = inbox.open_session(GROUP)
    (order,) = orders(1)
    assert session.handle(orders(1)[0], writer(effects))
    ((pages,),) = query(inbox, "PRAGMA page_count")
    session._connection.execute(f"PRAGMA max_page_count = {pages}")

    def fill(envelope: Envelope, connection: Any) -> None:
        connection.execute("CREATE TABLE large AS SELECT zeroblob(1000000) AS blob")

    with pytest.raises(InboxError, match="is full") as caught:
        session.handle(order, fill)
    assert caught.value.is_outage
    session._connection.execute("PRAGMA max_page_count = 100000")
    assert session.handle(order, fill)
    session.close()


@in_sqlite
def test_a_database_that_is_not_there_is_no_outage(inbox: Inbox, tmp_path: Any) -> None:
    with pytest.raises(InboxError, match=r"there is no database") as caught:
        kbatch.SqliteInbox(tmp_path / "none.db").open_session(GROUP).handle(orders(1)[0], print)
    assert not caught.value.is_outage


@in_postgres
@pytest.mark.parametrize("factory", ["dict_row", "scalar_row", "namedtuple_row"])
def test_what_a_handler_sets_for_its_rows_changes_nothing_for_later_messages(
    inbox: Inbox, effects: str, factory: str
) -> None:
    from psycopg import rows

    session = inbox.open_session(GROUP)

    def handle(envelopes: list[Envelope], connection: Any) -> None:
        connection.row_factory = getattr(rows, factory)
        for envelope in envelopes:
            writer(effects)(envelope, connection)

    given = orders(6)
    assert [session.handle_batch(given[:n], handle) for n in (2, 4, 4)] == [2, 2, 0]
    assert [session.handle(order, writer(effects)) for order in given[3:]] == [False, True, True]
    session.close()
    assert inboxes.numbers(inbox, effects) == [0, 1, 2, 3, 4, 5]


@in_postgres
def test_a_handler_may_have_all_its_statements_prepared(inbox: Inbox, effects: str) -> None:
    session = inbox.open_session(GROUP)

    def handle(envelope: Envelope, connection: Any) -> None:
        connection.prepare_threshold = 0
        writer(effects)(envelope, connection)

    given = orders(3)
    assert [session.handle(order, handle) for order in (*given, given[2])] == [True, True, True, False]
    session.close()
    assert inboxes.numbers(inbox, effects) == [0, 1, 2]


@in_postgres
def test_a_connection_that_is_cut_is_an_outage_and_the_next_call_has_another(inbox: Inbox, effects: str) -> None:
    session = inbox.open_session(GROUP)
    given = orders(4)
    assert session.handle(given[0], writer(effects))

    def cut() -> None:
        run(inbox, f"SELECT pg_terminate_backend({session._connection.info.backend_pid})")

    cut()
    with pytest.raises(InboxError) as caught:
        session.handle(given[1], writer(effects))
    assert caught.value.is_outage

    def cut_in_the_middle(envelope: Envelope, connection: Any) -> None:
        writer(effects)(envelope, connection)
        cut()
        writer(effects)(envelope, connection)

    with pytest.raises(InboxError) as caught:
        session.handle(given[1], cut_in_the_middle)
    assert caught.value.is_outage

    def cut_at_the_end(envelope: Envelope, connection: Any) -> None:
        writer(effects)(envelope, connection)
        cut()

    with pytest.raises(InboxError) as caught:
        session.handle(given[1], cut_at_the_end)
    assert caught.value.is_outage
    assert session.handle(given[1], writer(effects))
    assert inboxes.numbers(inbox, effects) == [0, 1]
    session.close()


@in_postgres
def test_the_first_handler_of_a_partition_holds_up_no_other(inbox: Inbox) -> None:
    def handle(offset: int, handler: Callable[[Any, Any], object]) -> bool:
        session = inbox.open_session(GROUP)
        try:
            return session.handle(read_from("orders", 0, offset, id=kbatch.uuid7()), handler)
        finally:
            session.close()

    def meanwhile(envelope: Envelope, connection: Any) -> None:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(handle, 1, lambda envelope, connection: None).result()

    assert handle(0, meanwhile)
    assert query(inbox, "SELECT topic, partition FROM {position}") == [("orders", 0)]


class Late:
    """A handler for which the server does not wait."""

    def __init__(self, ends: str, table: str) -> None:
        self._ends = ends
        self._table = table

    def __call__(self, envelope: Envelope, connection: Any) -> None:
        writer(self._table)(envelope, connection)
        connection.execute("SET LOCAL idle_in_transaction_session_timeout = 1")
        ended = select.select([connection.fileno()], [], [], 60)[0]  # the server says that it has ended the connection
        assert ended
        if self._ends == "executes":
            writer(self._table)(envelope, connection)
        elif self._ends == "raises":
            raise KeyError("a fault of its own")


@in_postgres
@pytest.mark.parametrize("ends", ["returns", "executes", "raises"])
def test_a_handler_that_takes_longer_than_the_server_lets_it_has_failed(inbox: Inbox, effects: str, ends: str) -> None:
    import psycopg

    session = inbox.open_session(GROUP)
    (order,) = orders(1)
    kind = KeyError if ends == "raises" else psycopg.errors.IdleInTransactionSessionTimeout
    # A connection that is reset may lose the server's last words. Then it is an outage like any other.
    caught: list[type[Exception]] = []
    while kind not in caught and len(caught) < 10:
        with pytest.raises((kind, InboxError)) as raised:
            session.handle(order, Late(ends, effects))
        assert not isinstance(raised.value, InboxError) or raised.value.is_outage
        caught.append(raised.type)
    assert kind in caught
    assert (inboxes.numbers(inbox, effects), ids(inbox)) == ([], set())
    assert session.handle(order, writer(effects))
    session.close()
    assert inboxes.numbers(inbox, effects) == [0]


@in_postgres
def test_an_error_of_another_database_is_an_outage_if_the_connection_is_lost(inbox: Inbox, effects: str) -> None:
    import psycopg

    session = inbox.open_session(GROUP)
    (order,) = orders(1)

    def fail(envelope: Envelope, connection: Any) -> None:
        run(inbox, f"SELECT pg_terminate_backend({connection.info.backend_pid})")
        with contextlib.suppress(psycopg.Error):
            writer(effects)(envelope, connection)
        raise psycopg.errors.UniqueViolation("of another database")

    with pytest.raises(InboxError, match="the connection is lost") as caught:
        session.handle(order, fail)
    session.close()
    assert caught.value.is_outage


@in_postgres
def test_a_commit_without_an_answer_is_an_outage_and_the_mark_tells_that_it_was_made(
    inbox: Inbox, effects: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(inbox, kbatch.PostgresInbox)
    session = inbox.open_session(GROUP)
    (order,) = orders(1)
    lock = f"pg_advisory_xact_lock(hashtext('{effects}'))"
    waits = in_schema(inbox, "waits")
    run(
        inbox,
        f"CREATE FUNCTION {waits}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM {lock}; RETURN NULL; END $$",
    )
    run(
        inbox,
        f"CREATE CONSTRAINT TRIGGER waits AFTER INSERT ON {effects} DEFERRABLE INITIALLY DEFERRED "
        f"FOR EACH ROW EXECUTE FUNCTION {waits}()",
    )

    def handle(envelope: Envelope, connection: Any) -> None:
        writer(effects)(envelope, connection)
        monkeypatch.setattr("kbatch._database._postgres_connection._SILENCE_S", 0.05)  # for the commit alone

    with transaction(inbox) as blocking:
        blocking.execute(f"SELECT {lock}")
        with pytest.raises(InboxError, match=r"no answer for 0\.05 s") as caught:
            session.handle(order, handle)
        monkeypatch.undo()
    assert caught.value.is_outage
    assert not session.handle(order, writer(effects))  # it waits for the transaction that is on its way
    assert inboxes.numbers(inbox, effects) == [0]
    session.close()


# -- retention


def test_nothing_is_purged_of_a_group_of_which_nothing_is_known(inbox: Inbox) -> None:
    accept(inbox, orders(3))
    inboxes.handled_at(inbox, NOW - timedelta(days=30))
    assert inbox.purge() == 0
    assert inbox.status().handled == 3


def old(days: float, count: int = 3, first: int = 0) -> list[Envelope]:
    """Messages whose ids are so old."""
    return [Envelope(data=b"", id=inboxes.id_at(NOW - timedelta(days=days), n)) for n in range(first, first + count)]


def test_what_is_old_is_purged_of_a_group_that_is_said_to_have_committed_it(inbox: Inbox) -> None:
    for days in (20, 9, 1):
        accept(inbox, old(days))
        inboxes.handled_at(inbox, NOW - timedelta(days=days), "handled_at > " + at(inbox, NOW - timedelta(hours=1)))
    accept(inbox, old(20), "another")
    inboxes.handled_at(inbox, NOW - timedelta(days=20), "group_id = 'another'")
    assert inbox.purge(committed={GROUP: NOW - timedelta(days=10)}) == 3
    assert inbox.purge(committed={GROUP: NOW}) == 3
    assert inbox.purge(committed={GROUP: NOW}) == 0
    assert (inbox.status().handled, len(ids(inbox))) == (6, 3)
    assert inbox.purge(committed={GROUP: NOW, "another": NOW}) == 3


def at(inbox: Inbox, time: datetime) -> str:
    us = int(time.timestamp() * 1e6)
    return (
        str(us) if isinstance(inbox, kbatch.SqliteInbox) else f"timestamptz 'epoch' + {us} * interval '1 microsecond'"
    )


def test_other_ids_than_those_of_version_7_are_purged_by_the_time_of_their_handling(inbox: Inbox) -> None:
    given = [Envelope(data=b"", id=uuid.uuid4()) for _ in range(6)]
    accept(inbox, given[:3])
    inboxes.handled_at(inbox, NOW - timedelta(days=8))
    accept(inbox, given[3:])
    assert inbox.purge(committed={GROUP: NOW}) == 3
    assert ids(inbox) == {each.id for each in given[3:]}


def test_old_messages_that_were_handled_after_a_long_stop_stay(inbox: Inbox) -> None:
    given = old(10, 5)
    accept(inbox, given[:2])
    inboxes.handled_at(inbox, NOW - timedelta(days=10))
    accept(inbox, given[2:])  # it was stopped for 10 days
    assert inbox.purge(committed={GROUP: NOW}) == 2
    assert accept(inbox, given[2:]) == [False] * 3  # they are read again
    inboxes.handled_at(inbox, NOW - timedelta(days=8))
    assert inbox.purge(committed={GROUP: NOW}) == 3


@pytest.mark.parametrize("older_than_s", [40 * 86_400, 3600])
def test_a_retention_of_any_length(inbox: Inbox, older_than_s: float) -> None:
    accept(inbox, old(50))
    inboxes.handled_at(inbox, NOW - timedelta(days=50))
    accept(inbox, orders(2))
    assert inbox.purge(older_than_s, committed={GROUP: NOW}) == 3
    assert inbox.status().handled == 2


@pytest.mark.parametrize("older_than_s", [-1, "1", float("nan")])
def test_a_wrong_age_and_wrong_times(inbox: Inbox, older_than_s: Any) -> None:
    with pytest.raises(ValueError, match="older_than_s"):
        inbox.purge(older_than_s)
    with pytest.raises(TypeError, match="with a time zone"):
        inbox.purge(committed={GROUP: datetime(2026, 1, 1)})


def handle_from(inbox: Inbox, *envelopes: Envelope, group: str = GROUP) -> None:
    session = inbox.open_session(group)
    for envelope in envelopes:
        session.handle(envelope, lambda envelope, connection: None)
    session.close()


def test_what_a_group_has_handled_and_not_committed_is_never_purged(inbox: Inbox) -> None:
    handle_from(inbox, *(read_from("orders", 0, n, id=uuid.uuid4()) for n in range(10)))
    inboxes.handled_at(inbox, NOW - timedelta(days=20))
    partition = ("orders", 0)

    def us(days: float) -> int:
        return int((NOW - timedelta(days=days)).timestamp() * 1e6)

    inbox.note_offsets(GROUP, us(19), {partition: (3, 10)})  # the mark is at 10
    assert inbox.purge() == 0
    inbox.note_offsets(GROUP, us(18), {partition: (9, 50)})
    assert (inbox.purge(), inbox.status().safe_until) == (0, {GROUP: None})
    inbox.note_offsets(GROUP, us(17), {partition: (10, 60)})  # all that it had handled 19 days ago is committed
    assert inbox.status().safe_until[GROUP] == datetime.fromtimestamp(us(19) / 1e6, timezone.utc)
    assert inbox.purge() == 10


def test_a_partition_that_is_behind_keeps_what_its_group_has_handled(inbox: Inbox) -> None:
    handle_from(inbox, read_from("orders", 0), read_from("orders", 1), read_from("orders", 1, 1))
    handle_from(inbox, read_from("orders", 0), group="another")
    inboxes.handled_at(inbox, NOW - timedelta(days=20))
    for _ in range(3):
        asked_at = inbox.clock_us()
        inbox.note_offsets(GROUP, asked_at, {("orders", 0): (5, 5), ("orders", 1): (1, 2), ("orders", 2): (0, 9)})
        inbox.note_offsets("another", asked_at, {("orders", 0): (5, 5)})
    assert inbox.purge(0 if isinstance(inbox, kbatch.SqliteInbox) else 86_400) in (0, 1)
    assert len(ids(inbox)) == 3
    status = inbox.status()
    assert status.safe_until[GROUP] is None
    assert status.safe_until["another"] is not None
    inbox.note_offsets(GROUP, inbox.clock_us(), {("orders", 1): (2, 2)})
    assert inbox.status().safe_until[GROUP] is not None


def test_a_topic_that_was_made_anew_does_not_wait_for_the_end_of_the_old_one(inbox: Inbox) -> None:
    handle_from(inbox, read_from("orders", 0))
    partition = ("orders", 0)
    inbox.note_offsets(GROUP, 1_000_000, {partition: (0, 1000)})
    inbox.note_offsets(GROUP, 2_000_000, {partition: (1000, 3)})  # what was committed is of the old one
    assert inbox.status().safe_until == {GROUP: None}
    inbox.note_offsets(GROUP, 3_000_000, {partition: (3, 3)})
    assert inbox.status().safe_until == {GROUP: datetime.fromtimestamp(2, timezone.utc)}


def test_after_a_clock_was_set_back_nothing_is_purged_until_it_is_known_anew(inbox: Inbox) -> None:
    def us(days: float) -> int:
        return int((NOW - timedelta(days=days)).timestamp() * 1e6)

    partition = ("orders", 0)
    handle_from(inbox, *(read_from("orders", 0, n, id=uuid.uuid4()) for n in range(5)))
    inboxes.handled_at(inbox, NOW - timedelta(days=9))
    inbox.note_offsets(GROUP, us(10), {partition: (5, 5)})
    inbox.note_offsets(GROUP, us(9), {partition: (5, 5)})
    assert inbox.status().safe_until[GROUP] == datetime.fromtimestamp(us(10) / 1e6, timezone.utc)
    # By ten days: what is handled then, and not committed, seems to have been handled before that time.
    handle_from(inbox, *(read_from("orders", 0, n, id=uuid.uuid4()) for n in range(5, 8)))
    inboxes.handled_at(inbox, NOW - timedelta(days=19.5), f"handled_at > {at(inbox, NOW - timedelta(days=1))}")
    inbox.note_offsets(GROUP, us(19), {partition: (5, 8)})
    assert (inbox.purge(), inbox.status().safe_until) == (0, {GROUP: None})
    inbox.note_offsets(GROUP, us(18), {partition: (7, 8)})
    assert inbox.purge() == 0
    inbox.note_offsets(GROUP, us(8), {partition: (8, 8)})  # it is right again
    assert inbox.purge() == 3
    inbox.note_offsets(GROUP, us(7.5), {partition: (8, 8)})
    assert inbox.purge() == 5


def test_a_clock_that_was_ahead_is_not_believed_after_it_was_set_back(inbox: Inbox) -> None:
    partition = ("orders", 0)
    handle_from(inbox, read_from("orders", 0))
    ahead = int((NOW + timedelta(days=365)).timestamp() * 1e6)
    for later in range(2):
        inbox.note_offsets(GROUP, ahead + later, {partition: (1, 1)})
    inboxes.handled_at(inbox, NOW - timedelta(days=9))
    inbox.note_offsets(GROUP, int(NOW.timestamp() * 1e6), {partition: (1, 2)})
    assert inbox.status().safe_until == {GROUP: None}
    assert inbox.purge() == 0


def test_what_was_handled_while_a_clock_was_ahead_does_not_hold_back_what_came_after(
    inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kbatch._inbox._sqlite._DELETED_AT_ONCE", 2)
    accept(inbox, orders(3))
    inboxes.handled_at(inbox, NOW + timedelta(days=365))
    accept(inbox, old(9))
    inboxes.handled_at(inbox, NOW - timedelta(days=9), f"handled_at < {at(inbox, NOW + timedelta(days=1))}")
    later = {GROUP: NOW + timedelta(days=1)}
    assert inbox.purge(committed=later) == 3
    assert len(ids(inbox)) == 3
    if isinstance(inbox, kbatch.SqliteInbox):  # where they would lie before all others for a year
        assert inbox.purge(0, committed=later) == 3


@in_postgres
def test_names_of_a_schema_and_tables_may_have_any_characters(new_inbox: NewInbox, postgres: str) -> None:
    schema = "a\"b{x}%s'$4::"
    with outboxes.connected(postgres) as connection:
        connection.execute('CREATE SCHEMA "a""b{x}%s\'$4::"')
    try:
        inbox = new_inbox(schema=schema, prefix=schema)
        given = [read_from("orders", n % 2, n, id=uuid.uuid4()) for n in range(4)]
        session = inbox.open_session(schema)
        assert session.handle(given[0], lambda envelope, connection: None)
        assert session.handle_batch(given, lambda envelopes, connection: None) == 3
        session.close()
        for _ in range(2):
            inbox.note_offsets(schema, inbox.clock_us(), {("orders", 0): (3, 3), ("orders", 1): (4, 4)})
        assert inbox.status().safe_until[schema] is not None
        inboxes.handled_at(inbox, NOW - timedelta(days=9))
        assert inbox.purge() == 4
    finally:
        outboxes.drop_schema(postgres, schema)


@in_postgres
def test_a_purge_works_whatever_transactions_are_by_default_and_is_not_left_open_for_long(
    inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    from psycopg.conninfo import make_conninfo

    from kbatch._inbox._postgres_purge import Purge

    assert isinstance(inbox, kbatch.PostgresInbox)
    names = ("default_transaction_isolation=serializable", "default_transaction_read_only=on")
    conninfo = make_conninfo(inbox._conninfo, options=" ".join(f"-c {name}" for name in names))
    user = kbatch.PostgresInbox(conninfo, schema=inbox._tables.schema)
    counts, rows = Purge._counts, Purge._rows
    found = []

    def looked(purge: Any, *arguments: Any, **options: Any) -> Any:
        found.append(purge._connection.execute("SHOW idle_in_transaction_session_timeout").fetchone()[0])
        return counts(purge, *arguments, **options)

    def meets(purge: Any, statement: str, slot: str, **options: Any) -> Any:
        if statement.startswith("DELETE") and slot == "other":
            found.append(purge._connection.execute("SHOW transaction_isolation").fetchone()[0])
        return rows(purge, statement, slot, **options)

    accept(inbox, [*old(9), Envelope(data=b"", id=uuid.uuid4())])
    inboxes.handled_at(inbox, NOW - timedelta(days=8))
    monkeypatch.setattr(Purge, "_counts", looked)
    monkeypatch.setattr(Purge, "_rows", meets)
    handle_from(user, read_from("orders", 0))
    user.note_offsets(GROUP, 1_000_000, {("orders", 0): (0, 1)})
    assert user.purge(committed={GROUP: NOW}) == 4
    assert found == ["20s", "read committed"]


@in_postgres
def test_grants_that_ddl_tells_of_are_enough_to_handle_and_to_purge(inbox: Inbox) -> None:
    assert isinstance(inbox, kbatch.PostgresInbox)
    slots = ["other", *(f"day_{day:02}" for day in range(32))]
    rights = [("INSERT, SELECT", "inbox"), ("SELECT", "meta"), ("SELECT, INSERT, UPDATE", "position")]
    rights += [("SELECT, UPDATE, DELETE, TRUNCATE", name) for name in slots]
    with granted(inbox, rights) as conninfo:
        user = kbatch.PostgresInbox(conninfo, schema=inbox._tables.schema)
        with inboxes.transaction(user) as connection:
            assert user.accept_many(connection, orders(3), group="shipping") == [True] * 3
        given = [*old(9), Envelope(data=b"", id=uuid.uuid4()), *old(10, 1), *orders(1)]
        handle_from(user, *(envelope.replace(topic="orders", partition=0) for envelope in given))
        # One day is emptied, and from another one, of which a row stays, a row is deleted.
        accept(inbox, old(10, 1, 5), "shipping")
        inboxes.handled_at(inbox, NOW - timedelta(days=8), "group_id = 'billing'")
        assert user.purge(committed={GROUP: NOW}) == 5
    assert inbox.status().handled == 5


@in_postgres
def test_a_day_that_somebody_uses_is_emptied_the_next_time_and_nobody_waits_long(inbox: Inbox) -> None:
    accept(inbox, old(10))
    inboxes.handled_at(inbox, NOW - timedelta(days=10))
    with transaction(inbox, "ROLLBACK") as connection:
        assert inbox.accept_many(connection, old(10, first=100), group=GROUP) == [True] * 3
        assert inbox.purge(committed={GROUP: NOW}) == 0
        assert accept(inbox, orders(3)) == [True] * 3  # other days are not locked
    assert inbox.purge(committed={GROUP: NOW}) == 3


@in_postgres
def test_what_is_marked_between_the_look_and_the_emptying_stays(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    from kbatch._inbox._postgres_purge import Purge

    accept(inbox, old(10))
    inboxes.handled_at(inbox, NOW - timedelta(days=10))
    looked: list[bool] = []
    look = Purge._keeps

    def keeps(purge: Purge, slot: str) -> bool:
        looked.append(look(purge, slot))
        if len(looked) == 1:
            accept(inbox, old(10, first=100))
        return looked[-1]

    monkeypatch.setattr(Purge, "_keeps", keeps)
    assert inbox.purge(committed={GROUP: NOW}) == 0
    assert looked == [False]
    assert inbox.status().handled == 6


@in_postgres
def test_a_time_of_handling_is_not_the_transactions_start(inbox: Inbox) -> None:
    with transaction(inbox) as connection:
        connection.execute("SELECT 1")
        time.sleep(0.05)
        (between,) = connection.execute("SELECT clock_timestamp()").fetchone()
        inbox.accept(connection, orders(1)[0], group=GROUP)
    ((handled_at,),) = query(inbox, "SELECT handled_at FROM {inbox}")
    assert handled_at >= between


# -- by the names of the original's suite, see above


def test_mark_several_handled(inbox: Inbox) -> None:
    several = orders(100)
    assert accept(inbox, several[:40]) == [True] * 40
    assert accept(inbox, several) == [False] * 40 + [True] * 60
    assert accept(inbox, several, ends="ROLLBACK") == [False] * 100
    assert ids(inbox) == {each.id for each in several}
    assert inbox.status().handled == 100
