"""An inbox's tables."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, cast

from kbatch._database._postgres import PostgresNames, is_lost
from kbatch._database._sqlite import SqliteNames, is_locked
from kbatch._errors import InboxError
from kbatch._inbox._slots import OTHER_SLOT, SLOTS, slot_name

if TYPE_CHECKING:
    import os

__all__ = ["PostgresInboxTables", "SqliteInboxTables"]

# In a table with rowids the rows lie in the order in which they were handled, in which they are deleted.
_SQLITE = """\
CREATE TABLE IF NOT EXISTS {meta} (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    version INTEGER NOT NULL
);
INSERT OR IGNORE INTO {meta} (one, version) VALUES (1, {version});
CREATE TABLE IF NOT EXISTS {inbox} (
    number INTEGER PRIMARY KEY,
    group_id TEXT NOT NULL,
    id BLOB NOT NULL CHECK (typeof(id) = 'blob'),
    handled_at INTEGER NOT NULL CHECK (typeof(handled_at) = 'integer'),
    UNIQUE (id, group_id)
);
CREATE TABLE IF NOT EXISTS {position} (
    group_id TEXT NOT NULL,
    topic TEXT NOT NULL,
    partition INTEGER NOT NULL,
    safe_until INTEGER NOT NULL DEFAULT 0,
    mark_at INTEGER,
    mark_offset INTEGER,
    PRIMARY KEY (group_id, topic, partition)
) WITHOUT ROWID;
"""

# A slot is a function of the id, so that a row is unique in all of them. To empty one locks nothing but it.
_POSTGRES = """\
CREATE TABLE IF NOT EXISTS {meta} (
    one smallint PRIMARY KEY CHECK (one = 1),
    version integer NOT NULL
);
INSERT INTO {meta} (one, version) VALUES (1, {version}) ON CONFLICT DO NOTHING;
CREATE TABLE IF NOT EXISTS {inbox} (
    slot smallint NOT NULL,
    group_id text COLLATE "C" NOT NULL,
    id uuid NOT NULL,
    handled_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (id, group_id, slot)
) PARTITION BY LIST (slot);
CREATE TABLE IF NOT EXISTS {position} (
    group_id text COLLATE "C" NOT NULL,
    topic text COLLATE "C" NOT NULL,
    partition integer NOT NULL,
    safe_until bigint NOT NULL DEFAULT 0,
    mark_at bigint,
    mark_offset bigint,
    PRIMARY KEY (group_id, topic, partition)
);
"""
_SLOT = "CREATE TABLE IF NOT EXISTS {{{name}}} PARTITION OF {{inbox}} FOR VALUES IN ({slot});\n"
_OTHER = "CREATE INDEX IF NOT EXISTS {other_handled} ON {other} (handled_at);\n"

_OUTAGES = ("08", "40", "53", "55P03", "57014", "57P", "58", "25006")


class SqliteInboxTables(SqliteNames):
    """The tables of one inbox, by their quoted names."""

    what = "inbox"
    error = InboxError

    def __init__(self, prefix: str) -> None:
        super().__init__(prefix, ("meta", "position"), (), {})

    def ddl(self) -> str:
        """The statements that make what is missing."""
        return self.sql(_SQLITE)

    def _made(self, error: sqlite3.Error, text: str, own: bool) -> InboxError:
        return InboxError(text, is_outage=own and self.is_outage(error))

    @staticmethod
    def is_outage(error: BaseException) -> bool:
        """Whether the database takes nothing now, and may do so later."""
        told = ("is full", "disk I/O error", "unable to open")
        return isinstance(error, sqlite3.OperationalError) and (
            is_locked(error) or any(text in str(error) for text in told)
        )

    def as_inbox_error(self, error: sqlite3.Error, path: str | os.PathLike[str], *, own: bool = False) -> InboxError:
        """As `as_error`."""
        return cast("InboxError", self.as_error(error, path, own=own))


class PostgresInboxTables(PostgresNames):
    """The tables of one inbox, by their quoted names."""

    what = "inbox"
    error = InboxError

    def __init__(self, schema: str, prefix: str) -> None:
        names = ["meta", "position", *map(slot_name, (*range(SLOTS), OTHER_SLOT))]
        super().__init__(schema, prefix, names, ("other_handled",), {})

    def ddl(self) -> str:
        """The statements that make what is missing."""
        slots = (_SLOT.format(name=slot_name(slot), slot=slot) for slot in (*range(SLOTS), OTHER_SLOT))
        return self.sql(_POSTGRES + "".join(slots) + _OTHER)

    def _made(self, error: BaseException, text: str) -> InboxError:
        return InboxError(text, is_outage=self.is_outage(error))

    def _outage(self, text: str) -> InboxError:
        return InboxError(text, is_outage=True)

    @staticmethod
    def is_outage(error: BaseException) -> bool:
        """Whether the database takes nothing now, and may do so later."""
        code = getattr(error, "sqlstate", None)
        return bool(code.startswith(_OUTAGES)) if code else is_lost(error)

    def as_inbox_error(self, error: BaseException) -> InboxError:
        """As `as_error`."""
        return cast("InboxError", self.as_error(error))
