"""What the tables of an outbox have in common in all databases."""

from __future__ import annotations

from kbatch._database._tables import Tables
from kbatch._errors import OutboxError
from kbatch._outbox._store import BUCKETS
from kbatch._text import counted

__all__ = ["OutboxTables"]


class OutboxTables(Tables):
    """The tables of one outbox, by their quoted names."""

    what = "outbox"
    error = OutboxError
    meta = ("version", "buckets")

    @staticmethod
    def values(now: str) -> dict[str, str]:
        """What ``{now}``, ``{lives}`` and ``{buckets}`` are in a statement.

        Args:
            now: The database's clock, in milliseconds since 1970.
        """
        # Of a line in `lease` or `relay`. One that ends too late is of before the clock was set back; a small step is
        # borne.
        lives = f"(until > {now} AND until <= {now} + 2 * length)"
        return {"now": now, "lives": lives, "buckets": str(BUCKETS)}

    def check_meta(self, version: int, buckets: int = BUCKETS) -> None:
        """Raises OutboxError for tables that are another release's."""
        super().check_meta(version)
        if buckets != BUCKETS:
            raise OutboxError(
                f"the outbox {self.names['outbox']} has {counted(buckets, 'bucket')}, and this kbatch counts with "
                f"{BUCKETS}: a key would change its bucket, and lose its order; use other tables by prefix="
            )
