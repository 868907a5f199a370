"""What an outbox in PostgreSQL costs beside the database alone: adding, relaying, sending durably, and latency.

The yardstick is psycopg with the same rows in the same run, turn by turn. The server is started for it, with fsync on,
and is stopped afterwards; client, server and relay share the machine.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import kbatch
from benchmarks.broker import OpenBroker
from benchmarks.data import kbatch_envelopes
from benchmarks.durable import CALLERS, SENDS, Write, durable_sends
from benchmarks.figures import Section, figure
from benchmarks.postgres import postgres

BULK = 1_000
SINGLES = 200
ROWS = 50_000
COMMITS = 60
DELETED_AT_ONCE = 8_000
PARTITIONS = 32

SINGLE_TARGET, BULK_TARGET = 1.1, 1.5
RELAY_TARGET, RELAY_ROWS_TARGET, SAME_TARGET = 0.5, 120_000.0, 0.9

_COLUMNS = "bucket, id, packed, created_at, deliver_by"
_INSERT = f"INSERT INTO kbatch_outbox ({_COLUMNS}) VALUES (%s, %s, %s, %s, %s)"


def postgres_outboxes(turns: int, open_broker: OpenBroker) -> Iterator[Section]:
    """The sections of an outbox in PostgreSQL; none where its programs are not installed."""
    with postgres() as conninfo:
        if conninfo is None:
            return
        yield _adding(turns, conninfo)
        yield _durable(max(3, turns // 3), conninfo)
        with open_broker() as broker:
            yield _relaying(max(3, turns // 3), conninfo, broker)


def _connected(conninfo: str | None, **options: Any) -> Any:
    import psycopg

    assert conninfo is not None  # of the outboxes here
    return psycopg.connect(conninfo, **options)


def _made(conninfo: str, **options: Any) -> kbatch.PostgresOutbox:
    outbox = kbatch.PostgresOutbox(conninfo, **options)
    outbox.create()
    return outbox


def _clear(conninfo: str) -> None:
    with _connected(conninfo, autocommit=True) as connection:
        connection.execute("TRUNCATE kbatch_outbox")
        connection.execute("UPDATE kbatch_outbox_lease SET owner = NULL, until = 0")


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _adding(turns: int, conninfo: str) -> Section:
    section = Section(
        "Outbox in PostgreSQL: add, in an open transaction, and statements of psycopg with the same rows of 8 headers",
        "outbox-postgres",
    )
    outbox = _made(conninfo)
    envelopes = kbatch_envelopes(BULK)
    with _connected(conninfo) as connection:
        outbox.add(connection, envelopes, topic="orders")
        rows = connection.execute(f"SELECT {_COLUMNS} FROM kbatch_outbox ORDER BY seq").fetchall()
        connection.rollback()

        def within(call: Callable[[], object]) -> float:
            connection.execute("SELECT 1")
            try:
                return _timed(call)
            finally:
                connection.rollback()

        def add_all() -> None:
            outbox.add(connection, envelopes, topic="orders")

        def insert_all() -> None:
            with connection.cursor() as cursor:
                cursor.executemany(_INSERT, rows)

        def add_singly() -> None:
            for envelope in envelopes[:SINGLES]:
                outbox.add(connection, [envelope], topic="orders")

        def insert_singly() -> None:
            for row in rows[:SINGLES]:
                connection.execute(_INSERT, row)

        for name, mine, its, count in (
            ("one at a time", add_singly, insert_singly, SINGLES),
            (f"{BULK:,} at a time", add_all, insert_all, BULK),
        ):
            pairs = [(within(mine), within(its)) for _ in range(turns + 1)][1:]
            section.figures += [
                figure(f"{name}: add", [one / count * 1e6 for one, _ in pairs], unit=" µs"),
                figure(f"{name}: psycopg alone", [other / count * 1e6 for _, other in pairs], unit=" µs"),
            ]
            if count == BULK:
                ratios = [other / one for one, other in pairs]
                section.figures.append(figure(f"{name}: rate of add / executemany", ratios, target=BULK_TARGET))
            else:
                ratios = [one / other for one, other in pairs]
                section.figures.append(
                    figure(f"{name}: time of add / execute", ratios, target=SINGLE_TARGET, at_most=True)
                )
    return section


# -- sending durably


def _durable(turns: int, conninfo: str) -> Section:
    section = Section(
        f"Outbox in PostgreSQL: durable sends of {CALLERS} callers, and a bare group commit of psycopg",
        "outbox-postgres",
    )
    outbox = _made(conninfo)
    with _connected(conninfo) as connection:
        outbox.add(connection, kbatch_envelopes(SENDS), topic="orders")
        rows = connection.execute(f"SELECT {_COLUMNS} FROM kbatch_outbox ORDER BY seq").fetchall()
        connection.rollback()

    @contextlib.contextmanager
    def writing() -> Iterator[Write]:
        with _connected(conninfo) as connection, connection.cursor() as cursor:

            def write(numbers: list[int]) -> None:
                cursor.executemany(_INSERT, [rows[number] for number in numbers])
                connection.commit()

            yield write

    durable_sends(section, outbox, writing, lambda: _clear(conninfo), turns)
    return section


# -- relaying


def _relaying(turns: int, conninfo: str, broker: Any) -> Section:
    section = Section(
        f"Outbox in PostgreSQL: a relay in this process with {ROWS:,} rows, and psycopg that reads and deletes them",
        "outbox-postgres",
    )
    outbox = _made(conninfo)
    envelopes = kbatch_envelopes(5_000)
    topic = broker.new_topic("outbox", PARTITIONS)
    rates: list[float] = []
    bare: list[float] = []
    pinned: list[float] = []
    for _ in range(turns):
        # Each begins with tables as large as the others', and with no rows that are deleted and not vacuumed.
        _clear(conninfo)
        _fill(outbox, envelopes, topic, ROWS)
        rates.append(ROWS / _relay_all(outbox, broker, topic, ROWS))
        _clear(conninfo)
        _fill(outbox, envelopes, topic, ROWS)
        bare.append(ROWS / _timed(lambda: _read_and_delete(conninfo)))
        _clear(conninfo)
        with _connected(conninfo) as other:
            other.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            other.execute("SELECT count(*) FROM kbatch_outbox")
            _fill(outbox, envelopes, topic, ROWS)
            pinned.append(ROWS / _relay_all(outbox, broker, topic, ROWS))
    _clear(conninfo)
    section.figures += [
        figure("relay, rows/s", rates, target=RELAY_ROWS_TARGET, digits=0),
        figure("psycopg alone, rows/s", bare, digits=0),
        figure(
            "relay / psycopg alone",
            [one / other for one, other in zip(rates, bare, strict=True)],
            target=RELAY_TARGET,
        ),
        figure(
            "with a snapshot pinned elsewhere / without",
            [one / other for one, other in zip(pinned, rates, strict=True)],
            target=SAME_TARGET,
        ),
    ]
    own, plain, notified = outbox, kbatch.PostgresOutbox(conninfo), kbatch.PostgresOutbox(conninfo, notify=True)
    of_relay = kbatch.PostgresOutbox(conninfo, notify=True)
    for how, mine, other, p50, p99 in (
        ("in this process", own, own, 10.0, 120.0),
        ("in another, that polls", plain, own, None, 120.0),
        ("in another, with NOTIFY", notified, of_relay, 5.0, 20.0),
    ):
        topic = broker.new_topic("latency", 4)
        latencies = sorted(_latencies(mine, other, broker.bootstrap_servers, topic))
        section.figures += [
            figure(f"commit to acknowledgement, idle relay {how}, p50", [median(latencies) * 1e3], unit=" ms",
                   target=p50, at_most=p50 is not None),
            figure("  p99", [latencies[int(0.99 * len(latencies))] * 1e3], unit=" ms", target=p99, at_most=True),
        ]  # fmt: skip
    return section


def _fill(outbox: kbatch.PostgresOutbox, envelopes: list["kbatch.Envelope[Any]"], topic: str, count: int) -> None:
    with _connected(outbox._conninfo) as connection:
        for _ in range(count // len(envelopes)):
            outbox.add(connection, envelopes, topic=topic)
            connection.commit()


def _relay_all(outbox: kbatch.PostgresOutbox, broker: Any, topic: str, count: int) -> float:
    """Seconds from when a relay that is connected begins until its outbox is empty."""
    config = {"bootstrap.servers": broker.bootstrap_servers}
    with kbatch.Producer(config, max_in_flight=10_000) as producer, kbatch.Relay(outbox, producer) as relay:
        producer.send_batch(topic, [kbatch.Envelope(data=b"0")]).raise_for_errors()
        spent = _timed(relay.drain)
        if relay.stats()["acked"] != count:
            raise RuntimeError(f"{relay.stats()['acked']} of {count} rows were acknowledged")
        return spent


def _read_and_delete(conninfo: str) -> None:
    with _connected(conninfo) as connection:
        while True:
            rows = connection.execute(
                "SELECT bucket, seq, packed, deliver_by FROM kbatch_outbox ORDER BY bucket, seq LIMIT %s",
                (DELETED_AT_ONCE,),
            ).fetchall()
            if not rows:
                return
            connection.execute(
                "DELETE FROM kbatch_outbox AS gone USING unnest(%s::smallint[], %s::bigint[]) AS place (bucket, seq) "
                "WHERE gone.bucket = place.bucket AND gone.seq = place.seq",
                ([row[0] for row in rows], [row[1] for row in rows]),
            )
            connection.commit()


def _latencies(
    outbox: kbatch.PostgresOutbox, of_relay: kbatch.PostgresOutbox, servers: str, topic: str, **options: Any
) -> Iterator[float]:
    """Seconds from a commit until the broker has answered. Another object is as one of another process."""
    with (
        kbatch.Relay(of_relay, {"bootstrap.servers": servers}, **options) as relay,
        _connected(outbox._conninfo) as connection,
    ):
        thread = threading.Thread(target=relay.run)
        thread.start()
        try:
            time.sleep(2.5)  # it has said that it is idle
            for n in range(COMMITS + 1):
                time.sleep(0.15 + 0.001 * (n * 37 % 100))
                outbox.add(connection, [kbatch.Envelope(data=b"1", key="k")], topic=topic)
                connection.commit()
                began = time.perf_counter()
                while relay.stats()["acked"] <= n:
                    time.sleep(0.0002)
                if n:  # the first one connects
                    yield time.perf_counter() - began
        finally:
            relay.stop()
            thread.join()
