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
        self._running = False
        self._lock = threading.Lock()

    def put(self, function: Callable[..., object], *arguments: object) -> None:
        """Runs ``function(*arguments)`` soon; an exception from it is logged."""
        with self._lock:
            self._queue.put((function, arguments))
            if not self._running:
                self._running = True
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """Ends the thread once all that was put has run; a later `put` starts it again."""
        with self._lock:
            if self._running:
                self._running = False
                self._queue.put(None)

    def join(self, timeout: float | None) -> None:
        """As `stop`, and waits for the end, unless called on the thread itself."""
        self.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            function, arguments = job
            try:
                function(*arguments)
            except Exception:
                _logger.exception("a callback failed: %r", function)
            del job, function, arguments  # what it was called with must not live until the next one
