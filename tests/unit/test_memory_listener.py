"""Listeners in memory: the very decisions of a listener, without a broker, threads or time."""

import asyncio
import contextlib
import datetime
import sqlite3
from typing import Any

import msgspec
import pytest

import kbatch
from kbatch import Envelope, testing
from kbatch.testing import MemoryListener
from kbatch.testing import aio as testing_aio


class Order(msgspec.Struct):
    number: int


ONCE = kbatch.RetryPolicy(max_attempts=1)


@pytest.fixture(params=["threads", "asyncio"])
def send(request: pytest.FixtureRequest) -> Any:
    """Hands envelopes to a handler by both kinds of listeners; returns what became of them, and the listener."""

    def call(handler: Any, *envelopes: Envelope[Any], **options: Any) -> tuple[list[testing.MemoryOutcome], Any]:
        if request.param == "threads":
            listener = MemoryListener(handler, **options)
            return listener.send(*envelopes), listener

        async def awaited(envelope: kbatch.ReceivedEnvelope[Any], transaction: Any = None) -> None:
            await asyncio.sleep(0)
            if transaction is None:
                handler(envelope)
            else:
                handler(envelope, transaction._of_threads)

        of_loop = testing_aio.MemoryListener(awaited, **options)
        return asyncio.run(of_loop.send(*envelopes)), of_loop

    return call


def test_a_handler_sees_what_it_would_see_of_a_record(send: Any) -> None:
    seen: list[kbatch.ReceivedEnvelope[Order]] = []
    envelope = Envelope(Order(7), key="k", headers=[("h", b"\xff")], attempts=2)
    for wire in ("kbatch", "wolverine", "cloudevents"):
        (outcome,), _ = send(seen.append, envelope, types={"Order": Order}, wire=wire, source="shop")
        assert (outcome.outcome, outcome.attempts, outcome.errors) == ("handled", 1, [])
        assert isinstance(seen[-1], kbatch.ReceivedEnvelope)
        assert (seen[-1].message, seen[-1].key, seen[-1].topic, seen[-1].offset) == (Order(7), b"k", "test", 0)
        assert (seen[-1].id, seen[-1].attempts) == (envelope.id, 2)
        assert ("h", b"\xff") in seen[-1].headers


def test_keys_are_in_order_while_one_is_tried_again_and_others_go_on(send: Any) -> None:
    seen: list[tuple[bytes, int]] = []

    def handle(envelope: kbatch.ReceivedEnvelope[Order]) -> None:
        seen.append((envelope.key, envelope.message.number))
        if envelope.message.number == 0 and seen.count(seen[-1]) < 3:
            raise ValueError

    envelopes = [Envelope(Order(0), key="a"), Envelope(Order(1), key="a"), Envelope(Order(2), key="b")]
    outcomes, listener = send(handle, *envelopes, types={"Order": Order}, concurrency=2)
    assert [(each.outcome, each.attempts) for each in outcomes] == [("handled", 3), ("handled", 1), ("handled", 1)]
    assert seen == [(b"a", 0), (b"b", 2), (b"a", 0), (b"a", 0), (b"a", 1)]
    assert listener.stats() == {"attempts_failed": 2, "to_retry": 0, "dead": 0}


@pytest.mark.parametrize(
    ("concurrency", "order"), [(None, ["bad", "bad", "other", None]), (2, ["bad", "other", None, "bad"])]
)
def test_by_default_all_of_a_partition_wait_for_a_record_that_is_tried_again(
    send: Any, concurrency: int | None, order: list[str | None]
) -> None:
    seen: list[bytes | None] = []

    def handle(envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        seen.append(envelope.key)
        if seen == [b"bad"]:
            raise ValueError

    options = {} if concurrency is None else {"concurrency": concurrency}
    outcomes, _ = send(handle, *(Envelope({}, key=key) for key in ("bad", "other", None)), **options)
    assert [each.outcome for each in outcomes] == ["handled"] * 3
    assert seen == [None if key is None else key.encode() for key in order]


def test_what_fails_goes_through_the_retry_topics_to_the_dead_letters(send: Any) -> None:
    def handle(envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        if envelope.key == b"bad":
            raise LookupError("no stock")

    options = {"retry": ONCE, "retry_topics": [5, 600], "dead_letter_topic": "dead", "group": "g"}
    (bad, good), listener = send(handle, Envelope({}, key="bad"), Envelope({}, key="good"), **options)
    assert (good.outcome, good.topics) == ("handled", ["test"])
    assert (bad.outcome, bad.topics) == ("dead", ["test", "g.retry.5", "g.retry.600"])
    assert [str(error) for error in bad.errors] == ["no stock"] * 3
    assert listener.dead_letters == (bad.dead_letter,)
    letter = kbatch.read_envelope(bad.dead_letter)
    assert (letter.key, letter.data, letter.attempts) == (b"bad", b"{}", 3)
    headers = dict(letter.headers)
    assert headers["original-destination"] == b"kafka://topic/test"
    assert headers["exception-message"] == b"no stock"


def test_a_record_that_succeeds_in_a_retry_topic_is_handled(send: Any) -> None:
    tries: list[str] = []

    def handle(envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        tries.append(envelope.topic)
        if len(tries) < 2:
            raise ValueError

    (outcome,), listener = send(handle, Envelope({}), retry=ONCE, retry_topics=[5])
    assert (outcome.outcome, outcome.topics, listener.dead_letters) == ("handled", ["test", "test.retry.5"], ())
    assert tries == ["test", "test.retry.5"]


def test_a_record_without_an_id_has_the_same_one_in_a_retry_topic(send: Any) -> None:
    ids: list[Any] = []

    def handle(envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        ids.append(envelope.id)
        if envelope.topic != "test.retry.5":
            raise ValueError

    retry_topics = [1.0, 5.0]
    outcomes, _ = send(handle, Envelope(b"1"), Envelope(b"2"), wire="raw", retry=ONCE, retry_topics=retry_topics)
    assert [outcome.outcome for outcome in outcomes] == ["handled", "handled"]
    assert sorted(ids.count(each) for each in set(ids)) == [3, 3]


def test_where_a_listener_would_end_the_rest_waits(send: Any) -> None:
    def handle(envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        raise ZeroDivisionError

    outcomes, _ = send(handle, Envelope({}, key="k"), Envelope({}, key="k"), retry=ONCE)
    assert [each.outcome for each in outcomes] == ["failed", "waiting"]
    assert [type(error) for error in outcomes[0].errors] == [ZeroDivisionError]


def test_what_cannot_be_decoded_is_dead_at_once(send: Any) -> None:
    called: list[object] = []
    envelope = Envelope(data=b'{"number": "x"}', message_type="Order")
    (outcome,), _ = send(called.append, envelope, types={"Order": Order}, dead_letter_topic="dead", retry_topics=[5])
    assert (outcome.outcome, outcome.attempts, called) == ("dead", 1, [])
    assert isinstance(outcome.errors[0], kbatch.DeserializationError)


@pytest.mark.parametrize("wire", ["raw", "kbatch"])
def test_a_record_that_names_no_type_has_the_type_bytes(send: Any, wire: str) -> None:
    seen: list[Any] = []
    for types in ({"Order": Order}, {"bytes": Order}):
        send(lambda envelope: seen.append(envelope.message), Envelope(data=b'{"number":7}'), types=types, wire=wire)
    assert seen == [msgspec.UNSET, Order(7)]


def test_what_is_scheduled_is_handed_out_at_once(send: Any) -> None:
    later = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=1)
    seen: list[Any] = []
    send(lambda envelope: seen.append(envelope.scheduled_time), Envelope({}, scheduled_time=later))
    assert seen == [later]


def test_dead_letters_are_told_before_send_returns(send: Any) -> None:
    told: list[tuple[str, int, str]] = []

    def handle(envelope: kbatch.ReceivedEnvelope[Order]) -> None:
        if envelope.message.number % 2:
            raise ValueError(f"odd {envelope.message.number}")

    def on_dead(envelope: kbatch.ReceivedEnvelope[Order], error: Exception) -> None:
        told.append((envelope.topic, envelope.message.number, str(error)))

    envelopes = [Envelope(Order(number)) for number in range(4)]
    options = {"retry": ONCE, "retry_topics": [5], "dead_letter_topic": "dead", "on_dead": on_dead}
    _, listener = send(handle, *envelopes, types={"Order": Order}, **options)
    assert told == [("test.retry.5", 1, "odd 1"), ("test.retry.5", 3, "odd 3")]
    assert len(listener.dead_letters) == 2


def test_a_database_that_never_answers_ends_no_test_and_no_record(send: Any) -> None:
    class GoneError(Exception):
        is_outage = True

    def handle(envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        raise GoneError

    (outcome,), listener = send(handle, Envelope({}), retry=ONCE, retry_topics=[5], dead_letter_topic="dead")
    assert (outcome.outcome, listener.dead_letters) == ("waiting", ())
    assert outcome.attempts == 1000


def test_what_is_no_exception_of_a_program_comes_out(send: Any) -> None:
    def handle(envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        pytest.fail("of the test")

    with pytest.raises(pytest.fail.Exception, match="of the test"):
        send(handle, Envelope({}))


def test_wrong_options_are_refused_as_a_listener_refuses_them() -> None:
    with pytest.raises(kbatch.ConfigError, match="handler "):
        MemoryListener(None)  # type: ignore[arg-type]
    with pytest.raises(kbatch.ConfigError, match="topics must be a list"):
        MemoryListener(print, topics="orders")
    with pytest.raises(kbatch.ConfigError, match="retry_topics must be seconds"):
        MemoryListener(print, retry_topics="5")


def test_the_plugin_gives_doubles(memory_producer: Any, memory_listener: Any, sqlite_outbox: Any) -> None:
    assert memory_producer.send_batch("orders", [Envelope({})]).ok
    assert memory_listener(lambda _: None).send(Envelope({}))[0].outcome == "handled"
    assert sqlite_outbox.status().waiting == 0


def test_an_inbox_leaves_out_what_was_handled_and_commits_with_the_mark(tmp_path: Any) -> None:
    inbox = kbatch.SqliteInbox(tmp_path / "shop.db")
    inbox.create()
    calls: list[int] = []

    def handle(envelope: kbatch.ReceivedEnvelope[Any], connection: Any) -> None:
        connection.execute("CREATE TABLE IF NOT EXISTS invoices (number)")
        connection.execute("INSERT INTO invoices VALUES (?)", (envelope.message["n"],))
        calls.append(envelope.message["n"])
        if len(calls) == 1:
            raise ValueError("rolled back")

    envelope = Envelope({"n": 7}, message_type="order")
    listener = MemoryListener(handle, types={"order": dict[str, int]}, inbox=inbox)
    assert [each.outcome for each in listener.send(envelope, envelope)] == ["handled", "handled"]
    assert calls == [7, 7]  # the first one was not committed, the copy is not handled
    with contextlib.closing(sqlite3.connect(tmp_path / "shop.db")) as connection:
        assert connection.execute("SELECT number FROM invoices").fetchall() == [(7,)]


def test_what_is_sent_in_a_transaction_is_seen_when_its_handler_has_returned(send: Any) -> None:
    during: list[int] = []
    made: list[Any] = []
    base = testing._memory_listener.BaseMemoryListener
    init = base.__init__

    def handle(envelope: kbatch.ReceivedEnvelope[Order], transaction: kbatch.Transaction) -> None:
        transaction.send("invoices", [Envelope(envelope.message.number, key="k")])
        during.append(len(made[0].sent))
        if envelope.message.number == 1:
            raise ValueError("no such customer")

    def noting(self: Any, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "__init__", noting)
        outcomes, listener = send(
            handle,
            *(Envelope(Order(n), key=str(n)) for n in range(3)),
            types={"Order": Order},
            retry=ONCE,
            dead_letter_topic="dead",
            transactional_id="one",
        )
    assert [each.outcome for each in outcomes] == ["handled", "dead", "handled"]
    assert during == [0, 1, 1]
    assert [(each.topic(), each.offset(), each.key(), each.value()) for each in listener.sent] == [
        ("invoices", 0, b"k", b"0"), ("invoices", 1, b"k", b"2")
    ]  # fmt: skip
    assert len(listener.dead_letters) == 1


def test_what_cannot_be_sent_in_a_transaction_is_the_handlers_failure(send: Any) -> None:
    def handle(envelope: Any, transaction: kbatch.Transaction) -> None:
        transaction.send("invoices", [Envelope(1)])
        transaction.send("invoices", [Envelope(object())])

    (outcome,), listener = send(handle, Envelope(1), retry=ONCE, transactional_id="one")
    assert outcome.outcome == "failed"
    assert isinstance(outcome.errors[0], kbatch.SerializationError)
    assert listener.sent == ()


def test_transactions_keep_the_order_of_a_partition(send: Any) -> None:
    seen: list[int] = []

    def handle(envelope: kbatch.ReceivedEnvelope[Order], transaction: kbatch.Transaction) -> None:
        seen.append(envelope.message.number)
        if len(seen) == 1:
            raise ValueError("again")

    send(handle, *(Envelope(Order(n), key=str(n)) for n in range(3)), types={"Order": Order}, transactional_id="one")
    assert seen == [0, 0, 1, 2]


def test_what_contradicts_transactions_is_refused_in_memory() -> None:
    with pytest.raises(kbatch.ConfigError, match="contradicts inbox"):
        MemoryListener(lambda *_: None, inbox=kbatch.SqliteInbox("shop.db"), transactional_id="one")
    with pytest.raises(kbatch.ConfigError, match="transactional_id must be a name"):
        MemoryListener(lambda *_: None, transactional_id="")
