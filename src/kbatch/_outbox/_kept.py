"""What an outbox keeps and does not send, or not yet: how it is asked for, and what is seen of it."""

from __future__ import annotations

import contextlib
import itertools
import uuid
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from kbatch._checks import is_whole
from kbatch._errors import ConfigError, DeserializationError, type_name
from kbatch._fastmap import read_packed, unpack_record
from kbatch._outbox._store import BIGGEST_NUMBER

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from kbatch._fastmap import Envelope
    from kbatch._outbox._store import KeptRow, OutboxAdmin, Place, Position, Table

__all__ = ["Keeper", "KeptMessage", "OutboxQuery", "milliseconds", "moment"]

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_PAGE = 1_000


@dataclass(frozen=True)
class OutboxQuery:
    """Which messages of an outbox are meant: those to which everything applies that is given.

    Attributes:
        numbers: Their numbers.
        ids: Their ids.
        topic: Where they go.
        message_type: What type they are of.
        error: What their last error has in its text, upper and lower case being the same.
        since, until: From and before when they died, or are due; with a time zone.

    Raises:
        ConfigError: A value of the wrong type, or a time without a time zone.
    """

    numbers: Collection[int] | None = None
    ids: Collection[uuid.UUID] | None = None
    topic: str | None = None
    message_type: str | None = None
    error: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def __post_init__(self) -> None:
        for name, kind in (("numbers", int), ("ids", uuid.UUID)):
            values = getattr(self, name)
            if values is None:
                continue
            if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
                raise ConfigError(f"{name} must be a collection, not {type_name(values)}")
            values = frozenset(values)
            for value in values:
                if not (isinstance(value, kind) and (kind is not int or is_whole(value))):
                    raise ConfigError(f"{name} must hold {kind.__name__} only, not {type_name(value)}")
            object.__setattr__(self, name, values)
        for name in ("topic", "message_type", "error"):
            text = getattr(self, name)
            if text is not None and not isinstance(text, str):
                raise ConfigError(f"{name} must be str, not {type_name(text)}")
        for name in ("since", "until"):
            time = getattr(self, name)
            if time is not None and not isinstance(time, datetime):
                raise ConfigError(f"{name} must be a datetime, not {type_name(time)}")
            if time is not None and time.tzinfo is None:
                raise ConfigError(f"{name} must have a time zone: {time.isoformat()}")

    @property
    def is_all(self) -> bool:
        """Whether it means all messages."""
        return self == OutboxQuery()

    def means(self, seen: Seen) -> bool:
        """Whether it means this message, as far as the database does not look at it."""
        return (
            (self.numbers is None or seen.row.seq in self.numbers)
            and (self.ids is None or seen.id in self.ids)
            and (self.topic is None or seen.topic == self.topic)
            and (self.error is None or self.error.casefold() in seen.row.error.casefold())
            and (self.message_type is None or seen.message_type == self.message_type)
        )


@dataclass(frozen=True)
class KeptMessage:
    """A message that an outbox keeps and does not send, or not yet.

    Attributes:
        number: What it is known by in its outbox. A scheduled message gets another one when it is due.
        id: The envelope's id; ``None`` if what is stored is damaged.
        topic: Where it goes; ``None`` if what is stored is damaged.
        partition: The partition that it asks for, if any.
        key: Its key.
        message_type: The type that it has as an envelope.
        added_at: When it was added.
        deliver_by: When it has expired, if ever.
        attempts: How often it was refused.
        error: The last error.
    """

    number: int
    id: uuid.UUID | None
    topic: str | None
    partition: int | None
    key: bytes | None
    message_type: str | None
    added_at: datetime
    deliver_by: datetime | None
    attempts: int
    error: str
    _packed: object = field(repr=False, compare=False)
    _wire: str = field(repr=False, compare=False)
    _position: Position = field(repr=False, compare=False)

    @property
    def envelope(self) -> Envelope[Any]:
        """The message as `read_envelope` makes it of a record: its body is ``data``, not decoded.

        Raises:
            DeserializationError: What is stored is damaged, or no record of the outbox's wire format.
        """
        envelope = read_packed(_bytes(self._packed), wire=self._wire)
        # Not every format has the id in its headers.
        return envelope if self.id in (None, envelope.id) else envelope.replace(id=self.id)

    @property
    def record(self) -> tuple[str, int, int, bytes | None, bytes | None, list[tuple[str, bytes | None]]]:
        """As it goes to Kafka: topic, partition (-1 if it asks for none), timestamp in milliseconds, key, value and
        headers.

        Raises:
            DeserializationError: What is stored is damaged.
        """
        return unpack_record(_bytes(self._packed))


class Seen:
    """A row and what is found in it."""

    __slots__ = ("_wire", "id", "key", "message_type", "partition", "row", "topic")

    def __init__(self, row: KeptRow, wire: str) -> None:
        self.row = row
        self._wire = wire
        self.topic: str | None = None
        self.partition: int | None = None
        self.key: bytes | None = None
        self.message_type: str | None = None
        self.id = uuid.UUID(bytes=row.id) if isinstance(row.id, bytes) and len(row.id) == 16 else None
        try:
            packed = _bytes(row.packed)
            self.topic, partition, _, self.key, _, _ = unpack_record(packed)
            self.partition = None if partition < 0 else partition
            self.message_type = read_packed(packed, wire=wire).message_type
        except DeserializationError:
            pass

    @property
    def values(self) -> dict[str, Any]:
        """The arguments of a `KeptMessage`."""
        row = self.row
        return {
            "number": row.seq,
            "id": self.id,
            "topic": self.topic,
            "partition": self.partition,
            "key": self.key,
            "message_type": self.message_type,
            "added_at": moment(row.created_at if isinstance(row.created_at, int) else 0),
            "deliver_by": moment(row.deliver_by) if isinstance(row.deliver_by, int) else None,
            "attempts": row.attempts,
            "error": row.error,
            "_packed": row.packed,
            "_wire": self._wire,
            "_position": row.position,
        }


class Keeper:
    """A table of what is kept, as dead letters and scheduled messages need it."""

    def __init__(self, table: Table, open_admin: Callable[[], OutboxAdmin], wire: str) -> None:
        self._table: Table = table
        self._open_admin = open_admin
        self._wire = wire

    def page(self, query: OutboxQuery | None, limit: int | None, after: KeptMessage | None) -> list[Seen]:
        """As many as `limit` says, or all; behind the last one of the page before."""
        if limit is not None and not (is_whole(limit) and limit >= 1):
            raise ConfigError(f"limit must be an int, 1 at least, or None, not {limit!r}")
        with self.open() as store:
            found = self.scan(store, query, None if after is None else after._position)
            return list(itertools.islice(found, limit))

    def scan(self, store: OutboxAdmin, query: OutboxQuery | None, after: Position | None = None) -> Iterator[Seen]:
        """What is meant; all by default."""
        return scan(store, self._table, OutboxQuery() if query is None else _checked(query), self._wire, after)

    def counts(self, query: OutboxQuery | None) -> list[tuple[str | None, str | None, str, int]]:
        """How many there are of each topic, message type and error, the most first."""
        with self.open() as store:
            counts = Counter((seen.topic, seen.message_type, seen.row.error) for seen in self.scan(store, query))
        return [(*kind, count) for kind, count in counts.most_common()]

    def change(self, query: OutboxQuery, change: Callable[[OutboxAdmin, list[Place]], int]) -> int:
        """Has something done with what is meant. The rows are looked for before its one transaction, so that nobody
        waits for the search; what has gone meanwhile is left out."""
        with self.open() as store:
            places = [(seen.row.bucket, seen.row.seq) for seen in self.scan(store, _checked(query))]
            return change(store, places) if places else 0

    def open(self) -> contextlib.closing[OutboxAdmin]:
        """A connection, for a ``with`` block."""
        return contextlib.closing(self._open_admin())


def _checked(query: OutboxQuery) -> OutboxQuery:
    if not isinstance(query, OutboxQuery):
        raise TypeError(f"query must be a kbatch.OutboxQuery, not {type_name(query)}")
    return query


def scan(
    store: OutboxAdmin, table: Table, query: OutboxQuery, wire: str, after: Position | None = None
) -> Iterator[Seen]:
    """What a query means, by the time of death, or that when it is due."""
    since_ms = None if query.since is None else milliseconds(query.since)
    until_ms = None if query.until is None else milliseconds(query.until)
    if query.numbers is not None:
        rows = store.look_up(table, [number for number in query.numbers if 0 <= number <= BIGGEST_NUMBER])
        for row in rows:
            is_between = (since_ms is None or row.at_ms >= since_ms) and (until_ms is None or row.at_ms < until_ms)
            is_behind = after is None or row.position > after
            seen = Seen(row, wire)
            if is_between and is_behind and query.means(seen):
                yield seen
        return
    while rows := store.page(table, after, since_ms=since_ms, until_ms=until_ms, limit=_PAGE):
        for row in rows:
            seen = Seen(row, wire)
            if query.means(seen):
                yield seen
        after = rows[-1].position


def moment(microseconds: int) -> datetime:
    """A time of a table."""
    try:
        return _EPOCH + timedelta(microseconds=microseconds)
    except OverflowError:
        return datetime.max.replace(tzinfo=timezone.utc) if microseconds > 0 else _EPOCH


def milliseconds(time: datetime) -> int:
    """Since 1970."""
    return (time - _EPOCH) // timedelta(milliseconds=1)


def _bytes(packed: object) -> bytes:
    if not isinstance(packed, bytes):
        reason = f"a packed record must be bytes, not {type_name(packed)}"
        raise DeserializationError(reason, topic=None, partition=None, offset=None, header=None)
    return packed
