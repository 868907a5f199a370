"""How a relay's rate depends on what is in the outbox, on how many relays there are, and on `fencing="kafka"`.

The outbox is in PostgreSQL, which is started for it with fsync on. Relays are processes of their own. Rows are copies
of 20,000 that `add` has packed. They are inserted while all relays, which are connected and have shared the buckets,
are stopped by SIGSTOP. The clock starts when they go on.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from types import TracebackType
from typing import Any

import kbatch
from benchmarks.broker import Broker, OpenBroker
from benchmarks.data import kbatch_envelopes
from benchmarks.database import Database
from benchmarks.figures import Section, figure
from benchmarks.outbox_postgres import _clear, _connected, _latencies, _made
from benchmarks.postgres import postgres
from benchmarks.relay_process import Count, Options
from benchmarks.worker import Worker

SEED = 20_000  # rows that are copied
BACKLOGS = (50_000, 300_000, 1_000_000, 5_000_000)
FIRST = 40_000  # rows of a backlog that are timed
RELAYS = (1, 2, 4)
ROWS = 300_000  # for several relays
FENCED_ROWS = 100_000
BUCKETS = 64
PARTITIONS = 32
SAME_TARGET = 0.9
LEASE_S = 300.0  # longer than they are stopped
PATIENCE_S = 120.0
#: Without checkpoints in the middle of a fill.
SETTINGS = {"shared_buffers": "512MB", "max_wal_size": "8GB"}

_COLUMNS = "bucket, id, packed, created_at, deliver_by"


class _Database:
    """A server with 20,000 packed rows, for a topic."""

    def __init__(self, conninfo: str, topic: str) -> None:
        self.conninfo = conninfo
        self.topic = topic
        outbox = _made(conninfo)
        with _connected(conninfo) as connection:
            outbox.add(connection, kbatch_envelopes(SEED), topic=topic)
            connection.execute(
                f"CREATE TABLE seed AS SELECT row_number() OVER (ORDER BY seq) AS n, {_COLUMNS} FROM kbatch_outbox"
            )
            connection.execute("DELETE FROM kbatch_outbox")

    def make(self, prefix: str) -> None:
        _made(self.conninfo, prefix=prefix)

    def insert(self, connection: Any, prefix: str, count: int) -> None:
        while count > 0:
            connection.execute(
                f"INSERT INTO {prefix}outbox ({_COLUMNS}) "
                "SELECT bucket, gen_random_uuid(), packed, created_at, deliver_by FROM seed WHERE n <= %s ORDER BY n",
                (count,),
            )
            count -= SEED

    def settle(self, prefix: str) -> None:
        """What autovacuum and the checkpointer do after so many rows. Else the first statements that change a page
        write all of it into the log, and only those that find it changed already do not."""
        with _connected(self.conninfo, autocommit=True) as connection:
            connection.execute(f"VACUUM (ANALYZE) {prefix}outbox")
            connection.execute("CHECKPOINT")


@contextmanager
def _database(open_broker: OpenBroker) -> Iterator[tuple[_Database, Broker] | None]:
    """None where PostgreSQL's programs are not installed."""
    with postgres(**SETTINGS) as conninfo, open_broker() as broker:
        yield (_Database(conninfo, broker.new_topic("outbox", PARTITIONS)), broker) if conninfo else None


class _Relays:
    """Several on one outbox, which are connected and have shared its buckets."""

    def __init__(self, database: _Database, prefix: str, broker: Broker, number: int = 1, **relay: Any) -> None:
        self._database = database
        self._prefix = prefix
        relay = {"lease_s": LEASE_S, **relay}
        options = Options(Database("PostgreSQL", database.conninfo, prefix), broker.bootstrap_servers, relay)
        with ExitStack() as stack:
            self._relays = [stack.enter_context(Worker("benchmarks.relay_process", options)) for _ in range(number)]
            least = BUCKETS // number
            self._await(lambda counts: all(each.buckets >= least for each in counts))
            self._stack = stack.pop_all()

    def __enter__(self) -> "_Relays":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def _counts(self) -> list[Count]:
        return [relay.ask(Count) for relay in self._relays]

    def await_acked(self, number: int) -> None:
        self._await(lambda counts: sum(count.acked for count in counts) >= number)

    def _await(self, done: Callable[[list[Count]], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not done(self._counts()):
            if time.monotonic() > end:
                raise RuntimeError(f"after {PATIENCE_S:.0f} s the relays are at {self._counts()}")
            time.sleep(0.001)

    def rate(self, rows: int) -> float:
        """Rows a second, from when so many are there until brokers have acknowledged them."""
        some = min(rows, SEED // 4)
        with _connected(self._database.conninfo) as connection:
            self._database.insert(connection, self._prefix, some)
        self.await_acked(some)  # they have connected to the brokers, and know the topic
        for relay in self._relays:
            relay.signal(signal.SIGSTOP)
        with _connected(self._database.conninfo) as connection:
            self._database.insert(connection, self._prefix, rows)
        began = time.perf_counter()
        for relay in self._relays:
            relay.signal(signal.SIGCONT)
        self.await_acked(some + rows)
        return rows / (time.perf_counter() - began)


# -- over the backlog


def backlogs(turns: int, sizes: Sequence[int], open_broker: OpenBroker) -> Iterator[Section]:
    """Each backlog is in an outbox of its own. What a turn took is put back after it, and the outbox is settled."""
    with _database(open_broker) as opened:
        if opened is None:
            return
        database, broker = opened
        section = Section(
            f"Outbox in PostgreSQL: a relay's rate over the first {FIRST:,} rows, by how many there are",
            "outbox-backlog",
            {"rows": list(sizes)},
        )
        began = time.perf_counter()
        for size in sizes:
            database.make(f"of{size}_")
            with _connected(database.conninfo) as connection:
                database.insert(connection, f"of{size}_", size)
        section.notes.append(f"the outboxes were filled in {time.perf_counter() - began:.0f} s")
        rates: dict[int, list[float]] = {size: [] for size in sizes}
        for turn in range(turns + 1):
            for size in sizes:
                database.settle(f"of{size}_")
                rate = _first_rows(database, f"of{size}_", broker)
                if turn:  # the first warms up
                    rates[size].append(rate)
        for size in sizes:
            section.figures.append(figure(f"{size:,} rows, rows/s", rates[size], digits=0))
        least = min(sizes)
        for size in sizes:
            if size != least:
                ratios = [one / other for one, other in zip(rates[size], rates[least], strict=True)]
                section.figures.append(figure(f"{size:,} rows / {least:,} rows", ratios, target=SAME_TARGET))
        yield section


def _first_rows(database: _Database, prefix: str, broker: Broker) -> float:
    """Rows a second, by a relay of this process whose producer is connected."""
    outbox = kbatch.PostgresOutbox(database.conninfo, prefix=prefix)
    config = {"bootstrap.servers": broker.bootstrap_servers}
    with kbatch.Producer(config, max_in_flight=10_000) as producer, kbatch.Relay(outbox, producer) as relay:
        producer.send_batch(database.topic, [kbatch.Envelope(data=b"0")]).raise_for_errors()
        thread = threading.Thread(target=relay.run)
        began = time.perf_counter()
        thread.start()
        try:
            while relay.stats()["acked"] < FIRST:
                if not thread.is_alive():
                    raise RuntimeError("the relay has ended")
                time.sleep(0.0005)
            rate = FIRST / (time.perf_counter() - began)
        finally:
            relay.stop()
            thread.join()
        gone = relay.stats()["acked"]
    with _connected(database.conninfo) as connection:
        database.insert(connection, prefix, gone)
    return rate


# -- over the number of relays


def numbers(turns: int, rows: int, open_broker: OpenBroker) -> Iterator[Section]:
    with _database(open_broker) as opened:
        if opened is None:
            return
        database, broker = opened
        section = Section(
            f"Outbox in PostgreSQL: {rows:,} rows and several relays, each a process",
            "outbox-relays",
            {"relays": list(RELAYS)},
        )
        rates: dict[int, list[float]] = {number: [] for number in RELAYS}
        for _ in range(turns):
            for number in RELAYS:
                with _Relays(database, "kbatch_", broker, number) as relays:
                    rates[number].append(relays.rate(rows))
                _clear(database.conninfo)
        for number in RELAYS:
            section.figures.append(
                figure(f"{number} relay{'s' if number > 1 else ''}, rows/s", rates[number], digits=0)
            )
        for number in RELAYS[1:]:
            ratios = [one / other for one, other in zip(rates[number], rates[1], strict=True)]
            section.figures.append(figure(f"{number} relays / 1", ratios))
        yield section


# -- with fencing


def fencing(turns: int, rows: int, open_broker: OpenBroker) -> Iterator[Section]:
    with _database(open_broker) as opened:
        if opened is None:
            return
        database, broker = opened
        section = Section(
            f'Outbox in PostgreSQL: a relay with fencing="kafka" and one without, {rows:,} rows', "outbox-fencing"
        )
        ways: dict[str, dict[str, Any]] = {
            "without": {},
            "without, one batch in flight": {"max_in_flight_batches": 1},
            "with fencing": {"fencing": "kafka"},
            "with fencing, batches of 10,000": {"fencing": "kafka", "batch_size": 10_000},
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(turns):
            for name, options in ways.items():
                with _Relays(database, "kbatch_", broker, **options) as relays:
                    rates[name].append(relays.rate(rows))
                _clear(database.conninfo)
        section.figures += [figure(f"{name}, rows/s", rates[name], digits=0) for name in ways]
        for name in list(ways)[1:]:
            ratios = [one / other for one, other in zip(rates[name], rates["without"], strict=True)]
            section.figures.append(figure(f"{name} / without", ratios))
        for name in ("without", "with fencing"):
            outbox = kbatch.PostgresOutbox(database.conninfo)
            topic = broker.new_topic("latency", 4)
            found = sorted(_latencies(outbox, outbox, broker.bootstrap_servers, topic, **ways[name]))
            section.figures += [
                figure(f"{name}, commit to acknowledgement of one record, p50", [median(found) * 1e3], unit=" ms"),
                figure("  p99", [found[int(0.99 * len(found))] * 1e3], unit=" ms"),
            ]
        section.settings["ways"] = list(ways)
        yield section
