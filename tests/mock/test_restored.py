"""A dump is restored into a fresh server, whose transactions have lower numbers, while an outbox's relay lives on."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kbatch import PostgresOutbox
from kbatch.testing import MockCluster
from tests import outboxes
from tests.pooling import pool_before
from tests.relays import check_history, numbered
from tests.waiting import until

from .clients import read_back
from .test_relay import make, running

pytestmark = pytest.mark.usefixtures("postgres")  # where it cannot be had, it says so


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=3)
        yield cluster


def next_transaction(outbox: PostgresOutbox) -> int:
    ((number,),) = outboxes.rows(outbox, "SELECT pg_current_xact_id()::text::bigint")
    return int(number)


@pytest.mark.long
@pytest.mark.parametrize("by_pool", [False, True], ids=["directly", "by a pool, which keeps the connection"])
def test_all_rows_of_a_restored_outbox_are_read(
    new_postgres: Callable[[], Any], cluster: MockCluster, monkeypatch: pytest.MonkeyPatch, by_pool: bool
) -> None:
    monkeypatch.setattr("kbatch._outbox._relay_loop._LOOK_AT_ALL_EVERY_S", 1e6)  # it does not find them by chance
    with contextlib.ExitStack() as undo:
        servers = [new_postgres()]
        undo.callback(lambda: [each.close() for each in servers])  # after the relay has ended
        server = servers[0]
        outbox = PostgresOutbox(server.conninfo, wire="raw")
        outbox.create()
        outboxes.run(
            outbox,
            "DO $$ BEGIN FOR i IN 1..20000 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$",
        )
        conninfo = undo.enter_context(pool_before(server)) if by_pool else server.conninfo
        relay = make(PostgresOutbox(conninfo, wire="raw"), cluster, {"delivery.timeout.ms": 30_000})
        undo.enter_context(running(relay))
        outboxes.add(outbox, numbered(range(100)))
        until(lambda: relay.stats()["acked"] == 100, "the first ones")
        cluster.set_broker_down()
        outboxes.add(outbox, numbered(range(100, 200)))
        with outboxes.connected(outbox) as late:
            late.execute("BEGIN")
            outbox.add(late, numbered(range(1000, 1010)), topic="orders")
            outboxes.add(outbox, numbered(range(200, 210)))
            dump = server.dump()
            outboxes.add(outbox, numbered(range(3010, 3020)))  # which the restored server does not have
            lost = outboxes.query(outbox, "SELECT bucket, seq FROM {outbox} ORDER BY seq DESC LIMIT 10")
            until(lambda: relay.stats()["in_flight"] == 120, "that all of them are in flight")
            before = next_transaction(outbox)
            servers.append(server.replaced(dump))
        assert servers[1].conninfo == server.conninfo
        assert next_transaction(outbox) < before
        outboxes.add(outbox, numbered(range(210, 300)))
        assert set(lost) <= set(outboxes.query(outbox, "SELECT bucket, seq FROM {outbox}"))  # of others now
        cluster.set_broker_up()
        until(lambda: outbox.status().waiting == 0, "those that were restored, and new ones")
        with outboxes.transaction(outbox) as late:
            outbox.add(late, numbered(range(2000, 2010)), topic="orders")
            for first in range(300, 400, 20):
                outboxes.add(outbox, numbered(range(first, first + 20)))
            until(lambda: outbox.status().waiting == 0, "those of others")
        assert relay.drain(60) == 0
    records = read_back(cluster.bootstrap_servers, "orders")
    gone = {int(each.value or b"") for each in records} & set(range(3010, 3020))  # any of them may have been sent
    # What was in flight when the server changed is sent again, and what was read before the relay has noticed it.
    check_history([*range(400), *range(2000, 2010), *gone], records, copies=210, in_order=False)
    check_history(range(400), [each for each in records if int(each.value or b"") < 400], copies=210)
