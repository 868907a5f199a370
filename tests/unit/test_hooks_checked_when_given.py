"""What users give to be called is looked at when it is given, and not when it is called."""

import asyncio
import enum
import functools
import json
import pickle
import queue
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest
from confluent_kafka.serialization import IntegerSerializer, StringSerializer

import kbatch
from kbatch import ConfigError, Envelope, aio
from kbatch.testing import MemoryProducer
from kbatch.testing.aio import MemoryProducer as AioMemoryProducer
from tests.mapping import NOWHERE


class Wire:
    def __init__(self, write: Callable[..., Any]) -> None:
        self.write = write


def submitted(callback: Callable[..., object]) -> None:
    with MemoryProducer() as producer:
        try:
            producer.submit("orders", [Envelope(1)], callback=callback).wait()
        finally:
            assert len(producer.records) == (1 if callback in taken(1) else 0)


def submitted_on_loop(callback: Callable[..., object]) -> None:
    async def run() -> None:
        async with AioMemoryProducer() as producer:
            await (await producer.submit("orders", [Envelope(1)], callback=callback))

    asyncio.run(run())


def added(callback: Callable[..., object]) -> None:
    with MemoryProducer() as producer:
        pending = producer.submit("orders", [Envelope(1)])
        pending.wait()
        pending.add_done_callback(callback)


def told(name: str) -> Callable[[Any], object]:
    return lambda hook: kbatch.Producer({**NOWHERE, name: hook}).close()


def made(**options: Any) -> None:
    kbatch.Producer(NOWHERE, **options).close()


def topic(**options: Any) -> None:
    kbatch.KafkaTopic("orders", mode=kbatch.SenderMode.BUFFERED, config=NOWHERE, **options)


def aio_topic(**options: Any) -> None:
    aio.KafkaTopic("orders", mode=kbatch.SenderMode.BUFFERED, config=NOWHERE, **options)


def relay(**options: Any) -> None:
    kbatch.Relay(kbatch.SqliteOutbox("none.db"), NOWHERE, **options).close()


def listener(**options: Any) -> None:
    kbatch.Listener({**NOWHERE, "group.id": "billing"}, ["orders"], print, dead_letter_topic="dead", **options)


# How each hook is given, with how many arguments it is called, and how it is called in an error.
HOOKS: dict[str, tuple[Callable[[Any], object], int, str]] = {
    "encoder": (lambda hook: made(encoder=hook), 2, "(message, context)"),
    "header_hook": (lambda hook: made(header_hook=hook), 0, "no arguments"),
    "wire.write": (lambda hook: made(wire=Wire(hook)), 1, "(envelope)"),
    "error_cb": (told("error_cb"), 1, "(error)"),
    "stats_cb": (told("stats_cb"), 1, "(stats)"),
    "throttle_cb": (told("throttle_cb"), 1, "(event)"),
    "oauth_cb": (told("oauth_cb"), 1, "(config)"),
    "on_failed": (lambda hook: topic(on_failed=hook), 2, "(envelope, error)"),
    "on_state_change": (lambda hook: aio_topic(on_state_change=hook), 2, "(before, after)"),
    "on_state_change ": (lambda hook: relay(on_state_change=hook), 2, "(before, after)"),
    "on_dead": (lambda hook: relay(on_dead=hook), 1, "(letter)"),
    "on_dead ": (lambda hook: listener(on_dead=hook), 2, "(envelope, error)"),
    "when": (lambda hook: MemoryProducer().fail(when=hook), 1, "(envelope)"),
    "callback": (submitted, 1, "(report)"),
    "callback ": (submitted_on_loop, 1, "(report)"),
    "callback  ": (added, 1, "(batch)"),
}


class Methods:
    def none(self) -> None: ...
    def one(self, a: Any) -> None: ...
    def two(self, a: Any, b: Any) -> None: ...
    def three(self, a: Any, b: Any, c: Any) -> None: ...


class Called(Methods):
    __call__ = Methods.two


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def called(*arguments: Any) -> None: ...

    return called


# Callables by the number of arguments that they take.
TAKERS: dict[int, list[Callable[..., Any]]] = {
    0: [lambda: None, Methods().none],
    1: [lambda a: None, lambda a, *, b=None: None, Methods().one, functools.partial(lambda a, b: None, b=1)],
    2: [lambda a, b: None, Methods().two, Called(), functools.partial(Methods().three, 1)],
    3: [lambda a, b, c: None, Methods().three, lambda a, b, *, c: None],
}
ANYTHING: list[Callable[..., Any]] = [lambda *a: None, Mock(return_value=None), decorated(Methods().three)]


def taken(count: int) -> list[Callable[..., Any]]:
    return TAKERS[count] + ANYTHING


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("count", TAKERS)
def test_a_hook_takes_what_it_is_called_with(name: str, count: int) -> None:
    give, needed, shown = HOOKS[name]
    if count == needed:
        for hook in taken(count):
            give(hook)
        return
    for hook in TAKERS[count]:
        with pytest.raises((ConfigError, TypeError)) as caught:
            give(hook)
        assert str(caught.value).startswith(f"{name.strip()} must take {shown}, but ")
        assert "message, context" in str(caught.value) or name != "encoder"


@pytest.mark.parametrize("name", [name for name in HOOKS if name != "wire.write"])
def test_a_hook_can_be_called(name: str) -> None:
    with pytest.raises((ConfigError, TypeError), match=f"{name.strip()} must be .*callable, not int"):
        HOOKS[name][0](7)


def test_a_header_hook_is_no_coroutine_function() -> None:
    async def hook() -> None: ...

    with pytest.raises(ConfigError, match="header_hook must not be a coroutine function"):
        made(header_hook=hook)


def test_a_signature_that_cannot_be_told_passes() -> None:
    class Odd:
        @property
        def __signature__(self) -> Any:
            raise LookupError

        def __call__(self, *arguments: Any) -> None: ...

    made(header_hook=Odd())
    made(header_hook=dict)  # a class of C's, which tells none before Python 3.13 or so


def test_an_enum_of_texts_in_a_configuration_is_its_text() -> None:
    class Codec(str, enum.Enum):
        LZ4 = "lz4"

    producer = kbatch.Producer({**NOWHERE, "compression.type": Codec.LZ4})
    assert producer._parsed.native.get("compression.type") == "lz4"


# -- encoders


class Model(msgspec.Struct):
    def encoded(self) -> bytes:
        return b"{}"


def late(message: Any, _: Any = None) -> bytes:
    return b""


def known(message: Any, ctx: Any = None) -> bytes:
    return b""


def named(message: Any, the_context: Any = None) -> bytes:
    return b""


@pytest.mark.parametrize("encoder", [late, known, named, StringSerializer(), IntegerSerializer(), ANYTHING[0]])
def test_an_encoder_may_do_without_its_context(encoder: Any) -> None:
    made(encoder=encoder)


@pytest.mark.parametrize(
    ("encoder", "reason"),
    [
        (lambda message: b"", r"must take \(message, context\), but .*<lambda> takes \(message\)"),
        (json.dumps, r"must take \(message, context\), but dumps takes \(obj, \*, "),
        (Model.encoded, r"must take \(message, context\), but Model.encoded takes \(self\)"),
        (pickle.dumps, "which dumps would take for 'protocol'"),
        (str.encode, "which str.encode would take for 'encoding'"),
        (lambda message, indent=2: b"", "which .*<lambda> would take for 'indent'"),
        (bytes, "and bytes does not tell what it takes"),
    ],
)
def test_an_encoder_that_knows_no_context(encoder: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"encoder .*{reason}") as caught:
        made(encoder=encoder)
    assert str(caught.value).endswith("; write a function (message, context) -> bytes that calls it")


def test_the_encoder_of_orjson() -> None:
    orjson = pytest.importorskip("orjson", reason="platform: orjson has no wheel here")
    with pytest.raises(ConfigError, match=r"encoder .*(would take for 'default'|does not tell what it takes)"):
        made(encoder=orjson.dumps)
    made(encoder=lambda message, context: orjson.dumps(message))


@pytest.mark.parametrize("encoder", [msgspec.json.Encoder(), msgspec.msgpack.Encoder()])
@pytest.mark.parametrize("message", [deque([1]), Path("x"), queue.Queue(), {"a": Path("x")}], ids=type)
def test_a_message_that_the_encoder_does_not_know(encoder: Any, message: Any) -> None:
    advice = (
        r"is unsupported: give the producer an encoder that knows how, such as msgspec\.json\.Encoder\(enc_hook=…\), "
        r"or a callable \(message, context\) -> bytes$"
    )
    with kbatch.Producer(NOWHERE, encoder=encoder) as producer, pytest.raises(kbatch.SerializationError, match=advice):
        producer._map("orders", [Envelope(message)])


def test_the_error_of_a_hook_of_the_encoder_is_its_own() -> None:
    def refuse(value: object) -> Any:
        raise TypeError("no such thing")

    refused = pytest.raises(kbatch.SerializationError, match=r"message cannot be encoded: no such thing$")
    with kbatch.Producer(NOWHERE, encoder=msgspec.json.Encoder(enc_hook=refuse)) as producer, refused:
        producer._map("orders", [Envelope(Path("x"))])


@pytest.mark.parametrize("library", ["pydantic", "numpy"])
def test_a_message_of_a_library(library: str) -> None:
    module = pytest.importorskip(library, reason=f"platform: {library} is not here")
    message = module.create_model("Order", id=(int, 1))() if library == "pydantic" else module.array([1])
    with kbatch.Producer(NOWHERE) as producer, pytest.raises(kbatch.SerializationError, match="give the producer an"):
        producer._map("orders", [Envelope(message)])
