"""Phase 1 without a producer: envelopes mapped with a pool of their own. Topics are found by name in each pool."""

import gc

import msgspec
import pytest

import kbatch
from kbatch import Envelope, Tombstone
from kbatch._fastmap import Mapper, RecordPool, pinned_buffers
from kbatch._pending import PendingBatch

MiB = 1024 * 1024


def mapper() -> Mapper:
    return Mapper("kbatch", msgspec.json.Encoder(), None, None, MiB, MiB)


def envelopes(count: int) -> list[Envelope]:
    made = [Envelope({"n": n}, key=f"k{n}", headers={"h": str(n)}, topic=f"t{n % 3}") for n in range(count)]
    return [*made, Envelope(data=b"x" * 100_000), Tombstone("gone")]


def test_a_batch_is_mapped_without_a_producer_as_with_one() -> None:
    batch = envelopes(1000)
    pool = RecordPool()
    with kbatch.Producer({"bootstrap.servers": "127.0.0.1:1"}) as producer:
        pending = PendingBatch(producer._core)
        producer._core.map(pending, "orders", batch)
        of_a_producer = producer._core.records(pending)
        assert not producer._core.started()

    def without_times(records: list) -> list:
        return [(*record[:2], *record[3:5], [h for h in record[5] if h[0] != "sent-at"]) for record in records]

    for _ in range(3):  # at first with fresh memory, then with what was given back
        assert without_times(pool.records(pool.map(mapper(), "orders", batch))) == without_times(of_a_producer)


def test_records_are_there_as_long_as_their_batch_whoever_forgets_the_pool() -> None:
    body = msgspec.json.Encoder().encode({"n": 7})
    pool = RecordPool()
    mapped = pool.map(mapper(), "orders", [Envelope({"n": 7}, key="k")])
    del pool
    gc.collect()
    assert RecordPool().records(mapped)[0][3:5] == (b"k", body)


def test_a_bad_envelope_is_refused_as_by_a_producer_and_the_pool_goes_on() -> None:
    pool = RecordPool()
    with pytest.raises(kbatch.SerializationError, match=r"envelope 1 .*topic"):
        pool.map(mapper(), "orders", [Envelope(1), Envelope(2, topic="no topic")])
    with pytest.raises(kbatch.SerializationError, match="no topic"):
        pool.map(mapper(), None, [Envelope(1)])
    assert [record[0] for record in pool.records(pool.map(mapper(), "orders", [Envelope(1)]))] == ["orders"]


# Names of equal hash, by FNV-1a of 32 bits.
EQUAL_HASHES = ["costarring", "liquid", "declinate", "macallums", "altarage", "zinke"]


def test_each_record_goes_to_its_topic_also_if_their_names_have_the_same_hash() -> None:
    names = [*EQUAL_HASHES, *(f"topic-{n}" for n in range(5000)), "t", "topic-", "topic-1x"]
    pool = RecordPool()
    for order in (names, names[::-1], [*names, *names]):
        records = pool.records(pool.map(mapper(), None, [Envelope(data=b"", topic=name) for name in order]))
        assert [record[0] for record in records] == order


def test_the_hashes_that_are_said_to_be_equal_are() -> None:
    def fnv(name: str) -> int:
        value = 2166136261
        for byte in name.encode():
            value = (value ^ byte) * 16777619 % 2**32
        return value

    assert len({fnv(name) for name in EQUAL_HASHES}) == len(EQUAL_HASHES) / 2


def test_what_nobody_sends_is_not_counted_as_pinned() -> None:
    before = pinned_buffers()
    mapped = RecordPool().map(mapper(), "orders", envelopes(3))
    assert pinned_buffers() == before
    del mapped
