"""What has become a dead letter, until `on_dead` is told of it."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

from kbatch._callbacks import callback_name
from kbatch._errors import OutboxError
from kbatch._fastmap import KEPT_BYTES, monotonic
from kbatch._logs import Reminder, tell
from kbatch._text import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kbatch._recovery._user_calls import UserCalls

__all__ = ["Deaths"]

_T = TypeVar("_T")

_MOST_WAITING = 10_000
_AT_ONCE = 50
_TRY_AGAIN_S = 1.0


class Deaths(Generic[_T]):
    """Calls of `on_dead`, one after the other, by the calls of a relay or a listener. Nobody waits for them, so what
    waits for its call has a bound: what comes beyond it is logged, and not told.

    Args:
        calls: For `on_dead`, and for the log.
        on_dead: The user's.
        look_up: Makes of some that have died how the log names each, and the arguments of `on_dead`. It may leave some
            out, and raise OutboxError: then it is asked again when `tell_again` is called.
        name: What has them, for the log.
        most_waiting: How many wait at most.
    """

    def __init__(
        self,
        calls: UserCalls,
        on_dead: Callable[..., object],
        look_up: Callable[[list[_T]], Iterable[tuple[str, tuple[object, ...]]]],
        name: str,
        most_waiting: int = _MOST_WAITING,
    ) -> None:
        self._calls = calls
        self._on_dead = on_dead
        self._look_up = look_up
        self._name = name
        self._most_waiting = most_waiting
        self._trouble = Reminder()  # they cannot be looked up
        self.forget()

    def forget(self) -> None:
        """Forgets all of it, in a child that was forked: its parent has it."""
        self._lock = threading.RLock()  # re-entrant: a signal handler may come from within
        self._waiting: deque[tuple[_T, int]] = deque()  # with its bytes
        self._found: deque[tuple[str, tuple[object, ...]]] = deque()  # that were looked up, and are told next
        self._bytes = self._dropped = 0
        self._is_put = False  # a call of `_tell` is to come
        self._again_at: float | None = None

    @property
    def left(self) -> int:
        """How many are not told yet."""
        return len(self._waiting) + len(self._found)

    def put(self, died: Iterable[_T], size: int = 0) -> None:
        """Has `on_dead` told soon. For any thread.

        Args:
            size: Bytes of each.
        """
        with self._lock:
            for each in died:
                if len(self._waiting) >= self._most_waiting or (self._bytes and self._bytes + size > KEPT_BYTES):
                    self._dropped += 1
                    continue
                self._waiting.append((each, size))
                self._bytes += size
        self._tell_soon()

    def tell_again(self) -> None:
        """Has it looked up once more if that has failed, and the time for it has come."""
        if self._again_at is not None and monotonic() >= self._again_at:
            self._tell_soon()

    def join(self, timeout: float | None) -> None:
        """Waits for the calls that are left, unless it is called by one. What is not told by then is logged."""
        self._tell_soon()
        self._calls.join(timeout)
        left = self.left + self._dropped
        if left and not self._calls.are_of_caller():
            tell("on_dead was not told yet of %s of %s", counted(left, "dead letter"), self._name)

    def _tell_soon(self) -> None:
        with self._lock:
            if self._is_put or not (self._waiting or self._dropped):
                return  # behind a call that hangs there is one more at most
            self._is_put = True
        self._calls.put_surely(self._tell)

    def _tell(self) -> None:
        self._is_put = False  # first: what comes from now on may have been looked for already
        self._again_at = None
        while True:
            while self._found:
                self._tell_one(*self._found[0])
                self._found.popleft()
            with self._lock:
                some = [each for each, _ in itertools.islice(self._waiting, _AT_ONCE)]
            if not some:
                break
            try:
                found = list(self._look_up(some))
            except OutboxError as error:
                self._put_off(error)
                return
            with self._lock:
                self._found.extend(found)
                for _ in some:
                    self._bytes -= self._waiting.popleft()[1]
            del some, found  # what a call is given is kept by that call
        with self._lock:
            dropped, self._dropped = self._dropped, 0
        if dropped:
            text = "on_dead is not told of %s of %s: too many have waited for slow calls of it"
            self._calls.log(logging.WARNING, text, counted(dropped, "dead letter"), self._name)

    def _tell_one(self, shown: str, arguments: tuple[object, ...]) -> None:
        try:
            self._calls.call(self._on_dead, *arguments)
        except BaseException as error:  # also a sys.exit(): the others are to be told
            with contextlib.suppress(BaseException):  # without memory for a line of the log
                name = callback_name(self._on_dead)
                self._calls.log(logging.ERROR, "on_dead failed: %s; of %s", name, shown, exc_info=error)

    def _put_off(self, error: OutboxError) -> None:
        self._again_at = monotonic() + _TRY_AGAIN_S
        if self._trouble.tells_now(monotonic()):
            text = "on_dead waits, since the dead letters of %s cannot be read: %s"
            self._calls.log(logging.WARNING, text, self._name, error)
