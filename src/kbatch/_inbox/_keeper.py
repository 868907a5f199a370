"""Tells an inbox how far a group has committed, and has it purge, while a listener runs."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kbatch._errors import named_exception_text
from kbatch._fastmap import Flag, monotonic
from kbatch._logs import tell

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kbatch._inbox._base import ListenerInbox, Partition

__all__ = ["Keeper"]

_FIRST_NOTE_S = 5.0  # a listener may run for some seconds only, each time
_NOTE_EVERY_S = 60.0
_PURGE_EVERY_S = 3600.0
# A clock that is set back by more shows in the next note. What is handled until then bears a time before the mark's.
_MARGIN_US = 120_000_000


class Keeper:
    """A thread of a listener, which waits for nothing that the keeper does. What fails is logged, and done again.

    Args:
        offsets: Of the listener's partitions, what the group has committed and where the log ends, as brokers tell
            it when it is called.
    """

    def __init__(
        self, inbox: ListenerInbox, group: str, offsets: Callable[[], Mapping[Partition, tuple[int, int]]]
    ) -> None:
        self._inbox = inbox
        self._group = group
        self._offsets = offsets
        self._flag = Flag()
        self._is_over = False

    def start(self) -> None:
        """Begins. Nothing is purged at the start."""
        threading.Thread(target=self._run, name="kbatch-inbox", daemon=True).start()

    def stop(self) -> None:
        """Has it end, and does not wait for it."""
        self._is_over = True
        self._flag.set()

    def _run(self) -> None:
        next_purge = monotonic() + _PURGE_EVERY_S
        wait_s = min(_FIRST_NOTE_S, _NOTE_EVERY_S)
        while not self._is_over:
            self._flag.wait(wait_s, interruptible=False)
            wait_s = _NOTE_EVERY_S
            if self._is_over:
                return
            try:
                self.note()
                if monotonic() >= next_purge:
                    next_purge = monotonic() + _PURGE_EVERY_S
                    if self._inbox.retention_s is not None:
                        self._inbox.purge_old()
            except Exception as error:
                if not self._is_over:
                    tell(
                        "%r could not be looked after, and is again soon: %s", self._inbox, named_exception_text(error)
                    )

    def note(self) -> None:
        """Tells it once."""
        asked_at = self._inbox.clock_us() - _MARGIN_US  # before the ends are asked for
        offsets = self._offsets()
        if offsets:
            self._inbox.note_offsets(self._group, asked_at, offsets)
