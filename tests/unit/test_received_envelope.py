"""Envelopes of a listener, whose objects are made when they are asked for: the same as those of `read_envelope`."""

import copy
import gc
import pickle
import random
import sys
import threading
import uuid
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kbatch
from kbatch import DeserializationError, Envelope, ReceivedEnvelope, Tombstone, read_envelope
from kbatch._events import make_dispatcher
from kbatch._fastmap import CallbackThread, envelope_bytes, read_packed
from kbatch._fastmap import received as received_by_fields
from kbatch._receiving._config import ConsumerConfig
from kbatch._receiving._consumer import ConsumerCore
from tests import mapping, vectors
from tests.records import Consumed, consumed
from tests.reference import Record
from tests.unit.test_packed_record import packed
from tests.unit.test_read_envelope import EVENT, ID, NOT_COUNTS, NOT_TIMES, VECTORS, WIRES, half_records

FIELDS = (
    *("message", "data", "key", "topic", "partition", "timestamp", "headers", "id", "message_type", "content_type"),
    *("source", "correlation_id", "conversation_id", "parent_id", "tenant_id", "user_name", "sent_at"),
    *("scheduled_time", "deliver_by", "attempts"),
)
OF_TOMBSTONES = ("data", "key", "topic", "partition", "timestamp", "headers", "id", "sent_at")
HEADERS = [
    ("id", str(ID).encode()),
    ("message-type", b"order.placed"),
    ("content-type", b"application/json"),
    ("sent-at", b"2026-11-23T09:16:45.123456Z"),
    ("source", b"shop"),
    ("tenant-id", b"t"),
    ("region", b"eu"),
    ("x", None),
    ("empty", b""),
]


def receive(record: Consumed, *, wire: Any = "kbatch", regular: bool = True) -> ReceivedEnvelope[Any] | None:
    """By both ways, as `regular` says; None for what is not read without the GIL."""
    kind, time = record.a_timestamp
    assert record.a_topic is not None
    assert record.a_partition is not None
    assert record.a_offset is not None
    return received_by_fields(
        *(record.a_topic, record.a_partition, record.a_offset, time if kind else 0, record.a_key, record.a_value),
        record.a_headers,
        wire,
        regular=regular,
    )


def fields(envelope: Envelope[Any], names: tuple[str, ...] = FIELDS) -> dict[str, Any]:
    names = OF_TOMBSTONES if isinstance(envelope, Tombstone) or getattr(envelope, "is_tombstone", False) else names
    found = {name: getattr(envelope, name) for name in names}
    if found.get("message") is msgspec.UNSET:
        del found["message"]
    return found


def as_a_consumer_gives_it(record: Consumed) -> Consumed:
    """Bytes, and names that have UTF-8."""
    pairs = record.a_headers.items() if isinstance(record.a_headers, dict) else record.a_headers or ()
    kept = []
    for name, value in pairs:
        if not isinstance(value, (str, bytes, type(None))) or any("\ud800" <= c <= "\udfff" for c in name):
            continue
        kept.append((str(name), value.encode(errors="surrogatepass") if isinstance(value, str) else value))
    key = record.a_key.encode() if isinstance(record.a_key, str) else record.a_key
    value = None if record.a_value is None else bytes(record.a_value)
    return replace(record, a_headers=kept, a_key=key, a_value=value)


def came_of(record: Consumed, wire: str) -> Any:
    try:
        return fields(read_envelope(record, wire=wire))
    except DeserializationError as error:
        return str(error), error.header


def received(record: Consumed, wire: str, regular: bool) -> Any:
    envelope = receive(record, wire=wire, regular=regular)
    if envelope is None:
        return None
    assert envelope.offset == record.a_offset
    assert envelope.raw_headers == tuple((name, value) for name, value in record.a_headers)
    assert envelope.raw_value == record.a_value
    if envelope.error is not None:
        assert fields(envelope) == fields(receive(record, wire="raw", regular=False))
        return str(envelope.error), envelope.error.header
    return fields(envelope)


@pytest.fixture(autouse=True, scope="module")
def reader() -> Iterator[None]:
    """While there is a consumer, memory of envelopes is used again as it was left."""
    config = ConsumerConfig.parse({"bootstrap.servers": "127.0.0.1:1", "group.id": "g"})
    core = ConsumerCore(config.native, make_dispatcher(config, CallbackThread("callbacks"), lambda: None))
    yield
    core.close(10.0)


# -- the same as read_envelope


def consumed_of(vector: vectors.Vector) -> Consumed:
    assert isinstance(vector.expected, Record)
    return consumed(mapping.Mapped(*vector.expected[:-1])._replace(topic="orders", partition=3))


@pytest.mark.parametrize("vector", VECTORS, ids=[vector.name for vector in VECTORS])
def test_the_vectors(vector: vectors.Vector) -> None:
    record = consumed_of(vector)
    wire = vector.setting.wire
    assert received(record, wire, regular=False) == came_of(record, wire)
    quick = received(record, wire, regular=True)
    assert quick is None or quick == came_of(record, wire)


def test_what_producers_write_is_read_without_the_gil() -> None:
    quick = [
        receive(consumed(mapping.Mapped(*vector.expected[:-1])), wire=vector.setting.wire) is not None
        for vector in VECTORS
        if isinstance(vector.expected, Record)
    ]
    assert sum(quick) > 0.75 * len(quick)


@pytest.mark.parametrize("wire", WIRES)
@given(data=st.data())
def test_any_record_is_read_the_same(wire: str, data: Any) -> None:
    record = as_a_consumer_gives_it(data.draw(half_records(wire)))
    expected = came_of(record, wire)
    assert received(record, wire, regular=False) == expected
    quick = received(record, wire, regular=True)
    assert quick is None or quick == expected


@pytest.mark.parametrize("wire", WIRES)
def test_fields_are_the_same_in_any_order(wire: str) -> None:
    headers = [*EVENT, ("ce_a-b", b"1"), ("CE_Mixed", b"2")] if wire == "cloudevents" else HEADERS
    record = Consumed(b'{"a": 1}', b"k", headers)
    expected = came_of(record, wire)
    rng = random.Random(7)
    for _ in range(20):
        names = list(expected)
        rng.shuffle(names)
        envelope = receive(record, wire=wire)
        assert envelope is not None
        assert {name: getattr(envelope, name) for name in names} == expected
        assert fields(envelope) == expected


@pytest.mark.parametrize(("name", "values"), [("sent-at", NOT_TIMES), ("attempts", NOT_COUNTS), ("id", [b"", b"x"])])
def test_what_is_wrong_is_left_to_who_can_tell(name: str, values: list[bytes]) -> None:
    for value in values:
        record = Consumed(b"x", b"k", [(name, value), ("tenant-id", b"t")])
        assert receive(record) is None
        envelope = receive(record, regular=False)
        assert envelope is not None
        assert envelope.error is not None
        assert envelope.error.header == name
        assert (envelope.data, envelope.key, envelope.headers) == (b"x", b"k", tuple(record.a_headers))


def test_a_name_that_is_no_text() -> None:
    record = Consumed(b"x", None, [(b"\xff", b"1"), (b"x", b"2")])
    assert receive(record) is None
    envelope = receive(record, regular=False)
    assert envelope is not None
    assert str(envelope.error) == "record orders [3] at offset 17: the name of one of its headers is not UTF-8"
    assert envelope.headers == (("x", b"2"),)


@pytest.mark.parametrize("wire", ["kbatch", "wolverine"])
def test_a_name_that_differs_in_one_character_is_the_users(wire: str) -> None:
    names = {name for vector in VECTORS if vector.setting.wire == wire for name, _ in consumed_of(vector).a_headers}
    found = {name: receive(Consumed(b"x", None, [(name, None)]), wire=wire) for name in names}
    known = [name for name, envelope in found.items() if envelope is not None and not envelope.headers]
    assert len(known) > 8
    for name in known:
        for at in range(len(name)):
            other = name[:at] + ("~" if name[at] != "~" else "!") + name[at + 1 :]
            envelope = receive(Consumed(b"x", None, [(other, b"1")]), wire=wire)
            assert envelope is not None
            assert envelope.headers == ((other, b"1"),)


def test_nothing_of_a_record_before_shows() -> None:
    full, plain = Consumed(b"x", b"k", HEADERS), Consumed(None, None, [("x", b"x" * 150)])
    expected = came_of(plain, "kbatch")
    for _ in range(10):
        envelope = receive(full)
        assert envelope is not None
        del envelope  # and its memory is taken for the next one
        envelope = receive(plain)
        assert envelope is not None
        assert fields(envelope) == expected


def test_many_headers() -> None:
    headers = [(f"h{n}", b"%d" % n) for n in range(100_000)]
    envelope = receive(Consumed(b"x", None, headers))
    assert envelope is not None
    assert envelope.headers == tuple(headers)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 2047, 2048, 2049, 1_000_000])
def test_values_of_any_length(size: int) -> None:
    value = random.Random(size).randbytes(size)
    envelope = receive(Consumed(value, value[:100], [("x", value)]))
    assert envelope is not None
    assert (envelope.data, envelope.key, envelope.headers) == (value, value[:100], (("x", value),))
    assert size <= envelope_bytes(envelope) < 2 * size + 3000


# -- objects


def envelope_of(**changes: Any) -> ReceivedEnvelope[Any]:
    made = receive(replace(Consumed(b'{"a": 1}', b"k", HEADERS), **changes))
    assert isinstance(made, ReceivedEnvelope)
    return made


def test_what_was_made_is_kept() -> None:
    envelope = envelope_of()
    for name in ("data", "key", "headers", "message_type", "source"):
        assert getattr(envelope, name) is getattr(envelope, name)


def test_it_can_be_compared_hashed_and_shown() -> None:
    assert envelope_of() == envelope_of()
    assert hash(envelope_of()) == hash(envelope_of())
    assert envelope_of() != envelope_of(a_key=b"other")
    without_id = {"a_headers": HEADERS[1:]}
    assert hash(envelope_of(**without_id)) == hash(envelope_of(**without_id))
    assert "order.placed" in repr(envelope_of())


def test_copies_are_ordinary_envelopes() -> None:
    expected = read_envelope(Consumed(b'{"a": 1}', b"k", HEADERS))
    assert envelope_of().replace() == expected
    assert envelope_of().replace(topic=None) == expected.replace(topic=None)
    assert pickle.loads(pickle.dumps(envelope_of())) == expected
    assert copy.copy(envelope_of()) == expected
    tombstone = Consumed(None, b"k", HEADERS[:1])
    received_one = receive(tombstone)
    assert received_one is not None
    assert received_one.is_tombstone
    assert received_one.message is None
    assert received_one.replace() == read_envelope(tombstone)


def test_the_message_is_what_it_was_decoded_to() -> None:
    envelope = envelope_of()
    assert envelope.message is msgspec.UNSET
    envelope.decode(msgspec.json.decode)
    assert envelope.message == {"a": 1}
    assert envelope.data == b'{"a": 1}'


@pytest.mark.parametrize("wire", ["kbatch", "wolverine", "raw"])
def test_it_is_sent_on_as_it_was_read(wire: str) -> None:
    record = Consumed(b"x", b"k", HEADERS)
    envelopes = [receive(record, wire=wire) for _ in range(3)]
    with kbatch.Producer(mapping.NOWHERE, wire=wire, carry_scheduled_time=wire != "raw") as producer:
        sent = producer._map("elsewhere", envelopes)
        assert sent == producer._map("elsewhere", [read_envelope(record, wire=wire)] * 3)


def test_one_that_is_not_filled_is_packed_for_an_outbox() -> None:
    record = Consumed(b"x", b"k", HEADERS)
    of_listener, of_consumer = (
        [read_packed(one) for one in packed(envelope)] for envelope in (receive(record), read_envelope(record))
    )
    assert of_listener == of_consumer


def test_nobody_else_makes_one() -> None:
    with pytest.raises(TypeError, match="what a listener hands out"):
        ReceivedEnvelope()
    empty = ReceivedEnvelope.__new__(ReceivedEnvelope)
    with kbatch.Producer(mapping.NOWHERE) as producer, pytest.raises(kbatch.SerializationError, match="without"):
        producer._map("t", [empty])


def test_threads_that_ask_at_the_same_time_get_the_same() -> None:
    expected = came_of(Consumed(b'{"a": 1}', b"k", HEADERS[1:]), "kbatch")
    envelopes = [envelope_of(a_headers=HEADERS[1:]) for _ in range(300)]
    wrong: list[Any] = []

    def ask(seed: int) -> None:
        names = list(expected)
        random.Random(seed).shuffle(names)
        for envelope in envelopes:
            if {name: getattr(envelope, name) for name in names} != expected:
                wrong.append(envelope)
            hash(envelope)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong


def test_one_in_a_cycle_is_collected() -> None:
    class Kept:
        pass

    envelope = envelope_of()
    kept = Kept()
    kept.envelope = envelope  # type: ignore[attr-defined]
    envelope.decode(lambda _, kept=kept: kept)
    seen = weakref.ref(kept)
    del envelope, kept
    gc.collect()
    assert seen() is None


# -- formats of users


class Format:
    """A wire format that knows of `read` only."""

    def __init__(self, read: Any) -> None:
        self.read = read


def test_a_format_of_ones_own() -> None:
    def read(record: Any) -> Envelope[Any]:
        assert record.error() is None
        assert (record.topic(), record.partition(), record.offset()) == ("orders", 3, 17)
        assert record.timestamp() == (1, 1_795_425_405_123)
        (header,) = record.headers()
        return Envelope({"body": record.value()}, key=record.key(), id=ID, message_type=header[1].decode())

    record = Consumed(b"x", b"k", [("type", b"order")])
    assert receive(record, wire=Format(read)) is None
    envelope = receive(record, wire=Format(read), regular=False)
    assert envelope is not None
    assert (envelope.message, envelope.key, envelope.id, envelope.message_type) == ({"body": b"x"}, b"k", ID, "order")
    assert (envelope.topic, envelope.partition, envelope.offset) == ("orders", 3, 17)
    assert envelope.error is None


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda record: 1 / 0, "the wire format could not read it: division by zero"),
        (lambda record: None, "the wire format gave no kbatch.Envelope but NoneType"),
        (lambda record: Envelope.__new__(Envelope), "the wire format gave a Envelope made without Envelope.__init__"),
    ],
)
def test_a_format_of_ones_own_that_fails(read: Any, reason: str) -> None:
    envelope = receive(Consumed(b"x", b"k", [("a", b"1")]), wire=Format(read), regular=False)
    assert envelope is not None
    assert str(envelope.error).endswith(reason)
    assert (envelope.data, envelope.key, envelope.headers) == (b"x", b"k", (("a", b"1"),))


def test_an_id_that_is_read_is_a_uuid_like_any_other() -> None:
    rng = random.Random(3)
    for _ in range(200):
        id = uuid.UUID(int=rng.getrandbits(rng.choice([1, 60, 64, 65, 127, 128])))
        made = envelope_of(a_headers=[("id", str(id).encode())]).id
        assert (made, str(made), hash(made), made.is_safe, made.version) == (
            *(id, str(id), hash(id), id.is_safe, id.version),
        )
        assert pickle.loads(pickle.dumps(made)) == id
        with pytest.raises(TypeError):
            made.int = 1  # type: ignore[misc]
