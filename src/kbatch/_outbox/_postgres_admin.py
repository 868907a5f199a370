"""What is done to dead letters, and to what waits, in a PostgreSQL database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kbatch._outbox._postgres_rows import array_text
from kbatch._outbox._postgres_session import PostgresSession
from kbatch._outbox._store import BUCKETS, KeptRow

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from kbatch._outbox._postgres_session import Run
    from kbatch._outbox._store import NewRow, Place, Position, Table

__all__ = ["PostgresAdmin"]

# By an expression, so that its index is for this alone: by due_at relays would pass by all that is scheduled.
_AT = {"dead": "died_at", "later": "(due_at + 0)"}
_HOT = "bucket, seq, id, packed, created_at, deliver_by"
_MOST_AT_ONCE = 5_000  # rows of one statement, which the server ends when it takes long
_PLACES = "unnest($1::smallint[], $2::bigint[]) AS place (bucket, seq)"
_IS_THERE = "kept.bucket = place.bucket AND kept.seq = place.seq"
# What would be deleted from the hot table at once, as expired, stays.
_LIVES = "(kept.deliver_by IS NULL OR kept.deliver_by > $3::bigint)"
_INTO_HOT = (
    "ON CONFLICT (bucket, seq) DO UPDATE SET id = excluded.id, packed = excluded.packed, "
    "created_at = excluded.created_at, deliver_by = excluded.deliver_by"
)


class PostgresAdmin(PostgresSession):
    """As `OutboxAdmin`."""

    def page(
        self, table: Table, after: Position | None, *, since_ms: int | None, until_ms: int | None, limit: int
    ) -> list[KeptRow]:
        """As `OutboxAdmin.page`."""
        at = _AT[table]
        conditions = ["true"]
        values: list[int] = [limit]

        def parameter(value: int) -> str:
            values.append(value)
            return f"${len(values)}::bigint"

        if after is not None:
            conditions.append(f"({at}, bucket, seq) > ({', '.join(map(parameter, after))})")
        if since_ms is not None:
            conditions.append(f"{at} >= {parameter(since_ms)}")
        if until_ms is not None:
            conditions.append(f"{at} < {parameter(until_ms)}")
        with self._reading() as (run, _):
            return self._rows(run, table, f"{' AND '.join(conditions)} ORDER BY {at}, bucket, seq LIMIT $1", values)

    def look_up(self, table: Table, numbers: Collection[int]) -> list[KeptRow]:
        """As `OutboxAdmin.look_up`."""
        wanted = sorted(set(numbers))
        rows: list[KeptRow] = []
        with self._reading() as (run, _):
            for begin in range(0, len(wanted), _MOST_AT_ONCE):
                # All buckets by name: so each number is looked for in the primary key.
                numbers_and_buckets = (array_text(wanted[begin : begin + _MOST_AT_ONCE]), array_text(range(BUCKETS)))
                condition = "seq = ANY($1::bigint[]) AND bucket = ANY($2::smallint[])"
                rows += self._rows(run, table, condition, numbers_and_buckets)
        return sorted(rows, key=lambda row: row.position)

    def _rows(self, run: Run, table: Table, which: str, values: Sequence[object]) -> list[KeptRow]:
        statement = self._tables.sql(
            f"SELECT {_AT[table]}, bucket, seq, uuid_send(id), packed, created_at, deliver_by, attempts, last_error "
            f"FROM {{{table}}} WHERE {which}"
        )
        return [KeptRow(*row) for row in run(statement, values)]

    def delete(self, table: Table, places: Sequence[Place]) -> int:
        """As `OutboxAdmin.delete`."""
        # What holds back no key, such as what is scheduled, makes no relay look again.
        holds = "kept.key_hash IS NOT NULL" if table == "later" else "false"
        statement = f"DELETE FROM {{{table}}} AS kept USING {_PLACES} WHERE {_IS_THERE} RETURNING {holds}"
        return self._change(table, places, statement)

    def replay(self, places: Sequence[Place], now_us: int) -> int:
        """As `OutboxAdmin.replay`."""
        statement = (
            f"WITH gone AS (DELETE FROM {{dead}} AS kept USING {_PLACES} WHERE {_IS_THERE} AND {_LIVES} "
            f"RETURNING kept.*) INSERT INTO {{outbox}} ({_HOT}) SELECT {_HOT} FROM gone {_INTO_HOT} RETURNING true"
        )
        return self._change("dead", places, statement, now_us)

    def replace(self, place: Place, row: NewRow) -> bool:
        """As `OutboxAdmin.replace`."""
        bucket, seq, id_bytes, packed, created_at, deliver_by = row
        # One statement: what is not there is not replaced.
        statement = (
            f"WITH gone AS (DELETE FROM {{dead}} AS kept USING {_PLACES} WHERE {_IS_THERE} RETURNING kept.seq) "
            f"INSERT INTO {{outbox}} ({_HOT}) SELECT $3::smallint, $4::bigint, encode($5::bytea, 'hex')::uuid, "
            f"$6::bytea, $7::bigint, $8::bigint FROM gone {_INTO_HOT} RETURNING true"
        )
        return bool(self._change("dead", [place], statement, bucket, seq, id_bytes, packed, created_at, deliver_by))

    def reschedule(self, places: Sequence[Place], due_at_ms: int) -> int:
        """As `OutboxAdmin.reschedule`."""
        statement = f"UPDATE {{later}} AS kept SET due_at = $3::bigint FROM {_PLACES} WHERE {_IS_THERE} RETURNING false"
        return self._change("later", places, statement, due_at_ms)

    def _change(self, table: Table, places: Sequence[Place], statement: str, *values: Any) -> int:
        """How many rows a statement has changed, which returns of each whether relays must look again."""
        statement = self._tables.sql(statement)
        ordered = sorted(places)
        told: list[bool] = []
        with self._writing() as run:
            for begin in range(0, len(ordered), _MOST_AT_ONCE):
                some = ordered[begin : begin + _MOST_AT_ONCE]
                self._lock(run, table, some)
                told += [is_told for (is_told,) in run(statement, (*map(array_text, zip(*some, strict=True)), *values))]
            if any(told):
                # Last: whoever has the lock of this line waits for nothing more. Relays and `add` only read it.
                run(self._tables.sql("UPDATE {meta} SET changes = changes + 1 WHERE one = 1"))
        return len(told)
