"""Looks whether topics have come that were not there when they were subscribed to."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kbatch._errors import ProducerClosedError
from kbatch._fastmap import Flag
from kbatch._receiving._consumer import ConsumerCallError

if TYPE_CHECKING:
    from kbatch._receiving._consumer import ConsumerCore

__all__ = ["MissingTopics"]

_LOOK_EVERY_S = 5.0
_ANSWER_S = 1.0  # the end of the consumer waits for a look


class MissingTopics:
    """librdkafka looks for them only each ``topic.metadata.refresh.interval.ms``, by default five minutes. To look more
    often for all topics would cost more, and to subscribe again while they are missing is a rebalance each time.

    Attributes:
        have_come: One is there now: who polls takes this back, and subscribes again.
    """

    def __init__(self, core: ConsumerCore) -> None:
        self._core = core
        self._flag = Flag()
        self._lock = threading.RLock()
        self._found: dict[str, bool] = {}  # of each that is missing: by the last look
        self._has_thread = False
        self._is_over = False
        self.have_come = False

    def add(self, topic: str) -> None:
        """Has it looked for from now on."""
        with self._lock:
            if topic in self._found or self._is_over:
                return
            self._found[topic] = False
            if self._has_thread:
                return
            self._has_thread = True
        try:
            threading.Thread(target=self._run, name="kbatch-topics", daemon=True).start()
        except RuntimeError:  # no thread to be had: librdkafka looks, later
            self._has_thread = False

    def stop(self) -> None:
        """Nobody waits for the thread."""
        self._is_over = True
        self._flag.set()

    def _run(self) -> None:
        while True:
            self._flag.wait(_LOOK_EVERY_S, interruptible=False)
            with self._lock:
                topics = [] if self._is_over else list(self._found)
                if not topics:
                    self._has_thread = False
                    return
            for topic in topics:
                try:
                    is_there = bool(self._core.partitions(topic, _ANSWER_S))
                except ConsumerCallError:
                    is_there = False
                except ProducerClosedError:
                    self._is_over = True
                    break
                with self._lock:
                    if is_there and self._found[topic]:  # twice: one broker may know it before the others do
                        del self._found[topic]
                        self.have_come = True
                    else:
                        self._found[topic] = is_there
