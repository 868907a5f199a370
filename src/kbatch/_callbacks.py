"""The threads on which user callbacks run, so that a slow one delays callbacks and nothing else."""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from kbatch._errors import type_name

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CallbackThread", "is_coroutine_function"]

_logger = logging.getLogger("kbatch")


def is_coroutine_function(function: object) -> bool:
    """Whether a call of it has to be awaited."""
    call = getattr(function, "__call__", None)  # noqa: B004
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


class CallbackThread:
    """Runs what it is given, in order, one at a time, on a thread that starts when there is something to run."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._thread: threading.Thread | None = None  # None: the next put starts one
        self._stopping = False
        # Re-entrant: a signal handler or a finalizer may come here from within.
        self._changed = threading.Condition(threading.RLock())

    def put(self, function: Callable[..., object], *arguments: object) -> None:
        """Runs ``function(*arguments)`` soon; an exception from it is logged."""
        with self._changed:
            self._jobs.append((function, arguments))
            self._changed.notify()
            if self._thread is not None:
                return
            self._thread = thread = threading.Thread(target=self._run, args=(False,), name=self._name, daemon=True)
            try:
                thread.start()
                return
            except RuntimeError:  # no thread to be had, or (3.12 on) the interpreter is ending
                pass
            except BaseException:
                self._thread = None  # if it begins all the same, it ends at once
                raise
        self._run(True)

    def is_current(self) -> bool:
        """Whether it is this thread that asks."""
        return self._thread is threading.current_thread()

    def stop(self) -> None:
        """Ends the thread once all that was put has run; a later `put` starts another, which ends in the same way."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def join(self, timeout: float | None) -> None:
        """As `stop`, and waits for the end, unless called on the thread itself."""
        self.stop()
        thread = self._thread
        if thread is not None and thread.ident is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _run(self, inline: bool) -> None:
        while True:
            with self._changed:
                if not inline and self._thread is not threading.current_thread():
                    return
                while not self._jobs and not self._stopping and not inline:
                    self._changed.wait()
                if not self._jobs:
                    self._thread = None
                    return
                function, arguments = self._jobs.popleft()
            try:
                function(*arguments)
            except BaseException:
                # Its name, not its repr: that of a functools.partial shows the arguments. And a logging filter that
                # raises must not end the thread.
                with contextlib.suppress(BaseException):
                    _logger.exception("a callback failed: %s", _name(function))
            del function, arguments


def _name(function: object) -> str:
    try:
        return str(function.__qualname__)  # type: ignore[attr-defined]
    except BaseException:  # it has none, or its class is the user's
        return type_name(function)
