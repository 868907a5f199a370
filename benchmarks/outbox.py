"""What an outbox in SQLite costs beside the database alone: adding, relaying, and the time from commit to answer.

The yardstick is the standard library's sqlite3 with the same rows in the same run, turn by turn. The files are in a
temporary folder, in WAL mode with synchronous=FULL, as `SqliteOutbox.create` sets them.
"""

import contextlib
import itertools
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import kbatch
from benchmarks.broker import OpenBroker
from benchmarks.data import kbatch_envelopes
from benchmarks.durable import CALLERS, SENDS, Write, durable_sends
from benchmarks.figures import Section, figure

BULK = 1_000
SINGLES = 200  # adds of one envelope in a turn, in one transaction
ROWS = 50_000  # in the outbox when a relay begins
DELETED_AT_ONCE = 8_000  # by the yardstick, as much as a relay has in flight
COMMITS = 60
PARTITIONS = 32  # the mock cluster keeps 5 MiB of each

SINGLE_TARGET, BULK_TARGET = 1.4, 0.9
RELAY_TARGET, RELAY_ROWS_TARGET = 0.5, 180_000.0
LATENCY_P50_MS, LATENCY_P99_MS = 10.0, 120.0

_INSERT = "INSERT INTO kbatch_outbox (bucket, seq, id, packed, created_at, deliver_by) VALUES (?, ?, ?, ?, ?, ?)"


def outboxes(turns: int, open_broker: OpenBroker) -> Iterator[Section]:
    """The sections of an outbox in SQLite: adding; sending durably; relaying and latency."""
    with tempfile.TemporaryDirectory(prefix="kbatch-outbox-") as folder:
        yield _adding(turns, Path(folder))
        yield _durable(max(3, turns // 3), Path(folder))
    with tempfile.TemporaryDirectory(prefix="kbatch-outbox-") as folder, open_broker() as broker:
        yield _relaying(max(3, turns // 3), Path(folder), broker)


class _Shop:
    """A database with an outbox, and a connection of an application."""

    def __init__(self, path: Path) -> None:
        self.outbox = kbatch.SqliteOutbox(path)
        self.outbox.create()
        self.connection = sqlite3.connect(path, isolation_level=None, timeout=60)
        self.connection.execute("PRAGMA synchronous=FULL")

    def close(self) -> None:
        self.connection.close()

    def rows(self) -> list[tuple[Any, ...]]:
        """What is in the outbox, as it was inserted."""
        columns = "bucket, seq, id, packed, created_at, deliver_by"
        return self.connection.execute(f"SELECT {columns} FROM kbatch_outbox ORDER BY seq").fetchall()

    def clear(self) -> None:
        self.connection.execute("DELETE FROM kbatch_outbox")


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _within(shop: _Shop, call: Callable[[], object]) -> float:
    """Seconds of a call in an open transaction, which is then rolled back."""
    shop.connection.execute("BEGIN IMMEDIATE")
    try:
        return _timed(call)
    finally:
        shop.connection.execute("ROLLBACK")


def _adding(turns: int, folder: Path) -> Section:
    section = Section(
        "Outbox in SQLite: add, in an open transaction, and statements of sqlite3 with the same rows of 8 headers",
        "outbox-sqlite",
    )
    shop = _Shop(folder / "add.db")
    envelopes = kbatch_envelopes(BULK)
    topic = "orders"
    with shop.connection:
        shop.connection.execute("BEGIN IMMEDIATE")
        shop.outbox.add(shop.connection, envelopes, topic=topic)
    rows = shop.rows()
    shop.clear()
    connection, outbox = shop.connection, shop.outbox

    def add_all() -> None:
        outbox.add(connection, envelopes, topic=topic)

    def insert_all() -> None:
        connection.executemany(_INSERT, rows)

    def add_singly() -> None:
        for envelope in envelopes[:SINGLES]:
            outbox.add(connection, [envelope], topic=topic)

    def insert_singly() -> None:
        for row in rows[:SINGLES]:
            connection.execute(_INSERT, row)

    for name, mine, its, count in (
        ("one at a time", add_singly, insert_singly, SINGLES),
        (f"{BULK:,} at a time", add_all, insert_all, BULK),
    ):
        pairs = [(_within(shop, mine), _within(shop, its)) for _ in range(turns + 1)][1:]
        section.figures += [
            figure(f"{name}: add", [one / count * 1e6 for one, _ in pairs], unit=" µs"),
            figure(f"{name}: sqlite3 alone", [other / count * 1e6 for _, other in pairs], unit=" µs"),
        ]
        if count == BULK:
            ratios = [other / one for one, other in pairs]
            section.figures.append(figure(f"{name}: rate of add / executemany", ratios, target=BULK_TARGET))
        else:
            ratios = [one / other for one, other in pairs]
            section.figures.append(figure(f"{name}: time of add / execute", ratios, target=SINGLE_TARGET, at_most=True))
    shop.close()
    return section


def _durable(turns: int, folder: Path) -> Section:
    section = Section(
        f"Outbox in SQLite: durable sends of {CALLERS} callers, and a bare group commit of sqlite3", "outbox-sqlite"
    )
    shop = _Shop(folder / "durable.db")
    with shop.connection:
        shop.connection.execute("BEGIN IMMEDIATE")
        shop.outbox.add(shop.connection, kbatch_envelopes(SENDS), topic="orders")
    rows = shop.rows()
    shop.clear()

    @contextlib.contextmanager
    def writing() -> Iterator[Write]:
        numbers = itertools.count(1)
        with contextlib.closing(sqlite3.connect(folder / "durable.db", isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous=FULL")

            def write(chosen: list[int]) -> None:
                connection.execute("BEGIN IMMEDIATE")
                group = [(bucket, next(numbers), *rest) for bucket, _, *rest in (rows[each] for each in chosen)]
                connection.executemany(_INSERT, group)
                connection.execute("COMMIT")

            yield write

    durable_sends(section, shop.outbox, writing, shop.clear, turns)
    shop.close()
    return section


def _relaying(turns: int, folder: Path, broker: Any) -> Section:
    section = Section(
        f"Outbox in SQLite: a relay in this process with {ROWS:,} rows, and sqlite3 that reads and deletes them",
        "outbox-sqlite",
    )
    envelopes = kbatch_envelopes(5_000)
    rates: list[float] = []
    bare: list[float] = []
    for turn in range(turns):
        topic = broker.new_topic("outbox", PARTITIONS)
        shop = _Shop(folder / f"relay-{turn}.db")
        _fill(shop, envelopes, topic)
        rates.append(ROWS / _relay_all(shop, broker, topic))
        _fill(shop, envelopes, topic)
        bare.append(ROWS / _timed(partial(_read_and_delete, shop)))
        shop.close()
    section.figures += [
        figure("relay, rows/s", rates, target=RELAY_ROWS_TARGET, digits=0),
        figure("sqlite3 alone, rows/s", bare, digits=0),
        figure(
            "relay / sqlite3 alone",
            [one / other for one, other in zip(rates, bare, strict=True)],
            target=RELAY_TARGET,
        ),
    ]
    shop = _Shop(folder / "latency.db")
    latencies = sorted(_latencies(shop, broker.bootstrap_servers, broker.new_topic("latency", 4)))
    shop.close()
    section.figures += [
        figure("commit to acknowledgement, idle relay in this process, p50", [median(latencies) * 1e3], unit=" ms",
               target=LATENCY_P50_MS, at_most=True),
        figure("  p99", [latencies[int(0.99 * len(latencies))] * 1e3], unit=" ms", target=LATENCY_P99_MS, at_most=True),
    ]  # fmt: skip
    return section


def _fill(shop: _Shop, envelopes: list["kbatch.Envelope[Any]"], topic: str) -> None:
    for _ in range(ROWS // len(envelopes)):
        shop.connection.execute("BEGIN IMMEDIATE")
        shop.outbox.add(shop.connection, envelopes, topic=topic)
        shop.connection.execute("COMMIT")


def _relay_all(shop: _Shop, broker: Any, topic: str) -> float:
    """Seconds from when a relay that is connected begins until its outbox is empty."""
    config = {"bootstrap.servers": broker.bootstrap_servers}
    with kbatch.Producer(config, max_in_flight=10_000) as producer, kbatch.Relay(shop.outbox, producer) as relay:
        producer.send_batch(topic, [kbatch.Envelope(data=b"0")]).raise_for_errors()
        spent = _timed(relay.drain)
        if relay.stats()["acked"] != ROWS:
            raise RuntimeError(f"{relay.stats()['acked']} of {ROWS} rows were acknowledged")
        return spent


def _read_and_delete(shop: _Shop) -> None:
    connection = shop.connection
    while True:
        places: list[tuple[int, int]] = []
        for bucket in range(64):
            for row in connection.execute(
                "SELECT bucket, seq, packed, deliver_by FROM kbatch_outbox WHERE bucket = ? ORDER BY seq LIMIT ?",
                (bucket, DELETED_AT_ONCE // 64),
            ):
                places.append(row[:2])
        if not places:
            return
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("DELETE FROM kbatch_outbox WHERE bucket = ? AND seq = ?", places)
        connection.execute("COMMIT")


def _latencies(shop: _Shop, servers: str, topic: str) -> Iterator[float]:
    """Seconds from a commit until the broker has answered, of an application that adds now and then."""
    with kbatch.Relay(shop.outbox, {"bootstrap.servers": servers}) as relay:
        thread = threading.Thread(target=relay.run)
        thread.start()
        try:
            for n in range(COMMITS + 1):
                time.sleep(0.15 + 0.001 * (n * 37 % 100))  # the relay has slowed its polling down
                shop.connection.execute("BEGIN IMMEDIATE")
                shop.outbox.add(shop.connection, [kbatch.Envelope(data=b"1", key="k")], topic=topic)
                shop.connection.execute("COMMIT")
                began = time.perf_counter()
                while relay.stats()["acked"] <= n:
                    time.sleep(0.0002)
                if n:  # the first one connects
                    yield time.perf_counter() - began
        finally:
            relay.stop()
            thread.join()
