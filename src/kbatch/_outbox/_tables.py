"""What the tables of an outbox have in common in all databases."""

from __future__ import annotations

from kbatch._errors import OutboxError
from kbatch._outbox._store import BUCKETS
from kbatch._text import counted

__all__ = ["OutboxTables"]

_VERSION = 1


class OutboxTables:
    """The tables of one outbox, by their quoted names.

    Args:
        names: What stands for ``{outbox}``, ``{meta}``, … in a statement.
        now: The database's clock, in milliseconds since 1970.
    """

    def __init__(self, names: dict[str, str], *, now: str) -> None:
        self.names = names
        # Of a line in `lease` or `relay`. One that ends too late is of before the clock was set back; a small step is
        # borne.
        lives = f"(until > {now} AND until <= {now} + 2 * length)"
        self._values = {**names, "now": now, "lives": lives, "version": str(_VERSION), "buckets": str(BUCKETS)}

    def sql(self, statement: str) -> str:
        """A statement with the names of the tables in place of ``{outbox}``, ``{later}``, …; ``{now}``; ``{lives}``."""
        return statement.format_map(self._values)

    def check_meta(self, version: int, buckets: int) -> None:
        """Raises OutboxError for tables that are another release's."""
        if version != _VERSION:
            raise OutboxError(
                f"the outbox {self.names['outbox']} has tables of version {version}, and this kbatch knows version "
                f"{_VERSION}: use the kbatch that made them, or other tables by prefix="
            )
        if buckets != BUCKETS:
            raise OutboxError(
                f"the outbox {self.names['outbox']} has {counted(buckets, 'bucket')}, and this kbatch counts with "
                f"{BUCKETS}: a key would change its bucket, and lose its order; use other tables by prefix="
            )
