"""What a wire format of the user's own looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from kbatch._fastmap import Envelope

__all__ = ["HeadersLike", "WireFormat"]

HeadersLike: TypeAlias = Mapping[str, "str | bytes | None"] | Sequence["tuple[str, str | bytes | None]"]


class WireFormat(Protocol):
    """An object that writes envelopes as Kafka messages, at Python speed."""

    def write(self, envelope: Envelope[Any], /) -> tuple[str | bytes | None, bytes | None, HeadersLike | None]:
        """The record's key, value (``None`` is a tombstone) and headers."""
