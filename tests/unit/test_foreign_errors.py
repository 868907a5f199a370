"""Exceptions of foreign code that cannot be shown: the envelope they came with is refused, and nobody else."""

from collections.abc import Callable
from typing import Any

import pytest

import kbatch
from kbatch import Envelope
from kbatch._batch_sender import answer_refusal
from kbatch._errors import exception_text, named_exception_text, type_name
from kbatch._pending import PendingBatch
from tests import mapping


class Whim(BaseException):
    pass


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not now")

    __repr__ = __str__


class Numeric(Exception):
    def __str__(self) -> Any:  # type: ignore[override]
        return 5


class Wild(Exception):
    def __str__(self) -> str:
        raise Whim


class Endless(Exception):
    def __str__(self) -> str:
        return str(self)


class Detached:
    def __repr__(self) -> str:
        raise Whim("the session is closed")


class Loud(str):
    __slots__ = ()

    def __str__(self) -> str:
        raise Whim

    __repr__ = __str__
    __format__ = __hash__ = __eq__ = __str__  # type: ignore[assignment]


class Shouting(Exception):
    def __str__(self) -> str:
        return Loud("loud")


class Unformatted(Exception):
    def __format__(self, _: str) -> str:
        raise Whim


class Secretive(type):
    def __getattribute__(cls, name: str) -> Any:
        raise Whim(name)


def hidden() -> BaseException:
    # Not a class of the module: pytest asks each of those for its attributes.
    class Hidden(Exception, metaclass=Secretive):
        def __str__(self) -> str:
            raise RuntimeError

    return Hidden()


ODD: list[tuple[Callable[[], BaseException], str]] = [
    (Mute, "Mute"),
    (Numeric, "Numeric"),
    (Wild, "Wild"),
    (Endless, "Endless"),
    (lambda: NotImplementedError(Detached()), "NotImplementedError"),
    (Shouting, "loud"),
    (lambda: Unformatted("plain"), "plain"),
    (hidden, "Hidden"),
    (lambda: ValueError("a \ud800 b"), "a \\ud800 b"),
    (lambda: ValueError("plain"), "plain"),
    (lambda: KeyError(), "KeyError"),
]
IDS = [expected + str(i) for i, (_, expected) in enumerate(ODD)]


@pytest.mark.parametrize(("make_error", "expected"), ODD, ids=IDS)
def test_an_exception_as_text(make_error: Callable[[], BaseException], expected: str) -> None:
    error = make_error()
    text = exception_text(error)
    assert (type(text), text) == (str, expected)
    name = type_name(error)
    assert named_exception_text(error) == (name if text == name else f"{name}: {expected}")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_is_not_swallowed(kind: type[BaseException]) -> None:
    class Slow(Exception):
        def __str__(self) -> str:
            raise kind

    with pytest.raises(kind):
        exception_text(Slow())


def raising(error: BaseException) -> Any:
    def fail(*_: object) -> Any:
        raise error

    return fail


class Wire:
    def write(self, envelope: Envelope[Any]) -> tuple[None, bytes, None]:
        if callable(envelope.message):
            envelope.message()
        return None, b"x", None


def encode(message: Any, _: object) -> bytes:
    if callable(message):
        message()
    return b"x"


class Typed(type):
    """A class whose name as a message type fails."""

    error: BaseException

    @property
    def __message_type__(cls) -> str:
        raise cls.error


def untyped(error: BaseException) -> Any:
    return Typed("Untyped", (), {"error": error})()


class Unhashable(type):
    __hash__ = None  # type: ignore[assignment]


class Guarded(type):
    def __getattr__(cls, name: str) -> Any:
        raise Whim(name)


def places(error: BaseException) -> dict[str, tuple[dict[str, Any], Envelope[Any]]]:
    return {
        "encoder": ({"encoder": encode}, Envelope(raising(error))),
        "wire": ({"wire": Wire()}, Envelope(raising(error))),
        "message type": ({"encoder": encode}, Envelope(untyped(error))),
        "a header's name": ({}, Envelope(1, headers=[(Loud("x"), 5)])),
        "a header's name that is reserved": ({}, Envelope(1, headers=[(Loud("id"), "x")])),
        "a header's value": ({}, Envelope(1, headers=[("x", Detached())])),
        "a body's class": ({"encoder": lambda *_: raising(error)}, Envelope(1, message_type="x")),
        "the key": ({}, Envelope(1, key=Detached())),
        "topic": ({}, Envelope(1, topic=Loud("no topic"))),
    }


@pytest.mark.parametrize("place", places(ValueError()))
@pytest.mark.parametrize(("make_error", "_expected"), [*ODD, (Whim, "Whim")], ids=[*IDS, "Whim"])
def test_only_the_guilty_is_rejected(place: str, make_error: Callable[[], BaseException], _expected: str) -> None:
    options, odd = places(make_error())[place]
    rejected: list[tuple[int, kbatch.SerializationError]] = []
    several = [Envelope("good", message_type="t") for _ in range(100)]
    several[50] = odd
    if place == "a body's class":
        options = {"encoder": lambda message, _: b"x" if message == "good" else object()}
    with kbatch.Producer(mapping.NOWHERE, **options) as producer:
        batch = PendingBatch(producer._core)
        producer._core.map(batch, "orders", several, rejected)
        records = producer._core.records(batch)
    assert [index for index, _ in rejected] == [50]
    assert type(rejected[0][1]) is kbatch.SerializationError
    assert [record is None for record in records] == [index == 50 for index in range(100)]


@pytest.mark.parametrize("meta", [Unhashable, Guarded])
def test_a_class_that_no_cache_takes_stops_no_other(meta: Any) -> None:
    odd = meta("Odd", (), {})
    rejected: list[tuple[int, kbatch.SerializationError]] = []
    with kbatch.Producer(mapping.NOWHERE, encoder=lambda *_: b"x") as producer:
        batch = PendingBatch(producer._core)
        producer._core.map(batch, "orders", [Envelope(1), Envelope(odd()), Envelope(2)], rejected)
        records = producer._core.records(batch)
    assert {index for index, _ in rejected} <= {1}
    assert (records[0] is None, records[2] is None) == (False, False)


@pytest.mark.parametrize(("make_error", "_expected"), ODD, ids=IDS)
@pytest.mark.parametrize("place", ["encoder", "wire", "message type"])
def test_alone_it_is_a_serialization_error(place: str, make_error: Callable[[], BaseException], _expected: str) -> None:
    error = make_error()
    options, odd = places(error)[place]
    with kbatch.Producer(mapping.NOWHERE, **options) as producer:
        with pytest.raises(kbatch.SerializationError) as raised:
            producer._core.map(PendingBatch(producer._core), "orders", [Envelope("good", message_type="t"), odd])
        assert raised.value.index == 1
        assert raised.value.__cause__ is error


@pytest.mark.parametrize(("make_error", "_expected"), ODD, ids=IDS)
@pytest.mark.parametrize("sender", [kbatch.KafkaSender, kbatch.SendingAgent])
def test_one_callback_whatever_fails(sender: Any, make_error: Callable[[], BaseException], _expected: str) -> None:
    error = make_error()

    class Batch:
        destination = "orders"

        @property
        def envelopes(self) -> Any:
            raise error

    calls: list[tuple[str, Any]] = []

    class Callback(kbatch.SenderCallback):
        def __getattribute__(self, name: str) -> Any:
            return lambda _, outcome: calls.append((name, outcome))

    with kbatch.Producer(mapping.NOWHERE) as producer:
        made = sender(producer, "orders")
        made.send_batch(Callback(), Batch())
        assert [method for method, _ in calls] == ["mark_serialization_failure"]
        method, answer = answer_refusal(producer, Batch(), error, False)  # type: ignore[arg-type]
        assert (method, type(answer.args[0])) == ("mark_processing_failure", str)
        if sender is kbatch.SendingAgent:
            made.close()


@pytest.mark.parametrize("sender", [kbatch.KafkaSender, kbatch.SendingAgent])
def test_one_callback_also_if_it_is_no_exception(sender: Any) -> None:
    class Batch:
        destination = "orders"

        @property
        def envelopes(self) -> Any:
            raise Whim

    calls: list[tuple[str, Any]] = []

    class Callback(kbatch.SenderCallback):
        def __getattribute__(self, name: str) -> Any:
            return lambda _, outcome: calls.append((name, type(outcome)))

    with kbatch.Producer(mapping.NOWHERE) as producer:
        made = sender(producer, "orders")
        with pytest.raises(Whim):
            made.send_batch(Callback(), Batch())
        assert calls == [("mark_processing_failure", kbatch.BatchInterruptedError)]
        if sender is kbatch.SendingAgent:
            made.close()
