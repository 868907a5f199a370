"""The batch callback contract: a batch goes out, exactly one callback comes back."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from kbatch._text import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kbatch._errors import KbatchError
    from kbatch._fastmap import Envelope
    from kbatch._report import DeliveryReport

__all__ = ["OutgoingBatch", "SenderCallback", "SenderProtocol"]

_logger = logging.getLogger("kbatch")


class OutgoingBatch:
    """Envelopes that go out together and are answered together. Immutable.

    Args:
        envelopes: Read once, here.
    """

    __slots__ = ("_envelopes",)

    def __init__(self, envelopes: Iterable[Envelope[Any]]) -> None:
        self._envelopes = tuple(envelopes)

    @property
    def envelopes(self) -> tuple[Envelope[Any], ...]:
        """The envelopes, in order."""
        return self._envelopes

    def __len__(self) -> int:
        return len(self._envelopes)

    def __iter__(self) -> Iterator[Envelope[Any]]:
        return iter(self._envelopes)

    def __repr__(self) -> str:
        return f"<OutgoingBatch of {counted(len(self), 'envelope')}>"


class SenderCallback:
    """What a sender tells about a batch: exactly one of these methods, once, when every envelope has its outcome.

    Override what you need. The two failure methods log an error by default, and the three special failures fall back
    to `mark_processing_failure`, so that no failure goes unseen. Each ``error.report`` holds the outcome of each
    envelope.
    """

    def mark_successful(self, batch: OutgoingBatch, report: DeliveryReport) -> None:
        """No envelope failed: each was acknowledged, or had expired before it was sent (``report.expired``)."""

    def mark_processing_failure(self, batch: OutgoingBatch, error: KbatchError) -> None:
        """Some envelopes failed, or the batch could not be sent at all."""
        _logger.error("%r failed: %s", batch, error)

    def mark_serialization_failure(self, batch: OutgoingBatch, error: KbatchError) -> None:
        """An envelope could not be mapped; nothing was sent."""
        _logger.error("%r could not be serialized: %s", batch, error)

    def mark_timed_out(self, batch: OutgoingBatch, error: KbatchError) -> None:
        """Every envelope that failed timed out."""
        self.mark_processing_failure(batch, error)

    def mark_topic_does_not_exist(self, batch: OutgoingBatch, error: KbatchError) -> None:
        """Every envelope that failed went to an unknown topic or partition."""
        self.mark_processing_failure(batch, error)

    def mark_circuit_open(self, batch: OutgoingBatch, error: KbatchError) -> None:
        """The circuit is open; nothing was sent."""
        self.mark_processing_failure(batch, error)


@runtime_checkable
class SenderProtocol(Protocol):
    """Anything that sends a batch and answers through a `SenderCallback`."""

    def send_batch(self, callback: SenderCallback, batch: OutgoingBatch) -> None:
        """Sends `batch` and calls exactly one method of `callback`, once no envelope of it is in flight any more."""
