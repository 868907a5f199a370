"""What blocks, awaited on an event loop."""

from __future__ import annotations

import contextlib
import contextvars
import queue
import threading
from typing import TYPE_CHECKING, TypeVar

from kbatch._fastmap import Flag, LoopWaker

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["StepThread", "in_thread"]

_T = TypeVar("_T")
_LOOK_AT_LOOP_S = 0.1


async def in_thread(name: str, function: Callable[[], _T], *, begin: Callable[[], object] | None = None) -> _T:
    """Runs something that blocks and awaits its end. If it is cancelled, the thread goes on.

    The thread is a daemon: unlike an executor's, it keeps neither the loop nor the interpreter from ending. It has the
    caller's context, so it comes from the same calls.

    Before it, `begin` is called on the loop once the tasks that were made before this call have had their first step:
    what ``create_task(producer.send_batch(…))`` has sent counts as sent. A loop that does not run any more calls
    nothing, so the thread calls `begin` itself, which must bear two calls.
    """
    waker = LoopWaker()
    answers: list[_T] = []
    errors: list[BaseException] = []
    begun = Flag()

    def begin_on_loop() -> None:
        assert begin is not None
        try:
            begin()
        finally:
            begun.set()

    def run() -> None:
        try:
            while begin is not None and not begun.wait(_LOOK_AT_LOOP_S, interruptible=False):
                if not waker.loop.is_running():
                    begin()
                    break
            answers.append(function())
        except BaseException as error:
            errors.append(error)
        waker()

    if begin is not None:
        waker.loop.call_soon(begin_on_loop)
    threading.Thread(target=contextvars.copy_context().run, args=(run,), name=name, daemon=True).start()
    await waker.future
    if errors:
        raise errors.pop()  # this frame is in its traceback
    return answers[0]


class StepThread:
    """A daemon thread that does one thing after the other. Unlike an executor's it goes on when the main thread has
    ended. It ends when nobody holds this object any more."""

    def __init__(self, name: str) -> None:
        self._steps: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        threading.Thread(target=_do, args=(self._steps,), name=name, daemon=True).start()

    def put(self, step: Callable[[], object]) -> None:
        """Has it done after all that came before. Nobody hears what it raises."""
        self._steps.put(step)

    async def run(self, function: Callable[[], _T]) -> _T:
        """The same, and awaits its end. What is cancelled is done nevertheless."""
        waker = LoopWaker()
        answers: list[_T] = []
        errors: list[BaseException] = []

        def step() -> None:
            try:
                answers.append(function())
            except BaseException as error:
                errors.append(error)
            waker()

        self._steps.put(step)
        await waker.future
        if errors:
            raise errors.pop()  # this frame is in its traceback
        return answers[0]

    def end(self) -> None:
        """The thread ends after what was put. For any thread, and a finalizer."""
        self._steps.put(None)

    __del__ = end


def _do(steps: queue.SimpleQueue[Callable[[], object] | None]) -> None:
    while (step := steps.get()) is not None:
        with contextlib.suppress(BaseException):
            step()
        del step  # what it holds is not kept until the next one comes
