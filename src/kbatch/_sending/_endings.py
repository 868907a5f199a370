"""What becomes of envelopes that are not sent, or not sent again: a dead letter, or a word to the user."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kbatch._errors import (
    CircuitOpenError,
    KbatchError,
    SenderError,
)
from kbatch._recovery._circuit import CircuitState
from kbatch._recovery._dead_letter import dead_letter
from kbatch._sending._queue import Ended, Entry

if TYPE_CHECKING:
    from kbatch._fastmap import Accumulator
    from kbatch._recovery._gate import Gate
    from kbatch._recovery._user_calls import UserCalls
    from kbatch._sending._given_up import GivenUp
    from kbatch._sending._queue import SendQueue

__all__ = ["Endings"]


class Endings:
    """Ends envelopes of a queue and its buffer: by age, or all that wait; and sees off what has ended."""

    def __init__(
        self,
        queue: SendQueue,
        buffer: Accumulator | None,
        gate: Gate,
        calls: UserCalls,
        given_up: GivenUp,
        *,
        topic: str | None,
        dead_letter_topic: str | None,
        max_age_s: float | None,
    ) -> None:
        self.expire_every_s = None if max_age_s is None else min(1.0, max(0.01, max_age_s / 10))
        self.next_expiry = 0.0
        self._queue = queue
        self._buffer = buffer
        self._gate = gate
        self._calls = calls
        self._given_up = given_up
        self._topic = topic
        self._dead_letter_topic = dead_letter_topic
        self._max_age_s = max_age_s

    # -- what ends

    def expire_if_due(self, now: float, wall: float) -> None:
        """Ends what is too old, if it is time to look."""
        if self.expire_every_s is not None and now >= self.next_expiry:
            self.next_expiry = now + self.expire_every_s
            self._expire(now, wall, self.expire_every_s)

    def expiry_at(self) -> float | None:
        """When to look next; ``None`` if nothing can become too old."""
        if self.expire_every_s is None or self._buffer is None or len(self._buffer) == 0:
            return None
        return self.next_expiry

    def _expire(self, now: float, wall: float, every_s: float) -> None:
        queue, buffer, age = self._queue, self._buffer, self._max_age_s
        assert age is not None
        queue.expire(now, wall)
        if buffer is None:
            return
        buffer._close_older(every_s)  # else what came much later would be in one batch with it
        error: KbatchError = SenderError(f"not sent within max_age_s={age}")
        if self._gate.circuit.state is not CircuitState.CLOSED:
            error = CircuitOpenError(f"not sent within max_age_s={age}: the circuit breaker is open")
        while (batch := buffer._pop_older(age)) is not None:
            queue.expire_batch(batch, now, wall, error)

    def end_all_that_wait(self) -> None:
        """At the end of closing, or when nothing can be sent any more."""
        queue, buffer = self._queue, self._buffer
        entries = queue.take_out_all()
        if buffer is not None:
            buffer._stop_accepting()
            while (batch := buffer._next_batch()) is not None:
                entries += [
                    Entry(envelope, batch.first_seq + index, batch.accepted_at, None, batch.sizes[index])
                    for index, envelope in enumerate(batch.envelopes)
                ]
        for entry in entries:
            queue.ended.append(Ended.of(entry, self._gate.refusal(entry.error)))

    # -- what has ended

    def see_off(self, now: float, wall: float) -> bool:
        """What has ended becomes a dead letter, or is told. Whether there is a dead letter to send."""
        queue = self._queue
        if not queue.ended:
            return False
        told: list[Ended] = []
        done = 0
        try:
            for end in queue.ended:
                if end.entry.origin is not None:
                    self._calls.log(logging.ERROR, "a dead letter could not be sent: %s", end.error)
                    told.append(end.entry.origin)
                elif not self._send_to_dead_letters(end, now, wall):
                    told.append(end)
                done += 1
        finally:  # without memory the others are the next call's
            del queue.ended[:done]
            if told:
                closing = self._gate.closed or self._buffer is None or self._buffer._is_refusing
                self._given_up.tell(told, closing=closing, then=self._gate.flag.set)
        return len(told) < done

    def _send_to_dead_letters(self, end: Ended, now: float, wall: float) -> bool:
        if self._dead_letter_topic is None or not self._gate.is_alive():
            return False
        entry = end.entry
        try:
            letter = dead_letter(entry.envelope, end.error, entry.failures, self._dead_letter_topic, self._topic, wall)
        except Exception:  # headers that could not be mapped either
            return False
        if letter is None:
            return False
        self._queue.add_dead_letter(letter, end, now)
        return True
