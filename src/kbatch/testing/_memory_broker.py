"""What producers in memory send to: it decides what becomes of each envelope, and keeps what it acknowledged."""

from __future__ import annotations

import functools
import threading
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from kbatch._errors import ABORTED_CODE
from kbatch._fastmap import Envelope
from kbatch._librdkafka import error_text

__all__ = ["Fault", "MemoryBroker", "MemoryRecord", "error_code"]

NOT_PERSISTED = 0
POSSIBLY_PERSISTED = 1
PERSISTED = 2

# librdkafka's codes
MSG_TIMED_OUT = -192
UNKNOWN_PARTITION = -190

# What phase 1 makes of an envelope: (topic, partition, timestamp, key, value, headers); None if it is not sent.
Mapped: TypeAlias = "tuple[str, int, int, bytes | None, bytes | None, list[tuple[str, bytes | None]]] | None"
# The outcome of one envelope: (code, persistence, partition, offset).
Outcome: TypeAlias = "tuple[int, int, int, int]"


@dataclass(frozen=True)
class MemoryRecord:
    """A record that a producer in memory has acknowledged, as a consumer would give it.

    It has the methods of confluent-kafka's ``Message``, and `kbatch.read_envelope` reads it.
    """

    _topic: str
    _partition: int
    _offset: int
    _timestamp: int
    _key: bytes | None
    _value: bytes | None
    _headers: tuple[tuple[str, bytes | None], ...] = field(default=())

    def topic(self) -> str:
        """The topic that it was sent to."""
        return self._topic

    def partition(self) -> int:
        """The partition that it was sent to."""
        return self._partition

    def offset(self) -> int:
        """Its place in the partition."""
        return self._offset

    def timestamp(self) -> tuple[int, int]:
        """1 (the time was set by who sent it), and milliseconds since 1970."""
        return 1, self._timestamp

    def key(self) -> bytes | None:
        """The record key."""
        return self._key

    def value(self) -> bytes | None:
        """The body; ``None`` is a null value."""
        return self._value

    def headers(self) -> list[tuple[str, bytes | None]]:
        """Pairs of name and value, in order."""
        return list(self._headers)

    def error(self) -> None:
        """Always ``None``: it is a record."""
        return

    def __repr__(self) -> str:
        return f"<MemoryRecord {self._topic} [{self._partition}] at offset {self._offset}>"


@dataclass
class Fault:
    """Envelopes that are to fail."""

    code: int
    persistence: int
    times: int | None
    when: Callable[[Envelope[Any]], object] | None

    def meets(self, envelope: Envelope[Any]) -> bool:
        if self.times == 0 or not (self.when is None or self.when(envelope)):
            return False
        if self.times is not None:
            self.times -= 1
        return True


class MemoryBroker:
    """Topics, partitions and faults. `changed` is to be held for every call."""

    def __init__(self, partitions: int) -> None:
        self.changed = threading.Condition()  # with an RLock: `when` may ask a producer
        self.envelopes: list[Envelope[Any]] = []
        self.records: list[MemoryRecord] = []
        self.faults: list[Fault] = []
        self.is_down = False
        self._partitions = partitions
        self._next_offset: defaultdict[tuple[str, int], int] = defaultdict(int)
        self._next_partition: defaultdict[str, int] = defaultdict(int)

    def receive(
        self, envelopes: Sequence[Envelope[Any]], mapped: Sequence[Mapped], *, transaction: bool
    ) -> list[Outcome]:
        """The outcome of each envelope of a batch; keeps those that are acknowledged.

        With `transaction` all of it fails if one does.
        """
        refusals = [self._refusal(envelope, record) for envelope, record in zip(envelopes, mapped, strict=True)]
        if transaction and any(refusals):
            return [
                (refusal[0] if refusal else ABORTED_CODE, NOT_PERSISTED, -1 if record is None else record[1], -1)
                for refusal, record in zip(refusals, mapped, strict=True)
            ]
        outcomes: list[Outcome] = []
        for envelope, record, refusal in zip(envelopes, mapped, refusals, strict=True):
            if record is None:
                outcomes.append((0, NOT_PERSISTED, -1, -1))
            elif refusal is not None:
                outcomes.append((*refusal, record[1], -1))
            else:
                stored = self._store(record)
                self.envelopes.append(envelope)
                outcomes.append((0, PERSISTED, stored.partition(), stored.offset()))
        return outcomes

    def _refusal(self, envelope: Envelope[Any], record: Mapped) -> tuple[int, int] | None:
        if record is None:
            return None
        if self.is_down:
            return MSG_TIMED_OUT, NOT_PERSISTED
        if record[1] >= self._partitions:
            return UNKNOWN_PARTITION, NOT_PERSISTED
        for fault in self.faults:
            if fault.meets(envelope):
                return fault.code, fault.persistence
        return None

    def _store(self, record: tuple[str, int, int, bytes | None, bytes | None, Any]) -> MemoryRecord:
        topic, partition, timestamp, key, value, headers = record
        if partition < 0:
            partition = self._choose(topic, key)
        offset = self._next_offset[topic, partition]
        self._next_offset[topic, partition] = offset + 1
        stored = MemoryRecord(topic, partition, offset, timestamp, key, value, tuple(headers))
        self.records.append(stored)
        return stored

    def _choose(self, topic: str, key: bytes | None) -> int:
        # librdkafka's own, consistent_random, but for the random part.
        if key:
            return zlib.crc32(key) % self._partitions
        chosen = self._next_partition[topic]
        self._next_partition[topic] = (chosen + 1) % self._partitions
        return chosen


def error_code(error: int | str) -> int:
    """librdkafka's code of an error that is given by code or name."""
    if isinstance(error, str):
        code = _codes().get(error.removeprefix("RD_KAFKA_RESP_ERR_"))
        if code is None:
            raise ValueError(f"librdkafka knows no error named {error!r}")
        return code
    if isinstance(error, bool) or not isinstance(error, int):
        raise TypeError(f"error must be librdkafka's code or its name, not {type(error).__name__}")
    if error == 0 or not -(2**15) <= error < 2**15:
        raise ValueError(f"error must be a code of librdkafka, not {error}")
    return error


@functools.cache
def _codes() -> dict[str, int]:
    def found() -> Iterator[tuple[str, int]]:
        for code in range(-300, 300):
            name = error_text(code)[0]
            if code and not name.startswith("ERR_"):
                yield name, code

    return dict(found())
