"""What a callable encoder is told about the body that it makes."""

from __future__ import annotations

__all__ = ["SerializationContext"]


class SerializationContext:
    """The second argument of a callable encoder.

    It has the attributes of confluent-kafka's class of the same name, so that its Avro, Protobuf and JSON Schema
    serializers are encoders as they are, whether the schema id goes in the payload or in a header. Its asynchronous
    serializers are refused, for mapping awaits nothing; a serializer that asks the registry holds its caller up, an
    event loop too. Keys are not encoded: call a serializer for them yourself and give its headers to the envelope.

    Attributes:
        topic: The topic of the envelope, or of its batch.
        field: Always ``"value"``.
        headers: An empty list; pairs that the encoder appends are sent as headers, before the envelope's own.
    """

    __slots__ = {
        "field": 'Always ``"value"``.',
        "headers": "Pairs that are sent as headers, before the envelope's own.",
        "topic": "The topic of the envelope, or of its batch.",
    }

    def __init__(self, topic: str | None, headers: list[tuple[str, str | bytes | None]]) -> None:
        self.topic = topic
        self.field = "value"
        self.headers = headers

    def __repr__(self) -> str:
        return f"SerializationContext(topic={self.topic!r}, field={self.field!r})"
