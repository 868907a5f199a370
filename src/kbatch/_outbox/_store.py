"""What a relay, senders, and who looks after dead letters ask of the database that an outbox is in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

from kbatch._errors import OutboxError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from kbatch._fastmap import Envelope, MappedBatch

__all__ = [
    "BIGGEST_NUMBER",
    "BUCKETS",
    "DueRow",
    "DurableOutbox",
    "Failure",
    "HeldKey",
    "KeptRow",
    "Lease",
    "NewRow",
    "OutboxAdmin",
    "OutboxStore",
    "OutboxWriter",
    "Place",
    "Position",
    "Reading",
    "RefusedWriteError",
    "RelayOutbox",
    "ScheduledRow",
    "StoredRow",
    "Table",
]

BUCKETS = 64
BIGGEST_NUMBER = 2**63 - 1  # no row has a higher number


class RefusedWriteError(OutboxError):
    """The database answers, and does not take what is written: it is full, or a constraint or a trigger says no."""


# Where a row is, for as long as it is anywhere: in the hot table, among those that wait, or among the dead.
Place: TypeAlias = tuple[int, int]  # bucket, seq

# Of the hot table. `deliver_by` is in microseconds since 1970. Plain tuples: there is one for each record.
StoredRow: TypeAlias = tuple[int, int, bytes, "int | None"]  # bucket, seq, packed, deliver_by


class DueRow(NamedTuple):
    """A row that waited for its next attempt.

    Attributes:
        bucket, seq, packed, deliver_by: As of a `StoredRow`.
        attempts: How often it was refused.
        key_hash: As of the `Failure` that it came from.
    """

    bucket: int
    seq: int
    packed: bytes
    deliver_by: int | None
    attempts: int
    key_hash: int | None


class HeldKey(NamedTuple):
    """A key of which rows wait for their next attempt.

    Attributes:
        bucket, key_hash: What tells it from other keys.
        seq: The lowest number of its rows that wait.
    """

    bucket: int
    key_hash: int
    seq: int


class Failure(NamedTuple):
    """What becomes of a row that was not acknowledged.

    Attributes:
        bucket, seq: Which row.
        due_in_s: Seconds until its next attempt; ``None``: it is dead.
        attempts: How often it was refused.
        error: The last error.
        key_hash: A number for its topic and key, of 64 bits with a sign, to be stored; ``None`` without a key.
    """

    bucket: int
    seq: int
    due_in_s: float | None
    attempts: int
    error: str
    key_hash: int | None


class Lease(NamedTuple):
    """A bucket that a relay has.

    Attributes:
        bucket: Its number.
        token: Another one whenever the bucket changes hands, or the server does, and never 0.
    """

    bucket: int
    token: int


class Reading(NamedTuple):
    """What was read.

    Attributes:
        rows: Those of a bucket in the order of their numbers.
        floors: The floor, risen or not, of each bucket of which there are rows, and of others whose floor has risen.
        ended: The buckets that were read to their end.
    """

    rows: list[StoredRow]
    floors: dict[int, int]
    ended: set[int]


# Where rows are that are not to be sent, or not yet.
Table: TypeAlias = Literal["dead", "later"]

# As the hot table has it: bucket, seq, id, packed, created_at, deliver_by.
NewRow: TypeAlias = tuple[int, int, bytes, bytes, int, "int | None"]

# As `later` has it: the same, and when it is due, in milliseconds since 1970.
ScheduledRow: TypeAlias = tuple[int, int, bytes, bytes, int, "int | None", int]


# By which the rows of these tables are ordered: at_ms, bucket, seq.
Position: TypeAlias = tuple[int, int, int]


class KeptRow(NamedTuple):
    """A row of one of these tables. Somebody may have stored anything there: `id` and `packed` may be no bytes.

    Attributes:
        at_ms: When it died, or when it is due; milliseconds since 1970.
        bucket, seq: Which row.
        id: The envelope's id, 16 bytes.
        packed: The record.
        created_at, deliver_by: As of a `NewRow`.
        attempts: How often it was refused.
        error: The last error.
    """

    at_ms: int
    bucket: int
    seq: int
    id: object
    packed: object
    created_at: object
    deliver_by: object
    attempts: int
    error: str

    @property
    def position(self) -> Position:
        """By which it is ordered."""
        return self.at_ms, self.bucket, self.seq


class OutboxStore(Protocol):
    """A relay's own connection to its outbox. One thread uses it.

    Each method is one transaction, or none, which is over when it returns. What it raises when the database does not
    answer, or takes no writes, is an `OutboxError`; the relay then asks again later.
    """

    def renew(
        self,
        owner: str,
        lease_s: float,
        *,
        release: Collection[int],
        avoid: Collection[int],
        fenced: Collection[str] | None = None,
    ) -> tuple[list[Lease], int]:
        """Tells that `owner` lives, renews its leases for `lease_s` seconds by the database's clock, gives up those of
        the buckets `release` and takes buckets that nobody has, up to its share, but none of `avoid`.

        A lease that has run out is lost, also if nobody else has taken the bucket: it can only be taken again, which
        makes its token another one. One that ends in more than twice its length has run out, too: the clock was set
        back.

        Args:
            fenced: If it is given, leases that have run out are taken only of these owners and of `owner` itself.

        Returns:
            The leases that the owner has now, and how many buckets its share is.
        """

    def run_out(self) -> set[str]:
        """The owners of leases that have run out."""

    def leave(self, owner: str, *, keep: Collection[int]) -> None:
        """Tells that `owner` is gone, and gives up all its leases but those of the buckets `keep`, which run out."""

    def read(
        self,
        floors: Mapping[int, int],
        *,
        limit: int,
        max_bytes: int,
        in_flight: Callable[[], Collection[Place]],
    ) -> Reading:
        """Rows of buckets, each above its floor, the lowest first, fairly over the buckets in the order of `floors`.
        What one bucket leaves of its share the others get.

        A returned floor is the number up to which all rows were read now or before that could be seen. If rows may come
        to light below it, because transactions end in another order than they took their numbers, the store remembers
        where, and returns them before rows above. So what is returned has all rows of a key up to any that it has,
        if the application's transactions of one key follow each other. A store that is opened anew is asked with
        floors of 0.

        Args:
            in_flight: Rows that are not to be read again when rows come to light beside them. It is called only then.
        """

    def read_due(
        self, buckets: Collection[int], *, avoid: Collection[Place], longest_s: float, limit: int
    ) -> list[DueRow]:
        """Rows that are due by the database's clock, those first that are due for the longest, but none of `avoid`; of
        each key only the one with the lowest number. What is due in more than `longest_s` is due: the clock was set
        back. What is scheduled is not meant.
        """

    def held_keys(self, buckets: Collection[int]) -> list[HeldKey]:
        """Which keys have rows that wait for their next attempt."""

    def due_scheduled(self, buckets: Collection[int], *, avoid: Collection[Place], limit: int) -> list[Place]:
        """Rows whose ``scheduled_time`` has come, by the database's clock, the earliest first, but none of `avoid`."""

    def admit_scheduled(self, leases: Mapping[int, int], places: Sequence[Place]) -> int:
        """Moves such rows into the hot table, as far as the leases hold and they are still due. They get new numbers,
        above all that were given, in the order of `places`: each is as one that was added when it was due.

        Raises a `RefusedWriteError` as `settle` does. Then none was moved.

        Returns:
            How many.
        """

    def settle(
        self,
        leases: Mapping[int, int],
        *,
        done: Sequence[Place],
        done_later: Sequence[Place],
        failures: Sequence[Failure],
        failures_later: Sequence[Failure],
    ) -> set[int]:
        """Deletes what is done and moves what failed, in one transaction, as far as the leases hold.

        Raises a `RefusedWriteError` if the database takes other writes, so that it may be tried in smaller parts.

        Args:
            leases: Of each bucket its token.
            done, failures: Of rows in the hot table.
            done_later, failures_later: Of rows that came from `read_due`.

        Returns:
            The buckets whose lease does not hold any more, of which nothing was written.
        """

    def changes(self) -> int:
        """Another number after others than relays have put rows back into the hot table, or have deleted rows of
        `later` that held a key. What was read before must be looked at again."""

    def left(self) -> int:
        """0 if the outbox is empty but for the dead and what is scheduled for later, else a number of rows: all that
        wait, or some."""

    def close(self) -> None:
        """Gives the connection back."""


class OutboxWriter(Protocol):
    """The connection by which the DURABLE senders of a process add to their outbox. One thread uses it."""

    def commit(self, take: Callable[[], Sequence[MappedBatch]]) -> bool:
        """Adds what `take` gives in one transaction of its own, and commits it.

        `take` is called once, when the transaction may write: what comes while another connection writes is committed
        with the rest.

        Returns:
            False if another connection was writing for some 100 ms. Then `take` was not called.

        Raises:
            OutboxError: Nothing was added; with ``possibly_persisted`` it is not known whether it was.
        """

    def close(self) -> None:
        """Gives the connection back."""


class OutboxAdmin(Protocol):
    """What those who look after an outbox ask of its database. One thread uses it.

    Each method is one transaction; what it raises is an `OutboxError`. One that puts rows into the hot table, or that
    deletes rows that held a key, makes `OutboxStore.changes` another number within its transaction, so that relays
    notice.
    """

    def page(
        self, table: Table, after: Position | None, *, since_ms: int | None, until_ms: int | None, limit: int
    ) -> list[KeptRow]:
        """Rows by their positions, those behind `after`, with `at_ms` from `since_ms` and below
        `until_ms`."""

    def look_up(self, table: Table, numbers: Collection[int]) -> list[KeptRow]:
        """The rows of these numbers, as far as they are there, in the same order."""

    def delete(self, table: Table, places: Sequence[Place]) -> int:
        """Deletes rows; how many were there."""

    def replay(self, places: Sequence[Place], now_us: int) -> int:
        """Moves rows from the dead into the hot table, with their numbers; how many.

        Those stay that the hot table would not take, and those whose `deliver_by` is not after `now_us`.
        """

    def replace(self, place: Place, row: NewRow) -> bool:
        """Puts `row` into the hot table in place of a dead row; whether that was there."""

    def reschedule(self, places: Sequence[Place], due_at_ms: int) -> int:
        """Changes when rows of `later` are due; how many were there."""

    def close(self) -> None:
        """Gives the connection back."""


class RelayOutbox(Protocol):
    """What a `Relay` asks of an outbox. `OutboxBase` has the last two."""

    def open_store(self) -> OutboxStore:
        """The connection of a relay, which closes it. Raises an `OutboxError` if the tables are missing or the database
        does not answer."""

    def watch(self, watcher: Callable[[bool], object], /) -> None:
        """Calls ``watcher(False)`` after each `add` to this object, and ``watcher(True)`` after commits that it knows
        of. An outbox that never calls it is read after 100 ms at most."""

    def unwatch(self, watcher: Callable[[bool], object], /) -> None:
        """Calls it no more, if it does."""


class DurableOutbox(RelayOutbox, Protocol):
    """What DURABLE senders, and the relay of theirs, ask of an outbox. `OutboxBase` has `map`."""

    def map(self, topic: str | None, envelope: Envelope[Any], /) -> MappedBatch | None:
        """What an `OutboxWriter` adds of an envelope; ``None`` if its ``deliver_by`` has passed. Raises a
        `SerializationError` for one that could not be mapped, or is too large."""

    def open_writer(self) -> OutboxWriter:
        """The connection of this process's DURABLE senders, who close it. Raises as `open_store` does."""

    def add(self, connection: Any, envelopes: Iterable[Envelope[Any]], /, *, topic: str | None = None) -> Any:
        """Adds envelopes within the transaction that `connection` is in; how many. Only a sender that is given a
        ``connection`` calls it."""
