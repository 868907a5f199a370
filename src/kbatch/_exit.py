"""What the end of the interpreter closes, so that what is under way is sent: senders first, then producers."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kbatch._fastmap import Core

__all__ = ["CORES", "SENDERS", "watch_multiprocessing_child"]

_TIMEOUT_S = 5.0  # for all of them: what is in flight goes on while another is closed


class _Sender(Protocol):
    def _close(self, timeout: float) -> int: ...
    def _flush(self, timeout: float) -> int: ...


SENDERS: weakref.WeakSet[_Sender] = weakref.WeakSet()
# Cores, not producers: a batch in flight keeps its core alive when its producer is forgotten.
CORES: weakref.WeakSet[Core] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    end = time.monotonic() + _TIMEOUT_S
    for sender in list(SENDERS):
        with contextlib.suppress(Exception):  # the interpreter is ending; there is nobody to tell
            sender._close(max(0.0, end - time.monotonic()))
    for core in list(CORES):
        with contextlib.suppress(Exception):
            core.close(max(0.0, end - time.monotonic()))


def _end_multiprocessing_child() -> None:
    # It comes before threads that are no daemons have ended, and what these send is to be taken.
    others = (thread for thread in threading.enumerate() if thread is not threading.main_thread())
    if all(thread.daemon for thread in others):
        _close_all()
        return
    end = time.monotonic() + _TIMEOUT_S
    for sender in list(SENDERS):
        with contextlib.suppress(Exception):
            sender._flush(max(0.0, end - time.monotonic()))
    for core in list(CORES):
        with contextlib.suppress(Exception):
            core.flush(max(0.0, end - time.monotonic()))


_finalized_pid = 0


def watch_multiprocessing_child() -> None:
    """multiprocessing may end its children without atexit functions, but runs the finalizers that were made there."""
    global _finalized_pid
    process = sys.modules.get("multiprocessing.process")
    if process is None or process.parent_process() is None or _finalized_pid == os.getpid():
        return
    from multiprocessing import util

    util.Finalize(None, _end_multiprocessing_child, exitpriority=0)
    _finalized_pid = os.getpid()
