"""The pytest plugin is loaded in every project: it must cost nothing there, and break nothing."""

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
import urllib.parse
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

import kbatch
from tests.outboxes import connected
from tests.waiting import until

SOURCES = str(Path(kbatch.__file__).parents[1])


def run_pytest(
    folder: Path, test: str, *paths: Path, options: Sequence[str] = (), postgres: str | None = None
) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(test)
    path = os.pathsep.join(map(str, (*paths, SOURCES)))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-ra", *options, "test_it.py"]
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("KBATCH_TEST_POSTGRES", None)
    if postgres is not None:
        environment["KBATCH_TEST_POSTGRES"] = postgres
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_the_entry_point_is_outside_the_package() -> None:
    (entry_point,) = {point.value for point in entry_points(group="pytest11", name="kbatch")}
    assert entry_point == "pytest_kbatch"


def test_a_run_that_asks_for_no_fixture_imports_nothing(tmp_path: Path) -> None:
    test = """
import sys

def test_nothing():
    assert "pytest_kbatch" in sys.modules
    assert not {"kbatch", "confluent_kafka", "msgspec"} & sys.modules.keys()
"""
    run = run_pytest(tmp_path, test)
    assert run.returncode == 0, run.stdout


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder with a confluent_kafka that cannot be imported."""
    folder = tmp_path / "broken"
    (folder / "confluent_kafka").mkdir(parents=True)
    (folder / "confluent_kafka" / "__init__.py").write_text("raise ImportError('librdkafka.so.1: no such file')")
    return folder


def test_a_broken_confluent_kafka_fails_only_who_asks_for_the_fixture(tmp_path: Path, broken: Path) -> None:
    test = """
def test_nothing():
    pass

def test_something(kafka_cluster):
    pass
"""
    run = run_pytest(tmp_path, test, broken)
    assert "1 passed, 1 error" in run.stdout, run.stdout
    assert "ImportError: kbatch found confluent-kafka" in run.stdout


# -- databases


def test_an_outbox_and_an_inbox_in_sqlite_are_in_one_file(
    tmp_path: Path, sqlite_outbox: kbatch.SqliteOutbox, sqlite_inbox: kbatch.SqliteInbox
) -> None:
    order = kbatch.Envelope({"id": 1}, topic="orders")
    with contextlib.closing(sqlite3.connect(tmp_path / "kbatch.db")) as db, db:
        db.execute("BEGIN IMMEDIATE")
        assert sqlite_inbox.accept(db, order, group="billing")
        sqlite_outbox.add(db, [order])
    assert (sqlite_outbox.status().waiting, sqlite_inbox.status().handled) == (1, 1)


def test_an_outbox_and_an_inbox_in_postgresql_are_in_one_schema(
    postgres: str,
    postgres_conninfo: str,
    postgres_schema: str,
    postgres_outbox: kbatch.PostgresOutbox,
    postgres_inbox: kbatch.PostgresInbox,
) -> None:
    import psycopg

    order = kbatch.Envelope({"id": 1}, topic="orders")
    with contextlib.closing(psycopg.connect(postgres_conninfo)) as db, db:
        assert postgres_inbox.accept(db, order, group="billing")
        postgres_outbox.add(db, [order])
    assert (postgres_outbox.status().waiting, postgres_inbox.status().handled) == (1, 1)
    assert postgres_conninfo == postgres  # that of tests/conftest.py, not the plugin's
    assert f'"{postgres_schema}"' in postgres_outbox.ddl()
    assert f'"{postgres_schema}"' in postgres_inbox.ddl()


def test_each_test_has_a_schema_of_its_own_that_is_dropped_after_it(tmp_path: Path, postgres: str) -> None:
    test = """
import psycopg
import pytest
import pytest_kbatch

pytest_kbatch._LOCK_TIMEOUT = "100ms"

def test_one(postgres_outbox, postgres_schema):
    print("it is", postgres_schema)

def test_another(postgres_inbox, postgres_schema):
    print("it is", postgres_schema)

@pytest.fixture
def connection(postgres_conninfo):
    with psycopg.connect(postgres_conninfo) as connection:
        yield connection

def test_what_is_left_open(connection, postgres_schema):
    print("it is", postgres_schema)
    connection.execute(f"CREATE TABLE {postgres_schema}.mine (n integer)")
    connection.commit()
    connection.execute(f"SELECT * FROM {postgres_schema}.mine")
"""
    run = run_pytest(tmp_path, test, options=["-s"], postgres=postgres)
    assert "3 passed, 1 error" in run.stdout, run.stdout
    assert "the test has left a transaction open that uses tables of kbatch_" in run.stdout
    one, another, left = re.findall(r"it is (\w+)", run.stdout)
    assert one != another
    with connected(postgres) as connection:
        query = "SELECT nspname FROM pg_namespace WHERE nspname = ANY(%s)"
        assert connection.execute(query, ([one, another, left],)).fetchall() == [(left,)]
        connection.execute(f"DROP SCHEMA {left} CASCADE")


def test_without_a_server_or_psycopg_a_test_of_postgresql_is_skipped(tmp_path: Path) -> None:
    test = """
import sys

import pytest

import kbatch.testing._postgres_server

kbatch.testing._postgres_server.programs = lambda: None

def test_no_server(postgres_inbox):
    pass

class TestNoPsycopg:
    @pytest.fixture
    def postgres_conninfo(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "psycopg", None)
        return "postgresql://127.0.0.1:1/none"

    def test_it(self, postgres_outbox):
        pass
"""
    run = run_pytest(tmp_path, test)
    assert "2 skipped" in run.stdout, run.stdout
    assert "KBATCH_TEST_POSTGRES names no server, and " in run.stdout
    assert "pip install 'kbatch-kafka[postgres]'" in run.stdout


@pytest.mark.long
def test_a_server_that_the_plugin_has_started_ends_with_its_process_however_that_ends(
    tmp_path: Path, postgres_servers: Any
) -> None:
    postgres_servers._installed()
    test = """
import os
import signal
from pathlib import Path

def test_it(postgres_conninfo, postgres_outbox):
    assert postgres_outbox.status().waiting == 0
    Path("conninfo").write_text(postgres_conninfo)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    run = run_pytest(tmp_path, test)
    assert run.returncode == -signal.SIGKILL, run.stdout
    conninfo = (tmp_path / "conninfo").read_text()
    folder = Path(urllib.parse.unquote(conninfo.partition("host=")[2]))
    assert folder.name.startswith("kbatch-postgres-")
    until(lambda: not folder.exists(), "the end of the server", 60)
