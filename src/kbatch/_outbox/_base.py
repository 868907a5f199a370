"""What outboxes of all databases have in common: options, mapping, and who is told of an `add`."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from kbatch._base_producer import check_mapping
from kbatch._checks import check_methods, is_whole
from kbatch._errors import ConfigError, NotYetDueError, OutboxError
from kbatch._fastmap import Mapper, RecordPool
from kbatch._outbox._dead_letters import DeadLetters
from kbatch._outbox._kept import Keeper
from kbatch._outbox._scheduled import ScheduledMessages
from kbatch._outbox._store import BUCKETS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kbatch._fastmap import Envelope, MappedBatch
    from kbatch._outbox._store import NewRow, OutboxAdmin, OutboxStore, OutboxWriter, ScheduledRow
    from kbatch._wire import HeadersLike, WireFormat

__all__ = ["BaseOutbox", "BlockingOutbox", "OutboxBase", "OutboxStatus", "check_relay_outbox", "dead_letters_of"]

_MOST_BYTES = 1_000_000_000  # librdkafka's bound for message.max.bytes, SQLite's for a value, and below PostgreSQL's


@dataclass(frozen=True)
class OutboxStatus:
    """What is in an outbox.

    Attributes:
        waiting: Records to be sent, at most as many as were to be counted.
        later: Records that brokers refused and that wait for their next attempt; counted likewise.
        dead: Records that were given up; counted likewise.
        oldest_age_s: Seconds since the oldest of those that are waiting was added; 0.0 if none is.
        relays: How many relays work on it. One that reaches no broker is none.
        unvacuumed: Rows that were deleted and whose room PostgreSQL has not freed yet, by its own count. If it grows,
            autovacuum does not keep up: an old transaction or snapshot keeps it from freeing them, and with millions of
            them a relay that begins takes seconds to find what is there. 0 in SQLite.
        scheduled: Records whose ``scheduled_time`` has not come yet; counted likewise.
    """

    waiting: int
    later: int
    dead: int
    oldest_age_s: float
    relays: int
    unvacuumed: int = field(default=0, compare=False)
    scheduled: int = 0


class BaseOutbox:
    """Maps envelopes to packed records, and tells the relays of this process of them."""

    def __init__(
        self,
        wire: str | WireFormat,
        encoder: msgspec.json.Encoder | msgspec.msgpack.Encoder | Callable[[Any, Any], bytes | None] | None,
        source: str | None,
        header_hook: Callable[[], HeadersLike | None] | None,
        max_message_bytes: int,
        *,
        keeps_scheduled: bool = False,
    ) -> None:
        check_mapping(wire, encoder, source, header_hook)
        if not (is_whole(max_message_bytes) and 1_000 <= max_message_bytes <= _MOST_BYTES):
            raise ConfigError(
                f"max_message_bytes must be an int from 1,000 to {_MOST_BYTES:,}, not {max_message_bytes!r}"
            )
        self._mapper = Mapper(
            wire,
            msgspec.json.Encoder() if encoder is None else encoder,
            source,
            header_hook,
            max_message_bytes,
            max_message_bytes,
            carry_scheduled_time=keeps_scheduled,
        )
        self._pool = RecordPool()
        self._wire = wire if isinstance(wire, str) else "raw"  # by which what was packed is read
        self._watchers: list[Callable[[bool], object]] = []

    def watch(self, watcher: Callable[[bool], object]) -> None:
        """Calls ``watcher(False)`` after each `add` to this object, when the transaction is still open, and
        ``watcher(True)`` after commits that it knows of, such as those of its writers. It must be quick."""
        self._watchers.append(watcher)

    def unwatch(self, watcher: Callable[[bool], object]) -> None:
        """Calls it no more, if it does."""
        with contextlib.suppress(ValueError):
            self._watchers.remove(watcher)

    def map(self, topic: str | None, envelope: Envelope[Any]) -> MappedBatch | None:
        """What an `OutboxWriter` adds of an envelope; ``None`` if its ``deliver_by`` has passed.

        Raises:
            SerializationError: It could not be mapped, or is too large.
        """
        batch = self._pool.map(self._mapper, topic, (envelope,))
        return batch if self._pool.count(batch) else None

    def open_admin(self) -> OutboxAdmin:
        """The connection of those who look after dead letters and what waits, who close it.

        Raises:
            OutboxError: The tables are missing or another version's; the database does not answer.
        """
        raise NotImplementedError

    def _dead_letters(self) -> DeadLetters:
        return DeadLetters(Keeper("dead", self.open_admin, self._wire), self._map_row)

    def _scheduled(self) -> ScheduledMessages:
        return ScheduledMessages(Keeper("later", self.open_admin, self._wire))

    def _map_row(self, envelope: Envelope[Any], number: int, created_us: int) -> NewRow:
        scheduled: list[tuple[int, int, bytes, bytes, int, int | None, int]] = []
        batch = self._pool.map(self._mapper, None, [envelope])
        # By the time that it is now: what was scheduled may have been added long before.
        rows = self._pool.rows((batch,), number, BUCKETS, scheduled)
        if scheduled:
            reason = f"what is replayed is sent at once, and scheduled_time is {envelope.scheduled_time}"
            raise NotYetDueError(reason, index=0, envelope_id=envelope.id)
        if not rows:
            raise OutboxError(f"the envelope has expired: its deliver_by is {envelope.deliver_by}")
        bucket, seq, id_bytes, packed, _, deliver_by = rows[0]
        return bucket, seq, id_bytes, packed, created_us, deliver_by

    def _tell_watchers(self, is_committed: bool = False) -> None:
        for watcher in tuple(self._watchers):
            watcher(is_committed)


class BlockingOutbox(BaseOutbox):
    """An outbox for threads."""

    @property
    def dead_letters(self) -> DeadLetters:
        """The messages that were given up: to find, replay, edit and discard them."""
        return self._dead_letters()

    @property
    def scheduled(self) -> ScheduledMessages:
        """The messages that wait, for their next attempt or for their time: to find, cancel and reschedule them."""
        return self._scheduled()


class OutboxBase(BlockingOutbox):
    """What an outbox of your own derives from: it maps envelopes to rows, tells relays of this process of them, and has
    `dead_letters` and `scheduled`.

    A subclass has `open_store`, `open_writer` and `open_admin`, and an ``add`` as its users need it: of `map_all` and
    `rows` it makes rows, within the application's transaction, and then calls `tell_watchers`.

    Args:
        wire, encoder, source, header_hook, max_message_bytes: As for `SqliteOutbox`.
    """

    def __init__(
        self,
        *,
        wire: str | WireFormat = "kbatch",
        encoder: msgspec.json.Encoder | msgspec.msgpack.Encoder | Callable[[Any, Any], bytes | None] | None = None,
        source: str | None = None,
        header_hook: Callable[[], HeadersLike | None] | None = None,
        max_message_bytes: int = 1_000_000,
    ) -> None:
        super().__init__(wire, encoder, source, header_hook, max_message_bytes, keeps_scheduled=True)

    def open_store(self) -> OutboxStore:
        """As `RelayOutbox.open_store`."""
        raise NotImplementedError

    def open_writer(self) -> OutboxWriter:
        """As `DurableOutbox.open_writer`."""
        raise NotImplementedError

    def map_all(self, topic: str | None, envelopes: Iterable[Envelope[Any]]) -> MappedBatch:
        """What `rows` takes of envelopes, without those whose ``deliver_by`` has passed.

        Args:
            topic: Where envelopes without a topic of their own go; ``None`` if each has one.

        Raises:
            SerializationError: An envelope could not be mapped, or is too large. Then none is.
        """
        return self._pool.map(self._mapper, topic, envelopes)

    def count(self, batches: Sequence[MappedBatch]) -> int:
        """How many rows they become, so many numbers are needed."""
        return sum(map(self._pool.count, batches))

    def rows(self, batches: Sequence[MappedBatch], first_number: int) -> tuple[list[NewRow], list[ScheduledRow]]:
        """Rows of the hot table, and rows that wait for their ``scheduled_time``; numbered from `first_number` on."""
        scheduled: list[ScheduledRow] = []
        return self._pool.rows(batches, first_number, BUCKETS, scheduled), scheduled

    def tell_watchers(self, is_committed: bool = False) -> None:
        """Has relays of this process look soon: after an ``add`` whose transaction is still open, and after each commit
        of a writer with ``True``."""
        self._tell_watchers(is_committed)


def check_relay_outbox(outbox: object) -> None:
    """Raises ConfigError for what is no outbox."""
    wanted = "a kbatch.SqliteOutbox or kbatch.PostgresOutbox, or a kbatch.stores.RelayOutbox"
    check_methods("outbox", outbox, wanted, ("open_store", "watch", "unwatch"))


def dead_letters_of(outbox: object) -> DeadLetters:
    """What `on_dead` is told of. Raises ConfigError for an outbox that has none."""
    if not isinstance(outbox, BaseOutbox):
        raise ConfigError(
            "on_dead needs an outbox that has dead letters: a kbatch.SqliteOutbox or kbatch.PostgresOutbox, or a "
            "kbatch.stores.OutboxBase"
        )
    return outbox._dead_letters()
