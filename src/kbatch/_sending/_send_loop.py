"""What the thread of a sending agent does, round by round."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from kbatch._errors import ProducerError, type_name
from kbatch._fastmap import monotonic, wall_time
from kbatch._recovery._circuit import CircuitState
from kbatch._recovery._retry import RetryPolicy, entropy
from kbatch._sending._endings import Endings
from kbatch._sending._flights import Flights
from kbatch._sending._queue import SendQueue
from kbatch._sending._stalls import StallWatch
from kbatch._sending._watchers import NONE_LEFT

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable

    from typing_extensions import Never

    from kbatch._fastmap import Accumulator
    from kbatch._options import AgentOptions
    from kbatch._recovery._gate import Gate
    from kbatch._recovery._user_calls import UserCalls
    from kbatch._sending._given_up import GivenUp
    from kbatch._sending._queue import Flight
    from kbatch._sending._watchers import Watchers

__all__ = ["OVER", "SendLoop"]

OVER = -1.0
_HURRY_S = 1.0  # while closing, the most between two attempts and two probes
_LOOK_AT_CLOCK_S = 30.0  # time since 1970 may jump


class SendLoop:
    """Sends what a queue and a buffer have, as far as the gate lets it, and ends what is not sent.

    Args:
        buffer: Where batches come from; ``None`` without a sender.
        news: Calls for the thread, from others. The thread that puts one sets the gate's flag.
        counts: As for `Flights`.
    """

    def __init__(
        self,
        buffer: Accumulator | None,
        gate: Gate,
        calls: UserCalls,
        given_up: GivenUp,
        watchers: Watchers,
        options: AgentOptions[Never],
        *,
        topic: str | None,
        news: deque[Callable[[], None]],
        counts: dict[str, int],
    ) -> None:
        policy = RetryPolicy() if options.retry is None else options.retry
        self.queue = queue = SendQueue(
            topic,
            policy,
            batch_size=1000 if buffer is None else buffer.batch_size,
            batch_bytes=1_000_000 if buffer is None else buffer.batch_bytes,
            strict_order=options.strict_order,
            keep_scheduled=not gate.handle.producer._carries_scheduled_time,
            random=entropy,
        )
        self.flights = Flights(
            queue, buffer, gate, topic=topic, max_in_flight=options.max_in_flight_batches, news=news, counts=counts
        )
        self.endings = Endings(
            queue,
            buffer,
            gate,
            calls,
            given_up,
            topic=topic,
            dead_letter_topic=options.dead_letter_topic,
            max_age_s=policy.max_age_s,
        )
        self.stalls = StallWatch(queue, buffer, calls, topic, options.stalled_after_s)
        self._buffer = buffer
        self._gate = gate
        self._calls = calls
        self._given_up = given_up
        self._watchers = watchers
        self._news = news
        self._hurries = False

    def round(self) -> float | None:
        """Does what is to be done now. Returns the seconds until there will be more, if nothing happens; ``None``: for
        ever; `OVER`: there will be nothing more."""
        pause: float | None = OVER
        try:
            pause = self._step()
        except BaseException as error:
            self._crash(error)
            raise
        finally:
            if pause == OVER:
                self._watchers.wake_all()
        return pause

    def is_idle(self) -> bool:
        """Whether nobody's envelopes depend on the thread."""
        return not (self._news or self.queue.in_flight or (self._buffer is not None and len(self._buffer)))

    def hurry(self) -> None:
        """What is left is to be sent soon: closing has begun."""
        if self._hurries:  # else a caller that asks again and again would leave no back-off at all
            return
        self._hurries = True
        now = monotonic()
        self.queue.hurry(now, _HURRY_S)
        self._gate.hurry(now, _HURRY_S)

    def _step(self) -> float | None:
        queue, gate = self.queue, self._gate
        while self._news:
            self._news.popleft()()
        now, wall = monotonic(), wall_time()
        closed = gate.closed  # it may change on the way
        if closed or gate.death is not None:
            self.endings.end_all_that_wait()
        else:
            gate.probe_if_due(now)
            if self._may_replace():
                gate.replace()
            self.endings.expire_if_due(now, wall)
            self._send_all(now, wall)
        self.stalls.look(now)
        has_letters = self.endings.see_off(now, wall)
        self._wake_watchers()
        if closed and not queue.in_flight:
            return OVER
        if self._news or queue.ended or has_letters or self._may_replace():
            return 0.0
        return self._idle_for(monotonic(), wall_time())

    def _idle_for(self, now: float, wall: float) -> float | None:
        """Seconds until there is something to do, if nothing happens; None: for ever."""
        queue, gate = self.queue, self._gate
        due: list[float] = []
        if self.flights.may_depart():
            at = queue.due_at(now, wall)
            if at is not None:
                due.append(at - now)
            if queue.scheduled:
                due.append(_LOOK_AT_CLOCK_S)
            if self._buffer is not None and queue.wants_batch():
                buffer_due = self._buffer._due_in()
                if buffer_due is not None:
                    due.append(buffer_due)
        if gate.is_alive():
            for at in (gate.probe_at(), self.endings.expiry_at()):
                if at is not None:
                    due.append(at - now)
        stall_at = self.stalls.due_at()
        if stall_at is not None:
            due.append(stall_at - now)
        return max(0.0, min(due)) if due else None

    def _may_replace(self) -> bool:
        return not self.queue.in_flight and self._gate.must_replace()

    # -- what is sent next

    def _send_all(self, now: float, wall: float) -> None:
        while self.flights.may_depart():
            flight = self._next(now, wall)
            if flight is None:
                return
            self.flights.send(flight)

    def _next(self, now: float, wall: float) -> Flight | None:
        """What is sent next: what waits for another attempt, or else what is buffered.

        The trial of the circuit is what failed first, whatever its back-off. But that may be what cannot be stored for
        a reason that others do not share, such as a partition without a leader. So after a trial that did not succeed
        the next one is what was never sent, if there is such.
        """
        queue, gate = self.queue, self._gate
        if gate.circuit.state is CircuitState.HALF_OPEN:
            if self.flights.tries_buffered_next:
                queue.step_aside(now)
                flight = self._next_buffered(now, wall)
                if flight is not None:
                    return flight
            if gate.tries_again:
                gate.tries_again = False
                queue.hasten(now)
        flight = queue.next_flight(now, wall)
        return self._next_buffered(now, wall) if flight is None else flight

    def _next_buffered(self, now: float, wall: float) -> Flight | None:
        flight = None
        while flight is None and self._buffer is not None and self.queue.wants_batch():
            batch = self._buffer._next_batch()
            if batch is None:
                break
            flight = self.queue.take(batch, now, wall)
        return flight

    # -- who waits

    def _wake_watchers(self) -> None:
        self._watchers.wake(self._oldest)

    def _oldest(self) -> int | None:
        """The lowest number of an envelope without an outcome, unless it is scheduled for later, or one that none has
        if all are; ``None`` if each has its outcome."""
        buffer = self._buffer
        if buffer is None or len(buffer) == 0:
            return None
        numbers = (self._given_up.lowest_untold(), self.queue.oldest(), buffer._first_seq())
        return min((seq for seq in numbers if seq is not None), default=NONE_LEFT - 1)

    # -- a defect

    def _crash(self, error: BaseException) -> None:
        """After a defect, or without memory: nothing is taken any more, and as far as possible all is told."""
        self._gate.death = ProducerError(f"a sender's thread failed: {type_name(error)}")
        with contextlib.suppress(BaseException):
            if self._buffer is not None:
                self._buffer._stop_accepting()
        with contextlib.suppress(BaseException):
            self.endings.end_all_that_wait()
            self.endings.see_off(monotonic(), wall_time())
            self._wake_watchers()
        with contextlib.suppress(BaseException):
            self.flights.give_up()
            self.endings.see_off(monotonic(), wall_time())
        with contextlib.suppress(BaseException):
            self._calls.log(logging.CRITICAL, "a sender's thread failed; nothing more is sent", exc_info=error)
