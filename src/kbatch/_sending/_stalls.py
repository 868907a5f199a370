"""Brokers that do not answer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kbatch._fastmap import monotonic
from kbatch._text import buffered, counted

if TYPE_CHECKING:
    from kbatch._fastmap import Accumulator
    from kbatch._recovery._user_calls import UserCalls
    from kbatch._sending._queue import SendQueue

__all__ = ["StallWatch"]

REMIND_EVERY_S = 60.0


class StallWatch:
    """Logs that brokers do not answer, and that they answer again."""

    def __init__(
        self, queue: SendQueue, buffer: Accumulator | None, calls: UserCalls, topic: str | None, after_s: float
    ) -> None:
        self._queue = queue
        self._buffer = buffer
        self._calls = calls
        self._topic = topic
        self._after_s = after_s
        self._logged_at: float | None = None  # the last time; None: nothing is stalled

    def due_at(self) -> float | None:
        """When it is to be logged, unless there is an answer by then."""
        departed = self._queue.oldest_departure()
        if departed is None:
            return None
        if self._logged_at is None:
            return departed + self._after_s
        return max(departed + self._after_s, self._logged_at + REMIND_EVERY_S)

    def look(self, now: float) -> None:
        """Logs what there is to be logged now."""
        at = self.due_at()
        if at is not None and now >= at:
            self._logged_at = now
            text = "brokers have not answered for %r for %.0f s: %s in flight, %s buffered"
            flying = counted(self._queue.in_flight, "batch is", "batches are")
            count = 0 if self._buffer is None else len(self._buffer)
            self._calls.log(logging.WARNING, text, self._topic, self.waiting_for_s(), flying, buffered(count))
        elif self._logged_at is not None and self.waiting_for_s() < self._after_s:
            self._logged_at = None
            self._calls.log(logging.WARNING, "brokers answer for %r again", self._topic)

    def waiting_for_s(self) -> float:
        """For how long the oldest flight has been without an answer; 0.0 if none is."""
        departed = self._queue.oldest_departure()
        return 0.0 if departed is None else monotonic() - departed
