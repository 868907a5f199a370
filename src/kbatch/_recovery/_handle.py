"""A producer that several senders share, and that is replaced for all of them when it cannot go on."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from typing import TYPE_CHECKING, Literal

from kbatch._errors import ForkError, ProducerClosedError, can_be_replaced

if TYPE_CHECKING:
    from collections.abc import Hashable

    from kbatch._base_producer import BaseProducer
    from kbatch._fastmap import Undelivered

__all__ = ["ProducerHandle", "ProducerUse"]

_logger = logging.getLogger("kbatch")

# Of every handle and both tables, for a few instructions at a time. A fork waits for it, so that a child finds them
# whole and the lock free. Re-entrant: a signal handler may fork, and a finalizer may release.
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)

# By the id of a producer, which a handle keeps alive; and of those made of settings, by these.
_handles: weakref.WeakValueDictionary[int, ProducerHandle] = weakref.WeakValueDictionary()
_shared: weakref.WeakValueDictionary[Hashable, ProducerHandle] = weakref.WeakValueDictionary()


class ProducerHandle:
    """A producer that senders share; when it is in its fatal state one of them has it replaced, for all of them.

    Attributes:
        producer: The current one. It may change between two looks at it.
    """

    __slots__ = ("__weakref__", "_closing", "_given", "_key", "_over", "_solo", "_users", "producer")

    def __init__(self, producer: BaseProducer, *, given: bool, key: Hashable = None) -> None:
        self.producer = producer
        self._given = producer if given else None  # the caller's, who closes it
        self._key = key
        self._users: set[object] = set()
        self._solo: BaseProducer | None = None  # ours
        self._closing: list[BaseProducer] = []  # ours: without a user, and not closed to the end yet
        self._over: BaseProducer | None = None  # ours: the last one, closed
        _handles[id(producer)] = self

    @classmethod
    def of(cls, producer: BaseProducer) -> ProducerHandle:
        """The handle of a producer: the same one while somebody keeps it.

        A producer that no handle has made is, and stays, the caller's.
        """
        with _lock:
            handle = _handles.get(id(producer))
            # An id may have belonged to another, which was replaced.
            if handle is not None and (handle.producer is producer or handle._given is producer):
                return handle
            return cls(producer, given=True)

    @classmethod
    def shared(cls, key: Hashable, prototype: BaseProducer) -> ProducerUse:
        """A use of the producer of these settings in this process. It is closed with its last user.

        Args:
            key: The same where the settings are. It must hold no secret.
            prototype: A producer with these settings, of which a new one is made if there is none. Never used itself.
        """
        with _lock:
            handle = _shared.get(key)
            if handle is None or not _is_usable(handle.producer):
                handle = _shared[key] = cls(prototype._twin(), given=False, key=key)
            return ProducerUse(handle)

    def acquire(self) -> ProducerUse:
        """One more user, until the use is released or forgotten."""
        return ProducerUse(self)

    def _release(self, user: object, timeout: float | None) -> int:
        # Interrupted at any line it may be called again, and goes on: what is to be closed is kept until it is.
        with _lock:
            self._users.discard(user)
            if not self._users:
                for each in (self._solo, self.producer):
                    if each is not None and each not in (self._given, self._over, *self._closing):
                        self._closing.append(each)
                self._solo = None
                if self._given is not None:
                    self.producer = self._given  # who comes later begins with it, as the first one did
                elif _shared.get(self._key) is self:
                    del _shared[self._key]
            closing = () if self._users else tuple(self._closing)
        left = 0
        for producer in closing:
            left += _close(producer, timeout)
            with _lock:
                self._over = producer
                if producer in self._closing:
                    self._closing.remove(producer)
        return left

    def undelivered(self) -> Undelivered | None:
        """What producers that their last user has closed gave up; ``None`` of those that others use, or the caller."""
        with _lock:
            return None if self._users or self._given is not None else self.producer._core.undelivered

    def solo(self) -> BaseProducer | None:
        """A producer with the same settings whose record batches have one record each; ``None`` if there is none.

        There is none with a ``transactional.id``, which two producers cannot share, and where no user is left. It is
        made when it is needed first, and closed with the last user.
        """
        with _lock:
            if not self._users or self.producer._transactions is not None:
                return None
            if self._solo is None:
                self._solo = self.producer._twin(solo=True)
            return self._solo

    def drop_solo(self, dead: BaseProducer) -> None:
        """Has the next call of `solo` make another one, if this one can send no more."""
        with _lock:
            if self._solo is not dead:
                return
            self._solo = None
        _close(dead, 0.0)

    def fate(self, producer: BaseProducer, error: BaseException) -> Literal["replace", "successor", "end"]:
        """What becomes of a batch that `producer` refused with `error`, so that nothing of it was sent.

        "replace": `replace` makes the producer that may send it; "successor": there is one, which another sender had
        made; "end": no producer will send it.
        """
        if can_be_replaced(error):
            return "replace"
        # Closed with another in its place: one of the senders that share it has had it replaced.
        replaced = self.producer is not producer and isinstance(error, ProducerClosedError)
        return "successor" if replaced else "end"

    def replace(self, dead: BaseProducer, *, transactional_id: str | None = None) -> None:
        """Has a producer in its fatal state replaced by a new one with the same settings, unless it was already.

        What is in flight of a producer that senders share is given up, so its batches should have settled. Not for one
        that was fenced by another, which the new one would fence in turn, unless it gets another ``transactional.id``.
        """
        with _lock:
            if self.producer is not dead or not self._users:
                return
            self._put(dead._twin(transactional_id=transactional_id))
        with contextlib.suppress(Exception):  # whatever a handler of logs does
            _logger.warning("a new producer takes the place of one that can send no more: %r", dead)
        if dead is not self._given:
            _close(dead, 0.0)

    def name(self, transactional_id: str) -> None:
        """Gives its producer, by which nothing was sent in this process, another ``transactional.id``."""
        with _lock:
            unused = self.producer
            self._put(unused._twin(transactional_id=transactional_id))
        if _is_usable(unused):
            _close(unused, 0.0)

    def _put(self, producer: BaseProducer) -> None:
        self.producer = producer
        _handles[id(producer)] = self

    def __repr__(self) -> str:
        return f"<ProducerHandle of {self.producer!r}, users: {len(self._users)}>"


class ProducerUse:
    """A user's hold on a handle, until it is released. One that is forgotten ends too, without waiting: a producer of
    ours then ends when nothing holds it any more."""

    __slots__ = ("_user", "handle")

    def __init__(self, handle: ProducerHandle) -> None:
        self._user = object()
        self.handle = handle
        with _lock:
            handle._users.add(self._user)

    def release(self, timeout: float | None) -> int:
        """One user less. The last one closes the producer, unless it is the caller's. Called again it does nothing, or
        what is left to do if it was interrupted.

        Args:
            timeout: Seconds; ``None`` is the producer's ``close_timeout_s``.

        Returns:
            How many messages ended without an acknowledgement since closing began; 0 if nothing is closed.
        """
        return self.handle._release(self._user, timeout)

    def __del__(self) -> None:
        if not hasattr(self, "handle"):
            return  # the constructor has raised
        handle = self.handle
        with _lock:
            handle._users.discard(self._user)
            if not handle._users and handle._given is None and _shared.get(handle._key) is handle:
                del _shared[handle._key]


def _is_usable(producer: BaseProducer) -> bool:
    try:
        producer.stats()
    except ForkError:
        return False  # what the parent has started is not this process's
    return not producer.closed


def _close(producer: BaseProducer, timeout: float | None) -> int:
    # The core, so that it is the same for producers of event loops.
    return producer._core.close(producer._close_timeout if timeout is None else timeout)
