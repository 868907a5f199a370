"""Messages and encoders that several tests use; wire_vectors.json names them."""

from typing import Any, ClassVar

import msgspec


class Order(msgspec.Struct):
    """Its type is its qualified name."""

    id: int
    note: str = ""


class OrderPlaced(msgspec.Struct):
    """It names its type itself."""

    id: int
    __message_type__: ClassVar[str] = "shop.order-placed.v1"


class OrderPlacedAgain(OrderPlaced):
    """It inherits the name of its type."""


class Numbered(msgspec.Struct):
    """Its ``__message_type__`` is not text, and so not a name."""

    id: int
    __message_type__: ClassVar[int] = 7


class Shop(msgspec.Struct):
    class Item(msgspec.Struct):
        """A class in a class: the qualified name has a dot."""

        id: int


class Größe(msgspec.Struct):
    """Not every name is ASCII."""

    id: int


def repr_encoder(message: Any, context: Any) -> bytes:
    """An encoder of one's own, with the signature of confluent-kafka's serializers."""
    return f"{context.topic}|{context.field}|{message!r}".encode()


MESSAGES: dict[str, type[Any]] = {
    "Order": Order,
    "OrderPlaced": OrderPlaced,
    "OrderPlacedAgain": OrderPlacedAgain,
    "Numbered": Numbered,
    "Shop.Item": Shop.Item,
    "Größe": Größe,
}
ENCODERS: dict[str, Any] = {
    "json": msgspec.json.Encoder(),
    "msgpack": msgspec.msgpack.Encoder(),
    "repr": repr_encoder,
}
