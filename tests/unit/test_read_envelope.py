"""Records become envelopes again: what was written is read, and what is not as it should be is refused by name."""

import uuid
from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kbatch
from kbatch import DeserializationError, Envelope, Tombstone, read_envelope
from tests import mapping, slow_read, strategies, vectors
from tests.records import Consumed, consumed
from tests.reference import (
    CLOUDEVENTS_NAMES,
    RESERVED,
    Record,
    Setting,
    Spec,
    header_pairs,
    key_or_value,
    message_type,
)

WIRES = ("kbatch", "wolverine", "cloudevents", "raw")
ID = uuid.UUID("01934a2b-3c4d-7e5f-8a9b-0c1d2e3f4a5b")
MOMENT = datetime(2026, 11, 23, 9, 16, 45, 123456, tzinfo=timezone.utc)
# A record without an id has the same one each time that it is read.
ID_OF_PLACE = read_envelope(Consumed(), wire="raw").id

TEXTS = ("message_type", "content_type", "source", "correlation_id", "parent_id", "tenant_id", "user_name")
TIMES = ("sent_at", "scheduled_time", "deliver_by")


def expected(spec: Spec, setting: Setting, mapped: mapping.Mapped, id: uuid.UUID) -> Envelope:
    """The envelope that is to be read, from what was given and not from the record's headers, but for its time."""
    given, wire = spec.arguments, setting.wire
    users = [*setting.hook_headers, *header_pairs(given.get("headers", ()))]
    place = {"topic": mapped.topic, "partition": max(mapped.partition, 0)}
    users = [(str(name), key_or_value(value)) for name, value in users]
    place |= {"headers": users, "timestamp": mapped.timestamp}
    if spec.tombstone:
        id = id if wire == "kbatch" else ID_OF_PLACE
    if wire == "cloudevents":
        # An event's id of its own comes first; the envelope's is made of it.
        for pair in [pair for pair in users if pair[0] == "ce_id"]:
            users.remove(pair)
            users.insert(0, pair)
            source = "" if spec.tombstone else given["source"] if given.get("source") is not None else setting.source
            id = uuid.uuid5(uuid.UUID("7d6a7a3c-0b1e-5d43-9a55-6b62617463a8"), f"{source}\n{pair[1].decode()}")
    if spec.tombstone:
        sent_at = mapping.parsed_time(dict(mapped.headers)["sent-at"]) if wire == "kbatch" else None
        return Tombstone(key_or_value(given["key"]), id=id, sent_at=sent_at, **place)
    place |= {"key": mapped.key, "data": mapped.value}
    if wire == "raw":
        return Envelope(id=ID_OF_PLACE, **place)
    fields = {name: given.get(name) for name in (*TEXTS, *TIMES, "conversation_id")}
    fields["attempts"] = given.get("attempts", 0)
    fields["message_type"] = message_type(given)
    if fields["source"] is None:
        fields["source"] = setting.source
    written = dict(mapped.headers)
    if fields["content_type"] is None:
        fields["content_type"] = (written["content-type"] or b"").decode()
    if fields["sent_at"] is None:
        fields["sent_at"] = mapping.parsed_time(written["ce_time" if wire == "cloudevents" else "sent-at"])
    if wire == "wolverine":  # GUIDs, and none of zeros
        id = id if id.int else ID_OF_PLACE
        if fields["conversation_id"] is not None:
            guid = uuid.UUID(str(fields["conversation_id"]))
            fields["conversation_id"] = str(guid) if guid.int else None
    elif fields["conversation_id"] is not None:
        fields["conversation_id"] = str(fields["conversation_id"])
    return Envelope(id=id, **place, **fields)


def written(spec: Spec, setting: Setting) -> tuple[mapping.Mapped | None, uuid.UUID]:
    envelope = mapping.envelope_of(spec)
    with mapping.producer_of(setting) as producer:
        (mapped,) = mapping.kbatch_maps(producer, "orders", [envelope])
    return mapped, envelope.id


@pytest.mark.parametrize("wire", WIRES)
@given(data=st.data())
def test_what_is_written_is_read(wire: str, data: Any) -> None:
    setting = replace(data.draw(strategies.settings), wire=wire, carry_scheduled_time=wire != "raw")
    spec = data.draw(strategies.specs(setting))
    mapped, id = written(spec, setting)
    if mapped is None:
        return  # expired
    # The place of ID_OF_PLACE, so that an id made of it is that one.
    mapped = mapped._replace(topic="orders", partition=3)
    read = read_envelope(consumed(mapped), wire=wire)
    assert read == expected(spec, setting, mapped, id)
    # and writing it again gives the same record
    if not (wire == "wolverine" and id.int == 0) and read.deliver_by is None:
        with mapping.producer_of(Setting(wire=wire, carry_scheduled_time=wire != "raw")) as producer:
            (again,) = producer._map(None, [read])
        if wire != "wolverine" and (setting.hook_headers or "ce_id" in dict(read.headers)):
            # the same headers, some of them in another place
            assert tuple(again[:5]) == tuple(mapped[:5])
            assert Counter(again[5]) == Counter(mapped.headers)
        else:
            assert tuple(again) == tuple(mapped)


@given(data=st.data(), setting=strategies.settings)
def test_kbatch_and_wolverine_read_each_other(data: Any, setting: Setting) -> None:
    setting = replace(setting, wire=data.draw(st.sampled_from(["kbatch", "wolverine"])))
    mapped, _ = written(data.draw(strategies.specs(setting)), setting)
    if mapped is None:
        return
    as_kbatch, as_wolverine = (read_envelope(consumed(mapped), wire=wire) for wire in ("kbatch", "wolverine"))
    if setting.wire == "wolverine" and not isinstance(as_kbatch, Tombstone):
        # the one name that they do not share
        assert as_kbatch.headers[-1] == ("wolverine-protocol-version", b"1.0")
        as_kbatch = as_kbatch.replace(headers=as_kbatch.headers[:-1])
    assert as_kbatch == as_wolverine


VECTORS = [vector for vector in vectors.load() if isinstance(vector.expected, Record)]


@pytest.mark.parametrize("vector", VECTORS, ids=[vector.name for vector in VECTORS])
def test_the_vectors(vector: vectors.Vector) -> None:
    mapped = mapping.Mapped(*vector.expected[:-1])._replace(topic="orders", partition=3)
    read = read_envelope(consumed(mapped), wire=vector.setting.wire)
    assert read == expected(vector.spec, vector.setting, mapped, vector.spec.arguments["id"])


# -- times, ids, numbers


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2026-11-23T09:16:45.123456Z", MOMENT),
        ("2026-11-23 09:16:45:123456 Z", MOMENT),
        ("2026-11-23T11:16:45.123456+02:00", MOMENT),
        ("2026-11-23t09:16:45.123456z", MOMENT),
        ("2026-11-23T09:16:45.1234564+00:00", MOMENT),  # .NET's seventh digit
        ("2026-11-23T09:16:45.123456400Z", MOMENT),
        ("2026-11-23T09:16:45Z", MOMENT.replace(microsecond=0)),
        ("2026-11-23T09:16:45.1Z", MOMENT.replace(microsecond=100_000)),
        ("0001-01-01T00:00:00Z", datetime(1, 1, 1, tzinfo=timezone.utc)),
        ("9999-12-31 23:59:59:999999 Z", datetime(9999, 12, 31, 23, 59, 59, 999999, timezone.utc)),
    ],
)
@pytest.mark.parametrize(
    ("wire", "header", "field"),
    [
        ("kbatch", "sent-at", "sent_at"),
        ("wolverine", "time-to-send", "scheduled_time"),
        ("wolverine", "deliver-by", "deliver_by"),
        ("cloudevents", "ce_time", "sent_at"),
    ],
)
def test_times(wire: str, header: str, field: str, text: str, time: datetime) -> None:
    headers = [*EVENT, (header, text.encode())] if wire == "cloudevents" else {header: text}
    assert getattr(read_envelope(Consumed(a_headers=headers), wire=wire), field) == time


EVENT = [("ce_specversion", b"1.0"), ("ce_id", str(ID).encode()), ("ce_source", b"/shop"), ("ce_type", b"order")]
NOT_TIMES = [
    b"",
    b"yesterday",
    b"2026-11-23",
    b"2026-11-23T09:16:45",
    b"2026-11-23 09:16:45:123456",
    b"2026-11-23 09:16:45:123 Z",
    b"2026-13-23 09:16:45:123456 Z",
    b"2026-11-23T09:16:61Z",
    b"2026-02-29T00:00:00Z",
    b"0001-01-01T00:00:00+02:00",
    b"9999-12-31T23:59:59-02:00",
    "٢٠٢٦-11-23 09:16:45:123456 Z".encode(),
    b"1795425405",
]
NOT_GUIDS = [text.encode() for text in strategies.not_guids] + [b"{01934a2b-3c4d-7e5f-8a9b-0c1d2e3f4a5b}"]
NOT_COUNTS = [b"", b"-1", b"+1", b"1.0", b"1_0", b" 1", b"one", b"2147483648", b"99999999999", "\u0661".encode()]
NOT_UTF8 = [b"\xff", b"\xed\xa0\x80", b"abc\x80"]
# Headers that a consumer may give as text, which then may have a lone surrogate in it.
SURROGATES = [
    *(("kbatch", name) for name in ("id", "source", "user-name", "sent-at", "attempts")),
    *(("cloudevents", name) for name in ("ce_specversion", "ce_id", "ce_source", "ce_type", "content-type")),
    ("wolverine", "wolverine-protocol-version"),
]


@pytest.mark.parametrize(
    ("wire", "header", "value", "reason"),
    [
        *(("kbatch", "id", value, "must be a UUID") for value in NOT_GUIDS),
        *((wire, "sent-at", value, "must be a time of RFC 3339") for value in NOT_TIMES for wire in WIRES[:2]),
        *(("wolverine", "attempts", value, "must be a whole number from 0 to 2147483647") for value in NOT_COUNTS),
        *(("cloudevents", "ce_attempts", value, "must be a whole number from 0") for value in NOT_COUNTS),
        *(("cloudevents", "ce_expirytime", value, "must be a time of RFC 3339") for value in NOT_TIMES),
        *(
            ("kbatch", header, value, "must be UTF-8")
            for value in NOT_UTF8
            for header in ("id", "source", "deliver-by")
        ),
        *(("cloudevents", header, b"\xff", "must be UTF-8") for header in ("ce_id", "ce_type", "content-type")),
        *((wire, name, "x\ud800", "must be UTF-8") for wire, name in SURROGATES),
        ("cloudevents", "ce_specversion", b"0.3", "must be 1.0"),
        ("cloudevents", "ce_specversion", b"1.1", "must be 1.0"),
    ],
)
def test_what_is_wrong_is_named(wire: str, header: str, value: str | bytes, reason: str) -> None:
    headers = [*EVENT, (header, value)] if wire == "cloudevents" else [("first", b"1"), (header, value)]
    with pytest.raises(DeserializationError) as caught:
        read_envelope(Consumed(b"x", a_headers=headers), wire=wire)
    error = caught.value
    assert str(error).startswith(f"record orders [3] at offset 17: header {header!r} {reason}")
    assert str(error).endswith(f", not {value!r}")
    assert (error.topic, error.partition, error.offset, error.header) == ("orders", 3, 17, header)
    assert str(error).endswith(error.reason)


def test_a_long_value_is_cut_in_the_error() -> None:
    with pytest.raises(DeserializationError) as caught:
        read_envelope(Consumed(a_headers=[("id", b"x" * 100_000)]))
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("text", [str(ID), str(ID).upper(), ID.hex])
def test_ids(text: str) -> None:
    for wire, name in (("kbatch", "id"), ("wolverine", "id"), ("cloudevents", "ce_id")):
        headers = [pair for pair in EVENT if pair[0] != "ce_id"] if wire == "cloudevents" else []
        assert read_envelope(Consumed(a_headers=[*headers, (name, text.encode())]), wire=wire).id == ID


def test_without_an_id_the_place_gives_one() -> None:
    records = [
        Consumed(),
        Consumed(a_offset=18),
        Consumed(a_partition=4),
        Consumed(a_topic="other"),
        Consumed(None, "k"),
        Consumed(a_headers=[("id", None)]),
    ]
    ids = [read_envelope(record).id for record in records]
    assert ids == [read_envelope(record).id for record in records]
    assert len(set(ids[:4])) == 4
    assert ids[4] == ids[5] == ids[0]
    # Without a place there is nothing to make it of.
    nowhere = Consumed(a_offset=None)
    assert read_envelope(nowhere).id != read_envelope(nowhere).id


# -- headers, null values, places


def test_of_several_headers_the_last_counts() -> None:
    headers = [("tenant-id", b"1"), ("x", b"1"), ("tenant-id", b"2"), ("x", b"2"), ("tenant-id", None), ("x", None)]
    read = read_envelope(Consumed(a_headers=headers))
    assert read.tenant_id == "2"
    assert read.headers == (("x", b"1"), ("x", b"2"), ("x", None))


@pytest.mark.parametrize("headers", [None, [], {}, ()])
def test_no_headers(headers: Any) -> None:
    read = read_envelope(Consumed(b"body", b"key", headers))
    assert read == Envelope(
        data=b"body", key=b"key", topic="orders", partition=3, timestamp=1_795_425_405_123, id=ID_OF_PLACE
    )


def test_text_is_as_good_as_bytes() -> None:
    read = read_envelope(Consumed(a_key="k", a_headers={"id": str(ID), "tenant-id": "größe", "x": "1"}))
    assert (read.key, read.id, read.tenant_id, read.headers) == ("k", ID, "größe", (("x", "1"),))


@pytest.mark.parametrize("wire", ["kbatch", "wolverine", "raw"])
def test_a_null_value_is_a_tombstone(wire: str) -> None:
    headers = [("why", b"gone")]
    read = read_envelope(Consumed(None, b"k", headers), wire=wire)
    place = {"topic": "orders", "partition": 3, "timestamp": 1_795_425_405_123}
    assert read == Tombstone(b"k", headers=headers, id=ID_OF_PLACE, **place)


def test_a_null_value_that_is_no_tombstone() -> None:
    # An encoder that answered None, and what has no key to delete.
    read = read_envelope(Consumed(None, b"k", [("message-type", b"order"), ("source", b"shop")]))
    assert type(read) is Envelope
    assert (read.message, read.data, read.message_type, read.source) == (None, None, "order", "shop")
    read = read_envelope(Consumed(None, None, EVENT), wire="cloudevents")
    assert (read.message, read.message_type, read.id) == (None, "order", ID)
    for wire in WIRES:
        read = read_envelope(Consumed(None, None), wire=wire)
        assert (type(read), read.message, read.key) == (Envelope, None, None)


def test_a_record_without_a_place_or_a_time() -> None:
    for record in (
        Consumed(a_topic=None, a_partition=None, a_offset=None, a_timestamp=(0, 5)),
        Consumed(a_topic=None, a_partition=-1, a_offset=-1001, a_timestamp=(1, 0)),
    ):
        read = read_envelope(record)
        assert (read.topic, read.partition, read.timestamp) == (None, None, None)


def test_a_time_of_the_broker() -> None:
    assert read_envelope(Consumed(a_timestamp=(2, 5))).timestamp == 5


def test_a_consumers_error_is_no_envelope() -> None:
    class Failed(Consumed):
        def error(self) -> str:
            return "the broker is gone"

    with pytest.raises(DeserializationError, match="it is an error of the consumer: the broker is gone"):
        read_envelope(Failed(b"text of the error"))


def test_what_is_read_can_be_sent_elsewhere() -> None:
    read = read_envelope(Consumed(b"x", a_headers=[("id", str(ID).encode()), ("tenant-id", b"t"), ("x", b"1")]))
    with kbatch.Producer(mapping.NOWHERE) as producer:
        ((topic, partition, _, _, value, headers),) = producer._map(
            "elsewhere", [read.replace(topic=None, partition=None, timestamp=None)]
        )
    assert (topic, partition, value) == ("elsewhere", -1, b"x")
    assert {("id", str(ID).encode()), ("tenant-id", b"t"), ("x", b"1")} <= set(headers)


# -- records of other clients


def of_aiokafka(value: Any, key: Any, headers: Any, timestamp: Any = 5, timestamp_type: int = 0) -> Any:
    structs = pytest.importorskip("aiokafka.structs", reason="platform: aiokafka has no wheel here")
    return structs.ConsumerRecord("orders", 3, 17, timestamp, timestamp_type, key, value, None, -1, -1, headers)


def of_kafka_python(value: Any, key: Any, headers: Any, timestamp: Any = 5, timestamp_type: int = 0) -> Any:
    module = pytest.importorskip("kafka.consumer.fetcher", reason="platform: kafka-python has no wheel here")
    given = {"topic": "orders", "partition": 3, "offset": 17, "timestamp": timestamp, "timestamp_type": timestamp_type}
    given |= {"key": key, "value": value, "headers": headers}
    return module.ConsumerRecord(**dict.fromkeys(module.ConsumerRecord._fields) | given)


CLIENTS = pytest.mark.parametrize("record", [of_aiokafka, of_kafka_python])


@CLIENTS
def test_the_records_of_other_clients(record: Any) -> None:
    headers = [("id", str(ID).encode()), ("x", b"1"), ("x", b"2"), ("tenant-id", b"t")]
    read = read_envelope(record(b"body", b"key", headers))
    place = {"topic": "orders", "partition": 3, "timestamp": 5}
    users = [("x", b"1"), ("x", b"2")]
    assert read == Envelope(data=b"body", key=b"key", headers=users, id=ID, tenant_id="t", **place)
    assert read_envelope(record(b"", None, ())) == Envelope(data=b"", id=ID_OF_PLACE, **place)
    assert read_envelope(record(None, b"k", ())) == Tombstone(b"k", id=ID_OF_PLACE, **place)
    assert read_envelope(record(b"x", None, EVENT), wire="cloudevents").id == ID


@CLIENTS
def test_the_times_of_other_clients(record: Any) -> None:
    assert read_envelope(record(b"", None, (), 5, 1)).timestamp == 5
    for none in (None, -1, 0):
        assert read_envelope(record(b"", None, (), none)).timestamp is None


@CLIENTS
def test_a_format_of_ones_own_is_given_methods(record: Any) -> None:
    class Own:
        def read(self, record: kbatch.ConsumedRecord) -> Envelope:
            seen.append((record.topic(), record.partition(), record.offset(), record.timestamp(), record.key()))
            return Envelope(data=record.value(), headers=record.headers())

    seen: list[Any] = []
    assert read_envelope(record(b"x", b"k", [("a", b"1")], 5, 1), wire=Own()).headers == (("a", b"1"),)
    read_envelope(record(b"x", b"k", [], None), wire=Own())
    assert seen == [("orders", 3, 17, (2, 5), b"k"), ("orders", 3, 17, (0, 0), b"k")]


@pytest.mark.parametrize(
    ("value", "key", "what"), [({"a": 1}, None, "value"), ("text", None, "value"), (b"", 7, "key"), (b"", {}, "key")]
)
@pytest.mark.parametrize("record", [of_aiokafka, Consumed])
def test_what_a_consumer_has_deserialized(record: Any, value: Any, key: Any, what: str) -> None:
    with pytest.raises(DeserializationError, match=f"its {what} must be bytes.* use a consumer that does not deserial"):
        read_envelope(record(value, key, ()))


@pytest.mark.parametrize("record", [None, b"value", {}, [Consumed()]])
def test_what_is_no_record(record: Any) -> None:
    for wire in ("kbatch", Mine()):
        with pytest.raises(TypeError, match=r"record must be a confluent_kafka\.Message, or .*, not (\w+|None: .*)$"):
            read_envelope(record, wire=wire)


@pytest.mark.parametrize("wire", WIRES)
def test_a_record_is_asked_once_and_may_change_meanwhile(wire: str) -> None:
    asked: Counter[str] = Counter()

    class Changing(Consumed):
        def __getattribute__(self, name: str) -> Any:
            if name in ("topic", "partition", "offset", "timestamp", "key", "value", "headers"):
                return lambda: self.answer(name)
            return super().__getattribute__(name)

        def answer(self, name: str) -> Any:
            asked[name] += 1
            answer = getattr(self, f"a_{name}")
            if name != "headers":
                self.a_headers.clear()  # the list that was given before
            return answer

    headers = [*EVENT, ("id", str(ID).encode()), ("x", b"1" * 100)]
    fixed = read_envelope(Consumed(b"v" * 100, b"k" * 100, headers.copy()), wire=wire)
    assert read_envelope(Changing(b"v" * 100, b"k" * 100, headers.copy()), wire=wire) == fixed
    assert set(asked.values()) == {1}
    assert len(asked) == 7


def test_a_header_that_is_neither_text_nor_bytes() -> None:
    with pytest.raises(DeserializationError, match="header 'id' must be text or bytes, not int"):
        read_envelope(Consumed(a_headers=[("id", 7)]))


# -- what is read is sent on

SPELLINGS = {  # of the format's names, as others write them
    "kbatch": sorted(RESERVED["kbatch"]),
    "wolverine": sorted(RESERVED["wolverine"]),
    "cloudevents": [*CLOUDEVENTS_NAMES, "CE_Id", "Content-Type", "ce_datacontenttype", "ce_subject", "CE_Subject"],
    "raw": ["id"],
}
CONTENTS = [b"", b"1.0", b"7", b"text", str(ID).encode(), str(ID).upper().encode(), b"2026-11-23T09:16:45.1Z", None]
NO_ATTRIBUTES = ("ce_", "ce_sub-ject", "ce_data", "ce_größe")


@st.composite
def foreign_records(draw: st.DrawFn, wire: str) -> Consumed:
    """Records as others write them: any of the format's headers, in any spelling, with anything in it."""
    names = st.sampled_from([*SPELLINGS[wire], "x", "ID"])
    pairs = draw(st.lists(st.tuples(names, st.sampled_from(CONTENTS) | st.binary(max_size=3)), max_size=8))
    if wire == "cloudevents" and draw(st.booleans()):
        pairs = [*EVENT, *pairs, *draw(st.sampled_from([[], [("ce_id", b"7")], [("ce_id", ID.hex.encode())]]))]
    return Consumed(draw(st.sampled_from([None, b"", b"{}"])), draw(st.sampled_from([None, b"", b"k"])), pairs)


@pytest.mark.parametrize("wire", WIRES)
@given(data=st.data())
def test_what_can_be_read_can_be_sent_on(wire: str, data: Any) -> None:
    record = data.draw(foreign_records(wire))
    try:
        read = read_envelope(record, wire=wire)
    except DeserializationError:
        return
    with mapping.producer_of(Setting(wire=wire, carry_scheduled_time=wire != "raw")) as producer:
        result = mapping.kbatch_maps(producer, None, [read])
    if isinstance(result, mapping.Failed):
        # Neither .NET nor CloudEvents has a place for them.
        no_guid = wire == "wolverine" and result.field == "conversation_id"
        no_text = wire == "cloudevents" and result.field == "headers['ce_subject']"
        assert no_guid or no_text
        return
    (mapped,) = result
    if mapped is None:
        return  # expired
    again = read_envelope(consumed(mapped), wire=wire)
    assert type(again) is type(read)
    assert (again.data, again.message) == (read.data, read.message)
    assert sorted(again.headers, key=repr) == sorted(read.headers, key=repr)
    assert again.timestamp == read.timestamp
    assert again.key == read.key or (wire == "wolverine" and not read.key)
    is_tombstone = type(read) is Tombstone
    if wire == "raw" or (is_tombstone and wire != "kbatch"):
        return  # it has the user's headers only
    if wire == "cloudevents" and read.data is None and read.message_type is None:
        return  # no event
    assert again.id == read.id
    for name in (*TEXTS, *TIMES, "attempts"):
        if getattr(read, name) is not None:
            assert getattr(again, name) == getattr(read, name)


@pytest.mark.parametrize("name", NO_ATTRIBUTES)
def test_what_is_no_attribute_is_kept_and_not_sent_on_as_one(name: str) -> None:
    read = read_envelope(Consumed(b"x", a_headers=[*EVENT, (name, b"1")]), wire="cloudevents")
    assert read.headers == ((name, b"1"),)
    with mapping.producer_of(Setting(wire="cloudevents")) as producer:
        with pytest.raises(kbatch.SerializationError) as caught:
            producer._map(None, [read])
        assert caught.value.field == f"headers[{name!r}]"
        producer._map(None, [read.replace(headers=())])


# -- the slow reading, which agrees

# Each part as it should be and as it should not; much of it is a time, an id or a number.
DATES = st.from_regex(r"(2026|0001|9999|0000|1900|2000)-(02|11|12|00|13)-(01|28|29|30|31|32|00)", fullmatch=True)
CLOCKS = st.from_regex(r"(00|09|23|24):(00|59|60):(00|59|60)", fullmatch=True)
PARTS = st.sampled_from(["", ".", ".1", ".123456", ".1234565", ".9999995", ".999999999999", ":123456", ":12345", ",5"])
ZONES = st.sampled_from(
    [
        "Z",
        "z",
        " Z",
        "",
        "+02:00",
        "-02:00",
        "+0200",
        "+23:59",
        "-23:59",
        "+24:00",
        "+02",
        "+2:00",
        "+00:60",
        "Z ",
        "\0",
    ]
)
SEPARATORS = st.sampled_from(["T", "t", " ", "_", ""])
HALF_TIMES = st.builds("{}{}{}{}{}".format, DATES, SEPARATORS, CLOCKS, PARTS, ZONES)
HALF_IDS = st.from_regex(
    r"[0-9a-fA-FgG]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-fA-F]{12}|[0-9a-fA-F]{31,33}", fullmatch=True
)
HALF_COUNTS = st.from_regex(r"[ +]?(0|1|00000000|214748364|999999999)[0-9]{0,3}", fullmatch=True)


@st.composite
def half_texts(draw: st.DrawFn) -> Any:
    """What a reader makes something of, or refuses, as text or as bytes; now and then with a character changed."""
    text = draw(
        HALF_TIMES | HALF_IDS | HALF_COUNTS | st.sampled_from(["", "1.0", "order", "größe", "\ud800", "\u0661"])
    )
    if text and draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(text) - 1))
        text = text[:at] + draw(st.characters()) + text[at + 1 :]
    return text if draw(st.integers(0, 4)) == 0 else text.encode(errors="surrogatepass")


@st.composite
def half_records(draw: st.DrawFn, wire: str) -> Consumed:
    record = draw(foreign_records(wire))
    names = st.sampled_from([*SPELLINGS[wire], *NO_ATTRIBUTES, "x", "\ud800", ""])
    values = half_texts() | st.none() | st.binary(max_size=2) | st.just(7)
    record.a_headers += draw(st.lists(st.tuples(names, values), max_size=4))
    if wire == "cloudevents" and draw(st.integers(0, 4)) == 0:
        record.a_headers.append(("content-type", b"application/cloudevents+json"))
        record.a_value = draw(st.sampled_from([STRUCTURED + b"}", STRUCTURED + b', "data": {"a": 1}}', b"{"]))
    if draw(st.booleans()):
        record.a_headers = tuple(record.a_headers)
    record.a_offset = draw(st.sampled_from([17, 0, 2**40]))
    record.a_timestamp = draw(st.sampled_from([(1, 1_795_425_405_123), (2, 5), (0, 5), (1, 0), (1, -1)]))
    record.a_partition = draw(st.sampled_from([3, 0, 2**31 - 1]))
    return record


def came_of(read: Any, record: Consumed, wire: str) -> Any:
    try:
        return read(record, wire=wire)
    except DeserializationError as error:
        return str(error), error.header


@pytest.mark.parametrize("wire", WIRES)
@given(data=st.data())
def test_the_slow_reading_reads_the_same(wire: str, data: Any) -> None:
    record = data.draw(half_records(wire))
    assert came_of(read_envelope, record, wire) == came_of(slow_read.read_envelope, record, wire)


@given(text=half_texts())
def test_the_slow_reading_reads_the_same_times_ids_and_numbers(text: Any) -> None:
    for name in ("sent-at", "id", "attempts"):
        record = Consumed(a_headers=[(name, text)])
        assert came_of(read_envelope, record, "kbatch") == came_of(slow_read.read_envelope, record, "kbatch")


# -- CloudEvents


def test_attributes_in_any_case() -> None:
    headers = [("CE_SpecVersion", b"1.0"), ("Ce_Id", b"7"), ("ce_Source", b"/shop"), ("CE_TYPE", b"order")]
    headers += [("Content-Type", b"text/plain"), ("CE_Subject", b"s"), ("ce_other", None), ("X", b"1")]
    read = read_envelope(Consumed(b"x", a_headers=headers), wire="cloudevents")
    assert (read.source, read.message_type, read.content_type) == ("/shop", "order", "text/plain")
    assert read.headers == (("ce_id", b"7"), ("ce_subject", b"s"), ("X", b"1"))


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_names_that_are_read_and_not_sent_on(name: str) -> None:
    read = read_envelope(Consumed(a_headers=[(name, b"x")]), wire="raw")
    assert read.headers == ((name, b"x"),)
    with (
        mapping.producer_of(Setting(wire="kbatch")) as producer,
        pytest.raises(kbatch.SerializationError, match="name"),
    ):
        producer._map(None, [read])
    with mapping.producer_of(Setting(wire="raw")) as producer:
        if name:
            with pytest.raises(kbatch.SerializationError, match="NUL"):
                producer._map(None, [read])
        else:
            producer._map(None, [read])


def test_an_empty_content_type_is_none() -> None:
    headers = [*EVENT, ("content-type", b""), ("ce_correlationid", b"")]
    read = read_envelope(Consumed(b"x", a_headers=headers), wire="cloudevents")
    assert (read.content_type, read.correlation_id) == (None, None)


def test_a_null_value_with_a_type_is_an_event_or_nothing() -> None:
    with pytest.raises(DeserializationError, match="no CloudEvent: header 'ce_specversion' is missing"):
        read_envelope(Consumed(None, b"k", [("ce_type", b"order")]), wire="cloudevents")


@pytest.mark.parametrize("name", ["ce_specversion", "ce_id", "ce_source", "ce_type"])
@pytest.mark.parametrize("value", [b"", None, "absent"])
def test_an_event_has_what_is_required(name: str, value: Any) -> None:
    headers = [pair for pair in EVENT if pair[0] != name]
    if value != "absent":
        headers.append((name, value))
    with pytest.raises(DeserializationError, match=f"no CloudEvent: header '{name}' is missing or empty") as caught:
        read_envelope(Consumed(b"x", a_headers=headers), wire="cloudevents")
    assert caught.value.header == name


def test_an_events_id_is_any_text() -> None:
    def read(id: str, source: bytes) -> Envelope:
        headers = [*EVENT[:1], ("ce_id", id.encode()), ("ce_source", source), *EVENT[3:], ("x", b"1")]
        return read_envelope(Consumed(b"x", a_headers=headers), wire="cloudevents")

    first = read("partition:0/offset:5", b"/a")
    assert first.headers == (("ce_id", b"partition:0/offset:5"), ("x", b"1"))
    assert first.id == read("partition:0/offset:5", b"/a").id
    assert len({first.id, read("partition:0/offset:5", b"/b").id, read("partition:0/offset:6", b"/a").id}) == 3


STRUCTURED = b"""{"specversion": "1.0", "id": "01934a2b-3c4d-7e5f-8a9b-0c1d2e3f4a5b", "source": "/shop",
"type": "order", "time": "2026-11-23T09:16:45.123456Z",
"expirytime": null, "count": 3, "hot": true, "dataclass": "x" """


@pytest.mark.parametrize(
    ("rest", "data", "content_type"),
    [
        (b'"data": {"a": [1,  2.50]}', b'{"a": [1,  2.50]}', None),
        (b'"data": {"a": 1}, "datacontenttype": "application/json"', b'{"a": 1}', "application/json"),
        (b'"data": "x", "datacontenttype": "text/x+JSON; charset=utf-8"', b'"x"', "text/x+JSON; charset=utf-8"),
        (b'"data": "<a>\\u00fc</a>", "datacontenttype": "text/xml"', "<a>ü</a>".encode(), "text/xml"),
        (b'"data": {"a": 1}, "datacontenttype": "application/avro"', b'{"a": 1}', "application/avro"),
        (b'"data": null', b"null", None),
        (b'"data": null, "datacontenttype": "text/plain"', None, "text/plain"),
        (b'"data_base64": "AP8=", "datacontenttype": "application/avro"', b"\x00\xff", "application/avro"),
        (b'"data_base64": ""', b"", None),
        (b'"hot2": false', None, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("media", ["application/cloudevents+json", "Application/CloudEvents+JSON; charset=UTF-8"])
def test_an_event_in_structured_mode(media: str, rest: bytes, data: bytes | None, content_type: str | None) -> None:
    headers = [("x", b"1"), ("content-type", b"text/plain"), ("content-type", media.encode()), ("ce_id", b"7")]
    read = read_envelope(Consumed(STRUCTURED + b"," + rest + b"}", b"key", headers), wire="cloudevents")
    assert type(read) is Envelope
    assert (read.data, read.content_type) == (data, content_type)
    assert (read.message is None) == (data is None)
    assert (read.id, read.source, read.message_type, read.sent_at) == (ID, "/shop", "order", MOMENT)
    assert (read.key, read.deliver_by) == (b"key", None)
    users = dict(read.headers)
    assert users.pop("ce_hot2", None) in (None, b"false")
    assert users == {"ce_count": b"3", "ce_hot": b"true", "ce_dataclass": b"x", "x": b"1"}


@pytest.mark.parametrize(
    ("value", "media", "reason"),
    [
        (b"", b"application/cloudevents+json", "its value is no CloudEvent in JSON"),
        (b"[]", b"application/cloudevents+json", "its value is no CloudEvent in JSON"),
        (b"{", b"application/cloudevents+json", "its value is no CloudEvent in JSON"),
        (b'{"a": "\xff"}', b"application/cloudevents+json", "its value is no CloudEvent in JSON"),
        (STRUCTURED + b', "b": {}}', b"application/cloudevents+json", "the attribute 'b' must be text"),
        (STRUCTURED + b', "b": 1.5}', b"application/cloudevents+json", "the attribute 'b' must be text"),
        (STRUCTURED + b', "datacontenttype": []}', b"application/cloudevents+json", "the attribute 'datacontenttype'"),
        (STRUCTURED + b', "data_base64": "!"}', b"application/cloudevents+json", "its value is no CloudEvent in JSON"),
        (STRUCTURED + b', "b": ' + b"[" * 100_000, b"application/cloudevents+json", "its value is no CloudEvent"),
        (b"{}", b"application/cloudevents+json", "header 'ce_specversion' is missing"),
        (STRUCTURED.replace(b'"1.0"', b'"0.3"') + b"}", b"application/cloudevents+json", "must be 1.0"),
        (b"x", b"application/cloudevents+avro", "of structured CloudEvents only JSON is read"),
        (b"x", b"application/cloudevents", "of structured CloudEvents only JSON is read"),
        (b"x", b"application/cloudevents-batch+json", "of structured CloudEvents only JSON is read"),
    ],
)
def test_a_structured_event_that_cannot_be_read(value: bytes, media: bytes, reason: str) -> None:
    with pytest.raises(DeserializationError, match=reason):
        read_envelope(Consumed(value, a_headers=[("content-type", media)]), wire="cloudevents")


# -- formats of the user's own


class Mine:
    def read(self, record: kbatch.ConsumedRecord) -> Any:
        value = record.value()
        if value == b"raise":
            raise LookupError("no such thing")
        if value == b"refuse":
            raise DeserializationError("mine", topic=None, partition=None, offset=None, header=None)
        return value if value == b"other" else Envelope(data=value, id=ID)


def test_a_format_of_ones_own() -> None:
    assert read_envelope(Consumed(b"x"), wire=Mine()) == Envelope(data=b"x", id=ID)
    with pytest.raises(DeserializationError, match=r"at offset 17: .* could not read it: no such thing") as caught:
        read_envelope(Consumed(b"raise"), wire=Mine())
    assert isinstance(caught.value.__cause__, LookupError)
    with pytest.raises(DeserializationError) as caught:
        read_envelope(Consumed(b"refuse"), wire=Mine())
    assert (caught.value.reason, caught.value.__cause__) == ("mine", None)
    with pytest.raises(DeserializationError, match=r"gave no kbatch\.Envelope but bytes"):
        read_envelope(Consumed(b"other"), wire=Mine())


@pytest.mark.parametrize("wire", ["xml", "", None, object()])
def test_there_is_no_such_format(wire: Any) -> None:
    with pytest.raises(kbatch.ConfigError, match="wire must be"):
        read_envelope(Consumed(), wire=wire)


def test_microseconds_are_rounded() -> None:
    headers = {"sent-at": "2026-11-23T09:16:45.1234566Z"}
    assert read_envelope(Consumed(a_headers=headers)).sent_at == MOMENT + timedelta(microseconds=1)
