"""Relays that are killed or stopped at any of their steps lose nothing, invent nothing, and keep the order of a key."""

import itertools
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kbatch
from kbatch import Relay, SqliteOutbox
from kbatch.testing import MockCluster
from tests import outboxes
from tests.outboxes import Outbox
from tests.relays import check_history, numbered
from tests.waiting import until

from .clients import read_back

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="platform: no SIGKILL")

ROOT = Path(__file__).parents[2]
ROUNDS = 4
IN_FLIGHT = 100


def config(cluster: MockCluster, timeout_ms: int = 30_000) -> dict[str, Any]:
    # What times out may be overtaken by what is in flight with it.
    return {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0, "delivery.timeout.ms": timeout_ms}


def start(outbox: Outbox, cluster: MockCluster, timeout_ms: int = 30_000, **settings: Any) -> subprocess.Popen[str]:
    given = {**outboxes.where(outbox), "config": config(cluster, timeout_ms), **settings}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "tests.mock.relay_program", json.dumps(given)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def outbox(new_outbox: Callable[..., Outbox]) -> Outbox:
    return new_outbox()


def let_leases_run_out(outbox: Outbox) -> None:
    """As if so much time had passed since its relays died."""
    for table in ("lease", "relay"):
        outboxes.query(outbox, f"UPDATE {{{table}}} SET until = 0")


@pytest.mark.long
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_relay_that_is_killed_at_one_of_its_steps(outbox: Outbox, kafka_cluster: MockCluster, seed: int) -> None:
    seeded = random.Random(seed)
    kafka_cluster.create_topic("orders", partitions=3)
    numbers = list(range(1000))
    kills = []
    while numbers or len(kills) < 4:
        count = seeded.randint(100, 300)
        outboxes.add(outbox, numbered(numbers[:count]))
        del numbers[:count]
        with start(outbox, kafka_cluster, kill_at=seeded.randint(1, 25)) as process:
            out, errors = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL), errors
        if process.returncode:
            kills.append(out.split()[-1])
        let_leases_run_out(outbox)
    with Relay(outbox, config(kafka_cluster)) as relay:
        assert relay.drain(60) == 0, f"killed at {kills}"
    check_history(range(1000), read_back(kafka_cluster.bootstrap_servers, "orders"), copies=IN_FLIGHT * len(kills))
    assert outbox.status() == kbatch.OutboxStatus(0, 0, 0, 0.0, 0)


@pytest.mark.long
def test_one_of_three_relays_is_killed_and_the_others_take_its_buckets(
    outbox: Outbox, kafka_cluster: MockCluster
) -> None:
    kafka_cluster.create_topic("orders", partitions=3)
    processes = [start(outbox, kafka_cluster, 2_000, drain=False) for _ in range(3)]
    try:
        until(lambda: outbox.status().relays == 3, "three relays")
        shares = "SELECT count(*) FROM {lease} WHERE owner IS NOT NULL GROUP BY owner ORDER BY 1"
        until(lambda: outboxes.query(outbox, shares) == [(20,), (22,), (22,)], "a third for each")
        for first in range(0, 1000, 100):
            outboxes.add(outbox, numbered(range(first, first + 100)))
            if first == 500:
                processes[1].kill()
        until(lambda: outbox.status().waiting == 0, "all sent")
        check_history(range(1000), read_back(kafka_cluster.bootstrap_servers, "orders"), copies=IN_FLIGHT)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.communicate(timeout=30)
    assert [process.returncode for process in processes] == [0, -signal.SIGKILL, 0]
    assert outboxes.query(outbox, "SELECT DISTINCT owner FROM {lease}") == [(None,)]


@pytest.mark.long
def test_start_several_take_away_the_first_take_away_another(outbox: Outbox, kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=3)
    shares = "SELECT count(*) FROM {lease} WHERE owner IS NOT NULL GROUP BY owner ORDER BY 1"
    processes: list[subprocess.Popen[str]] = []
    owners: list[str] = []
    added = 0

    def add() -> None:
        nonlocal added
        outboxes.add(outbox, numbered(range(added, added + 200)))
        added += 200

    try:
        for _ in range(3):
            processes.append(start(outbox, kafka_cluster, drain=False))
            until(lambda: outbox.status().relays == len(processes), "one more")
            found = [owner for (owner,) in outboxes.query(outbox, "SELECT owner FROM {relay}")]
            owners += [owner for owner in found if owner not in owners]
        until(lambda: outboxes.query(outbox, shares) == [(20,), (22,), (22,)], "a third for each")
        for taken, left in ((0, [(32,), (32,)]), (1, [(64,)])):
            add()
            processes[taken].kill()
            processes[taken].wait()
            for table in ("lease", "relay"):  # as if so much time had passed
                outboxes.query(outbox, f"UPDATE {{{table}}} SET until = 0 WHERE owner = '{owners[taken]}'")
            add()
            until(lambda left=left: outboxes.query(outbox, shares) == left, "its buckets are the others'")
            until(lambda: outbox.status().waiting == 0, "all sent")
        assert outboxes.query(outbox, "SELECT DISTINCT owner FROM {lease}") == [(owners[2],)]
        add()
        until(lambda: outbox.status().waiting == 0, "all sent")
        check_history(range(added), read_back(kafka_cluster.bootstrap_servers, "orders"), copies=2 * IN_FLIGHT)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.communicate(timeout=30)
    assert [process.returncode for process in processes] == [-signal.SIGKILL, -signal.SIGKILL, 0]


@pytest.mark.long
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="platform: no SIGSTOP")
def test_a_relay_that_was_stopped_past_its_lease_writes_nothing_to_the_database_and_sends_nothing_new(
    outbox: Outbox, kafka_cluster: MockCluster
) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    with start(outbox, kafka_cluster, 500, drain=False) as process:
        try:
            until(lambda: outbox.status().relays == 1, "the relay")
            kafka_cluster.set_rtt(-1, 300)
            kafka_cluster.start_request_tracking()
            outboxes.add(outbox, numbered(range(500)))
            until(lambda: kafka_cluster.produce_requests() >= 1, "something in flight")
            outboxes.stop_between_transactions(outbox, process.pid)
            outboxes.query(
                outbox,
                "UPDATE {lease} SET owner = 'another', token = token + 1, length = 3600000, until = {now} + 3600000",
            )
            time.sleep(6.0)  # of its lease of 8 seconds fewer are left than a hand-over needs
            kafka_cluster.set_rtt(-1, 0)
            kafka_cluster.clear_requests()
            before = outboxes.bodies(outbox)
            process.send_signal(signal.SIGCONT)
            until(lambda: outbox.status().relays == 1, "its sign of life")
            time.sleep(2.0)
            assert outboxes.bodies(outbox) == before
            assert kafka_cluster.produce_requests() <= 1  # of what librdkafka had in its queue
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.communicate(timeout=30)
    assert process.returncode == 0
    let_leases_run_out(outbox)
    with Relay(outbox, config(kafka_cluster)) as relay:
        assert relay.drain(60) == 0
    values = [int(record.value or b"") for record in read_back(kafka_cluster.bootstrap_servers, "orders")]
    assert set(values) == set(range(500))


APPLICATION = """
import sqlite3, sys
import kbatch
from tests.relays import numbered

outbox = kbatch.SqliteOutbox(sys.argv[1])
connection = sqlite3.connect(sys.argv[1], timeout=30)
(first,) = connection.execute("SELECT count(*) FROM orders").fetchone()
print("begun", flush=True)
while True:
    with connection:
        connection.executemany("INSERT INTO orders VALUES (?)", [(n,) for n in range(first, first + 7)])
        outbox.add(connection, numbered(range(first, first + 7)), topic="orders")
    first += 7
"""


APPLICATION_OF_POSTGRES = """
import sys
import psycopg
import kbatch
from tests.relays import numbered

conninfo, schema, table = sys.argv[1:]
outbox = kbatch.PostgresOutbox(conninfo, schema=schema)
connection = psycopg.connect(conninfo, autocommit=True)
(first,) = connection.execute(psycopg.sql.SQL("SELECT count(*) FROM " + table)).fetchone()
print("begun", flush=True)
while True:
    with connection.transaction():
        for n in range(first, first + 7):
            connection.execute("INSERT INTO " + table.replace("%", "%%") + " VALUES (%s)", (n,))
        outbox.add(connection, numbered(range(first, first + 7)), topic="orders")
    first += 7
"""


def test_an_application_that_is_killed_has_its_data_and_its_messages_or_neither(
    outbox: Outbox, kafka_cluster: MockCluster
) -> None:
    seeded = random.Random(7)
    kafka_cluster.create_topic("orders", partitions=3)
    in_sqlite = isinstance(outbox, SqliteOutbox)
    table = "orders" if in_sqlite else outboxes.in_schema(outbox, "orders")
    outboxes.run(outbox, f"CREATE TABLE {table} (n INTEGER PRIMARY KEY)")
    orders: list[int] = []
    for turn in itertools.count():
        program = APPLICATION if in_sqlite else APPLICATION_OF_POSTGRES
        command = [sys.executable, "-W", "error", "-c", program, *outboxes.where(outbox).values(), table]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            time.sleep(seeded.uniform(0.0, 0.05))
            process.kill()
        orders = [n for (n,) in outboxes.rows(outbox, f"SELECT n FROM {table} ORDER BY n")]
        assert orders == list(range(len(orders)))
        assert len(orders) % 7 == 0
        assert [int(body or b"") for body in outboxes.bodies(outbox)] == orders
        if turn >= 7 and orders:  # a busy machine may end many before they have committed anything
            break
    with Relay(outbox, config(kafka_cluster)) as relay:
        assert relay.drain(60) == 0
    check_history(orders, read_back(kafka_cluster.bootstrap_servers, "orders"))
