"""CloudEvents both ways, by the `cloudevents` package (2.x, its `core`): what each writes, the other reads."""

import json
import uuid
from datetime import datetime, timezone
from typing import Any

import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary, from_kafka, to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st

import kbatch
from kbatch import Envelope, Tombstone, read_envelope
from tests import mapping, strategies
from tests.records import Consumed
from tests.reference import Setting

ID = uuid.UUID("01934a2b-3c4d-7e5f-8a9b-0c1d2e3f4a5b")
MOMENT = datetime(2026, 11, 23, 9, 16, 45, 123456, tzinfo=timezone.utc)
LATER = datetime(2099, 12, 31, 23, 59, 59, tzinfo=timezone.utc)
SETTING = Setting(wire="cloudevents", source="/producer", carry_scheduled_time=True)


def mapped(*envelopes: Envelope) -> list[KafkaMessage]:
    with mapping.producer_of(SETTING) as producer:
        records = [mapping.Mapped(*record) for record in producer._map("orders", list(envelopes))]
    for record in records:
        assert len(dict(record.headers)) == len(record.headers)  # the package's headers are a dict
    return [KafkaMessage(dict(record.headers), record.key, record.value) for record in records]


def consumed(message: KafkaMessage) -> Consumed:
    return Consumed(message.value, message.key, list(message.headers.items()))


def test_an_event_of_kbatch() -> None:
    envelope = Envelope(
        {"total": 3, "name": "Größe"},
        key="schlüssel",
        id=ID,
        source="https://shop.example/web",
        message_type="shop.order.placed",
        sent_at=MOMENT,
        correlation_id="c-1",
        conversation_id="conv-1",
        parent_id="p-1",
        tenant_id="t-1",
        user_name="müller",
        scheduled_time=MOMENT,
        deliver_by=LATER,
        attempts=2,
        headers={"ce_subject": "order-7", "ce_traceparent": "00-ab-cd-01", "x": "no attribute"},
    )
    (message,) = mapped(envelope)
    event = from_binary(message, JSONFormat(), CloudEvent)
    assert event.get_data() == {"total": 3, "name": "Größe"}
    assert event.get_attributes() == {
        "specversion": "1.0",
        "id": str(ID),
        "source": "https://shop.example/web",
        "type": "shop.order.placed",
        "time": MOMENT,
        "datacontenttype": "application/json",
        "correlationid": "c-1",
        "conversationid": "conv-1",
        "parentid": "p-1",
        "tenantid": "t-1",
        "username": "müller",
        "scheduledtime": "2026-11-23T09:16:45.123456Z",
        "expirytime": "2099-12-31T23:59:59.000000Z",
        "attempts": "2",
        "subject": "order-7",
        "traceparent": "00-ab-cd-01",
        "partitionkey": "schlüssel",  # the package's name for the record's key
    }


def test_the_least_event_of_kbatch() -> None:
    (message,) = mapped(Envelope(data=b"\x00\xff", id=ID, sent_at=MOMENT))
    event = from_kafka(message, JSONFormat())
    assert (type(event), event.get_data()) == (CloudEvent, b"\x00\xff")
    assert event.get_attributes() == {
        "specversion": "1.0",
        "id": str(ID),
        "source": "/producer",
        "type": "bytes",
        "time": MOMENT,
        "datacontenttype": "application/octet-stream",
    }


# Nothing that the package itself cannot read: bytes and null headers, a key that is not UTF-8, years before 1000.
texts = strategies.texts.filter(len)
fields = {
    **dict.fromkeys(["message_type", "source", "correlation_id", "parent_id", "tenant_id", "user_name"], texts),
    "conversation_id": texts,
    "key": texts,
    "headers": st.dictionaries(strategies.attribute_names.filter(lambda name: name != "ce_partitionkey"), texts),
    "sent_at": strategies.times.filter(lambda time: 1000 < time.year < 9999),
    "scheduled_time": strategies.times,
    "deliver_by": st.datetimes(datetime(2100, 1, 1), timezones=st.just(timezone.utc)),
    "attempts": strategies.attempts,
    "id": strategies.ids,
}


@given(body=st.dictionaries(st.text("abc"), st.text("äöü")), given_fields=st.fixed_dictionaries({}, optional=fields))
def test_the_package_reads_what_kbatch_writes_and_kbatch_what_that_makes_of_it(
    body: dict[str, str], given_fields: dict[str, Any]
) -> None:
    envelope = Envelope(body, **given_fields)
    (message,) = mapped(envelope)
    event = from_binary(message, JSONFormat(), CloudEvent)
    assert (event.get_id(), event.get_type()) == (str(envelope.id), envelope.message_type)
    assert event.get_source() == (envelope.source or "/producer")
    assert event.get_extension("tenantid") == envelope.tenant_id
    assert event.get_extension("partitionkey") == envelope.key
    if envelope.sent_at is not None:
        assert event.get_time() == envelope.sent_at
    for name, text in envelope.headers:
        assert event.get_attributes()[name.removeprefix("ce_")] == text
    direct = read_envelope(consumed(message), wire="cloudevents")
    for write in (to_binary, to_structured):
        read = read_envelope(consumed(write(event, JSONFormat())), wire="cloudevents")
        assert json.loads(read.data or b"{}") == body
        # Its record key has become an attribute, too.
        headers = [(name, value) for name, value in read.headers if name != "ce_partitionkey"]
        assert sorted(headers) == sorted(direct.headers)
        key = None if direct.key is None else bytes(direct.key).decode()
        assert read.replace(headers=(), data=b"") == direct.replace(headers=(), data=b"", key=key)


@pytest.mark.parametrize("write", [to_binary, to_structured])
def test_an_event_of_the_package(write: Any) -> None:
    event = CloudEvent(
        {
            "id": str(ID),
            "source": "/shop",
            "type": "order",
            "time": datetime(2026, 11, 23, 9, 16, 45, tzinfo=timezone.utc),
            "subject": "order-7",
            "datacontenttype": "application/json",
            "partitionkey": "k",
            "expirytime": LATER,
            "tenantid": "t-1",
            "attempts": 3,
        },
        {"total": 3},
    )
    read = read_envelope(consumed(write(event, JSONFormat())), wire="cloudevents")
    assert read == Envelope(
        data=b'{"total": 3}',
        id=ID,
        key="k",
        source="/shop",
        message_type="order",
        content_type="application/json",
        sent_at=MOMENT.replace(microsecond=0),
        deliver_by=LATER,
        tenant_id="t-1",
        attempts=3,
        headers=[("ce_subject", b"order-7"), ("ce_partitionkey", b"k")],
        topic="orders",
        partition=3,
        timestamp=1_795_425_405_123,
    )


@pytest.mark.parametrize("write", [to_binary, to_structured])
@pytest.mark.parametrize("data", [b"\x00\xff", "text ü", None])
def test_an_event_of_the_package_with_other_data(write: Any, data: Any) -> None:
    attributes = {"source": "/shop", "type": "order", "datacontenttype": "text/plain"}
    event = CloudEvent(attributes, data)
    read = read_envelope(consumed(write(event, JSONFormat())), wire="cloudevents")
    assert str(read.id) == event.get_id()
    assert read.sent_at == event.get_time()
    expected = data.encode() if isinstance(data, str) else data
    assert read.data == (b"" if expected is None and write is to_binary else expected)


def test_a_tombstone_is_no_event() -> None:
    (message,) = mapped(Tombstone("k", headers={"why": "gone"}))
    assert (message.headers, message.key, message.value) == ({"why": b"gone"}, b"k", None)
    read = read_envelope(consumed(message), wire="cloudevents")
    assert (type(read), read.key, read.headers) == (Tombstone, b"k", (("why", b"gone"),))


def test_what_kbatch_reads_it_can_write_again() -> None:
    event = CloudEvent({"id": str(ID), "source": "/shop", "type": "order", "subject": "order-7"}, {"a": 1})
    read = read_envelope(consumed(to_binary(event, JSONFormat())), wire="cloudevents")
    (message,) = mapped(read.replace(topic=None, partition=None))
    again = from_binary(message, JSONFormat(), CloudEvent)
    # The package sends no content type here, and reads data without one as JSON.
    assert again.get_attributes() == {**event.get_attributes(), "datacontenttype": "application/octet-stream"}


@pytest.mark.parametrize("write", [to_binary, to_structured])
@pytest.mark.parametrize("id", ["7", "partition:0/offset:5", "größe", str(ID).upper(), ID.hex, str(ID)])
def test_an_event_keeps_its_id(write: Any, id: str) -> None:
    event = CloudEvent({"id": id, "source": "/shop", "type": "order"}, {"a": 1})
    read = read_envelope(consumed(write(event, JSONFormat())), wire="cloudevents")
    (message,) = mapped(read.replace(topic=None, partition=None))
    assert from_binary(message, JSONFormat(), CloudEvent).get_id() == id
    assert read_envelope(consumed(message), wire="cloudevents").id == read.id


def test_a_new_id_takes_the_old_one_out() -> None:
    event = CloudEvent({"id": "7", "source": "/shop", "type": "order"}, {"a": 1})
    read = read_envelope(consumed(to_binary(event, JSONFormat())), wire="cloudevents")
    headers = [pair for pair in read.headers if pair[0] != "ce_id"]
    (message,) = mapped(read.replace(id=ID, headers=headers))
    assert from_binary(message, JSONFormat(), CloudEvent).get_id() == str(ID)


def test_the_id_of_an_event_is_no_business_of_a_hook() -> None:
    setting = Setting(wire="cloudevents", source="/", hook_headers=[("ce_id", "7")])
    refused = pytest.raises(kbatch.SerializationError, match=r"header 'ce_id' is reserved: it is the envelope's")
    with mapping.producer_of(setting) as producer, refused:
        producer._map("orders", [Envelope(1)])
