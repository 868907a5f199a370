"""Records as bytes and back: the same, or a named error; and the envelope that was packed."""

import signal
import sys
import threading
import time
import uuid
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kbatch
from kbatch import DeserializationError, Envelope, Tombstone
from kbatch._fastmap import Mapper, RecordPool, read_packed, unpack_record
from kbatch._pending import PendingBatch
from tests import mapping, strategies
from tests.packed import checksummed, unpacked
from tests.records import Consumed

MiB = 1024 * 1024
ID = uuid.UUID("01934a2b-3c4d-7e5f-8a9b-0c1d2e3f4a5b")
WIRES = ("kbatch", "wolverine", "cloudevents", "raw")


def mapper_of(setting: Any) -> Mapper:
    return Mapper(
        setting.wire,
        setting.encoder,
        setting.source,
        (lambda: setting.hook_headers) if setting.hook_headers else None,
        setting.message_max_bytes,
        setting.body_max_bytes,
        carry_scheduled_time=True,
    )


def packed(*envelopes: Envelope, wire: str = "kbatch") -> list[Any]:
    pool = RecordPool()
    mapper = Mapper(wire, msgspec.json.Encoder(), "/shop", None, MiB, MiB)
    return pool.pack(pool.map(mapper, "orders", envelopes))


STRUCTURED = b'{"specversion": "1.0", "id": "7", "source": "/shop", "type": "order", "data": 1}'
STRUCTURED_TYPE = [("content-type", "application/cloudevents+json")]
FULL = Envelope(
    data=b"body\x00",
    key="schlüssel",
    partition=7,
    timestamp=1_764_000_000_123,
    headers=[("trace", b"\x00\xff"), ("none", None), ("empty", "")],
    id=ID,
    message_type="order",
    correlation_id="c-1",
    attempts=12,
)


def test_the_bytes_of_version_1() -> None:
    bare = Envelope(
        data=b"body", key=b"", partition=258, timestamp=1, headers=[("n", None), ("e", ""), ("v", "ä" * 70)], id=ID
    )
    value = "ä".encode() * 70
    content = b"\x01\x00" + b"\x01" + bytes(7) + b"\x02\x01\x00\x00" + b"\x07orders" + b"\x01"
    content += b"\x03" + b"\x02n\x00" + b"\x02e\x01" + b"\x02v\x8d\x01" + value + b"\x05body"
    assert packed(bare, wire="raw") == [checksummed(content)]


@given(data=st.data(), setting=strategies.settings)
def test_what_is_packed_is_unpacked(data: Any, setting: Any) -> None:
    spec = data.draw(strategies.specs(setting))
    pool = RecordPool()
    batch = pool.map(mapper_of(setting), "orders", [mapping.envelope_of(spec)])
    (one,) = pool.pack(batch)
    (record,) = pool.records(batch)
    if record is None:
        assert one is None
        return
    assert unpack_record(one) == unpacked(one) == record


def test_what_is_not_sent_is_not_packed() -> None:
    expired = FULL.replace(deliver_by=mapping.parsed_time(b"2020-01-01T00:00:00.000000Z"))
    first, none, last = packed(FULL, expired, Tombstone(b"k"))
    assert none is None
    assert unpack_record(first)[3] == "schlüssel".encode()
    assert unpack_record(last)[4] is None


def test_any_cut_is_an_error() -> None:
    (one,) = packed(FULL)
    for length in range(len(one)):
        with pytest.raises(DeserializationError, match=r"packed record 0 cannot be read: it is (cut off|damaged)"):
            unpack_record(one[:length])
    with pytest.raises(DeserializationError, match="damaged"):
        unpack_record(one + b"\x00")


def test_any_changed_byte_is_an_error() -> None:
    (one,) = packed(FULL)
    for at in range(len(one)):
        for change in (1, 0x80, 0xFF):
            changed = one[:at] + bytes([one[at] ^ change]) + one[at + 1 :]
            with pytest.raises(DeserializationError, match="its version is not 1" if at == 0 else "damaged"):
                unpack_record(changed)


def test_lengths_that_lie_are_an_error() -> None:
    bare = Envelope(data=b"body", key=b"k", timestamp=1, headers=[("n", "v")], id=ID)
    content = packed(bare, wire="raw")[0][:-4]
    assert content[14:] == b"\x07orders\x02k\x01\x02n\x02v\x05body"
    for wrong in (
        content[14:] + b"\x00",
        b"\x00" + content[21:],
        b"\x08" + content[15:],
        content[14:-5] + b"\x06body",
        content[14:-5] + b"\x04body",
        content[14:-5] + b"\xff\xff\xff\xff\x7fbody",
        content[14:-5] + b"\xff\xff\xff\xff\xff\x7fbody",
        b"\x07orders\x02k\x02\x02n\x02v\x05body",
        b"\x07orders\x02k\xff\xff\xff\x07\x02n\x02v\x05body",
        b"\x07orders\x02k\x01\x00\x02v\x05body",
        b"\x07orders",
        b"",
    ):
        with pytest.raises(DeserializationError, match="a number in it is wrong"):
            unpack_record(checksummed(content[:14] + wrong))
    with pytest.raises(DeserializationError, match="a number in it is wrong"):
        unpack_record(checksummed(content[:10] + b"\xfe\xff\xff\xff" + content[14:]))
    with pytest.raises(DeserializationError, match="it has unknown flags"):
        unpack_record(checksummed(b"\x01\x01" + content[2:]))
    with pytest.raises(DeserializationError, match="its version is not 1"):
        unpack_record(checksummed(b"\x02" + content[1:]))


@given(data=st.data())
def test_whatever_has_the_right_checksum_is_read_as_slowly_or_refused(data: Any) -> None:
    # What no reader writes: lengths and counts that lie.
    content = bytearray(packed(FULL)[0][:-4])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(1, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b"\xff" * 4, b"\xff\xff\xff\xff\x0f", b"\x80\x80\x80\x80\x08"])
        )
    crafted = checksummed(bytes(content))
    try:
        expected = unpacked(crafted)
    except ValueError:
        with pytest.raises(DeserializationError, match="packed record 0 cannot be read"):
            unpack_record(crafted)
    else:
        assert unpack_record(crafted) == expected


@pytest.mark.parametrize("wire", WIRES)
@given(data=st.data())
def test_the_envelope_that_was_packed(wire: str, data: Any) -> None:
    setting = replace(data.draw(strategies.settings), wire=wire)
    spec = data.draw(strategies.specs(setting))
    pool = RecordPool()
    (one,) = pool.pack(pool.map(mapper_of(setting), "orders", [mapping.envelope_of(spec)]))
    if one is None:
        return
    topic, partition, timestamp, key, value, headers = unpack_record(one)
    consumed = Consumed(value, key, headers, topic, None if partition < 0 else partition, None, (1, timestamp))
    expected, read = kbatch.read_envelope(consumed, wire=wire), read_packed(one, wire=wire)
    of_id = {"kbatch": "id", "wolverine": "id", "cloudevents": "ce_id"}.get(wire)
    if of_id not in dict(headers):
        expected, read = expected.replace(id=ID), read.replace(id=ID)
    assert read == expected


def test_what_cannot_be_read_of_a_packed_record_is_told() -> None:
    (one,) = packed(FULL, wire="raw")
    body = one[:-4]
    for old, new, reason in (
        (b"trace", b"tr\xffce", "the name of one of its headers is not UTF-8"),
        (b"\x06trace\x03\x00\xff", b"\x03id\x06\x00\xff\xff\xff\xff", "header 'id' must be UTF-8"),
    ):
        with pytest.raises(DeserializationError, match=reason) as caught:
            read_packed(checksummed(body.replace(old, new)))
        assert (caught.value.topic, caught.value.partition, caught.value.offset) == ("orders", 7, None)
    (event,) = packed(FULL.replace(data=STRUCTURED, headers=[*STRUCTURED_TYPE, ("trace", b"")]), wire="raw")
    with pytest.raises(DeserializationError, match="the name of one of its headers is not UTF-8") as caught:
        read_packed(checksummed(event[:-4].replace(b"trace", b"tr\xffce")), wire="cloudevents")
    assert (caught.value.topic, caught.value.partition, caught.value.offset) == ("orders", 7, None)
    with pytest.raises(DeserializationError, match="a name in it is not UTF-8"):
        unpack_record(checksummed(body.replace(b"trace", b"tr\xffce")))
    with pytest.raises(DeserializationError, match="a name in it is not UTF-8"):
        read_packed(checksummed(body.replace(b"orders", b"\xffrders")))


def test_a_packed_structured_event() -> None:
    (one,) = packed(FULL.replace(data=STRUCTURED, headers=[*STRUCTURED_TYPE, ("trace", b"\xff")]), wire="raw")
    read = read_packed(one, wire="cloudevents")
    assert (read.data, read.message_type, read.source) == (b"1", "order", "/shop")
    assert read.headers == (("ce_id", b"7"), ("trace", b"\xff"))


def test_a_packed_record_of_no_known_format() -> None:
    with pytest.raises(kbatch.ConfigError, match="wire must be one of kbatch, wolverine, cloudevents, raw, not 'xml'"):
        read_packed(packed(FULL)[0], wire="xml")


def test_packed_records_that_a_producer_cannot_send() -> None:
    (one,) = packed(FULL)
    with kbatch.Producer(mapping.NOWHERE) as producer:
        for stored, error, reason in (
            ([one, one[:-1]], DeserializationError, "packed record 1 cannot be read: it is damaged"),
            ([one, "text"], TypeError, "packed record 1 must be bytes, not str"),
            (one, TypeError, "envelopes must be an iterable"),
            (
                [checksummed(one[:-4].replace(b"orders", b"or/ers"))],
                kbatch.SerializationError,
                "not a Kafka topic name",
            ),
        ):
            with pytest.raises(error, match=reason):
                producer._core.map_packed(PendingBatch(producer._core), stored)
        batch = PendingBatch(producer._core)
        producer._core.map_packed(batch, [one])
        assert producer._core.records(batch) == [unpack_record(one)]
        assert batch.encoded_messages == (0, 0)


def test_packed_records_that_are_too_large_are_refused_as_phase_1_refuses_them() -> None:
    small = Envelope(data=b"x")
    large = Envelope(data=b"x" * 200_000, key=b"k", headers=[("n", None), ("v", "1")], source="/shop")
    stored = packed(small, large, small)
    for limits, reason in (
        ({"queue.buffering.max.kbytes": 64}, "the body of 200000 bytes can never fit"),
        ({"message.max.bytes": 100_000}, r"the record would take \d+ bytes .body 200000, key 1, headers "),
    ):
        with kbatch.Producer({**mapping.NOWHERE, **limits}) as producer:
            batch = PendingBatch(producer._core)
            with pytest.raises(kbatch.SerializationError, match=f"envelope 1: {reason}") as caught:
                producer._core.map_packed(batch, stored)
            assert (caught.value.index, caught.value.envelope_id) == (1, None)
            with pytest.raises(kbatch.SerializationError) as direct:
                producer._core.map(PendingBatch(producer._core), "orders", [small, large, small])
            assert caught.value.reason == direct.value.reason


def test_the_largest_packed_record_is_the_largest_that_phase_1_takes() -> None:
    large = Envelope(data=b"x" * 2_000, key=b"k", headers=[("n", None), ("v", "1" * 70)], source="/shop")
    with kbatch.Producer({**mapping.NOWHERE, "message.max.bytes": 1_000}) as producer:
        with pytest.raises(kbatch.SerializationError) as caught:
            producer._core.map(PendingBatch(producer._core), "orders", [large])
        size = int(caught.value.reason.split()[4])
    stored = packed(large)
    for limit in (size - 1, size):
        with kbatch.Producer({**mapping.NOWHERE, "message.max.bytes": limit}) as producer:
            for map_it in (
                lambda batch: producer._core.map_packed(batch, stored),
                lambda batch: producer._core.map(batch, "orders", [large]),
            ):
                if limit == size:
                    map_it(PendingBatch(producer._core))
                    continue
                with pytest.raises(kbatch.SerializationError, match=f"would take {size} bytes"):
                    map_it(PendingBatch(producer._core))


def long_packed() -> list[Any]:
    return packed(Envelope(data=b"x" * 100_000)) * 5_000


def test_rows_of_several_batches_are_numbered_through() -> None:
    pool, mapper = RecordPool(), Mapper("raw", None, None, None, MiB, MiB, carry_scheduled_time=True)
    later = datetime.now(timezone.utc) + timedelta(days=1)
    batches = [
        pool.map(mapper, "orders", [Envelope(data=b"0", id=ID)]),
        pool.map(mapper, "orders", [Envelope(data=b"-", deliver_by=later - timedelta(days=2))]),
        pool.map(mapper, "orders", [Envelope(data=b"1", scheduled_time=later), Envelope(data=b"2")]),
    ]
    scheduled: list[Any] = []
    rows = pool.rows(iter(batches), 7, 64, scheduled, created_us=5)
    assert [(seq, unpack_record(packed)[4]) for _, seq, _, packed, *_ in rows] == [(7, b"0"), (9, b"2")]
    assert [(seq, unpack_record(packed)[4]) for _, seq, _, packed, *_ in scheduled] == [(8, b"1")]
    assert [row[4] for row in (*rows, *scheduled)] == [5] * 3
    assert pool.rows((), 7, 64) == []
    for wrong in ([None], [7]):
        with pytest.raises(TypeError):
            pool.rows(wrong, 7, 64)  # type: ignore[arg-type]


def count_turns(turns: list[int], is_over: threading.Event) -> None:
    while not is_over.is_set():
        turns[0] += 1
        time.sleep(0)


def test_other_threads_run_while_packed_records_are_looked_at() -> None:
    stored, turns = long_packed(), [0]
    pool = RecordPool()
    mapped = pool.map(Mapper("raw", None, None, None, MiB, MiB), "orders", [Envelope(data=b"x" * 100_000)] * 500)
    small = pool.map(Mapper("raw", None, None, None, MiB, MiB), "orders", [Envelope(data=b"x" * 10_000)])
    interval = sys.getswitchinterval()
    with kbatch.Producer(mapping.NOWHERE) as producer:

        def map_packed() -> None:
            producer._core.map_packed(PendingBatch(producer._core), stored)

        for work in (map_packed, lambda: pool.pack(mapped), lambda: pool.rows([small] * 5_000, 0, 64)):
            is_over = threading.Event()
            other = threading.Thread(target=count_turns, args=(turns, is_over))
            sys.setswitchinterval(60)  # nobody gets the GIL but by its release
            try:
                other.start()
                before, end = turns[0], time.monotonic() + 30
                while turns[0] - before <= 2 and time.monotonic() < end:  # on a busy machine it may come too late
                    work()
                after = turns[0]
                is_over.set()
                other.join()
            finally:
                sys.setswitchinterval(interval)
            assert after - before > 2


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="platform: no interval timers")
def test_a_signal_ends_a_long_batch_of_packed_records() -> None:
    outcomes: list[Any] = []

    def interrupt(*_: Any) -> None:
        outcomes.append(batch.outcomes)
        raise InterruptedError

    def map_with_a_signal(producer: kbatch.Producer, batch: PendingBatch) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        producer._core.map_packed(batch, stored)

    stored = long_packed()
    before = signal.signal(signal.SIGALRM, interrupt)
    with kbatch.Producer(mapping.NOWHERE) as producer:
        batch = PendingBatch(producer._core)
        try:
            with pytest.raises(InterruptedError):
                map_with_a_signal(producer, batch)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert outcomes == [None]  # which it has as soon as all is mapped
