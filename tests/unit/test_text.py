"""What comes from outside is one line in a log or on a terminal, and sentences agree with their numbers."""

from types import SimpleNamespace
from typing import Any

import pytest

import kbatch
from kbatch._errors import exception_text, shown, undelivered_error
from kbatch._events import make_dispatcher
from kbatch._text import counted, printable
from kbatch.testing import MemoryProducer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, ключ 😀", "plain, ключ 😀"),
        ("a\nb\r\tc\0", "a\\nb\\r\\tc\\x00"),
        ("\x1b[2J\x7f\x9b", "\\x1b[2J\\x7f\\x9b"),
        ("\u2028\u202e\ufeff", "\\u2028\\u202e\\ufeff"),
        ("\ud800", "\\ud800"),
        ("C:\\new", "C:\\new"),
        ("", ""),
    ],
)
def test_text_from_outside_is_one_line(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert exception_text(ValueError(text)) == expected or not text


class Forged(str):
    __slots__ = ()

    def isprintable(self) -> bool:
        return True

    def __str__(self) -> str:
        return "\n"


def test_a_class_of_text_cannot_get_around_it() -> None:
    text = printable(Forged("a\nb"))
    assert (type(text), text) == (str, "a\\nb")


class Drawn:
    def __repr__(self) -> str:
        return "\x1b[31mred\n"


def test_errors_show_foreign_text_on_one_line() -> None:
    assert shown(Drawn()) == "\\x1b[31mred\\n"

    def encode(message: Any, _: object) -> bytes:
        raise ValueError(message)

    producer = MemoryProducer(encoder=encode)
    with pytest.raises(kbatch.SerializationError, match=r"one\\nkbatch: all is well$"):
        producer.send_batch("t", [kbatch.Envelope("one\nkbatch: all is well")])
    producer.close()


@pytest.mark.parametrize(
    "config",
    [
        {"a\nkbatch: all is well": "1"},
        {"compression.codec": "a\nkbatch: all is well"},
        {"acks": "all", "linger.ms": "a\x1b[2J"},
    ],
)
def test_the_text_of_every_error_is_one_line(config: dict[str, str]) -> None:
    with pytest.raises(kbatch.ConfigError) as caught:
        kbatch.Producer({"bootstrap.servers": "127.0.0.1:1", **config})
    assert str(caught.value).isprintable()
    assert str(kbatch.BatchPendingError("a\nb", None)) == str(kbatch.SenderFullError("a\nb")) == "a\\nb"


def test_lines_of_librdkafka_are_one_line_each() -> None:
    got: list[str] = []

    class Logger:
        def log(self, level: int, text: str, *arguments: object) -> None:
            got.append(text % arguments)

    class Callbacks:
        waiting = 0

        def put(self, function: Any, *arguments: object) -> None:
            function(*arguments)

    config: Any = SimpleNamespace(error_cb=None, stats_cb=None, throttle_cb=None, oauth_cb=None, logger=Logger())
    made: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kbatch._events.Dispatcher", lambda *_, **keywords: made.update(keywords))
        make_dispatcher(config, Callbacks(), lambda: None)  # type: ignore[arg-type]
    made["on_log"](3, "FAIL", "rdkafka#producer-1", "broker says: a\nb\x1b[2J")
    assert got == ["FAIL [rdkafka#producer-1] broker says: a\\nb\\x1b[2J"]


@pytest.mark.parametrize(("count", "expected"), [(0, "0 lines"), (1, "1 line"), (2_000, "2,000 lines")])
def test_numbers_and_their_nouns(count: int, expected: str) -> None:
    assert counted(count, "line") == expected


def test_sentences_agree_with_their_numbers(caplog: pytest.LogCaptureFixture) -> None:
    assert counted(1, "batch is", "batches are") == "1 batch is"
    failure = (kbatch.Envelope(1), kbatch.SenderError("why"), 0)
    assert str(undelivered_error("envelopes were given up", [failure], 1)).startswith("1 envelope was given up; ")
    with MemoryProducer() as producer:
        producer.fail("TOPIC_AUTHORIZATION_FAILED", times=4)
        batch = producer.submit("t", [kbatch.Envelope(1)])
        assert repr(batch.wait()).startswith("<DeliveryReport 1 envelope: ")
        assert repr(batch) == "<PendingBatch of 1 envelope, done>"
        for count in (1, 2):
            sender = kbatch.BatchedSender(kbatch.SendingAgent(producer, "t"), batch_size=2, batch_timeout_ms=1)
            for _ in range(count):
                sender.send(kbatch.Envelope(1))
            with pytest.raises(kbatch.UndeliveredError):
                sender.close()
    told = [record.getMessage() for record in caplog.records]
    assert any(text.startswith("1 envelope to 't' was given up; the first, ") for text in told)
    assert any(text.startswith("2 envelopes to 't' were given up; the first, ") for text in told)
