"""Hypothesis strategies for envelopes, good and bad, biased to where encoders go wrong."""

import uuid
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from types import MappingProxyType
from typing import Any

from hypothesis import strategies as st

from tests.messages import ENCODERS, MESSAGES, Order
from tests.reference import RESERVED, TEXT_FIELDS, Setting, Spec, map_one

MANY_HEADERS = 99_980  # with those of a wire format at most 100,000
# Where the length of a header's name or value takes one byte more.
VARINT_EDGES = (63, 64, 8191, 8192)


class Text(str):
    """Text all the same."""

    __slots__ = ()


class Octets(bytes):
    """Bytes all the same."""


class Time(datetime):
    """A time all the same; its arithmetic is not datetime's, as pendulum's and pandas'."""

    def __sub__(self, other: Any) -> Any:
        raise AssertionError("a subclass's arithmetic")

    __rsub__ = __sub__

    def utcoffset(self) -> Any:
        raise AssertionError("a subclass's offset")


class Once(Mapping[str, Any]):
    """A mapping that is no dict."""

    def __init__(self, pairs: Any) -> None:
        self._pairs = dict(pairs)

    def __getitem__(self, name: str) -> Any:
        return self._pairs[name]

    def __iter__(self) -> Any:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)


# --- text -----------------------------------------------------------------------------------------------------------

# The very same objects again and again, which kbatch may write once, and equal ones that are not the same.
SHARED = tuple("".join(part) for part in (("web", "-shop"), ("größe",), ("漢字",), ("\U0001d11e",), ("x" * 70,), ("",)))

no_surrogates = st.characters(exclude_categories=["Cs"])
texts = st.one_of(
    st.sampled_from(SHARED),
    st.sampled_from(SHARED).map(lambda text: "".join(list(text))),
    st.text(no_surrogates, max_size=20),
    st.text(st.characters(max_codepoint=0x7F), max_size=20),
    st.text(st.characters(min_codepoint=0x80, max_codepoint=0xFF), max_size=20),
    st.text(st.characters(min_codepoint=0x10000), max_size=20),
    st.sampled_from(VARINT_EDGES).map(lambda size: "v" * size),
    st.text(no_surrogates, max_size=5).map(Text),
)
torn_texts = st.builds(
    lambda before, torn, after: before + torn + after,
    st.text(no_surrogates, max_size=3),
    st.sampled_from(["\ud800", "\udbff", "\udc00", "\udfff", "\ud83d\ud83d", "\udc80"]),
    st.text(no_surrogates, max_size=3),
)
octets = st.one_of(
    st.binary(max_size=20),
    st.sampled_from(VARINT_EDGES).map(bytes),
    st.binary(max_size=5).map(Octets),
)
keys = st.one_of(st.none(), texts, octets, st.integers(1, 50_000).map(lambda size: b"k" * size))
topics = st.one_of(
    st.sampled_from(["orders", "t", "A-z_0.9", "t" * 249]),
    st.text("abcXYZ019._-", min_size=1, max_size=249).filter(lambda topic: topic not in (".", "..")),
)
not_text = st.sampled_from([5, 1.5, b"bytes", ("tuple",), object, True])
not_text_nor_octets = st.sampled_from([5, 1.5, bytearray(b"x"), memoryview(b"x"), ["list"], ("a", "b"), object])

# --- times, numbers, ids --------------------------------------------------------------------------------------------

offsets = st.timedeltas(timedelta(hours=-24, microseconds=1), timedelta(hours=24, microseconds=-1))
zones = st.one_of(st.just(timezone.utc), st.timezones(), offsets.map(timezone))
# A day from either end, so that every one of them is a time in UTC too.
FIRST, LAST = datetime(1, 1, 2), datetime(9999, 12, 30)
times = st.one_of(
    st.datetimes(FIRST, LAST, timezones=zones),
    st.sampled_from(
        [
            datetime(1969, 12, 31, 23, 59, 59, 999999, timezone.utc),
            datetime(1970, 1, 1, tzinfo=timezone.utc),
            datetime(1900, 3, 1, tzinfo=timezone(timedelta(minutes=1))),
            datetime(2000, 2, 29, 23, 59, 59, 999999, timezone(timedelta(hours=-23, minutes=-59))),
            datetime.min.replace(tzinfo=timezone.utc),
            datetime.max.replace(tzinfo=timezone.utc),
        ]
    ),
    st.datetimes(FIRST, LAST).map(lambda t: Time(*t.timetuple()[:6], t.microsecond, tzinfo=timezone.utc)),
)
# Nothing near now: whether a test's envelope has expired must not depend on the clock.
deadlines = st.one_of(
    st.datetimes(datetime(2100, 1, 1), LAST, timezones=zones),
    st.datetimes(datetime(2100, 1, 1), LAST, timezones=zones),
    st.datetimes(FIRST, datetime(2020, 1, 1), timezones=zones),
)
past_times = st.datetimes(FIRST, datetime(2020, 1, 1), timezones=zones)
future_times = st.datetimes(datetime(2100, 1, 1), LAST, timezones=zones)
ids = st.one_of(st.uuids(), st.sampled_from([uuid.UUID(int=0), uuid.UUID(int=2**128 - 1)]))
partitions = st.one_of(st.none(), st.sampled_from([0, 1, 2**31 - 1]), st.integers(0, 2**31 - 1))
timestamps = st.one_of(st.none(), st.sampled_from([1, 1_795_425_405_123, 2**63 - 1]), st.integers(1, 2**63 - 1))
attempts = st.one_of(st.sampled_from([0, 1, 9, 10, 2**31 - 1]), st.integers(0, 2**31 - 1))

# --- headers --------------------------------------------------------------------------------------------------------

ALL_RESERVED = frozenset().union(*RESERVED.values())
names = texts.filter(lambda name: name != "" and "\0" not in name and name not in ALL_RESERVED)
further_names = st.sampled_from(
    ["saga-id", "reply-requested", "reply-uri", "ack-requested", "is-response", "accepted-content-types", "ID", "ce_id"]
)
values = st.one_of(st.none(), texts, octets)
pairs = st.tuples(st.one_of(names, names, further_names), values)
few_headers = st.lists(pairs, max_size=6)
# What has the name of an attribute of CloudEvents is one, of legal name and text.
attribute_names = st.sampled_from(["ce_subject", "ce_dataschema", "ce_traceparent", "ce_7", "ce_partitionkey"])
cloudevents_pairs = st.one_of(
    pairs.filter(lambda pair: not pair[0].lower().startswith("ce_") and pair[0].lower() != "content-type"),
    st.tuples(attribute_names, st.one_of(texts, texts.map(lambda text: text.encode()))),
)


# Records that others have stored may have headers without a name.
raw_pairs = st.one_of(pairs, pairs, st.tuples(st.just(""), values))


def headers_of(wire: str) -> st.SearchStrategy[Any]:
    pairs_of_wire = {"cloudevents": cloudevents_pairs, "raw": raw_pairs}.get(wire, pairs)
    few = st.lists(pairs_of_wire, max_size=6)
    return st.one_of(
        few,
        few,
        few.map(tuple),
        few.map(lambda some: [list(pair) for pair in some]),
        few.map(dict),
        few.map(lambda some: MappingProxyType(dict(some))),
        few.map(Once),
        st.none(),
        st.lists(pairs_of_wire, min_size=20, max_size=40),
    )


headers = {wire: headers_of(wire) for wire in RESERVED}
# An event's id of its own, once.
event_ids = st.tuples(st.just("ce_id"), texts.filter(len) | texts.filter(len).map(lambda text: text.encode()))
headers["cloudevents"] |= st.builds(lambda some, id: [*some, id], st.lists(cloudevents_pairs, max_size=3), event_ids)

# --- bodies ---------------------------------------------------------------------------------------------------------

plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(no_surrogates),
    st.binary(max_size=9),
)
json_values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(no_surrogates), inner, max_size=4)
)
class_messages = st.sampled_from(list(MESSAGES.values())).map(lambda of_class: of_class(id=7))
messages = st.one_of(
    json_values, class_messages, st.builds(Order, id=st.integers(0, 2**31), note=st.text(no_surrogates))
)
unencodable = st.sampled_from([object(), {"a": object()}, [1, 1j], {1j: 2}, "\ud800", {"deep": ["\udfff"]}])
buffers = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=20).map(Octets),
    st.binary(max_size=200).map(bytearray),
    st.binary(max_size=200).map(memoryview),
    st.integers(60_000, 70_000).map(bytes),
)

# --- envelopes ------------------------------------------------------------------------------------------------------

settings = st.builds(
    Setting,
    wire=st.sampled_from(list(RESERVED)),
    source=st.sampled_from([None, "fleet-1", ""]),
    encoder=st.sampled_from(list(ENCODERS.values())),
    hook_headers=st.sampled_from([(), (("traceparent", "00-ab-cd-01"), ("baggage", None))]),
    carry_scheduled_time=st.booleans(),
).map(lambda setting: replace(setting, carry_scheduled_time=setting.carry_scheduled_time and setting.wire != "raw"))

_optional: dict[str, Any] = {
    "key": keys,
    "topic": topics,
    "partition": partitions,
    "timestamp": timestamps,
    "id": ids,
    **dict.fromkeys(TEXT_FIELDS, texts),
    "sent_at": times,
    "deliver_by": deadlines,
    "attempts": attempts,
}


def conversation_ids(wire: str) -> st.SearchStrategy[Any]:
    if wire != "wolverine":
        return st.one_of(texts, ids)
    return st.one_of(ids, ids.map(str), ids.map(lambda guid: str(guid).upper()), ids.map(lambda guid: guid.hex))


@st.composite
def specs(draw: st.DrawFn, setting: Setting) -> Spec:
    """A good envelope or tombstone for the setting's wire."""
    if draw(st.integers(0, 7)) == 0:
        names = ("topic", "partition", "timestamp", "id", "sent_at")
        optional = {name: _optional[name] for name in names} | {"headers": headers[setting.wire]}
        key = draw(st.one_of(texts, octets))
        return Spec({"key": key, **draw(st.fixed_dictionaries({}, optional=optional))}, tombstone=True)
    body = draw(st.one_of(st.fixed_dictionaries({"message": messages}), st.fixed_dictionaries({"data": buffers})))
    optional = {**_optional, "headers": headers[setting.wire], "conversation_id": conversation_ids(setting.wire)}
    optional["scheduled_time"] = times if setting.carry_scheduled_time else past_times
    required = {}
    if setting.wire == "cloudevents":
        optional |= dict.fromkeys(NEVER_EMPTY, texts.filter(len))
        if not setting.source:
            required["source"] = optional.pop("source")
    return Spec({**body, **draw(st.fixed_dictionaries(required, optional=optional))})


# Of CloudEvents: the attributes that are required, or may be absent but not empty.
NEVER_EMPTY = ("source", "message_type", "content_type", "correlation_id")


@st.composite
def spoilt(draw: st.DrawFn, setting: Setting) -> Spec:
    """An envelope that the constructor takes and the mapping must refuse."""
    spec = draw(specs(setting))
    arguments = {name: value for name, value in spec.arguments.items() if name != "deliver_by"}
    # Tombstones and the raw wire write, and so look at, less.
    faults = ["topic", "key", "headers"]
    if not spec.tombstone:
        faults += ["message"] + ([*TEXT_FIELDS, "conversation_id"] if setting.wire != "raw" else [])
        faults += [] if setting.carry_scheduled_time else ["scheduled_time"]
    for fault in draw(st.lists(st.sampled_from(faults), min_size=1, max_size=2, unique=True)):
        if fault == "message":
            arguments.pop("data", None)
            arguments["message"] = draw(unencodable if hasattr(setting.encoder, "encode") else st.just(Unprintable()))
        elif fault == "headers":
            arguments["headers"] = draw(bad_headers(setting))
        elif fault == "key":
            arguments["key"] = draw(st.one_of(torn_texts, not_text_nor_octets))
        elif fault == "topic":
            arguments["topic"] = draw(st.one_of(torn_texts, not_text, st.sampled_from(bad_topics)))
        elif fault == "scheduled_time":
            arguments[fault] = draw(future_times)
        elif fault == "conversation_id" and setting.wire == "wolverine":
            arguments[fault] = draw(st.one_of(torn_texts, not_text, st.sampled_from(not_guids)))
        elif fault in NEVER_EMPTY and setting.wire == "cloudevents":
            arguments[fault] = draw(st.one_of(torn_texts, not_text, st.just("")))
        else:
            arguments[fault] = draw(st.one_of(torn_texts, not_text))
    return Spec(arguments, spec.tombstone)


class Unprintable:
    """What the encoder of one's own cannot encode."""

    def __repr__(self) -> str:
        raise ValueError("no")


bad_topics = ["", ".", "..", "a\0b", "\0", "a b", "größe", "a/b", "orders\n", "t" * 250, "t" * 600]

not_attributes = [
    ("ce_", "empty"),
    ("CE_subject", "capitals"),
    ("ce_Subject", "capitals"),
    ("Ce_subject", "capitals"),
    ("cE_subject", "capitals"),
    ("ce_sub-ject", "a dash"),
    ("ce_sub_ject", "an underscore"),
    ("ce_größe", "not ASCII"),
    ("ce_subject ", "a space"),
    ("Content-Type", "text/plain"),
    ("CONTENT-TYPE", "text/plain"),
    ("ce_subject", None),
    ("ce_subject", b"\xff"),
    ("ce_subject", b"\xed\xa0\x80"),
    ("ce_id", ""),
    ("ce_id", b"\xff"),
]

not_guids = [
    "",
    "conv-1",
    "0193aaaa-bbbb-7ccc-8ddd-eeeeffff000",
    "0193aaaa-bbbb-7ccc-8ddd-eeeeffff00000",
    "0193aaaa-bbbb-7ccc-8ddd-eeeeffff000g",
    "0193aaaabbbb-7ccc-8ddd-eeee-ffff0000",
    "0193aaaa-bbbb-7ccc-8ddd-eeeeffff000\u0660",
    " 193aaaa-bbbb-7ccc-8ddd-eeeeffff0000",
    "0193aaaa_bbbb-7ccc-8ddd-eeeeffff0000",
    "-----------------------------------0",
]


@st.composite
def bad_headers(draw: st.DrawFn, setting: Setting) -> list[tuple[Any, Any]]:
    bad_names = st.one_of(torn_texts, not_text, st.sampled_from(["\0", "a\0"]))
    if setting.wire != "raw":
        bad_names |= st.just("")
    if RESERVED[setting.wire]:
        bad_names |= st.sampled_from(sorted(RESERVED[setting.wire]))
    bad = draw(st.one_of(st.tuples(bad_names, values), st.tuples(names, torn_texts | not_text_nor_octets)))
    some = draw(few_headers)
    if setting.wire == "cloudevents":
        bad = draw(st.one_of(st.just(bad), st.sampled_from(not_attributes)))
        some = draw(st.lists(cloudevents_pairs, max_size=6))
    some.insert(draw(st.integers(0, len(some))), bad)
    return some


@st.composite
def sized(draw: st.DrawFn, setting: Setting, off: int) -> Spec:
    """An envelope whose wire size is `setting.message_max_bytes` and `off` bytes more."""
    spec = draw(specs(setting))
    arguments = {"id": uuid.UUID(int=7), **spec.arguments}
    for name in ("message", "deliver_by"):
        arguments.pop(name, None)
    arguments["data"] = b""
    arguments.setdefault("topic", "orders")
    room = map_one(None, Spec(arguments), setting)
    if isinstance(room, frozenset):  # its headers alone are more
        arguments.pop("headers", None)
        arguments["key"] = None
        for name in TEXT_FIELDS:
            arguments.pop(name, None)
        if setting.wire == "cloudevents":
            arguments["source"] = "/"
        room = map_one(None, Spec(arguments), setting)
    size = setting.message_max_bytes + off - room.size
    arguments["data"] = draw(st.sampled_from([bytes, bytearray]))(size)
    return Spec(arguments)
