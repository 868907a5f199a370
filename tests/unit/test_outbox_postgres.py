"""Adding to an outbox in PostgreSQL by each driver, and what is refused."""

import asyncio
import contextlib
import itertools
import os
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import quote

import pytest

import kbatch
from kbatch import ConfigError, Envelope, OutboxError, OutboxQuery, PostgresOutbox, SerializationError, aio
from kbatch._fastmap import packed_key_hash, unpack_record
from kbatch._outbox._postgres_rows import FEWEST_TO_COPY
from kbatch._outbox._store import Failure
from tests import outboxes
from tests.outboxes import connected, query, transaction
from tests.waiting import until

FUTURE = datetime.now(timezone.utc) + timedelta(days=1)


@pytest.fixture
def outbox(in_postgres: Callable[..., PostgresOutbox]) -> PostgresOutbox:
    outbox = in_postgres(wire="raw")
    outboxes.run(outbox, f"CREATE TABLE {outboxes.in_schema(outbox, 'orders')} (n integer)")
    return outbox


def envelopes(count: int, first: int = 0) -> list[Envelope]:
    return [Envelope(data=b"%d" % n, key=f"k{n % 5}") for n in range(first, first + count)]


def insert_order(outbox: PostgresOutbox) -> str:
    return f"INSERT INTO {outboxes.in_schema(outbox, 'orders')} VALUES (1)"


def counted(outbox: PostgresOutbox) -> tuple[int, int]:
    """How many orders and how many messages there are."""
    ((orders,),) = outboxes.rows(outbox, f"SELECT count(*) FROM {outboxes.in_schema(outbox, 'orders')}")
    return orders, outbox.status().waiting


# -- what is stored


@pytest.mark.parametrize("count", [1, 2, FEWEST_TO_COPY - 1, FEWEST_TO_COPY, 2000])
def test_few_rows_and_many_are_stored_alike(outbox: PostgresOutbox, count: int) -> None:
    given = [
        Envelope(
            data=os.urandom(n % 700) * (900 if n == 7 else 1),
            key=None if n % 3 == 0 else f"schlüssel{n}",
            partition=n % 4 if n % 5 == 0 else None,
            headers={"n": str(n)},
            deliver_by=FUTURE if n % 2 else None,
        )
        for n in range(count)
    ]
    assert outboxes.add(outbox, given) == count
    rows = query(outbox, "SELECT seq, id, packed, bucket, deliver_by, created_at FROM {outbox} ORDER BY seq")
    assert [row[0] for row in rows] == list(range(1, count + 1))
    assert [row[1] for row in rows] == [each.id for each in given]
    unpacked = [unpack_record(row[2]) for row in rows]
    assert [each[4] for each in unpacked] == [each.data for each in given]
    assert [each[5] for each in unpacked] == [[("n", str(n).encode())] for n in range(count)]
    hashes = [packed_key_hash(row[2]) for row in rows]
    buckets = [row[3] for row in rows]
    assert all(found is None or found % 64 == bucket for found, bucket in zip(hashes, buckets, strict=True))
    assert [row[4] for row in rows] == [int(FUTURE.timestamp() * 1e6) if n % 2 else None for n in range(count)]
    assert len({row[5] for row in rows}) == 1


@pytest.mark.parametrize("by", ["psycopg", "psycopg for asyncio", "asyncpg"])
def test_a_few_rows_that_are_large_are_copied(outbox: PostgresOutbox, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    monkeypatch.setattr("kbatch._outbox._postgres_rows._MOST_BYTES_JOINED", 1000)
    each: Any = outbox if by == "psycopg" else of_aio(outbox)
    monkeypatch.setattr(each, "_statement", None)
    large = [Envelope(data=b"%d" % n * 500) for n in range(3)]
    large.append(Envelope(data=b"", scheduled_time=FUTURE))
    if by == "psycopg":
        assert outboxes.add(outbox, large) == 4
    else:

        async def work() -> None:
            import asyncpg
            import psycopg

            connect: Any = asyncpg.connect if by == "asyncpg" else psycopg.AsyncConnection.connect
            connection = await connect(outbox._conninfo)
            await connection.execute("BEGIN")
            assert await each.add(connection, large, topic="orders") == 4
            await connection.execute("COMMIT")
            await connection.close()

        asyncio.run(work())
    assert outboxes.bodies(outbox) == [b"%d" % n * 500 for n in range(3)]
    assert outbox.status().scheduled == 1


def test_a_server_without_room_for_locks_says_what_to_do(outbox: PostgresOutbox) -> None:
    import psycopg

    error = outbox._tables.as_error(psycopg.errors.OutOfMemory("out of shared memory"))
    assert "raise max_locks_per_transaction" in str(error)


def test_a_key_has_the_bucket_that_it_has_in_sqlite(outbox: PostgresOutbox, tmp_path: Any) -> None:
    other = outboxes.made(tmp_path, wire="raw")
    given = [Envelope(data=b"%d" % n, key=f"k{n}", timestamp=7) for n in range(200)]
    for each in (outbox, other):
        outboxes.add(each, given)
    statement = "SELECT bucket, packed FROM {outbox} ORDER BY seq"
    assert query(outbox, statement) == query(other, statement)


# -- transactions of psycopg


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("count", [1, 3, 100])
@pytest.mark.parametrize("how", ["implicit", "first", "block", "nested", "begin", "serializable"])
def test_it_joins_the_transaction_of_psycopg(outbox: PostgresOutbox, how: str, count: int, commits: bool) -> None:
    import psycopg

    with contextlib.closing(psycopg.connect(outbox._conninfo, autocommit=how in ("block", "begin"))) as connection:
        if how == "serializable":
            connection.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        with contextlib.suppress(KeyError), contextlib.ExitStack() as blocks:
            if how in ("block", "nested"):
                blocks.enter_context(connection.transaction())
            if how == "nested":
                blocks.enter_context(connection.transaction())
            if how == "begin":
                connection.execute("BEGIN")
            if how == "first":
                assert outbox.add(connection, envelopes(count), topic="orders") == count
                connection.execute(insert_order(outbox))
            else:
                connection.execute(insert_order(outbox))
                assert outbox.add(connection, envelopes(count), topic="orders") == count
            assert counted(outbox) == (0, 0)  # for others
            if how in ("block", "nested") and not commits:
                raise KeyError
        connection.commit() if commits else connection.rollback()
    assert counted(outbox) == ((1, count) if commits else (0, 0))


def test_a_connection_with_factories_and_types_of_its_own(outbox: PostgresOutbox) -> None:
    import psycopg
    from psycopg.rows import dict_row

    class Wrong(psycopg.adapt.Dumper):
        def dump(self, obj: Any) -> bytes:
            return b"wrong"

    with psycopg.connect(outbox._conninfo, row_factory=dict_row, cursor_factory=psycopg.ClientCursor) as connection:
        connection.prepare_threshold = 0
        for count in (1, 3, 100):
            assert outbox.add(connection, envelopes(count), topic="orders") == count
    assert outbox.status().waiting == 104


def test_its_schema_is_meant_whatever_the_search_path_is(outbox: PostgresOutbox) -> None:
    with outboxes.transaction(outbox) as connection:
        connection.execute("CREATE TEMP TABLE kbatch_outbox (x integer)")
        connection.execute("CREATE TEMP TABLE kbatch_outbox_meta (x integer)")
        connection.execute("SET LOCAL search_path = pg_catalog")
        for count in (1, 3, 100):
            assert outbox.add(connection, envelopes(count), topic="orders") == count


def test_two_outboxes_of_one_schema_are_apart(outbox: PostgresOutbox, in_postgres: Callable[..., Any]) -> None:
    other = in_postgres(schema=outbox._tables.schema, prefix='other "%s" {x} ü')
    outboxes.add(outbox, envelopes(2))
    outboxes.add(other, envelopes(100))
    assert (outbox.status().waiting, other.status().waiting) == (2, 100)


# -- other drivers

Adder = Callable[[PostgresOutbox, int, bool], Awaitable[None]]


def url(outbox: PostgresOutbox, driver: str) -> str:
    base = outbox._conninfo.replace("postgresql:", f"postgresql+{driver}:")
    return base.replace("sslmode=", "ssl=") if driver == "asyncpg" else base


def of_aio(outbox: PostgresOutbox) -> aio.PostgresOutbox:
    return aio.PostgresOutbox(outbox._conninfo, schema=outbox._tables.schema, wire="raw")


async def by_psycopg(outbox: PostgresOutbox, count: int, commits: bool) -> None:
    import psycopg

    connection = await psycopg.AsyncConnection.connect(outbox._conninfo)
    await connection.execute(insert_order(outbox))
    assert await of_aio(outbox).add(connection, envelopes(count), topic="orders") == count
    await (connection.commit() if commits else connection.rollback())
    await connection.close()


async def by_asyncpg(outbox: PostgresOutbox, count: int, commits: bool) -> None:
    import asyncpg

    connection = await asyncpg.connect(outbox._conninfo)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute(insert_order(outbox))
    assert await of_aio(outbox).add(connection, envelopes(count), topic="orders") == count
    await (transaction.commit() if commits else transaction.rollback())
    await connection.close()


async def by_a_pool_of_asyncpg(outbox: PostgresOutbox, count: int, commits: bool) -> None:
    import asyncpg

    async with asyncpg.create_pool(outbox._conninfo, min_size=1) as pool, pool.acquire() as connection:
        with contextlib.suppress(KeyError):
            async with connection.transaction():
                assert await of_aio(outbox).add(connection, envelopes(count), topic="orders") == count
                await connection.execute(insert_order(outbox))
                if not commits:
                    raise KeyError


def by_sqlalchemy(first: bool, session: bool) -> Adder:
    async def add(outbox: PostgresOutbox, count: int, commits: bool) -> None:
        import sqlalchemy
        import sqlalchemy.orm

        engine = sqlalchemy.create_engine(url(outbox, "psycopg"))
        connection: Any = sqlalchemy.orm.Session(engine) if session else engine.connect()
        with connection:
            if first:
                assert outbox.add(connection, envelopes(count), topic="orders") == count
            connection.execute(sqlalchemy.text(insert_order(outbox).replace(":", "\\:")))
            if not first:
                assert outbox.add(connection, envelopes(count), topic="orders") == count
            assert counted(outbox) == (0, 0)
            connection.commit() if commits else connection.rollback()
        engine.dispose()

    return add


def by_sqlalchemy_aio(driver: str, first: bool, session: bool) -> Adder:
    async def add(outbox: PostgresOutbox, count: int, commits: bool) -> None:
        import sqlalchemy.ext.asyncio

        engine = sqlalchemy.ext.asyncio.create_async_engine(url(outbox, driver))
        connection: Any = sqlalchemy.ext.asyncio.AsyncSession(engine) if session else engine.connect()
        async with connection:
            if first:
                assert await of_aio(outbox).add(connection, envelopes(count), topic="orders") == count
            await connection.execute(sqlalchemy.text(insert_order(outbox).replace(":", "\\:")))
            if not first:
                assert await of_aio(outbox).add(connection, envelopes(count), topic="orders") == count
            assert counted(outbox) == (0, 0)
            await (connection.commit() if commits else connection.rollback())
        await engine.dispose()

    return add


DRIVERS: dict[str, Adder] = {
    "psycopg": by_psycopg,
    "asyncpg": by_asyncpg,
    "pool of asyncpg": by_a_pool_of_asyncpg,
    **{
        f"sqlalchemy {'first' if first else 'then'} {'session' if session else 'connection'}": by_sqlalchemy(
            first, session
        )
        for first, session in itertools.product([True, False], repeat=2)
    },
    **{
        f"sqlalchemy aio {driver} {'first' if first else 'then'} {'session' if session else 'connection'}": (
            by_sqlalchemy_aio(driver, first, session)
        )
        for driver in ("psycopg", "asyncpg")
        for first, session in itertools.product([True, False], repeat=2)
    },
}


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("count", [1, 3, 100])
@pytest.mark.parametrize("driver", DRIVERS)
def test_it_joins_the_transaction_of_each_driver(
    outbox: PostgresOutbox, driver: str, count: int, commits: bool
) -> None:
    asyncio.run(DRIVERS[driver](outbox, count, commits))
    assert counted(outbox) == ((1, count) if commits else (0, 0))
    if commits:
        assert outboxes.bodies(outbox) == [b"%d" % n for n in range(count)]


@pytest.mark.parametrize("session", [True, False])
def test_what_is_added_is_committed_though_sqlalchemy_executes_nothing(outbox: PostgresOutbox, session: bool) -> None:
    import sqlalchemy.ext.asyncio
    import sqlalchemy.orm

    engine = sqlalchemy.create_engine(url(outbox, "psycopg"))
    with sqlalchemy.orm.Session(engine) if session else engine.connect() as connection:
        outbox.add(connection, envelopes(1), topic="orders")
        connection.commit()
        outbox.add(connection, envelopes(1), topic="orders")
    engine.dispose()

    async def work(driver: str) -> None:
        engine = sqlalchemy.ext.asyncio.create_async_engine(url(outbox, driver))
        aio = sqlalchemy.ext.asyncio
        connection: Any = aio.AsyncSession(engine) if session else engine.connect()
        async with connection:
            await of_aio(outbox).add(connection, envelopes(1), topic="orders")
            await connection.commit()
            await of_aio(outbox).add(connection, envelopes(1), topic="orders")
        await engine.dispose()

    for driver in ("psycopg", "asyncpg"):
        asyncio.run(work(driver))
    assert outbox.status().waiting == 3


def test_the_outbox_for_asyncio_makes_tables_and_tells_its_status(postgres: str, outbox: PostgresOutbox) -> None:
    other = aio.PostgresOutbox(postgres, schema=outbox._tables.schema, prefix="aio_")

    async def work() -> None:
        with pytest.raises(OutboxError, match="call create"):
            await other.status()
        await other.create()
        assert await other.status() == kbatch.OutboxStatus(0, 0, 0, 0.0, 0)

    asyncio.run(work())
    assert repr(other).startswith("<kbatch.aio.PostgresOutbox ")


def test_the_outbox_for_asyncio_looks_after_dead_letters_and_what_waits(outbox: PostgresOutbox) -> None:
    other = of_aio(outbox)
    outboxes.add(outbox, envelopes(5))
    outboxes.move_to_dead(outbox, "seq <= 3")
    outboxes.move_to_later(outbox, 4, 5)
    soon = datetime(2026, 12, 1, tzinfo=timezone.utc)

    async def work() -> None:
        letters, scheduled = other.dead_letters, other.scheduled
        first, second = (await letters.find())[:2]
        assert (await letters.find(limit=1, after=first), (await letters.summary())[0].letters) == ([second], 3)
        await letters.replay_edited(first.number, first.envelope.replace(data=b"edited"))
        assert await letters.replay(OutboxQuery(numbers=[second.number])) == 1
        assert await letters.discard(OutboxQuery()) == 1
        assert len(await scheduled.find(limit=1)) == 1
        assert [each.messages for each in await scheduled.summary()] == [2]
        assert await scheduled.reschedule(OutboxQuery(numbers=[4, 5]), soon) == 2
        assert await scheduled.cancel(OutboxQuery(numbers=[5])) == 1
        assert [(each.number, each.due_at) for each in await scheduled.find()] == [(4, soon)]

    asyncio.run(work())
    assert outboxes.bodies(outbox) == [b"edited", b"1"]


# -- locks


def waiting(*sessions: Any) -> int:
    """How many of these wait for a lock."""
    pids = [session._connection.info.backend_pid for session in sessions]
    with connected(sessions[0]._connection.info.dsn) as connection:
        statement = "SELECT count(DISTINCT pid) FROM pg_locks WHERE NOT granted AND pid = ANY(%s)"
        (found,) = connection.execute(statement, (pids,)).fetchone()
    return int(found)


@pytest.mark.parametrize("table", ["later", "dead"])
def test_those_who_change_the_same_rows_wait_for_each_other_and_not_in_a_circle(
    outbox: PostgresOutbox, table: str
) -> None:
    outboxes.add(outbox, [Envelope(data=b"%d" % n, key="k") for n in range(3)])
    if table == "later":
        outboxes.move_to_later(outbox, 1, 3)
    else:
        outboxes.move_to_dead(outbox, "true")
    first, second, third = query(outbox, f"SELECT bucket, seq FROM {{{table}}} ORDER BY seq")
    with contextlib.ExitStack() as undo:
        admin, other = (undo.enter_context(contextlib.closing(outbox.open_admin())) for _ in range(2))
        relay = undo.enter_context(contextlib.closing(outbox.open_store()))
        tokens = dict(relay.renew("relay", 60.0, release=(), avoid=())[0])
        put_off = Failure(*first, 3600.0, 2, "refused", None)

        def by_another() -> object:
            if table == "dead":
                return other.replay([third, second, first], 0)
            return relay.settle(tokens, done=[], done_later=[third, second], failures=[], failures_later=[put_off])

        pool = undo.enter_context(ThreadPoolExecutor())
        with transaction(outbox) as blocking:
            blocking.execute(outbox._tables.sql(f"SELECT FROM {{{table}}} WHERE seq = 2 FOR UPDATE"))
            one = pool.submit(by_another)
            until(lambda: waiting(other, relay) == 1, "the first waits")
            two = pool.submit(admin.delete, table, [first, third])
            until(lambda: waiting(admin, other, relay) == 2, "the second waits")
        assert (one.result(), two.result()) == ((set(), 1) if table == "later" else (3, 0))
    assert outboxes.bodies(outbox, table) == []


@pytest.mark.parametrize("table", ["later", "dead"])
def test_rows_that_are_changed_are_found_by_their_places(outbox: PostgresOutbox, table: str) -> None:
    outboxes.add(outbox, envelopes(300))
    if table == "later":
        outboxes.move_to_later(outbox, 1, 50)
    else:
        outboxes.move_to_dead(outbox, "true")
    places = query(outbox, f"SELECT bucket, seq FROM {{{table}}}")
    with contextlib.closing(outbox.open_admin()) as admin:
        plans = outboxes.explained(admin)
        if table == "later":
            assert admin.reschedule(places[:20], 0) == 20
        else:
            assert admin.replay(places[:20], 0) == 20
        assert admin.delete(table, places[20:40]) == 20
    assert len(plans) == 4
    assert not [plan for plan in plans if "Join Filter" in plan or "Seq Scan" in plan]


def test_a_change_of_many_rows_is_one_transaction(outbox: PostgresOutbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kbatch._outbox._postgres_admin._MOST_AT_ONCE", 2)
    outboxes.add(outbox, envelopes(5))
    outboxes.move_to_dead(outbox, "true")
    (last,) = query(outbox, "SELECT seq FROM {dead} ORDER BY bucket DESC, seq DESC LIMIT 1")
    outboxes.refuse_rows(outbox, "outbox", number=last[0])
    with pytest.raises(OutboxError, match="no room"):
        outbox.dead_letters.replay(OutboxQuery())
    assert (outbox.status().waiting, outbox.status().dead) == (0, 5)
    outboxes.take_rows(outbox, "outbox")
    assert [letter.number for letter in outbox.dead_letters.find(OutboxQuery(numbers=range(9)))] == [1, 2, 3, 4, 5]
    assert outbox.dead_letters.replay(OutboxQuery()) == 5
    assert (outbox.status().waiting, outbox.status().dead) == (5, 0)


@pytest.mark.parametrize(("arrives", "is_refused"), [(True, False), (False, False), (False, True)])
def test_a_change_whose_commit_has_no_answer_may_be_made_and_says_so(
    outbox: PostgresOutbox, monkeypatch: pytest.MonkeyPatch, arrives: bool, is_refused: bool
) -> None:
    import psycopg

    from kbatch._database._postgres_connection import OwnConnection

    outboxes.add(outbox, envelopes(2))
    outboxes.move_to_dead(outbox, "true")
    execute: Any = OwnConnection.execute
    commits = itertools.count()

    def cut(self: Any, statement: Any, *arguments: Any, **options: Any) -> Any:
        if statement != "COMMIT" or not next(commits):  # the first one is of the search
            return execute(self, statement, *arguments, **options)
        if arrives:
            execute(self, statement)
        if is_refused:
            raise psycopg.errors.RaiseException("by a deferred trigger")
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(OwnConnection, "execute", cut)
    says = "by a deferred trigger" if is_refused else "whether the transaction was committed is not known"
    with pytest.raises(OutboxError, match=says) as caught:
        outbox.dead_letters.replay(OutboxQuery(numbers=[1]))
    assert caught.value.possibly_persisted is not is_refused
    monkeypatch.undo()
    assert outbox.status().waiting == arrives


def test_nobody_waits_for_those_who_look_after_dead_letters(outbox: PostgresOutbox) -> None:
    outboxes.add(outbox, envelopes(10))
    outboxes.move_to_dead(outbox, "seq <= 5")
    with contextlib.closing(outbox.open_store()) as relay, transaction(outbox) as changing:
        tokens = dict(relay.renew("relay", 60.0, release=(), avoid=())[0])
        before = relay.changes()
        changing.execute(outbox._tables.sql("UPDATE {meta} SET changes = changes + 1"))
        changing.execute(outbox._tables.sql("DELETE FROM {dead}"))
        assert outboxes.add(outbox, envelopes(1)) == 1
        assert relay.changes() == before
        places = query(outbox, "SELECT bucket, seq FROM {outbox} ORDER BY seq")
        to_dead = [Failure(*place, None, 1, "refused", None) for place in places[:3]]
        assert relay.settle(tokens, done=places[3:], done_later=[], failures=to_dead, failures_later=[]) == set()
        assert dict(relay.renew("relay", 60.0, release=(), avoid=())[0]) == tokens
    assert outbox.status().dead == 3


# -- order


@pytest.mark.parametrize("count", [1, 3, 100])
@pytest.mark.parametrize("driver", ["psycopg", "psycopg of asyncio", "asyncpg"])
def test_transactions_with_the_same_key_follow_each_other_if_that_is_asked_for(
    outbox: PostgresOutbox, driver: str, count: int
) -> None:
    async def add() -> None:
        import asyncpg
        import psycopg

        options: dict[str, Any] = {"topic": "orders", "serialize_keys": True}
        if driver == "asyncpg":
            connection = await asyncpg.connect(outbox._conninfo)
            async with connection.transaction():
                await of_aio(outbox).add(connection, envelopes(count), **options)
            await connection.close()
        elif driver == "psycopg":
            with psycopg.connect(outbox._conninfo) as of_thread:
                outbox.add(of_thread, envelopes(count), **options)
        else:
            async with await psycopg.AsyncConnection.connect(outbox._conninfo) as of_loop:
                await of_aio(outbox).add(of_loop, envelopes(count), **options)

    with connected(outbox) as first:
        first.execute("BEGIN")
        outbox.add(first, envelopes(1), topic="orders", serialize_keys=True)
        thread = threading.Thread(target=asyncio.run, args=(add(),))
        thread.start()
        ((mine,),) = first.execute("SELECT pg_backend_pid()").fetchall()
        waiting = f"SELECT count(*) FROM pg_stat_activity WHERE {mine} = ANY(pg_blocking_pids(pid))"
        with connected(outbox) as looking:
            until(lambda: looking.execute(waiting).fetchone() == (1,), "the second one")
        outbox.add(first, [Envelope(data=b"last", key="k0")], topic="orders", serialize_keys=True)
        outbox.add(first, [Envelope(data=b"none")], topic="orders", serialize_keys=True)
        with outboxes.transaction(outbox) as other:
            outbox.add(other, [Envelope(data=b"other", key="x")], topic="orders", serialize_keys=True)
        first.execute("COMMIT")
        thread.join()
    bodies = outboxes.bodies(outbox)
    assert bodies.index(b"last") < len(bodies) - count
    assert bodies[-count:] == [b"%d" % n for n in range(count)]


# -- what is refused


def refused(outbox: PostgresOutbox, connection: Any, what: Any = None, **arguments: Any) -> str:
    with pytest.raises((OutboxError, SerializationError, TypeError)) as caught:
        outbox.add(connection, envelopes(3) if what is None else what, **{"topic": "orders", **arguments})
    return str(caught.value)


def test_a_connection_that_is_in_no_transaction_or_cannot_take_part_in_one(outbox: PostgresOutbox) -> None:
    import psycopg

    with connected(outbox) as connection:
        assert "in no transaction" in refused(outbox, connection)
        connection.execute("BEGIN")
        with pytest.raises(psycopg.Error):
            connection.execute("SELECT * FROM nowhere")
        assert "failed before: roll back" in refused(outbox, connection)
        connection.execute("ROLLBACK")
        connection.execute("BEGIN")
        with connection.pipeline():
            assert "pipeline" in refused(outbox, connection)
    assert "is closed" in refused(outbox, connection)


def test_what_is_no_connection_or_another_drivers(outbox: PostgresOutbox) -> None:
    import psycopg
    import sqlalchemy

    expected = "connection must be a psycopg.Connection, or SQLAlchemy's Connection or Session over psycopg, not "
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        assert refused(outbox, connection) == expected + "Connection"
    assert refused(outbox, "postgresql://") == expected + "str"
    engine = sqlalchemy.create_engine("sqlite://")
    with engine.connect() as other:
        assert refused(outbox, other) == expected + "Connection over 'sqlite3'"
    engine.dispose()

    async def work() -> None:
        connection = psycopg.connect(outbox._conninfo)
        with contextlib.closing(connection), pytest.raises(TypeError, match="must be one of psycopg"):
            await of_aio(outbox).add(connection, envelopes(1), topic="orders")  # type: ignore[arg-type]
        async with await psycopg.AsyncConnection.connect(outbox._conninfo) as of_loop:
            assert refused(outbox, of_loop) == expected + "AsyncConnection"

    asyncio.run(work())


def test_connections_of_asyncio_that_are_in_no_transaction(outbox: PostgresOutbox) -> None:
    import asyncpg
    import psycopg
    import sqlalchemy.ext.asyncio

    @contextlib.asynccontextmanager
    async def refusing(says: str) -> AsyncIterator[Any]:
        with pytest.raises(OutboxError, match=says):
            yield of_aio(outbox)

    async def work() -> None:
        connection = await asyncpg.connect(outbox._conninfo)
        async with refusing("in no transaction") as each:
            await each.add(connection, envelopes(1), topic="orders")
        await connection.close()
        async with refusing("is closed") as each:
            await each.add(connection, envelopes(1), topic="orders")
        other = await psycopg.AsyncConnection.connect(outbox._conninfo, autocommit=True)
        async with refusing("in no transaction") as each:
            await each.add(other, envelopes(1), topic="orders")
        await other.close()
        for driver in ("psycopg", "asyncpg"):
            engine = sqlalchemy.ext.asyncio.create_async_engine(url(outbox, driver), isolation_level="AUTOCOMMIT")
            async with engine.connect() as of_sqlalchemy, refusing("in no transaction") as each:
                await each.add(of_sqlalchemy, envelopes(1), topic="orders")
            await engine.dispose()

    asyncio.run(work())
    assert outbox.status().waiting == 0


def test_what_a_driver_says_of_its_use_is_not_told_as_a_lost_connection(outbox: PostgresOutbox) -> None:
    import asyncpg

    async def work() -> list[BaseException | int]:
        connection = await asyncpg.connect(outbox._conninfo, command_timeout=2)
        await connection.execute("BEGIN")
        adds = (of_aio(outbox).add(connection, envelopes(1), topic="orders") for _ in range(2))
        found = await asyncio.gather(*adds, return_exceptions=True)
        await connection.execute("ROLLBACK")
        await connection.execute("BEGIN")
        with outboxes.transaction(outbox) as holder:
            holder.execute(outbox._tables.sql("LOCK TABLE {outbox}"))
            late = of_aio(outbox).add(connection, envelopes(1), topic="orders")
            found += await asyncio.gather(late, return_exceptions=True)
        await connection.close()
        return found

    first, second, late = asyncio.run(work())
    assert first == 1
    assert isinstance(second, OutboxError)
    assert "another operation is in progress" in str(second)
    assert "conninfo" not in str(second)
    assert isinstance(late, OutboxError)
    assert "TimeoutError" in str(late)
    assert "conninfo" not in str(late)


def test_a_connection_that_is_refused_for_want_of_room_says_so(postgres: str, outbox: PostgresOutbox) -> None:
    import psycopg
    from psycopg.conninfo import make_conninfo

    role = f"of_{os.urandom(6).hex()}"
    outboxes.query(outbox, f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 0")
    try:
        with pytest.raises(OutboxError, match=r"too many connections for role .*; the server has no connection left"):
            PostgresOutbox(make_conninfo(postgres, user=role)).status()
    finally:
        outboxes.query(outbox, f"DROP ROLE {role}")
    for text, is_known in (
        ("connection failed: FATAL:  sorry, too many clients already", True),
        ("FATAL:  remaining connection slots are reserved for non-replication superuser connections", True),
        ("FATAL:  remaining connection slots are reserved for roles with the SUPERUSER attribute", True),
        ('FATAL:  too many connections for database "shop"', True),
        ("FATAL:  tut mir leid, schon zu viele Verbindungen", False),  # by its code only, which libpq does not tell
        ('FATAL:  database "shop" does not exist', False),
    ):
        told = str(outbox._tables.as_error(psycopg.OperationalError(text)))
        assert ("the server has no connection left" in told) is is_known
        assert ("is the server there" in told) is not is_known


def test_tables_that_are_missing(postgres: str, outbox: PostgresOutbox) -> None:
    missing = PostgresOutbox(postgres, schema=outbox._tables.schema, prefix="missing_")
    for count in (1, 3, 100):
        with contextlib.suppress(AssertionError), outboxes.transaction(missing) as connection:
            assert "call create()" in refused(missing, connection, envelopes(count))
            connection.execute("ROLLBACK")
            connection.execute("BEGIN")
    for call in (missing.status, missing.open_store):
        with pytest.raises(OutboxError, match=r"call create\(\)"):
            call()
    elsewhere = PostgresOutbox(postgres, schema="nowhere")
    with pytest.raises(OutboxError, match=r'schema "nowhere" does not exist; make the schema first'):
        elsewhere.create()


@pytest.mark.parametrize("count", [1, 3, 100])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("UPDATE {meta} SET version = 2", "tables of version 2"),
        ("UPDATE {meta} SET buckets = 32", "has 32 buckets"),
        ("DELETE FROM {meta}", r"call create\(\)"),
    ],
)
def test_tables_of_another_version(outbox: PostgresOutbox, change: str, says: str, count: int) -> None:
    query(outbox, change)
    with outboxes.transaction(outbox) as connection:
        connection.execute(insert_order(outbox))
        assert re.search(says, refused(outbox, connection, envelopes(count)))
    assert query(outbox, "SELECT count(*) FROM {outbox}") == [(0,)]
    assert outboxes.rows(outbox, f"SELECT n FROM {outboxes.in_schema(outbox, 'orders')}") == [(1,)]  # it went on

    async def work() -> None:
        import asyncpg

        connection = await asyncpg.connect(outbox._conninfo)
        async with connection.transaction():
            with pytest.raises(OutboxError, match=says):
                await of_aio(outbox).add(connection, envelopes(count), topic="orders")
        await connection.close()

    asyncio.run(work())


@pytest.mark.parametrize("count", [1, 3, 100])
def test_a_trigger_that_keeps_rows_out_is_told(outbox: PostgresOutbox, count: int) -> None:
    name = outboxes.in_schema(outbox, "keeps_out")
    outboxes.run(
        outbox,
        f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$",
        f"CREATE TRIGGER keeps_out BEFORE INSERT ON {outbox._tables.names['outbox']} "
        f"FOR EACH ROW WHEN (NEW.seq % 3 = 1) EXECUTE FUNCTION {name}()",
    )
    kept_out = (count + 2) // 3
    with outboxes.transaction(outbox) as connection:
        says = refused(outbox, connection, envelopes(count))
    assert f"has taken {count - kept_out} of {count} row" in says

    async def work() -> None:
        import asyncpg

        connection = await asyncpg.connect(outbox._conninfo)
        with contextlib.suppress(OutboxError):
            async with connection.transaction():
                await of_aio(outbox).add(connection, envelopes(3 * count), topic="orders")
                raise AssertionError
        await connection.close()

    asyncio.run(work())


def test_a_transaction_that_only_reads_and_a_user_who_may_not_write(outbox: PostgresOutbox) -> None:
    with outboxes.transaction(outbox) as connection:
        connection.execute("SET TRANSACTION READ ONLY")
        assert "to the primary server" in refused(outbox, connection)
        connection.execute("ROLLBACK")
        connection.execute("BEGIN")
        connection.execute("SET LOCAL ROLE pg_monitor")
        assert "must be granted" in refused(outbox, connection)
        connection.execute("ROLLBACK")
        connection.execute("BEGIN")


def test_grants_that_ddl_tells_of_are_enough_to_add(outbox: PostgresOutbox) -> None:
    rights = [("INSERT", "outbox"), ("USAGE", outboxes.sequence(outbox)), ("SELECT", "meta"), ("INSERT", "later")]
    with outboxes.granted(outbox, rights) as conninfo:
        user = PostgresOutbox(conninfo, schema=outbox._tables.schema, wire="raw")
        for count in (1, 3, 100):
            assert outboxes.add(user, envelopes(count)) == count
        assert outboxes.add(user, [Envelope(data=b"", scheduled_time=FUTURE)]) == 1


def test_a_server_that_is_not_there_and_a_conninfo_that_is_none() -> None:
    for conninfo in ("postgresql://127.0.0.1:1/x", "no conninfo"):
        outbox = PostgresOutbox(conninfo)
        for call in (outbox.create, outbox.status, outbox.open_store, outbox.open_admin):
            with pytest.raises(OutboxError, match="is conninfo right"):
                call()


@pytest.mark.parametrize(
    "conninfo",
    [
        f"postgresql://user:{quote('geheim')}@127.0.0.1:1/x",
        "postgresql://user@127.0.0.1:1/x?password=geheim",
        "host=127.0.0.1 port=1 password=geheim",
        # What libpq does not understand, or takes for something else.
        "postgresql://user:geheim%@127.0.0.1:1/x",
        "postgresql://user:geheim?a/b@127.0.0.1:1/x",
        "postgresql://127.0.0.1:1/x?pasword=geheim",
        "POSTGRESQL://user:geheim@127.0.0.1:1/x",
        "postgresql://user:a@geheim@127.0.0.1:1/x",
        "postgresql://user:geheim/b@127.0.0.1:1/x",
        "password=a geheim",
    ],
)
def test_a_password_is_never_shown(conninfo: str) -> None:
    told = ""
    try:
        outbox = PostgresOutbox(conninfo)
        told = repr(outbox)
        outbox.create()
    except (ConfigError, OutboxError) as error:
        told += "".join(map(str, (error, error.__cause__)))
    assert "conninfo" in told
    assert "geheim" not in told


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"conninfo": 7}, "conninfo must be a text.*not int"),
        ({"conninfo": "a\0b"}, "conninfo must be a text.*NUL"),
        ({"prefix": ""}, "prefix must be the text of a name"),
        ({"prefix": None}, "prefix must be the text of a name"),
        ({"prefix": "a\0"}, "prefix must be the text of a name"),
        ({"prefix": "\ud800"}, "prefix must be the text of a name"),
        ({"schema": ""}, "schema must be the text of a name"),
        ({"schema": "a" * 64}, "schema=.* makes names of 64 bytes"),
        ({"schema": "ü" * 32}, "schema=.* makes names of 64 bytes"),
        ({"prefix": "a" * 48}, "prefix=.* makes names of 64 bytes, and PostgreSQL allows 63"),
        ({"prefix": "ü" * 24}, "prefix=.* makes names of 64 bytes, and PostgreSQL allows 63"),
        ({"max_message_bytes": 999}, "from 1,000"),
        ({"wire": "avro"}, "wire must be one of"),
    ],
)
def test_wrong_options(options: dict[str, Any], says: str) -> None:
    for kind in (PostgresOutbox, aio.PostgresOutbox):
        with pytest.raises(ConfigError, match=says):
            kind(**{"conninfo": "postgresql://", **options})


def test_the_longest_names(in_postgres: Callable[..., PostgresOutbox]) -> None:
    outbox = in_postgres(prefix="ü" * 23 + "a")
    outbox.create()
    outboxes.add(outbox, envelopes(100))
    assert outbox.status().waiting == 100


# -- without the packages

WITHOUT = """
import sys
import kbatch
from kbatch import aio
loaded = [name for name in ("psycopg", "asyncpg", "sqlalchemy") if name in sys.modules]
assert loaded == [], loaded
sys.modules["psycopg"] = None
outbox = kbatch.PostgresOutbox("postgresql://127.0.0.1:1/x")
for call in (outbox.create, outbox.status, outbox.open_store):
    try:
        call()
    except kbatch.OutboxError as error:
        assert "pip install 'kbatch-kafka[postgres]'" in str(error), error
    else:
        raise AssertionError
try:
    outbox.add("connection", [])
except TypeError:
    pass
"""


def test_drivers_are_imported_when_they_are_used_and_a_missing_one_is_told_with_what_to_do() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT], check=True, timeout=60)


# -- tables


def test_create_from_many_threads_at_the_same_time(postgres: str, outbox: PostgresOutbox) -> None:
    others = [PostgresOutbox(postgres, schema=outbox._tables.schema, prefix="new_") for _ in range(6)]
    errors: list[BaseException] = []

    def make(other: PostgresOutbox) -> None:
        try:
            other.create()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=make, args=(other,)) for other in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert query(others[0], "SELECT count(*), sum(token) FROM {lease}") == [(64, 0)]


@pytest.mark.parametrize("default", ["isolation=serializable", "read_only=on"])
def test_create_works_whatever_transactions_are_by_default(outbox: PostgresOutbox, default: str) -> None:
    from psycopg.conninfo import make_conninfo

    conninfo = make_conninfo(outbox._conninfo, options=f"-c default_transaction_{default}")
    other = PostgresOutbox(conninfo, schema=outbox._tables.schema, prefix="new_")
    name = other._tables.names["outbox"]
    with connected(outbox) as maker, ThreadPoolExecutor(1) as pool:
        maker.execute("BEGIN")
        maker.execute("SELECT pg_advisory_xact_lock(hashtext('kbatch'), hashtext(%s))", (name,))
        made = pool.submit(other.create)
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = %s::bigint AND NOT granted"
        ((key,),) = maker.execute("SELECT hashtext(%s)::bigint & 4294967295", (name,)).fetchall()
        until(lambda: made.done() or query(outbox, waiting % key) == [(1,)], "the second one")
        maker.execute(other._tables.ddl())
        maker.execute("COMMIT")
        made.result()
    third = PostgresOutbox(conninfo, schema=outbox._tables.schema, prefix="third_")
    for each in (other, third):
        each.create()
        assert query(each, "SELECT count(*) FROM {lease}") == [(64,)]


def test_create_waits_for_nobody_if_nothing_is_to_be_made(outbox: PostgresOutbox) -> None:
    with outboxes.transaction(outbox) as connection:
        for table in ("outbox", "later", "dead"):
            connection.execute(outbox._tables.sql(f"LOCK TABLE {{{table}}} IN ACCESS EXCLUSIVE MODE"))
        outbox.create()


def definitions(outbox: PostgresOutbox) -> list[Any]:
    return outboxes.rows(
        outbox,
        "SELECT relname, reloptions, (SELECT array_agg((attname, format_type(atttypid, atttypmod), attnotnull, "
        "attidentity)::text ORDER BY attnum) FROM pg_attribute WHERE attrelid = pg_class.oid AND attnum > 0) "
        f"FROM pg_class WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = "
        f"'{outbox._tables.schema}') ORDER BY relname",
    )


def test_ddl_makes_the_same_tables(postgres: str, in_postgres: Callable[..., PostgresOutbox]) -> None:
    outbox = in_postgres()
    by_hand = PostgresOutbox(postgres, schema=outboxes.new_schema(postgres))
    try:
        for _ in range(2):
            outboxes.run(by_hand, by_hand.ddl())
        assert definitions(by_hand) == definitions(outbox)
        assert outboxes.add(by_hand, envelopes(2)) == 2
        assert len(query(by_hand, "SELECT * FROM {lease}")) == 64
    finally:
        outboxes.drop_schema(postgres, by_hand._tables.schema)


def test_the_hot_table_has_no_index_but_its_key_and_is_cleaned_often(outbox: PostgresOutbox) -> None:
    name = outbox._tables.names["outbox"]
    assert outboxes.rows(outbox, f"SELECT count(*) FROM pg_index WHERE indrelid = '{name}'::regclass") == [(1,)]
    ((options,),) = outboxes.rows(outbox, f"SELECT reloptions FROM pg_class WHERE oid = '{name}'::regclass")
    assert {"autovacuum_vacuum_scale_factor=0", "autovacuum_vacuum_cost_delay=0"} <= set(options)


def test_status_tells_what_autovacuum_has_left(outbox: PostgresOutbox) -> None:
    query(outbox, "ALTER TABLE {outbox} SET (autovacuum_enabled = false)")
    outboxes.add(outbox, envelopes(500))
    query(outbox, "DELETE FROM {outbox}")
    until(lambda: outbox.status().unvacuumed == 500, "PostgreSQL's statistics")

    def is_clean() -> bool:
        query(outbox, "VACUUM {outbox}")  # frees nothing while a transaction of another test may see it
        return outbox.status().unvacuumed == 0

    until(is_clean, "PostgreSQL's statistics")


@pytest.fixture
def watched(outbox: PostgresOutbox) -> Iterator[list[str]]:
    told: list[str] = []
    watcher = lambda committed: told.append("told")  # noqa: E731
    outbox.watch(watcher)
    yield told
    outbox.unwatch(watcher)


def test_relays_of_the_process_are_told_of_an_add(outbox: PostgresOutbox, watched: list[str]) -> None:
    outboxes.add(outbox, envelopes(2))
    assert watched == ["told"]
    with outboxes.transaction(outbox) as connection:
        refused(outbox, connection, [object()])
    assert watched == ["told"]


# -- leases


def test_a_bucket_does_not_change_hands_while_its_rows_are_written(outbox: PostgresOutbox) -> None:
    outboxes.add(outbox, envelopes(1))
    ((bucket, seq),) = query(outbox, "SELECT bucket, seq FROM {outbox}")
    name = outboxes.in_schema(outbox, "waits")
    first, second = outbox.open_store(), outbox.open_store()
    options: dict[str, Any] = {"release": (), "avoid": ()}
    results: list[set[int]] = []
    with contextlib.closing(first), contextlib.closing(second), connected(outbox) as holder:
        holder.execute("SELECT pg_advisory_lock(12)")
        outboxes.run(
            outbox,
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN PERFORM pg_advisory_xact_lock_shared(12); RETURN OLD; END $$",
            f"CREATE TRIGGER waits BEFORE DELETE ON {outbox._tables.names['outbox']} "
            f"FOR EACH ROW EXECUTE FUNCTION {name}()",
        )
        leases, _ = first.renew("first", 1.0, **options)

        def settle() -> None:
            done = [(bucket, seq)]
            results.append(
                first.settle({bucket: dict(leases)[bucket]}, done=done, done_later=[], failures=[], failures_later=[])
            )

        thread = threading.Thread(target=settle)
        thread.start()
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 12 AND NOT granted"
        until(lambda: holder.execute(waiting).fetchone() == (1,), "the delete")
        lost = outbox._tables.sql("SELECT count(*) FROM {lease} WHERE NOT {lives}")
        until(lambda: holder.execute(lost).fetchone() == (64,), "the end of its leases")
        taken, _ = second.renew("second", 60.0, **options)
        assert {each for each, _ in taken} == set(range(64)) - {bucket}
        holder.execute("SELECT pg_advisory_unlock(12)")
        thread.join()
        assert results == [set()]
        taken, _ = second.renew("second", 60.0, **options)
        assert len(taken) == 64
    assert outbox.status().waiting == 0


def test_a_relay_that_has_lost_leases_does_not_wait_for_the_one_that_has_them(outbox: PostgresOutbox) -> None:
    nothing: dict[str, Any] = {"done": [], "done_later": [], "failures": [], "failures_later": []}
    with contextlib.closing(outbox.open_store()) as late, contextlib.closing(outbox.open_store()) as other:
        old = dict(late.renew("late", 60.0, release=(), avoid=())[0])
        query(outbox, "UPDATE {lease} SET until = 0 WHERE bucket < 2")
        other.renew("other", 60.0, release=(), avoid=())
        with transaction(outbox) as renewing:
            renewing.execute(outbox._tables.sql("UPDATE {lease} SET until = until + 1 WHERE owner = 'other'"))
            assert late.settle({bucket: old[bucket] for bucket in (0, 1, 2)}, **nothing) == {0, 1}


def test_two_relays_that_remove_those_that_are_gone_do_not_wait_for_each_other(outbox: PostgresOutbox) -> None:
    query(outbox, "INSERT INTO {relay} SELECT 'gone ' || n, 0, 1000 FROM generate_series(1, 50) AS n")
    errors: list[BaseException] = []

    def renew(owner: str) -> None:
        try:
            with contextlib.closing(outbox.open_store()) as store:
                for _ in range(20):
                    store.renew(owner, 60.0, release=(), avoid=())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=renew, args=(f"relay {n}",)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert query(outbox, "SELECT count(*) FROM {relay}") == [(5,)]
    assert query(outbox, "SELECT count(DISTINCT bucket) FROM {lease} WHERE owner IS NOT NULL") == [(64,)]


def test_a_large_step_of_the_servers_clock_during_a_renewal_leaves_a_share(
    outbox: PostgresOutbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(outbox.open_store()) as store:
        run: Any = store._run

        def stepping(statement: str, parameters: Any = None) -> Any:
            found = run(statement, parameters)
            if statement.startswith("INSERT INTO") and "listens" in statement:
                run(outbox._tables.sql("UPDATE {relay} SET until = 0"))
            return found

        monkeypatch.setattr(store, "_run", stepping)
        leases, share = store.renew("relay", 60.0, release=(), avoid=())
    assert (len(leases), share) == (64, 64)
