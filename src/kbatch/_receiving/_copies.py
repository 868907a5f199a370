"""Sends copies of records to other topics, as they came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from kbatch._config import canonical
from kbatch._errors import ConfigError, KbatchError, ProducerError, is_for_whole_batch, type_name
from kbatch._fastmap import Mapper, RecordPool
from kbatch._pending import PendingBatch
from kbatch._producer import Producer
from kbatch._recovery._handle import ProducerHandle

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kbatch._fastmap import Envelope
    from kbatch._report import DeliveryReport

__all__ = ["Copies", "shared_config"]

# Those that say how a group reads. A producer would warn of them, or take them for its own.
_CONSUMERS_OWN = frozenset(
    (
        *("auto.commit.interval.ms", "auto.offset.reset", "check.crcs", "client.rack", "consume.callback.max.messages"),
        *("coordinator.query.interval.ms", "enable.auto.commit", "enable.auto.offset.store", "enable.partition.eof"),
        *("fetch.error.backoff.ms", "fetch.max.bytes", "fetch.message.max.bytes", "fetch.min.bytes"),
        *("fetch.queue.backoff.ms", "fetch.wait.max.ms", "group.id", "group.instance.id", "group.protocol"),
        *("group.protocol.type", "group.remote.assignor", "heartbeat.interval.ms", "isolation.level"),
        *("max.poll.interval.ms", "offset.store.method", "offset.store.path", "offset.store.sync.interval.ms"),
        *("partition.assignment.strategy", "queued.max.messages.kbytes", "queued.min.messages", "session.timeout.ms"),
    )
)
_LARGEST = 1_000_000_000  # librdkafka's upper limit; what a broker takes is the topic's affair


def shared_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a consumer's configuration a producer for its cluster has as well."""
    shared = {key: value for key, value in config.items() if canonical(key) not in _CONSUMERS_OWN}
    if not any(canonical(key) == "message.max.bytes" for key in shared):
        shared["message.max.bytes"] = _LARGEST  # a record that has been stored with it, and its headers more
    return shared


class Copies:
    """One producer for what a listener sends on. `send` is for any thread.

    Args:
        config: The listener's; of its keys a producer is made, unless `producer` is given.
        producer: A `kbatch.Producer`, which stays the caller's. Its own wire format does not count.
    """

    def __init__(self, config: Mapping[str, Any], producer: Producer | None) -> None:
        if producer is None:
            self._handle = ProducerHandle(Producer(shared_config(config), wire="raw"), given=False)
        elif not isinstance(producer, Producer):
            raise ConfigError(f"producer must be a kbatch.Producer, not {type_name(producer)}")
        elif producer._transactions is not None:
            raise ConfigError("producer must have no transactional.id: copies are sent one by one")
        else:
            self._handle = ProducerHandle.of(producer)
        self._handle.acquire()
        self._mapper = Mapper("raw", msgspec.json.Encoder(), None, None, _LARGEST, _LARGEST)

    def send(self, copy: Envelope[Any], answer: Callable[[KbatchError | None], object]) -> None:
        """Sends it and returns; `answer` is called once, with ``None`` when it is stored.

        That may be within this call, or later on a thread of the producer.
        """
        pool = RecordPool()
        (packed,) = pool.pack(pool.map(self._mapper, None, [copy]))
        assert packed is not None
        self._send(self._handle.producer, packed, answer, is_alone=False)

    def _send(
        self, producer: Any, packed: bytes, answer: Callable[[KbatchError | None], object], *, is_alone: bool
    ) -> None:
        def settled(report: DeliveryReport) -> None:
            error = report.errors.get(0)
            # A broker refuses it with the whole record batch that it was in.
            solo = self._handle.solo() if error is not None and is_for_whole_batch(error) and not is_alone else None
            if solo is None:
                answer(error)
            else:
                self._send(solo, packed, answer, is_alone=True)

        pending = PendingBatch(producer._core)
        try:
            producer._core.map_packed(pending, [packed])
            pending.add_done_callback(lambda batch: settled(batch.report))
            producer._core.send(pending, wait=False)
        except ProducerError as error:
            if self._handle.fate(producer, error) == "replace":
                self._handle.replace(producer)
            answer(error)
        except KbatchError as error:
            answer(error)

    def close(self, timeout_s: float) -> None:
        """Ends the producer, unless it was given."""
        self._handle.release(timeout_s)
