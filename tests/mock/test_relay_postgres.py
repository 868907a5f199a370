"""A relay on PostgreSQL whose server stops, crashes, ends connections, has none left, or is silent."""

import contextlib
import itertools
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

import kbatch
from kbatch import OutboxQuery, PostgresOutbox, Relay
from kbatch._fastmap import monotonic
from kbatch.testing import MockCluster
from tests import outboxes
from tests.kafka.proxy import Direction, FaultProxy
from tests.outboxes import connected
from tests.pooling import pool_before
from tests.relays import WatchedOutbox, check_history, numbered
from tests.waiting import until

from .clients import read_back

pytestmark = pytest.mark.usefixtures("postgres")  # where it cannot be had, it says so


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=3)
        yield cluster


@pytest.fixture
def server(new_postgres: Callable[[], Any]) -> Iterator[Any]:
    """A server of the test's own, which it may stop."""
    server = new_postgres()
    yield server
    server.close()


def made(conninfo: str) -> PostgresOutbox:
    outbox = PostgresOutbox(conninfo, wire="raw")
    outbox.create()
    outboxes.run(outbox, "CREATE TABLE orders (n integer)")
    return outbox


def through(outbox: PostgresOutbox, proxy: FaultProxy) -> PostgresOutbox:
    """The same outbox by way of a proxy."""
    before, _, after = outbox._conninfo.partition("127.0.0.1:")
    _, slash, path = after.partition("/")
    return PostgresOutbox(f"{before}127.0.0.1:{proxy.port}{slash}{path}", wire="raw")


@contextlib.contextmanager
def running(outbox: Any, cluster: MockCluster, **options: Any) -> Iterator[Relay]:
    config = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0}
    with Relay(outbox, config, **options) as relay:
        thread = threading.Thread(target=relay.run)
        thread.start()
        try:
            until(lambda: relay.stats()["buckets"] == 64, "its buckets")
            yield relay
        finally:
            relay.stop()
            thread.join()


def add_orders(outbox: PostgresOutbox, numbers: range) -> None:
    """Data and messages in one transaction; if the server fails meanwhile, both are there or neither."""
    import psycopg

    with contextlib.suppress(psycopg.OperationalError, kbatch.OutboxError), connected(outbox) as connection:
        connection.execute("BEGIN")
        connection.execute(
            "INSERT INTO orders SELECT generate_series(%s::integer, %s::integer)", (numbers[0], numbers[-1])
        )
        outbox.add(connection, numbered(numbers), topic="orders")
        connection.execute("COMMIT")


class Adding:
    """A thread that adds orders until the block ends."""

    def __init__(self, outbox: PostgresOutbox) -> None:
        self._outbox = outbox
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        seeded = random.Random(3)
        first = 0
        while not self._over.wait(0.002):
            count = seeded.choice([1, 5, 70])
            add_orders(self._outbox, range(first, first + count))
            first += count

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()


def check(outbox: PostgresOutbox, cluster: MockCluster, copies: int | None) -> None:
    committed = [n for (n,) in outboxes.rows(outbox, "SELECT n FROM orders")]
    assert len(committed) > 100
    check_history(committed, read_back(cluster.bootstrap_servers, "orders"), copies=copies)


def waits_in_vain(caplog: pytest.LogCaptureFixture) -> bool:
    return any("cannot use its outbox" in record.message for record in caplog.records)


def test_a_pool_in_transaction_mode_between(server: Any, cluster: MockCluster) -> None:
    outbox = made(server.conninfo)
    with pool_before(server) as conninfo:
        through_pool = PostgresOutbox(conninfo, wire="raw")
        with running(through_pool, cluster, batch_size=100) as relay:
            with Adding(outbox):
                until(lambda: relay.stats()["acked"] > 1000, "some that are sent")
            assert relay.drain(60) == 0
    check(outbox, cluster, copies=0)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["stopped", "crashed"])
def test_a_server_that_ends_and_comes_back(
    server: Any, cluster: MockCluster, how: int, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = made(server.conninfo)
    with running(outbox, cluster, batch_size=100) as relay:
        with Adding(outbox):
            for _ in range(3):
                acked = relay.stats()["acked"]
                until(lambda acked=acked: relay.stats()["acked"] > acked + 200, "some that are sent")
                server.stop(how)
                until(lambda: waits_in_vain(caplog), "the relay has seen it")
                caplog.clear()
                server.start()
        assert relay.drain(60) == 0
        assert relay.stats()["lost_buckets"] == 0
    check(outbox, cluster, copies=0)


@pytest.mark.long
def test_connections_that_the_server_ends_at_any_time(server: Any, cluster: MockCluster) -> None:
    outbox = made(server.conninfo)
    ended = 0
    with running(outbox, cluster, batch_size=100) as relay:
        with Adding(outbox), connected(outbox) as admin:
            for turn in itertools.count():
                acked = relay.stats()["acked"]
                ended += admin.execute(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                    "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
                ).fetchone()[0]
                if ended >= 30 and acked >= 500:
                    break
                if turn % 3 == 2:  # else it is ended while it connects, or takes its buckets, or reads
                    until(lambda acked=acked: relay.stats()["acked"] > acked, "some that are sent")
                time.sleep(0.05)
        assert relay.drain(60) == 0
        assert relay.stats()["lost_buckets"] == 0
    check(outbox, cluster, copies=0)


@pytest.mark.long
def test_connections_that_are_cut_between(server: Any, cluster: MockCluster) -> None:
    outbox = made(server.conninfo)
    proxy = FaultProxy(server.port)
    try:
        with running(through(outbox, proxy), cluster, batch_size=100) as relay:
            with Adding(outbox):
                for _ in range(15):
                    acked = relay.stats()["acked"]
                    proxy.cut()
                    until(lambda acked=acked: relay.stats()["acked"] > acked, "some that are sent")
            assert relay.drain(60) == 0
            assert relay.stats()["lost_buckets"] == 0
        check(outbox, cluster, copies=0)
    finally:
        proxy.close()


@pytest.mark.long
@pytest.mark.parametrize("direction", Direction)
def test_a_silent_connection_is_given_up(
    server: Any,
    cluster: MockCluster,
    direction: Direction,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    outbox = made(server.conninfo)
    monkeypatch.setattr("kbatch._database._postgres_connection._SILENCE_S", 2)  # a busy machine takes its time, too
    monkeypatch.setattr("kbatch._database._postgres_connection._CONNECT_S", 2)
    proxy = FaultProxy(server.port)
    try:
        with running(through(outbox, proxy), cluster, batch_size=100) as relay:
            add_orders(outbox, range(200))
            until(lambda: relay.stats()["acked"] == 200, "the first ones")
            proxy.drop(direction)
            add_orders(outbox, range(200, 400))
            until(lambda: waits_in_vain(caplog), "the relay has given it up")
            proxy.heal()
            proxy.cut()
            assert relay.drain(60) == 0
        assert any("no answer for 2 s" in record.message for record in caplog.records)
        check(outbox, cluster, copies=0)
    finally:
        proxy.close()


MOST_CONNECTIONS = 8


@pytest.mark.long
def test_a_server_that_has_no_connection_left(server: Any, cluster: MockCluster) -> None:
    outbox = made(server.conninfo)
    server.stop()
    server.start(max_connections=str(MOST_CONNECTIONS), superuser_reserved_connections="0", max_wal_senders="0")
    calls: list[str] = []
    with running(WatchedOutbox(outbox, before=calls.append), cluster) as relay:
        with outboxes.holding_all_connections(outbox, MOST_CONNECTIONS) as held:
            calls.clear()
            until(lambda: calls.count("open_store") >= 3, "it asks in vain")
            assert relay._loop._store is None
            held[0].execute("BEGIN")
            held[0].execute("INSERT INTO orders SELECT generate_series(0, 199)")
            outbox.add(held[0], numbered(range(200)), topic="orders")
            held[0].execute("COMMIT")
        assert relay.drain(60) == 0
    check(outbox, cluster, copies=0)


def test_a_transaction_that_stays_open_delays_its_own_rows_alone(
    in_postgres: Callable[..., PostgresOutbox], cluster: MockCluster
) -> None:
    outbox = in_postgres(wire="raw")
    with running(outbox, cluster, batch_size=100) as relay:
        with outboxes.transaction(outbox) as late:
            outbox.add(late, numbered(range(7)), topic="orders")
            for first in range(7, 1000, 100):
                outboxes.add(outbox, numbered(range(first, first + 100)))
                outbox.add(late, numbered(range(10_000 + first, 10_050 + first)), topic="orders")
            until(lambda: relay.stats()["acked"] == 1000, "those of the others")
        assert relay.drain(30) == 0
    records = read_back(cluster.bootstrap_servers, "orders")
    late_ones = [n for first in range(7, 1000, 100) for n in range(10_000 + first, 10_050 + first)]
    check_history([*range(1007), *late_ones], records, in_order=False)
    for of_late in (range(7, 1007), [*range(7), *late_ones]):
        numbers = set(of_late)
        check_history(of_late, [record for record in records if int(record.value or b"") in numbers])


def test_what_comes_to_light_after_the_connection_was_made_anew(
    in_postgres: Callable[..., PostgresOutbox], cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kbatch._outbox._relay_loop._LOOK_AT_ALL_EVERY_S", 1e6)
    outbox = in_postgres(wire="raw")
    failed = threading.Event()
    fail = threading.Event()

    def before(name: str) -> None:
        if fail.is_set() and not failed.is_set():
            failed.set()
            raise kbatch.OutboxError("the connection is lost")

    with running(WatchedOutbox(outbox, before=before), cluster) as relay:
        with outboxes.transaction(outbox) as late:
            outbox.add(late, numbered([0], keys=1), topic="orders")
            outboxes.add(outbox, numbered([1], keys=1))
            until(lambda: relay.stats()["acked"] == 1, "what was committed")
            fail.set()
            until(failed.is_set, "the failure")
        assert relay.drain(30) == 0
    assert relay.stats()["acked"] == 2


def test_transactions_of_many_threads_that_overlap(
    in_postgres: Callable[..., PostgresOutbox], cluster: MockCluster
) -> None:
    outbox = in_postgres(wire="raw")
    errors: list[BaseException] = []

    def work(writer: int) -> None:
        seeded = random.Random(writer)
        try:
            with connected(outbox) as connection:
                for n in range(40):
                    connection.execute("BEGIN")
                    first = writer * 1000 + n * 10
                    for part in range(2):  # each writer has a key of its own
                        numbers = range(first + 5 * part, first + 5 * part + 5)
                        outbox.add(
                            connection,
                            [kbatch.Envelope(data=b"%d" % each, key=f"w{writer}") for each in numbers],
                            topic="orders",
                        )
                        time.sleep(seeded.choice([0.0, 0.001, 0.01]))
                    connection.execute("COMMIT")
        except BaseException as error:
            errors.append(error)

    with running(outbox, cluster, batch_size=30) as relay:
        threads = [threading.Thread(target=work, args=(writer,)) for writer in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert relay.drain(30) == 0
    numbers = [writer * 1000 + n for writer in range(8) for n in range(400)]
    check_history(numbers, read_back(cluster.bootstrap_servers, "orders"))


# -- NOTIFY


def notifying(outbox: PostgresOutbox) -> PostgresOutbox:
    return PostgresOutbox(outbox._conninfo, schema=outbox._tables.schema, wire="raw", notify=True)


def listens(outbox: PostgresOutbox) -> list[Any]:
    return outboxes.query(outbox, "SELECT listens FROM {relay}")


@pytest.mark.parametrize("count", [1, 60])  # three times: after 200 rows in a second a relay asks for no NOTIFY
def test_a_commit_of_another_process_wakes_an_idle_relay(
    in_postgres: Callable[..., PostgresOutbox], cluster: MockCluster, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr("kbatch._outbox._relay_loop._LONGEST_POLL_S", 3600.0)  # it does not find it by itself
    outbox = notifying(in_postgres(wire="raw"))
    with running(notifying(outbox), cluster) as relay:
        for first in range(0, 3 * count, count):
            until(lambda: listens(outbox) == [(1,)], "that it is idle")
            relay._loop._poll_s = 3600.0
            until(lambda: relay._loop._read_at > monotonic() + 100, "that it polls no more")
            outboxes.add(outbox, numbered(range(first, first + count)))
            until(lambda: relay.stats()["acked"] == first + count, "that it is woken")  # noqa: B023
    check_history(range(3 * count), read_back(cluster.bootstrap_servers, "orders"))


def test_a_relay_that_has_much_to_do_asks_nobody_to_notify_it(
    in_postgres: Callable[..., PostgresOutbox], cluster: MockCluster
) -> None:
    outbox = notifying(in_postgres(wire="raw"))
    with running(notifying(outbox), cluster) as relay:
        until(lambda: listens(outbox) == [(1,)], "that it is idle")
        first = 0
        while listens(outbox) == [(1,)]:
            outboxes.add(outbox, numbered(range(first, first + 300)))
            first += 300
        assert relay.drain(30) == 0
        until(lambda: listens(outbox) == [(1,)], "that it is idle again")


def test_without_notify_nobody_tells_and_a_transaction_that_is_rolled_back_tells_nobody(
    in_postgres: Callable[..., PostgresOutbox],
) -> None:
    outbox = in_postgres(wire="raw")
    outboxes.query(
        outbox,
        "INSERT INTO {relay} (owner, until, length, listens) VALUES ('x', {now} + 60000, 60000, 1)",
    )
    with connected(outbox) as listener:
        listener.execute(f"LISTEN {outbox._tables.channel}")

        def told() -> int:
            return len(list(listener.notifies(timeout=0.2)))

        outboxes.add(outbox, numbered(range(1)))
        assert told() == 0
        with outboxes.transaction(outbox) as connection:
            notifying(outbox).add(connection, numbered(range(2)), topic="orders")
            connection.execute("ROLLBACK")
            connection.execute("BEGIN")
        assert told() == 0
        with outboxes.transaction(outbox) as connection:
            for count in (1, 2, 60):
                notifying(outbox).add(connection, numbered(range(count)), topic="orders")
        assert told() == 1
        outboxes.query(outbox, "UPDATE {relay} SET listens = 0")
        outboxes.add(notifying(outbox), numbered(range(1)))
        assert told() == 0


def test_a_relay_whose_listening_connection_is_cut_listens_again_and_polls_meanwhile(
    in_postgres: Callable[..., PostgresOutbox], cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kbatch._outbox._postgres_listener._TRY_AGAIN_S", 0.05)
    outbox = notifying(in_postgres(wire="raw"))
    cut = f"FROM pg_stat_activity WHERE query = 'LISTEN {outbox._tables.channel}'"
    with running(outbox, cluster) as relay:
        until(lambda: outboxes.rows(outbox, f"SELECT 1 {cut}"), "that it listens")
        (before,) = outboxes.rows(outbox, f"SELECT pid {cut}")
        outboxes.rows(outbox, f"SELECT pg_terminate_backend(pid) {cut}")
        outboxes.add(outbox, numbered(range(5)))
        assert relay.drain(30) == 0
        until(lambda: outboxes.rows(outbox, f"SELECT pid {cut}") not in ([], [before]), "that it listens again")
    until(lambda: not outboxes.rows(outbox, f"SELECT pid {cut}"), "the end of its listening")


def test_a_relay_behind_a_pool_in_transaction_mode_polls(server: Any, cluster: MockCluster) -> None:
    outbox = made(server.conninfo)
    with (
        pool_before(server) as conninfo,
        running(PostgresOutbox(conninfo, wire="raw", notify=True), cluster) as relay,
    ):
        outboxes.add(PostgresOutbox(server.conninfo, wire="raw", notify=True), numbered(range(5)))
        until(lambda: relay.stats()["acked"] == 5, "what it finds by itself")
    assert outbox.status().waiting == 0


def test_grants_that_ddl_tells_of_are_enough_for_relays_and_those_who_look_after_dead_letters(
    in_postgres: Callable[..., PostgresOutbox], cluster: MockCluster
) -> None:
    outbox = in_postgres(wire="raw")
    outboxes.add(outbox, numbered(range(4)))
    outboxes.move_to_dead(outbox, "seq > 2")
    outboxes.add(outbox, numbered([4], scheduled_time=datetime.now(timezone.utc) + timedelta(seconds=0.3)))
    rights = [
        ("SELECT, INSERT, UPDATE, DELETE", name) for name in ("outbox", "meta", "later", "dead", "lease", "relay")
    ]
    with outboxes.granted(outbox, [*rights, ("USAGE", outboxes.sequence(outbox))]) as conninfo:
        user = PostgresOutbox(conninfo, schema=outbox._tables.schema, wire="raw")
        assert user.dead_letters.replay(OutboxQuery(numbers=[3])) == 1
        assert user.dead_letters.discard(OutboxQuery(numbers=[4])) == 1
        with running(user, cluster) as relay:
            until(lambda: relay.stats()["acked"] == 4, "what is scheduled, too")
        assert user.status().scheduled == user.status().waiting == 0
    check_history([0, 1, 2, 4], read_back(cluster.bootstrap_servers, "orders"))
