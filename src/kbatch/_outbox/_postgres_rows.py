"""Rows of an outbox as PostgreSQL's drivers take them. No connection."""

from __future__ import annotations

import struct
from itertools import accumulate, chain
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from kbatch._outbox._store import ScheduledRow

__all__ = ["COPIED", "FEWEST_TO_COPY", "NewRows", "Row", "array_text", "copy_stream", "joined", "pieces"]

Row: TypeAlias = tuple[
    int, int, bytes, bytes, int, "int | None"
]  # bucket, nothing yet, id, packed, created, deliver_by

FEWEST_TO_COPY = 50  # fewer are inserted by one statement, which takes one round trip
COPIED = "bucket, created_at, deliver_by, id, packed"  # the columns of `copy_stream`

_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
_TRAILER = struct.pack(">h", -1)
# Each field with its length before it, and the length of the last one; -1 is a null.
_ROW = struct.Struct(">hihiqiqi16si")
_ROW_WITHOUT_DELIVER_BY = struct.Struct(">hihiqii16si")
_CHUNK_BYTES = 256 * 1024
_MOST_JOINED, _MOST_BYTES_JOINED = 1_000, 16_000_000


class NewRows(NamedTuple):
    """What is added: rows of the hot table, and those that are scheduled."""

    hot: list[Row]
    scheduled: list[ScheduledRow]

    @property
    def are_copied(self) -> bool:
        """Whether those of the hot table are too many, or too large, for one statement."""
        if len(self.hot) >= FEWEST_TO_COPY:
            return True
        return len(self.hot) > 1 and sum(len(row[3]) for row in self.hot) > _MOST_BYTES_JOINED

    @property
    def total(self) -> int:
        """How many there are."""
        return len(self.hot) + len(self.scheduled)


def pieces(rows: Sequence[ScheduledRow]) -> Iterator[Sequence[ScheduledRow]]:
    """So many at a time as one statement should have."""
    begin = size = 0
    for at, row in enumerate(rows):
        if at - begin == _MOST_JOINED or (at > begin and size + len(row[3]) > _MOST_BYTES_JOINED):
            yield rows[begin:at]
            begin, size = at, 0
        size += len(row[3])
    if begin < len(rows):
        yield rows[begin:]


def joined(rows: Sequence[Row] | Sequence[ScheduledRow]) -> tuple[str, str, str, str, bytes]:
    """Arrays, as text, of buckets, places, sizes and times; and the bytes that have at each place an id and behind it
    so many packed bytes. Drivers take long for arrays of bytes."""
    buckets, _, ids, packed, _, deliver_by, *_ = zip(*rows, strict=True)
    sizes = list(map(len, packed))
    places = accumulate((size + 16 for size in sizes[:-1]), initial=1)  # the first byte is number 1
    together = b"".join(chain.from_iterable(zip(ids, packed, strict=True)))
    return array_text(buckets), array_text(places), array_text(sizes), array_text(deliver_by), together


def array_text(values: Iterable[int | None]) -> str:
    """An array of numbers as PostgreSQL reads it. Drivers take long for lists."""
    return f"{{{','.join(map(str, values))}}}".replace("None", "NULL")


def copy_stream(rows: Sequence[Row]) -> Iterator[bytes]:
    """What ``COPY … (FORMAT binary)`` reads, in pieces."""
    parts: list[bytes] = [_HEADER]
    size = 0
    for bucket, _, id_bytes, packed, created_at, deliver_by in rows:
        length = len(packed)
        if deliver_by is None:
            parts.append(_ROW_WITHOUT_DELIVER_BY.pack(5, 2, bucket, 8, created_at, -1, 16, id_bytes, length))
        else:
            parts.append(_ROW.pack(5, 2, bucket, 8, created_at, 8, deliver_by, 16, id_bytes, length))
        parts.append(packed)
        size += length
        if size >= _CHUNK_BYTES:
            yield b"".join(parts)
            parts, size = [], 0
    parts.append(_TRAILER)
    yield b"".join(parts)
