"""For what happens on another thread."""

import time
from collections.abc import Callable


def until(condition: Callable[[], object], what: str, patience_s: float = 30.0) -> None:
    """Waits for something that comes by itself; fails after a time that only a hang reaches."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.005)
