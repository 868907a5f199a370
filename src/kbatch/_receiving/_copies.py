"""Sends copies of records to other topics, as they came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from kbatch._config import canonical
from kbatch._errors import (
    ConfigError,
    KbatchError,
    ProducerError,
    is_for_whole_batch,
    named_exception_text,
    type_name,
)
from kbatch._fastmap import Mapper, RecordPool
from kbatch._pending import PendingBatch
from kbatch._producer import Producer
from kbatch._receiving._failing import OvertakenError
from kbatch._recovery._handle import ProducerHandle, ProducerUse

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kbatch._base_producer import BaseProducer
    from kbatch._receiving._lanes import Work

__all__ = ["Copies", "shared_config"]

# Those that say how a group reads. A producer would warn of them, or take them for its own.
_CONSUMERS_OWN = frozenset(
    (
        *("allow.auto.create.topics", "auto.commit.interval.ms", "auto.offset.reset", "check.crcs", "client.rack"),
        "consume.callback.max.messages",
        *("coordinator.query.interval.ms", "enable.auto.commit", "enable.auto.offset.store", "enable.partition.eof"),
        *("fetch.error.backoff.ms", "fetch.max.bytes", "fetch.message.max.bytes", "fetch.min.bytes"),
        *("fetch.queue.backoff.ms", "fetch.wait.max.ms", "group.id", "group.instance.id", "group.protocol"),
        *("group.protocol.type", "group.remote.assignor", "heartbeat.interval.ms", "isolation.level"),
        *("max.poll.interval.ms", "offset.store.method", "offset.store.path", "offset.store.sync.interval.ms"),
        *("partition.assignment.strategy", "queued.max.messages.kbytes", "queued.min.messages", "session.timeout.ms"),
    )
)
LARGEST = 1_000_000_000  # librdkafka's upper limit; what a broker takes is the topic's affair


def shared_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a consumer's configuration a producer for its cluster has as well."""
    shared = {key: value for key, value in config.items() if canonical(key) not in _CONSUMERS_OWN}
    if not any(canonical(key) == "message.max.bytes" for key in shared):
        shared["message.max.bytes"] = LARGEST  # a record that has been stored with it, and its headers more
    return shared


class Copies:
    """One producer for what a listener sends on. `send` is for any thread.

    Args:
        config: The listener's; of its keys a producer is made, unless `producer` is given.
        producer: A `kbatch.Producer`, which stays the caller's. Its own wire format does not count.
    """

    def __init__(self, config: Mapping[str, Any], producer: Producer | None) -> None:
        self._given = producer
        self._prototype: Producer | None = None  # not used: each run has a twin
        self._handle: ProducerHandle | None = None  # of a run
        self._use: ProducerUse | None = None
        self._dead: BaseProducer | None = None  # in its fatal state, until `prepare` has it replaced
        if producer is None:
            self._prototype = Producer(shared_config(config), wire="raw")
        elif not isinstance(producer, Producer):
            raise ConfigError(f"producer must be a kbatch.Producer, not {type_name(producer)}")
        elif producer._transactions is not None:
            raise ConfigError("producer must have no transactional.id: copies are sent one by one")
        self._mapper = Mapper("raw", msgspec.json.Encoder(), None, None, LARGEST, LARGEST)

    def open(self) -> None:
        """Begins a run."""
        if self._prototype is not None:
            handle = ProducerHandle(self._prototype._twin(), given=False)
        else:
            assert self._given is not None
            handle = ProducerHandle.of(self._given)
        self._use = handle.acquire()
        self._handle, self._dead = handle, None

    def is_ready(self) -> bool:
        """Whether `send` would not block."""
        handle = self._handle
        return handle is None or (self._dead is None and handle.producer._core.started())

    def prepare(self) -> None:
        """Starts the producer, in place of one in its fatal state, if there is one. Blocks, and raises what sending
        does."""
        handle, dead = self._handle, self._dead
        if handle is None:
            return  # the run has ended
        if dead is not None:
            handle.replace(dead)
            self._dead = None
        handle.producer._core.start()

    def is_final(self, error: KbatchError, producer: BaseProducer | None = None) -> bool:
        """Whether no producer will send a copy after this refusal, by `producer` or the one of now: the one that was
        given is closed, or librdkafka refuses the configuration."""
        handle = self._handle
        if isinstance(error, ProducerError):
            return handle is not None and handle.fate(producer or handle.producer, error) == "end"
        return isinstance(error, ConfigError)

    def send(self, work: Work, answer: Callable[[KbatchError | OvertakenError | None], object]) -> None:
        """Sends the copy that the work has, and returns; `answer` is called once, with ``None`` when it is stored.

        That may be within this call, or later on a thread of the producer. It blocks unless `is_ready`.

        Raises:
            ProducerError, ConfigError: No producer will send it (`is_final`); `answer` is not called.
        """
        assert work.copy is not None
        try:
            self.prepare()
        except KbatchError as error:
            if self.is_final(error):
                raise
            answer(error)
            return
        pool = RecordPool()
        (packed,) = pool.pack(pool.map(self._mapper, None, [work.copy]))
        assert packed is not None
        handle = self._handle
        if handle is None:  # its run has ended without it
            answer(OvertakenError())
        else:
            self._send(handle, handle.producer, packed, answer, is_alone=False)

    def _send(
        self,
        handle: ProducerHandle,
        producer: BaseProducer,
        packed: bytes,
        answer: Callable[[KbatchError | None], object],
        *,
        is_alone: bool,
    ) -> None:
        def settled(batch: PendingBatch) -> None:
            try:
                error = batch.report.errors.get(0)
                # A broker refuses it with the whole record batch that it was in.
                solo = handle.solo() if error is not None and is_for_whole_batch(error) and not is_alone else None
            except Exception as raised:  # no thread to be had, or no memory
                answer(_not_now(raised))
                return
            if solo is None:
                answer(error)
            else:
                self._send(handle, solo, packed, answer, is_alone=True)

        try:
            pending = PendingBatch(producer._core)
            producer._core.map_packed(pending, [packed])
            pending.add_done_callback(settled)
            producer._send_detached(pending)
        except ProducerError as error:
            if is_alone:
                handle.drop_solo(producer)
            elif self.is_final(error, producer):
                raise
            elif handle.fate(producer, error) == "replace":
                self._dead = producer  # not replaced here: that blocks, and this may be an event loop
            answer(error)
        except KbatchError as error:
            if not is_alone and self.is_final(error):
                raise
            answer(error)
        except Exception as error:
            if not is_alone:
                raise
            answer(_not_now(error))  # nobody would hear of it: it is a callback of the batch before

    def close(self, timeout_s: float) -> None:
        """Ends a run, and its producer, unless it was given."""
        self._handle = None
        if self._use is not None:
            self._use.release(timeout_s)
            self._use = None


def _not_now(error: Exception) -> ProducerError:
    """What is tried again."""
    return ProducerError(f"it cannot be sent now: {named_exception_text(error)}")
