"""What a relay does in a PostgreSQL database."""

from __future__ import annotations

import itertools
import zlib
from typing import TYPE_CHECKING, cast

import psycopg

from kbatch._fastmap import monotonic
from kbatch._logs import tell
from kbatch._outbox._postgres_rows import array_text
from kbatch._outbox._postgres_session import IDENTITY, PostgresSession
from kbatch._outbox._snapshots import Gaps, Snapshot
from kbatch._outbox._store import BIGGEST_NUMBER, BUCKETS, DueRow, HeldKey, Lease, Reading

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from typing import Any

    from kbatch._outbox._postgres_session import Rows, Run
    from kbatch._outbox._postgres_tables import PostgresTables
    from kbatch._outbox._snapshots import Range
    from kbatch._outbox._store import Failure, Place, StoredRow

__all__ = ["PostgresStore"]

_MOST_LEFT = 1000
_FEWEST_OF_BUCKET = 50
_FEW_ROWS = 200  # between two renewals, which are a second apart. With more, polling finds them as soon

# age() counts to the number that the next transaction will have. That is asked for last, so whoever has taken a number
# of a row up to `last` has a lower one.
_SNAPSHOT = (
    "WITH taken AS MATERIALIZED (SELECT %s AS last) "
    "SELECT last, pg_current_snapshot()::text, age(pg_snapshot_xmax(pg_current_snapshot())::xid) FROM taken"
)

_FEW_BUCKETS = 4  # of a statement, until it is known to be quick
_SLOW_S, _QUICK_S = 0.5, 0.1
_FAR = 100_000  # numbers of a bucket that were passed before: if its deleted rows had them it takes long
_MOST_S = 2.0  # of a reading, or what it has found would be too late

_KEPT = "bucket, seq, id, packed, created_at, deliver_by"

_TOKEN_BITS = 63
_REFUSED_TO_ASK = (
    psycopg.errors.InsufficientPrivilege,
    psycopg.errors.UndefinedFunction,
    psycopg.errors.FeatureNotSupported,
)


class PostgresStore(PostgresSession):
    """A relay's connection to an outbox in PostgreSQL.

    Transactions commit in another order than their rows have numbers, so rows come to light below those that were
    read. `Gaps` knows where that may be; a reading is one snapshot, which has all rows of a key up to any that it has.

    A lease's token is another one on another server. A standby that is promoted may lack what the old server had
    committed, and give the numbers of rows once more: whoever has read a row on one server must not delete its number
    on the other. So the leases are lost then.

    Args:
        connection: In autocommit mode. It is the store's from now on.
        listens: Transactions that add are to tell of themselves, as long as few rows come.
    """

    def __init__(self, connection: psycopg.Connection[Any], tables: PostgresTables, *, listens: bool = False) -> None:
        super().__init__(connection, tables)
        self._gaps = Gaps()
        self._listens = listens
        self._rows_read = 0  # since the last renewal
        self._server = f"(SELECT {IDENTITY})" if self._may_ask(f"SELECT {IDENTITY}") else "''"
        self._at_once = _FEW_BUCKETS
        self._passed: dict[int, int] = {}  # up to where each bucket was read
        # Who may not ask for the last number passes by what was deleted again and again.
        self._snapshot = _SNAPSHOT % tables.sql("{last_number}")
        sql = tables.sql
        if not self._may_ask(self._snapshot) or self._has_cache():
            self._snapshot = _SNAPSHOT % "NULL::bigint"
        of_ranges = """
            SELECT bucket, seq, packed, deliver_by FROM (
                SELECT of_range.*, sum(octet_length(packed)) OVER (ROWS UNBOUNDED PRECEDING) - octet_length(packed)
                    AS size_before
                FROM unnest($1::smallint[], $2::bigint[], $3::bigint[]) AS range (bucket, low, high)
                CROSS JOIN LATERAL (
                    SELECT bucket, seq, packed, deliver_by FROM {outbox} AS mine
                    WHERE mine.bucket = range.bucket AND seq > low AND seq <= high %s
                    ORDER BY mine.bucket, seq LIMIT $4
                ) AS of_range
                LIMIT $5
            ) AS found WHERE size_before < $6
        """
        self._read = sql(of_ranges % "")
        self._read_but = sql(of_ranges % "AND seq NOT IN (SELECT unnest($7::bigint[]))")
        places = "unnest($1::smallint[], $2::bigint[]) AS place (bucket, seq)"
        at = "gone.bucket = place.bucket AND gone.seq = place.seq"
        self._delete = sql(f"DELETE FROM {{outbox}} AS gone USING {places} WHERE {at}")
        self._delete_later = sql(f"DELETE FROM {{later}} AS gone USING {places} WHERE {at}")
        gone = "gone.bucket, gone.seq, gone.id, gone.packed, gone.created_at, gone.deliver_by"
        failed = (
            "unnest($1::smallint[], $2::bigint[], $3::bigint[], $4::integer[], $5::bigint[], $6::text[]) "
            "AS place (bucket, seq, due_in_ms, attempts, key_hash, error)"
        )

        def moves(of: str, to: str, columns: str, values: str) -> str:
            replaced = ", ".join(f"{name} = excluded.{name}" for name in f"{_KEPT}, {columns}".split(", ")[2:])
            return sql(
                f"WITH moved AS (DELETE FROM {of} AS gone USING {failed} WHERE {at} "
                f"RETURNING {gone}, due_in_ms, place.attempts, error, place.key_hash) "
                f"INSERT INTO {to} ({_KEPT}, {columns}) SELECT {_KEPT}, {values} FROM moved "
                f"ON CONFLICT (bucket, seq) DO UPDATE SET {replaced}"
            )

        to_later = ("{later}", "due_at, attempts, last_error, key_hash", "{now} + due_in_ms, attempts, error, key_hash")
        to_dead = ("{dead}", "died_at, attempts, last_error", "{now}, attempts, error")
        self._to_later = moves("{outbox}", *to_later)
        self._to_dead = moves("{outbox}", *to_dead)
        self._later_to_dead = moves("{later}", *to_dead)
        # Its age is that of a row that was added when it was due. What was cancelled or put off meanwhile stays.
        self._admit = sql(
            f"WITH due AS (DELETE FROM {{later}} AS gone USING {places} "
            f"WHERE {at} AND gone.scheduled = 1 AND gone.due_at <= {{now}} RETURNING {gone}, gone.due_at) "
            f"INSERT INTO {{outbox}} ({_KEPT}) SELECT bucket, {{next_number}}, id, packed, "
            "greatest(created_at, due_at * 1000), deliver_by FROM (SELECT * FROM due ORDER BY due_at, seq) AS sorted "
            "RETURNING 1"
        )
        self._put_off = sql(
            "UPDATE {later} AS gone SET due_at = {now} + due_in_ms, attempts = place.attempts, last_error = error "
            f"FROM {failed} WHERE {at}"
        )

    def _has_cache(self) -> bool:
        """Whether sessions take numbers for later transactions: the last number that was taken says nothing then."""
        asked = self._tables.sql("{has_cache}")
        if not self._may_ask(asked):
            return False
        with self._errors():
            has_cache = self._run(asked) == [(True,)]
        if has_cache:
            text = "the sequence of %s has a CACHE, which mixes up the order of records and has a relay read more: %s"
            tell(text, self._tables.names["outbox"], "ALTER COLUMN seq SET CACHE 1")
        return has_cache

    def _may_ask(self, statement: str) -> bool:
        """Whether the server lets this user ask: some services do not. Raises if there is no answer."""
        with self._errors():
            try:
                self._run(statement)
            except psycopg.errors.ObjectNotInPrerequisiteState:
                return True  # of a standby, which writes nothing, or is promoted soon
            except _REFUSED_TO_ASK:
                return False
        return True

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
        length = int(lease_s * 1000)
        # Of what another session has under its lock nothing is waited for: it is there the next time.
        others = "FOR UPDATE SKIP LOCKED"
        with self._writing() as run:
            run(sql(f"DELETE FROM {{relay}} WHERE owner IN (SELECT owner FROM {{relay}} WHERE NOT {{lives}} {others})"))
            run(
                sql(
                    "INSERT INTO {relay} (owner, until, length, listens) VALUES ($1, {now} + $2::bigint, $2, $3) "
                    "ON CONFLICT (owner) DO UPDATE SET until = excluded.until, length = excluded.length, "
                    "listens = excluded.listens"
                ),
                (owner, length, int(self._listens and self._rows_read < _FEW_ROWS)),
            )
            self._rows_read = 0
            ((relays,),) = run(sql("SELECT count(*) FROM {relay} WHERE {lives}"))
            share = -(-BUCKETS // max(relays, 1))  # its own line has run out if the clock makes a large step
            self._give_up(run, owner, release)
            found = run(
                sql(
                    "UPDATE {lease} SET until = {now} + $2::bigint, length = $2 WHERE owner = $1 AND {lives} "
                    f"RETURNING bucket, token, {self._server}"
                ),
                (owner, length),
            )
            found += run(
                sql(
                    "UPDATE {lease} SET owner = $1, token = token + 1, until = {now} + $2::bigint, length = $2 "
                    "WHERE bucket IN (SELECT bucket FROM {lease} WHERE (owner IS NULL OR NOT {lives}) "
                    "AND bucket <> ALL($3::smallint[]) AND (owner IS NULL OR owner = $1 OR $5::text[] IS NULL "
                    f"OR owner = ANY($5)) ORDER BY bucket LIMIT $4 {others}) RETURNING bucket, token, "
                    f"{self._server}"
                ),
                (
                    owner,
                    length,
                    array_text([*avoid, *release]),
                    max(share - len(found), 0),
                    None if fenced is None else list(fenced),
                ),
            )
        return [Lease(bucket, _token(*rest)) for bucket, *rest in sorted(found)], share

    def run_out(self) -> set[str]:
        """As `OutboxStore.run_out`."""
        with self._reading() as (run, _):
            found = run(self._tables.sql("SELECT DISTINCT owner FROM {lease} WHERE owner IS NOT NULL AND NOT {lives}"))
            return {owner for (owner,) in found}

    def leave(self, owner: str, *, keep: Collection[int]) -> None:
        """As `OutboxStore.leave`."""
        with self._writing() as run:
            run(self._tables.sql("DELETE FROM {relay} WHERE owner = $1"), (owner,))
            self._give_up(run, owner, set(range(BUCKETS)).difference(keep))

    def _give_up(self, run: Run, owner: str, release: Collection[int]) -> None:
        if release:
            statement = "UPDATE {lease} SET owner = NULL, until = 0 WHERE owner = $1 AND bucket = ANY($2::smallint[])"
            run(self._tables.sql(statement), (owner, array_text(release)))

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
        if not floors:
            return Reading([], {}, set())
        rows: list[StoredRow] = []
        new_floors: dict[int, int] = {}
        ended: set[int] = set()
        size = 0
        began = monotonic()
        with self._reading(self._snapshot) as (run, ((last, text, ahead),)):
            now = Snapshot.parsed(text, ahead)
            gaps = self._gaps.to_read(floors, now)
            # Of each bucket what is to be read, the last of it without an end.
            left = {bucket: [*gaps.get(bucket, ()), (floor, BIGGEST_NUMBER)] for bucket, floor in floors.items()}
            statement = self._read
            known: list[str] = []
            if gaps:
                statement, known = self._read_but, [array_text(seq for _, seq in in_flight())]
            if self._looks_far_back(left):  # how quick it was above all that says nothing
                self._at_once = min(self._at_once, _FEW_BUCKETS)
            while left and size < max_bytes and len(rows) < limit and monotonic() - began < _MOST_S:
                most = limit - len(rows)
                share = max(most // len(left), _FEWEST_OF_BUCKET)
                asked = list(itertools.islice(left.items(), self._at_once))
                ranges = [(bucket, *each) for bucket, of_bucket in asked for each in of_bucket]
                asked_at = monotonic()
                found = run(
                    statement, (*map(array_text, zip(*ranges, strict=True)), share, most, max_bytes - size, *known)
                )
                self._learn_how_many(monotonic() - asked_at)
                size_found = sum(len(row[2]) for row in found)
                is_cut = len(found) == most or size + size_found >= max_bytes
                at = 0
                for bucket, of_bucket in asked:
                    begin = at
                    while at < len(found) and found[at][0] == bucket:
                        at += 1
                    is_last = is_cut and at == len(found)  # perhaps not read as far as it should have been
                    taken = self._take(bucket, of_bucket, found[begin:at], share, is_last, now)
                    if taken:
                        rows += taken
                        new_floors[bucket] = max(floors[bucket], taken[-1][1])
                        size += sum(len(row[2]) for row in taken)
                    del left[bucket]
                    if of_bucket:
                        left[bucket] = of_bucket  # behind the others
                    else:
                        ended.add(bucket)
                        self._raise_floor(bucket, new_floors, floors, last, now)
                    if is_last:
                        break
        self._rows_read += len(rows)
        self._passed.update({bucket: floors[bucket] for bucket in ended} | new_floors)
        return Reading(rows, new_floors, ended)

    def _raise_floor(
        self, bucket: int, new_floors: dict[int, int], floors: Mapping[int, int], last: int | None, now: Snapshot
    ) -> None:
        """Has what was deleted lie below the floor of a bucket that was read to its end."""
        floor = new_floors.get(bucket, floors[bucket])
        if last is not None and last > floor:
            self._gaps.was_read(bucket, floor, last, now, is_empty=True)
            new_floors[bucket] = last

    def _looks_far_back(self, left: Mapping[int, Sequence[Range]]) -> bool:
        """Whether ranges that are to be read have many numbers that were read before, or perhaps by others."""
        for bucket, ranges in left.items():
            passed = self._passed.get(bucket, BIGGEST_NUMBER)
            if passed and any(low == 0 or min(high, passed) - low > _FAR for low, high in ranges):
                return True
        return False

    def _learn_how_many(self, took_s: float) -> None:
        # What was deleted and is kept for an old snapshot is passed by, however much it is.
        if took_s > _SLOW_S:
            self._at_once = max(self._at_once // 2, 1)
        elif took_s < _QUICK_S:
            self._at_once = min(2 * self._at_once, BUCKETS)

    def _take(
        self, bucket: int, ranges: list[Range], found: Rows, share: int, is_last: bool, now: Snapshot
    ) -> list[StoredRow]:
        """Of a bucket's rows those below which nothing was left out. What is left to be read stays in `ranges`."""
        at = 0
        while ranges:
            low, high = ranges[0]
            begin = at
            while at < len(found) and found[at][1] <= high:
                at += 1
            is_whole = at - begin < share and not (is_last and at == len(found))
            end = found[at - 1][1] if at > begin else low
            if high == BIGGEST_NUMBER:
                if end > low:
                    self._gaps.was_read(bucket, low, end, now, is_empty=False)
            elif is_whole or end > low:
                self._gaps.was_read_again(bucket, low, high if is_whole else end, now, is_empty=at == begin)
            if not is_whole:
                ranges[0] = (end, high)
                break
            ranges.pop(0)
        return cast("list[StoredRow]", found[:at])

    def read_due(
        self, buckets: Collection[int], *, avoid: Collection[Place], longest_s: float, limit: int
    ) -> list[DueRow]:
        """As `OutboxStore.read_due`."""
        rows: list[DueRow] = []
        with self._reading() as (run, _):
            # What is due too late was put off before the clock was set back.
            for due in ("due_at <= {now}", "due_at > {now} + $4::bigint"):
                statement = self._tables.sql(
                    "SELECT bucket, seq, packed, deliver_by, attempts, key_hash FROM {later} AS mine "
                    f"WHERE scheduled = 0 AND {due} AND bucket = ANY($1::smallint[]) "
                    "AND NOT EXISTS (SELECT FROM {later} AS earlier WHERE "
                    "earlier.bucket = mine.bucket AND earlier.key_hash = mine.key_hash AND earlier.seq < mine.seq) "
                    "AND (bucket, seq) NOT IN (SELECT * FROM unnest($2::smallint[], $3::bigint[])) "
                    "ORDER BY due_at LIMIT $5"
                )
                avoided = (array_text(bucket for bucket, _ in avoid), array_text(seq for _, seq in avoid))
                found = run(statement, (array_text(buckets), *avoided, int(longest_s * 1000), limit - len(rows)))
                rows += [DueRow(*row) for row in found]
        return rows

    def due_scheduled(self, buckets: Collection[int], *, avoid: Collection[Place], limit: int) -> list[Place]:
        """As `OutboxStore.due_scheduled`."""
        statement = self._tables.sql(
            "SELECT bucket, seq FROM {later} WHERE scheduled = 1 AND due_at <= {now} AND bucket = ANY($1::smallint[]) "
            "AND (bucket, seq) NOT IN (SELECT * FROM unnest($2::smallint[], $3::bigint[])) ORDER BY due_at, seq "
            "LIMIT $4"
        )
        avoided = (array_text(bucket for bucket, _ in avoid), array_text(seq for _, seq in avoid))
        with self._reading() as (run, _):
            return cast("list[Place]", run(statement, (array_text(buckets), *avoided, limit)))

    def held_keys(self, buckets: Collection[int]) -> list[HeldKey]:
        """As `OutboxStore.held_keys`."""
        statement = self._tables.sql(
            "SELECT bucket, key_hash, min(seq) FROM {later} WHERE bucket = ANY($1::smallint[]) "
            "AND key_hash IS NOT NULL GROUP BY bucket, key_hash"
        )
        with self._reading() as (run, _):
            return [HeldKey(*row) for row in run(statement, (array_text(buckets),))]

    def changes(self) -> int:
        """As `OutboxStore.changes`."""
        # Asked after each reading, so in one round trip: a statement is a transaction, too.
        with self._errors():
            return int(self._run(self._tables.sql("SELECT changes FROM {meta} WHERE one = 1"))[0][0])

    def left(self) -> int:
        """As `OutboxStore.left`."""
        statement = self._tables.sql(
            "SELECT (SELECT count(*) FROM (SELECT FROM {outbox} LIMIT $1) AS waiting) + "
            "(SELECT count(*) FROM (SELECT FROM {later} WHERE scheduled = 0 LIMIT $1) AS later) + "
            "(SELECT count(*) FROM (SELECT FROM {later} WHERE scheduled = 1 AND due_at <= {now} LIMIT $1) AS due)"
        )
        with self._reading() as (run, _):
            return int(run(statement, (_MOST_LEFT,))[0][0])

    # -- writing

    def admit_scheduled(self, leases: Mapping[int, int], places: Sequence[Place]) -> int:
        """As `OutboxStore.admit_scheduled`."""
        with self._writing() as run:
            valid = self._valid(run, leases)
            mine = [place for place in places if place[0] in valid]
            if not mine:
                return 0
            self._lock(run, "later", mine)
            return len(run(self._admit, tuple(map(array_text, zip(*mine, strict=True)))))

    def _valid(self, run: Run, leases: Mapping[int, int]) -> set[int]:
        """The buckets whose leases hold, until the transaction ends."""
        # Who takes a bucket passes over those whose lease is under this lock.
        holding = run(
            self._tables.sql(
                f"SELECT mine.bucket, mine.token, {self._server} FROM {{lease}} AS lease "
                "JOIN unnest($1::smallint[], $2::bigint[]) AS mine (bucket, token) "
                "ON lease.bucket = mine.bucket AND lease.token = mine.token "
                "WHERE {lives} AND owner IS NOT NULL FOR SHARE OF lease"
            ),
            (array_text(leases), array_text(token & 2**_TOKEN_BITS - 1 for token in leases.values())),
        )
        return {bucket for bucket, *rest in holding if leases[bucket] == _token(*rest)}

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
            valid = self._valid(run, leases)
            of_later = [*done_later, *((failure.bucket, failure.seq) for failure in failures_later)]
            self._lock(run, "later", [place for place in of_later if place[0] in valid])
            for statement, places in ((self._delete, done), (self._delete_later, done_later)):
                places = [place for place in places if place[0] in valid]
                if places:
                    run(statement, tuple(map(array_text, zip(*places, strict=True))))
            for to_later, to_dead, failed in (
                (self._to_later, self._to_dead, failures),
                (self._put_off, self._later_to_dead, failures_later),
            ):
                failed = [failure for failure in failed if failure.bucket in valid]
                self._move(run, to_later, [failure for failure in failed if failure.due_in_s is not None])
                self._move(run, to_dead, [failure for failure in failed if failure.due_in_s is None])
        return set(leases) - valid

    def _move(self, run: Run, statement: str, failures: Sequence[Failure]) -> None:
        if failures:
            numbers = zip(
                *(
                    (each.bucket, each.seq, int((each.due_in_s or 0.0) * 1000), each.attempts, each.key_hash)
                    for each in failures
                ),
                strict=True,
            )
            run(statement, (*map(array_text, numbers), [self._storable(each.error) for each in failures]))

    def _storable(self, text: str) -> str:
        """A text that the database takes, or a row could never be moved."""
        is_utf_8 = self._connection.info.parameter_status("server_encoding") == "UTF8"
        text = text.replace("\0", "\\0")
        return text.encode("utf-8" if is_utf_8 else "ascii", "backslashreplace").decode()


def _token(token: int, server: str) -> int:
    return zlib.crc32(server.encode()) << _TOKEN_BITS | token
