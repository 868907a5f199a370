"""confluent-kafka's serializers as encoders, as they are, with its mock registry; read back with its deserializers."""

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from confluent_kafka.schema_registry import (
    AsyncSchemaRegistryClient,
    SchemaRegistryClient,
    SchemaRegistryError,
    header_schema_id_serializer,
    prefix_schema_id_serializer,
)
from confluent_kafka.schema_registry.avro import AsyncAvroSerializer, AvroDeserializer, AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONDeserializer, JSONSerializer
from confluent_kafka.schema_registry.protobuf import ProtobufDeserializer, ProtobufSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

import kbatch
from kbatch import Envelope, Tombstone, aio
from kbatch.testing import MockCluster

from .clients import Stored, end_offsets, read_back

TOPIC = "orders"
WIRES = ("kbatch", "wolverine", "cloudevents", "raw")
PLACES = {"prefix": prefix_schema_id_serializer, "header": header_schema_id_serializer}
SCHEMA_ID = "__value_schema_id"  # bodies with it have 6 bytes or more here: confluent-kafka reads no shorter ones

AVRO = """{"type": "record", "name": "Order", "namespace": "shop",
           "fields": [{"name": "id", "type": "long"}, {"name": "note", "type": "string"}]}"""
JSON = """{"title": "Order", "type": "object", "required": ["id", "note"],
           "properties": {"id": {"type": "integer"}, "note": {"type": "string"}}}"""


def order_class() -> Any:
    """What protoc makes of ``message Order { int64 id = 1; string note = 2; }``."""
    file = descriptor_pb2.FileDescriptorProto(name="shop/order.proto", package="shop", syntax="proto3")
    message = file.message_type.add(name="Order")
    field = descriptor_pb2.FieldDescriptorProto
    message.field.add(name="id", number=1, type=field.TYPE_INT64, label=field.LABEL_OPTIONAL)
    message.field.add(name="note", number=2, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("shop.Order"))


ProtobufOrder = order_class()


class Kind(NamedTuple):
    serializer: Callable[[SchemaRegistryClient, dict[str, Any]], Any]
    deserializer: Callable[[SchemaRegistryClient], Any]
    message: Callable[[int, str], Any]
    bad: Any  # what the schema does not allow


KINDS = {
    "avro": Kind(
        lambda registry, conf: AvroSerializer(registry, AVRO, conf=conf),
        lambda registry: AvroDeserializer(registry),
        lambda id, note: {"id": id, "note": note},
        {"id": "seven", "note": ""},
    ),
    "protobuf": Kind(
        lambda registry, conf: ProtobufSerializer(ProtobufOrder, registry, conf=conf),
        lambda registry: ProtobufDeserializer(ProtobufOrder, schema_registry_client=registry),
        lambda id, note: ProtobufOrder(id=id, note=note),
        "no message",
    ),
    "json": Kind(
        lambda registry, conf: JSONSerializer(JSON, registry, conf=conf),
        lambda registry: JSONDeserializer(JSON, schema_registry_client=registry),
        lambda id, note: {"id": id, "note": note},
        {"id": 7},
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_place = pytest.mark.parametrize("place", PLACES)


@pytest.fixture
def registry() -> SchemaRegistryClient:
    return SchemaRegistryClient.new_client({"url": "mock://"})


@pytest.fixture
def cluster(kafka_cluster: MockCluster) -> MockCluster:
    kafka_cluster.create_topic(TOPIC, partitions=1)
    return kafka_cluster


def make_producer(cluster: MockCluster, encoder: Any, **options: Any) -> kbatch.Producer:
    config = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0, "enable.idempotence": False}
    return kbatch.Producer(config, encoder=encoder, source="/shop", **options)


def send(cluster: MockCluster, encoder: Any, envelopes: list[Envelope], **options: Any) -> list[Stored]:
    with make_producer(cluster, encoder, **options) as producer:
        producer.send_batch(TOPIC, envelopes).raise_for_errors()
    return read_back(cluster.bootstrap_servers, TOPIC)


def read(deserializer: Any, record: Stored, topic: str = TOPIC) -> Any:
    return deserializer(record.value, SerializationContext(topic, MessageField.VALUE, record.headers))


def named(record: Stored, name: str) -> list[bytes | None]:
    return [value for header, value in record.headers if header == name]


@pytest.mark.parametrize("wire", WIRES)
@every_place
@every_kind
def test_what_is_serialized_is_deserialized(
    cluster: MockCluster, registry: SchemaRegistryClient, kind: Kind, place: str, wire: str
) -> None:
    serializer = kind.serializer(registry, {"schema.id.serializer": PLACES[place]})
    messages = [kind.message(7, "number seven"), kind.message(2**53, "die Größe"), kind.message(0, "nothing")]
    envelopes = [Envelope(message, key=f"order-{n}", headers=[("n", str(n))]) for n, message in enumerate(messages)]
    records = send(
        cluster,
        serializer,
        [*envelopes, Tombstone("order-0")],
        wire=wire,
        header_hook=lambda: {"traceparent": "00-ab-cd-01"},
    )
    deserializer = kind.deserializer(registry)
    assert [read(deserializer, record) for record in records] == [*messages, None]
    for n, record in enumerate(records[:3]):
        assert (record.key, named(record, "n")) == (f"order-{n}".encode(), [str(n).encode()])
        assert named(record, "traceparent") == [b"00-ab-cd-01"]
        if place == "prefix":
            assert (record.value or b"")[:5] == b"\0\0\0\0\1"
            assert named(record, SCHEMA_ID) == []
        else:
            assert (record.value or b"")[:5] != b"\0\0\0\0\1"
            assert [len(value or b"") for value in named(record, SCHEMA_ID)] in (
                [17],
                [18],
            )  # a GUID; its message's place
    assert (records[3].value, named(records[3], SCHEMA_ID)) == (None, [])
    assert registry.get_subjects() == [f"{TOPIC}-value"]


@pytest.mark.parametrize("wire", WIRES)
def test_a_schema_id_stays_with_its_envelope(cluster: MockCluster, registry: SchemaRegistryClient, wire: str) -> None:
    # Two schemas in turn, and between them what the serializer does not see, or gives nothing for.
    conf = {"schema.id.serializer": header_schema_id_serializer}
    strategies = {list: lambda context, name: "lists", str: lambda context, name: "texts"}
    schemas = {list: '{"type": "array", "items": "long"}', str: '"string"'}
    of_type = {
        kind: AvroSerializer(registry, schema, conf={**conf, "subject.name.strategy": strategies[kind]})
        for kind, schema in schemas.items()
    }

    def encode(message: Any, context: kbatch.SerializationContext) -> bytes | None:
        return None if message is None else of_type[type(message)](message, context)

    some, text = [1, 2, 3, 4, 5, 6], "one to six"
    envelopes = [
        Envelope(some),
        Envelope(data=b"x"),
        Envelope(text),
        Tombstone("k"),
        Envelope(None),
        Envelope(some),
    ] * 2
    records = send(cluster, encode, envelopes, wire=wire)
    lists, texts = ([named(records[n], SCHEMA_ID)[0]] for n in (0, 2))
    assert lists != texts
    assert [named(record, SCHEMA_ID) for record in records] == [lists, [], texts, [], [], lists] * 2
    deserializer = AvroDeserializer(registry)
    assert [read(deserializer, records[n]) for n in (0, 2, 4, 5)] == [some, text, None, some]


@pytest.mark.parametrize("index", [0, 1, 4])
@every_place
@every_kind
def test_a_message_that_its_schema_does_not_allow(
    cluster: MockCluster, registry: SchemaRegistryClient, kind: Kind, place: str, index: int
) -> None:
    serializer = kind.serializer(registry, {"schema.id.serializer": PLACES[place]})
    envelopes: list[Envelope] = [Envelope(kind.message(n, "a good one")) for n in range(5)]
    envelopes[index] = Envelope(kind.bad)
    with make_producer(cluster, serializer) as producer:
        with pytest.raises(kbatch.SerializationError, match="message cannot be encoded: ") as caught:
            producer.send_batch(TOPIC, envelopes)
        assert (caught.value.index, caught.value.field) == (index, "message")
        assert caught.value.envelope_id == envelopes[index].id
        assert caught.value.__cause__ is not None
        assert end_offsets(cluster.bootstrap_servers, TOPIC) == {0: 0}
        # nor does anything of it go with the next batch
        envelopes[index] = Envelope(kind.message(index, "a good one"))
        producer.send_batch(TOPIC, envelopes).raise_for_errors()
    records = read_back(cluster.bootstrap_servers, TOPIC)
    assert [read(kind.deserializer(registry), record) for record in records] == [
        kind.message(n, "a good one") for n in range(5)
    ]
    assert {len(named(record, SCHEMA_ID)) for record in records} == {1 if place == "header" else 0}


def test_what_the_registry_refuses(cluster: MockCluster, registry: SchemaRegistryClient) -> None:
    serializer = AvroSerializer(registry, AVRO, conf={"auto.register.schemas": False})
    with make_producer(cluster, serializer) as producer:
        with pytest.raises(kbatch.SerializationError, match=r"message cannot be encoded: .*Not Found") as caught:
            producer.send_batch(TOPIC, [Envelope({"id": 7, "note": ""})])
        assert isinstance(caught.value.__cause__, SchemaRegistryError)
    assert end_offsets(cluster.bootstrap_servers, TOPIC) == {0: 0}


def test_the_subject_is_of_the_envelopes_topic(kafka_cluster: MockCluster, registry: SchemaRegistryClient) -> None:
    for topic in ("a", "b", "c"):
        kafka_cluster.create_topic(topic, partitions=1)
    with make_producer(kafka_cluster, AvroSerializer(registry, '"long"')) as producer:
        producer.send_batch("b", [Envelope(1, topic="a"), Envelope(2), Envelope(3, topic="c")]).raise_for_errors()
    assert sorted(registry.get_subjects()) == ["a-value", "b-value", "c-value"]
    for topic, number in (("a", 1), ("b", 2), ("c", 3)):
        (record,) = read_back(kafka_cluster.bootstrap_servers, topic)
        assert read(AvroDeserializer(registry), record, topic) == number


def test_a_key_is_serialized_by_the_caller(cluster: MockCluster, registry: SchemaRegistryClient) -> None:
    # An envelope's key is text or bytes; its schema id, if it goes in a header, is the envelope's header.
    conf = {"schema.id.serializer": header_schema_id_serializer}
    of_keys, of_values = AvroSerializer(registry, '"string"', conf=conf), AvroSerializer(registry, AVRO, conf=conf)
    context = SerializationContext(TOPIC, MessageField.KEY, [])
    message = {"id": 7, "note": "number seven"}
    envelope = Envelope(message, key=of_keys("order-7", context), headers=context.headers)
    (record,) = send(cluster, of_values, [envelope])
    deserializer = AvroDeserializer(registry)
    assert deserializer(record.key, SerializationContext(TOPIC, MessageField.KEY, record.headers)) == "order-7"
    assert read(deserializer, record) == message


def test_asynchronous_serializers_are_refused(cluster: MockCluster) -> None:
    async def make() -> Any:
        return await AsyncAvroSerializer(AsyncSchemaRegistryClient.new_client({"url": "mock://"}), AVRO)

    with make_producer(cluster, asyncio.run(make())) as producer:
        with pytest.raises(kbatch.SerializationError, match="the encoder is asynchronous") as caught:
            producer.send_batch(TOPIC, [Envelope(data=b"x"), Envelope({"id": 7, "note": ""})])
        assert (caught.value.index, caught.value.field) == (1, "message")
    assert end_offsets(cluster.bootstrap_servers, TOPIC) == {0: 0}


def test_on_an_event_loop(cluster: MockCluster, registry: SchemaRegistryClient) -> None:
    config = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0, "enable.idempotence": False}
    serializer = AvroSerializer(registry, AVRO, conf={"schema.id.serializer": header_schema_id_serializer})
    messages = [{"id": n, "note": "x" * (n + 4)} for n in range(3000)]

    async def main() -> None:
        async with aio.Producer(config, encoder=serializer) as producer:
            (await producer.send_batch(TOPIC, [Envelope(message) for message in messages])).raise_for_errors()

    asyncio.run(main())
    records = read_back(cluster.bootstrap_servers, TOPIC)
    deserializer = AvroDeserializer(registry)
    assert [read(deserializer, record) for record in records] == messages
