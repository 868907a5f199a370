"""One envelope at a time, through an outbox."""

from __future__ import annotations

import inspect
import threading
from typing import TYPE_CHECKING, Any

from kbatch._checks import check_close_timeout, check_methods, check_timeout, check_topic
from kbatch._errors import OutboxError, OutboxTimeoutError, SenderClosedError
from kbatch._exit import SENDERS
from kbatch._fastmap import Flag, monotonic
from kbatch._outbox._group import Waiting
from kbatch._outbox._shared import OutboxUse

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from kbatch._fastmap import Envelope, MappedBatch
    from kbatch._outbox._store import DurableOutbox

__all__ = ["BaseDurableSender", "DurableSender", "check_outbox"]

_LOOK_WHETHER_OVER_S = 0.005


class BaseDurableSender:
    """What does not wait of a durable sender, be it blocking or for asyncio."""

    _shown = "kbatch.DurableSender"
    _look_s = 1.0  # until somebody who waits looks whether the thread that commits has died

    def __init__(self, outbox: DurableOutbox | OutboxUse, topic: str | None, *, close_timeout_s: float = 30.0) -> None:
        check_close_timeout(close_timeout_s)
        if topic is not None:
            check_topic("topic", topic)
        self.topic = topic
        self._close_timeout = close_timeout_s
        if isinstance(outbox, OutboxUse):  # made for this sender
            self._use = outbox
        else:
            check_outbox(outbox)
            self._use = OutboxUse(outbox)
        self._shared = self._use.shared
        self._closed = self._is_used = False
        self._waiting: dict[Waiting, None] = {}  # of the calls of `send`

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"through {self._shared.outbox!r}"
        return f"<{self._shown} to {self.topic!r} {state}>"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a sender cannot be pickled: it shares threads and a connection")

    # -- sending

    def _map(self, envelope: Envelope[Any]) -> MappedBatch | None:
        self._begin_use()
        batch = self._shared.outbox.map(self.topic, envelope)
        self._check_open()  # an encoder or a hook may have closed it
        return batch

    def _begin_use(self) -> None:
        self._check_open()
        if not self._is_used:
            SENDERS.add(self)
            self._is_used = True
        self._shared.start()

    def _check_open(self) -> None:
        if self._closed:
            raise SenderClosedError("the sender is closed")

    def _put(self, waiting: Waiting) -> None:
        self._waiting[waiting] = None
        self._shared.group.put(waiting)

    def _answer(self, waiting: Waiting, timeout: float | None) -> None:
        is_lost = not waiting.is_over and self._shared.group.has_lost(waiting)
        if waiting.is_over:
            if waiting.error is not None:
                raise waiting.take_error()
            return
        if is_lost:
            was_taken = not waiting.withdraw()
            if self._shared.group.is_ending and not was_taken:  # it has ended, and was about to tell
                raise SenderClosedError("the sender is closed")
            raise OutboxError(
                f"the thread that commits to {self._shared.outbox!r} has died", possibly_persisted=was_taken
            )
        if waiting.withdraw():
            raise OutboxTimeoutError(
                f"the envelope was not committed to {self._shared.outbox!r} within {timeout} s; it was not added"
            )
        raise OutboxTimeoutError(
            f"the envelope was not committed to {self._shared.outbox!r} within {timeout} s; its transaction is under "
            "way, so it may be added all the same",
            possibly_persisted=True,
        )

    def _leave(self, waiting: Waiting) -> None:
        """The caller goes. What is in no transaction yet is not added."""
        waiting.withdraw()
        self._waiting.pop(waiting, None)

    # -- blocking; kbatch.aio has them in a thread

    def _flush(self, timeout: float | None) -> int:
        check_timeout(timeout)
        if self._shared.is_forked():
            return 0
        return self._await_answers(list(self._waiting), None if timeout is None else monotonic() + timeout)

    def _await_answers(self, waiting: list[Waiting], end: float | None) -> int:
        """How many have none by then."""
        while True:
            # One that was interrupted when it had been withdrawn may still be there.
            waiting = [each for each in waiting if not (each.is_over or each.is_withdrawn) and each in self._waiting]
            if not waiting or (end is not None and monotonic() >= end):
                return len(waiting)
            threading.Event().wait(_LOOK_WHETHER_OVER_S)

    def _close(self, timeout: float | None) -> int:
        check_timeout(timeout)
        end = monotonic() + (self._close_timeout if timeout is None else timeout)
        self._closed = True
        if self._shared.is_forked():
            return 0  # those are the parent's
        try:
            self._await_answers(list(self._waiting), end)
        except BaseException:  # after Ctrl-C the caller does not wait
            end = 0.0
            raise
        finally:
            refused = self._refuse_waiting()
            self._use.release(end)
            SENDERS.discard(self)
        return refused

    def _refuse_waiting(self) -> int:
        told = "the sender was closed before the envelope was committed; it was not added"
        return sum([waiting.refuse(SenderClosedError(told)) for waiting in list(self._waiting)])

    # -- at the end of the interpreter, where all senders have the same time

    def _drain(self, timeout: float) -> int:
        self._closed = True
        if self._shared.is_forked():
            return 0
        end = monotonic() + timeout
        left = self._await_answers(list(self._waiting), end)
        self._use.finish(end)
        return left

    def _begin_end(self) -> None:
        self._closed = True
        if not self._shared.is_forked():
            self._refuse_waiting()
            self._use.release(None)
        SENDERS.discard(self)

    def _await_end(self, end: float) -> int:
        return 0


class DurableSender(BaseDurableSender):
    """Commits one envelope at a time to an outbox, from which a `Relay` sends it. Any number of threads may use one.

    What they send at the same time is committed in one transaction, by a thread and a connection that all senders of
    one outbox share in a process. What `send` has returned for survives a crash of the process, and of the machine as
    far as its disk and the database's settings do.

    The threads start with the first envelope. The sender must be closed, by a ``with`` block or `close`.

    Args:
        outbox: A `SqliteOutbox` or `PostgresOutbox`, whose tables are there. A relay, of this process or another, sends
            what is in it.
        topic: Where envelopes without a topic of their own go; ``None`` if each has one.
        close_timeout_s: Seconds that leaving a ``with`` block waits for calls that are under way, and for a relay of
            its own to send what is left.

    Raises:
        ConfigError: A value of the wrong type or out of its range.
    """

    def send(self, envelope: Envelope[Any], *, connection: Any = None, timeout: float | None = None) -> bool:
        """Blocks until the envelope is committed to the outbox. The GIL is released while it waits, and Ctrl-C works.

        After Ctrl-C it is not added if its transaction had not begun, and may be added otherwise.

        Args:
            envelope: As for the outbox's ``add``.
            connection: Adds it within the transaction that this connection is in instead, as the outbox's ``add`` does,
                and commits nothing.
            timeout: Seconds to wait, also while another connection writes to a SQLite file; ``None`` waits for 5
                seconds then, and else for as long as the database takes.

        Returns:
            True; False if its ``deliver_by`` has passed, so that it was not added.

        Raises:
            SerializationError: It could not be mapped, or is too large. It was not added.
            OutboxTimeoutError: `timeout` has passed. It was not added, and will not be, unless the error's
                ``possibly_persisted`` says that its transaction was being committed.
            OutboxError: The database refused the transaction, or does not answer, also to the other callers whose
                envelopes were in it. It was not added, unless ``possibly_persisted``. Of `connection`, as the outbox's
                ``add`` raises it.
            SenderClosedError, ForkError: It was not added.
        """
        check_timeout(timeout)
        if connection is not None:
            self._begin_use()
            outbox = self._shared.outbox
            if inspect.iscoroutinefunction(outbox.add):
                raise TypeError(f"{outbox!r} adds by await: use kbatch.aio.DurableSender, or an outbox for threads")
            return bool(outbox.add(connection, (envelope,), topic=self.topic))
        batch = self._map(envelope)
        if batch is None:
            return False
        done = Flag()
        # Made before it is put: interrupted there, it is withdrawn.
        waiting = Waiting(batch, done.set, patient=timeout is not None)
        del batch  # else an error has it with this frame
        try:
            self._put(waiting)
            left = timeout
            end = None if timeout is None else monotonic() + timeout
            while not self._shared.group.has_answered(waiting) and (left is None or left > 0):
                done.wait(self._look_s if left is None else min(self._look_s, left))
                left = None if end is None else end - monotonic()
            self._answer(waiting, timeout)
        finally:
            self._leave(waiting)
        return True

    def flush(self, timeout: float | None = None) -> int:
        """Waits until each envelope that other threads are sending is committed or refused. It waits for no relay.

        Args:
            timeout: Seconds; ``None`` waits as long as it takes.

        Returns:
            How many are not yet.
        """
        return self._flush(timeout)

    def close(self, timeout: float | None = None) -> int:
        """Refuses envelopes from now on, and waits for the answers of those that other threads are sending. May be
        called again.

        If it is the last sender of the outbox that has a relay of its own, that relay sends within the same time what
        is in the outbox, but for what waits or is scheduled, and ends. When no broker answers, the database fails, or
        the time is over, what it has not sent stays in the outbox, for the next relay.

        Args:
            timeout: Seconds; ``None`` is the ``close_timeout_s``. Whoever still waits then for a transaction to begin
                is refused with `SenderClosedError`.

        Returns:
            How many were refused.
        """
        return self._close(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close(None)


def check_outbox(outbox: Any) -> None:
    """Raises ConfigError for what is no outbox."""
    wanted = "a kbatch.SqliteOutbox or kbatch.PostgresOutbox, or a kbatch.stores.DurableOutbox"
    check_methods("outbox", outbox, wanted, ("map", "open_writer"))
