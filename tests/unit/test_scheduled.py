"""A scheduled time still to come: refused by a producer, which sends at once, unless it is asked to carry it."""

import asyncio
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

import kbatch
import kbatch.aio
from kbatch import Envelope
from kbatch._pending import PendingBatch
from kbatch.testing import MemoryProducer
from kbatch.testing.aio import MemoryProducer as AioMemoryProducer
from tests import mapping

FUTURE = datetime(2099, 1, 2, 3, 4, 5, 678901, timezone.utc)
PAST = datetime(2020, 1, 2, 3, 4, 5, 678901, timezone.utc)


class Own:
    def write(self, envelope: Envelope[Any]) -> Any:
        return b"k", b"v", {"due": str(envelope.scheduled_time)}


WIRES: list[Any] = ["kbatch", "wolverine", "cloudevents", "raw", Own()]
NAMES: list[Any] = ["kbatch", "wolverine", "cloudevents", "raw", "own"]
every_wire = pytest.mark.parametrize("wire", WIRES, ids=NAMES)
KINDS: list[type[Any]] = [kbatch.Producer, kbatch.aio.Producer]


def make(wire: Any, kind: type[Any] = kbatch.Producer, **options: Any) -> Any:
    return kind(mapping.NOWHERE, wire=wire, source="/shop", **options)


@every_wire
@pytest.mark.parametrize("kind", KINDS)
def test_the_future_is_refused(wire: Any, kind: type[Any]) -> None:
    producer = make(wire, kind)
    envelopes = [Envelope(1, scheduled_time=PAST), Envelope(2), Envelope(3, scheduled_time=FUTURE)]
    with pytest.raises(kbatch.NotYetDueError) as raised:
        producer._map("t", envelopes)
    error = raised.value
    assert (error.index, error.envelope_id) == (2, envelopes[2].id)
    assert error.reason.startswith(
        "scheduled_time 2099-01-02T03:04:05.678901+00:00 is in the future, and a producer sends at once: "
        "give the envelope to a BUFFERED sender or an outbox, which wait until then"
    )
    assert ("carry_scheduled_time=True" in error.reason) == (wire != "raw")  # what is advised is possible


@pytest.mark.parametrize("kind", KINDS)
def test_an_inline_sender_refuses_the_future_as_well(kind: type[Any]) -> None:
    producer: Any = MemoryProducer() if kind is kbatch.Producer else AioMemoryProducer()
    envelope = Envelope(1, scheduled_time=FUTURE)

    def send() -> object:
        if kind is kbatch.Producer:
            return kbatch.InlineSender(producer, "t").send(envelope)
        return asyncio.run(kbatch.aio.InlineSender(producer, "t").send(envelope))

    with pytest.raises(kbatch.NotYetDueError, match=r"2099-01-02T03:04:05\.678901\+00:00 is in the future"):
        send()
    assert (len(producer), producer.envelopes) == (0, ())


@every_wire
def test_the_past_is_sent_as_ever(wire: Any) -> None:
    with make(wire) as producer:
        (record,) = producer._map("t", [Envelope(1, scheduled_time=PAST)])
    assert record is not None


DUE = {
    "kbatch": ("time-to-send", b"2099-01-02T03:04:05.678901Z"),
    "wolverine": ("time-to-send", b"2099-01-02 03:04:05:678901 Z"),
    "cloudevents": ("ce_scheduledtime", b"2099-01-02T03:04:05.678901Z"),
    "own": ("due", str(FUTURE).encode()),
}


@pytest.mark.parametrize("name", DUE)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_carried_if_asked(name: str, kind: type[Any]) -> None:
    producer = make(Own() if name == "own" else name, kind, carry_scheduled_time=True)
    for one in (producer, producer._twin()):
        (record,) = one._map("t", [Envelope(1, scheduled_time=FUTURE)])
        assert DUE[name] in record[5]


def test_a_moment_from_now_and_a_moment_ago() -> None:
    with make("kbatch") as producer:
        for seconds in (-3600, -1, 3600):
            envelope = Envelope(1, scheduled_time=datetime.now(timezone.utc) + timedelta(seconds=seconds))
            if seconds < 0:
                producer._map("t", [envelope])
            else:
                with pytest.raises(kbatch.NotYetDueError):
                    producer._map("t", [envelope])


def test_one_that_has_expired_needs_no_time_to_be_sent() -> None:
    with make("kbatch") as producer:
        assert producer._map("t", [Envelope(1, scheduled_time=FUTURE, deliver_by=PAST)]) == [None]


def test_others_of_the_batch_may_go_on() -> None:
    with make("kbatch") as producer:
        rejected: list[tuple[int, Any]] = []
        batch = PendingBatch(producer._core)
        producer._core.map(batch, "t", [Envelope(1, scheduled_time=FUTURE), Envelope(2)], rejected)
        assert [(index, type(error)) for index, error in rejected] == [(0, kbatch.NotYetDueError)]
        assert [record is None for record in producer._core.records(batch)] == [True, False]


def test_nothing_is_sent_of_a_batch_with_one_that_is_not_yet_due() -> None:
    with MemoryProducer() as producer:
        for send in (producer.send_batch, producer.submit):
            with pytest.raises(kbatch.NotYetDueError) as raised:
                send("t", [Envelope(1), Envelope(2, scheduled_time=FUTURE)])
            assert (raised.value.field, raised.value.index) == ("scheduled_time", 1)
        assert producer.envelopes == ()


def test_a_batch_with_one_that_is_not_yet_due_is_no_serialization_failure() -> None:
    answers: list[tuple[str, Any]] = []

    class Callback(kbatch.SenderCallback):
        def mark_serialization_failure(self, batch: Any, error: Any) -> None:
            answers.append(("serialization", error))

        def mark_processing_failure(self, batch: Any, error: Any) -> None:
            answers.append(("processing", error))

    with make("kbatch") as producer:
        batch = kbatch.OutgoingBatch([Envelope(1), Envelope(2, scheduled_time=FUTURE)])
        kbatch.KafkaSender(producer, "t").send_batch(Callback(), batch)
    ((method, error),) = answers
    assert (method, type(error)) == ("processing", kbatch.NotYetDueError)
    assert all(one.retriable and not one.possibly_persisted for one in error.report.errors.values())
