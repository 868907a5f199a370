"""librdkafka's partitioners, for what has no librdkafka."""

from __future__ import annotations

import zlib
from collections.abc import Callable

__all__ = ["partition_of"]

_MASK = 0xFFFFFFFF


def partition_of(partitioner: str, key: bytes | None, count: int) -> int | None:
    """The partition, of `count`, to which the partitioner sends a key; ``None`` where it takes any."""
    if partitioner == "random":
        return None
    if partitioner == "consistent_random":
        if not key:
            return None
    elif partitioner.endswith("_random") and key is None:
        return None
    return _HASHES[partitioner.removesuffix("_random")](key or b"") % count


def _murmur2(key: bytes) -> int:
    # As Kafka's Java client (librdkafka's rdmurmur2.c).
    mixer = 0x5BD1E995
    digest = 0x9747B28C ^ len(key)
    whole = len(key) - len(key) % 4
    for at in range(0, whole, 4):
        word = int.from_bytes(key[at : at + 4], "little") * mixer & _MASK
        word = (word ^ word >> 24) * mixer & _MASK
        digest = digest * mixer & _MASK ^ word
    if rest := key[whole:]:
        digest = (digest ^ int.from_bytes(rest, "little")) * mixer & _MASK
    digest = (digest ^ digest >> 13) * mixer & _MASK
    return (digest ^ digest >> 15) & 0x7FFFFFFF


def _fnv1a(key: bytes) -> int:
    # As Sarama (librdkafka's rdfnv1a.c): the absolute value of a signed number.
    digest = 0x811C9DC5
    for byte in key:
        digest = (digest ^ byte) * 0x01000193 & _MASK
    return digest if digest < 2**31 else 2**32 - digest


_HASHES: dict[str, Callable[[bytes], int]] = {"consistent": zlib.crc32, "murmur2": _murmur2, "fnv1a": _fnv1a}
