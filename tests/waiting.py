"""For what happens on another thread or in another process."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import psutil  # type: ignore[import-untyped]


def until(condition: Callable[[], object], what: str, patience_s: float = 90.0) -> None:
    """Waits for something that comes by itself; fails after a time that only a hang reaches."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.005)


@contextlib.contextmanager
def later(seconds: float, function: Callable[[], object]) -> Iterator[None]:
    """Calls a function on another thread after so many seconds, unless the block has ended by then."""
    timer = threading.Timer(seconds, function)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def stop(pid: int) -> None:
    """SIGSTOP; returns once the process stands still: until then another of its threads may go on."""
    process = psutil.Process(pid)
    process.suspend()
    until(lambda: process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE), "the process stands still")
