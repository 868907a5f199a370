"""What a wire format of the user's own looks like, and what is read by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from kbatch._fastmap import Envelope

__all__ = ["ConsumedRecord", "HeadersLike", "WireFormat", "WireReader"]

HeadersLike: TypeAlias = Mapping[str, "str | bytes | None"] | Sequence["tuple[str, str | bytes | None]"]


class WireFormat(Protocol):
    """An object that writes envelopes as Kafka messages, at Python speed."""

    def write(self, envelope: Envelope[Any], /) -> tuple[str | bytes | None, bytes | None, HeadersLike | None]:
        """The record's key, value (``None`` is a tombstone) and headers."""


class ConsumedRecord(Protocol):
    """A record as a consumer gives it; confluent-kafka's ``Message`` is one."""

    def topic(self) -> str | None:
        """The topic that it was read from."""

    def partition(self) -> int | None:
        """The partition that it was read from."""

    def offset(self) -> int | None:
        """Its place in the partition."""

    def timestamp(self) -> tuple[int, int]:
        """The kind of its time (0: it has none), and milliseconds since 1970."""

    def key(self) -> str | bytes | None:
        """The record key."""

    def value(self) -> bytes | None:
        """The body; ``None`` is a null value."""

    def headers(self) -> HeadersLike | None:
        """Pairs of name and value, in order."""


class WireReader(Protocol):
    """An object that reads records as envelopes, for `kbatch.read_envelope`."""

    def read(self, record: ConsumedRecord, /) -> Envelope[Any]:
        """The envelope."""
