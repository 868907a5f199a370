"""Phase 1 of a batch that goes on without the envelopes that cannot be mapped."""

from typing import Any

import psutil
import pytest

import kbatch
from kbatch import Envelope
from kbatch._pending import PendingBatch
from tests import mapping
from tests.reference import Setting, Spec


def map_all_but(producer: Any, envelopes: Any, topic: str | None = "orders") -> tuple[list[Any], list[Any]]:
    rejected: list[tuple[int, kbatch.SerializationError]] = []
    batch = PendingBatch(producer._core)
    producer._core.map(batch, topic, envelopes, rejected)
    return producer._core.records(batch), rejected


def make(**options: Any) -> kbatch.Producer:
    return kbatch.Producer(mapping.NOWHERE, **options)


@pytest.mark.parametrize("bad", [(), (0,), (1000,), (1999,), (0, 1, 1000, 1999), tuple(range(2000))])
@pytest.mark.parametrize("wire", ["kbatch", "wolverine", "cloudevents", "raw"])
def test_the_first_a_middle_the_last_and_all(wire: str, bad: tuple[int, ...]) -> None:
    setting = Setting(wire=wire, source="fleet-1")
    specs = [Spec({"message": {"id": n}, "key": f"order-{n % 97}", "headers": {"n": str(n)}}) for n in range(2000)]
    for index in bad:
        # Each fails when the key is written and the body, too.
        specs[index] = Spec({"message": {"id": index}, "key": "k" * 40, "headers": [("a", "b" * 100), ("x", 5)]})
    with mapping.producer_of(setting) as producer:
        _, rejected = mapping.assert_agree_on_each(producer, "orders", specs, setting)
    assert [failed.index for failed in rejected] == list(bad)


def test_what_is_no_envelope_and_what_has_no_topic() -> None:
    class Hollow(Envelope[Any]):
        def __init__(self) -> None:
            pass

    with make() as producer:
        good = Envelope(1, topic="t")
        records, rejected = map_all_but(producer, [5, good, Hollow(), Envelope(2), good], None)
    assert [record is None for record in records] == [True, False, True, True, False]
    assert [(index, error.field) for index, error in rejected] == [(0, "envelope"), (2, "envelope"), (3, "topic")]
    assert all(isinstance(error, kbatch.SerializationError) for _, error in rejected)


def test_names_of_types_live_as_long_as_records_point_at_them() -> None:
    # The name of a type is kept once for a run of envelopes; the run's first is rejected here.
    class Meta(type):
        @property
        def __message_type__(cls) -> str:
            return "".join(["made", "-", cls.__name__])

    def made(name: str) -> Any:
        return Meta(name, (), {})()

    with make(encoder=lambda message, context: b"x") as producer:
        order, other = made("Order"), made("Other")
        envelopes = [Envelope(order, headers=[("x", 5)]), Envelope(order)]
        envelopes += [Envelope(other, headers=[("x", 5)]), Envelope(other)]
        for n in range(8300):  # the cache of names is emptied when it has 4,096, and then their memory is used again
            envelopes.append(Envelope(made(f"T{n}")))
        records, rejected = map_all_but(producer, envelopes)
        assert [index for index, _ in rejected] == [0, 2]
        names = [dict(record[5])["message-type"] for record in records if record is not None]
        assert names == [b"made-Order", b"made-Other", *(b"made-T%d" % n for n in range(8300))]


def among_large_ones(core: Any, good: list[Envelope[Any]]) -> tuple[PendingBatch, int]:
    """Maps `good` with large envelopes among them that are rejected; how much larger the process is then.

    Their bodies alone are not too large, and so are copied.
    """
    large = Envelope(data=bytearray(10_000_000), headers=[("h", "v")] * 10_000)
    several: list[Any] = []
    for n, envelope in enumerate(good):
        several += [large, envelope] if n % 50 == 25 else [envelope]
    rejected: list[tuple[int, kbatch.SerializationError]] = []
    batch = PendingBatch(core)
    before = psutil.Process().memory_info().rss
    core.map(batch, "t", several, rejected)
    after = psutil.Process().memory_info().rss
    assert len(rejected) == 20
    return batch, after - before


def some() -> list[Envelope[Any]]:
    return [Envelope(data=bytearray(b"%d" % n * 100), headers={"h": str(n)}) for n in range(1000)]


def test_what_a_rejected_one_took_is_used_again() -> None:
    good = some()
    with kbatch.Producer({**mapping.NOWHERE, "message.max.bytes": 10_000_000}) as producer:
        batch, _ = among_large_ones(producer._core, good)
        records = producer._core.records(batch)
    assert [record[4] for record in records if record is not None] == [envelope.data for envelope in good]
    assert [dict(record[5])["h"] for record in records if record is not None] == [b"%d" % n for n in range(1000)]


@pytest.mark.allocator
def test_what_a_rejected_one_took_is_given_back_at_once() -> None:
    with kbatch.Producer({**mapping.NOWHERE, "message.max.bytes": 10_000_000}) as producer:
        assert among_large_ones(producer._core, some())[1] < 100_000_000


def test_an_error_of_no_envelope_is_raised_and_nothing_is_appended() -> None:
    def hook() -> Any:
        raise RuntimeError("no headers today")

    with make(header_hook=hook) as producer:
        rejected: list[Any] = []
        with pytest.raises(kbatch.SerializationError, match="no headers today") as raised:
            producer._core.map(PendingBatch(producer._core), "t", [Envelope(object())], rejected)
        assert raised.value.index is None
        assert rejected == []


@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt, SystemExit])
def test_what_is_no_mistake_of_an_envelope_is_the_cause_of_its_error(kind: type[BaseException]) -> None:
    def encode(message: Any, context: Any) -> bytes:
        if message == "raise":
            raise kind("no more")
        return b"x"

    with make(encoder=encode) as producer:
        rejected: list[Any] = []
        batch = PendingBatch(producer._core)
        envelopes = [Envelope(1), Envelope(2, headers=[("x", 5)]), Envelope("raise"), Envelope(3)]
        producer._core.map(batch, "t", envelopes, rejected)
        assert [(index, error.index) for index, error in rejected] == [(1, 1), (2, 2)]
        error = rejected[1][1]
        assert type(error.__cause__) is kind
        assert f"envelope 2 (id {envelopes[2].id}): " in str(error)
        assert f"{kind.__name__}: no more" in str(error)
        assert [record is None for record in producer._core.records(batch)] == [False, True, True, False]


@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt, SystemExit])
def test_without_a_list_it_is_raised(kind: type[BaseException]) -> None:
    def encode(message: Any, context: Any) -> bytes:
        raise kind("no more")

    with make(encoder=encode) as producer, pytest.raises(kind, match="no more"):
        producer._map("t", [Envelope(1)])


def test_in_slices() -> None:
    with make() as producer:
        rejected: list[tuple[int, kbatch.SerializationError]] = []
        batch = PendingBatch(producer._core)
        envelopes = [Envelope(n if n % 3 else object()) for n in range(1000)]
        mapping_ = producer._core.begin_mapping(batch, "t", envelopes, rejected)
        while not producer._core.map_slice(mapping_, 0.0):
            pass
        assert [index for index, _ in rejected] == list(range(0, 1000, 3))
        assert [record is None for record in producer._core.records(batch)] == [n % 3 == 0 for n in range(1000)]


def test_without_a_list_nothing_has_changed() -> None:
    with make() as producer, pytest.raises(kbatch.SerializationError) as raised:
        producer._map("t", [Envelope(1), Envelope(object()), Envelope(object())])
    assert raised.value.index == 1
