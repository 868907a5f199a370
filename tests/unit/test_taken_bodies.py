"""What a batched sender keeps of a body is what phase 1 would send: the buffer, whatever else the object can say."""

import ctypes
from typing import Any

import pytest

import kbatch
from kbatch.testing import MemoryProducer


class Number(ctypes.c_uint8):
    """A buffer that is also an index: bytes() makes so many zeros of it."""

    def __index__(self) -> int:
        return 3


class Said(bytes):
    def __bytes__(self) -> bytes:
        return b"something else"


class Odd(kbatch.Envelope[Any]):
    def replace(self, **changes: Any) -> Any:
        return None


BODIES = [Number(7), Said(b"the buffer"), bytearray(b"array"), memoryview(b"view"), (ctypes.c_int64 * 1)(-7)]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
@pytest.mark.parametrize("kind", [kbatch.Envelope, Odd])
def test_a_batched_sender_sends_the_buffer(body: Any, kind: type[kbatch.Envelope[Any]]) -> None:
    producer = MemoryProducer()
    topic = kbatch.KafkaTopic("orders", mode=kbatch.SenderMode.BUFFERED, producer=producer)
    with topic.create_sender() as sender:
        sender.send(kind(data=body))
    assert producer.send_batch("orders", [kind(data=body)]).ok
    assert [record.value() for record in producer.records] == [memoryview(body).tobytes()] * 2
    producer.close()


def test_more_headers_than_readers_take_are_refused() -> None:
    producer = MemoryProducer(wire="raw")
    assert producer.send_batch("t", [kbatch.Envelope(1, headers=[("x", b"")] * 100_000)]).ok
    with pytest.raises(kbatch.SerializationError, match=r"100001 headers; readers refuse more than 100000"):
        producer.send_batch("t", [kbatch.Envelope(1, headers=[("x", b"")] * 100_001)])
    producer.close()


class Consumed:
    """Where a record was read."""

    def error(self) -> None: ...
    def topic(self) -> str:
        return "t"

    def partition(self) -> int:
        return 0

    def offset(self) -> int:
        return 5


def test_a_null_value_is_sent_on_as_one() -> None:
    producer = MemoryProducer()

    class Record(Consumed):
        def key(self) -> bytes:
            return b"k"

        def value(self) -> None: ...
        def timestamp(self) -> tuple[int, int]:
            return 1, 1_700_000_000_000

        def headers(self) -> Any:
            return [("message-type", b"order.gone")]

    read = kbatch.read_envelope(Record())
    assert read.message is None
    assert producer.send_batch("t", [read, read.replace(topic="other")]).ok
    assert [record.value() for record in producer.records] == [None, None]
    headers = dict(producer.records[0].headers() or ())
    assert headers["message-type"] == b"order.gone"
    assert "content-type" not in headers
    producer.close()


def test_a_header_name_that_is_no_utf_8_is_told() -> None:
    class Record(Consumed):
        def headers(self) -> Any:
            raise SystemError("returned a result with an exception set")

    with pytest.raises(kbatch.DeserializationError, match="the name of one of its headers is not UTF-8"):
        kbatch.read_envelope(Record())  # type: ignore[arg-type]
