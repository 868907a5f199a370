"""Foreign code that runs while a batch is mapped: encoders and hooks that sleep, send, or take the encoder's buffer."""

import ctypes
import gc
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import psutil
import pytest

import kbatch
from kbatch import Envelope
from kbatch.testing import MockCluster

from ..conftest import SLOW_BUILD
from ..sending import KINDS, Driver
from .clients import end_offsets, read_back

TOPIC = "orders"
MIB = 1 << 20


@pytest.fixture
def cluster(kafka_cluster: MockCluster) -> MockCluster:
    kafka_cluster.create_topic(TOPIC, partitions=1)
    return kafka_cluster


def make(cluster: MockCluster, encoder: Any, **config: Any) -> kbatch.Producer:
    servers = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0}
    return kbatch.Producer(servers | config, encoder=encoder, wire="raw")


class Foreign:
    """What msgspec gives to its ``enc_hook``."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size

    def text(self) -> str:
        return self.name + "x" * self.size


def stored(cluster: MockCluster) -> list[str]:
    return [json.loads(record.value or b"") for record in read_back(cluster.bootstrap_servers, TOPIC)]


def in_threads(*functions: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def run(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


@pytest.mark.parametrize("kind", [msgspec.json.Encoder, msgspec.msgpack.Encoder])
def test_threads_whose_hooks_sleep(cluster: MockCluster, kind: Any) -> None:
    def hook(value: Foreign) -> str:
        time.sleep(0.0005)
        return value.text()

    sizes = (5, 40_000, 120_000, 800, 12_000)  # the mock cluster keeps 5 MB of a partition
    sent: list[str] = []

    def send(thread: str) -> Callable[[], None]:
        def run() -> None:
            for turn in range(8):
                bodies = [Foreign(f"{thread}{turn}-{i}:", size) for i, size in enumerate(sizes)]
                producer.send_batch(TOPIC, [Envelope(body) for body in bodies]).raise_for_errors()
                sent.extend(body.text() for body in bodies)

        return run

    with make(cluster, kind(enc_hook=hook)) as producer:
        in_threads(send("a"), send("b"))
    decode = msgspec.json.decode if kind is msgspec.json.Encoder else msgspec.msgpack.decode
    values = [decode(record.value or b"") for record in read_back(cluster.bootstrap_servers, TOPIC)]
    assert Counter(values) == Counter(sent)


@pytest.mark.parametrize("way", ["send_batch", "submit"])
def test_a_hook_that_sends_by_the_same_producer(cluster: MockCluster, way: str) -> None:
    inner = [0, 300_000, 7, 90_000]
    sent: list[str] = []

    def hook(value: Foreign) -> str:
        if value.name.startswith("outer"):
            bodies = [Foreign(f"inner-{value.name}-{i}:", size) for i, size in enumerate(inner)]
            report = getattr(producer, way)(TOPIC, [Envelope(body) for body in bodies])
            if way == "submit":
                report = report.wait(30)
            assert report.ok
            sent.extend(body.text() for body in bodies)
        return value.text()

    with make(cluster, msgspec.json.Encoder(enc_hook=hook)) as producer:
        outer = [Foreign(f"outer{i}:", size) for i, size in enumerate((9, 200_000, 50_000, 3, 700_000, 1))]
        assert producer.send_batch(TOPIC, [Envelope(body) for body in outer]).ok
        sent.extend(body.text() for body in outer)
    assert Counter(stored(cluster)) == Counter(sent)


def test_a_finalizer_that_sends_while_a_batch_is_mapped(cluster: MockCluster) -> None:
    sent: list[str] = []

    class Last:
        def __init__(self, name: str) -> None:
            self.name = name
            self.me = self  # for the garbage collector

        def __del__(self) -> None:
            body = self.name + "y" * 150_000
            producer.submit(TOPIC, [Envelope(body)])
            sent.append(body)

    def hook(value: Foreign) -> str:
        Last(f"last-{value.name}")
        gc.collect()
        return value.text()

    with make(cluster, msgspec.json.Encoder(enc_hook=hook)) as producer:
        outer = [Foreign(f"outer{i}:", size) for i, size in enumerate((9, 100_000, 50_000, 3))]
        assert producer.send_batch(TOPIC, [Envelope(body) for body in outer]).ok
        sent.extend(body.text() for body in outer)
        assert producer.flush(30) == 0
    assert Counter(stored(cluster)) == Counter(sent)


# -- a length that is negative


class Buffer(ctypes.Structure):
    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("format", "shape", "strides", "suboffsets", "internal")),
    )


class Slot(ctypes.Structure):
    _fields_ = (("slot", ctypes.c_int), ("function", ctypes.c_void_p))


class Spec(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("basicsize", ctypes.c_int),
        ("itemsize", ctypes.c_int),
        ("flags", ctypes.c_uint),
        ("slots", ctypes.POINTER(Slot)),
    )


BF_GETBUFFER = 1  # Py_bf_getbuffer


@pytest.fixture
def lying_buffer() -> Callable[[int], object]:
    """Makes an object of a C type whose buffer claims a length."""
    kept: list[object] = []
    memory = ctypes.create_string_buffer(64)

    def make_one(length: int) -> object:
        @ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(Buffer), ctypes.c_int)
        def get(me: object, view: Any, _: int) -> int:
            view.contents.buf = ctypes.addressof(memory)
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(me))
            ctypes.cast(ctypes.addressof(view.contents) + 8, ctypes.POINTER(ctypes.c_void_p))[0] = id(me)
            view.contents.len = length
            view.contents.itemsize, view.contents.readonly, view.contents.ndim = 1, 1, 1
            view.contents.format = view.contents.shape = view.contents.strides = None
            view.contents.suboffsets = view.contents.internal = None
            return 0

        slots = (Slot * 2)(Slot(BF_GETBUFFER, ctypes.cast(get, ctypes.c_void_p).value), Slot(0, None))
        spec = Spec(b"tests.Lying", 0, 0, 1 << 18, slots)
        make_type = ctypes.pythonapi.PyType_FromSpec
        make_type.restype, make_type.argtypes = ctypes.py_object, [ctypes.POINTER(Spec)]
        made = make_type(ctypes.byref(spec))
        kept.extend((get, slots, spec, made))
        return made()

    return make_one


@pytest.mark.parametrize("length", [-1, -7, -8, -9, -4096, -sys.maxsize])
@pytest.mark.parametrize("place", ["data", "encoder", "wire"])
def test_a_negative_length_is_refused(
    cluster: MockCluster, lying_buffer: Callable[[int], object], length: int, place: str
) -> None:
    class Wire:
        def write(self, envelope: Envelope[Any]) -> tuple[None, object, None]:
            return None, lying if envelope.message == "odd" else b"fine", None

    lying: Any = lying_buffer(length)
    config = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0}
    encode = lambda message, _: lying if message == "odd" else message.encode()  # noqa: E731
    wire: Any = Wire() if place == "wire" else "raw"
    with kbatch.Producer(config, encoder=encode, wire=wire) as producer:
        odd: Envelope[Any] = Envelope(data=lying) if place == "data" else Envelope("odd")
        with pytest.raises(kbatch.SerializationError, match="negative length") as raised:
            producer.send_batch(TOPIC, [Envelope("fine"), odd])
        assert raised.value.index == 1
        assert end_offsets(cluster.bootstrap_servers, TOPIC) == {0: 0}
        assert producer.send_batch(TOPIC, [Envelope("fine")]).ok
    assert [record.value for record in read_back(cluster.bootstrap_servers, TOPIC)] == [b"fine"]


# -- memory after a giant


def resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def bound(message_max_bytes: int) -> int:
    """The most that may be kept: pooled blocks and records of small batches, and one buffer for the encoder."""
    return max(message_max_bytes, 65536) + 8 * 65536 + MIB


@pytest.mark.skipif(SLOW_BUILD, reason="what is freed stays resident")
@pytest.mark.parametrize("cause", ["its size", "its end", "the batch's last"])
def test_a_giant_that_is_refused_leaves_nothing(cluster: MockCluster, cause: str) -> None:
    with make(cluster, msgspec.json.Encoder()) as producer:
        assert producer.send_batch(TOPIC, [Envelope("first")]).ok
        before = resident()
        giant: list[Any] = ["x" * (50 * MIB)]
        if cause == "its end":
            giant.append(object())
        batch = [Envelope(1), Envelope(giant)] + ([] if cause == "the batch's last" else [Envelope(2)])
        with pytest.raises(kbatch.SerializationError) as raised:
            producer.send_batch(TOPIC, batch)
        assert raised.value.index == 1
        del giant, batch, raised  # its traceback knows the envelopes
        assert producer.stats()["pooled_bytes"] < bound(1_000_000)
        assert resident() - before < 20 * MIB
        assert producer.send_batch(TOPIC, [Envelope("last")]).ok
        assert resident() - before < 20 * MIB
    assert stored(cluster) == ["first", "last"]


def test_a_giant_that_is_sent_is_forgotten(cluster: MockCluster) -> None:
    most, giant = 8 * MIB, "x" * (3 * MIB)
    with make(cluster, msgspec.json.Encoder(), **{"message.max.bytes": most}) as producer:
        assert producer.send_batch(TOPIC, [Envelope(giant)]).ok
        assert 3 * MIB < producer.stats()["pooled_bytes"] <= bound(most)
        assert producer.send_batch(TOPIC, [Envelope("small")]).ok
        assert producer.stats()["pooled_bytes"] < bound(65536)
        assert producer.send_batch(TOPIC, [Envelope("small")]).ok
    assert stored(cluster) == [giant, "small", "small"]


def test_the_encoders_buffer_is_counted(cluster: MockCluster) -> None:
    with make(cluster, msgspec.json.Encoder(), **{"message.max.bytes": 8_000_000}) as producer:
        producer.send_batch(TOPIC, [Envelope("x" * 10)]).raise_for_errors()
        small = producer.stats()["pooled_bytes"]
        assert small >= 65536
        producer.send_batch(TOPIC, [Envelope("x" * 500_000)]).raise_for_errors()
        assert small + 1_000_000 <= producer.stats()["pooled_bytes"] <= bound(8_000_000)
    assert [len(value) for value in stored(cluster)] == [10, 500_000]


@pytest.mark.parametrize("size", [100, 10_000, 60_000, 150_000, 400_000, 900_000])
def test_no_buffer_is_larger_than_a_message_may_be(cluster: MockCluster, size: int) -> None:
    bodies = [str(i) + "x" * size for i in range(3)]
    with make(cluster, msgspec.json.Encoder()) as producer:
        for body in bodies:
            assert producer.send_batch(TOPIC, [Envelope(body), Envelope(body[:9])]).ok
            assert producer.stats()["pooled_bytes"] <= bound(1_000_000)
    assert stored(cluster) == [text for body in bodies for text in (body, body[:9])]


# -- exceptions that cannot be shown


class Mute(Exception):
    def __str__(self) -> str:
        raise self


class Untyped(type):
    @property
    def __message_type__(cls) -> str:
        raise Mute


@pytest.mark.parametrize("kind", KINDS)
def test_a_batched_sender_survives_an_exception_that_has_no_text(cluster: MockCluster, kind: str) -> None:
    odd = Untyped("Odd", (), {})()
    config = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0}
    with kbatch.Producer(config, encoder=lambda message, _: str(message).encode()) as producer:
        with Driver(kind, producer, TOPIC, options={}) as driver:
            for turn in range(2):
                for n in range(100):
                    driver.send(Envelope(odd if n == 50 else 100 * turn + n))
                assert driver.flush() == 0
        assert [type(error) for _, error in driver.given_up] == [kbatch.SerializationError] * 2
    expected = [b"%d" % n for n in range(200) if n % 100 != 50]
    assert [record.value for record in read_back(cluster.bootstrap_servers, TOPIC)] == expected
