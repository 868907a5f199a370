"""Envelopes that were given up, until each is told."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from typing import TYPE_CHECKING, Any

from kbatch._callbacks import callback_name
from kbatch._errors import KbatchError, NotYetDueError, SerializationError, exception_text
from kbatch._fastmap import KEPT_BYTES, KEPT_COUNT, Undelivered, envelope_bytes
from kbatch._text import counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from kbatch._fastmap import Accumulator, Envelope
    from kbatch._recovery._user_calls import UserCalls
    from kbatch._sending._queue import Ended

__all__ = ["GivenUp"]


class GivenUp:
    """The envelopes that were given up: each is told once, to `on_failed`, or else by the log and by a call that waits.

    Attributes:
        buffer: What their room is given back to; ``None`` without a sender.
        undelivered: What `on_failed` has not taken.
        not_sent: How many were given up since closing began.
        failed: How many ever.
    """

    def __init__(
        self, topic: str | None, calls: UserCalls, on_failed: Callable[[Envelope[Any], KbatchError], object] | None
    ) -> None:
        self.buffer: Accumulator | None = None
        self.undelivered = Undelivered("envelopes were given up")
        self.not_sent = self.failed = 0
        self._topic = topic
        self._calls = calls
        self._on_failed = on_failed
        self._kept: deque[tuple[Envelope[Any], KbatchError, int]] = deque()  # with its bytes
        self._kept_bytes = 0
        # Of what is being told, or will be: the lowest number, and how many are left.
        self._untold: deque[list[int]] = deque()

    @property
    def has_callback(self) -> bool:
        """Whether users' code is told."""
        return self._on_failed is not None

    def recent(self) -> tuple[tuple[Envelope[Any], KbatchError], ...]:
        """The last ones that `on_failed` has not taken, the oldest first."""
        return tuple((envelope, error) for envelope, error, _ in list(self._kept))

    def lowest_untold(self) -> int | None:
        """The lowest number of one that is not told yet."""
        return min((seq for seq, _ in list(self._untold)), default=None)

    def lost(self) -> int:
        """After the end: how many envelopes nobody is told of, after a crash or if a thread hangs."""
        if self.buffer is None:
            return 0
        # What on_failed has, or will have, is told; without it a log that hangs keeps the caller from being told.
        return len(self.buffer) if self._on_failed is None else self.uncounted()

    def uncounted(self) -> int:
        """After the end: how many envelopes were not even given up, after a crash or if a thread hangs."""
        if self.buffer is None:
            return 0
        return max(0, len(self.buffer) - sum(left for _, left in list(self._untold)))

    def tell(self, told: list[Ended], *, closing: bool, then: Callable[[], None]) -> None:
        """Has them told, on the thread for callbacks; `then` is called when they are."""
        if closing:
            self.not_sent += len(told)
        self.failed += len(told)
        self._untold.append([min(end.entry.seq for end in told), len(told)])
        self._calls.put_surely(self._tell, told, then)

    def _tell(self, told: list[Ended], then: Callable[[], None]) -> None:
        try:
            if self._on_failed is None:
                with contextlib.suppress(BaseException):  # without memory for a line of the log
                    self._log_first(told)
            for end in told:
                self._tell_one(end)
        finally:
            self._untold.popleft()
            then()

    def _log_first(self, told: list[Ended]) -> None:
        first = told[0].entry.envelope
        self._calls.log(
            logging.ERROR,
            "%s to %r %s given up; the first, %s with the key %r: %s",
            *(counted(len(told), "envelope"), self._topic, "was" if len(told) == 1 else "were"),
            *(first.id, first.key),
            _reason(told[0].error),
        )

    def _tell_one(self, end: Ended) -> None:
        envelope = end.entry.envelope
        try:
            if self._on_failed is None:
                self._keep(envelope, end.error)
            else:
                self._calls.call(self._on_failed, envelope, end.error)
        except BaseException as error:  # also a sys.exit(): the others are to be told
            try:
                self._keep(envelope, end.error)
            except BaseException:  # without memory for the envelope there is still the count
                self.undelivered.count_one()
            with contextlib.suppress(BaseException):
                text = "on_failed failed: %s; agent.recent_failures keeps envelope %s, which was given up: %s"
                name = callback_name(self._on_failed)
                self._calls.log(logging.ERROR, text, name, envelope.id, _reason(end.error), exc_info=error)
        finally:
            if self.buffer is not None:
                # Not before: what a slow callback has not taken yet is buffered, too.
                self.buffer._give_back(1, end.entry.size)
            self._untold[0][1] -= 1

    def _keep(self, envelope: Envelope[Any], error: KbatchError) -> None:
        size = envelope_bytes(envelope)
        self._kept.append((envelope, error, size))
        self._kept_bytes += size
        while len(self._kept) > 1 and (len(self._kept) > KEPT_COUNT or self._kept_bytes > KEPT_BYTES):
            self._kept_bytes -= self._kept.popleft()[2]
        self.undelivered.add(envelope, error)


def _reason(error: KbatchError) -> str:
    # Without the place in a batch, of which the sender of single envelopes knows nothing.
    return error.reason if isinstance(error, (SerializationError, NotYetDueError)) else exception_text(error)
