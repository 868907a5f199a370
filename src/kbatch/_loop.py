"""From other threads to an event loop."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, TypeVar

from kbatch._fastmap import Arrivals

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LoopWaker", "Turn", "Turns", "call_on_loop", "in_thread"]

_T = TypeVar("_T")


_arrivals: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Arrivals] = weakref.WeakKeyDictionary()


def _begin_arrivals(loop: asyncio.AbstractEventLoop) -> Arrivals:
    for reference in _arrivals.keyrefs():
        other = reference()
        left = None if other is None or not other.is_closed() else _arrivals.get(other)
        if left is not None:
            left.wakers.clear()  # they would keep their loop from being forgotten
    arrivals = _arrivals[loop] = Arrivals()
    return arrivals


class LoopWaker:
    """Resolves a future of the running event loop when it is called, from whatever thread."""

    __slots__ = ("_arrivals", "future", "loop")

    def __init__(self) -> None:
        self.loop = loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = loop.create_future()
        self._arrivals = arrivals = _arrivals.get(loop) or _begin_arrivals(loop)
        if arrivals.is_woken:
            arrivals.resolve()  # what was to do it may have been lost by Ctrl-C

    def __call__(self) -> None:
        arrivals = self._arrivals
        arrivals.wakers.append(self)
        if not arrivals.is_woken:
            arrivals.is_woken = True
            try:
                if not call_on_loop(self.loop, arrivals.resolve):
                    arrivals.wakers.clear()
            except BaseException:  # no memory, Ctrl-C
                arrivals.is_woken = False
                raise

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


async def in_thread(name: str, function: Callable[[], _T]) -> _T:
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

    threading.Thread(target=run, name=name, daemon=True).start()
    await waker.future
    if errors:
        raise errors[0]
    return answers[0]


class Turns:
    """First come, first served among the coroutines of each loop, whatever they do before their turn."""

    def __init__(self) -> None:
        self._lines: dict[asyncio.AbstractEventLoop, deque[Turn]] = {}

    def are_taken(self) -> bool:
        """Whether somebody stands in the line of the running loop."""
        self.forget_closed_loops()
        return bool(self._lines) and asyncio.get_running_loop() in self._lines

    def join(self) -> Turn:
        """A place at the end of the running loop's line. It must be left."""
        self.forget_closed_loops()
        return Turn(self._lines)

    def forget_closed_loops(self) -> None:
        """Lets go of loops that were closed while somebody stood in their line."""
        if self._lines:
            for loop in list(self._lines):
                if loop.is_closed():  # whatever stands in its line will not come any more
                    self._lines.pop(loop, None)


class Turn:
    """A place in a line. A `with` block is the turn itself, and leaves at its end."""

    def __init__(self, lines: dict[asyncio.AbstractEventLoop, deque[Turn]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._lines = lines
        self._line = lines.setdefault(self._loop, deque())
        self._line.append(self)
        self._called: asyncio.Future[None] | None = None

    async def come(self) -> None:
        """Waits until all that joined before have left."""
        if self._line[0] is not self:
            self._called = self._loop.create_future()
            await self._called

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        self._line.remove(self)
        if not self._line:
            self._lines.pop(self._loop, None)
            return
        called = self._line[0]._called
        if called is not None and not called.done() and not self._loop.is_closed():
            called.set_result(None)
