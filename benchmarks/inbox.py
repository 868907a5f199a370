"""What an inbox costs beside the database alone: marking, and messages from Kafka to a handler's row.

Of marking the yardsticks are statements of sqlite3 and psycopg with the same ids in the same run, turn by turn, each
rolled back. SQLite's files are in a temporary folder, in WAL mode with synchronous=FULL. PostgreSQL is started for it,
with fsync=off where processors are compared, and with fsync=on from Kafka to a row.
"""

import sqlite3
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import confluent_kafka

import kbatch
from benchmarks.broker import OpenBroker
from benchmarks.data import kbatch_envelopes
from benchmarks.figures import Section, figure
from benchmarks.pacer import Options, Sent
from benchmarks.postgres import postgres
from benchmarks.worker import Worker

BULK = 1_000
SINGLES = 200  # marks of one id in a turn, in one transaction
MESSAGES = 10_000  # of a listener, for handlers of batches
SINGLE_MESSAGES = 2_000
HANDLERS = 4
HANDLERS_BATCH = 500
GROUP = "bench"
PATIENCE_S = 120.0
MOST_PACED = 20_000  # a second: the sender shares the processors

BULK_TARGET = 0.75


def inboxes(turns: int, open_broker: OpenBroker) -> Iterator[Section]:
    """The sections of marking."""
    del open_broker
    with ExitStack() as stack:
        for side in _databases(stack, fsync="off"):
            yield _marking(turns, side)


def handlings(turns: int, open_broker: OpenBroker) -> Iterator[Section]:
    """From Kafka to rows, as fast as it goes."""
    with ExitStack() as stack:
        sides = _databases(stack, fsync="on")
        yield _handling(turns, sides, stack.enter_context(open_broker()))


def half_loads(seconds: float, open_broker: OpenBroker) -> Iterator[Section]:
    """From Kafka to rows, at half of what goes."""
    with ExitStack() as stack:
        sides = _databases(stack, fsync="on")
        yield _half_load(seconds, sides, stack.enter_context(open_broker()))


def _databases(stack: ExitStack, fsync: str) -> list[Any]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kbatch-inbox-")))
    sides: list[Any] = [_Sqlite(folder)]
    if conninfo := stack.enter_context(postgres(fsync)):
        sides.append(_Postgres(conninfo))
    for side in sides:
        stack.callback(side.connection.close)
    return sides


class _Sqlite:
    name = "SQLite"
    insert = "INSERT INTO effects (n) VALUES (?)"

    def __init__(self, folder: Path) -> None:
        self.inbox: Any = kbatch.SqliteInbox(folder / "inbox.db")
        self.inbox.create()
        self.connection: Any = sqlite3.connect(folder / "inbox.db", isolation_level=None, timeout=60)
        self.connection.execute("PRAGMA synchronous=FULL")
        self.connection.execute("CREATE TABLE effects (n INTEGER)")
        self.connection.execute(
            "CREATE TABLE bare (number INTEGER PRIMARY KEY, group_id TEXT, id BLOB, handled_at INTEGER, "
            "UNIQUE (id, group_id))"
        )
        self.begin = "BEGIN IMMEDIATE"
        self.bulk_name = "executemany"

    def insert_id(self, group: str, id_: uuid.UUID) -> bool:
        cursor = self.connection.execute(
            "INSERT INTO bare (group_id, id, handled_at) VALUES (?, ?, ?) ON CONFLICT DO NOTHING", (group, id_.bytes, 0)
        )
        return bool(cursor.rowcount)

    def insert_ids(self, group: str, ids: list[uuid.UUID]) -> None:
        self.connection.executemany(
            "INSERT INTO bare (group_id, id, handled_at) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            [(group, id_.bytes, 0) for id_ in ids],
        )

    def clear(self) -> None:
        self.connection.execute("DELETE FROM effects")


class _Postgres:
    name = "PostgreSQL"
    insert = "INSERT INTO effects (n) VALUES (%s)"

    def __init__(self, conninfo: str) -> None:
        import psycopg

        self.inbox: Any = kbatch.PostgresInbox(conninfo)
        self.inbox.create()
        self.connection: Any = psycopg.connect(conninfo, autocommit=True)
        self.connection.execute("CREATE TABLE effects (n integer)")
        self.connection.execute(
            'CREATE TABLE bare (group_id text COLLATE "C" NOT NULL, id uuid NOT NULL, '
            "handled_at timestamptz NOT NULL DEFAULT clock_timestamp(), PRIMARY KEY (id, group_id))"
        )
        self.begin = "BEGIN"
        self.bulk_name = "INSERT … SELECT unnest"

    def insert_id(self, group: str, id_: uuid.UUID) -> bool:
        cursor = self.connection.execute(
            "INSERT INTO bare (group_id, id) VALUES (%s, %s) ON CONFLICT DO NOTHING", (group, id_)
        )
        return bool(cursor.rowcount)

    def insert_ids(self, group: str, ids: list[uuid.UUID]) -> None:
        self.connection.execute(
            "INSERT INTO bare (group_id, id) SELECT %s, unnest(%s::uuid[]) ON CONFLICT DO NOTHING", (group, ids)
        )

    def clear(self) -> None:
        self.connection.execute("TRUNCATE effects")


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _within(side: Any, call: Callable[[], object]) -> float:
    """Seconds of a call in an open transaction, which is then rolled back."""
    side.connection.execute(side.begin)
    try:
        return _timed(call)
    finally:
        side.connection.execute("ROLLBACK")


def _marking(turns: int, side: Any) -> Section:
    section = Section(
        f"Inbox in {side.name}: accept, in an open transaction, and statements with the same ids", "inbox"
    )
    connection, inbox = side.connection, side.inbox

    def accept_all(envelopes: list[Any]) -> None:
        if not all(inbox.accept_many(connection, envelopes, group=GROUP)):
            raise RuntimeError("an id that is new was taken for a duplicate")

    def accept_singly(envelopes: list[Any]) -> None:
        for envelope in envelopes:
            inbox.accept(connection, envelope, group=GROUP)

    def insert_singly(envelopes: list[Any]) -> None:
        for envelope in envelopes:
            side.insert_id(GROUP, envelope.id)

    def insert_all(envelopes: list[Any]) -> None:
        side.insert_ids(GROUP, [envelope.id for envelope in envelopes])

    for name, mine, its, count in (
        ("one at a time", accept_singly, insert_singly, SINGLES),
        (f"{BULK:,} at a time", accept_all, insert_all, BULK),
    ):
        pairs = []
        for _ in range(turns + 1):
            # Ids of their own, as a listener's: what is rolled back stays in the tables until they are cleaned up.
            first, second = kbatch_envelopes(count), kbatch_envelopes(count)
            pairs.append((_within(side, partial(mine, first)), _within(side, partial(its, second))))
        del pairs[0]
        other = "a bare INSERT" if count == SINGLES else side.bulk_name
        section.figures += [
            figure(f"{name}: accept", [one / count * 1e6 for one, _ in pairs], unit=" µs"),
            figure(f"{name}: {other}", [two / count * 1e6 for _, two in pairs], unit=" µs"),
        ]
        ratios = [two / one for one, two in pairs]
        target = BULK_TARGET if count == BULK and side.name == "PostgreSQL" else None
        section.figures.append(figure(f"{name}: rate of accept / {other}", ratios, target=target))
    return section


# -- from Kafka to rows

_NOTHING = "no inbox, nothing done"


def _ways(sides: list[Any]) -> list[tuple[str, Any, int | None]]:
    """What it is called, the database, and how many are handled together."""
    return [
        (f"{_NOTHING if side is None else side.name}, {'one at a time' if batch is None else f'batches of {batch}'}",
         side, batch)
        for side in (None, *sides) for batch in (None, HANDLERS_BATCH)
    ]  # fmt: skip


def _handling(turns: int, sides: list[Any], broker: Any) -> Section:
    section = Section(
        f"From Kafka to a handler's row: a listener of this process with {HANDLERS} handlers, which insert one row for "
        "each message",
        "inbox-handling",
    )
    envelopes = kbatch_envelopes(MESSAGES)
    topic = broker.new_topic("inbox", HANDLERS)
    with kbatch.Producer({"bootstrap.servers": broker.bootstrap_servers}) as producer:
        for first in range(0, MESSAGES, 1000):
            producer.send_batch(topic, envelopes[first : first + 1000]).raise_for_errors()
    rates: dict[str, list[float]] = {}
    ways = _ways(sides)
    for turn in range(turns):
        for name, side, batch in ways:
            count = SINGLE_MESSAGES if batch is None and side is not None else MESSAGES
            mine = rates.setdefault(f"{name}: kbatch", [])
            mine.append(count / _handle(broker, topic, side, batch, count, turn))
            if side is not None:
                its = rates.setdefault(f"{name}: by hand", [])
                its.append(count / _handle_by_hand(broker, topic, side, batch, count, turn))
        ways.reverse()
    section.figures += [figure(f"{name}, messages/s", found, digits=0) for name, found in rates.items()]
    for name, side, _ in _ways(sides):
        if side is not None:
            both = zip(rates[f"{name}: kbatch"], rates[f"{name}: by hand"], strict=True)
            section.figures.append(figure(f"{name}: kbatch / by hand", [one / other for one, other in both]))
    section.settings["ways"] = list(rates)
    return section


@contextmanager
def _listening(
    broker: Any, topic: str, side: Any, batch: int | None, group: str, began: list[float]
) -> Iterator[kbatch.Listener]:
    """A listener that runs; `began` gets the time of its first call of the handler."""

    def handle(given: Any, connection: Any = None) -> None:
        if not began:
            began.append(time.perf_counter())
        if side is None:
            return
        if batch is None:
            connection.execute(side.insert, (1,))
        else:
            connection.cursor().executemany(side.insert, [(1,)] * len(given))

    config = {"bootstrap.servers": broker.bootstrap_servers, "group.id": group, "fetch.wait.max.ms": 10}
    inbox = side.inbox if side else None
    listener = kbatch.Listener(config, [topic], handle, inbox=inbox, concurrency=HANDLERS, batch_size=batch)
    thread = threading.Thread(target=listener.run)
    thread.start()
    try:
        yield listener
    finally:
        listener.stop()
        thread.join()
        if side is not None:
            side.clear()


def _await_handled(listener: kbatch.Listener, count: int) -> None:
    end = time.monotonic() + PATIENCE_S
    while listener.stats()["handled"] < count:
        if time.monotonic() > end:
            raise RuntimeError(f"after {PATIENCE_S:.0f} s {listener.stats()['handled']} of {count} are handled")
        time.sleep(0.0005)


def _group(side: Any, batch: int | None, turn: object) -> str:
    return f"{GROUP}-{side.name if side else 'none'}-{batch}-{turn}"


def _handle(broker: Any, topic: str, side: Any, batch: int | None, count: int, turn: object) -> float:
    """Seconds from the first call of the handler until so many messages are handled."""
    began: list[float] = []
    with _listening(broker, topic, side, batch, _group(side, batch, turn), began) as listener:
        _await_handled(listener, count)
        return time.perf_counter() - began[0]


def _handle_by_hand(broker: Any, topic: str, side: Any, batch: int | None, count: int, turn: int) -> float:
    """The same by a loop of confluent-kafka's consumer with one connection: a transaction for each message, or for
    each batch, that inserts ids and rows, and then the offsets are committed."""
    group = _group(side, batch, f"by-hand-{turn}")
    consumer = confluent_kafka.Consumer(
        {
            "bootstrap.servers": broker.bootstrap_servers,
            "group.id": group,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": "false",
            "fetch.wait.max.ms": 10,
        }
    )
    consumer.subscribe([topic])
    connection = side.connection
    began = 0.0
    left = count
    try:
        while left > 0:
            messages: list[Any] = consumer.consume(min(HANDLERS_BATCH, left), 1.0)
            if not messages:
                continue
            began = began or time.perf_counter()
            ids = [uuid.UUID(dict(message.headers())["id"].decode()) for message in messages]
            for some in [ids] if batch else [[one] for one in ids]:
                connection.execute(side.begin)
                if batch:
                    side.insert_ids(group, some)
                    connection.cursor().executemany(side.insert, [(1,)] * len(some))
                elif side.insert_id(group, some[0]):
                    connection.execute(side.insert, (1,))
                connection.execute("COMMIT")
            consumer.commit(asynchronous=True)
            left -= len(messages)
        return time.perf_counter() - began
    finally:
        consumer.close()
        side.clear()


# -- at half load


def _half_load(seconds: float, sides: list[Any], broker: Any) -> Section:
    section = Section(
        "From Kafka to a handler's row at half load: from when it is sent until it is handled, and how many are not",
        "inbox-half-load",
    )
    names = []
    for name, side, batch in _ways(sides):
        envelopes = SINGLE_MESSAGES if batch is None and side is not None else MESSAGES
        topic = broker.new_topic("highest", HANDLERS)
        with kbatch.Producer({"bootstrap.servers": broker.bootstrap_servers}) as producer:
            producer.send_batch(topic, kbatch_envelopes(envelopes)).raise_for_errors()
        highest = max(envelopes / _handle(broker, topic, side, batch, envelopes, turn) for turn in range(2))
        rate = min(highest / 2, MOST_PACED)
        found = _paced(seconds, rate, broker, side, batch)
        names.append(f"{name}, {float(f'{rate:.2g}'):,.0f} messages/s")
        section.figures += [
            figure(f"{names[-1]}, p50", [found.latencies[len(found.latencies) // 2] * 1e3], unit=" ms"),
            figure("  p99", [found.latencies[int(0.99 * len(found.latencies))] * 1e3], unit=" ms"),
            figure("  lag, messages", found.lags, digits=0),
        ]
    section.settings["ways"] = names
    return section


@dataclass(frozen=True)
class _Paced:
    latencies: list[float]
    lags: list[float]


def _paced(seconds: float, rate: float, broker: Any, side: Any, batch: int | None) -> _Paced:
    topic = broker.new_topic("paced", HANDLERS)
    options = Options(broker.bootstrap_servers, topic, rate)
    curve: list[tuple[float, int]] = []
    with (
        _listening(broker, topic, side, batch, _group(side, batch, "half"), []) as listener,
        Worker("benchmarks.pacer", options) as pacer,
    ):
        warm_up = pacer.ask(Sent, str(min(1.0, seconds))).numbers[-1]
        _await_handled(listener, warm_up)
        pacer.tell(str(seconds))
        answer: list[Sent] = []
        hearing = threading.Thread(target=lambda: answer.append(pacer.hear(Sent)))
        hearing.start()
        end = time.monotonic() + seconds + PATIENCE_S
        while not answer or curve[-1][1] < answer[0].numbers[-1]:
            curve.append((time.monotonic(), listener.stats()["handled"] - warm_up))
            if curve[-1][0] > end:
                raise RuntimeError("not all is handled that was sent at half load")
            time.sleep(0.001)
        hearing.join()
    return measured(answer[0], curve)


def measured(sent: Sent, curve: list[tuple[float, int]]) -> _Paced:
    """The n-th that was sent is taken to be the n-th that was handled: so the mean is exact, and percentiles are of
    counts."""
    latencies: list[float] = []
    lags: list[float] = []
    at = before = 0
    for called, number in zip(sent.times, sent.numbers, strict=True):
        for nth in range(before + 1, number + 1):
            while curve[at][1] < nth:
                at += 1
            latencies.append(max(0.0, curve[at][0] - called))
        before = number
    batch = 0
    for now, handled in curve:
        while batch < len(sent.times) and sent.times[batch] <= now:
            batch += 1
        if 0 < batch < len(sent.times):
            lags.append(max(0.0, sent.numbers[batch - 1] - handled))
    return _Paced(sorted(latencies), lags or [0.0])
