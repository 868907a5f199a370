"""Lines of the log, of threads that a handler of logs must not end."""

from __future__ import annotations

import contextlib
import logging

__all__ = ["tell"]

_logger = logging.getLogger("kbatch")


def tell(text: str, *arguments: object, level: int = logging.WARNING, exc_info: BaseException | None = None) -> None:
    """Logs a warning, or what has another level. What a handler or a filter of logs raises is dropped."""
    with contextlib.suppress(Exception):
        _logger.log(level, text, *arguments, exc_info=exc_info, stacklevel=2)
