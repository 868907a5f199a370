"""The threads on which user callbacks run, so that a slow one delays callbacks and nothing else."""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from kbatch._errors import type_name
from kbatch._fastmap import Signal

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
        self._thread: threading.Thread | None = None  # one that has not begun counts for none
        self._stopping = False
        # Both are C: a `threading.Condition` stays locked if Ctrl-C comes within its own Python code. The lock is
        # re-entrant, since a signal handler or a finalizer may come here from within.
        self._lock = threading.RLock()
        self._changed = Signal()

    def put(self, function: Callable[..., object], *arguments: object) -> None:
        """Runs ``function(*arguments)`` soon; an exception from it is logged."""
        self._jobs.append((function, arguments))
        self._changed.set()
        with self._lock:
            has_thread = self._has_thread() or self._start()
        if not has_thread:
            self._run(True)

    def _has_thread(self) -> bool:
        return self._thread is not None and self._thread.ident is not None

    def _start(self) -> bool:
        self._thread = threading.Thread(target=self._run, args=(False,), name=self._name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no thread to be had, or (3.12 on) the interpreter is ending
            return False
        return True

    def is_current(self) -> bool:
        """Whether it is this thread that asks."""
        return self._thread is threading.current_thread()

    def stop(self) -> None:
        """Ends the thread once all that was put has run; a later `put` starts another, which ends in the same way."""
        self._stopping = True
        self._changed.set()

    def join(self, timeout: float | None) -> None:
        """As `stop`, and waits for the end, unless called on the thread itself."""
        self.stop()
        thread = self._thread
        if thread is not None and thread.ident is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _run(self, inline: bool) -> None:
        while True:
            with self._lock:
                is_wanted = inline or self._thread is threading.current_thread()  # else its start was interrupted
                job = self._jobs.popleft() if self._jobs and is_wanted else None
                if job is None and is_wanted and not inline and self._stopping:
                    self._thread, is_wanted = None, False
            if job is None:
                if inline or not is_wanted:
                    return
                self._changed.wait(interruptible=False)
                continue
            function, arguments = job
            try:
                function(*arguments)
            except BaseException:
                # Its name, not its repr: that of a functools.partial shows the arguments. And a logging filter that
                # raises must not end the thread.
                with contextlib.suppress(BaseException):
                    _logger.exception("a callback failed: %s", _name(function))
            del job, function, arguments


def _name(function: object) -> str:
    try:
        return str(function.__qualname__)  # type: ignore[attr-defined]
    except BaseException:  # it has none, or its class is the user's
        return type_name(function)
