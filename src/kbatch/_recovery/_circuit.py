"""The circuit breaker: after too many failures in a row nothing is sent until the brokers have shown that they take it.

No threads and no clock: each call says what time it is, in seconds of whatever clock.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from kbatch._fastmap import Trials

if TYPE_CHECKING:
    from collections.abc import Callable

    from kbatch._fastmap import Trial

__all__ = ["CircuitBreaker", "CircuitState"]


class CircuitState(enum.Enum):
    """The state of a circuit breaker."""

    CLOSED = "closed"
    """Batches are sent."""
    OPEN = "open"
    """Too many batches failed in a row: none is sent, and a probe asks the brokers now and then."""
    HALF_OPEN = "half-open"
    """The probe succeeded: the next batch is the trial, and only its success closes the circuit."""


class CircuitBreaker:
    """Counts failed batches, and says whether the next may be sent and when to probe.

    The trial is an object that its sender holds. When nobody holds it any more, whatever the reason, another batch may
    be the trial.

    A probe that fails, or a trial, doubles the time to the next probe. A random half is taken off each, so that many
    processes do not ask at once.
    """

    def __init__(
        self,
        *,
        failures_to_open: int,
        probe_interval_s: float,
        max_probe_interval_s: float,
        random: Callable[[], float],
    ) -> None:
        self.state = CircuitState.CLOSED
        self.failures = 0  # batches in a row
        self._failures_to_open = failures_to_open
        self._first_interval_s = probe_interval_s
        self._max_interval_s = max_probe_interval_s
        self._random = random
        self._interval_s = probe_interval_s
        self._probe_at = 0.0
        self._probing = False
        self.trials = Trials()

    def may_send(self) -> bool:
        """Whether a batch may be sent now."""
        return self.state is CircuitState.CLOSED or (
            self.state is CircuitState.HALF_OPEN and not self.trials.is_taken()
        )

    def sent(self) -> Trial | None:
        """To be called for each batch that is sent. The trial, if it is that: to be kept, and given with the answer."""
        return self.trials.begin() if self.state is CircuitState.HALF_OPEN else None

    def succeeded(self, trial: Trial | None, now: float) -> None:
        """The brokers took a batch, or some of it."""
        if self.state is CircuitState.CLOSED:
            self.failures = 0
        elif self.trials.end(trial) and self.state is CircuitState.HALF_OPEN:
            self.state = CircuitState.CLOSED
            self.failures = 0
            self._interval_s = self._first_interval_s
        elif self.state is CircuitState.OPEN:
            self._probe_at = min(self._probe_at, now)  # one that was sent before: a good sign, but no more

    def failed(self, trial: Trial | None, now: float) -> None:
        """A batch failed, and not for a reason of its own."""
        if self.state is CircuitState.CLOSED:
            self.failures += 1
            if self.failures >= self._failures_to_open:
                self._open(now)
        elif self.trials.end(trial) and self.state is CircuitState.HALF_OPEN:
            self.failures += 1
            self._interval_s = min(2 * self._interval_s, self._max_interval_s)
            self._open(now)

    def said_nothing(self, trial: Trial | None) -> None:
        """A batch ended without a word about the brokers; if it was the trial, the next one is."""
        self.trials.end(trial)

    def probe_at(self) -> float | None:
        """When to probe; ``None`` if it is not open, or a probe is under way."""
        return self._probe_at if self.state is CircuitState.OPEN and not self._probing else None

    def probe_started(self) -> None:
        """To be called for each probe."""
        self._probing = True

    def probed(self, succeeded: bool, now: float) -> None:
        """The answer of the probe."""
        self._probing = False
        if self.state is not CircuitState.OPEN:
            return
        if succeeded:
            self.state = CircuitState.HALF_OPEN
            return
        self._interval_s = min(2 * self._interval_s, self._max_interval_s)
        self._plan_probe(now)

    def hurry(self, now: float, at_most_s: float) -> None:
        """Probes now if it is open, and from now on at least that often."""
        self._first_interval_s = min(self._first_interval_s, at_most_s)
        self._interval_s = min(self._interval_s, at_most_s)
        self._max_interval_s = min(self._max_interval_s, at_most_s)
        self._probe_at = min(self._probe_at, now)

    def _open(self, now: float) -> None:
        self.state = CircuitState.OPEN
        self._plan_probe(now)

    def _plan_probe(self, now: float) -> None:
        self._probe_at = now + self._interval_s * (1 - 0.5 * self._random())
