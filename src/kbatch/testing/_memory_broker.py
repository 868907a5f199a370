"""What producers in memory send to: it decides what becomes of each envelope, and keeps what it acknowledged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from kbatch._codes import ABORTED_CODE, NOT_PERSISTED, PERSISTED, UNKNOWN_PARTITION, codes_by_name
from kbatch._fastmap import Envelope
from kbatch.testing._partitioner import partition_of

__all__ = ["Fault", "MemoryBroker", "MemoryRecord", "error_code"]

# What phase 1 makes of an envelope: (topic, partition, timestamp, key, value, headers); None if it is not sent.
_Record: TypeAlias = "tuple[str, int, int, bytes | None, bytes | None, list[tuple[str, bytes | None]]]"
Mapped: TypeAlias = "_Record | None"
# The outcome of one envelope: (code, persistence, partition, offset).
Outcome: TypeAlias = "tuple[int, int, int, int]"


@dataclass(frozen=True)
class MemoryRecord:
    """A record that a producer in memory has stored, as a consumer would give it.

    It has those methods of confluent-kafka's ``Message`` that tell what was sent and where it lies, and
    `kbatch.read_envelope` reads it.
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

    def headers(self) -> list[tuple[str, bytes | None]] | None:
        """Pairs of name and value, in order; ``None`` if there are none."""
        return list(self._headers) or None

    def error(self) -> None:
        """Always ``None``: it is a record."""
        return

    def __len__(self) -> int:
        """The length of the body, so that a record without one is false, as confluent-kafka's ``Message`` is."""
        return len(self._value or b"")

    def __repr__(self) -> str:
        return f"<MemoryRecord {self._topic} [{self._partition}] at offset {self._offset}>"


@dataclass
class Fault:
    """Envelopes that are to fail."""

    code: int
    persistence: int
    stored: bool
    times: int | None
    when: Callable[[Envelope[Any]], object] | None

    def meets(self, envelope: Envelope[Any]) -> bool:
        if self.times == 0 or not (self.when is None or self.when(envelope)):
            return False
        if self.times is not None:
            self.times -= 1
        return True


class MemoryBroker:
    """Topics, partitions and faults. The callers see to it that one thread does at a time."""

    def __init__(self, partitions: int, partitioner: str) -> None:
        self.envelopes: list[Envelope[Any]] = []
        self.records: list[MemoryRecord] = []
        self.faults: list[Fault] = []
        self._partitions = partitions
        self._partitioner = partitioner
        self._next_offset: defaultdict[tuple[str, int], int] = defaultdict(int)
        self._next_partition: defaultdict[str, int] = defaultdict(int)

    def place(self, mapped: Sequence[Mapped]) -> list[Mapped]:
        """The records of a batch with the partition of each."""
        return [
            record if record is None or record[1] >= 0 else (record[0], self._choose(record[0], record[3]), *record[2:])
            for record in mapped
        ]

    def judge(self, envelopes: Sequence[Envelope[Any]], mapped: Sequence[Mapped]) -> list[Fault | None]:
        """Of each envelope of a batch why it fails; ``None`` if it does not. Stores nothing. Comes after `place`."""
        return [
            None if record is None else self._fault(envelope, record)
            for envelope, record in zip(envelopes, mapped, strict=True)
        ]

    def receive(
        self,
        envelopes: Sequence[Envelope[Any]],
        mapped: Sequence[Mapped],
        faults: Sequence[Fault | None],
        *,
        transaction: bool,
    ) -> list[Outcome]:
        """The outcome of each envelope of a batch after `judge`; stores what is to be stored.

        With `transaction` all of it fails if one does, and nothing is stored.
        """
        if transaction and any(faults):
            return [
                (fault.code if fault else ABORTED_CODE, NOT_PERSISTED, -1 if record is None else record[1], -1)
                for fault, record in zip(faults, mapped, strict=True)
            ]
        outcomes: list[Outcome] = []
        for envelope, record, fault in zip(envelopes, mapped, faults, strict=True):
            if record is None:
                outcomes.append((0, NOT_PERSISTED, -1, -1))
                continue
            if fault is not None and not fault.stored:
                outcomes.append((fault.code, fault.persistence, record[1], -1))
                continue
            stored = self._store(record)
            self.envelopes.append(envelope)
            if fault is None:
                outcomes.append((0, PERSISTED, stored.partition(), stored.offset()))
            else:
                outcomes.append((fault.code, fault.persistence, stored.partition(), -1))
        return outcomes

    def _fault(self, envelope: Envelope[Any], record: _Record) -> Fault | None:
        if record[1] >= self._partitions:
            return _NO_SUCH_PARTITION
        for fault in self.faults:
            if fault.meets(envelope):
                return fault
        return None

    def _store(self, record: _Record) -> MemoryRecord:
        topic, partition, timestamp, key, value, headers = record
        offset = self._next_offset[topic, partition]
        self._next_offset[topic, partition] = offset + 1
        stored = MemoryRecord(topic, partition, offset, timestamp, key, value, tuple(headers))
        self.records.append(stored)
        return stored

    def _choose(self, topic: str, key: bytes | None) -> int:
        partition = partition_of(self._partitioner, key, self._partitions)
        if partition is not None:
            return partition
        # Each in turn where librdkafka takes any: the same in every run of a test.
        chosen = self._next_partition[topic]
        self._next_partition[topic] = (chosen + 1) % self._partitions
        return chosen


_NO_SUCH_PARTITION = Fault(UNKNOWN_PARTITION, NOT_PERSISTED, False, None, None)


def error_code(error: int | str) -> int:
    """librdkafka's code of an error that is given by code or name."""
    if isinstance(error, str):
        code = codes_by_name().get(error.removeprefix("RD_KAFKA_RESP_ERR_"))
        if not code:
            raise ValueError(f"librdkafka knows no error named {error!r}")
        return code
    if isinstance(error, bool) or not isinstance(error, int):
        raise TypeError(f"error must be librdkafka's code or its name, not {type(error).__name__}")
    if error == 0 or not -(2**15) <= error < 2**15:
        raise ValueError(f"error must be a code of librdkafka, not {error}")
    return error
