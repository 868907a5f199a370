"""The outcome of each envelope of a batch."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from kbatch._codes import ABORTED_CODE, POSSIBLY_PERSISTED, REJECTED_CODE, TIMEOUT_CODES, UNKNOWN_TOPIC_CODES
from kbatch._errors import BatchError, BatchTimeoutError, DeliveryError, UnknownTopicError
from kbatch._text import counted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kbatch._fastmap import Outcomes

__all__ = ["DeliveryReport"]


class DeliveryReport:
    """What became of each envelope of a batch. True if none failed.

    Nothing is kept per envelope as a Python object until it is asked for. Every envelope is exactly one of
    acknowledged, failed and expired; an expired one was not sent because its ``deliver_by`` had passed, which is not
    a failure of the batch.
    """

    def __init__(self, outcomes: Outcomes, latency_s: float) -> None:
        self._outcomes = outcomes
        self._latency_s = latency_s
        self._acked: int | None = None
        self._failed: int | None = None

    def __len__(self) -> int:
        """The number of envelopes."""
        return len(self._outcomes)

    @property
    def ok(self) -> bool:
        """Whether no envelope failed."""
        return self.failed == 0

    def __bool__(self) -> bool:
        return self.ok

    # No cached_property: up to Python 3.11 it takes a lock, and every sender asks for these.

    @property
    def acked(self) -> int:
        """How many envelopes the broker acknowledged."""
        if self._acked is None:
            self._acked = self._outcomes.acked()
        return self._acked

    @property
    def failed(self) -> int:
        """How many envelopes failed."""
        if self._failed is None:
            self._failed = self._outcomes.failed()
        return self._failed

    @property
    def expired(self) -> int:
        """How many envelopes were not sent because their ``deliver_by`` had passed."""
        return len(self) - self.acked - self.failed

    @cached_property
    def expired_indices(self) -> tuple[int, ...]:
        """The indices of the envelopes that were not sent because their ``deliver_by`` had passed."""
        return tuple(self._outcomes.expired_indices())

    @cached_property
    def errors(self) -> Mapping[int, DeliveryError]:
        """The failed envelopes: index to the reason."""
        made: dict[tuple[int, int], DeliveryError] = {}
        errors: dict[int, DeliveryError] = {}
        for index, code, persistence in self._outcomes.failures():
            error = made.get((code, persistence))
            if error is None:
                error = DeliveryError(code, possibly_persisted=persistence == POSSIBLY_PERSISTED)
                made[code, persistence] = error
            errors[index] = error
        return errors

    @cached_property
    def partitions(self) -> tuple[int, ...]:
        """The partition of each envelope; -1 where none was chosen."""
        return self._outcomes.partitions()

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The offset of each envelope; -1 where it failed or the broker did not tell.

        An acknowledged offset can be unknown: when the idempotent producer learns from a retry that the broker had
        stored the message before.
        """
        return self._outcomes.offsets()

    @property
    def latency_s(self) -> float:
        """Seconds from when the producer took the batch to its answer, the wait for room included."""
        return self._latency_s

    def exception(self) -> BatchError | None:
        """The failure of the batch as one error, its class by the kind of failure; ``None`` if no envelope failed."""
        if self.ok:
            return None
        return self._make_exception()

    def _make_exception(self) -> BatchError:
        codes = {error.code for error in self.errors.values()}
        aborted = ABORTED_CODE in codes
        if aborted:  # the cause is another's, and no transaction is aborted for what cannot be mapped
            codes = codes - {ABORTED_CODE, REJECTED_CODE} or {ABORTED_CODE}
        found = None
        for index, error in self.errors.items():
            if error.code in codes:
                found = index, error
                break
        assert found is not None
        index, first = found
        message = f"{self.failed:,} of {counted(len(self), 'envelope')} failed; the first is envelope {index}: {first}"
        if aborted:
            message = f"the transaction of {counted(len(self), 'envelope')} was aborted"
            if first.code != ABORTED_CODE:
                message += f"; the cause is envelope {index}: {first}"
        if codes <= UNKNOWN_TOPIC_CODES:
            return UnknownTopicError(message, self)
        if codes <= TIMEOUT_CODES:
            return BatchTimeoutError(message, self)
        return BatchError(message, self)

    def raise_for_errors(self) -> DeliveryReport:
        """Raises `BatchError` (or a subclass) if an envelope failed; else returns the report itself."""
        if self.failed:
            raise self._make_exception()  # no variable may hold it: it would hold itself by its traceback
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return DeliveryReport, (self._outcomes, self._latency_s)

    def __repr__(self) -> str:
        expired = f" expired={self.expired}" if self.expired else ""
        return (
            f"<DeliveryReport {counted(len(self), 'envelope')}: acked={self.acked} failed={self.failed}{expired} "
            f"in {self._latency_s * 1000:.1f} ms>"
        )
