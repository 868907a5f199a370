"""The threads on which user callbacks run, so that a slow one delays callbacks and nothing else."""

from __future__ import annotations

import logging
import queue
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CallbackThread"]

_logger = logging.getLogger("kbatch")


class CallbackThread:
    """Runs what it is given, in order, one at a time, on a thread that starts when there is something to run."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[tuple[Callable[..., object], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def put(self, function: Callable[..., object], *arguments: object) -> None:
        """Runs ``function(*arguments)`` soon; an exception from it is logged."""
        self._queue.put((function, arguments))
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def join(self, timeout: float | None) -> None:
        """Ends the thread once all that was put has run, and waits for that, unless called on the thread itself."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is None:
            return
        self._queue.put(None)
        if thread is not threading.current_thread():
            thread.join(timeout)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            function, arguments = job
            try:
                function(*arguments)
            except Exception:
                _logger.exception("a callback failed: %r", function)
            del job, function, arguments  # what it was called with must not live until the next one
