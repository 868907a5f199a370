"""What is done to dead letters, and to what waits, in a SQLite database."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from kbatch._outbox._sqlite_session import SqliteSession
from kbatch._outbox._store import BUCKETS, KeptRow

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from kbatch._outbox._sqlite_session import Run
    from kbatch._outbox._store import NewRow, Place, Position, Table

__all__ = ["SqliteAdmin"]

_AT = {"dead": "died_at", "later": "due_at"}
_ROW = "WHERE bucket = ? AND seq = ?"
_HOT = "bucket, seq, id, packed, created_at, deliver_by"
# What the hot table takes, and what would not be deleted there at once as expired.
_LIVES = (
    "AND typeof(packed) = 'blob' AND typeof(created_at) = 'integer' AND typeof(deliver_by) IN ('integer', 'null') "
    "AND (deliver_by IS NULL OR deliver_by > ?)"
)


class SqliteAdmin(SqliteSession):
    """As `OutboxAdmin`."""

    def page(
        self, table: Table, after: Position | None, *, since_ms: int | None, until_ms: int | None, limit: int
    ) -> list[KeptRow]:
        """As `OutboxAdmin.page`."""
        at = _AT[table]
        conditions = ["1"]
        values: list[int] = []
        if after is not None:
            conditions.append(f"({at}, bucket, seq) > (?, ?, ?)")
            values += after
        if since_ms is not None:
            conditions.append(f"{at} >= ?")
            values.append(since_ms)
        if until_ms is not None:
            conditions.append(f"{at} < ?")
            values.append(until_ms)
        return self._rows(table, " AND ".join(conditions), (*values, limit), "LIMIT ?")

    def look_up(self, table: Table, numbers: Collection[int]) -> list[KeptRow]:
        """As `OutboxAdmin.look_up`."""
        # All buckets by name: so each number is looked for in the primary key.
        buckets = ", ".join(map(str, range(BUCKETS)))
        rows: list[KeptRow] = []
        for number in set(numbers):
            rows += self._rows(table, f"bucket IN ({buckets}) AND seq = ?", (number,))
        return sorted(rows, key=lambda row: row.position)

    def _rows(self, table: Table, condition: str, values: tuple[int, ...], limit: str = "") -> list[KeptRow]:
        at = _AT[table]
        statement = self._tables.sql(
            f"SELECT {at}, bucket, seq, id, packed, created_at, deliver_by, attempts, last_error FROM {{{table}}} "
            f"WHERE {condition} ORDER BY {at}, bucket, seq {limit}"
        )
        with self._reading() as run:
            return [KeptRow(*row) for row in run(statement, values)]

    def delete(self, table: Table, places: Sequence[Place]) -> int:
        """As `OutboxAdmin.delete`."""
        with self._writing() as run:
            if table == "dead":
                return self._many(f"DELETE FROM {{dead}} {_ROW}", places)
            # First those that hold back no key, such as what is scheduled: relays need not look again.
            others = self._many(f"DELETE FROM {{later}} {_ROW} AND key_hash IS NULL", places)
            holding = self._many(f"DELETE FROM {{later}} {_ROW}", places)
            if holding:
                self._tell_relays(run)
        return others + holding

    def replay(self, places: Sequence[Place], now_us: int) -> int:
        """As `OutboxAdmin.replay`."""
        rows = [(*place, now_us) for place in places]
        with self._changing():
            self._many(f"INSERT OR REPLACE INTO {{outbox}} ({_HOT}) SELECT {_HOT} FROM {{dead}} {_ROW} {_LIVES}", rows)
            return self._many(f"DELETE FROM {{dead}} {_ROW} {_LIVES}", rows)

    def replace(self, place: Place, row: NewRow) -> bool:
        """As `OutboxAdmin.replace`."""
        with self._changing():
            is_there = bool(self._many(f"DELETE FROM {{dead}} {_ROW}", [place]))
            if is_there:
                self._many(f"INSERT INTO {{outbox}} ({_HOT}) VALUES (?, ?, ?, ?, ?, ?)", [row])
        return is_there

    def reschedule(self, places: Sequence[Place], due_at_ms: int) -> int:
        """As `OutboxAdmin.reschedule`."""
        with self._writing():
            return self._many(f"UPDATE {{later}} SET due_at = ? {_ROW}", [(due_at_ms, *place) for place in places])

    def _many(self, statement: str, rows: Sequence[tuple[object, ...]]) -> int:
        return self._connection.executemany(self._tables.sql(statement), rows).rowcount if rows else 0

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        with self._writing() as run:
            yield
            self._tell_relays(run)

    def _tell_relays(self, run: Run) -> None:
        run(self._tables.sql("UPDATE {meta} SET changes = changes + 1"))
