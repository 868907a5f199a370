"""Envelopes and ids: what they take, what they refuse, and that they never change."""

import array
import copy
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Iterator, Mapping
from datetime import date, datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import pytest

import kbatch
from kbatch import Envelope, Tombstone
from kbatch._fastmap import NULL_VALUE
from tests.mapping import NOWHERE
from tests.naming import shown
from tests.strategies import Time

UTC = timezone.utc
MOMENT = datetime(2026, 11, 23, 9, 16, 45, 123456, tzinfo=UTC)
ID = uuid.UUID("01936f7e-8a3c-7def-8123-456789abcdef")

FIELDS: dict[str, Any] = {
    "key": "customer-7",
    "topic": "orders",
    "partition": 3,
    "timestamp": 1_764_000_000_000,
    "headers": (("a", "1"), ("a", b"\x00"), ("b", None)),
    "id": ID,
    "message_type": "order",
    "content_type": "application/json",
    "source": "shop",
    "correlation_id": "c-1",
    "conversation_id": "c-2",
    "parent_id": "p-1",
    "tenant_id": "t-1",
    "user_name": "u-1",
    "sent_at": MOMENT,
    "scheduled_time": MOMENT + timedelta(hours=1),
    "deliver_by": MOMENT + timedelta(days=1),
    "attempts": 2,
}
UNSET_FIELDS = {name: None for name in FIELDS if name != "id"} | {"headers": (), "attempts": 0, "message_type": "dict"}


def repr_without_id(envelope: Envelope) -> str:
    return repr(envelope).rpartition("id=")[0]


def fields_of(envelope: Envelope) -> dict[str, Any]:
    return {name: getattr(envelope, name) for name in FIELDS}


class Order(msgspec.Struct):
    id: int = 1


class Named:
    __message_type__ = "orders.v1.placed"


class NotNamed:
    __message_type__ = 7


class OrderPlaced(Envelope[Order]):
    """A subclass whose constructor takes something else, with an attribute of its own."""

    def __init__(self, order: Order) -> None:
        super().__init__(order, key=str(order.id), topic="orders")
        self.note = "placed"


class Slotted(Envelope):
    __slots__ = ()


class Erased(Tombstone):
    def __init__(self, number: int) -> None:
        super().__init__(f"customer-{number}")


class Forgetful(Envelope):
    def __init__(self) -> None:
        pass


class HeaderList(Mapping[str, str]):
    def __getitem__(self, name: str) -> str:
        return f"value of {name}"

    def __iter__(self) -> Iterator[str]:
        return iter("xy")

    def __len__(self) -> int:
        return 2


class Pair(NamedTuple):
    name: str
    value: str


# -- fields


def test_each_field_is_kept() -> None:
    assert fields_of(Envelope({"total": 3}, **FIELDS)) == FIELDS


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_is_kept_by_itself(name: str) -> None:
    envelope = Envelope({"total": 3}, **{name: FIELDS[name]})
    others = fields_of(envelope)
    assert others.pop(name) == FIELDS[name]
    others.pop("id", None)
    assert others == {other: value for other, value in UNSET_FIELDS.items() if other != name}


@pytest.mark.parametrize("message", [None, 0, "", [], {"a": [1]}, Order(7), float("inf")], ids=repr)
def test_message_is_kept_as_it_is(message: object) -> None:
    envelope = Envelope(message)
    assert envelope.message is message
    assert envelope.data is None
    assert Envelope(message=message).message is message


@pytest.mark.parametrize("data", [b"", b"x", bytearray(b"xy"), memoryview(b"xyz"), array.array("i", [1, 2])], ids=shown)
def test_data_is_kept_as_it_is(data: Any) -> None:
    envelope = Envelope(data=data)
    assert envelope.data is data
    assert envelope.message is msgspec.UNSET
    assert envelope.message_type == "bytes"


def test_tombstone() -> None:
    tombstone = Tombstone("7", topic="orders", partition=2, headers={"why": "gone"}, id=ID)
    assert isinstance(tombstone, Envelope)
    assert (tombstone.message, tombstone.data) == (msgspec.UNSET, None)
    tombstone = tombstone.replace(timestamp=1, sent_at=MOMENT)
    given = {"key": "7", "topic": "orders", "partition": 2, "headers": (("why", "gone"),), "id": ID}
    given |= {"timestamp": 1, "sent_at": MOMENT}
    assert fields_of(tombstone) == UNSET_FIELDS | {"message_type": None} | given


def test_keys_are_text_or_bytes() -> None:
    assert Envelope(1, key=b"\x00\xff").key == b"\x00\xff"
    assert Envelope(1, key="").key == ""
    assert Tombstone(b"").key == b""


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (Order(), "Order"),
        (Named(), "orders.v1.placed"),
        (NotNamed(), "NotNamed"),
        ({}, "dict"),
        (None, "NoneType"),
        (type("Inner", (), {"__qualname__": "Outer.Inner"})(), "Outer.Inner"),
    ],
)
def test_message_type_is_by_default_what_the_class_says(message: object, expected: str) -> None:
    assert Envelope(message).message_type == expected
    assert Envelope(message, message_type="given").message_type == "given"


def test_conversation_id_may_be_a_uuid() -> None:
    assert Envelope(1, conversation_id=ID).conversation_id == str(ID)


# -- headers


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (None, ()),
        ((), ()),
        ([], ()),
        ({}, ()),
        ({"a": "1", "b": None}, (("a", "1"), ("b", None))),
        (MappingProxyType({"a": b"1"}), (("a", b"1"),)),
        (HeaderList(), (("x", "value of x"), ("y", "value of y"))),
        ([("a", "1"), ("a", "2"), ("A", "3")], (("a", "1"), ("a", "2"), ("A", "3"))),
        ([["a", "1"], Pair("b", "2")], (("a", "1"), ("b", "2"))),
        ((pair for pair in [("a", "1")]), (("a", "1"),)),
    ],
)
def test_headers_keep_order_and_duplicates(headers: Any, expected: object) -> None:
    got = Envelope(1, headers=headers).headers
    assert got == expected
    assert type(got) is tuple
    assert all(type(pair) is tuple for pair in got)


def test_headers_changed_afterwards_change_nothing() -> None:
    pairs = [("a", "1")]
    names = {"a": "1"}
    envelopes = [Envelope(1, headers=pairs), Envelope(1, headers=names), Tombstone("k", headers=pairs)]
    pairs.append(("b", "2"))
    names["a"] = "2"
    assert [envelope.headers for envelope in envelopes] == [(("a", "1"),)] * 3


@pytest.mark.parametrize("headers", ["ab", b"ab", 7])
def test_headers_must_be_a_mapping_or_pairs(headers: Any) -> None:
    with pytest.raises(
        TypeError, match=f"headers must be a mapping or a sequence of pairs, not {type(headers).__name__}"
    ):
        Envelope(1, headers=headers)


@pytest.mark.parametrize("pair", ["ab", b"ab", ("a",), ("a", "1", "2"), 7, None, {"a", "b"}])
def test_each_header_must_be_a_pair(pair: Any) -> None:
    with pytest.raises(TypeError, match=rf"headers\[1\] must be a pair \(name, value\), not {type(pair).__name__}"):
        Tombstone("k", headers=[("a", "1"), pair])


def test_headers_of_an_iterator_that_fails() -> None:
    def pairs() -> Iterator[tuple[str, str]]:
        yield "a", "1"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Envelope(1, headers=pairs())


# -- what is refused


@pytest.mark.parametrize("arguments", [{}, {"data": None}, {"message": msgspec.UNSET}])
def test_neither_message_nor_data(arguments: Any) -> None:
    with pytest.raises(TypeError, match=r"needs either message or data; for a null value use Tombstone\(key\)"):
        Envelope(**arguments)


@pytest.mark.parametrize("message", [1, None])
def test_both_message_and_data(message: object) -> None:
    with pytest.raises(TypeError, match="message or data, not both"):
        Envelope(message, data=b"")


@pytest.mark.parametrize("data", ["text", 7, [1], Order()], ids=repr)
def test_data_must_be_a_buffer(data: Any) -> None:
    with pytest.raises(TypeError, match=f"data must be bytes or another buffer, not {type(data).__name__}"):
        Envelope(data=data)


def test_a_tombstone_needs_a_key() -> None:
    with pytest.raises(TypeError, match="a Tombstone needs a key"):
        Tombstone(None)


@pytest.mark.parametrize(
    ("field", "lowest", "highest"),
    [("partition", 0, 2**31 - 1), ("timestamp", 1, 2**63 - 1), ("attempts", 0, 2**31 - 1)],
)
def test_whole_numbers(field: str, lowest: int, highest: int) -> None:
    for value in (lowest, lowest + 1, highest):
        assert getattr(Envelope(1, **{field: value}), field) == value
    for value in (lowest - 1, -1, highest + 1, 2**64, -(2**64)):
        with pytest.raises(ValueError, match=f"{field} must be from {lowest} to {highest}, not {value}"):
            Envelope(1, **{field: value})
    for wrong in ("1", 1.0, True, b"1", [1]):
        with pytest.raises(TypeError, match=f"{field} must be an int, not {type(wrong).__name__}"):
            Envelope(1, **{field: wrong})


TIMES = ("sent_at", "scheduled_time", "deliver_by")


@pytest.mark.parametrize("field", TIMES)
def test_times_are_aware(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be timezone-aware; .* is naive"):
        Envelope(1, **{field: datetime(2026, 1, 1)})
    for wrong in (1.5, "2026-01-01T00:00:00Z", date(2026, 1, 1), timedelta()):
        with pytest.raises(TypeError, match=f"{field} must be a timezone-aware datetime or None, not"):
            Envelope(1, **{field: wrong})


@pytest.mark.parametrize("field", TIMES)
@pytest.mark.parametrize(
    "moment",
    [
        MOMENT,
        datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime.min.replace(tzinfo=UTC),
        datetime.max.replace(tzinfo=UTC),
        datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=-9, minutes=-30))),
        datetime(2000, 2, 29, 12, tzinfo=timezone(timedelta(microseconds=1))),
    ],
    ids=str,
)
def test_times_are_kept_to_the_microsecond(field: str, moment: datetime) -> None:
    kept = getattr(Envelope(1, **{field: moment}), field)
    assert (kept, kept.tzinfo) == (moment, UTC)


class Number(int):
    """A number all the same, whose operators say anything."""

    def __ge__(self, other: object) -> bool:
        return False

    __le__ = __lt__ = __gt__ = __ge__

    def __index__(self) -> int:
        raise AssertionError("a subclass's number")


class Guid(uuid.UUID):
    """An id all the same."""


class Names(dict[str, str]):
    """A dict all the same."""


def test_numbers_of_a_subclass() -> None:
    envelope = Envelope(1, partition=Number(3), timestamp=Number(4), attempts=Number(5))
    assert (envelope.partition, envelope.timestamp, envelope.attempts) == (3, 4, 5)
    with pytest.raises(ValueError, match="partition must be from 0"):
        Envelope(1, partition=Number(-1))


@pytest.mark.parametrize("field", TIMES)
def test_times_of_a_subclass(field: str) -> None:
    time = Time(2026, 11, 23, 9, 16, 45, 123456, tzinfo=timezone(timedelta(hours=1)))
    for envelope in (Envelope(1, **{field: time}), Envelope(1).replace(**{field: time})):
        assert getattr(envelope, field) == MOMENT - timedelta(hours=1)
        assert type(getattr(envelope, field)) is datetime
    with pytest.raises(ValueError, match="naive"):
        Envelope(1, **{field: Time(2026, 1, 1)})
    with pytest.raises(ValueError, match="is in UTC not in the years"):
        Envelope(1, **{field: Time(9999, 12, 31, 23, tzinfo=timezone(timedelta(hours=-1)))})


def test_times_of_pendulum() -> None:
    pendulum = pytest.importorskip("pendulum", reason="platform: pendulum has no wheel here")
    moment = pendulum.datetime(2026, 11, 23, 10, 16, 45, 123456, tz="Europe/Paris")
    envelope = Envelope(1, deliver_by=moment.add(minutes=5), sent_at=moment, scheduled_time=moment)
    assert (envelope.sent_at, envelope.scheduled_time) == (MOMENT, MOMENT)
    assert envelope.deliver_by == MOMENT + timedelta(minutes=5)


def test_ids_and_headers_of_a_subclass() -> None:
    envelope = Envelope(1, id=Guid(str(ID)), conversation_id=Guid(str(ID)), headers=Names(a="1"))
    assert (envelope.id, envelope.conversation_id, envelope.headers) == (ID, str(ID), (("a", "1"),))
    assert type(envelope.id) is uuid.UUID


@pytest.mark.parametrize("field", TIMES)
@pytest.mark.parametrize(
    "moment",
    [
        datetime.max.replace(tzinfo=timezone(timedelta(hours=-1))),
        datetime.min.replace(tzinfo=timezone(timedelta(hours=1))),
    ],
)
def test_times_must_have_a_year_in_utc_too(field: str, moment: datetime) -> None:
    with pytest.raises(ValueError, match=f"{field} is in UTC not in the years 1 to 9999"):
        Envelope(1, **{field: moment})


@pytest.mark.parametrize("wrong", [str(ID), ID.bytes, ID.int])
def test_an_id_is_a_uuid(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"id must be a uuid\.UUID"):
        Envelope(1, id=wrong)


def test_everything_but_the_message_is_by_keyword() -> None:
    with pytest.raises(TypeError):
        Envelope(1, "key")
    with pytest.raises(TypeError, match="colour"):
        Envelope(1, colour="red")


# -- immutability


@pytest.mark.parametrize("name", [*FIELDS, "message", "data", "colour"])
@pytest.mark.parametrize("envelope", [Envelope(1), Tombstone("k"), Slotted(1)], ids=lambda e: type(e).__name__)
def test_no_field_can_be_set_or_deleted(envelope: Envelope, name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(envelope, name, None)
    with pytest.raises(AttributeError):
        delattr(envelope, name)


def test_a_constructor_runs_once() -> None:
    # A batch in flight points into its envelopes.
    for envelope in (Envelope(1, key="a"), Tombstone("a")):
        with pytest.raises(TypeError, match="is immutable, and its __init__ has run before"):
            envelope.__init__("b")
        assert envelope.key == "a"


def test_a_constructor_that_failed_or_still_runs_is_not_run_again() -> None:
    envelope = Envelope.__new__(Envelope)

    def headers():
        Envelope.__init__(envelope, 2)
        yield ("a", "b")

    with pytest.raises(TypeError):
        Envelope.__init__(envelope, 1, headers=headers())
    with pytest.raises(TypeError, match="is immutable"):
        Envelope.__init__(envelope, 3)


# -- replace


def test_replace_changes_what_is_named_and_nothing_else() -> None:
    envelope = Envelope(Order(1), **FIELDS)
    changed = envelope.replace(key="other", attempts=3)
    assert fields_of(changed) == FIELDS | {"key": "other", "attempts": 3}
    assert changed.message is envelope.message
    assert fields_of(envelope) == FIELDS


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "id"])
def test_replace_gives_each_field_its_default_back(name: str) -> None:
    default = UNSET_FIELDS[name] if name in ("headers", "attempts") else None
    changed = Envelope({}, **FIELDS).replace(**{name: default})
    assert fields_of(changed) == FIELDS | {name: UNSET_FIELDS[name]}


def test_replace_the_body() -> None:
    envelope = Envelope({"a": 1}, key="k", id=ID)
    encoded = envelope.replace(data=b"{}")
    assert encoded == Envelope(data=b"{}", key="k", id=ID)
    assert encoded.replace(message=None) == Envelope(None, key="k", id=ID)
    with pytest.raises(TypeError, match="not both"):
        envelope.replace(message=1, data=b"")
    with pytest.raises(TypeError, match="needs either"):
        encoded.replace(data=None)


@pytest.mark.parametrize(
    "envelope",
    [
        Envelope({"a": 1}, key="k"),
        Envelope(None),
        Envelope(data=b"{}"),
        Envelope(NULL_VALUE, key="k", message_type="order"),
        Tombstone("k"),
    ],
    ids=repr_without_id,
)
def test_replace_takes_back_what_the_envelope_shows(envelope: Envelope) -> None:
    shown = {name: getattr(envelope, name) for name in ("message", "data")}
    for changes in (shown, {"message": shown["message"]}, {"key": "k2", **shown}):
        assert envelope.replace(**changes) == envelope.replace(key=changes.get("key", envelope.key))
    with kbatch.Producer(NOWHERE) as producer:
        records = producer._map("orders", [envelope.replace(timestamp=1), envelope.replace(timestamp=1, **shown)])
    assert records[0] == records[1]


def test_a_null_value_can_be_replaced() -> None:
    null = Envelope(NULL_VALUE, id=ID)
    assert null.replace(message=1) == Envelope(1, id=ID)
    assert null.replace(data=b"x") == Envelope(data=b"x", id=ID)
    with pytest.raises(TypeError, match="needs either"):
        null.replace(message=msgspec.UNSET)


def test_replace_keeps_the_id_unless_told() -> None:
    envelope = Envelope(1)
    assert envelope.replace(key="k").id == envelope.id
    assert envelope.replace(id=None).id != envelope.id
    assert envelope.replace(id=ID).id == ID


def test_replace_refuses_what_the_constructor_refuses() -> None:
    with pytest.raises(TypeError, match="colour"):
        Envelope(1).replace(colour="red")
    with pytest.raises(ValueError, match="naive"):
        Envelope(1).replace(sent_at=datetime(2026, 1, 1))
    with pytest.raises(TypeError, match="message"):
        Tombstone("k").replace(message=1)


def test_replace_of_a_tombstone_is_a_tombstone() -> None:
    assert Tombstone("a", id=ID).replace(key="b", headers={"x": "y"}) == Tombstone("b", headers={"x": "y"}, id=ID)


# -- equality, hash, repr


def test_equality_is_by_all_fields() -> None:
    envelope = Envelope({"a": 1}, **FIELDS)
    assert envelope == Envelope({"a": 1}, **FIELDS)
    assert hash(envelope) == hash(Envelope({"a": 1}, **FIELDS))
    assert envelope != Envelope({"a": 2}, **FIELDS)
    assert Envelope(data=b"x", id=ID) == Envelope(data=bytearray(b"x"), id=ID)
    assert Envelope(data=b"x", id=ID) != Envelope(b"x", id=ID)


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_makes_a_difference(name: str) -> None:
    other = None if name in ("id", "message_type") else UNSET_FIELDS[name]
    assert Envelope(1, **FIELDS) != Envelope(1, **FIELDS | {name: other})


def test_two_envelopes_of_one_message_differ_by_their_ids() -> None:
    assert Envelope(1) != Envelope(1)


def test_equality_is_within_a_class() -> None:
    assert Envelope(1, id=ID) != Slotted(1, id=ID)
    assert Tombstone("k", id=ID) != Envelope(None, key="k", id=ID)
    assert Envelope(1, id=ID) != ID
    assert Envelope(1, id=ID).__eq__(1) is NotImplemented


def test_envelopes_have_no_order() -> None:
    with pytest.raises(TypeError):
        sorted([Envelope(1), Envelope(2)])


def test_an_envelope_of_an_unhashable_message_is_hashable() -> None:
    assert len({Envelope([]), Envelope([])}) == 2


def test_repr_shows_what_is_set_and_can_be_evaluated() -> None:
    assert repr(Envelope(Order(3), key="k", id=ID)) == f"Envelope(Order(id=3), key='k', id=UUID('{ID}'))"
    assert repr(Envelope(data=b"x", id=ID)) == f"Envelope(data=b'x', id=UUID('{ID}'))"
    assert repr(Tombstone("k", id=ID)) == f"Tombstone(key='k', id=UUID('{ID}'))"
    assert repr(Slotted(None, id=ID)) == f"Slotted(None, id=UUID('{ID}'))"
    import datetime as datetime_module

    names = {"Envelope": Envelope, "UUID": uuid.UUID, "datetime": datetime_module}
    envelope = Envelope({"a": 1}, **FIELDS)
    assert eval(repr(envelope), names) == envelope


# -- pickle and copy

COPIES = [
    *(pytest.param(lambda e, p=p: pickle.loads(pickle.dumps(e, p)), id=f"pickle {p}") for p in range(6)),
    pytest.param(copy.copy, id="copy"),
    pytest.param(copy.deepcopy, id="deepcopy"),
]


@pytest.mark.parametrize("duplicate", COPIES)
@pytest.mark.parametrize(
    "envelope",
    [
        Envelope({"a": [1]}, **FIELDS),
        Envelope(None),
        Envelope(data=b"\x00"),
        Envelope(data=bytearray(b"xy")),
        Tombstone(b"k", topic="orders", headers={"a": None}),
        Slotted(Order(3)),
        OrderPlaced(Order(3)),
        Erased(3),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_copy_is_equal(duplicate: Any, envelope: Envelope) -> None:
    made = duplicate(envelope)
    assert made == envelope
    assert type(made) is type(envelope)
    assert fields_of(made) == fields_of(envelope)
    assert getattr(made, "note", None) == getattr(envelope, "note", None)


def test_depth_of_copies() -> None:
    envelope = Envelope({"a": [1]})
    assert copy.copy(envelope).message is envelope.message
    assert copy.deepcopy(envelope).message is not envelope.message


def test_a_view_is_pickled_as_its_bytes() -> None:
    assert pickle.loads(pickle.dumps(Envelope(data=memoryview(b"abc")[1:], id=ID))) == Envelope(data=b"bc", id=ID)


# -- subclasses


def test_a_subclass_with_a_constructor_of_its_own() -> None:
    envelope = OrderPlaced(Order(3))
    assert (envelope.key, envelope.topic, envelope.note) == ("3", "orders", "placed")
    changed = envelope.replace(key="4")
    assert type(changed) is OrderPlaced
    assert (changed.key, changed.message, changed.id, changed.note) == ("4", Order(3), envelope.id, "placed")
    assert type(Erased(3).replace(topic="t")) is Erased


def test_a_subclass_that_forgets_the_constructor_cannot_be_sent() -> None:
    with kbatch.Producer({"bootstrap.servers": "localhost:1"}) as producer:
        with pytest.raises(kbatch.SerializationError, match=r"Forgetful was made without Envelope\.__init__") as caught:
            producer.send_batch("orders", [Envelope(1), Forgetful()])
        assert (caught.value.index, caught.value.field) == (1, "envelope")
        repr(Forgetful())


def test_generic_alias() -> None:
    assert Envelope[Order](Order(3)).message == Order(3)
    assert Envelope[Order].__origin__ is Envelope


# -- ids


def timestamp_of(id: uuid.UUID) -> float:
    return (id.int >> 80) / 1000


def test_ids_are_version_7() -> None:
    before = datetime.now(UTC).timestamp()
    ids = [kbatch.uuid7() for _ in range(1000)] + [Envelope(1).id for _ in range(1000)] + [Tombstone("k").id]
    after = datetime.now(UTC).timestamp()
    for id in ids:
        assert id.version == 7
        assert id.variant == uuid.RFC_4122
        assert before - 10 <= timestamp_of(id) <= after + 10
    # 62 random bits: each of them is set sometimes, and not always.
    random_bits = [id.int & (2**62 - 1) for id in ids]
    assert all(any(bits >> i & 1 for bits in random_bits) for i in range(62))
    assert not any(all(bits >> i & 1 for bits in random_bits) for i in range(62))


def test_ids_rise_strictly() -> None:
    ids = [kbatch.uuid7() for _ in range(20_000)]
    assert all(a < b for a, b in pairwise(ids))


def test_ids_rise_strictly_across_threads() -> None:
    made: list[list[uuid.UUID]] = [[] for _ in range(8)]
    start = threading.Barrier(len(made))

    def make(ids: list[uuid.UUID]) -> None:
        start.wait()
        for _ in range(5_000):
            ids.append(Envelope(1).id)

    threads = [threading.Thread(target=make, args=(ids,)) for ids in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(a < b for ids in made for a, b in pairwise(ids))
    stamps = {id.int >> 64 for ids in made for id in ids}
    assert len(stamps) == sum(map(len, made))  # no two share a stamp: the order is total


@pytest.mark.skipif(not hasattr(os, "fork"), reason="platform: no fork")
def test_ids_are_unique_after_a_fork() -> None:
    code = """
        import os
        import kbatch
        kbatch.uuid7()  # the pool of random bytes is filled
        children = []
        for _ in range(4):
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.write(writer, "".join(f"{kbatch.uuid7()}\\n" for _ in range(100)).encode())
                os._exit(0)
            os.close(writer)
            children.append((pid, reader))
        for _ in range(100):
            print(kbatch.uuid7())
        for pid, reader in children:
            print(os.fdopen(reader).read(), end="")
            assert os.waitpid(pid, 0)[1] == 0
    """
    output = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    ids = [uuid.UUID(line) for line in output.split()]
    assert len(ids) == 500
    assert len({id.int & (2**62 - 1) for id in ids}) == 500  # the random part alone


CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
/* The wall clock stands still, and every 1,000 looks it steps back by an hour. */
int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    static int looks;
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    if (id != CLOCK_REALTIME) return real(id, t);
    t->tv_sec = 1764000000 - 3600 * (__atomic_fetch_add(&looks, 1, __ATOMIC_RELAXED) / 1000);
    t->tv_nsec = 123456789;
    return 0;
}
"""


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="platform: no LD_PRELOAD, or no compiler")
def test_ids_rise_strictly_while_the_clock_stands_still_or_steps_back(tmp_path: Path) -> None:
    (tmp_path / "clock.c").write_text(CLOCK)
    library = tmp_path / "clock.so"
    command = ["cc", "-shared", "-fPIC", "-o", library, tmp_path / "clock.c", "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    code = "import kbatch; print(*(kbatch.uuid7() for _ in range(5_000)), sep='\\n')"
    preload = ":".join(filter(None, [os.environ.get("LD_PRELOAD"), str(library)]))
    output = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LD_PRELOAD": preload},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    ids = [uuid.UUID(line) for line in output.split()]
    assert len(ids) == 5_000
    assert all(a < b for a, b in pairwise(ids))
    assert {id.version for id in ids} == {7}
    # 5,000 ids of one instant: they are numbered on, into the milliseconds that follow.
    assert timestamp_of(ids[0]) == 1_764_000_000.123
    assert timestamp_of(ids[-1]) <= 1_764_000_000.125


def test_random_bytes_are_not_used_twice() -> None:
    tails = {kbatch.uuid7().int & (2**62 - 1) for _ in range(20_000)}
    assert len(tails) == 20_000


# -- subclasses


@pytest.mark.parametrize("name", ["key", "headers", "message_type", "topic", "id", "__getattribute__"])
def test_a_subclass_that_overrides_a_field_is_refused(name: str) -> None:
    def overridden(self: Any, *_: Any) -> str:
        return "other"

    value = overridden if name.startswith("__") else property(overridden)
    mixin = type("Mixin", (), {name: value})
    for derived in (type("Derived", (kbatch.Envelope,), {name: value}), type("Mixed", (mixin, kbatch.Envelope), {})):
        with pytest.raises(TypeError, match=f"overrides Envelope.{name}, "):
            derived(1)
    with pytest.raises(TypeError, match=f"overrides Envelope.{name}, "):
        type("Derived", (kbatch.Tombstone,), {name: value})("key")


def test_classes_that_are_equal_have_names_of_their_own() -> None:
    class Equal(type):
        def __eq__(cls, other: object) -> bool:
            return True

        def __hash__(cls) -> int:
            return 1

    one, other = Equal("One", (), {}), Equal("Other", (), {})
    assert kbatch.Envelope(one()).message_type == "One"
    assert kbatch.Envelope(other()).message_type == "Other"


def test_a_class_that_is_unhashable_has_a_name() -> None:
    class Unhashable(type):
        __hash__ = None  # type: ignore[assignment]

        def __eq__(cls, other: object) -> bool:
            return cls is other

    assert kbatch.Envelope(Unhashable("One", (), {})()).message_type == "One"
