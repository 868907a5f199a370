"""Phase 1 against the reference: the same bytes, or the same envelope refused for the same field."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kbatch
from kbatch import _fastmap
from tests import mapping, strategies
from tests.messages import ENCODERS
from tests.reference import Setting, Spec, refused_arguments

WIRES = ("kbatch", "wolverine", "cloudevents", "raw")
SMALL = 20_000
A_THIRD = settings(max_examples=settings().max_examples // 3)  # for each of twelve


@pytest.mark.long
@given(data=st.data(), setting=strategies.settings)
def test_good_batches(data, setting):
    specs = data.draw(st.lists(strategies.specs(setting), max_size=6))
    with mapping.producer_of(setting) as producer:
        got = mapping.assert_agree(producer, "orders", specs, setting)
        # once more, into a buffer that has been used
        again = mapping.assert_agree(producer, "orders", specs[::-1], setting)
    assert len(got) == len(again) == len(specs)


@pytest.mark.long
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


@given(data=st.data(), setting=strategies.settings)
def test_a_batch_that_goes_on_without_bad_envelopes(data, setting):
    specs = data.draw(st.lists(strategies.specs(setting) | strategies.spoilt(setting), max_size=6))
    with mapping.producer_of(setting) as producer:
        _, rejected = mapping.assert_agree_on_each(producer, "orders", specs, setting)
        # once more, with pools that have been used
        again = mapping.assert_agree_on_each(producer, "orders", specs[::-1], setting)
        assert _fastmap.pinned_buffers() == 0
    assert len(rejected) == len(again[1])


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("off", [-1, 0, 1])
@A_THIRD
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
        assert len(got[1].value) == SMALL - 36 + off


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_a_body_as_large_as_librdkafkas_queue(off):
    setting = Setting(wire="raw", body_max_bytes=2048)
    with mapping.producer_of(setting) as producer:
        got = mapping.assert_agree(producer, "orders", [Spec({"data": bytes(2048 + off), "key": b"k" * 4096})], setting)
    assert isinstance(got, mapping.Failed) == (off > 0)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("headers", [[("h", None)], (("h", ""),), [("h", b""), ["i", ""]]])
def test_nearly_100_000_headers(wire, headers):
    setting = Setting(wire=wire, source="fleet-1")
    specs = [Spec({"data": b"x", "headers": headers * (strategies.MANY_HEADERS // len(headers))})] * 2
    with mapping.producer_of(setting) as producer:
        got = mapping.assert_agree(producer, "orders", specs, setting)
    assert len(got[1].headers) >= strategies.MANY_HEADERS


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("off", [-1, 0, 1])
def test_the_most_headers(wire, off):
    setting = Setting(wire=wire, source="fleet-1")
    with mapping.producer_of(setting) as producer:
        (plain,) = mapping.assert_agree(producer, "orders", [Spec({"data": b"x"})], setting)
        count = 100_000 - len(plain.headers) + off
        spec = Spec({"data": b"x", "headers": [("h", b"")] * count})
        got = mapping.assert_agree(producer, "orders", [spec], setting)
    assert isinstance(got, mapping.Failed) == (off > 0)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("position", [0, strategies.MANY_HEADERS // 2, strategies.MANY_HEADERS - 1])
def test_a_bad_one_of_nearly_100_000_headers(wire, position):
    setting = Setting(wire=wire, source="fleet-1")
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


@given(data=st.data(), setting=strategies.settings)
def test_an_error_always_names_index_and_id(data, setting):
    spec = data.draw(strategies.spoilt(setting))
    envelope = mapping.envelope_of(spec)
    refusals = (kbatch.SerializationError, kbatch.NotYetDueError)
    with mapping.producer_of(setting) as producer, pytest.raises(refusals) as raised:
        producer._map("orders", [envelope])
    assert str(raised.value).startswith(f"envelope 0 (id {envelope.id}): ")
    str(raised.value).encode()  # whatever was wrong, its message can be logged


@given(data=st.data(), setting=strategies.settings)
def test_the_constructor_takes_what_it_should(data, setting):
    spec = data.draw(strategies.specs(setting) | strategies.spoilt(setting))
    refused = refused_arguments(spec.arguments)
    assert not (refused - {"message", "data"} if spec.tombstone else refused)
    mapping.envelope_of(spec)
