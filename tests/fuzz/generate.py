"""Envelopes that are as nasty as a caller's can be, by a seed: the same number makes the same batch."""

import array
import uuid
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from random import Random
from types import MappingProxyType
from typing import Any

from tests.messages import ENCODERS, MESSAGES
from tests.reference import RESERVED, TEXT_FIELDS, Setting, Spec
from tests.strategies import (
    NEVER_EMPTY,
    SHARED,
    VARINT_EDGES,
    Octets,
    Once,
    Text,
    Time,
    Unprintable,
    bad_topics,
    not_attributes,
    not_guids,
)


class Number(int):
    """A number all the same."""


def released() -> memoryview:
    view = memoryview(b"gone")
    view.release()
    return view


# What is not what it should be, by names under which the corpus keeps it.
ODD: dict[str, Any] = {
    "object": object(),
    "class": object,
    "complex": 1j,
    "unprintable": Unprintable(),
    "released": released(),
    "strided": memoryview(b"abcdef")[::2],
    "fortran": memoryview(b"abcdef").cast("B", (2, 3)),
    "wide": memoryview(array.array("I", [1, 2, 3])),
    "array": array.array("d", [0.5, 1.5]),
    "no data": memoryview(b""),
}
BUFFERS = ("released", "strided", "fortran", "wide", "array", "no data")
NEVER_BUFFERS = ("object", "class", "complex", "unprintable")

SETTINGS = [
    Setting(
        wire=wire,
        source=source,
        encoder=encoder,
        hook_headers=hook_headers,
        message_max_bytes=message_max_bytes,
        body_max_bytes=body_max_bytes,
        carry_scheduled_time=source is None and wire != "raw",
    )
    for wire in RESERVED
    for encoder in ENCODERS.values()
    for source, hook_headers, message_max_bytes, body_max_bytes in (
        (None, (), 1_000_000, 1_048_576 * 1024),
        ("fleet-ü", (("traceparent", "00-ab-cd-01"), ("baggage", None), ("h", b"\xff")), 2_000, 1024),
    )
]
# The odd one in between starts at the mark of a character's length in UTF-8.
ALPHABETS = (
    "abcXYZ019._-",
    "".join(map(chr, range(128))),
    "\x00\x7f\x80\xff\u0100\u07ff\u0800\ud7ff\ue000\ufeff\uffff\U00010000\U0010ffff",
    "äöüßéñ漢字かなкириллицаعربى😀👩‍👩‍👧\u202e\u200d\u0301",
)
TORN = ("\ud800", "\udbff", "\udc00", "\udfff", "\ud83d\ud83d", "\udc80", "\ude00\ud83d")
HEADER_NAMES = ("h", "trace", "traceparent", "saga-id", "ID", "Id", "id ", "größe", "x" * 64, "n" * 63)
ATTRIBUTE_NAMES = ("ce_subject", "ce_traceparent", "ce_7", "ce_id")
EDGE_TIMES = (
    datetime.min.replace(tzinfo=timezone.utc),
    datetime.max.replace(tzinfo=timezone.utc),
    datetime(1969, 12, 31, 23, 59, 59, 999999, timezone.utc),
    datetime(1970, 1, 1, tzinfo=timezone.utc),
    datetime(2000, 2, 29, 23, 59, 59, 999999, timezone(timedelta(hours=-23, minutes=-59))),
    datetime(1900, 3, 1, tzinfo=timezone(timedelta(seconds=1, microseconds=1))),
    datetime(1600, 2, 29, tzinfo=timezone(timedelta(hours=23, minutes=59))),
)
NUMBERS = (0, 1, 9, 10, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -1, -(2**31), 10**30)
HUGE = 70_000


class Nasty:
    """Draws envelopes. `spoil` is how often, of a thousand, a value is of a wrong kind."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = Random(seed << 40 | number)
        self.spoil = self.random.choice((0, 0, 5, 60))
        self.wire = "kbatch"

    def rarely(self, of_a_thousand: int) -> bool:
        return self.random.random() * 1000 < of_a_thousand

    def pick(self, some: Sequence[Any]) -> Any:
        return some[int(self.random.random() * len(some))]

    def batch(self) -> tuple[Setting, list[Spec]]:
        setting = self.pick(SETTINGS)
        self.wire = setting.wire
        size = self.pick((0, 1, 1, 2, 5, 8, 13, 40))
        return setting, [self.spec(setting) for _ in range(size)]

    def spec(self, setting: Setting) -> Spec:
        roll = self.random.random()
        arguments: dict[str, Any] = {}
        if roll < 0.1:
            arguments["key"] = self.key() if self.rarely(980) else self.wrong()
            if arguments["key"] is None:
                arguments["key"] = ""
        elif roll < 0.4:
            arguments["data"] = self.buffer()
        else:
            arguments["message"] = self.message()
        for name, draw, share in COMMON:
            if self.random.random() < share:
                arguments[name] = draw(self)
        if roll >= 0.1:
            for name, draw, share in FURTHER:
                if self.random.random() < share:
                    arguments[name] = draw(self)
            if self.random.random() < 0.3:
                wolverine = setting.wire == "wolverine"
                arguments["conversation_id"] = self.guid() if wolverine else self.pick((self.id, self.text))()
        if self.wire == "cloudevents" and not self.rarely(20):
            # Without a source, and with an empty text where one is needed, all would be refused.
            if roll >= 0.1 and setting.source is None and arguments.get("source") in (None, ""):
                arguments["source"] = "/shop"
            for name in NEVER_EMPTY:
                if arguments.get(name) == "":
                    arguments[name] = "x"
        return Spec(arguments, tombstone=roll < 0.1)

    # --- parts

    def wrong(self) -> Any:
        return self.pick((5, 1.5, b"bytes", ("tuple",), True, "", bytearray(b"x"), *ODD.values(), *self.torn()))

    def torn(self) -> tuple[str, str]:
        torn = self.pick(TORN)
        return torn, self.plain_text() + torn + self.plain_text()

    def plain_text(self) -> str:
        alphabet = self.pick(ALPHABETS)
        return "".join([self.pick(alphabet) for _ in range(self.pick((0, 1, 2, 3, 7, 20)))])

    def text(self) -> Any:
        roll = self.random.random()
        if roll * 1000 < self.spoil:
            return self.wrong()
        if roll < 0.5:
            return self.pick(SHARED)
        if roll < 0.55:
            return "v" * self.pick(VARINT_EDGES[:2] if self.rarely(900) else VARINT_EDGES)
        if roll < 0.6:
            return Text(self.plain_text())
        if roll < 0.62:
            return None
        return self.plain_text()

    def octets(self) -> bytes:
        roll = self.random.random()
        if roll < 0.05:
            return Octets(self.random.randbytes(5))
        if roll < 0.1:
            return bytes(self.pick(VARINT_EDGES))
        return self.random.randbytes(self.pick((0, 1, 16, 200)))

    def key(self) -> Any:
        roll = self.random.random()
        if roll < 0.001:
            return b"k" * HUGE
        return self.octets() if roll < 0.3 else self.text()

    def topic(self) -> Any:
        roll = self.random.random()
        if roll * 1000 < self.spoil:
            return self.pick((self.wrong(), self.pick(bad_topics)))
        if roll < 0.2:
            return "".join([self.pick("abcXYZ019_-") for _ in range(self.pick((1, 2, 20)))])
        return self.pick(("orders", "t", "A-z_0.9", "t" * 249, Text("orders"), "..."))

    def number(self, low: int, high: int) -> Any:
        roll = self.random.random()
        if roll * 1000 < self.spoil:
            return self.pick((*NUMBERS, True, 1.0, "1", b"1"))
        if roll < 0.3:
            return self.pick((low, low + 1, high, high - 1, 9, 10, 99, 100))
        return Number(self.random.randint(low, high)) if roll < 0.35 else self.random.randint(low, high)

    def partition(self) -> Any:
        return self.number(0, 2**31 - 1)

    def timestamp(self) -> Any:
        return self.number(1, 2**63 - 1)

    def id(self) -> Any:
        roll = self.random.random()
        if roll * 1000 < self.spoil / 2:
            return self.pick(("0193aaaa-bbbb-7ccc-8ddd-eeeeffff0000", 5, b"x" * 16, object))
        if roll < 0.1:
            return self.pick((uuid.UUID(int=0), uuid.UUID(int=2**128 - 1)))
        return uuid.UUID(int=self.random.getrandbits(128))

    def guid(self) -> Any:
        roll = self.random.random()
        if roll * 1000 < self.spoil:
            return self.pick((self.pick(not_guids), *self.torn(), 5, b"x"))
        of = self.pick((uuid.UUID(int=0), uuid.UUID(int=self.random.getrandbits(128))))
        return self.pick((of, str(of), str(of).upper(), of.hex, Text(of)))

    def time(self) -> Any:
        roll = self.random.random()
        if roll * 1000 < self.spoil:
            return self.pick(
                (
                    datetime(2026, 11, 23),
                    0,
                    "2026-11-23T00:00:00Z",
                    datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=1))),
                    datetime(9999, 12, 31, 23, tzinfo=timezone(timedelta(hours=-2))),
                )
            )
        if roll < 0.2:
            return self.pick(EDGE_TIMES)
        return self.moment(1, 9998)

    def moment(self, first_year: int, last_year: int) -> datetime:
        draw = self.random.randint
        zone = timezone.utc if self.rarely(500) else timezone(timedelta(microseconds=draw(-86399999999, 86399999999)))
        day = draw(2, 28)
        parts = draw(first_year, last_year), draw(1, 12), day, draw(0, 23), draw(0, 59), draw(0, 59), draw(0, 999999)
        return (Time if self.rarely(50) else datetime)(*parts, zone)

    def deadline(self) -> Any:
        # Nothing near now: what has expired must not depend on the clock.
        if self.rarely(self.spoil):
            return self.pick((datetime(2126, 11, 23), 0, "soon"))
        if self.rarely(100):
            return self.pick((EDGE_TIMES[0], EDGE_TIMES[1], EDGE_TIMES[2]))
        return self.moment(2101, 9998) if self.rarely(800) else self.moment(1, 2019)

    def attempts(self) -> Any:
        return self.number(0, 2**31 - 1)

    def header_name(self) -> Any:
        if self.rarely(self.spoil / 3):
            of_wires = (*sorted(RESERVED["wolverine"] | RESERVED["cloudevents"]), *(name for name, _ in not_attributes))
            return self.pick(("", "\0", "a\0", *self.torn(), *of_wires, 5, b"h", None, object))
        name = self.pick(HEADER_NAMES) if self.rarely(700) else self.plain_text()
        return name if name and "\0" not in name else "h"

    def header_value(self) -> Any:
        roll = self.random.random()
        if roll * 1000 < self.spoil / 3:
            return self.wrong()
        if roll < 0.1:
            return None
        return self.octets() if roll < 0.3 else self.text()

    def attribute(self) -> tuple[str, Any]:
        if self.rarely(self.spoil):
            return self.pick(not_attributes)
        text = self.plain_text() or "1"
        return self.pick(ATTRIBUTE_NAMES), self.pick((text, text.encode()))

    def headers(self) -> Any:
        if self.rarely(self.spoil):
            return self.pick(("ab", b"ab", 5, ["ab"], [("a",)], [("a", "b", "c")], [5], ["a", "b"]))
        if self.rarely(20):
            return None
        count = self.pick((0, 1, 2, 3, 6)) if self.rarely(970) else self.pick((40, 1000))
        pairs: list[Any] = [(self.header_name(), self.header_value()) for _ in range(count)]
        if count and self.rarely(300):
            pairs[-1] = self.attribute()
        if count >= 40:
            pairs[1:] = pairs[1:2] * (count - 1)
        roll = self.random.random()
        if roll < 0.5:
            return pairs
        if roll < 0.6:
            return tuple(pairs)
        if roll < 0.7:
            return [list(pair) for pair in pairs]
        kind = dict if roll < 0.8 else Once if roll < 0.9 else lambda some: MappingProxyType(dict(some))
        return kind(pairs)

    def buffer(self) -> Any:
        roll = self.random.random()
        if roll < 0.003:
            return self.pick((bytes, bytearray))(HUGE)
        if roll * 1000 < self.spoil:
            return ODD[self.pick((*BUFFERS, *NEVER_BUFFERS))]
        if roll < 0.6:
            return self.octets()
        return self.pick((bytearray, memoryview, bytearray, memoryview, array_of))(self.octets())

    def message(self, depth: int = 0) -> Any:
        roll = self.random.random()
        if roll * 1000 < self.spoil:
            return self.pick((object, 1j, [1, object], {1j: 2}, {"a": "\ud800"}, "\udfff", 2**70, Unprintable()))
        if roll < 0.3:
            return self.pick(list(MESSAGES.values()))(id=self.random.randint(0, 2**31))
        if roll < 0.6 and depth < 3:
            return {self.plain_text(): self.message(depth + 1) for _ in range(self.pick((0, 1, 3)))}
        if roll < 0.7 and depth < 3:
            return [self.message(depth + 1) for _ in range(self.pick((0, 1, 3)))]
        if roll < 0.8:
            return self.plain_text()
        if roll < 0.802:
            return "m" * HUGE
        return self.pick((None, True, 0, -1, 2**63 - 1, -(2**63), 1.5, float("nan"), 1e308, b"\x00\xff", ""))


# What is drawn of an envelope, and how often: of any, and of one with a body.
COMMON = (("topic", Nasty.topic, 0.2), ("partition", Nasty.partition, 0.2), ("headers", Nasty.headers, 0.5))
COMMON += (("id", Nasty.id, 0.5), ("timestamp", Nasty.timestamp, 0.2), ("sent_at", Nasty.time, 0.3))
FURTHER = (
    ("key", Nasty.key, 0.6),
    ("scheduled_time", Nasty.time, 0.2),
    ("deliver_by", Nasty.deadline, 0.15),
    ("attempts", Nasty.attempts, 0.3),
    *((name, Nasty.text, 0.25) for name in TEXT_FIELDS),
)


def array_of(octets: bytes) -> "array.array[int]":
    return array.array("b", octets)
