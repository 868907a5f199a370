"""What blocks, awaited on an event loop."""

from __future__ import annotations

import contextvars
import threading
from typing import TYPE_CHECKING, TypeVar

from kbatch._fastmap import LoopWaker

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["in_thread"]

_T = TypeVar("_T")


async def in_thread(name: str, function: Callable[[], _T]) -> _T:
    """Runs something that blocks and awaits its end. If it is cancelled, the thread goes on.

    The thread is a daemon: unlike an executor's, it keeps neither the loop nor the interpreter from ending. It has the
    caller's context, so it comes from the same calls.
    """
    waker = LoopWaker()
    answers: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(function())
        except BaseException as error:
            errors.append(error)
        waker()

    threading.Thread(target=contextvars.copy_context().run, args=(run,), name=name, daemon=True).start()
    await waker.future
    if errors:
        raise errors.pop()  # this frame is in its traceback
    return answers[0]
