"""From other threads to an event loop."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LoopWaker", "call_on_loop", "in_thread"]

_T = TypeVar("_T")


class LoopWaker:
    """Resolves a future of the running event loop when it is called, from whatever thread."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = self.loop.create_future()

    def __call__(self) -> None:
        call_on_loop(self.loop, self.resolve)

    def resolve(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


def call_on_loop(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> bool:
    """Has `loop` call the function soon; false if it is closed and so never will."""
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:
        if not loop.is_closed():
            raise
        return False
    return True


async def in_thread(function: Callable[[], _T]) -> _T:
    """Runs something that blocks and awaits its end. If it is cancelled, the thread goes on.

    The thread is a daemon: unlike an executor's, it keeps neither the loop nor the interpreter from ending.
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

    threading.Thread(target=run, name=f"kbatch-{function.__name__}", daemon=True).start()
    await waker.future
    if errors:
        raise errors[0]
    return answers[0]
