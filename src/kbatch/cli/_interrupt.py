import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """Ctrl-C, SIGTERM and SIGHUP as a wish to stop, for the time of a ``with`` block.

    The first signal sets `signal_number`, which the work looks at between its steps. When `grace_s` have passed since,
    or at the second signal, `abort` is called, once, in a thread of its own: it must make every wait of the work end.
    """

    def __init__(self, abort: Callable[[], object], grace_s: float) -> None:
        self.signal_number: int | None = None
        self.aborted = False
        self._abort = abort
        self._grace_s = grace_s
        self._timer: threading.Timer | None = None
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal_number is not None

    @property
    def status(self) -> int:
        """The exit status by which shells know what ended a program: 130 after Ctrl-C."""
        return 128 + (self.signal_number or 0)

    def __enter__(self) -> "Interrupt":
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
        if self._timer is not None:
            self._timer.cancel()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._timer is None:
            self.signal_number = number
            self._start_timer(self._grace_s)
        elif not self.aborted:
            self._timer.cancel()
            self._start_timer(0.0)

    def _start_timer(self, delay_s: float) -> None:
        self._timer = threading.Timer(delay_s, self._run_abort)
        self._timer.daemon = True
        self._timer.start()

    def _run_abort(self) -> None:
        self.aborted = True
        self._abort()
