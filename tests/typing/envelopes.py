"""Envelopes as users write them: what they hold is known to the type checker."""

import uuid
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from msgspec import UnsetType
from typing_extensions import Buffer, assert_type

import kbatch


@dataclass
class Order:
    id: str
    total: int


@dataclass
class RushOrder(Order):
    by: datetime


class OrderPlaced(kbatch.Envelope[Order]):
    """A subclass fixes the type of its message."""


order = Order("7", 3)

# The type of the message: inferred, or given.
assert_type(kbatch.Envelope(order), kbatch.Envelope[Order])
assert_type(kbatch.Envelope[Order](order), kbatch.Envelope[Order])
assert_type(kbatch.Envelope[Order](order).message, Order)
assert_type(kbatch.Envelope[Order](order, key="7").message.total, int)
assert_type(kbatch.Envelope({"a": 1}).message, dict[str, int])
assert_type(OrderPlaced(order, topic="orders").message, Order)

# A body that is encoded already: there is no message.
encoded = kbatch.Envelope(data=b"{}", content_type="application/json")
assert_type(encoded, kbatch.Envelope[UnsetType])
assert_type(encoded.message, UnsetType)
assert_type(encoded.data, Buffer | None)
kbatch.Envelope(data=bytearray(b"{}"))
kbatch.Envelope(data=memoryview(b"{}"))

# Every field.
full = kbatch.Envelope(
    order,
    key=b"7",
    topic="orders",
    partition=3,
    timestamp=1_700_000_000_000,
    headers={"trace": "1", "raw": b"\x00", "none": None},
    id=kbatch.uuid7(),
    message_type="order",
    content_type="application/json",
    source="shop",
    correlation_id="c",
    conversation_id=uuid.UUID(int=1),
    parent_id="p",
    tenant_id="t",
    user_name="u",
    sent_at=datetime.now(timezone.utc),
    scheduled_time=None,
    deliver_by=datetime.now(timezone.utc),
    attempts=2,
)
assert_type(full.key, str | bytes | None)
assert_type(full.topic, str | None)
assert_type(full.partition, int | None)
assert_type(full.timestamp, int | None)
assert_type(full.headers, tuple[tuple[str, str | bytes | None], ...])
assert_type(full.id, uuid.UUID)
assert_type(full.message_type, str | None)
assert_type(full.content_type, str | None)
assert_type(full.source, str | None)
assert_type(full.correlation_id, str | None)
assert_type(full.conversation_id, str | None)
assert_type(full.parent_id, str | None)
assert_type(full.tenant_id, str | None)
assert_type(full.user_name, str | None)
assert_type(full.sent_at, datetime | None)
assert_type(full.scheduled_time, datetime | None)
assert_type(full.deliver_by, datetime | None)
assert_type(full.attempts, int)
kbatch.Envelope(order, headers=[("a", "1"), ("a", b"2"), ("b", None)])
kbatch.Envelope(order, headers=full.headers)
kbatch.Envelope(order, headers=None)

# Copies with changes: the type follows the body.
assert_type(full.replace(key="8", attempts=3), kbatch.Envelope[Order])
assert_type(OrderPlaced(order).replace(id=None), OrderPlaced)
assert_type(full.replace(message="text"), kbatch.Envelope[str])
assert_type(full.replace(data=b"{}"), kbatch.Envelope[UnsetType])

# Tombstones.
tombstone = kbatch.Tombstone("7", topic="orders", headers={"why": "gone"})
assert_type(tombstone.replace(key="8", timestamp=1, sent_at=None), kbatch.Tombstone)
assert_type(tombstone.message, UnsetType)

# Immutable, hence covariant; and without an argument, Any.
orders: list[kbatch.Envelope[Order]] = [kbatch.Envelope(RushOrder("1", 2, datetime.now(timezone.utc))), full]
anything: list[kbatch.Envelope] = [full, encoded, tombstone, OrderPlaced(order)]
of_any: kbatch.Envelope[Any] = anything[0]
either: kbatch.Envelope[Order | UnsetType] = encoded

# What the checker must refuse. An ignore that is not needed is an error under --strict.
kbatch.Envelope()  # type: ignore[call-overload]
kbatch.Envelope(order, data=b"{}")  # type: ignore[call-overload]
kbatch.Envelope(data="text")  # type: ignore[call-overload]
kbatch.Envelope(order, key=7)  # type: ignore[call-overload]
kbatch.Envelope(order, headers={"a": 1})  # type: ignore[dict-item]
kbatch.Envelope(order, "key")  # type: ignore[call-overload]
kbatch.Envelope[Order]("text")  # type: ignore[call-overload]
kbatch.Tombstone(None)  # type: ignore[arg-type]
tombstone.replace(message=order)  # type: ignore[call-arg]
full.key = "8"  # type: ignore[misc]
full.replace(colour="red")  # type: ignore[call-overload]
