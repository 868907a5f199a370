"""What a message's encoder costs in phase 1: kbatch's own, a callable, confluent-kafka's serializers, and each alone.

Nothing is sent. Times are of the measuring thread's CPU, so that a busy machine disturbs them less.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import msgspec
from confluent_kafka.schema_registry import SchemaRegistryClient, header_schema_id_serializer
from confluent_kafka.schema_registry.avro import AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONSerializer
from confluent_kafka.schema_registry.protobuf import ProtobufSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]

import kbatch
from benchmarks.data import kbatch_envelopes
from benchmarks.figures import Section, figure

BATCH = 1_000
TOPIC = "orders"
#: how long a turn maps or encodes at least
TURN_S = 0.05

AVRO = {
    "type": "record",
    "name": "OrderPlaced",
    "fields": [
        *({"name": name, "type": "string"} for name in ("order_id", "customer_id", "placed_at", "currency")),
        {"name": "total_cents", "type": "long"},
        {
            "name": "lines",
            "type": {
                "type": "array",
                "items": {
                    "type": "record",
                    "name": "Line",
                    "fields": [
                        {"name": "sku", "type": "string"},
                        {"name": "quantity", "type": "long"},
                        {"name": "cents", "type": "long"},
                    ],
                },
            },
        },
    ],
}
JSON_SCHEMA = {
    "title": "OrderPlaced",
    "type": "object",
    "required": ["order_id", "customer_id", "placed_at", "currency", "total_cents", "lines"],
    "properties": {
        **{key: {"type": "string"} for key in ("order_id", "customer_id", "placed_at", "currency")},
        "total_cents": {"type": "integer"},
        "lines": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["sku", "quantity", "cents"],
                "properties": {
                    "sku": {"type": "string"},
                    "quantity": {"type": "integer"},
                    "cents": {"type": "integer"},
                },
            },
        },
    },
}


def _protobuf_class() -> Any:
    """What protoc makes of the same order."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="shop/orders.proto", package="shop", syntax="proto3")
    line, order = file.message_type.add(name="Line"), file.message_type.add(name="OrderPlaced")
    for number, (name, kind) in enumerate(
        (("sku", field.TYPE_STRING), ("quantity", field.TYPE_INT64), ("cents", field.TYPE_INT64)), 1
    ):
        line.field.add(name=name, number=number, type=kind, label=field.LABEL_OPTIONAL)
    for number, name in enumerate(("order_id", "customer_id", "placed_at", "currency"), 1):
        order.field.add(name=name, number=number, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    order.field.add(name="total_cents", number=5, type=field.TYPE_INT64, label=field.LABEL_OPTIONAL)
    order.field.add(name="lines", number=6, type=field.TYPE_MESSAGE, type_name=".shop.Line", label=field.LABEL_REPEATED)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("shop.OrderPlaced"))


@dataclass(frozen=True)
class Encoding:
    name: str
    encoder: Any
    #: of the benchmarks' order, what the encoder takes
    convert: Callable[[Any], Any]
    #: the encoder as it is called without kbatch, as often as there are messages
    alone: Callable[[Sequence[Any]], None]


def _serialize_all(serializer: Callable[[Any, Any], Any]) -> Callable[[Sequence[Any]], None]:
    def serialize_all(messages: Sequence[Any]) -> None:
        for message in messages:
            serializer(message, SerializationContext(TOPIC, MessageField.VALUE, []))

    return serialize_all


def encodings() -> list[Encoding]:
    registry = SchemaRegistryClient.new_client({"url": "mock://"})
    encode = msgspec.json.Encoder().encode
    order = _protobuf_class()
    avro, json_schema = msgspec.json.encode(AVRO).decode(), msgspec.json.encode(JSON_SCHEMA).decode()
    in_header = {"schema.id.serializer": header_schema_id_serializer}

    def encode_all(messages: Sequence[Any]) -> None:
        for message in messages:
            encode(message)

    def same(message: Any) -> Any:
        return message

    def of_protobuf(message: Any) -> Any:
        return order(**msgspec.to_builtins(message))

    found = [
        Encoding("msgspec JSON, native", msgspec.json.Encoder(), same, encode_all),
        Encoding("msgspec JSON in a callable", lambda message, context: encode(message), same, encode_all),
    ]
    for name, serializer, convert in (
        ("Avro", AvroSerializer(registry, avro), msgspec.to_builtins),
        ("Avro, schema id in a header", AvroSerializer(registry, avro, conf=in_header), msgspec.to_builtins),
        ("Protobuf", ProtobufSerializer(order, registry), of_protobuf),
        ("JSON Schema", JSONSerializer(json_schema, registry), msgspec.to_builtins),
    ):
        found.append(Encoding(name, serializer, convert, _serialize_all(serializer)))
    return found


def _cost_us(run: Callable[[], object]) -> float:
    """Microseconds of CPU per envelope, of as many batches as fit in a turn."""
    batches, start = 0, time.thread_time_ns()
    while (spent := time.thread_time_ns() - start) < TURN_S * 1e9:
        run()
        batches += 1
    return spent / 1e3 / batches / BATCH


def costs(encoding: Encoding, envelopes: Sequence["kbatch.Envelope[Any]"], turns: int) -> list[tuple[float, float]]:
    """Of each turn: phase 1, and the encoder alone, µs per envelope."""
    converted = [envelope.replace(message=encoding.convert(envelope.message)) for envelope in envelopes]
    messages = [envelope.message for envelope in converted]
    # Nothing listens there, and nothing connects: the client starts when the first batch is enqueued.
    core = kbatch.Producer({"bootstrap.servers": "localhost:1"}, encoder=encoding.encoder)._core

    def map_all() -> None:
        core.map(kbatch.PendingBatch(core), TOPIC, converted)

    def alone() -> None:
        encoding.alone(messages)

    for run in (map_all, alone):
        run()  # schemas are registered and parsed, memory is pooled
    return [(_cost_us(map_all), _cost_us(alone)) for _ in range(turns)]


def serializers(turns: int) -> Iterator[Section]:
    section = Section(
        f"Encoders: phase 1 of {BATCH:,} envelopes with 8 headers, and the encoder alone; µs of CPU per envelope",
        "serializers",
    )
    envelopes = kbatch_envelopes(BATCH)
    for encoding in encodings():
        pairs = costs(encoding, envelopes, turns)
        mapped, alone = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        section.figures += [
            figure(f"{encoding.name}: phase 1", mapped, unit=" µs"),
            figure(f"{encoding.name}: the encoder alone", alone, unit=" µs"),
            figure(f"{encoding.name}: what kbatch adds", [one - other for one, other in pairs], unit=" µs"),
        ]
        section.details[encoding.name] = {"phase_1_us": median(mapped), "alone_us": median(alone)}
    yield section
