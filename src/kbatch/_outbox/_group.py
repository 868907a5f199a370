"""Group commit: what many callers add goes into few transactions."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import TYPE_CHECKING, Protocol

from kbatch._errors import OutboxError, SenderClosedError, named_exception_text
from kbatch._fastmap import Flag, monotonic
from kbatch._logs import tell

if TYPE_CHECKING:
    from collections.abc import Callable

    from kbatch._errors import KbatchError
    from kbatch._fastmap import MappedBatch
    from kbatch._outbox._store import OutboxWriter

    class _Outbox(Protocol):
        def open_writer(self) -> OutboxWriter: ...


__all__ = ["GroupCommit", "Waiting"]

_PATIENCE_S = 5.0  # of a caller without a time of its own, when another connection writes
_MOST_OF_GROUP = 10_000
_LOCK_S = 1.0


class Waiting:
    """What one caller adds, until it is committed or refused.

    Args:
        wake: Called once it is committed or refused, unless it was withdrawn.
        patient: It waits for as long as another connection writes, else for `_PATIENCE_S`.

    Attributes:
        is_over: Whether it has its answer: `error`, or none.
    """

    __slots__ = ("_batch", "_taker", "_ticket", "_wake", "error", "impatient_at", "is_over")

    def __init__(self, batch: MappedBatch, wake: Callable[[], object], *, patient: bool) -> None:
        self._batch: MappedBatch | None = batch
        self._wake = wake
        self._ticket = threading.Lock()  # who takes it, the writer's thread or another, has the say
        self._taker: threading.Thread | None = None
        self.impatient_at = None if patient else monotonic() + _PATIENCE_S
        self.is_over = False
        self.error: KbatchError | None = None

    def take_error(self) -> KbatchError:
        """The error, to be raised: no variable may hold what is raised, or there is a cycle."""
        error, self.error = self.error, None
        assert error is not None
        return error

    @property
    def is_taken(self) -> bool:
        """Whether it is in a transaction, or was, or was withdrawn."""
        return self._ticket.locked()

    @property
    def is_withdrawn(self) -> bool:
        """Whether it was not taken, and nobody waits for it any more."""
        return self._batch is None and not self.is_over

    def take(self) -> MappedBatch | None:
        """For the transaction; ``None`` if it was withdrawn."""
        batch = self._batch
        self._taker = threading.current_thread()
        return batch if self._ticket.acquire(blocking=False) else None

    def is_lost(self, thread: threading.Thread | None) -> bool:
        """Whether the thread that is to commit it, or that did, has died before it could tell."""
        thread = self._taker or thread
        is_dead = thread is None or not thread.is_alive()
        return is_dead and not self.is_over  # in this order

    def withdraw(self) -> bool:
        """Whether it was not taken, and now is not any more."""
        if not self._ticket.acquire(blocking=False):
            return False
        self._batch = None
        return True

    def refuse(self, error: KbatchError) -> bool:
        """As `withdraw`, and its caller is told."""
        if not self.withdraw():
            return False
        self.settle(error)
        return True

    def settle(self, error: KbatchError | None) -> None:
        """Its answer."""
        self.error = error
        self._batch = None
        self.is_over = True
        with contextlib.suppress(Exception):  # one caller less, and the others are told
            self._wake()


class GroupCommit:
    """One thread commits what callers have put, all that waits in one transaction. While it commits, the next group
    comes together.

    The thread begins with the first `put`. It alone has the connection, as a local variable: a child of a fork never
    touches it.
    """

    def __init__(self, outbox: _Outbox) -> None:
        self._outbox = outbox
        self._queue: deque[Waiting] = deque()
        self._flag = Flag()
        self._starting = threading.RLock()
        self._thread: threading.Thread | None = None
        self._is_ending = False

    def put(self, waiting: Waiting) -> None:
        """Has it committed. Interrupted, it may have been put: the caller withdraws it.

        Raises:
            SenderClosedError: Nothing is taken any more.
        """
        self._start()
        self._queue.append(waiting)
        self._flag.set()
        # The thread may have ended since. If nobody has refused this one, nobody will: another thread begins.
        while not (self.has_thread() or waiting.is_taken):
            self._start()

    def has_thread(self) -> bool:
        """Whether somebody commits what is put."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def has_lost(self, waiting: Waiting) -> bool:
        """Whether nobody will answer, since the thread died at a place where it could not tell."""
        return waiting.is_lost(self._thread)

    def has_answered(self, waiting: Waiting) -> bool:
        """Whether the wait is over, or would last for ever."""
        return waiting.is_over or self.has_lost(waiting)

    @property
    def is_ending(self) -> bool:
        """Whether it takes nothing any more."""
        return self._is_ending

    def end(self) -> None:
        """Takes nothing any more. What was put is committed, then the connection is closed."""
        self._is_ending = True
        self._flag.set()

    def wait(self, end: float) -> None:
        """Waits for the end of its thread."""
        thread = self._thread
        if thread is not None and thread.ident is not None and thread is not threading.current_thread():
            thread.join(max(0.0, end - monotonic()))

    # -- the thread

    def _start(self) -> None:
        if self._is_ending:
            raise SenderClosedError("the sender is closed")
        if self.has_thread():
            return
        with self._starting:
            if self.has_thread():
                return
            thread = threading.Thread(target=self._run, name="kbatch-outbox", daemon=True)
            self._thread = thread
            try:
                thread.start()
            except BaseException:
                if thread.ident is None and self._thread is thread:  # else Ctrl-C came when it had begun
                    self._thread = None
                raise

    def _run(self) -> None:
        writer: OutboxWriter | None = None
        me = threading.current_thread()
        try:
            while self._thread is me and not (self._is_ending and not self._queue):
                if not self._queue:
                    self._flag.wait(interruptible=False)
                while self._queue and self._thread is me:
                    writer = self._commit_group(writer)
        finally:
            try:
                if writer is not None:
                    _close(writer)
            finally:  # last: who waits for the end finds the connection closed
                # Two threads must not take from the queue. Whoever was interrupted may have the lock for ever.
                has_lock = self._starting.acquire(timeout=_LOCK_S)
                try:
                    if self._thread is me:
                        self._thread = None
                        self._refuse_all()
                finally:
                    if has_lock:
                        self._starting.release()

    def _commit_group(self, writer: OutboxWriter | None) -> OutboxWriter | None:
        """Commits what waits. Returns the connection, if it can be used again."""
        last = self._queue[-1]
        group: list[Waiting] = []

        def take() -> list[MappedBatch]:
            batches = []
            while self._queue and len(group) < _MOST_OF_GROUP:
                waiting = self._queue[0]
                group.append(waiting)  # first: whatever comes in between, it is in one of the two
                batch = waiting.take()
                if batch is None:
                    group.pop()
                else:
                    batches.append(batch)
                self._queue.popleft()
            return batches

        was_open = writer is not None
        try:
            if writer is None:
                writer = self._outbox.open_writer()
            if writer.commit(take):
                for waiting in group:
                    waiting.settle(None)
            else:
                self._refuse_impatient()
        except BaseException as error:
            for waiting in group:
                waiting.withdraw()
                if not waiting.is_over:
                    waiting.settle(_as_told(error, was_taken=True))
            # A connection may have been cut since the last commit: another one is tried first.
            if not (group or (was_open and isinstance(error, OutboxError))):
                self._refuse_up_to(last, error)
            if writer is not None:
                _close(writer)  # it may have the lock for writing
            if not isinstance(error, Exception):
                raise
            return None
        return writer

    def _refuse_impatient(self) -> None:
        now = monotonic()
        for waiting in self._queue.copy():
            if waiting.impatient_at is not None and now >= waiting.impatient_at:
                waiting.refuse(
                    OutboxError(
                        f"{self._outbox!r}: another connection has written for {_PATIENCE_S:g} s; nothing was added; "
                        "transactions that write should be short, or give send a timeout that is longer"
                    )
                )
            if waiting.is_taken:  # refused or withdrawn: it would stay for as long as a patient one before it
                self._queue.remove(waiting)

    def _refuse_up_to(self, last: Waiting, error: BaseException) -> None:
        """Those that waited when the attempt began; who came later has an attempt of its own."""
        while self._queue:
            waiting = self._queue[0]
            waiting.refuse(_as_told(error, was_taken=False))
            self._queue.popleft()
            if waiting is last:
                break

    def _refuse_all(self) -> None:
        while self._queue:
            told: KbatchError = OutboxError("the thread that commits to the outbox has ended; nothing was added")
            if self._is_ending:
                told = SenderClosedError("the sender is closed")
            self._queue[0].refuse(told)
            self._queue.popleft()


def _as_told(error: BaseException, *, was_taken: bool) -> OutboxError:
    """One for each caller: a traceback is written into it."""
    if isinstance(error, OutboxError):
        told = type(error)(*error.args, possibly_persisted=error.possibly_persisted)
    else:
        told = OutboxError(f"the outbox failed: {named_exception_text(error)}", possibly_persisted=was_taken)
    cause = error.__cause__ if isinstance(error, OutboxError) else error
    # Its frames hold the callers, and so these errors.
    told.__cause__ = cause.with_traceback(None) if isinstance(cause, Exception) else None
    return told


def _close(writer: OutboxWriter) -> None:
    try:
        writer.close()
    except Exception as error:
        tell("the connection to an outbox did not close: %s", named_exception_text(error))
