"""Outboxes in SQLite files, and what is in their tables."""

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import kbatch
from kbatch import Envelope
from kbatch._fastmap import packed_key_hash, unpack_record


def made(directory: Path, name: str = "shop.db", **options: Any) -> kbatch.SqliteOutbox:
    """An outbox whose tables are there."""
    outbox = kbatch.SqliteOutbox(directory / name, **options)
    outbox.create()
    return outbox


@contextlib.contextmanager
def transaction(outbox: kbatch.SqliteOutbox) -> Iterator[sqlite3.Connection]:
    """A connection of the application within a transaction, which is committed unless this ends by an exception."""
    connection = sqlite3.connect(outbox._path, isolation_level=None, timeout=30)
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield connection
        connection.execute("COMMIT")
    finally:
        connection.close()


def add(outbox: kbatch.SqliteOutbox, envelopes: Iterable[Envelope], topic: str | None = "orders") -> int:
    """Adds in a transaction of its own."""
    with transaction(outbox) as connection:
        return outbox.add(connection, envelopes, topic=topic)


def query(outbox: kbatch.SqliteOutbox, sql: str, *before: str) -> list[Any]:
    """The rows of a query on its database, after others, in which ``{outbox}``, ``{later}``, … are its tables."""
    connection = sqlite3.connect(outbox._path, isolation_level=None, timeout=30)
    try:
        for statement in before:
            connection.execute(statement)
        return connection.execute(outbox._tables.sql(sql)).fetchall()
    finally:
        connection.close()


def move_to_later(outbox: kbatch.SqliteOutbox, first: int, last: int) -> None:
    """Rows with these numbers were refused once, and are due."""
    for bucket, seq, packed in query(
        outbox, f"SELECT bucket, seq, packed FROM {{outbox}} WHERE seq BETWEEN {first} AND {last}"
    ):
        key_hash = packed_key_hash(packed)
        query(
            outbox,
            "INSERT INTO {later} (bucket, seq, id, packed, created_at, due_at, attempts, last_error, key_hash) "
            f"SELECT bucket, seq, id, packed, created_at, 0, 1, 'refused', {'NULL' if key_hash is None else key_hash} "
            f"FROM {{outbox}} WHERE bucket = {bucket} AND seq = {seq}",
        )
        query(outbox, f"DELETE FROM {{outbox}} WHERE bucket = {bucket} AND seq = {seq}")


def bodies(outbox: kbatch.SqliteOutbox, table: str = "outbox") -> list[bytes | None]:
    """The bodies of the records in a table, by their numbers."""
    return [unpack_record(packed)[4] for (packed,) in query(outbox, f"SELECT packed FROM {{{table}}} ORDER BY seq")]
