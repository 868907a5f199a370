"""What wakes relays when other processes have committed to an outbox in PostgreSQL."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import psycopg

from kbatch._errors import OutboxError

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable

    from kbatch._outbox._postgres_tables import PostgresTables

__all__ = ["PostgresListener"]

_LOOK_WHETHER_OVER_S = 0.5
_TRY_AGAIN_S = 2.0


class PostgresListener(threading.Thread):
    """Listens on a connection of its own, and tells of each commit. Without a connection it tries again, and says
    nothing: relays poll."""

    def __init__(
        self,
        connected: Callable[[], contextlib.AbstractContextManager[psycopg.Connection[Any]]],
        tables: PostgresTables,
        tell: Callable[[bool], object],
    ) -> None:
        super().__init__(name="kbatch-notify", daemon=True)
        self._connected = connected
        self._tables = tables
        self._tell = tell
        self._over = threading.Event()

    def stop(self) -> None:
        """Has it end soon."""
        self._over.set()

    def run(self) -> None:
        """Listens until `stop`."""
        while not self._over.is_set():
            try:
                with self._connected() as connection:
                    connection.execute(f"LISTEN {self._tables.channel}".encode())
                    while not self._over.is_set():
                        for _ in connection.notifies(timeout=_LOOK_WHETHER_OVER_S, stop_after=1):
                            self._tell(True)
            except (OutboxError, psycopg.Error):
                self._over.wait(_TRY_AGAIN_S)
