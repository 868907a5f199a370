"""Lines of the log, of threads that a handler of logs must not end."""

from __future__ import annotations

import contextlib
import logging

__all__ = ["Reminder", "tell", "tell_beside"]

_REMIND_EVERY_S = 60.0

_logger = logging.getLogger("kbatch")


def tell(text: str, *arguments: object, level: int = logging.WARNING, exc_info: BaseException | None = None) -> None:
    """Logs a warning, or what has another level. What a handler or a filter of logs raises is dropped."""
    with contextlib.suppress(Exception):
        _logger.log(level, text, *arguments, exc_info=exc_info, stacklevel=2)


def tell_beside(error: BaseException, text: str) -> None:
    """Says what nobody was told of at the end of a block that `error` ends: notes it with the error where exceptions
    have notes, and logs it."""
    text = f"nobody was told: {text}"
    with contextlib.suppress(Exception):  # it has no notes, or is frozen
        error.add_note(text)  # type: ignore[attr-defined,unused-ignore]
    tell("%s", text, level=logging.ERROR)


class Reminder:
    """When to tell of a trouble: at once, and then once a minute while it lasts.

    Attributes:
        told_at: When it was told of the last time; ``None`` if never, or since somebody has set that it is over.
    """

    def __init__(self) -> None:
        self.told_at: float | None = None

    def tells_now(self, now: float) -> bool:
        """Whether to tell of it at this time of a monotonic clock, which is to be done then."""
        if self.told_at is not None and now - self.told_at < _REMIND_EVERY_S:
            return False
        self.told_at = now
        return True
