"""Packed records, slowly: as DESIGN.md describes them."""

import zlib
from typing import Any


def _varint(packed: bytes, at: int, end: int) -> tuple[int, int]:
    number = 0
    for place in range(5):
        if at == end:
            raise ValueError("cut off")
        byte = packed[at]
        at += 1
        number |= (byte & 127) << 7 * place
        if byte < 128:
            return number, at
    raise ValueError("a number without an end")


def _counted(packed: bytes, at: int, end: int) -> tuple[bytes | None, int]:
    length, at = _varint(packed, at, end)
    if length == 0:
        return None, at
    length -= 1
    if length > min(end - at, 2**31 - 1):
        raise ValueError("a length beyond the end")
    return packed[at : at + length], at + length


def unpacked(packed: bytes) -> Any:
    """``(topic, partition, timestamp, key, value, headers)``, or a ValueError."""
    end = len(packed) - 4
    if end < 14 or packed[0] != 1 or packed[1] != 0:
        raise ValueError("no packed record")
    if zlib.crc32(packed[:end]) != int.from_bytes(packed[end:], "little"):
        raise ValueError("damaged")
    timestamp = int.from_bytes(packed[2:10], "little", signed=True)
    partition = int.from_bytes(packed[10:14], "little", signed=True)
    topic, at = _counted(packed, 14, end)
    if topic is None or partition < -1:
        raise ValueError("no topic, or no partition")
    key, at = _counted(packed, at, end)
    count, at = _varint(packed, at, end)
    if count > 100_000:
        raise ValueError("too many headers")
    headers = []
    for _ in range(count):
        name, at = _counted(packed, at, end)
        value, at = _counted(packed, at, end)
        if name is None:
            raise ValueError("a header without a name")
        headers.append((name.decode(), value))
    value, at = _counted(packed, at, end)
    if at != end:
        raise ValueError("something follows")
    return topic.decode(), partition, timestamp, key, value, headers


def checksummed(content: bytes) -> bytes:
    return content + zlib.crc32(content).to_bytes(4, "little")
