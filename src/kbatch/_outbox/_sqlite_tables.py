"""An outbox's tables in SQLite."""

from __future__ import annotations

import re
import sqlite3
from typing import TYPE_CHECKING

from kbatch._errors import ConfigError, OutboxError, shown
from kbatch._outbox._store import BUCKETS, RefusedWriteError
from kbatch._outbox._tables import OutboxTables

if TYPE_CHECKING:
    import os

__all__ = ["SqliteTables", "is_locked", "lacks_tables"]

_LONGEST_NAME = 63  # PostgreSQL's, so that a prefix fits everywhere
_PREFIX = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

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

# The database's clock, in milliseconds since 1970.
NOW_MS = "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"


class SqliteTables(OutboxTables):
    """The tables of one outbox, by their quoted names."""

    def __init__(self, prefix: str) -> None:
        if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix):
            raise ConfigError(f"prefix must begin a table's name, of a-z A-Z 0-9 and _ only, not {shown(prefix)}")
        if prefix.lower().startswith("sqlite_"):
            raise ConfigError(f"prefix={shown(prefix)} makes names that SQLite keeps for itself")
        longest = prefix + "outbox_later_due"
        if len(longest) > _LONGEST_NAME:
            raise ConfigError(
                f"prefix={shown(prefix)} makes names of {len(longest)} characters, and {_LONGEST_NAME} are allowed"
            )
        # With the schema, so that a temporary table of the same name is not meant.
        names = ("meta", "later", "dead", "lease", "relay", "later_due", "later_at", "later_key", "dead_died")
        quoted = {name: f'main."{prefix}outbox_{name}"' for name in names}
        quoted["outbox"] = f'main."{prefix}outbox"'
        for name in ("later", "dead"):  # an index says which schema by its own name
            quoted[f"{name}_bare"] = f'"{prefix}outbox_{name}"'
        super().__init__(quoted, now=NOW_MS)
        self._first_buckets = ",".join(f"({bucket}, NULL, 0, 0, 0)" for bucket in range(BUCKETS))

    def ddl(self) -> str:
        """The statements that make what is missing."""
        leases = (
            f"INSERT OR IGNORE INTO {{lease}} (bucket, owner, token, until, length) VALUES {self._first_buckets};\n"
        )
        return self.sql(_DDL + leases)

    def as_outbox_error(self, error: sqlite3.Error, path: str | os.PathLike[str], *, own: bool = False) -> OutboxError:
        """What to do about an error of SQLite; `own` of a connection that is not the caller's."""
        text = str(error)
        if lacks_tables(error):
            hint = "call create() of the outbox once, or have its ddl() executed"
        elif "not a database" in text or "malformed" in text:
            hint = "give the path of a SQLite database, or of none yet"
        elif "is full" in text:
            hint = "make room on the disk; SQLite may have ended the transaction"
        elif is_locked(error) and own:
            hint = "another connection has written for long; transactions that write should be short"
        elif is_locked(error):
            hint = "another connection writes; wait longer (sqlite3.connect(timeout=…)) and begin with BEGIN IMMEDIATE"
        elif "readonly" in text or "read-only" in text:
            hint = "open the database for writing; the file and its folder must be writable"
        elif "unable to open" in text:
            hint = "the folder must be there and writable"
        elif "thread" in text:
            hint = "use the connection in the thread that made it"
        elif "closed" in text:
            hint = "give a connection that is open"
        else:
            hint = ""
        is_refused = own and (isinstance(error, sqlite3.IntegrityError) or "is full" in text)
        kind = RefusedWriteError if is_refused else OutboxError
        return kind(f"the outbox in {path}: {text}" + (f"; {hint}" if hint else ""))


def lacks_tables(error: sqlite3.Error) -> bool:
    """Whether a statement failed since a table is not there, or is another one."""
    return any(told in str(error) for told in ("no such table", "no such column", "has no column"))


def is_locked(error: sqlite3.Error) -> bool:
    """Whether a statement failed since another connection reads or writes."""
    return "locked" in str(error) or "busy" in str(error)
