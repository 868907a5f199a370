"""Kafka and PostgreSQL are away at the same time: what was committed arrives, and has one effect."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kbatch
from kbatch import PostgresInbox, PostgresOutbox
from kbatch.testing import MockCluster
from tests import inboxes, outboxes
from tests.listening import running as listening
from tests.relays import check_history
from tests.waiting import until

from .clients import read_back
from .test_listener_inbox import listener, orders, writer
from .test_relay import make, running

pytestmark = pytest.mark.usefixtures("postgres")  # where it cannot be had, it says so


@pytest.fixture
def server(new_postgres: Callable[[], Any]) -> Iterator[Any]:
    """A server of the test's own, which it may stop."""
    server = new_postgres()
    yield server
    server.close()


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=3)
        yield cluster


class Shop:
    """A thread that orders until the block ends: a row and a message in one transaction."""

    def __init__(self, outbox: PostgresOutbox) -> None:
        self._outbox = outbox
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        import psycopg

        first = 0
        while not self._over.wait(0.01):
            try:
                with outboxes.connected(self._outbox) as connection, connection.transaction():
                    connection.execute(
                        "INSERT INTO orders SELECT generate_series(%s::integer, %s::integer)", (first, first + 9)
                    )
                    self._outbox.add(connection, orders(10, first), topic="orders")
            except (psycopg.Error, kbatch.OutboxError):
                pass  # it may have been committed: the table says so
            first += 10

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()


def committed(outbox: PostgresOutbox) -> list[int]:
    return [n for (n,) in outboxes.rows(outbox, "SELECT n FROM orders ORDER BY n")]


@pytest.mark.long
@pytest.mark.parametrize("first", ["database", "brokers"])
def test_both_go_at_once_and_one_is_back_before_the_other(
    server: Any, cluster: MockCluster, caplog: pytest.LogCaptureFixture, first: str
) -> None:
    outbox, inbox = PostgresOutbox(server.conninfo), PostgresInbox(server.conninfo)
    outbox.create()
    inbox.create()
    effects = inboxes.effects(inbox)
    outboxes.run(outbox, "CREATE TABLE orders (n integer)")
    of = listener(cluster, inbox, writer(effects), concurrency=3)
    relay = make(outbox, cluster, {"delivery.timeout.ms": 30_000})
    with running(relay), listening(of) as raised:
        with Shop(outbox):
            for _ in range(2):
                # Of both: the listener has records that it had read before, and a relay that has told that it cannot
                # use its outbox tells it again after a minute.
                handled, acked = of.stats()["handled"], relay.stats()["acked"]
                until(lambda handled=handled: of.stats()["handled"] > handled + 50, "that it flows")
                until(lambda acked=acked: relay.stats()["acked"] > acked + 50, "that the relay sends")
                caplog.clear()
                cluster.set_broker_down()
                server.crash()
                until(lambda: "cannot use its outbox" in caplog.text, "that the relay has seen it")
                if first == "database":
                    server.start()
                    count = len(committed(outbox))
                    until(lambda count=count: len(committed(outbox)) > count, "orders that wait for the brokers")
                    cluster.set_broker_up()
                else:
                    cluster.set_broker_up()
                    until(lambda: is_up(cluster), "brokers, while there is no database")
                    server.start()
        assert relay.drain(60) == 0
        wanted = committed(outbox)
        until(lambda: len(inboxes.numbers(inbox, effects)) == len(wanted), "an effect of each")
    assert raised == []
    assert of.stats()["failed"] == 0
    assert relay.stats()["dead"] == 0
    # What a broker had stored when it went, without an answer, was sent again.
    check_history(wanted, read_back(cluster.bootstrap_servers, "orders"), copies=None)
    found = inboxes.numbers(inbox, effects)
    assert sorted(found) == wanted
    for key in range(7):
        of_key = [n for n in found if n % 7 == key]
        assert of_key == sorted(of_key)


def is_up(cluster: MockCluster) -> bool:
    with kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers, "delivery.timeout.ms": 1000}) as producer:
        return producer.send_batch("other", orders(1)).acked == 1
