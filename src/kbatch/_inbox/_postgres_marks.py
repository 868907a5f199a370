"""Ids as PostgreSQL's statements take them. No connection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kbatch._inbox._base import id_of
from kbatch._inbox._slots import slot_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kbatch._fastmap import Envelope

__all__ = ["Marks"]


class Marks:
    """Ids that are to be marked, as statements take them, in one order: so that no two transactions that mark the same
    ids wait for each other.

    Args:
        ids: Their texts of 32 digits.
    """

    def __init__(self, envelopes: Iterable[Envelope[Any]]) -> None:
        numbers = [id_of(envelope).int for envelope in envelopes]
        self.ids = [f"{number:032x}" for number in numbers]
        of_id = dict(zip(self.ids, numbers, strict=True))
        self.distinct = sorted(of_id)
        self.slots = [slot_of(of_id[each]) for each in self.distinct]

    def array_texts(self) -> tuple[str, str]:
        """The slots and the ids, as PostgreSQL reads arrays."""
        return f"{{{','.join(map(str, self.slots))}}}", f"{{{','.join(self.distinct)}}}"

    def found(self, count: int, marked: str | bytes | None) -> list[bool]:
        """Which of the ids are new: `count` were marked; `marked` says which unless all were."""
        if count == len(self.ids):
            return [True] * count
        if isinstance(marked, bytes):  # psycopg's text where client_encoding is SQL_ASCII
            marked = marked.decode()
        left = set(self.distinct) if marked is None else set(marked[1:-1].replace("-", "").split(","))
        found = []
        for each in self.ids:
            found.append(each in left)
            left.discard(each)
        return found
