import contextlib
import os
import queue
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """Ctrl-C, SIGTERM and SIGHUP as a wish to stop, for the time of a ``with`` block.

    The first signal sets `signal_number`, which the work looks at between its steps. When `grace_s` have passed since,
    or at the second signal, `abort` is called, once, in a thread of its own: it must make every wait of the work end.
    Where it is None, nothing but the process can be lost, which then ends.
    """

    def __init__(self, abort: Callable[[], object] | None, grace_s: float) -> None:
        self.signal_number: int | None = None
        self.aborted = False
        self._abort = abort
        self._grace_s = grace_s
        self._previous: dict[int, Any] = {}
        # The handler does nothing else: it may come in the middle of anything, also of itself. None ends the thread,
        # which is there before a signal comes, when it may be too late for one.
        self._signals: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name="kbatch-interrupt", daemon=True)

    @property
    def requested(self) -> bool:
        return self.signal_number is not None

    @property
    def status(self) -> int:
        """The exit status by which shells know what ended a program: 130 after Ctrl-C."""
        return 128 + (self.signal_number or 0)

    def __enter__(self) -> "Interrupt":
        self._thread.start()
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
            numbers.append(signal.SIGHUP)
        for number in numbers:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._signals.put(None)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is None:
            self.signal_number = number
        self._signals.put(number)

    def _watch(self) -> None:
        if self._signals.get() is None:
            return
        with contextlib.suppress(queue.Empty):
            if self._signals.get(timeout=min(self._grace_s, threading.TIMEOUT_MAX)) is None:
                return
        self.aborted = True
        if self._abort is None:
            os._exit(self.status)
        self._abort()
