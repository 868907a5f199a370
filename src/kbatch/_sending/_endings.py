"""What becomes of envelopes that are not sent, or not sent again: a dead letter, or a word to the user."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from typing import TYPE_CHECKING, Any

from kbatch._callbacks import callback_name
from kbatch._errors import (
    CircuitOpenError,
    KbatchError,
    NotYetDueError,
    SenderError,
    SerializationError,
    exception_text,
)
from kbatch._fastmap import KEPT_BYTES, Undelivered, envelope_bytes
from kbatch._recovery._circuit import CircuitState
from kbatch._recovery._dead_letter import dead_letter
from kbatch._sending._queue import Ended, Entry
from kbatch._text import counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from kbatch._fastmap import Accumulator, Envelope
    from kbatch._recovery._gate import Gate
    from kbatch._recovery._user_calls import UserCalls
    from kbatch._sending._queue import SendQueue

__all__ = ["Endings", "GivenUp"]

_KEPT_FAILURES = 1000


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
        self._kept: deque[tuple[Envelope[Any], KbatchError]] = deque(maxlen=_KEPT_FAILURES)
        self._kept_sizes: deque[int] = deque(maxlen=_KEPT_FAILURES)
        # Of what on_failed has, or will have: the lowest number, and all.
        self._untold: deque[tuple[int, list[Ended]]] = deque()

    def recent(self) -> tuple[tuple[Envelope[Any], KbatchError], ...]:
        """The last ones that `on_failed` has not taken, the oldest first."""
        return tuple(self._kept)

    def lowest_untold(self) -> int | None:
        """The lowest number of one that `on_failed` has not taken yet."""
        return min((seq for seq, _ in list(self._untold)), default=None)

    def lost(self) -> int:
        """After the end: how many envelopes nobody is told of, after a crash or if a thread hangs."""
        if self.buffer is None:
            return 0
        to_be_told = 0 if self._on_failed is None else sum(len(told) for _, told in list(self._untold))
        return max(0, len(self.buffer) - to_be_told)

    def tell(self, told: list[Ended], *, closing: bool, then: Callable[[], None]) -> None:
        """Has them told, on the thread for callbacks; `then` is called when they are."""
        if closing:
            self.not_sent += len(told)
        self.failed += len(told)
        self._untold.append((min(end.entry.seq for end in told), told))
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

    def _keep(self, envelope: Envelope[Any], error: KbatchError) -> None:
        size = envelope_bytes(envelope)
        self._kept.append((envelope, error))
        self._kept_sizes.append(size)
        while len(self._kept) > 1 and sum(self._kept_sizes) > KEPT_BYTES:
            self._kept.popleft()
            self._kept_sizes.popleft()
        self.undelivered.add(envelope, error)


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
            queue.expire_batch(batch, wall, error)

    def end_all_that_wait(self) -> None:
        """At the end of closing, or when nothing can be sent any more."""
        queue, buffer = self._queue, self._buffer
        entries = queue.give_up()
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

    def see_off(self, now: float) -> bool:
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
                elif not self._send_to_dead_letters(end, now):
                    told.append(end)
                done += 1
        finally:  # without memory the others are the next call's
            del queue.ended[:done]
            if told:
                closing = self._gate.closed or self._buffer is None or self._buffer._is_refusing
                self._given_up.tell(told, closing=closing, then=self._gate.flag.set)
        return len(told) < done

    def _send_to_dead_letters(self, end: Ended, now: float) -> bool:
        if self._dead_letter_topic is None or not self._gate.is_alive():
            return False
        entry = end.entry
        try:
            letter = dead_letter(entry.envelope, end.error, entry.failures, self._dead_letter_topic, self._topic)
        except Exception:  # headers that could not be mapped either
            return False
        if letter is None:
            return False
        self._queue.add_dead_letter(letter, end, now)
        return True


def _reason(error: KbatchError) -> str:
    # Without the place in a batch, of which the sender of single envelopes knows nothing.
    return error.reason if isinstance(error, (SerializationError, NotYetDueError)) else exception_text(error)
