"""The one source of messages for all sides: the same count, keys, header names and byte widths everywhere.

`orders(count)` makes plain records; from them come kbatch's envelopes, the rivals' plain Python envelopes and the
file of prepared bytes for the C loop. Everything is derived from a fixed seed, and every field has a fixed width, so
that two processes (and two runs) send the same bytes; only the digits of `sent-at` differ.
"""

import random
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import kbatch

#: How many distinct messages there are; longer runs send them over and over. A multiple of every batch size, large
#: enough not to fit the second-level cache, small enough that all sides build it in well under a second.
POOL = 20_000
CUSTOMERS = 2_000
HEADER_COUNTS = (0, 8, 15)
CONTENT_TYPE = "application/json"
MESSAGE_TYPE = "shop.orders.OrderPlaced"
SOURCE = "order-service"
_START = 1_780_000_000


class Line(msgspec.Struct, frozen=True):
    sku: str
    quantity: int
    cents: int


class OrderPlaced(msgspec.Struct, frozen=True):
    __message_type__ = MESSAGE_TYPE

    order_id: str
    customer_id: str
    placed_at: str
    currency: str
    total_cents: int
    lines: list[Line]


@dataclass(slots=True)
class PlainEnvelope:
    """What a careful Python program without kbatch would map from. The id is text already, which spares the rivals a
    conversion that kbatch makes inside the measurement."""

    message: OrderPlaced
    key: str | None
    id: str
    message_type: str
    content_type: str
    correlation_id: str | None = None
    conversation_id: str | None = None
    parent_id: str | None = None
    source: str | None = None
    tenant_id: str | None = None
    user_name: str | None = None
    headers: tuple[tuple[str, str], ...] = ()


def format_time(moment: datetime) -> str:
    """The default wire's form of a time: `2026-11-23T09:16:45.123456Z`."""
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _uuid7(rng: random.Random, milliseconds: int) -> uuid.UUID:
    value = milliseconds << 80 | 0x7 << 76 | rng.getrandbits(12) << 64 | 0b10 << 62 | rng.getrandbits(62)
    return uuid.UUID(int=value)


def orders(count: int = POOL, headers: int = 8) -> Iterator[PlainEnvelope]:
    """The first `count` messages with `headers` headers each (0, 8 or 15)."""
    if headers not in HEADER_COUNTS:
        raise ValueError(f"headers must be one of {HEADER_COUNTS}, not {headers}")
    rng = random.Random(20261123)
    customers = [f"cust-{number:06d}" for number in range(CUSTOMERS)]
    tenants = [f"tenant-{number:03d}" for number in range(20)]
    users = [f"user-{number:05d}" for number in range(500)]
    regions = ("eu-west", "eu-east", "us-west", "us-east")
    for number in range(count):
        customer = rng.randrange(CUSTOMERS)
        quantity, cents = rng.randint(1, 9), rng.randint(100_000, 999_999)
        moment = datetime.fromtimestamp(_START + number, timezone.utc)
        envelope = PlainEnvelope(
            message=OrderPlaced(
                order_id=f"ord-{number:09d}",
                customer_id=customers[customer],
                placed_at=moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
                currency="EUR",
                total_cents=cents,
                lines=[Line(sku=f"sku-{rng.randrange(10**6):06d}", quantity=quantity, cents=cents)],
            ),
            key=customers[customer],
            id=str(_uuid7(rng, (_START + number) * 1000)),
            message_type=MESSAGE_TYPE,
            content_type=CONTENT_TYPE,
        )
        correlation, conversation, parent = (str(_uuid7(rng, (_START + number) * 1000)) for _ in range(3))
        if headers:
            envelope.correlation_id = correlation
            envelope.conversation_id = conversation
            envelope.source = SOURCE
            envelope.tenant_id = tenants[customer % len(tenants)]
        if headers == 15:
            envelope.parent_id = parent
            envelope.user_name = users[customer % len(users)]
            envelope.headers = (
                ("traceparent", f"00-{rng.getrandbits(128):032x}-{rng.getrandbits(64):016x}-01"),
                ("region", regions[customer % len(regions)]),
                ("channel", "web"),
                ("schema-version", "3"),
                ("priority", "normal"),
            )
        yield envelope


def header_pairs(envelope: PlainEnvelope, sent_at: str) -> list[tuple[str, str]]:
    """The headers of the default wire format, in its order."""
    pairs = [
        ("id", envelope.id),
        ("message-type", envelope.message_type),
        ("content-type", envelope.content_type),
        ("sent-at", sent_at),
    ]
    for name, value in (
        ("correlation-id", envelope.correlation_id),
        ("conversation-id", envelope.conversation_id),
        ("parent-id", envelope.parent_id),
        ("source", envelope.source),
        ("tenant-id", envelope.tenant_id),
        ("user-name", envelope.user_name),
    ):
        if value is not None:
            pairs.append((name, value))
    pairs.extend(envelope.headers)
    return pairs


def envelope_options(count: int = POOL, headers: int = 8, *, encoded: bool = False) -> list[dict[str, Any]]:
    """What `kbatch.Envelope` takes for the same messages, for envelopes that are made just before they are sent. kbatch
    formats the ids and, unless they are `encoded` already, encodes the bodies when it maps."""
    encode = msgspec.json.Encoder().encode
    optional = ("correlation_id", "conversation_id", "parent_id", "source", "tenant_id", "user_name")
    return [
        {
            **({"data": encode(plain.message)} if encoded else {"message": plain.message}),
            "key": plain.key,
            "id": uuid.UUID(plain.id),
            "message_type": plain.message_type,
            "content_type": plain.content_type,
            "headers": plain.headers,
            **{name: value for name in optional if (value := getattr(plain, name)) is not None},
        }
        for plain in orders(count, headers)
    ]


def kbatch_envelopes(count: int = POOL, headers: int = 8, *, encoded: bool = False) -> "list[kbatch.Envelope[Any]]":
    """The same as envelopes that were made long before."""
    import kbatch

    return [kbatch.Envelope(**options) for options in envelope_options(count, headers, encoded=encoded)]


def plain_value(size: int = 100) -> bytes:
    """The body of the plain-values measure: `size` bytes without structure."""
    return random.Random(size).randbytes(size)


@dataclass(frozen=True)
class Prepared:
    """Where the prepared bytes are, and how many bytes one message has on average."""

    path: Path
    value_bytes: float
    header_bytes: float


def _span(data: bytes) -> bytes:
    return struct.pack("=I", len(data)) + data


def prepare(folder: Path, headers: int, *, values: int = 0, count: int = POOL) -> Prepared:
    """Writes the file that cloop.c reads: with `values`, bare bodies of that many bytes, else orders."""
    sent_at = format_time(datetime.now(timezone.utc))
    chunks: list[bytes] = []
    value_bytes = header_bytes = 0
    encode = msgspec.json.Encoder().encode
    if values:
        chunks = [_span(b"") + _span(plain_value(values))] * count
        value_bytes, headers = values * count, 0
    else:
        for envelope in orders(count, headers):
            body = encode(envelope.message)
            chunks += (_span((envelope.key or "").encode()), _span(body))
            value_bytes += len(body)
            if headers:
                pairs = header_pairs(envelope, sent_at)
                if len(pairs) != headers:
                    raise AssertionError(f"{len(pairs)} headers made, {headers} asked for")
                for name, value in pairs:
                    chunks += (_span(name.encode()), _span(value.encode()))
                    header_bytes += len(name) + len(value)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (f"values-{values}.bin" if values else f"orders-{headers}.bin")
    path.write_bytes(b"KBM1" + struct.pack("=II", count, headers) + b"".join(chunks))
    return Prepared(path, value_bytes / count, header_bytes / count)
