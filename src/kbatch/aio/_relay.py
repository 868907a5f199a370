"""What brings an outbox to Kafka, run from an event loop."""

from __future__ import annotations

import contextvars
import threading
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from kbatch._fastmap import LoopWaker
from kbatch._loop import in_thread
from kbatch._outbox import _relay

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from typing_extensions import Self

    from kbatch._outbox._store import RelayOutbox
    from kbatch._producer import Producer
    from kbatch._recovery._retry import RetryPolicy

__all__ = ["Relay"]

_T = TypeVar("_T")


class Relay:
    """Brings the records of an outbox to Kafka, and deletes those that were acknowledged.

    As `kbatch.Relay`, in a thread that kbatch starts for each `run` and `drain`.

    Args:
        outbox, producer, retry, batch_size, max_in_flight_batches, strict_order, lease_s, fencing, failures_to_open,
            probe_interval_s, max_probe_interval_s, close_timeout_s: As for `kbatch.Relay`. A producer is a
            `kbatch.Producer`.
    """

    def __init__(
        self,
        outbox: RelayOutbox,
        producer: Mapping[str, Any] | Producer,
        *,
        retry: RetryPolicy | None = None,
        batch_size: int = 2_000,
        max_in_flight_batches: int = 4,
        strict_order: bool = False,
        lease_s: float | None = None,
        fencing: Literal["kafka"] | None = None,
        failures_to_open: int = 3,
        probe_interval_s: float = 1.0,
        max_probe_interval_s: float = 30.0,
        close_timeout_s: float = 30.0,
    ) -> None:
        self._relay = _relay.Relay(
            outbox,
            producer,
            retry=retry,
            batch_size=batch_size,
            max_in_flight_batches=max_in_flight_batches,
            strict_order=strict_order,
            lease_s=lease_s,
            fencing=fencing,
            failures_to_open=failures_to_open,
            probe_interval_s=probe_interval_s,
            max_probe_interval_s=max_probe_interval_s,
            close_timeout_s=close_timeout_s,
        )

    def __repr__(self) -> str:
        return repr(self._relay).replace("kbatch.Relay", "kbatch.aio.Relay", 1)

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
