"""What brings an outbox to Kafka, run from an event loop."""

from __future__ import annotations

import contextvars
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from kbatch._fastmap import LoopWaker, running_loop
from kbatch._loop import in_thread
from kbatch._options import AioRelayOptions, shows, taken
from kbatch._outbox import _relay
from kbatch.aio._batched import LoopCalls

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from typing_extensions import Self, Unpack

    from kbatch._errors import KbatchError
    from kbatch._options import RelayKeywords
    from kbatch._outbox._store import RelayOutbox
    from kbatch._producer import Producer
    from kbatch._recovery._circuit import CircuitState

__all__ = ["Relay"]

_T = TypeVar("_T")


class _LoopRelay(_relay.Relay):
    """Its callback is called on an event loop."""

    _calls_class = LoopCalls
    _options_class = AioRelayOptions
    _calls: LoopCalls


class Relay:
    """Brings the records of an outbox to Kafka, and deletes those that were acknowledged.

    As `kbatch.Relay`, in a thread that kbatch starts for each `run` and `drain`.

    Args:
        outbox, producer, retry, batch_size, max_in_flight_batches, strict_order, lease_s, fencing, failures_to_open,
            probe_interval_s, max_probe_interval_s, close_timeout_s: As for `kbatch.Relay`. A producer is a
            `kbatch.Producer`.
        on_state_change, on_dead: As for `kbatch.Relay`; they may be coroutine functions. They are called on the event
            loop on which `run` or `drain` was awaited first.
    """

    @shows(AioRelayOptions)
    def __init__(
        self,
        outbox: RelayOutbox,
        producer: Mapping[str, Any] | Producer,
        *,
        close_timeout_s: float = 30.0,
        **keywords: Unpack[RelayKeywords],
    ) -> None:
        taken(self, keywords, AioRelayOptions)
        self._relay = _LoopRelay(outbox, producer, close_timeout_s=close_timeout_s, **keywords)

    def __repr__(self) -> str:
        return repr(self._relay).replace("kbatch.Relay", "kbatch.aio.Relay", 1)

    @property
    def state(self) -> CircuitState:
        """As `kbatch.Relay.state`."""
        return self._relay.state

    @property
    def last_error(self) -> KbatchError | None:
        """As `kbatch.Relay.last_error`."""
        return self._relay.last_error

    async def run(self) -> None:
        """As `kbatch.Relay.run`, until `stop`. If the task is cancelled, it ends as after `stop`: it waits for what is
        in flight, and gives its buckets back. Cancelled once more, it ends at once, and the thread does the rest.

        Raises:
            OutboxError, SenderClosedError, ConfigError, RuntimeError: As `kbatch.Relay.run`.
        """
        await self._in_thread(lambda given_up: self._relay._run(until_empty=False, end=None, given_up=given_up))

    async def drain(self, timeout: float | None = None) -> int:
        """As `kbatch.Relay.drain`. If the task is cancelled, it ends as `run` does, unless `run` goes on beside it.

        Raises:
            OutboxError, SenderClosedError, ConfigError, RuntimeError: As `kbatch.Relay.drain`.
        """
        return await self._in_thread(lambda given_up: self._relay._drain(timeout, given_up))

    def stop(self, timeout: float | None = None) -> None:
        """As `kbatch.Relay.stop`; also for ``loop.add_signal_handler``."""
        self._relay.stop(timeout)

    def stats(self) -> dict[str, int]:
        """As `kbatch.Relay.stats`."""
        return self._relay.stats()

    async def close(self) -> None:
        """As `kbatch.Relay.close`. If the task is cancelled, closing goes on without it."""
        await in_thread("kbatch-close", self._relay.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _in_thread(self, function: Callable[[Callable[[], bool]], _T]) -> _T:
        """Calls it in a thread; cancelled, it tells `function` that it is given up, and waits for its end."""
        if self._relay._calls.loop is None:
            self._relay._calls.loop = running_loop()
        cancelled: list[bool] = []
        answers: list[_T] = []
        errors: list[BaseException] = []
        ended = LoopWaker()
        waits = [ended]

        def run() -> None:
            try:
                answers.append(function(lambda: bool(cancelled)))
            except BaseException as error:
                errors.append(error)
            for waker in waits:
                waker()

        thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), name="kbatch-relay", daemon=True)
        thread.start()
        try:
            await ended.future
        except BaseException:
            cancelled.append(True)
            self._relay._flag.set()
            waits.append(again := LoopWaker())
            if answers or errors:  # it may have called what there was before
                again()
            await again.future
            raise
        if errors:
            raise errors.pop()  # this frame is in its traceback
        return answers[0]
