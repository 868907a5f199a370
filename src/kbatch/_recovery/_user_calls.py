"""How a sender calls the functions of its users, and writes its log."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from kbatch._callbacks import refuse_coroutine
from kbatch._fastmap import CallQueue, comes_from
from kbatch._logs import tell
from kbatch._threads import CALLBACKS

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["UserCalls"]


class UserCalls:
    """The calls of one sender: in order, one at a time, on a thread that senders share."""

    def __init__(self) -> None:
        self._queue = CallQueue(CALLBACKS)

    def put(self, function: Callable[..., object], *arguments: object) -> None:
        """Has a function of ours called, which may `call` one of the user's. If this raises, it is not."""
        self._queue.put(function, *arguments)

    def put_surely(self, function: Callable[..., object], *arguments: object) -> None:
        """As `put`, for what must be told: without memory it tries again until there is some."""
        self._queue.put_surely(function, *arguments)

    def call(self, callback: Callable[..., object], *arguments: object) -> None:
        """Calls a user's callback, within what was put, and returns when it has ended."""
        refuse_coroutine(callback(*arguments))

    def are_of_caller(self) -> bool:
        """Whether the caller comes from one of these calls."""
        return comes_from(self._queue)

    def log(self, level: int, text: str, *arguments: object, exc_info: BaseException | None = None) -> None:
        """Logs within these calls: a handler may send by this very sender, and wait for room."""
        if not self.are_of_caller():
            with contextlib.suppress(Exception):  # no memory, no thread: a line of the log is no reason to end
                self.put(_log, level, text, arguments, exc_info)
            return
        with contextlib.suppress(BaseException):  # whatever a handler raises
            _log(level, text, arguments, exc_info)

    def stop(self) -> None:
        """Needs no thread any more once all that was put was called."""
        self._queue.stop()

    def join(self, timeout: float | None) -> None:
        """As `stop`, and waits for the end of the calls, unless the caller comes from one."""
        self._queue.join(timeout)


def _log(level: int, text: str, arguments: tuple[object, ...], exc_info: BaseException | None) -> None:
    tell(text, *arguments, level=level, exc_info=exc_info)
