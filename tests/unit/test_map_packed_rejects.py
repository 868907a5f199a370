"""Packed records that cannot be sent are told one by one, and the others are ready."""

import pytest

import kbatch
from kbatch import DeserializationError, Envelope, SerializationError
from kbatch._fastmap import Mapper, RecordPool
from kbatch._pending import PendingBatch
from kbatch.testing import MemoryProducer

MiB = 1024 * 1024


def packed(*envelopes: Envelope) -> list[bytes]:
    pool = RecordPool()
    mapper = Mapper("raw", None, None, None, MiB, MiB)  # type: ignore[arg-type]
    return [each or b"" for each in pool.pack(pool.map(mapper, "orders", envelopes))]


def test_what_is_damaged_or_too_large_is_rejected_and_the_rest_is_sent() -> None:
    stored = packed(*(Envelope(data=b"%d" % n) for n in range(5)), Envelope(data=b"x" * 5_000))
    stored[1] = stored[1][:-1] + bytes([stored[1][-1] ^ 1])
    with MemoryProducer({"message.max.bytes": 2_000}) as producer:
        pending, rejected = PendingBatch(producer._core), []
        producer._core.map_packed(pending, stored, rejected)
        assert [(index, type(error)) for index, error in rejected] == [
            (1, DeserializationError),
            (5, SerializationError),
        ]
        assert producer._core.send(pending, 10, wait=True)
        assert pending.report.acked == 4
        assert {index: error.code for index, error in pending.report.errors.items()} == {1: -161, 5: -161}
        assert [record.value() for record in producer.records] == [b"0", b"2", b"3", b"4"]


def test_all_may_be_rejected() -> None:
    with MemoryProducer() as producer:
        pending, rejected = PendingBatch(producer._core), []
        producer._core.map_packed(pending, [b"", b"?", "text"], rejected)
        assert producer._core.send(pending, 10, wait=True)
        assert (len(rejected), pending.report.failed) == (3, 3)
        assert "packed record 2 must be bytes, not str" in str(rejected[2][1])


def test_what_has_expired_is_not_sent() -> None:
    stored = packed(*(Envelope(data=b"%d" % n) for n in range(3)))
    with MemoryProducer() as producer:
        pending = PendingBatch(producer._core)
        producer._core.map_packed(pending, stored, deliver_by=[None, 1, 2**62])
        assert producer._core.send(pending, 10, wait=True)
        assert pending.report.expired_indices == (1,)
        assert pending.report.acked == 2
        with pytest.raises(ValueError, match="2 times for 3 packed records"):
            producer._core.map_packed(PendingBatch(producer._core), stored, deliver_by=[None, None])


def test_without_a_list_the_first_one_is_raised() -> None:
    with kbatch.Producer({"bootstrap.servers": "127.0.0.1:1"}) as producer:
        with pytest.raises(DeserializationError, match="packed record 1"):
            producer._core.map_packed(PendingBatch(producer._core), [*packed(Envelope(data=b"")), b"?"])
        with pytest.raises(TypeError, match="packed record 0 must be bytes"):
            producer._core.map_packed(PendingBatch(producer._core), ["text"])  # type: ignore[list-item]
