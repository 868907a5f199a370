"""What the DURABLE senders of one outbox have in common in a process."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kbatch._errors import ConfigError, ForkError, named_exception_text
from kbatch._fastmap import Flag, monotonic
from kbatch._logs import Reminder, tell
from kbatch._outbox._group import GroupCommit
from kbatch._outbox._relay import Relay
from kbatch._recovery._handle import ProducerHandle

if TYPE_CHECKING:
    from collections.abc import Hashable

    from kbatch._options import RelayOptions
    from kbatch._outbox._store import DurableOutbox
    from kbatch._producer import Producer


__all__ = ["OutboxUse", "RelayPlan"]

_BEGIN_AGAIN_S = 1.0
_FOR_FLIGHTS_S = 2.0  # of the time of a close: what is in flight has its answer, and is not sent twice
_LAST_WORDS_S = 3.0  # of a relay, after the time for what is in flight

# Of the table and the users, for a few instructions at a time. A fork waits for it. Re-entrant: a signal handler may
# fork, and a finalizer may release.
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)

_shared: weakref.WeakValueDictionary[int, SharedOutbox] = weakref.WeakValueDictionary()  # by an outbox's id


@dataclass(frozen=True)
class RelayPlan:
    """What a relay of DURABLE senders is made of.

    Attributes:
        prototype: A producer as its own are, checked with the options. Never used itself.
        options: Of the relay.
        key: The same where the producer's settings and the options are.
    """

    prototype: Producer
    options: RelayOptions
    key: Hashable


class OwnRelay:
    """A relay in a thread of its own, which begins again when it fails.

    Attributes:
        plan: What it is made of.
        close_timeout_s: Seconds that its end waits for what is in flight.
    """

    def __init__(self, outbox: DurableOutbox, plan: RelayPlan) -> None:
        self._outbox = outbox
        self.plan = plan
        self._flag = Flag()
        self._starting = threading.RLock()
        self._thread: threading.Thread | None = None
        self._relay: Relay | None = None
        self._is_finishing = self._is_stopping = False
        self.close_timeout_s = 30.0

    def start(self) -> None:
        """Has it run, if it does not."""
        if self._has_thread() or self._is_stopping:
            return
        with self._starting:
            if self._has_thread():
                return
            thread = threading.Thread(target=self._run, name="kbatch-relay", daemon=True)
            self._thread = thread
            try:
                thread.start()
            except BaseException:
                if thread.ident is None and self._thread is thread:
                    self._thread = None
                raise

    def finish(self) -> None:
        """Has it end once it has sent what is to be sent now, or cannot."""
        self._is_finishing = True
        relay = self._relay
        if relay is not None:
            relay._finish()

    def stop(self, close_timeout_s: float) -> None:
        """Has it end, with so many seconds for what is in flight."""
        self.close_timeout_s = close_timeout_s
        self._is_stopping = True
        relay = self._relay
        if relay is not None:
            relay.stop(close_timeout_s)
        self._flag.set()

    def wait(self, end: float) -> None:
        """Waits for its end."""
        thread = self._thread
        if thread is not None and thread.ident is not None and thread is not threading.current_thread():
            thread.join(max(0.0, end - monotonic()))

    def _has_thread(self) -> bool:
        # One that has died before its end was wanted is replaced.
        thread = self._thread
        return thread is not None and (thread.is_alive() or self._is_finishing or self._is_stopping)

    def _run(self) -> None:
        trouble = Reminder()
        while self._thread is threading.current_thread() and not self._is_stopping:
            relay: Relay | None = None
            try:
                use: Any = ProducerHandle(self.plan.prototype._twin(), given=False).acquire()
                relay = Relay(self._outbox, use, close_timeout_s=self.close_timeout_s, **vars(self.plan.options))
                self._relay = relay
                if self._is_finishing:
                    relay._finish()
                if not self._is_stopping:
                    relay.run()
                if self._is_finishing:
                    return
            except Exception as error:
                if trouble.tells_now(monotonic()):
                    tell("the relay of DURABLE senders has failed, and begins again: %s", named_exception_text(error))
                if self._is_finishing:
                    return
                if not self._is_stopping:
                    self._flag.wait(_BEGIN_AGAIN_S, interruptible=False)
            finally:
                self._relay = None
                if relay is not None:
                    with contextlib.suppress(Exception):  # the next one is another
                        if not (self._is_finishing or self._is_stopping):
                            relay._gate.note_successor()
                        relay._close(0.0)
                        if relay._deaths is not None:
                            relay._await_calls()


class SharedOutbox:
    """An outbox with what its senders share: the thread that commits, and perhaps a relay. Both begin with the first
    envelope, and end with the last sender that uses them.

    Attributes:
        outbox: The outbox.
        group: What commits.
        relay: What forwards, unless others do.
        users, relays_users: The tokens of those that use it, and its relay.
    """

    def __init__(self, outbox: DurableOutbox) -> None:
        self.outbox = outbox
        self.group = GroupCommit(outbox)
        self.relay: OwnRelay | None = None
        self.users: set[object] = set()
        self.relays_users: set[object] = set()
        self._pid: int | None = None  # where it was started

    def is_forked(self) -> bool:
        """Whether its threads are another process's."""
        return self._pid is not None and self._pid != os.getpid()

    def start(self) -> None:
        """Before each use.

        Raises:
            ForkError: It was used before a fork.
        """
        if self._pid is None:
            self._pid = os.getpid()
        elif self._pid != os.getpid():
            raise ForkError(
                "this sender was used before the fork and its threads are not in this process; make a new one"
            )
        relay = self.relay
        if relay is not None:
            relay.start()


class OutboxUse:
    """What one sender has of a `SharedOutbox`, until `release`, or until it is forgotten.

    Args:
        plan: Of a relay of their own; ``None`` if others forward what is sent.

    Raises:
        ConfigError: The outbox has a relay with other settings.
    """

    def __init__(self, outbox: DurableOutbox, plan: RelayPlan | None = None) -> None:
        self._token = object()
        self._relay: OwnRelay | None = None  # that ends with this
        with _lock:
            shared = _shared.get(id(outbox))
            if shared is not None:
                shared.users.add(self._token)  # first: the finalizer of the last other one would end it
            if shared is None or shared.is_forked() or _shared.get(id(outbox)) is not shared:
                shared = SharedOutbox(outbox)
                shared.users.add(self._token)
            if plan is not None:
                if shared.relay is None:
                    shared.relay = OwnRelay(outbox, plan)
                elif shared.relay.plan.key != plan.key:
                    shared.users.discard(self._token)
                    raise ConfigError(
                        f"config= or relay= differs from that of another sender of {outbox!r}: one relay sends what is "
                        "in an outbox, whatever its topic; give both the same config= and relay=, or run a "
                        "kbatch.Relay and leave them out"
                    )
                shared.relays_users.add(self._token)
            _shared[id(outbox)] = shared
            self.shared = shared

    def release(self, end: float | None) -> None:
        """Ends what nobody uses any more. Interrupted, it may be called again.

        Args:
            end: Until when that is waited for; ``None`` does not wait.
        """
        shared = self.shared
        if shared.is_forked():
            return  # all of it is the parent's
        with _lock:
            shared.users.discard(self._token)
            shared.relays_users.discard(self._token)
            if not shared.relays_users and shared.relay is not None:
                self._relay, shared.relay = shared.relay, None
            is_last = not shared.users
            if is_last and _shared.get(id(shared.outbox)) is shared:
                del _shared[id(shared.outbox)]
        relay = self._relay
        if is_last:
            shared.group.end()
        if relay is not None and end is None:
            relay.stop(relay.close_timeout_s)
        elif relay is not None and end is not None:
            relay.finish()
            relay.wait(end - min(_FOR_FLIGHTS_S, max(0.0, end - monotonic()) / 2))
            relay.stop(max(0.0, end - monotonic()))
            relay.wait(end + _LAST_WORDS_S)
        if is_last and end is not None:
            shared.group.wait(end)

    def finish(self, end: float) -> None:
        """Has the relay end, whoever uses it, once it has sent what is to be sent now. Waits for that until `end`."""
        relay = self.shared.relay
        if relay is not None:
            relay.finish()
            relay.wait(end)

    def __del__(self) -> None:
        if hasattr(self, "shared"):  # else the constructor has raised
            self.release(None)
