"""A listener whose inbox is in a PostgreSQL that is slow, silent or has no connection left: it waits, and stays a
member of its group for longer than a member may be without a word."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kbatch
from kbatch import PostgresInbox
from kbatch.testing import ApiKey, MockCluster
from tests import inboxes, outboxes
from tests.inboxes import Inbox
from tests.kafka.proxy import Direction, FaultProxy
from tests.listening import running
from tests.waiting import until

from .test_listener_inbox import check, orders, send, writer

pytestmark = pytest.mark.usefixtures("postgres")  # where it cannot be had, it says so

LONGEST_S = 2  # between two polls of a member
MOST_CONNECTIONS = 8


@pytest.fixture
def server(new_postgres: Callable[[], Any]) -> Iterator[Any]:
    """A server of the test's own, which it may stop."""
    server = new_postgres()
    yield server
    server.close()


@pytest.fixture
def inbox(server: Any) -> PostgresInbox:
    inbox = PostgresInbox(server.conninfo)
    inbox.create()
    return inbox


@pytest.fixture
def effects(inbox: PostgresInbox) -> str:
    return inboxes.effects(inbox)


@pytest.fixture
def proxy(server: Any) -> Iterator[FaultProxy]:
    proxy = FaultProxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def through(inbox: PostgresInbox, server: Any, proxy: FaultProxy) -> PostgresInbox:
    """The same inbox by way of the proxy."""
    return PostgresInbox(inbox._conninfo.replace(f":{server.port}/", f":{proxy.port}/"))


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=3)
        cluster.start_request_tracking()
        yield cluster


def listener(cluster: MockCluster, inbox: Inbox, handler: Any) -> kbatch.Listener:
    config = {**inboxes.consumer(cluster), "max.poll.interval.ms": LONGEST_S * 1000}
    return kbatch.Listener(config, ["orders"], handler, inbox=inbox, concurrency=3)


def joined(cluster: MockCluster) -> int:
    return sum(request.api_key == ApiKey.JOIN_GROUP for request in cluster.requests())


def test_a_slow_database(
    cluster: MockCluster, inbox: PostgresInbox, through: PostgresInbox, effects: str, proxy: FaultProxy
) -> None:
    given = send(cluster, orders(20))
    with running(of := listener(cluster, through, writer(effects))) as raised:
        until(lambda: of.stats()["handled"] == 20, "its start")
        count = joined(cluster)
        proxy.delay(0.15)
        send(cluster, [*given[:3], *orders(12, 20)])
        until(lambda: of.stats()["handled"] == 35, "all of them")
        proxy.heal()
        assert joined(cluster) == count > 0
        assert of.stats()["failed"] == 0
    assert raised == []
    check(inbox, effects, 32)


@pytest.mark.long
@pytest.mark.parametrize("direction", Direction)
def test_a_connection_that_falls_silent_before_a_commit(
    cluster: MockCluster,
    inbox: PostgresInbox,
    through: PostgresInbox,
    effects: str,
    proxy: FaultProxy,
    direction: Direction,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The COMMIT does not arrive, or its answer does not."""
    monkeypatch.setattr("kbatch._database._postgres_connection._SILENCE_S", 2)  # a busy machine takes its time, too
    monkeypatch.setattr("kbatch._database._postgres_connection._CONNECT_S", 2)
    silent: list[int] = []

    def handle(envelope: Any, connection: Any) -> None:
        writer(effects)(envelope, connection)
        if int(envelope.data) == 50 and not silent:
            silent.append(50)
            proxy.drop(direction)

    send(cluster, orders(50))
    with running(of := listener(cluster, through, handle)) as raised:
        until(lambda: of.stats()["handled"] == 50, "its start")
        count = joined(cluster)
        send(cluster, orders(50, 50))
        until(lambda: "waits for its inbox" in caplog.text, "that it waits")
        time.sleep(LONGEST_S)
        was_committed = 50 in inboxes.numbers(inbox, effects)
        proxy.heal()
        until(lambda: of.stats()["handled"] == 100, "all of them")
        assert joined(cluster) == count > 0
        assert of.stats()["failed"] == 0
    assert raised == []
    assert was_committed == (direction is Direction.TO_CLIENT)
    assert "no answer for 2 s" in caplog.text
    check(inbox, effects, 100)


@pytest.mark.long
def test_a_server_that_has_no_connection_left(
    server: Any, cluster: MockCluster, inbox: PostgresInbox, effects: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.stop()
    server.start(max_connections=str(MOST_CONNECTIONS), superuser_reserved_connections="0", max_wal_senders="0")
    given = send(cluster, orders(50))
    with running(of := listener(cluster, inbox, writer(effects))) as raised:
        until(lambda: of.stats()["handled"] == 50, "its start")
        count = joined(cluster)
        with outboxes.holding_all_connections(inbox, MOST_CONNECTIONS):
            caplog.clear()
            send(cluster, [*given[:10], *orders(50, 50)])
            until(lambda: "waits for its inbox" in caplog.text, "that it waits")
            time.sleep(LONGEST_S)
            assert of.stats()["handled"] == 50
        until(lambda: of.stats()["handled"] == 110, "all of them")
        assert joined(cluster) == count > 0
        assert of.stats()["failed"] == 0
    assert raised == []
    check(inbox, effects, 100)
