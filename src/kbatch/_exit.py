"""What the end of the interpreter closes, so that what is under way is sent: senders first, then producers."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Protocol, TypeVar

from kbatch._fastmap import monotonic

if TYPE_CHECKING:
    from collections.abc import Callable

    from kbatch._fastmap import Core

__all__ = ["CORES", "SENDERS", "watch_multiprocessing_child"]

_TIMEOUT_S = 5.0  # for all of them: what is in flight goes on while another is closed
_LAST_WORDS_S = 1.0  # for the callbacks of all of them, after it


_T = TypeVar("_T")


class _Sender(Protocol):
    def _flush(self, timeout: float) -> int: ...
    def _drain(self, timeout: float) -> int: ...
    def _begin_end(self) -> None: ...
    def _await_end(self, end: float) -> int: ...


SENDERS: weakref.WeakSet[_Sender] = weakref.WeakSet()
# Cores, not producers: a batch in flight keeps its core alive when its producer is forgotten.
CORES: weakref.WeakSet[Core] = weakref.WeakSet()


def _listed(items: weakref.WeakSet[_T]) -> list[_T]:
    """Threads that still run may add to them meanwhile."""
    while True:
        try:
            return list(items)
        except RuntimeError:
            continue


def _each(items: list[_T], call: Callable[[_T], object]) -> None:
    for item in items:
        with contextlib.suppress(Exception):  # the interpreter is ending; there is nobody to tell
            call(item)


def _seconds_until(end: float) -> float:
    return max(0.0, end - monotonic())


@atexit.register
def _close_all() -> None:
    end = monotonic() + _TIMEOUT_S
    senders = _listed(SENDERS)
    try:
        _each(senders, lambda sender: sender._drain(0))  # all of them send at once
        _each(senders, lambda sender: sender._drain(_seconds_until(end)))
    except KeyboardInterrupt:  # a user who does not want to wait is told all the same what was not sent
        end = 0.0
    _each(senders, lambda sender: sender._begin_end())
    told = monotonic() + _LAST_WORDS_S
    _each(senders, lambda sender: sender._await_end(told))
    _each(_listed(CORES), lambda core: core.close(_seconds_until(end)))
    _each(_listed(CORES), lambda core: core.undelivered.log_all(reachable=True))


def _end_multiprocessing_child() -> None:
    # It comes before threads that are no daemons have ended, and what these send is to be taken.
    others = (thread for thread in threading.enumerate() if thread is not threading.main_thread())
    if all(thread.daemon for thread in others):
        _close_all()
        return
    end = monotonic() + _TIMEOUT_S
    senders = _listed(SENDERS)
    _each(senders, lambda sender: sender._flush(0))
    _each(senders, lambda sender: sender._flush(_seconds_until(end)))
    _each(_listed(CORES), lambda core: core.flush(_seconds_until(end)))
    _each(_listed(CORES), lambda core: core.undelivered.log_all())


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
