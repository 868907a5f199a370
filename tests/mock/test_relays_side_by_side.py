"""Relays of two outboxes in one database, and relays that know one outbox by several names."""

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kbatch import OutboxQuery, SqliteOutbox
from kbatch.testing import MockCluster
from tests import outboxes
from tests.relays import check_history, numbered
from tests.waiting import until

from .clients import read_back
from .test_relay import make, running


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=3)
        yield cluster


def stored(cluster: MockCluster) -> list[Any]:
    return list(read_back(cluster.bootstrap_servers, "orders"))


def places(outbox: outboxes.Outbox) -> list[Any]:
    return outboxes.query(outbox, "SELECT bucket, seq FROM {outbox} ORDER BY bucket, seq")


def test_two_outboxes_of_one_database_each_delete_their_own(
    new_outbox: Callable[..., outboxes.Outbox], cluster: MockCluster
) -> None:
    """Their rows have the same places; the brokers of the second one refuse them at first."""
    first = new_outbox(wire="raw")
    second = outboxes.same(first, prefix="other_", wire="raw")
    second.create()
    for begin in range(0, 200, 20):
        for outbox in (first, second):
            outboxes.add(outbox, numbered(range(begin, begin + 20)))
    assert places(first) == places(second)
    with MockCluster() as other, contextlib.ExitStack() as undo:
        other.create_topic("orders", partitions=3)
        other.set_topic_error("orders", "TOPIC_AUTHORIZATION_FAILED")
        of_first = undo.enter_context(running(make(first, cluster, {"delivery.timeout.ms": 30_000}, batch_size=10)))
        of_second = undo.enter_context(running(make(second, other, batch_size=10)))
        until(lambda: of_first.stats()["acked"] == 200, "what is for the first one")
        until(lambda: second.status().dead == 200, "what is for the second one, refused")
        assert (of_first.stats()["buckets"], of_second.stats()["buckets"]) == (64, 64)
        assert (first.status().relays, second.status().relays) == (1, 1)
        assert (first.status().waiting, first.status().later, first.status().dead) == (0, 0, 0)
        # Now the brokers of the first one are away, and those of the second one take records.
        cluster.set_broker_down()
        other.set_topic_error("orders", 0)
        outboxes.add(first, numbered(range(200, 300)))
        assert second.dead_letters.replay(OutboxQuery()) == 200

        def all_sent() -> bool:
            """The producer may take a while to see that the topic takes records, and give some up once more."""
            assert of_second.drain(30) == 0
            return not second.dead_letters.replay(OutboxQuery())

        until(all_sent, "what is for the second one, sent")
        assert first.status().waiting == 100
        cluster.set_broker_up()
        assert of_first.drain(30) == 0
        check_history(range(200), stored(other), in_order=False)
    check_history(range(300), stored(cluster), copies=None, in_order=False)
    assert (first.status().dead, second.status().dead) == (0, 0)


def test_relays_that_know_one_file_by_several_names_share_it(tmp_path: Path, cluster: MockCluster) -> None:
    from kbatch.cli._place import OutboxPlace

    path = outboxes.made(tmp_path)._path
    (tmp_path / "folder").mkdir()
    names = [path, str(tmp_path / "link.db"), str(tmp_path / "folder" / ".." / "shop.db"), f"sqlite:///{path}"]
    os.symlink(path, names[1])
    found: list[Any] = [SqliteOutbox(name, wire="raw") for name in names[:3]]
    found.append(OutboxPlace.find(names[3], None, None, {}, wire="raw").open())
    numbers = iter(range(10**6))
    with contextlib.ExitStack() as undo:
        relays = [undo.enter_context(running(make(outbox, cluster, batch_size=20))) for outbox in found]
        connections = [
            undo.enter_context(contextlib.closing(sqlite3.connect(name, isolation_level=None, timeout=30)))
            for name in names[:3]
        ]

        def add() -> None:
            """By each outbox, within a transaction of a connection by each name."""
            for outbox in found:
                for connection in connections:
                    connection.execute("BEGIN IMMEDIATE")
                    outbox.add(connection, numbered([next(numbers) for _ in range(5)], keys=200), topic="orders")
                    connection.execute("COMMIT")

        for _ in range(10):
            add()
        until(lambda: [relay.stats()["buckets"] for relay in relays] == [16] * 4, "a quarter for each")
        for _ in range(10):
            add()
        for relay in relays:
            assert relay.drain(30) == 0
        assert all(relay.stats()["acked"] for relay in relays)
        assert [relay.stats()["lost_buckets"] for relay in relays] == [0] * 4
        assert {outbox.status().relays for outbox in found} == {4}
    check_history(range(next(numbers)), stored(cluster))
