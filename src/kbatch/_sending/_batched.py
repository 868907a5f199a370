"""Envelopes one at a time go out in batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbatch._checks import check_close_timeout, check_timeout
from kbatch._errors import ConfigError, SenderFullError, UndeliveredError
from kbatch._exit import SENDERS
from kbatch._fastmap import Accumulator, Flag, monotonic
from kbatch._logs import tell_beside
from kbatch._options import BatchingOptions, shows, taken
from kbatch._sending._agent import BaseSendingAgent, SendingAgent
from kbatch._text import counted

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Never, Self, Unpack

    from kbatch._options import BatchingKeywords

__all__ = ["BaseBatchedSender", "BatchedSender"]

_BUFFERED_BYTES = 64 * 1024 * 1024


class BaseBatchedSender(Accumulator):
    """A batched sender, but for what waits."""

    _shown = "kbatch.BatchedSender"
    _agent_class: type[BaseSendingAgent] = SendingAgent

    @shows(BatchingOptions)
    def __init__(
        self,
        agent: BaseSendingAgent,
        *,
        close_timeout_s: float = 30.0,
        **keywords: Unpack[BatchingKeywords[Never]],
    ) -> None:
        if not isinstance(agent, self._agent_class):
            raise ConfigError(f"agent must be a {self._agent_class._shown}, not {type(agent).__name__}")
        (given,) = taken(self, keywords, BatchingOptions)
        options: BatchingOptions[Never] = BatchingOptions(**given)
        check_close_timeout(close_timeout_s)
        most = options.max_buffered_bytes
        if most is None:
            most = max(_BUFFERED_BYTES, options.batch_bytes)
        # Without keywords: for them Cython 3.3.1 has a crash when memory is short.
        super().__init__(
            options.batch_size, options.batch_bytes, options.batch_timeout_ms / 1000, options.max_buffered, most
        )
        self._close_timeout = close_timeout_s
        self._agent = agent
        agent._bind(self)

    @property
    def agent(self) -> BaseSendingAgent:
        """What sends the batches: its ``state`` is the circuit breaker's, its ``recent_failures`` what was given up."""
        return self._agent

    @property
    def closed(self) -> bool:
        """Whether no envelope is taken any more."""
        return self._is_refusing

    def stats(self) -> dict[str, int]:
        """Counters since the start, of envelopes unless said otherwise.

        ``accepted``; ``acked``; ``expired`` (not sent because ``deliver_by`` had passed); ``failed`` (given up);
        ``dead_letters`` (sent to the dead-letter topic instead); ``retried`` (failures after which they were sent
        again); ``buffered``, those without an outcome, and ``buffered_bytes``, what they hold; ``scheduled``, those of
        them that wait for their ``scheduled_time``; ``in_flight_batches``.
        """
        return {
            "accepted": self.accepted,
            "buffered": len(self),
            "buffered_bytes": self._buffered_bytes,
            **self._agent._stats(),
        }

    def _start(self) -> None:
        # By the first envelope.
        SENDERS.add(self)
        self._agent._start()

    def _refuse(self) -> None:
        raise self._agent._refusal()

    def _check_wait(self) -> None:
        # Before a wait for room.
        if self._agent._is_own():
            raise SenderFullError("no room for the envelope, and a callback of the sender must not wait for it")

    def _check_sent(self, error: BaseException | None) -> None:
        # At the end of a `with` block, whose own error comes first.
        undelivered, lost = self._agent._undelivered, 0 if self._is_forked else self._agent._lost()
        undelivered.raise_beside(error)
        if lost:
            text = f"{counted(lost, 'envelope was', 'envelopes were')} not sent when the sender was closed"
            if error is None:
                raise UndeliveredError(text, count=lost)
            tell_beside(error, text)

    def __repr__(self) -> str:
        if not hasattr(self, "_agent"):
            return f"<{self._shown} refused>"
        state = "closed" if self.closed else f"circuit breaker {self._agent.state.value}"
        return f"<{self._shown} to {self._agent.topic!r}, {len(self)} buffered, {state}>"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a sender cannot be pickled: it owns threads and connections")

    # -- blocking; kbatch.aio has them in a thread

    def _flush(self, timeout: float | None) -> int:
        check_timeout(timeout)
        self._agent._check_caller()
        if not self._is_used:
            return 0
        self._check_fork()
        if len(self) == 0:  # its thread may never have begun
            return 0
        seq = self._hasten_filling()
        return 0 if self._wait_for(seq, timeout) else self._agent._left(seq)

    def _drain(self, timeout: float | None) -> int:
        check_timeout(timeout)
        self._check_fork()
        self._agent._check_caller()
        self._stop_accepting()
        if len(self) == 0:
            return 0
        self._agent._hurry()
        self._wait_for(None, timeout)
        return len(self)

    def _close(self, timeout: float | None) -> int:
        check_timeout(timeout)
        self._agent._check_caller()
        if timeout is None:
            timeout = self._close_timeout
        if self._is_forked:
            return 0  # those are the parent's
        end = monotonic() + timeout
        try:
            self._drain(timeout)
        except BaseException:  # after Ctrl-C the caller does not wait for the deadline
            end = 0.0
            raise
        finally:
            not_sent = self._agent._end(max(0.0, end - monotonic()))
            SENDERS.discard(self)
        return not_sent

    def _begin_end(self) -> None:
        # At the end of the interpreter, where all senders have the same time.
        self._agent._begin_end(0.0)
        SENDERS.discard(self)

    def _await_end(self, end: float) -> int:
        not_sent = self._agent._await_end(end)
        self._agent._undelivered.log_all()
        return not_sent

    def _wait_for(self, seq: int | None, timeout: float | None) -> bool:
        done = Flag()
        watcher = self._agent._when_done(seq, done.set)
        try:
            done.wait(timeout)
        finally:
            watcher.gone = True
        return watcher.done


class BatchedSender(BaseBatchedSender):
    """Takes envelopes one at a time, from any thread, and sends them in batches; the agent sees to what fails.

    A batch is closed when it has `batch_size` envelopes, when the next one would make its keys, headers and bodies more
    than `batch_bytes`, or when its oldest envelope has waited for `batch_timeout_ms` and fewer than
    ``max_in_flight_batches`` are in flight. The order of the calls is the order within a partition, as far as
    `SendingAgent` says. An envelope with a future ``scheduled_time`` waits until then. What is buffered lives in
    memory: a crash loses it, and so it loses what is scheduled. It is mapped later, on a thread of the sender: a
    message must not change after `send`, and in the producer's ``header_hook`` the caller's context variables are not
    set.

    The sender starts with its first envelope: librdkafka, and a thread. It must be closed, by a ``with`` block or
    `close`. At interpreter exit what is left is sent for some seconds. One that is forgotten sends what it has; then
    it ends, with a ResourceWarning, when Python's garbage collector finds it.

    Args:
        agent: Sends the batches. Each sender has one of its own.
        batch_size, batch_bytes, batch_timeout_ms: See above. A body that is not encoded yet counts as the average of
            those that were; if none was, or if it looks larger, as what its texts, bytes and numbers take, about.
        max_buffered: How many envelopes may be taken and have no outcome, before `send` waits.
        max_buffered_bytes: How many bytes their keys, headers and bodies may hold, before `send` waits; by
            default 64 MiB, or `batch_bytes` if that is more. One envelope that is larger is taken when the buffer is
            empty.
        close_timeout_s: Seconds that leaving a ``with`` block waits for what is buffered.

    Attributes:
        accepted: How many envelopes were taken since the start.
        flag: Wakes the agent; not for users.

    Raises:
        ConfigError: A value of the wrong type or out of its range, or an agent that has a sender.
    """

    def flush(self, timeout: float | None = None) -> int:
        """Sends what is buffered without waiting for more, and waits until it is acknowledged or given up.

        Retries are waited for; what waits for its ``scheduled_time`` is not.

        Args:
            timeout: Seconds; ``None`` waits as long as it takes.

        Returns:
            How many envelopes have no outcome yet, at most: if the time has passed, some may have been sent later.

        Raises:
            UndeliveredError: Envelopes were given up since the last time, and no ``on_failed`` was told.
            SenderError: It is called by a callback of the sender, for which it would wait, or in a task or thread to
                which the context of one was copied that has not ended.
        """
        left = self._flush(timeout)
        self._agent._undelivered.raise_all()
        return left

    def drain(self, timeout: float | None = None) -> int:
        """Takes no more envelopes, and waits until those that were taken are acknowledged or given up, the scheduled
        ones, too. From now on retries and probes are at most a second apart, so attempts are used up sooner.

        Args:
            timeout: Seconds; ``None`` waits as long as it takes.

        Returns:
            How many envelopes have no outcome yet.

        Raises:
            UndeliveredError: As `flush`.
        """
        left = self._drain(timeout)
        self._agent._undelivered.raise_all()
        return left

    def close(self, timeout: float | None = None) -> int:
        """As `drain`; then gives up what is left, and tells ``on_failed`` of each with `SenderClosedError`, or raises.

        What may have been stored, by an earlier attempt or because it is still in flight by a producer that others go
        on using, is a `DeliveryError` with ``possibly_persisted``. Ctrl-C ends the wait, and gives up at once. May be
        called again, from any thread.

        Args:
            timeout: Seconds; ``None`` is the sender's ``close_timeout_s``.

        Returns:
            How many envelopes were given up since closing began, because they were refused or the time was over: they
            were not sent, or are not known to be.

        Raises:
            UndeliveredError: As `flush`.
            SenderError: It is called by a callback of the sender, for which it would wait, or in a task or thread to
                which the context of one was copied that has not ended.
        """
        not_sent = self._close(timeout)
        self._agent._undelivered.raise_all()
        return not_sent

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close(None)
        self._check_sent(error)
