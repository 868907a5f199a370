"""Orders as a shop sends them, each made from its index alone: what was sent can be made again to compare."""

import datetime
import functools
import uuid
from typing import Any, ClassVar

import msgspec

import kbatch

_MASK = 2**64 - 1
# A UUID version 7 of 2026-11-23 with the index in its last bits.
_FIRST_ID = 0x019AB1C0_0000_7000_8000_000000000000
_NAMES = ("Harbour", "Mill", "Station", "Orchard")
_STREETS = [f"{name} {kind}" for name in _NAMES for kind in ("Road", "Lane", "Row", "Hill")]
_SOURCE = "kbatch-demo/checkout"


class Item(msgspec.Struct):
    sku: str
    quantity: int
    cents: int


class Order(msgspec.Struct):
    __message_type__: ClassVar[str] = "shop.order-placed.v1"

    order: int
    customer: str
    items: list[Item]
    total_cents: int
    currency: str
    ship_to: str


def index_of(id_header: bytes) -> int:
    """The index of the order that has this ``id`` header; any number if no order has it."""
    return int(id_header.replace(b"-", b""), 16) - _FIRST_ID


class Orders:
    """`count` orders of about a tenth as many customers. An order's index grows with time."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.customers = max(1, count // 10)
        self.sent_at = datetime.datetime.now(datetime.timezone.utc)
        self._sent_at_header = self.sent_at.strftime("%Y-%m-%dT%H:%M:%S.%fZ").encode()
        self._encode = msgspec.json.Encoder().encode

    def customer(self, index: int) -> int:
        return _mix(index) % self.customers

    def key(self, index: int) -> str:
        return f"customer-{self.customer(index):06d}"

    def order(self, index: int) -> Order:
        bits = _mix(index)
        items = [Item(f"sku-{bits >> 8 & 0xFFF:04d}", 1 + (bits >> 20 & 3), 199 + (bits >> 24 & 0x1FFF))]
        if bits & 1:
            items.append(Item(f"sku-{bits >> 40 & 0xFFF:04d}", 1 + (bits >> 52 & 3), 199 + (bits >> 50 & 0x1FFF)))
        return Order(
            order=1_000_000 + index,
            customer=self.key(index),
            items=items,
            total_cents=sum([item.quantity * item.cents for item in items]),
            currency="EUR" if bits & 2 else "GBP",
            ship_to=f"{1 + (bits >> 34 & 127)} {_STREETS[bits >> 60]}",
        )

    def fields(self, index: int) -> dict[str, Any]:
        """What the order's envelope says besides its body, key, id and time: arguments of `kbatch.Envelope`."""
        bits = _mix(index)
        return {
            "content_type": "application/json",
            "correlation_id": f"cart-{bits & 0xFFFFFFFF:08x}",
            "conversation_id": f"session-{bits >> 32:08x}",
            "source": _SOURCE,
            "tenant_id": f"shop-{bits >> 3 & 15:02d}",
            "user_name": f"user-{bits % self.customers & 0xFFF:04d}",
        }

    def envelope(self, index: int) -> kbatch.Envelope[Order]:
        return kbatch.Envelope(
            self.order(index),
            key=self.key(index),
            id=uuid.UUID(int=_FIRST_ID + index),
            sent_at=self.sent_at,
            **self.fields(index),
        )

    def body(self, index: int) -> bytes:
        """The bytes that the order's record must have as its value."""
        return self._encode(self.order(index))

    def headers(self, index: int) -> dict[str, bytes]:
        """The headers that the order's record must have, each once."""
        headers = {name.replace("_", "-"): value.encode() for name, value in self.fields(index).items()}
        headers["id"] = str(uuid.UUID(int=_FIRST_ID + index)).encode()
        headers["message-type"] = Order.__message_type__.encode()
        headers["sent-at"] = self._sent_at_header
        return headers


@functools.lru_cache(16)
def _mix(number: int) -> int:
    """Spreads an index over 64 bits (the finalizer of MurmurHash3)."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ number >> 33) * 0xFF51AFD7ED558CCD) & _MASK
    number = ((number ^ number >> 33) * 0xC4CEB9FE1A85EC53) & _MASK
    return number ^ number >> 33
