"""With a ``transactional.id`` a batch is one transaction of Kafka: all of it becomes visible, or nothing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from kbatch._codes import ABORTED_CODE, PURGE_INFLIGHT, PURGE_QUEUE, TIMED_OUT
from kbatch._errors import TransactionUnknownError
from kbatch._fastmap import TRANSACTION_CALLS, HeldBatches, monotonic
from kbatch._logs import tell
from kbatch._pending import PendingBatch
from kbatch._text import counted, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from kbatch._fastmap import CallbackThread, Core

__all__ = ["BatchWithOffsets", "Transactions"]

_INIT, _BEGIN, _COMMIT, _ABORT = TRANSACTION_CALLS

# librdkafka goes on with a call that timed out, and the next one takes it up. With -1 a call may never end.
_SLICE_MS = 500
_OFFSETS_MS = 5_000  # the one call that begins anew: with less, a broker that is slower would never be heard
_PAUSE_S = 0.05  # before what is retriable is tried again

_Answer = tuple[int, str, bool, bool, bool]  # of `HeldBatches.transaction_call`


class _Error(NamedTuple):
    """What librdkafka says of a call about a transaction."""

    code: int
    text: str
    fatal: bool
    retriable: bool
    requires_abort: bool


class BatchWithOffsets(PendingBatch):
    """A batch whose transaction commits offsets of a consumer, too. It may have no envelopes."""

    #: Called before the commit, with the producer and milliseconds, on the thread of its transactions. It answers as
    #: `HeldBatches.transaction_call` does, and must not raise.
    send_offsets: Callable[[Core, int], _Answer | None] | None = None
    is_committed = False
    #: Why not.
    reason = "the producer was closed"


class Transactions:
    """The transactions of one producer, one at a time, first come, first served, on a thread of their own.

    So a caller may stop waiting for one (a timeout, Ctrl-C, a cancelled task), and it still ends and answers.

    What is retriable is tried again here. What is abortable aborts the transaction: its batch failed, and may be sent
    again. What is fatal ends the producer, as it does without transactions.
    """

    def __init__(self, core: Core, thread: CallbackThread, timeout_s: float) -> None:
        self._core = core
        self._held = HeldBatches(core)
        self._thread = thread
        self._timeout_s = timeout_s
        self._initialized = False
        self._undecided: str | None = None  # why the last one has no known end: none can follow

    @property
    def is_initialized(self) -> bool:
        """Whether brokers listen to no earlier producer with this ``transactional.id``, whose transaction has ended."""
        return self._initialized

    @property
    def is_undecided(self) -> bool:
        """Whether a transaction may still be committed, or aborted, by brokers alone."""
        return self._undecided is not None

    def send(self, batch: PendingBatch, timeout: float | None, waker: Callable[[], object] | None = None) -> None:
        """Takes a batch that is mapped; its answer comes. Raises as sending does, and then nothing is sent.

        `waker` is as in `Core.send_detached`; it is not called if this raises.
        """
        refusal = None
        if self._undecided is not None:
            refusal = TransactionUnknownError(f"this producer can send no more: {self._undecided}; make a new one")
        try:
            self._held.hold(batch, timeout, waker=waker, refusal=refusal)
            self._thread.put(self._run, batch)
        except BaseException:
            # Ctrl-C may come when it is on hold and its thread has it, or will have it.
            if waker is not None:
                batch._remove_waker(waker)
            self._held.refuse_held(batch, PURGE_QUEUE)
            raise

    def _run(self, batch: PendingBatch) -> None:
        if not self._held.claim_held(batch):
            return  # refused meanwhile
        try:
            self._transact(batch)
        except BaseException:
            # No memory; or Ctrl-C, if no thread was to be had and this is the main one.
            self._undecided = "its last transaction was interrupted"
            self._held.end_held(batch)
            raise

    def _transact(self, batch: PendingBatch) -> None:
        code = self._begin(batch)
        if code:
            self._held.give_up_held(batch, code)
            self._held.conclude(batch, code)
            return
        self._held.enqueue_held(batch)
        if self._held.wait_for_decision(batch):
            code = self._send_offsets(batch)
            if code:
                self._abort(batch, code)
            else:
                self._commit(batch)
        else:
            self._abort(batch, ABORTED_CODE)

    def _send_offsets(self, batch: PendingBatch) -> int:
        """0, or the code of why the transaction cannot be committed."""
        if not isinstance(batch, BatchWithOffsets) or batch.send_offsets is None:
            return 0
        end = monotonic() + self._timeout_s
        while not self._held.is_finishing():
            error = _error_of(batch.send_offsets(self._core, _OFFSETS_MS))
            if error is None:
                return 0
            batch.reason = error.text
            if not self._again(error) or monotonic() > end:
                return error.code
        return PURGE_INFLIGHT

    def _begin(self, batch: PendingBatch) -> int:
        """0, or the code of why nothing of the batch can be sent."""
        if self._undecided is not None:
            return PURGE_QUEUE
        while not (refusal := self._held.refusal(batch)) and not self._initialized:
            error = self._call(_INIT)
            self._initialized = error is None
            _note(batch, error)
            if error is not None and not self._again(error):
                return error.code
        if refusal:
            return refusal
        error = self._call(_BEGIN)
        _note(batch, error)
        return 0 if error is None else error.code

    def _commit(self, batch: PendingBatch) -> None:
        end = monotonic() + 2 * self._timeout_s
        asked = False
        while not self._held.is_finishing():
            asked = True
            error = self._call(_COMMIT)
            if error is None:
                if isinstance(batch, BatchWithOffsets):
                    batch.is_committed = True
                self._held.conclude(batch)
                return
            _note(batch, error)
            if error.requires_abort:
                tell("a transaction of %s is aborted: %s", counted(len(batch), "envelope"), error.text)
                self._abort(batch, error.code, asked=True)
                return
            if not self._again(error) or monotonic() > end:
                # It may have been committed, and only the answer is missing.
                self._undecided = f"its last transaction was neither committed nor aborted ({error.text})"
                self._held.conclude(batch, error.code, unknown=True)
                return
        self._held.conclude(batch, PURGE_INFLIGHT, unknown=asked)

    def _abort(self, batch: PendingBatch, code: int, *, asked: bool = False) -> None:
        """Ends the transaction without its batch. If that fails, the coordinator does it when it times out.

        Unless a commit was asked for: it may have been made, and only its answer was lost.
        """
        end = monotonic() + 2 * self._timeout_s
        aborted = False
        while not self._held.is_finishing():
            error = self._call(_ABORT)
            if error is None:
                aborted = True
                code = ABORTED_CODE  # it may be sent again, whatever the cause
                break
            if not self._again(error, error.requires_abort) or monotonic() > end:
                self._undecided = f"its last transaction could not be aborted ({error.text})"
                if error.fatal:
                    code = error.code
                break
        self._held.wait_until_settled(batch)
        self._held.conclude(batch, code, unknown=asked and not aborted)

    def _call(self, call: int) -> _Error | None:
        return _error_of(self._held.transaction_call(call, _SLICE_MS))

    def _again(self, error: _Error, also: bool = False) -> bool:
        again = error.retriable or also
        if again and error.code != TIMED_OUT:  # which has waited
            time.sleep(_PAUSE_S)
        return again


def _error_of(answer: _Answer | None) -> _Error | None:
    return None if answer is None else _Error(*answer)._replace(text=printable(answer[1]))


def _note(batch: PendingBatch, error: _Error | None) -> None:
    if error is not None and isinstance(batch, BatchWithOffsets):
        batch.reason = error.text
