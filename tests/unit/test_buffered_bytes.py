"""A sender's buffer is bounded in bytes too, before any message was encoded."""

from __future__ import annotations

import array
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

import kbatch
from kbatch import Envelope
from kbatch.testing import MemoryProducer

BOUND = 10_000_000
LARGE = "x" * 500_000


class Order(msgspec.Struct):
    body: str
    lines: list[dict[str, str]]


class Untracked(msgspec.Struct, gc=False):
    number: int
    body: str


@dataclass
class Plain:
    body: str


KINDS: dict[str, Callable[[], Any]] = {
    "text": lambda: LARGE,
    "dict": lambda: {"a": 1, "body": LARGE},
    "nested": lambda: {"event": {"payload": [{"body": LARGE}]}},
    "many small": lambda: [{"n": "x" * 40} for _ in range(10_000)],
    "struct": lambda: Order(LARGE, []),
    "struct in a struct's list": lambda: Order("", [{"body": LARGE}]),
    "struct without gc": lambda: Untracked(1, LARGE),
    "bytes in a dict": lambda: {"a": 1, "body": LARGE.encode()},
    "dataclass": lambda: Plain(LARGE),
}


_made: list[kbatch.BatchedSender] = []


@pytest.fixture(autouse=True)
def _closes_senders() -> Iterator[None]:
    """Also of a test that fails."""
    yield
    while _made:
        with contextlib.suppress(kbatch.UndeliveredError):
            _made.pop().close(0)


def sender_of(producer: MemoryProducer, **options: Any) -> kbatch.BatchedSender:
    agent = kbatch.SendingAgent(producer, "orders")
    _made.append(kbatch.BatchedSender(agent, max_buffered_bytes=BOUND, **options))
    return _made[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_holds_before_the_first_batch_is_mapped(kind: str) -> None:
    with MemoryProducer() as producer:
        producer.hold()
        sender = sender_of(producer, batch_timeout_ms=1e6, batch_bytes=BOUND)
        taken = 0
        while sender.try_send(Envelope(KINDS[kind]())):
            taken += 1
            assert taken < 100
        assert 15 <= taken <= 25
        assert BOUND - 600_000 <= sender.stats()["buffered_bytes"] <= BOUND
        with pytest.raises(kbatch.SenderFullError, match="bytes"):
            sender.send(Envelope(KINDS[kind]()), timeout=0)
        producer.release()
        assert sender.flush() == 0  # the full buffer goes out though its batch was not full
        assert sender.stats()["buffered_bytes"] == 0
        sender.close()
    assert len(producer.records) == taken


@pytest.mark.parametrize(("batch_bytes", "bound"), [(1_000_000, 64 * 2**20), (10**8, 10**8)])
def test_the_bound_is_64_mib_or_that_of_a_batch(batch_bytes: int, bound: int) -> None:
    with (
        MemoryProducer() as producer,
        kbatch.BatchedSender(kbatch.SendingAgent(producer, "orders"), batch_bytes=batch_bytes) as sender,
    ):
        assert sender.max_buffered_bytes == bound


@pytest.mark.parametrize("make", [bytes, bytearray, lambda body: memoryview(bytearray(body))])
def test_a_body_counts_as_it_is(make: Callable[[bytes], Any]) -> None:
    with MemoryProducer() as producer:
        producer.hold()
        sender = sender_of(producer)
        for _ in range(20):
            assert sender.try_send(Envelope(data=make(LARGE.encode())))
        assert sender.stats()["buffered_bytes"] == BOUND
        assert not sender.try_send(Envelope(data=b"x"))
        producer.release()
        sender.close()


@pytest.mark.parametrize("small", [1, 100])
def test_what_becomes_large_deep_inside_is_noticed_within_8_envelopes(small: int) -> None:
    with MemoryProducer() as producer:
        producer.hold()
        sender = sender_of(producer, batch_timeout_ms=1e6, batch_bytes=BOUND)
        for _ in range(small):
            assert sender.try_send(Envelope({"lines": [{"body": "x"}]}))
        taken = 0
        while sender.try_send(Envelope({"lines": [{"body": LARGE}]})):
            taken += 1
            assert taken < 100
        assert 19 <= taken <= 20 + 7
        producer.release()
        sender.close()


def test_one_strange_object_does_not_count_a_whole_program() -> None:
    class Session:
        def __init__(self) -> None:
            self.modules = sys.modules
            self.cache = [{"body": LARGE} for _ in range(50)]

    class Row:
        def __init__(self, session: Any) -> None:
            self.state = Manager(Manager(Manager(session)))
            self.name = "x"

    class Manager:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

    with MemoryProducer(encoder=lambda message, context: b"x") as producer:
        producer.hold()
        sender = sender_of(producer)
        session = Session()
        for _ in range(100):
            assert sender.try_send(Envelope(Row(session)))
        assert sender.stats()["buffered_bytes"] < 10_000
        producer.release()
        sender.close()


def test_what_looks_larger_than_those_before_counts_as_it_is() -> None:
    with MemoryProducer() as producer:
        sender = sender_of(producer, batch_timeout_ms=0)
        sender.send(Envelope({"n": 1}))
        assert sender.flush() == 0
        producer.hold()
        taken = 0
        while sender.try_send(Envelope({"body": LARGE})):
            taken += 1
            assert taken < 100
        assert 15 <= taken <= 25
        producer.release()
        sender.close()


@pytest.mark.parametrize("lots", [[3, 5, 7], [1] * 20, [30, 11, 23, 3, 17]])
def test_the_mean_of_messages_of_one_size_is_that_size(lots: list[int]) -> None:
    with MemoryProducer(encoder=lambda message, context: b"x" * 1_000) as producer:
        sender = sender_of(producer, batch_timeout_ms=1e6)
        for lot in lots:
            for n in range(lot):
                sender.send(Envelope({"n": n}))
            assert sender.flush() == 0
        producer.hold()
        before = sender.stats()["buffered_bytes"]
        assert sender.try_send(Envelope(data=b""))
        without = sender.stats()["buffered_bytes"] - before
        assert sender.try_send(Envelope({"n": 1}))
        assert sender.stats()["buffered_bytes"] == before + 2 * without + 1_000
        producer.release()
        sender.close()


def test_what_is_not_encoded_counts_as_the_mean_of_what_was() -> None:
    with MemoryProducer(encoder=lambda message, context: b"x" * 1_000) as producer:
        sender = sender_of(producer, batch_timeout_ms=0)
        for _ in range(100):
            sender.send(Envelope({"n": 1}))
        assert sender.flush() == 0
        producer.hold()
        for _ in range(100):
            assert sender.try_send(Envelope({"n": 1}))
        assert 90_000 <= sender.stats()["buffered_bytes"] <= 110_000
        producer.release()
        sender.close()


@pytest.mark.parametrize(("length", "expected"), [(100, 1_000), (1_900, 1_000), (2_100, 2_100)])
def test_what_looks_more_than_twice_as_large_as_the_mean_counts_as_it_is(length: int, expected: int) -> None:
    with MemoryProducer(encoder=lambda message, context: b"x" * 1_000) as producer:
        sender = sender_of(producer, batch_timeout_ms=0)
        for _ in range(100):
            sender.send(Envelope({"n": 1}))
        assert sender.flush() == 0
        producer.hold()
        assert sender.try_send(Envelope({"body": "y" * length}))
        assert expected <= sender.stats()["buffered_bytes"] <= expected + 50
        producer.release()
        sender.close()


def test_headers_and_keys_count_and_one_that_is_too_large_is_taken_alone() -> None:
    with MemoryProducer() as producer:
        producer.hold()
        sender = sender_of(producer)
        huge = Envelope(data=b"", key="k" * BOUND, headers={"h": b"x" * 100})
        assert sender.try_send(huge)
        assert not sender.try_send(Envelope(data=b""))
        assert sender.stats()["buffered_bytes"] > BOUND
        producer.release()
        with pytest.raises(kbatch.UndeliveredError):  # too large for a record
            sender.flush()
        assert sender.stats()["buffered_bytes"] == 0
        assert sender.try_send(Envelope(data=b""))
        sender.close()


def test_retries_and_dead_letters_keep_their_share() -> None:
    with MemoryProducer() as producer:
        agent = kbatch.SendingAgent(
            *(producer, "orders"),
            retry=kbatch.RetryPolicy(2, initial_backoff_s=0.001),
            dead_letter_topic="dead",
            failures_to_open=1000,
        )
        sender = kbatch.BatchedSender(agent, batch_timeout_ms=1)
        producer.fail("NOT_ENOUGH_REPLICAS", times=None, when=lambda envelope: envelope.topic is None)
        for number in range(50):
            sender.send(Envelope({"n": number}, key=str(number)))
        assert sender.flush() == 0
        assert sender.stats()["buffered_bytes"] == 0
        assert sender.stats()["dead_letters"] == 50
        sender.close()


def counted(*messages: Any, encoder: Any = None) -> int:
    """As what the last of these messages counts, after the others."""
    with MemoryProducer(encoder=encoder) as producer:
        producer.hold()
        sender = sender_of(producer, batch_timeout_ms=1e6, batch_bytes=BOUND)
        before = 0
        for message in messages:
            before = sender.stats()["buffered_bytes"]
            assert sender.try_send(Envelope(message))
        after = sender.stats()["buffered_bytes"]
        producer.release()
        sender.close()
    return after - before


def test_each_eighth_message_is_looked_into() -> None:
    small, large = {"lines": [{"body": "x"}]}, {"lines": [{"body": LARGE}]}
    seen = [counted(*[small] * before, large) >= len(LARGE) for before in range(25)]
    assert [before for before, is_seen in enumerate(seen) if is_seen] == [0, 8, 16, 24]


def test_memory_that_an_extensions_object_has_of_its_own_is_not_seen() -> None:
    # An array's is its own; io.BytesIO holds a bytes object, which CPython tells of from 3.12 on.
    assert counted({"body": LARGE.encode()}) >= len(LARGE)
    assert counted({"body": array.array("b", LARGE.encode())}, encoder=lambda message, context: b"x") < 100


def test_a_numpy_array_is_not_seen() -> None:
    numpy = pytest.importorskip("numpy", reason="platform: numpy is not here")
    assert counted({"body": numpy.zeros(len(LARGE))}, encoder=lambda message, context: b"x") < 100


def test_of_a_long_list_a_sample_is_looked_at() -> None:
    lines = ["x" * 20] * 10_000
    whole = counted(lines)
    assert 200_000 <= whole <= 250_000
    lines[100] = LARGE  # not in the sample
    assert counted(lines) == whole
