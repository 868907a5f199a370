"""A consumed record without a consumer."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Consumed:
    """What confluent-kafka's ``Message`` answers, for tests without a broker."""

    a_value: bytes | None = b""
    a_key: Any = None
    a_headers: Any = field(default_factory=list)
    a_topic: str | None = "orders"
    a_partition: int | None = 3
    a_offset: int | None = 17
    a_timestamp: tuple[int, int] = (1, 1_795_425_405_123)

    def value(self) -> bytes | None:
        return self.a_value

    def key(self) -> Any:
        return self.a_key

    def headers(self) -> Any:
        return self.a_headers

    def topic(self) -> str | None:
        return self.a_topic

    def partition(self) -> int | None:
        return self.a_partition

    def offset(self) -> int | None:
        return self.a_offset

    def timestamp(self) -> tuple[int, int]:
        return self.a_timestamp


def consumed(mapped: Any) -> Consumed:
    """What a consumer sees of a mapped record."""
    topic, partition, timestamp, key, value, headers = mapped
    return Consumed(value, key, headers, topic, max(partition, 0), 17, (1, timestamp))
