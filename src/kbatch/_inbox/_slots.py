"""In which of the tables of an inbox in PostgreSQL an id lies."""

from __future__ import annotations

__all__ = ["OTHER_SLOT", "SLOTS", "slot_name", "slot_of"]

SLOTS = 32  # days of ids, in turns: an empty slot takes the ids of another day
OTHER_SLOT = -1  # of ids that tell no day


def slot_of(number: int) -> int:
    """The slot of an id, by its number."""
    if number >> 76 & 15 != 7 or number >> 62 & 3 != 2:  # no UUID version 7
        return OTHER_SLOT
    return (number >> 80) // 86_400_000 % SLOTS


def slot_name(slot: int) -> str:
    """What a slot's table is called in a statement."""
    return "other" if slot == OTHER_SLOT else f"day_{slot:02}"
