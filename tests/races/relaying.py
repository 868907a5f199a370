"""Threads that add to one outbox, send durably and map into its pool of memory, while relays send what is there."""

import contextlib
import random
import sqlite3
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kbatch
from kbatch import DurableSender, Envelope, Relay, SqliteOutbox, Tombstone
from kbatch._fastmap import packed_key_hash, read_packed

from .reading import seeded

TOPICS = ("orders", "stock", "mail")


class Added:
    """How many rows were committed, and packed records that many threads look at."""

    def __init__(self) -> None:
        self.mutex = threading.Lock()
        self.rows = 0
        self.packed: deque[bytes] = deque(maxlen=200)

    def add(self, count: int) -> None:
        with self.mutex:
            self.rows += count


def batch_of(dice: random.Random) -> list[Envelope[Any]]:
    some: list[Envelope[Any]] = [
        Envelope({"n": n}, key=f"k{n}", topic=dice.choice(TOPICS), headers=[("h", b"1")])
        for n in range(dice.choice((1, 3, 60)))
    ]
    return [*some, Tombstone(b"k"), Envelope(data=bytearray(b"y" * dice.choice((1, 30_000))))]


def add(outbox: SqliteOutbox, dice: random.Random, added: Added, over: threading.Event) -> None:
    with contextlib.closing(sqlite3.connect(outbox._path, isolation_level=None, timeout=60)) as connection:
        while not over.is_set():
            connection.execute("BEGIN IMMEDIATE")
            count = outbox.add(connection, batch_of(dice), topic="orders")
            if dice.random() < 0.2:
                connection.execute("ROLLBACK")
            else:
                connection.execute("COMMIT")
                added.add(count)


def send(sender: DurableSender, dice: random.Random, added: Added, over: threading.Event) -> None:
    while not over.is_set():
        assert sender.send(Envelope({"n": 1}, key=f"k{dice.randrange(9)}"))
        added.add(1)


def pack(outbox: SqliteOutbox, dice: random.Random, added: Added, over: threading.Event) -> None:
    """Uses the outbox's pool without its database; others give their memory back at the same time."""
    pool, mapper = outbox._pool, outbox._mapper

    def whole() -> None:
        batch = pool.map(mapper, "orders", batch_of(dice))
        added.packed.extend(each for each in pool.pack(batch) if each is not None)
        assert pool.count(batch) == len(pool.rows([batch], 1, 64))

    def failing() -> None:
        with contextlib.suppress(kbatch.SerializationError):
            pool.map(mapper, "orders", [*batch_of(dice), Envelope(object())])

    def forgotten() -> None:
        pool.map(mapper, "orders", batch_of(dice))

    def look() -> None:
        with contextlib.suppress(IndexError):
            packed = added.packed[-1]
            packed_key_hash(packed)
            read_packed(packed)

    deeds: list[Callable[[], None]] = [whole, whole, failing, forgotten, look, look]
    while not over.is_set():
        dice.choice(deeds)()


def watch(relays: list[Relay], over: threading.Event) -> None:
    while not over.wait(0.0005):
        for relay in relays:
            relay.stats()
            assert len(repr(relay)) > 0


@contextlib.contextmanager
def running(relays: list[Relay]) -> Iterator[None]:
    threads = [threading.Thread(target=relay.run) for relay in relays]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for relay in relays:
            relay.stop(0.0)
        for thread in threads:
            thread.join()


def relay_round(bootstrap_servers: str, dice: random.Random, seconds: float) -> int:
    """Two relays of one producer, which are stopped in the middle or when all is sent; how many rows there were."""
    config = {"bootstrap.servers": bootstrap_servers, "log_level": 0, "linger.ms": dice.choice((0, 5))}
    added, over = Added(), threading.Event()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, kbatch.Producer(config) as producer:
        outbox = SqliteOutbox(Path(folder) / "shop.db")
        outbox.create()
        relays = [Relay(outbox, producer, batch_size=dice.choice((3, 100))) for _ in range(2)]
        sender = DurableSender(outbox, "orders")
        threads = [threading.Thread(target=add, args=(outbox, seeded(dice), added, over)) for _ in range(2)]
        threads += [threading.Thread(target=send, args=(sender, seeded(dice), added, over)) for _ in range(2)]
        threads += [threading.Thread(target=pack, args=(outbox, seeded(dice), added, over)) for _ in range(2)]
        threads.append(threading.Thread(target=watch, args=(relays, over)))
        with running(relays):
            for thread in threads:
                thread.start()
            time.sleep(seconds)
            if dice.random() < 0.5:
                relays[0].stop(dice.choice((0.0, 10.0)))
            over.set()
            for thread in threads:
                thread.join()
            sender.close()
            if dice.random() < 0.5:
                assert relays[1].drain(60) == 0
        with Relay(outbox, producer) as last:
            assert last.drain(60) == 0
        acked = sum(relay.stats()["acked"] for relay in (*relays, last))
        assert acked >= added.rows, (acked, added.rows)
        for relay in relays:
            relay.close()
    return added.rows
