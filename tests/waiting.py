"""For what happens on another thread."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator


def until(condition: Callable[[], object], what: str, patience_s: float = 30.0) -> None:
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
