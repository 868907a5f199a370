"""What inboxes of all databases have in common."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from kbatch._checks import is_number
from kbatch._errors import ConfigError, type_name
from kbatch._fastmap import Envelope, Tombstone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping


__all__ = [
    "BaseInbox",
    "InboxStatus",
    "ListenerInbox",
    "ListenerSession",
    "Partition",
    "check_group",
    "id_of",
    "limits_of",
    "partitions_of",
    "time_of",
]

_RETENTION_S = 7 * 86_400.0

Partition: TypeAlias = tuple[str, int]  # topic, number


class ListenerSession(Protocol):
    """What a listener's worker handles envelopes with: a connection of its own, made when it is needed, for one thread.

    What it raises when the database is away, locked or full is an `InboxError` whose ``is_outage`` is true: the call is
    made again. Any other `InboxError` ends the listener.
    """

    def handle(self, envelope: Envelope[Any], handler: Callable[[Any, Any], object], /) -> bool:
        """Calls ``handler(envelope, connection)`` and commits what it has written together with the mark that the group
        has handled this id. If the group has handled it, returns False and calls nothing.

        What the handler raises rolls all of it back, and is passed on. The inbox knows from then on that the group
        reads the envelope's partition.
        """

    def handle_batch(self, envelopes: Iterable[Envelope[Any]], handler: Callable[[list[Any], Any], object], /) -> int:
        """As `handle`, with ``handler(envelopes, connection)`` for those that the group has not handled, each once, in
        one transaction; if there are none, it is not called. Returns how many they were."""

    def close(self) -> None:
        """Gives the connection back. The next call makes another."""


class ListenerInbox(Protocol):
    """What a `Listener` asks of an inbox. Each method is called on a thread and waits for the database.

    Attributes:
        retention_s: How old an id is before a listener purges it; ``None``: a listener purges nothing.
    """

    retention_s: float | None

    def open_session(self, group: str, /) -> ListenerSession:
        """For one worker of a listener of this group, which closes it. It need not look whether the database is
        there."""

    def check(self) -> None:
        """Raises an `InboxError` if it cannot be used. Called when a listener begins: an outage is waited for, and
        anything else, such as missing tables, ends the listener."""

    def clock_us(self) -> int:
        """The clock by which ids are marked, in microseconds since 1970."""

    def note_offsets(self, group: str, asked_at_us: int, offsets: Mapping[Partition, tuple[int, int]], /) -> None:
        """Of partitions, the offset that the group has committed and the end of the log, which brokers were asked for
        after the time `asked_at_us` by the inbox's clock.

        What the group had handled of a partition before a time is safe from being read again once the group has
        committed what was then the end of the log.
        """

    def purge_old(self) -> int:
        """Deletes ids that were handled longer ago than ``retention_s`` and are safe from being read again. Ids of
        which that is not known stay. Returns how many it has deleted."""


@dataclass(frozen=True)
class InboxStatus:
    """What is in an inbox.

    Attributes:
        handled: How many ids it knows, of all groups; at most as many as were to be counted.
        safe_until: By group that a listener reads: up to when all that it had handled was committed, as far as is
            known. What it handled later is not purged. ``None``: nothing of it yet.
    """

    handled: int
    safe_until: Mapping[str, datetime | None] = field(default_factory=dict)


class BaseInbox:
    """Which ids a consumer group has handled.

    Attributes:
        retention_s: How old an id is before a listener purges it; ``None``: a listener purges nothing.
    """

    def __init__(self, retention_s: float | None) -> None:
        if retention_s is not None and not (is_number(retention_s) and 0 < retention_s < 1e10):
            raise ConfigError(f"retention_s must be seconds above 0, or None, not {retention_s!r}")
        self.retention_s = retention_s

    def purge_old(self) -> int:
        """What a listener calls once an hour, on a thread: as `purge` without arguments."""
        return self._purge(None, None)

    def _purge(self, older_than_s: float | None, committed: Mapping[str, datetime] | None) -> int:
        raise NotImplementedError

    def _age_us(self, older_than_s: float | None) -> int:
        if older_than_s is None:
            older_than_s = self.retention_s or _RETENTION_S
        if not (is_number(older_than_s) and 0 <= older_than_s < 1e10):
            raise ValueError(f"older_than_s must be seconds, 0 or more, not {older_than_s!r}")
        return int(older_than_s * 1e6)


def check_group(group: object) -> str:
    """Raises for what is no name of a consumer group."""
    if not isinstance(group, str):
        raise TypeError(f"group must be str, not {type_name(group)}")
    if not group or "\0" in group:
        raise ValueError("group must be the name of a consumer group, without NUL characters")
    return group


def id_of(envelope: object) -> uuid.UUID:
    """The id of an envelope."""
    if not isinstance(envelope, (Envelope, Tombstone)):
        raise TypeError(f"envelope must be a kbatch.Envelope, not {type_name(envelope)}")
    return envelope.id


def partitions_of(envelopes: Iterable[Any]) -> set[Partition]:
    """Where envelopes were read from."""
    return {
        (envelope.topic, envelope.partition)
        for envelope in envelopes
        if envelope.topic is not None and envelope.partition is not None
    }


def limits_of(
    age_us: int, now_us: int, safe_until: Mapping[str, int], committed: Mapping[str, datetime] | None
) -> dict[str, int]:
    """By group, before when what it has handled may be purged; of the others nothing."""
    newest = now_us - age_us
    limits = {group: min(newest, until) for group, until in safe_until.items()}
    for group, moment in (committed or {}).items():
        if not isinstance(moment, datetime) or moment.tzinfo is None:
            raise TypeError(f"committed must have a datetime with a time zone for the group {check_group(group)!r}")
        limits[group] = min(newest, int(moment.timestamp() * 1e6))
    return limits


def time_of(time_us: int) -> datetime | None:
    """A time of a table ``position``."""
    return datetime.fromtimestamp(time_us / 1e6, timezone.utc) if time_us else None
