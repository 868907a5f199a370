"""The batch callback contract for asyncio."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from kbatch import _contract
    from kbatch._contract import OutgoingBatch
    from kbatch._errors import KbatchError
    from kbatch._report import DeliveryReport

__all__ = ["SenderCallback", "SenderProtocol"]

_logger = logging.getLogger("kbatch")


class SenderCallback:
    """As `kbatch.SenderCallback`, with coroutines: exactly one is awaited, once, on the loop that sends the batch."""

    async def mark_successful(self, batch: OutgoingBatch, report: DeliveryReport) -> None:
        """No envelope failed: each was acknowledged, or had expired before it was sent (``report.expired``)."""

    async def mark_processing_failure(self, batch: OutgoingBatch, error: KbatchError) -> None:
        """Some envelopes failed, or the batch could not be sent at all."""
        _logger.error("%r failed: %s", batch, error)

    async def mark_serialization_failure(self, batch: OutgoingBatch, error: KbatchError) -> None:
        """An envelope could not be mapped; nothing was sent."""
        _logger.error("%r could not be serialized: %s", batch, error)

    async def mark_timed_out(self, batch: OutgoingBatch, error: KbatchError) -> None:
        """Every envelope that failed timed out."""
        await self.mark_processing_failure(batch, error)

    async def mark_topic_does_not_exist(self, batch: OutgoingBatch, error: KbatchError) -> None:
        """Every envelope that failed went to an unknown topic or partition."""
        await self.mark_processing_failure(batch, error)

    async def mark_circuit_open(self, batch: OutgoingBatch, error: KbatchError) -> None:
        """The circuit is open; nothing was sent."""
        await self.mark_processing_failure(batch, error)


@runtime_checkable
class SenderProtocol(Protocol):
    """Anything that sends a batch on an event loop and answers through a `SenderCallback`."""

    async def send_batch(self, callback: SenderCallback | _contract.SenderCallback, batch: OutgoingBatch) -> None:
        """Sends `batch` and calls exactly one method of `callback`, once no envelope of it is in flight any more."""
