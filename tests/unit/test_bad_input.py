"""What is not an envelope, or not a good one: an error that says where and what, and never a crash or half a batch."""

import asyncio
import contextlib
import pickle
import threading
import uuid
from datetime import datetime, timedelta, timezone, tzinfo
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kbatch
import kbatch.aio
from tests import mapping
from tests.naming import shown
from tests.reference import Setting, refused_arguments

ID = uuid.UUID("01934a2b-3c4d-7e5f-8a9b-0c1d2e3f4a5b")


@pytest.fixture
def producer():
    with kbatch.Producer(mapping.NOWHERE) as producer:
        yield producer


def refused(producer, envelopes, topic="orders"):
    """The error of a batch that cannot be mapped; the producer is as good as before."""
    with pytest.raises(kbatch.SerializationError) as raised:
        producer._map(topic, envelopes)
    assert [record[4] for record in producer._map("orders", [kbatch.Envelope(data=b"good")])] == [b"good"]
    return raised.value


# --- what an error says ---------------------------------------------------------------------------------------------


def test_an_error_says_where_and_what(producer):
    envelopes = [kbatch.Envelope({"id": n}) for n in range(20)]
    envelopes[17] = kbatch.Envelope({"id": 17}, headers=[("x", 5)])
    error = refused(producer, envelopes)
    assert (error.index, error.field, error.envelope_id) == (17, "headers['x']", envelopes[17].id)
    assert str(error) == f"envelope 17 (id {envelopes[17].id}): header 'x' must be str, bytes or None, not int"


@pytest.mark.parametrize(
    ("arguments", "field", "says"),
    [
        ({"key": 5}, "key", "key must be str, bytes or None, not int"),
        ({"topic": "a b"}, "topic", "'a b'"),
        ({"user_name": b"ada"}, "user_name", "user_name must be str, not bytes"),
        ({"tenant_id": "\ud800"}, "tenant_id", "UTF-8"),
        ({"headers": {"id": "1"}}, "headers['id']", "header 'id' is reserved"),
        ({"headers": [("", "1")]}, "headers", "empty"),
        ({"headers": [(None, "1")]}, "headers", "name must be str, not NoneType"),
        ({"headers": [("a\0", "1")]}, "headers['a\\x00']", "NUL"),
    ],
)
def test_an_error_says_what(producer, arguments, field, says):
    error = refused(producer, [kbatch.Envelope(1, id=ID, **arguments)])
    assert error.field == field
    assert str(error).startswith(f"envelope 0 (id {ID}): ")
    assert says in str(error)


def test_an_error_can_be_pickled(producer):
    error = refused(producer, [kbatch.Envelope(1, id=ID, key=5)])
    again = pickle.loads(pickle.dumps(error))
    assert (again.index, again.field, again.envelope_id, str(again)) == (0, "key", ID, str(error))


def test_an_error_of_a_large_thing_is_short(producer):
    for arguments in (
        {"headers": [("n\0" * 100_000, "v")]},
        {"topic": "t" * 100_000},
        {"headers": [("n" * 100_000, 5)]},
    ):
        assert len(str(refused(producer, [kbatch.Envelope(1, **arguments)]))) < 2000


def test_what_the_encoder_raised_is_the_cause():
    def encode(message, context):
        if message == "bad":
            raise LookupError("no schema")
        return b"x"

    with kbatch.Producer(mapping.NOWHERE, encoder=encode) as producer:
        error = refused(producer, [kbatch.Envelope("good"), kbatch.Envelope("bad")])
    assert (error.index, error.field) == (1, "message")
    assert "no schema" in str(error)
    assert isinstance(error.__cause__, LookupError)


def test_an_encoder_that_gives_no_bytes():
    with kbatch.Producer(mapping.NOWHERE, encoder=lambda message, context: "text") as producer:
        error = refused(producer, [kbatch.Envelope(1)])
    assert (error.index, error.field) == (0, "message")


def test_an_encoder_that_leaves():
    def encode(message, context):
        raise KeyboardInterrupt

    with kbatch.Producer(mapping.NOWHERE, encoder=encode) as producer, pytest.raises(KeyboardInterrupt):
        producer._map("orders", [kbatch.Envelope(1)])


def test_a_tombstone_that_is_too_large_names_what_it_has(producer):
    error = refused(producer, [kbatch.Tombstone("k" * 1_000_000, id=ID)])
    assert (error.index, error.field) == (0, "key")


# --- odd batches ----------------------------------------------------------------------------------------------------


def test_an_empty_batch_maps_to_nothing(producer):
    assert producer._map("orders", []) == []


def test_any_iterable_is_a_batch(producer):
    envelopes = [kbatch.Envelope(n) for n in range(10)]
    for batch in (
        envelopes,
        tuple(envelopes),
        iter(envelopes),
        (e for e in envelopes),
        dict.fromkeys(envelopes).keys(),
    ):
        assert [record[4] for record in producer._map("orders", batch)] == [b"%d" % n for n in range(10)]


@pytest.mark.parametrize("batch", [None, 5, "text", b"bytes", kbatch.Envelope(1), {"message": 1}])
def test_what_is_no_batch(producer, batch):
    with pytest.raises(TypeError):
        producer._map("orders", batch)


@pytest.mark.parametrize("intruder", [None, "text", 5, {"message": 1}, kbatch.Envelope])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_what_is_no_envelope_is_named_by_its_index(producer, intruder, index):
    envelopes = [kbatch.Envelope(n) for n in range(2)]
    envelopes.insert(index, intruder)
    error = refused(producer, envelopes)
    assert error.index == index
    assert error.envelope_id is None
    assert f"envelope {index}" in str(error)


def test_a_generator_that_fails_raises_what_it_raised(producer):
    def envelopes():
        yield kbatch.Envelope(1)
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        producer._map("orders", envelopes())


def test_a_batch_that_does_not_tell_its_class(producer):
    class Secretive:
        @property
        def __class__(self):
            raise LookupError("no class")

    with pytest.raises(LookupError, match="no class"):
        producer._map("orders", Secretive())


def test_no_topic_anywhere(producer):
    error = refused(producer, [kbatch.Envelope(1, topic="orders"), kbatch.Envelope(2)], topic=None)
    assert (error.index, error.field) == (1, "topic")


def test_the_same_envelope_many_times(producer):
    records = producer._map("orders", [kbatch.Envelope({"id": 7}, key="k")] * 1000)
    assert records == [records[0]] * 1000


def test_one_time_for_the_batch(producer):
    records = producer._map("orders", [kbatch.Envelope(n) for n in range(1000)])
    assert len({dict(record[5])["sent-at"] for record in records}) == 1


def test_an_expired_envelope_is_no_failure(producer):
    past = datetime(2020, 1, 1, tzinfo=timezone.utc)
    good = kbatch.Envelope(1)
    records = producer._map("orders", [kbatch.Envelope(0, deliver_by=past), good, kbatch.Envelope(2, deliver_by=past)])
    assert [record and record[4] for record in records] == [None, b"1", None]


def test_a_list_that_another_thread_changes(producer):
    envelopes = [kbatch.Envelope(n, key=str(n)) for n in range(1000)]
    stop = threading.Event()

    def change():
        while not stop.is_set():
            envelopes.append(envelopes.pop(0))
            del envelopes[500:]
            envelopes.extend(kbatch.Envelope(n, key=str(n)) for n in range(500, 1000))

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(200):
            records = producer._map("orders", envelopes)
            assert all(record[3] == record[4] for record in records)
    finally:
        stop.set()
        thread.join()


def test_an_encoder_that_changes_the_batch_while_it_is_mapped():
    envelopes = [kbatch.Envelope(n) for n in range(100)]

    def encode(message, context):
        envelopes.clear()
        return b"%d" % message

    with kbatch.Producer(mapping.NOWHERE, encoder=encode) as producer:
        assert [record[4] for record in producer._map("orders", envelopes)] == [b"%d" % n for n in range(100)]


def test_an_encoder_that_maps_another_batch(producer):
    def encode(message, context):
        return b"|".join(record[4] for record in producer._map("inner", [kbatch.Envelope(n) for n in range(50)]))

    with kbatch.Producer(mapping.NOWHERE, encoder=encode) as outer:
        inner = encode(None, None)
        assert [record[4] for record in outer._map("orders", [kbatch.Envelope(1)] * 3)] == [inner] * 3


# --- bodies ---------------------------------------------------------------------------------------------------------


def test_a_failed_message_leaves_no_half_body(producer):
    # msgspec writes the beginning before it meets what it cannot encode
    half = ["x" * 10_000, object()]
    error = refused(producer, [kbatch.Envelope("a"), kbatch.Envelope(half)])
    assert (error.index, error.field) == (1, "message")


def test_a_cyclic_message(producer):
    cyclic = []
    cyclic.append(cyclic)
    error = refused(producer, [kbatch.Envelope(1), kbatch.Envelope(cyclic)])
    assert (error.index, error.field) == (1, "message")


def test_data_that_was_let_go(producer):
    view = memoryview(bytearray(b"x"))
    envelope = kbatch.Envelope(data=view)
    view.release()
    error = refused(producer, [kbatch.Envelope(1), envelope])
    assert (error.index, error.field) == (1, "data")


def test_data_with_gaps(producer):
    error = refused(producer, [kbatch.Envelope(data=memoryview(b"abcdef")[::2])])
    assert (error.index, error.field) == (0, "data")


def test_data_is_what_it_was_when_mapped(producer):
    body = bytearray(b"before")
    records = producer._map("orders", [kbatch.Envelope(data=body), kbatch.Envelope(data=memoryview(body)[2:4])])
    body[:] = b"after, and longer"
    assert [record[4] for record in records] == [b"before", b"fo"]


def test_type_names_that_nothing_else_keeps():
    # each made when it is asked for, and more of them than a cache would hold
    class Named(type):
        @property
        def __message_type__(cls):
            return f"type-{cls.__name__}-" + "x" * 40

    classes = [Named(f"C{n}", (), {}) for n in range(6000)]
    with kbatch.Producer(mapping.NOWHERE, encoder=lambda message, context: b"x") as producer:
        records = producer._map("orders", [kbatch.Envelope(one()) for one in classes])
    expected = [f"type-C{n}-".encode() + b"x" * 40 for n in range(6000)]
    assert [dict(record[5])["message-type"] for record in records] == expected


# --- headers --------------------------------------------------------------------------------------------------------


def test_a_name_that_cannot_be_shown(producer):
    class Unprintable:
        def __repr__(self):
            raise ValueError("no")

    error = refused(producer, [kbatch.Envelope(1, headers=[(Unprintable(), "v")])])
    assert (error.index, error.field) == (0, "headers")


def test_the_hook_is_called_once_per_batch():
    calls = []

    def hook():
        calls.append(1)
        return [("traceparent", f"span-{len(calls)}")]

    with kbatch.Producer(mapping.NOWHERE, header_hook=hook) as producer:
        for batch in (1, 2):
            records = producer._map("orders", [kbatch.Envelope(n) for n in range(10)])
            assert {dict(record[5])["traceparent"] for record in records} == {f"span-{batch}".encode()}
    assert len(calls) == 2


def test_a_hook_with_nothing_to_add():
    with kbatch.Producer(mapping.NOWHERE, header_hook=lambda: None) as producer:
        assert len(producer._map("orders", [kbatch.Envelope(1)])[0][5]) == 4


@pytest.mark.parametrize(
    "answer", [5, "text", [("a",)], [("id", "1")], [("a", 5)], [(5, "a")], [("", "a")], {"a": "\ud800"}]
)
def test_a_hook_with_bad_headers(answer):
    with kbatch.Producer(mapping.NOWHERE, header_hook=lambda: answer) as producer:
        with pytest.raises(kbatch.SerializationError) as raised:
            producer._map("orders", [kbatch.Envelope(1)])
        assert raised.value.field.startswith("header_hook")


def test_a_hook_that_fails():
    def hook():
        raise LookupError("no span")

    with kbatch.Producer(mapping.NOWHERE, header_hook=hook) as producer:
        with pytest.raises(kbatch.SerializationError, match="no span") as raised:
            producer._map("orders", [kbatch.Envelope(1)])
        assert raised.value.field == "header_hook"
        assert isinstance(raised.value.__cause__, LookupError)


# --- wire formats of one's own --------------------------------------------------------------------------------------


class Wire:
    def __init__(self, answer):
        self.answer = answer

    def write(self, envelope):
        return self.answer


@pytest.mark.parametrize("headers", [None, [], {}, ()])
def test_a_wire_object_without_headers(headers):
    with kbatch.Producer(mapping.NOWHERE, wire=Wire(("k", b"v", headers))) as producer:
        records = producer._map("orders", [kbatch.Envelope(1)] * 3)
    assert [record[3:] for record in records] == [(b"k", b"v", [])] * 3


def test_a_wire_object_and_all_it_may_answer():
    answer = (b"k", bytearray(b"v"), [("id", "1"), ("id", b"2"), ("none", None)])
    with kbatch.Producer(mapping.NOWHERE, wire=Wire(answer), header_hook=lambda: {"h": "0"}) as producer:
        records = producer._map("orders", [kbatch.Envelope(1), kbatch.Tombstone("t")])
    headers = [("h", b"0"), ("id", b"1"), ("id", b"2"), ("none", None)]
    assert [record[3:] for record in records] == [(b"k", b"v", headers)] * 2


def test_a_wire_object_that_answers_a_tombstone():
    with kbatch.Producer(mapping.NOWHERE, wire=Wire((None, None, []))) as producer:
        assert producer._map("orders", [kbatch.Envelope(1)])[0][3:] == (None, None, [])


@pytest.mark.parametrize(
    "answer",
    [
        None,
        5,
        (b"k", b"v"),
        (b"k", b"v", [], 1),
        (5, b"v", []),
        ("\ud800", b"v", []),
        (b"k", "text", []),
        (b"k", 5, []),
        (b"k", b"v", [("a",)]),
        (b"k", b"v", [("", "v")]),
        (b"k", b"v", [("a", 5)]),
        (b"k", b"v" * 1_000_000, []),
    ],
)
def test_a_wire_object_with_a_bad_answer(answer):
    with kbatch.Producer(mapping.NOWHERE, wire=Wire(answer)) as producer:
        with pytest.raises(kbatch.SerializationError) as raised:
            producer._map("orders", [kbatch.Envelope(1, id=ID)])
        assert (raised.value.index, raised.value.envelope_id) == (0, ID)


# --- the constructor ------------------------------------------------------------------------------------------------


class NoOffset(tzinfo):
    """With it, a time is naive all the same."""

    def utcoffset(self, time):
        return None


def beyond(time, hours):
    """A time that there is there, and not in UTC."""
    return time.replace(tzinfo=timezone(timedelta(hours=hours)))


REFUSED = [
    {"message": 1, "data": b"x"},
    {},
    {"data": None},
    {"message": 1, "sent_at": "2026-11-23"},
    {"message": 1, "sent_at": 1795425405},
    {"message": 1, "sent_at": datetime(2026, 11, 23).date()},
    {"message": 1, "deliver_by": datetime(2026, 11, 23, tzinfo=NoOffset())},
    {"message": 1, "sent_at": beyond(datetime.min, 1)},
    {"message": 1, "scheduled_time": beyond(datetime.max, -1)},
    {"message": 1, "id": "01934a2b-3c4d-7e5f-8a9b-0c1d2e3f4a5b"},
    {"message": 1, "id": b"0123456789abcdef"},
    *(
        {"message": 1, name: bad}
        for name in ("partition", "timestamp", "attempts")
        for bad in (-1, 2**63, 2**70, 1.0, "1")
    ),
    {"message": 1, "partition": 2**31},
    {"message": 1, "partition": True},
    {"message": 1, "timestamp": 0},  # librdkafka would send now's
    {"message": 1, "attempts": 2**31},
    {"message": 1, "attempts": None},
    *(
        {"message": 1, "headers": bad}
        for bad in (5, "abc", b"ab", [("a",)], [("a", "b", "c")], [5], [None], ["abc"], ["ab"])
    ),
]


@pytest.mark.parametrize("arguments", REFUSED, ids=shown)
def test_the_constructor_refuses(arguments):
    assert refused_arguments(arguments)
    with pytest.raises((TypeError, ValueError, OverflowError)):
        kbatch.Envelope(**arguments)


@pytest.mark.parametrize("name", ["sent_at", "scheduled_time", "deliver_by"])
@given(time=st.datetimes())
def test_the_constructor_refuses_naive_times(name, time):
    with pytest.raises(ValueError, match=name):
        kbatch.Envelope(1, **{name: time})


@pytest.mark.parametrize("data", ["text", 5, [b"x"], object()])
def test_data_that_is_no_buffer(data):
    with pytest.raises(TypeError, match="data"):
        kbatch.Envelope(data=data)


class PretendedId:
    bytes = 5

    @property
    def __class__(self):
        return uuid.UUID


class ShortId(uuid.UUID):
    @property
    def bytes(self):
        return b"short"


@pytest.mark.parametrize("pretended", [PretendedId(), Mock(spec=uuid.UUID)], ids=["class", "mock"])
def test_an_id_that_only_looks_like_one(pretended):
    # `isinstance` takes it for one, and 16 bytes are copied in C
    with pytest.raises((TypeError, ValueError)):
        kbatch.Envelope(1, id=pretended)


def test_an_id_with_other_bytes():
    with contextlib.suppress(TypeError, ValueError):
        assert kbatch.Envelope(1, id=ShortId(int=1)).id == uuid.UUID(int=1)


def test_a_tombstone_has_a_key():
    with pytest.raises(TypeError, match="key"):
        kbatch.Tombstone(None)


def test_an_envelope_is_made_once(producer):
    # a record in flight points into it
    envelope = kbatch.Envelope(data=b"one", id=ID, key="k")
    with contextlib.suppress(TypeError):
        envelope.__init__(data=b"two")
    assert envelope == kbatch.Envelope(data=b"one", id=ID, key="k")


def test_an_envelope_that_was_never_made(producer):
    envelope = kbatch.Envelope.__new__(kbatch.Envelope)
    repr(envelope)
    with contextlib.suppress(kbatch.SerializationError, TypeError):
        producer._map("orders", [envelope])


def test_settings_map_alike():
    # the strategies' settings and a plain producer are the same thing
    with mapping.producer_of(Setting()) as one, kbatch.Producer(mapping.NOWHERE) as other:
        envelope = kbatch.Envelope({"id": 7}, sent_at=datetime(2026, 1, 1, tzinfo=timezone.utc), timestamp=1)
        assert one._map("orders", [envelope]) == other._map("orders", [envelope])


@pytest.mark.parametrize("method", ["flush", "close"])
@pytest.mark.parametrize("timeout", [-1, -0.5])
def test_a_negative_time_is_refused(method: str, timeout: float) -> None:
    # confluent-kafka's flush(-1) waits for ever; here it would give up what is in flight.
    message = "timeout must be seconds, 0 or more, or None to wait as long as it takes"
    with kbatch.Producer({"bootstrap.servers": "127.0.0.1:1"}) as producer, pytest.raises(ValueError, match=message):
        getattr(producer, method)(timeout)

    async def on_a_loop() -> None:
        async with kbatch.aio.Producer({"bootstrap.servers": "127.0.0.1:1"}) as producer:
            await getattr(producer, method)(timeout)

    with pytest.raises(ValueError, match=message):
        asyncio.run(on_a_loop())
