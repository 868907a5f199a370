"""Phase 1 against the reference: the same bytes, or the same envelope refused for the same field."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kbatch
from kbatch import _fastmap
from tests import mapping, strategies
from tests.messages import ENCODERS
from tests.reference import Setting, Spec, refused_arguments

WIRES = ("kbatch", "wolverine", "raw")
SMALL = 20_000


@given(data=st.data(), setting=strategies.settings)
def test_good_batches(data, setting):
    specs = data.draw(st.lists(strategies.specs(setting), max_size=6))
    with mapping.producer_of(setting) as producer:
        got = mapping.assert_agree(producer, "orders", specs, setting)
        # once more, into a buffer that has been used
        again = mapping.assert_agree(producer, "orders", specs[::-1], setting)
    assert len(got) == len(again) == len(specs)


@given(data=st.data(), setting=strategies.settings)
def test_a_bad_envelope_anywhere(data, setting):
    specs = data.draw(st.lists(strategies.specs(setting), max_size=4))
    index = data.draw(st.integers(0, len(specs)))
    bad = data.draw(strategies.spoilt(setting))
    later = data.draw(st.lists(strategies.spoilt(setting), max_size=1))
    with mapping.producer_of(setting) as producer:
        got = mapping.assert_agree(producer, "orders", [*specs[:index], bad, *specs[index:], *later], setting)
        assert isinstance(got, mapping.Failed)
        assert got.index == index
        assert _fastmap.pinned_buffers() == 0
        # nothing of it is left behind
        assert isinstance(mapping.assert_agree(producer, "orders", specs, setting), list)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("off", [-1, 0, 1])
@given(data=st.data())
def test_at_the_size_limit(wire, off, data):
    setting = Setting(wire=wire, message_max_bytes=SMALL)
    spec = data.draw(strategies.sized(setting, off))
    with mapping.producer_of(setting) as producer:
        got = mapping.assert_agree(producer, "orders", [spec], setting)
    if off > 0:
        assert isinstance(got, mapping.Failed)
        assert got.field == "data"
    else:
        assert isinstance(got, list)


@pytest.mark.parametrize("encoder", ["json", "msgpack", "repr"])
@pytest.mark.parametrize("off", [-1, 0, 1])
def test_an_encoded_message_at_the_size_limit(encoder, off):
    setting = Setting(wire="raw", message_max_bytes=SMALL, encoder=ENCODERS[encoder])
    around = {"json": 2, "msgpack": 3, "repr": len("orders|value|''")}[encoder]
    spec = Spec({"message": "x" * (SMALL - 36 - around + off)})
    with mapping.producer_of(setting) as producer:
        got = mapping.assert_agree(producer, "orders", [Spec({"message": 1}), spec], setting)
    if off > 0:
        assert got[:2] == (1, "message")
    else:
        assert got[1].value == ENCODERS[encoder].encode(spec.arguments["message"]) if encoder != "repr" else True


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_a_body_as_large_as_librdkafkas_queue(off):
    setting = Setting(wire="raw", body_max_bytes=2048)
    with mapping.producer_of(setting) as producer:
        got = mapping.assert_agree(producer, "orders", [Spec({"data": bytes(2048 + off), "key": b"k" * 4096})], setting)
    assert isinstance(got, mapping.Failed) == (off > 0)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("headers", [[("h", None)], (("h", ""),), [("h", b""), ["i", ""]]])
def test_100_000_headers(wire, headers):
    setting = Setting(wire=wire)
    specs = [Spec({"data": b"x", "headers": headers * (strategies.MANY_HEADERS // len(headers))})] * 2
    with mapping.producer_of(setting) as producer:
        got = mapping.assert_agree(producer, "orders", specs, setting)
    assert len(got[1].headers) >= strategies.MANY_HEADERS


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("position", [0, strategies.MANY_HEADERS // 2, strategies.MANY_HEADERS - 1])
def test_a_bad_one_of_100_000_headers(wire, position):
    setting = Setting(wire=wire)
    headers = [("h", None)] * strategies.MANY_HEADERS
    headers[position] = ("bad", 5)
    with mapping.producer_of(setting) as producer:
        got = mapping.assert_agree(producer, "orders", [Spec({"data": b"x", "headers": headers})], setting)
    assert got[:2] == (0, "headers['bad']")


@pytest.mark.parametrize("wire", WIRES)
def test_a_long_batch(wire):
    setting = Setting(wire=wire, source="fleet-1")
    specs = [
        Spec({"message": {"id": n}, "key": f"order-{n % 97}", "tenant_id": "t" * (n % 130), "headers": {"n": str(n)}})
        for n in range(5000)
    ]
    with mapping.producer_of(setting) as producer:
        assert len(mapping.assert_agree(producer, "orders", specs, setting)) == 5000


@pytest.mark.parametrize("index", [0, 2500, 4999])
def test_the_first_a_middle_and_the_last_envelope(index):
    setting = Setting()
    specs = [Spec({"message": {"id": n}, "key": f"order-{n % 97}"}) for n in range(5000)]
    specs[index] = Spec({"message": object()})
    with mapping.producer_of(setting) as producer:
        got = mapping.assert_agree(producer, "orders", specs, setting)
    assert got[:2] == (index, "message")


# --- the message of an error ----------------------------------------------------------------------------------------


def test_an_error_says_where_and_what():
    envelopes = [kbatch.Envelope({"id": n}) for n in range(20)]
    envelopes[17] = kbatch.Envelope({"id": 17}, headers=[("x", 5)])
    with kbatch.Producer(mapping.NOWHERE) as producer, pytest.raises(kbatch.SerializationError) as raised:
        producer._map("orders", envelopes)
    error = raised.value
    assert (error.index, error.field, error.envelope_id) == (17, "headers['x']", envelopes[17].id)
    assert str(error) == f"envelope 17 (id {envelopes[17].id}): header 'x' must be str, bytes or None, not int"


@given(data=st.data(), setting=strategies.settings)
def test_an_error_always_names_index_and_id(data, setting):
    spec = data.draw(strategies.spoilt(setting))
    envelope = mapping.envelope_of(spec)
    with mapping.producer_of(setting) as producer, pytest.raises(kbatch.SerializationError) as raised:
        producer._map("orders", [envelope])
    assert str(raised.value).startswith(f"envelope 0 (id {envelope.id}): ")
    str(raised.value).encode()  # whatever was wrong, its message can be logged


def test_what_the_encoder_raised_is_the_cause():
    def encode(message, context):
        raise LookupError("no schema")

    setting = Setting(encoder=encode)
    with (
        mapping.producer_of(setting) as producer,
        pytest.raises(kbatch.SerializationError, match="no schema") as raised,
    ):
        producer._map("orders", [kbatch.Envelope(1)])
    assert raised.value.field == "message"
    assert isinstance(raised.value.__cause__, LookupError)


# --- odd batches ----------------------------------------------------------------------------------------------------


def test_an_empty_batch_maps_to_nothing():
    with kbatch.Producer(mapping.NOWHERE) as producer:
        assert list(producer._map("orders", [])) == []


def test_any_iterable_is_a_batch():
    setting = Setting()
    envelopes = [kbatch.Envelope(n) for n in range(10)]
    with mapping.producer_of(setting) as producer:
        expected = [record.value for record in mapping.kbatch_maps(producer, "orders", envelopes)]
        for batch in (tuple(envelopes), iter(envelopes), (e for e in envelopes), dict.fromkeys(envelopes).keys()):
            assert [record.value for record in mapping.kbatch_maps(producer, "orders", batch)] == expected


@pytest.mark.parametrize("intruder", [None, "text", 5, {"message": 1}, kbatch.Envelope])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_what_is_no_envelope_is_named_by_its_index(intruder, index):
    envelopes = [kbatch.Envelope(n) for n in range(2)]
    envelopes.insert(index, intruder)
    with kbatch.Producer(mapping.NOWHERE) as producer, pytest.raises(kbatch.SerializationError) as raised:
        producer._map("orders", envelopes)
    assert raised.value.index == index
    assert raised.value.envelope_id is None
    assert f"envelope {index}" in str(raised.value)


def test_a_generator_that_fails_raises_what_it_raised():
    def envelopes():
        yield kbatch.Envelope(1)
        raise LookupError("gone")

    with kbatch.Producer(mapping.NOWHERE) as producer, pytest.raises(LookupError, match="gone"):
        producer._map("orders", envelopes())


def test_the_same_envelope_many_times():
    setting = Setting()
    envelope = kbatch.Envelope({"id": 7}, key="k")
    with mapping.producer_of(setting) as producer:
        records = mapping.kbatch_maps(producer, "orders", [envelope] * 1000)
    assert records == [records[0]] * 1000


def test_one_time_for_the_batch():
    with kbatch.Producer(mapping.NOWHERE) as producer:
        records = mapping.kbatch_maps(producer, "orders", [kbatch.Envelope(n) for n in range(1000)])
    assert len({dict(record.headers)["sent-at"] for record in records}) == 1


def test_a_cyclic_message_is_an_error_of_its_field():
    cyclic = []
    cyclic.append(cyclic)
    with kbatch.Producer(mapping.NOWHERE) as producer, pytest.raises(kbatch.SerializationError) as raised:
        producer._map("orders", [kbatch.Envelope(1), kbatch.Envelope(cyclic)])
    assert (raised.value.index, raised.value.field) == (1, "message")


def test_an_encoder_that_changes_the_batch_while_it_is_mapped():
    envelopes = [kbatch.Envelope(n) for n in range(100)]

    def encode(message, context):
        envelopes.clear()
        return b"x"

    with mapping.producer_of(Setting(encoder=encode)) as producer:
        records = mapping.kbatch_maps(producer, "orders", envelopes)
    assert records
    assert {record.value for record in records} == {b"x"}


def test_an_encoder_that_maps_another_batch():
    with mapping.producer_of(Setting()) as producer:

        def encode(message, context):
            return b"|".join(record[4] for record in producer._map("inner", [kbatch.Envelope(n) for n in range(50)]))

        with mapping.producer_of(Setting(encoder=encode)) as outer:
            inner = encode(None, None)
            assert [r.value for r in mapping.kbatch_maps(outer, "orders", [kbatch.Envelope(1)] * 3)] == [inner] * 3


def test_a_failed_message_leaves_no_half_body():
    # msgspec writes the beginning before it meets what it cannot encode
    half = ["x" * 10_000, object()]
    with kbatch.Producer(mapping.NOWHERE) as producer:
        with pytest.raises(kbatch.SerializationError):
            producer._map("orders", [kbatch.Envelope("a"), kbatch.Envelope(half)])
        assert [record[4] for record in producer._map("orders", [kbatch.Envelope("b")])] == [b'"b"']


# --- the constructor ------------------------------------------------------------------------------------------------

REFUSED = [
    {"message": 1, "data": b"x"},
    {},
    {"data": None},
    {"message": 1, "sent_at": "2026-11-23"},
    {"message": 1, "sent_at": 1795425405},
    {"message": 1, "id": "01934a2b-3c4d-7e5f-8a9b-0c1d2e3f4a5b"},
    {"message": 1, "id": b"0123456789abcdef"},
    *(
        {"message": 1, name: value}
        for name in ("partition", "timestamp", "attempts")
        for value in (-1, 2**63, 2**70, 1.0, "1")
    ),
    {"message": 1, "partition": 2**31},
    {"message": 1, "attempts": 2**31},
    {"message": 1, "attempts": None},
    *(
        {"message": 1, "headers": value}
        for value in (5, "abc", [("a",)], [("a", "b", "c")], [5], [None], ["abc"], ["ab"])
    ),
]


@pytest.mark.parametrize("arguments", REFUSED, ids=repr)
def test_the_constructor_refuses(arguments):
    assert refused_arguments(arguments)
    with pytest.raises((TypeError, ValueError)):
        kbatch.Envelope(**arguments)


@pytest.mark.parametrize("name", ["sent_at", "scheduled_time", "deliver_by"])
@given(time=st.datetimes())
def test_the_constructor_refuses_naive_times(name, time):
    with pytest.raises(ValueError, match=name):
        kbatch.Envelope(1, **{name: time})


@given(data=st.data(), setting=strategies.settings)
def test_the_constructor_takes_what_it_should(data, setting):
    spec = data.draw(strategies.specs(setting) | strategies.spoilt(setting))
    assert not (
        refused_arguments(spec.arguments) - {"message", "data"} if spec.tombstone else refused_arguments(spec.arguments)
    )
    mapping.envelope_of(spec)
