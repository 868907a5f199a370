"""Databases for measurements that are the same for SQLite and PostgreSQL, with tables of their own each time."""

import itertools
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

import kbatch
from benchmarks.postgres import postgres


class Database(msgspec.Struct, frozen=True):
    """Where tables are, as a process is told of it."""

    name: Literal["SQLite", "PostgreSQL"]
    place: str  # a file, or a conninfo
    prefix: str = "kbatch_"

    def outbox(self) -> Any:
        kind = kbatch.SqliteOutbox if self.name == "SQLite" else kbatch.PostgresOutbox
        return kind(self.place, prefix=self.prefix)

    def inbox(self) -> Any:
        kind = kbatch.SqliteInbox if self.name == "SQLite" else kbatch.PostgresInbox
        return kind(self.place, prefix=self.prefix)

    def connect(self) -> Any:
        """A connection that commits each statement, unless it is told `begin`."""
        if self.name == "SQLite":
            connection = sqlite3.connect(self.place, isolation_level=None, timeout=60)
            connection.execute("PRAGMA synchronous=FULL")
            return connection
        import psycopg

        return psycopg.connect(self.place, autocommit=True)

    @property
    def begin(self) -> str:
        return "BEGIN IMMEDIATE" if self.name == "SQLite" else "BEGIN"

    @property
    def mark(self) -> str:
        """What stands for a parameter."""
        return "?" if self.name == "SQLite" else "%s"

    @property
    def numbered(self) -> str:
        """The type of a column with the number of its row."""
        return "INTEGER PRIMARY KEY" if self.name == "SQLite" else "bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY"


#: Makes one that nobody has used.
New: TypeAlias = Callable[[], Database]


@contextmanager
def databases() -> Iterator[list[New]]:
    """SQLite, and PostgreSQL with fsync on where its programs are installed."""
    with tempfile.TemporaryDirectory(prefix="kbatch-outbox-") as folder, postgres() as conninfo:
        numbers = itertools.count(1)
        new: list[New] = [lambda: Database("SQLite", str(Path(folder) / f"{next(numbers)}.db"))]
        if conninfo is not None:
            place = conninfo
            new.append(lambda: Database("PostgreSQL", place, f"of{next(numbers)}_"))
        yield new
