"""An outbox's tables in SQLite."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, cast

from kbatch._database._sqlite import NOW_MS, SqliteNames
from kbatch._errors import OutboxError
from kbatch._outbox._store import BUCKETS, RefusedWriteError
from kbatch._outbox._tables import OutboxTables

if TYPE_CHECKING:
    import os

__all__ = ["SqliteTables"]

# Without rowid the row lies in the primary key's tree, so that what a relay reads is in one place. Numbers are given by
# `meta.last_seq` and never again: a relay that is late must not delete another row of the same number.
# A column of SQLite keeps a value of any type; the checks are for what a relay computes with. The other tables take
# over what slipped through. One index of `later` has what is scheduled apart, so that a look at what waits for its next
# attempt never walks over that.
_DDL = """\
CREATE TABLE IF NOT EXISTS {meta} (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    version INTEGER NOT NULL,
    buckets INTEGER NOT NULL,
    last_seq INTEGER NOT NULL,
    changes INTEGER NOT NULL DEFAULT 0
);
INSERT OR IGNORE INTO {meta} (one, version, buckets, last_seq) VALUES (1, {version}, {buckets}, 0);
CREATE TABLE IF NOT EXISTS {outbox} (
    bucket INTEGER NOT NULL CHECK (typeof(bucket) = 'integer'),
    seq INTEGER NOT NULL CHECK (typeof(seq) = 'integer'),
    id BLOB NOT NULL,
    packed BLOB NOT NULL CHECK (typeof(packed) = 'blob'),
    created_at INTEGER NOT NULL CHECK (typeof(created_at) = 'integer'),
    deliver_by INTEGER CHECK (typeof(deliver_by) IN ('integer', 'null')),
    PRIMARY KEY (bucket, seq)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS {later} (
    bucket INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    id BLOB NOT NULL,
    packed BLOB NOT NULL,
    created_at INTEGER NOT NULL,
    deliver_by INTEGER,
    due_at INTEGER NOT NULL CHECK (typeof(due_at) = 'integer'),
    attempts INTEGER NOT NULL CHECK (typeof(attempts) = 'integer'),
    last_error TEXT NOT NULL,
    key_hash INTEGER CHECK (typeof(key_hash) IN ('integer', 'null')),
    scheduled INTEGER NOT NULL DEFAULT 0 CHECK (scheduled IN (0, 1)),
    PRIMARY KEY (bucket, seq)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS {later_due} ON {later_bare} (due_at);
CREATE INDEX IF NOT EXISTS {later_at} ON {later_bare} (scheduled, due_at, seq);
CREATE INDEX IF NOT EXISTS {later_key} ON {later_bare} (bucket, key_hash, seq);
CREATE TABLE IF NOT EXISTS {dead} (
    bucket INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    id BLOB NOT NULL,
    packed BLOB NOT NULL,
    created_at INTEGER NOT NULL,
    deliver_by INTEGER,
    died_at INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    last_error TEXT NOT NULL,
    PRIMARY KEY (bucket, seq)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS {dead_died} ON {dead_bare} (died_at);
CREATE TABLE IF NOT EXISTS {lease} (
    bucket INTEGER PRIMARY KEY,
    owner TEXT,
    token INTEGER NOT NULL,
    until INTEGER NOT NULL,
    length INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS {relay} (
    owner TEXT PRIMARY KEY,
    until INTEGER NOT NULL,
    length INTEGER NOT NULL
) WITHOUT ROWID;
"""


class SqliteTables(OutboxTables, SqliteNames):
    """The tables of one outbox, by their quoted names."""

    def __init__(self, prefix: str) -> None:
        names = ("meta", "later", "dead", "lease", "relay", "later_due", "later_at", "later_key", "dead_died")
        super().__init__(prefix, names, ("later", "dead"), self.values(NOW_MS))
        self._first_buckets = ",".join(f"({bucket}, NULL, 0, 0, 0)" for bucket in range(BUCKETS))

    def ddl(self) -> str:
        """The statements that make what is missing."""
        leases = (
            f"INSERT OR IGNORE INTO {{lease}} (bucket, owner, token, until, length) VALUES {self._first_buckets};\n"
        )
        return self.sql(_DDL + leases)

    def _made(self, error: sqlite3.Error, text: str, own: bool) -> OutboxError:
        is_refused = own and (isinstance(error, sqlite3.IntegrityError) or "is full" in text)
        return RefusedWriteError(text) if is_refused else OutboxError(text)

    def as_outbox_error(self, error: sqlite3.Error, path: str | os.PathLike[str], *, own: bool = False) -> OutboxError:
        """As `as_error`."""
        return cast("OutboxError", self.as_error(error, path, own=own))
