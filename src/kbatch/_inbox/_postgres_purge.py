"""Old ids leave an inbox in PostgreSQL. It needs psycopg."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg

from kbatch._database._postgres_connection import run_raw, writing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kbatch._database._postgres_connection import OwnConnection
    from kbatch._inbox._tables import PostgresInboxTables

__all__ = ["Purge"]

_DELETED_AT_ONCE = 5000
_LOCK_MS = 300  # for a table that is to be emptied: whoever marks an id in it waits, too
_STATEMENT = "10min"

_LIMITS = "unnest($1::text[], $2::text::bigint[]) AS old (of_group, until)"
_IS_OLD = "handled_at < timestamptz 'epoch' + until * interval '1 microsecond'"
_WITH_LIMITS = f"FROM {{%s}} AS kept LEFT JOIN {_LIMITS} ON of_group = group_id"
_MAY_NOT_GO = f"(until IS NULL OR NOT ({_IS_OLD}))"


class Purge:
    """Empties tables of slots, or deletes from them.

    Args:
        limits: By group, before when what it has handled may go, in microseconds since 1970; of others nothing may.

    Attributes:
        deleted: How many rows are gone.
    """

    def __init__(self, connection: OwnConnection, tables: PostgresInboxTables, limits: Mapping[str, int]) -> None:
        connection.is_given = True  # to read a table may take long
        self._connection = connection
        self._tables = tables
        self._limits = (list(limits), f"{{{','.join(map(str, limits.values()))}}}")
        self._newest = max(limits.values(), default=0)
        self.deleted = 0

    def empty(self, slot: str) -> None:
        """Removes all that a slot has, if all of it is old; else what is old."""
        if not self._rows("SELECT 1 FROM {%s} LIMIT 1", slot):
            return
        # Without a lock first: most that may not be emptied is found so.
        if self._keeps(slot):
            self.delete(slot)
            return
        try:
            with writing(self._connection):
                run_raw(
                    self._connection,
                    f"SET LOCAL lock_timeout = {_LOCK_MS}; SET LOCAL statement_timeout = '{_STATEMENT}'",
                )
                self._rows("LOCK TABLE {%s} IN ACCESS EXCLUSIVE MODE", slot)
                count, kept = self._counts(slot)
                if kept:
                    return
                self._rows("TRUNCATE {%s}", slot)
        except psycopg.errors.LockNotAvailable:
            return  # the next time
        self.deleted += count

    def delete(self, slot: str) -> None:
        """Deletes what is old, in batches."""
        statement = (
            "DELETE FROM {%s} WHERE ctid = ANY(ARRAY("
            f"SELECT kept.ctid FROM {{%s}} AS kept JOIN {_LIMITS} ON of_group = group_id "
            f"WHERE {_IS_OLD} AND handled_at < timestamptz 'epoch' + {self._newest} * interval '1 microsecond' "
            f"LIMIT {_DELETED_AT_ONCE} FOR UPDATE OF kept SKIP LOCKED)) RETURNING 1"
        )
        while True:
            with writing(self._connection):
                found = len(self._rows(statement, slot, limited=True))
            self.deleted += found
            if found < _DELETED_AT_ONCE:
                return

    def _keeps(self, slot: str) -> bool:
        """Whether there is anything that may not go."""
        statement = f"SELECT 1 {_WITH_LIMITS} WHERE {_MAY_NOT_GO} LIMIT 1"
        return bool(self._rows(statement, slot, limited=True))

    def _counts(self, slot: str) -> tuple[int, int]:
        """How many rows there are, and how many of them may not go: in one look, for who holds a lock."""
        statement = f"SELECT count(*), count(*) FILTER (WHERE {_MAY_NOT_GO}) {_WITH_LIMITS}"
        ((count, kept),) = self._rows(statement, slot, limited=True)
        return count, kept

    def _rows(self, statement: str, slot: str, *, limited: bool = False) -> list[tuple[Any, ...]]:
        statement = self._tables.sql(statement.replace("%s", slot))
        return run_raw(self._connection, statement, self._limits if limited else None)
