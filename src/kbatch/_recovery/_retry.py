"""When a failed envelope is sent again, and for how long."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kbatch._checks import is_number, is_whole
from kbatch._errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RetryPolicy", "entropy"]

entropy = random.SystemRandom().random  # not the module's generator: a program that has seeded that counts on it


@dataclass(frozen=True)
class RetryPolicy:
    """When a failed envelope is sent again, and when no more.

    The first retry comes after ``initial_backoff_s``, each further one after ``multiplier`` times as long, up to
    ``max_backoff_s``; a random part of up to ``jitter`` of it is taken off, so that many senders do not come back at
    once.

    Attributes:
        max_attempts: How often an envelope is sent, the first time included; ``None`` for no limit. What fails because
            no broker answers (a timeout, a lost connection) counts no attempt.
        max_age_s: Seconds after which it is not sent any more, for the first time or again; ``None`` for no limit. It
            ends up to a second later, never earlier. What is in flight then is waited for.

    Raises:
        ConfigError: A value out of its range.
    """

    max_attempts: int | None = 10
    max_age_s: float | None = None
    initial_backoff_s: float = 0.1
    max_backoff_s: float = 10.0
    multiplier: float = 2.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        _check(
            self.max_attempts is None or (is_whole(self.max_attempts) and self.max_attempts >= 1),
            f"max_attempts must be 1 or more, or None for no limit, not {self.max_attempts!r}",
        )
        _check(
            self.max_age_s is None or (is_number(self.max_age_s) and self.max_age_s > 0),
            f"max_age_s must be seconds above 0, or None for no limit, not {self.max_age_s!r}",
        )
        for name in ("initial_backoff_s", "max_backoff_s"):
            value = getattr(self, name)
            _check(is_number(value) and 0 < value < 1e6, f"{name} must be seconds above 0, not {value!r}")
        _check(
            self.initial_backoff_s <= self.max_backoff_s,
            f"initial_backoff_s={self.initial_backoff_s!r} is longer than max_backoff_s={self.max_backoff_s!r}",
        )
        _check(
            is_number(self.multiplier) and 1 <= self.multiplier < 1e6,
            f"multiplier must be 1 or more, not {self.multiplier!r}",
        )
        _check(is_number(self.jitter) and 0 <= self.jitter <= 1, f"jitter must be from 0 to 1, not {self.jitter!r}")

    def delay_s(self, failures: int, random: Callable[[], float]) -> float:
        """Seconds to wait after so many failures; `random` answers from 0 to 1."""
        try:
            longest = self.initial_backoff_s * float(self.multiplier) ** (failures - 1)
        except OverflowError:  # some 1,000 doublings
            longest = self.max_backoff_s
        return float(min(longest, self.max_backoff_s) * (1 - self.jitter * random()))


def _check(right: bool, text: str) -> None:
    if not right:
        raise ConfigError(text)
