"""What is done to dead letters, and to what waits, in a PostgreSQL database."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from kbatch._outbox._postgres_rows import array_text
from kbatch._outbox._postgres_session import PostgresSession
from kbatch._outbox._store import BUCKETS, KeptRow

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from kbatch._outbox._postgres_session import Rows, Run
    from kbatch._outbox._store import NewRow, Place, Position, Table

__all__ = ["PostgresAdmin"]

_AT = {"dead": "died_at", "later": "due_at"}
_HOT = "bucket, seq, id, packed, created_at, deliver_by"
_AT_ONCE = 10_000  # rows of a statement, so that none takes long
_PLACES = "(SELECT * FROM unnest($1::smallint[], $2::bigint[]))"


class PostgresAdmin(PostgresSession):
    """As `OutboxAdmin`."""

    def page(
        self, table: Table, after: Position | None, *, since_ms: int | None, until_ms: int | None, limit: int
    ) -> list[KeptRow]:
        """As `OutboxAdmin.page`."""
        at = _AT[table]
        bucket, seq = (-1, -1) if after is None else after[1:]
        lowest = -(2**63) if after is None else after[0]
        condition = f"({at}, bucket, seq) > ($1::bigint, $2::smallint, $3::bigint) AND {at} >= $4 AND {at} < $5"
        since = -(2**63) if since_ms is None else since_ms
        until = 2**63 - 1 if until_ms is None else until_ms
        with self._writing() as run:
            return self._rows(run, table, f"{condition} ORDER BY {at}, bucket, seq LIMIT $6", lowest, bucket, seq,
                              since, until, limit)  # fmt: skip

    def look_up(self, table: Table, numbers: Collection[int]) -> list[KeptRow]:
        """As `OutboxAdmin.look_up`."""
        # All buckets by name: so each number is looked for in the primary key.
        condition = "bucket = ANY($1::smallint[]) AND seq = ANY($2::bigint[])"
        with self._writing() as run:
            rows = self._rows(run, table, condition, array_text(range(BUCKETS)), array_text(set(numbers)))
        return sorted(rows, key=lambda row: row.position)

    def _rows(self, run: Run, table: Table, condition: str, *values: Any) -> list[KeptRow]:
        statement = self._tables.sql(
            f"SELECT {_AT[table]}, bucket, seq, uuid_send(id), packed, created_at, deliver_by, attempts, last_error "
            f"FROM {{{table}}} WHERE {condition}"
        )
        return [KeptRow(*row) for row in run(statement, values)]

    def delete(self, table: Table, places: Sequence[Place]) -> int:
        """As `OutboxAdmin.delete`."""
        with self._changing() as run:
            statement = f"DELETE FROM {{{table}}} WHERE (bucket, seq) IN {_PLACES} RETURNING 1"
            return len(self._at(run, statement, places))

    def replay(self, places: Sequence[Place], now_us: int) -> int:
        """As `OutboxAdmin.replay`."""
        statement = (
            f"WITH gone AS (DELETE FROM {{dead}} WHERE (bucket, seq) IN {_PLACES} "
            f"AND (deliver_by IS NULL OR deliver_by > $3) RETURNING {_HOT}) "
            f"INSERT INTO {{outbox}} ({_HOT}) SELECT {_HOT} FROM gone RETURNING 1"
        )
        with self._changing() as run:
            return len(self._at(run, statement, places, now_us))

    def replace(self, place: Place, row: NewRow) -> bool:
        """As `OutboxAdmin.replace`."""
        bucket, seq, id_bytes, packed, created_at, deliver_by = row
        inserted = (
            f"INSERT INTO {{outbox}} ({_HOT}) "
            "VALUES ($1::smallint, $2, encode($3::bytea, 'hex')::uuid, $4::bytea, $5, $6::bigint)"
        )
        with self._changing() as run:
            is_there = bool(
                self._at(run, f"DELETE FROM {{dead}} WHERE (bucket, seq) IN {_PLACES} RETURNING 1", [place])
            )
            if is_there:
                run(self._tables.sql(inserted), (bucket, seq, id_bytes, packed, created_at, deliver_by))
        return is_there

    def reschedule(self, places: Sequence[Place], due_at_ms: int) -> int:
        """As `OutboxAdmin.reschedule`."""
        statement = f"UPDATE {{later}} SET due_at = $3 WHERE (bucket, seq) IN {_PLACES} RETURNING 1"
        with self._changing() as run:
            return len(self._at(run, statement, places, due_at_ms))

    def _at(self, run: Run, statement: str, places: Sequence[Place], *values: Any) -> Rows:
        rows: Rows = []
        for first in range(0, len(places), _AT_ONCE):
            buckets, numbers = zip(*places[first : first + _AT_ONCE], strict=True)
            rows += run(self._tables.sql(statement), (array_text(buckets), array_text(numbers), *values))
        return rows

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Run]:
        with self._writing() as run:
            yield run
            run(self._tables.sql("UPDATE {meta} SET changes = changes + 1 WHERE one = 1"))
