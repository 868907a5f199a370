"""What a wire format of the user's own looks like, and what is read by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from kbatch._fastmap import Envelope

__all__ = ["ConsumedRecord", "HeadersLike", "RecordFields", "WireFormat", "WireReader"]

HeadersLike: TypeAlias = Mapping[str, "str | bytes | None"] | Sequence["tuple[str, str | bytes | None]"]


class WireFormat(Protocol):
    """An object that writes envelopes as Kafka messages, at Python speed."""

    def write(self, envelope: Envelope[Any], /) -> tuple[str | bytes | None, bytes | None, HeadersLike | None]:
        """The record's key, value (``None`` is a tombstone) and headers."""


class ConsumedRecord(Protocol):
    """A record as a consumer gives it; confluent-kafka's ``Message`` is one.

    `kbatch.read_envelope` also takes the records of aiokafka and kafka-python, whose attributes have these names, and
    gives a `WireReader` one with methods.
    """

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


class RecordFields(Protocol):
    """A record with attributes; the ``ConsumerRecord`` of aiokafka and of kafka-python is one."""

    @property
    def topic(self) -> str | None:
        """The topic that it was read from."""

    @property
    def partition(self) -> int | None:
        """The partition that it was read from."""

    @property
    def offset(self) -> int | None:
        """Its place in the partition."""

    @property
    def timestamp(self) -> int | None:
        """Milliseconds since 1970, or ``None``; ``timestamp_type``, if it has one, is 1 for the broker's time."""

    @property
    def key(self) -> Any:
        """The record key."""

    @property
    def value(self) -> Any:
        """The body as bytes; ``None`` is a null value."""

    @property
    def headers(self) -> Any:
        """Pairs of name and value, in order."""


class WireReader(Protocol):
    """An object that reads records as envelopes, for `kbatch.read_envelope`."""

    def read(self, record: ConsumedRecord, /) -> Envelope[Any]:
        """The envelope."""
