"""An outbox without a database, in plain Python: a third store, by what `kbatch.stores` says alone."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from kbatch import Envelope, OutboxError
from kbatch.stores import (
    BUCKETS,
    DueRow,
    Failure,
    HeldKey,
    KeptRow,
    Lease,
    MappedBatch,
    NewRow,
    OutboxBase,
    Place,
    Position,
    Reading,
    RefusedWriteError,
    StoredRow,
    Table,
)


@dataclass(frozen=True)
class Row:
    id: bytes
    packed: bytes
    created_at: int
    deliver_by: int | None
    at_ms: int = 0  # when it died, or is due
    attempts: int = 0
    error: str = ""
    key_hash: int | None = None
    is_scheduled: bool = False


@dataclass(frozen=True)
class Held:
    """A lease, or the line of a relay."""

    owner: str | None = None
    token: int = 0
    until: int = 0
    length: int = 0


@dataclass
class Tables:
    """All that is stored. A transaction changes a copy, which takes its place when it is committed."""

    outbox: dict[Place, Row] = field(default_factory=dict)
    later: dict[Place, Row] = field(default_factory=dict)
    dead: dict[Place, Row] = field(default_factory=dict)
    leases: dict[int, Held] = field(default_factory=lambda: {bucket: Held() for bucket in range(BUCKETS)})
    relays: dict[str, Held] = field(default_factory=dict)
    last_number: int = 0
    changes: int = 0

    def copy(self) -> "Tables":
        rows = dict(self.outbox), dict(self.later), dict(self.dead)
        return Tables(*rows, dict(self.leases), dict(self.relays), self.last_number, self.changes)

    def of(self, table: str) -> dict[Place, Row]:
        found: dict[Place, Row] = getattr(self, table)
        return found


class MemoryOutbox(OutboxBase):
    """Its transactions run one after the other. `transaction` gives what `add` takes as its connection."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tables = Tables()
        self.lock = threading.RLock()
        self.ahead_ms = 0  # of the machine's clock
        self.refused: dict[str, bytes] = {}  # by table, the id of the row that it does not take

    def now_ms(self) -> int:
        return int(time.time() * 1000) + self.ahead_ms

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Tables]:
        with self.lock:
            tables = self.tables.copy()
            yield tables
            self.tables = tables

    def add(self, tables: Tables, envelopes: Iterable[Envelope[Any]], /, *, topic: str | None = None) -> int:
        batch = self.map_all(topic, envelopes)
        self.insert(tables, [batch])
        self.tell_watchers()
        return self.count([batch])

    def insert(self, tables: Tables, batches: Sequence[MappedBatch]) -> None:
        hot, scheduled = self.rows(batches, tables.last_number + 1)
        tables.last_number += self.count(batches)
        for new in hot:
            self.put(tables, "outbox", new[:2], Row(*new[2:]))
        for later in scheduled:
            self.put(tables, "later", later[:2], Row(*later[2:], is_scheduled=True))

    def put(self, tables: Tables, table: str, place: Place, row: Row) -> None:
        if self.refused.get(table) == row.id:
            raise RefusedWriteError(f"{table} takes no row with the id {UUID(bytes=row.id)}")
        tables.of(table)[place] = row

    def open_store(self) -> "MemoryStore":
        return MemoryStore(self)

    def open_writer(self) -> "MemoryWriter":
        return MemoryWriter(self)

    def open_admin(self) -> "MemoryAdmin":
        return MemoryAdmin(self)


class Connection:
    def __init__(self, outbox: MemoryOutbox) -> None:
        self.outbox = outbox
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True

    def writing(self) -> contextlib.AbstractContextManager[Tables]:
        self.check()
        return self.outbox.transaction()

    @property
    def tables(self) -> Tables:
        """As they are now: nobody changes what was committed."""
        self.check()
        return self.outbox.tables

    def check(self) -> None:
        if self.is_closed:
            raise OutboxError("the connection is closed")


class MemoryWriter(Connection):
    def commit(self, take: Callable[[], Sequence[MappedBatch]]) -> bool:
        with self.writing() as tables:
            self.outbox.insert(tables, take())
        self.outbox.tell_watchers(True)
        return True


class MemoryStore(Connection):
    # -- leases

    def lives(self, held: Held) -> bool:
        now = self.outbox.now_ms()
        return held.owner is not None and now < held.until <= now + 2 * held.length

    def renew(
        self,
        owner: str,
        lease_s: float,
        *,
        release: Collection[int],
        avoid: Collection[int],
        fenced: Collection[str] | None = None,
    ) -> tuple[list[Lease], int]:
        length = int(lease_s * 1000)
        until = self.outbox.now_ms() + length
        with self.writing() as tables:
            tables.relays = {name: each for name, each in tables.relays.items() if self.lives(each)}
            tables.relays[owner] = Held(owner, 0, until, length)
            share = -(-BUCKETS // len(tables.relays))
            self.give_up(tables, owner, release)
            mine = [bucket for bucket, held in tables.leases.items() if held.owner == owner and self.lives(held)]
            for bucket, held in tables.leases.items():
                is_free = held.owner in (None, owner) or fenced is None or held.owner in fenced
                if len(mine) < share and is_free and not self.lives(held) and bucket not in {*avoid, *release}:
                    tables.leases[bucket] = dataclasses.replace(held, token=held.token + 1)
                    mine.append(bucket)
            for bucket in mine:
                tables.leases[bucket] = Held(owner, tables.leases[bucket].token, until, length)
            return [Lease(bucket, tables.leases[bucket].token) for bucket in mine], share

    def run_out(self) -> set[str]:
        return {held.owner for held in self.tables.leases.values() if held.owner and not self.lives(held)}

    def leave(self, owner: str, *, keep: Collection[int]) -> None:
        with self.writing() as tables:
            tables.relays.pop(owner, None)
            self.give_up(tables, owner, set(range(BUCKETS)).difference(keep))

    def give_up(self, tables: Tables, owner: str, buckets: Collection[int]) -> None:
        for bucket in buckets:
            if tables.leases[bucket].owner == owner:
                tables.leases[bucket] = dataclasses.replace(tables.leases[bucket], owner=None)

    def valid(self, tables: Tables, leases: Mapping[int, int]) -> set[int]:
        held = tables.leases
        return {bucket for bucket in leases if held[bucket].token == leases[bucket] and self.lives(held[bucket])}

    # -- reading. Numbers are given and committed under one lock, so no row comes to light below a floor.

    def read(
        self,
        floors: Mapping[int, int],
        *,
        limit: int,
        max_bytes: int,
        in_flight: Callable[[], Collection[Place]],
    ) -> Reading:
        left: dict[int, list[StoredRow]] = {bucket: [] for bucket in floors}
        for (bucket, seq), row in sorted(self.tables.outbox.items(), reverse=True):
            if bucket in left and seq > floors[bucket]:
                left[bucket].append((bucket, seq, row.packed, row.deliver_by))
        taken: dict[int, list[StoredRow]] = {bucket: [] for bucket in floors}
        while any(left.values()) and limit > 0 and max_bytes > 0:
            for bucket in [bucket for bucket, rows in left.items() if rows]:  # by turns
                if limit > 0 and max_bytes > 0:
                    taken[bucket].append(left[bucket].pop())
                    limit -= 1
                    max_bytes -= len(taken[bucket][-1][2])
        new_floors = {bucket: rows[-1][1] for bucket, rows in taken.items() if rows}
        ended = {bucket for bucket, rows in left.items() if not rows}
        return Reading([row for rows in taken.values() for row in rows], new_floors, ended)

    def read_due(
        self, buckets: Collection[int], *, avoid: Collection[Place], longest_s: float, limit: int
    ) -> list[DueRow]:
        now, first = self.outbox.now_ms(), {(key.bucket, key.key_hash): key.seq for key in self.held_keys(buckets)}
        due = [
            (row.at_ms, DueRow(*place, row.packed, row.deliver_by, row.attempts, row.key_hash))
            for place, row in self.tables.later.items()
            if place[0] in buckets and place not in avoid and not row.is_scheduled
            if row.at_ms <= now or row.at_ms > now + longest_s * 1000
            if row.key_hash is None or first[place[0], row.key_hash] == place[1]
        ]
        return [row for _, row in sorted(due, key=lambda each: each[0])][:limit]

    def held_keys(self, buckets: Collection[int]) -> list[HeldKey]:
        first: dict[tuple[int, int], int] = {}
        for (bucket, seq), row in sorted(self.tables.later.items()):
            if bucket in buckets and row.key_hash is not None:
                first.setdefault((bucket, row.key_hash), seq)
        return [HeldKey(*key, seq) for key, seq in first.items()]

    def due_scheduled(self, buckets: Collection[int], *, avoid: Collection[Place], limit: int) -> list[Place]:
        now = self.outbox.now_ms()
        due = [
            (row.at_ms, place[1], place)
            for place, row in self.tables.later.items()
            if row.is_scheduled and row.at_ms <= now and place[0] in buckets and place not in avoid
        ]
        return [place for _, _, place in sorted(due)][:limit]

    def changes(self) -> int:
        return self.tables.changes

    def left(self) -> int:
        tables, now = self.tables, self.outbox.now_ms()
        return len(tables.outbox) + sum(not row.is_scheduled or row.at_ms <= now for row in tables.later.values())

    # -- writing

    def admit_scheduled(self, leases: Mapping[int, int], places: Sequence[Place]) -> int:
        now, count = self.outbox.now_ms(), 0
        with self.writing() as tables:
            valid = self.valid(tables, leases)
            for place in places:
                row = tables.later.get(place)
                if place[0] in valid and row is not None and row.is_scheduled and row.at_ms <= now:
                    del tables.later[place]
                    tables.last_number += 1
                    created_at = max(row.created_at, row.at_ms * 1000)
                    admitted = Row(row.id, row.packed, created_at, row.deliver_by)
                    self.outbox.put(tables, "outbox", (place[0], tables.last_number), admitted)
                    count += 1
        return count

    def settle(
        self,
        leases: Mapping[int, int],
        *,
        done: Sequence[Place],
        done_later: Sequence[Place],
        failures: Sequence[Failure],
        failures_later: Sequence[Failure],
    ) -> set[int]:
        now = self.outbox.now_ms()
        with self.writing() as tables:
            valid = self.valid(tables, leases)
            for table, places, failed in (("outbox", done, failures), ("later", done_later, failures_later)):
                for place in places:
                    if place[0] in valid:
                        tables.of(table).pop(place, None)
                for each in failed:
                    place = each.bucket, each.seq
                    row = tables.of(table).pop(place, None) if each.bucket in valid else None
                    if row is not None:
                        at_ms = now + int((each.due_in_s or 0.0) * 1000)
                        kept = (row.id, row.packed, row.created_at, row.deliver_by, at_ms)
                        row = Row(*kept, each.attempts, each.error, each.key_hash)
                        self.outbox.put(tables, "dead" if each.due_in_s is None else "later", place, row)
        return set(leases) - valid


class MemoryAdmin(Connection):
    def kept(self, table: Table) -> list[KeptRow]:
        rows = [
            KeptRow(row.at_ms, *place, row.id, row.packed, row.created_at, row.deliver_by, row.attempts, row.error)
            for place, row in self.tables.of(table).items()
        ]
        return sorted(rows, key=lambda row: row.position)

    def page(
        self, table: Table, after: Position | None, *, since_ms: int | None, until_ms: int | None, limit: int
    ) -> list[KeptRow]:
        found = [row for row in self.kept(table) if after is None or row.position > after]
        found = [row for row in found if since_ms is None or row.at_ms >= since_ms]
        return [row for row in found if until_ms is None or row.at_ms < until_ms][:limit]

    def look_up(self, table: Table, numbers: Collection[int]) -> list[KeptRow]:
        wanted = set(numbers)
        return [row for row in self.kept(table) if row.seq in wanted]

    def delete(self, table: Table, places: Sequence[Place]) -> int:
        with self.writing() as tables:
            gone = [row for place in places if (row := tables.of(table).pop(place, None)) is not None]
            tables.changes += table == "later" and any(row.key_hash is not None for row in gone)
        return len(gone)

    def replay(self, places: Sequence[Place], now_us: int) -> int:
        count = 0
        with self.writing() as tables:
            for place in places:
                row = tables.dead.get(place)
                if row is not None and (row.deliver_by is None or row.deliver_by > now_us):
                    del tables.dead[place]
                    self.outbox.put(tables, "outbox", place, Row(row.id, row.packed, row.created_at, row.deliver_by))
                    count += 1
            tables.changes += 1
        return count

    def replace(self, place: Place, row: NewRow) -> bool:
        with self.writing() as tables:
            is_there = tables.dead.pop(place, None) is not None
            if is_there:
                self.outbox.put(tables, "outbox", row[:2], Row(*row[2:]))
            tables.changes += 1
        return is_there

    def reschedule(self, places: Sequence[Place], due_at_ms: int) -> int:
        with self.writing() as tables:
            found = [place for place in places if place in tables.later]
            for place in found:
                tables.later[place] = dataclasses.replace(tables.later[place], at_ms=due_at_ms)
        return len(found)
