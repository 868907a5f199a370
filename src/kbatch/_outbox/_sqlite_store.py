"""What a relay does in a SQLite database."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbatch._outbox._sqlite_session import SqliteSession
from kbatch._outbox._store import BUCKETS, DueRow, HeldKey, Lease, Reading

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Collection, Mapping, Sequence

    from kbatch._outbox._sqlite_session import Run
    from kbatch._outbox._sqlite_tables import SqliteTables
    from kbatch._outbox._store import Failure, Place, StoredRow

__all__ = ["SqliteStore"]

_MOST_LEFT = 1000
_FEWEST_OF_BUCKET = 250  # whole pages of the table become free, rather than parts of many
_CACHE_KIB = 32_000  # so that what was read is there when it is deleted
# Somebody who has the checks of the tables ignored may store anything. What is no bytes then goes to the dead.
_PACKED = "CASE WHEN typeof(deliver_by) IN ('integer', 'null') THEN packed ELSE 'deliver_by is no number' END"


class SqliteStore(SqliteSession):
    """A relay's connection to an outbox in SQLite.

    A number is given under SQLite's one lock for writing, so rows come to light in the order of their numbers, and what
    was read once is the floor. `BEGIN IMMEDIATE` takes that lock at once: what begins with reading and then writes
    would be refused.

    Args:
        connection: In autocommit mode. It is the store's from now on.
    """

    def __init__(self, connection: sqlite3.Connection, tables: SqliteTables, path: str) -> None:
        super().__init__(connection, tables, path)
        connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        sql = tables.sql
        self._now = sql("SELECT {now}")
        self._changes = sql("SELECT changes FROM {meta}")
        self._read = sql(
            f"SELECT bucket, seq, {_PACKED}, deliver_by FROM {{outbox}} "
            "WHERE bucket = ? AND seq > ? ORDER BY seq LIMIT ?"
        )
        self._delete = sql("DELETE FROM {outbox} WHERE bucket = ? AND seq = ?")
        self._delete_later = sql("DELETE FROM {later} WHERE bucket = ? AND seq = ?")
        kept = "bucket, seq, id, packed, created_at, deliver_by"
        row = "WHERE bucket = ? AND seq = ?"
        self._to_later = sql(
            f"INSERT OR REPLACE INTO {{later}} ({kept}, due_at, attempts, last_error, key_hash) "
            f"SELECT {kept}, ?, ?, ?, ? FROM {{outbox}} {row}"
        )
        dead = f"INSERT OR REPLACE INTO {{dead}} ({kept}, died_at, attempts, last_error) SELECT {kept}, ?, ?, ? FROM "
        self._to_dead = sql(f"{dead} {{outbox}} {row}")
        self._later_to_dead = sql(f"{dead} {{later}} {row}")
        self._take_numbers = sql("UPDATE {meta} SET last_seq = last_seq + ? WHERE one = 1")
        self._last_number = sql("SELECT last_seq FROM {meta}")
        # Its age is that of a row that was added when it was due. What was cancelled or put off meanwhile stays.
        is_due = f"{row} AND scheduled = 1 AND due_at <= ?"
        self._delete_admitted = sql(f"DELETE FROM {{later}} {is_due}")
        self._admit = sql(
            "INSERT INTO {outbox} (bucket, seq, id, packed, created_at, deliver_by) SELECT bucket, ?, id, packed, "
            f"max(created_at, due_at * 1000), deliver_by FROM {{later}} {is_due}"
        )
        self._put_off = sql(f"UPDATE {{later}} SET due_at = ?, attempts = ?, last_error = ? {row}")

    # -- leases

    def renew(
        self,
        owner: str,
        lease_s: float,
        *,
        release: Collection[int],
        avoid: Collection[int],
        fenced: Collection[str] | None = None,
    ) -> tuple[list[Lease], int]:
        """As `OutboxStore.renew`."""
        sql = self._tables.sql
        with self._writing() as run:
            now = run(self._now).fetchone()[0]
            length = int(lease_s * 1000)
            until = now + length
            run(sql("DELETE FROM {relay} WHERE NOT {lives}"))
            run(sql("INSERT OR REPLACE INTO {relay} (owner, until, length) VALUES (?, ?, ?)"), (owner, until, length))
            relays = run(sql("SELECT count(*) FROM {relay}")).fetchone()[0]
            share = -(-BUCKETS // relays)
            self._give_up(run, owner, release)
            # In this order: each statement has a time of its own, and a lease that runs out in between is not told.
            run(sql("UPDATE {lease} SET until = ?, length = ? WHERE owner = ? AND {lives}"), (until, length, owner))
            renewed = run(sql("SELECT bucket, token FROM {lease} WHERE owner = ? AND until = ?"), (owner, until))
            leases = [Lease(*found) for found in renewed.fetchall()]
            free = run(
                sql("SELECT bucket, token, owner FROM {lease} WHERE owner IS NULL OR NOT {lives} ORDER BY bucket")
            ).fetchall()
            for bucket, token, former in free:
                if len(leases) >= share:
                    break
                if former not in (None, owner) and fenced is not None and former not in fenced:
                    continue
                if bucket not in avoid and bucket not in release:
                    run(
                        sql("UPDATE {lease} SET owner = ?, token = ?, until = ?, length = ? WHERE bucket = ?"),
                        (owner, token + 1, until, length, bucket),
                    )
                    leases.append(Lease(bucket, token + 1))
        return leases, share

    def run_out(self) -> set[str]:
        """As `OutboxStore.run_out`."""
        with self._reading() as run:
            found = run(self._tables.sql("SELECT DISTINCT owner FROM {lease} WHERE owner IS NOT NULL AND NOT {lives}"))
            return {owner for (owner,) in found}

    def leave(self, owner: str, *, keep: Collection[int]) -> None:
        """As `OutboxStore.leave`."""
        with self._writing() as run:
            run(self._tables.sql("DELETE FROM {relay} WHERE owner = ?"), (owner,))
            self._give_up(run, owner, set(range(BUCKETS)).difference(keep))

    def _give_up(self, run: Run, owner: str, release: Collection[int]) -> None:
        statement = self._tables.sql("UPDATE {lease} SET owner = NULL, until = 0 WHERE bucket = ? AND owner = ?")
        for bucket in release:
            run(statement, (bucket, owner))

    # -- reading

    def read(
        self,
        floors: Mapping[int, int],
        *,
        limit: int,
        max_bytes: int,
        in_flight: Callable[[], Collection[Place]],
    ) -> Reading:
        """As `OutboxStore.read`."""
        rows: list[StoredRow] = []
        left = dict(floors)  # of what was not read to its end
        new_floors: dict[int, int] = {}
        ended: set[int] = set()
        size = 0
        with self._reading() as run:
            while left and size < max_bytes and len(rows) < limit:
                share = max((limit - len(rows)) // len(left), _FEWEST_OF_BUCKET)
                for bucket, floor in list(left.items()):
                    if size >= max_bytes or len(rows) >= limit:
                        break
                    before, most = len(rows), min(share, limit - len(rows))
                    for row in run(self._read, (bucket, floor, most)):
                        rows.append(row)
                        size += len(row[2]) if isinstance(row[2], bytes) else 0
                        if size >= max_bytes:
                            break
                    if len(rows) > before:
                        left[bucket] = new_floors[bucket] = rows[-1][1]
                    if len(rows) - before < most and size < max_bytes:
                        ended.add(bucket)
                        del left[bucket]
        return Reading(rows, new_floors, ended)

    def read_due(
        self, buckets: Collection[int], *, avoid: Collection[Place], longest_s: float, limit: int
    ) -> list[DueRow]:
        """As `OutboxStore.read_due`."""
        # +bucket, so that the index on due_at is used: else all that wait are read, ten times a second.
        of_mine = f"AND +bucket IN ({_marks(buckets)}) AND NOT EXISTS (SELECT 1 FROM {{later}} AS earlier WHERE "
        of_mine += "earlier.bucket = mine.bucket AND earlier.key_hash = mine.key_hash AND earlier.seq < mine.seq)"
        rows: list[DueRow] = []
        with self._reading() as run:
            # What is due too late was put off before the clock was set back.
            for due in ("due_at <= {now}", "due_at > {now} + ?"):
                statement = self._tables.sql(
                    f"SELECT bucket, seq, {_PACKED}, deliver_by, attempts, key_hash FROM {{later}} AS mine "
                    f"WHERE scheduled = 0 AND {due} {of_mine} ORDER BY due_at LIMIT ?"
                )
                longest = [int(longest_s * 1000)] if "?" in due else []
                found = run(statement, (*longest, *buckets, limit - len(rows) + len(avoid)))
                rows += [DueRow(*row) for row in found if row[:2] not in avoid]
        return rows[:limit]

    def due_scheduled(self, buckets: Collection[int], *, avoid: Collection[Place], limit: int) -> list[Place]:
        """As `OutboxStore.due_scheduled`."""
        statement = self._tables.sql(
            "SELECT bucket, seq FROM {later} WHERE scheduled = 1 AND due_at <= {now} AND "
            f"+bucket IN ({_marks(buckets)}) ORDER BY due_at, seq LIMIT ?"
        )
        with self._reading() as run:
            found = run(statement, (*buckets, limit + len(avoid))).fetchall()
        return [place for place in found if place not in avoid][:limit]

    def held_keys(self, buckets: Collection[int]) -> list[HeldKey]:
        """As `OutboxStore.held_keys`."""
        statement = self._tables.sql(
            f"SELECT bucket, key_hash, min(seq) FROM {{later}} WHERE bucket IN ({_marks(buckets)}) "
            "AND key_hash NOT NULL GROUP BY bucket, key_hash"
        )
        with self._reading() as run:
            return [HeldKey(*row) for row in run(statement, tuple(buckets))]

    def changes(self) -> int:
        """As `OutboxStore.changes`."""
        with self._reading() as run:
            return int(run(self._changes).fetchone()[0])

    def left(self) -> int:
        """As `OutboxStore.left`."""
        kinds = ("{outbox}", "{later} WHERE scheduled = 0", "{later} WHERE scheduled = 1 AND due_at <= {now}")
        counts = (f"(SELECT count(*) FROM (SELECT 1 FROM {kind} LIMIT {_MOST_LEFT}))" for kind in kinds)
        with self._reading() as run:
            return int(run(self._tables.sql(f"SELECT {' + '.join(counts)}")).fetchone()[0])

    # -- writing

    def admit_scheduled(self, leases: Mapping[int, int], places: Sequence[Place]) -> int:
        """As `OutboxStore.admit_scheduled`."""
        with self._writing() as run:
            valid = self._valid(run, leases)
            mine = [place for place in places if place[0] in valid]
            if not mine:
                return 0
            now = run(self._now).fetchone()[0]
            run(self._take_numbers, (len(mine),))
            first = run(self._last_number).fetchone()[0] - len(mine) + 1
            numbered = [(first + n, *place, now) for n, place in enumerate(mine)]
            self._connection.executemany(self._admit, numbered)
            return self._connection.executemany(self._delete_admitted, [row[1:] for row in numbered]).rowcount

    def _valid(self, run: Run, leases: Mapping[int, int]) -> set[int]:
        """The buckets whose leases hold."""
        holding = run(self._tables.sql("SELECT bucket, token FROM {lease} WHERE {lives} AND owner NOT NULL"))
        return {bucket for bucket, token in holding.fetchall() if leases.get(bucket) == token}

    def settle(
        self,
        leases: Mapping[int, int],
        *,
        done: Sequence[Place],
        done_later: Sequence[Place],
        failures: Sequence[Failure],
        failures_later: Sequence[Failure],
    ) -> set[int]:
        """As `OutboxStore.settle`."""
        with self._writing() as run:
            now = run(self._now).fetchone()[0]
            valid = self._valid(run, leases)
            lost = set(leases) - valid
            if lost:
                done = [place for place in done if place[0] in valid]
                done_later = [place for place in done_later if place[0] in valid]
                failures = [failure for failure in failures if failure.bucket in valid]
                failures_later = [failure for failure in failures_later if failure.bucket in valid]
            self._connection.executemany(self._delete, done)
            self._connection.executemany(self._delete_later, done_later)
            for each in failures:
                if each.due_in_s is None:
                    run(self._to_dead, (now, each.attempts, each.error, each.bucket, each.seq))
                else:
                    due_at = now + int(each.due_in_s * 1000)
                    run(self._to_later, (due_at, each.attempts, each.error, each.key_hash, each.bucket, each.seq))
                run(self._delete, (each.bucket, each.seq))
            for each in failures_later:
                if each.due_in_s is None:
                    run(self._later_to_dead, (now, each.attempts, each.error, each.bucket, each.seq))
                    run(self._delete_later, (each.bucket, each.seq))
                else:
                    due_at = now + int(each.due_in_s * 1000)
                    run(self._put_off, (due_at, each.attempts, each.error, each.bucket, each.seq))
        return lost


def _marks(values: Collection[int]) -> str:
    return ", ".join("?" * len(values))
