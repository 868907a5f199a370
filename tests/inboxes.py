"""Inboxes in SQLite files and in schemas of PostgreSQL, and what is in their tables."""

import contextlib
import uuid
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, TypeAlias

import pytest

import kbatch
from kbatch import Envelope
from tests.outboxes import connected, in_schema, query, rows, run

Inbox: TypeAlias = kbatch.SqliteInbox | kbatch.PostgresInbox

in_sqlite = pytest.mark.parametrize("new_inbox", ["sqlite"], indirect=True)
in_postgres = pytest.mark.parametrize("new_inbox", ["postgres"], indirect=True)

GROUP = "billing"


def made(directory: Path, name: str = "shop.db", **options: Any) -> kbatch.SqliteInbox:
    """An inbox whose tables are there."""
    inbox = kbatch.SqliteInbox(directory / name, **options)
    inbox.create()
    return inbox


@contextlib.contextmanager
def transaction(inbox: Inbox, ends: str = "COMMIT") -> Iterator[Any]:
    """A connection of the application within a transaction, which is committed unless this ends by an exception."""
    with connected(inbox) as connection:
        connection.execute("BEGIN IMMEDIATE" if isinstance(inbox, kbatch.SqliteInbox) else "BEGIN")
        yield connection
        connection.execute(ends)


def accept(inbox: Inbox, envelopes: Iterable[Envelope], group: str = GROUP, ends: str = "COMMIT") -> list[bool]:
    """Marks in a transaction of its own."""
    with transaction(inbox, ends) as connection:
        return inbox.accept_many(connection, envelopes, group=group)


def effects(inbox: Inbox) -> str:
    """The name of a table for a handler to write, which is made."""
    name = "effects" if isinstance(inbox, kbatch.SqliteInbox) else in_schema(inbox, "effects")
    key = "INTEGER PRIMARY KEY" if isinstance(inbox, kbatch.SqliteInbox) else "bigserial PRIMARY KEY"
    run(inbox, f"CREATE TABLE {name} (place {key}, n integer)")
    return name


def numbers(inbox: Inbox, table: str) -> list[int]:
    """What handlers have written."""
    return [n for (n,) in rows(inbox, f"SELECT n FROM {table} ORDER BY place")]


def ids(inbox: Inbox, group: str = GROUP) -> set[uuid.UUID]:
    """The ids that a group has handled."""
    found = query(inbox, f"SELECT id FROM {{inbox}} WHERE group_id = '{group}'")
    return {each if isinstance(each, uuid.UUID) else uuid.UUID(bytes=each) for (each,) in found}


def handled_at(inbox: Inbox, time: datetime, which: str = "true") -> None:
    """As if it had been handled then."""
    us = int(time.timestamp() * 1e6)
    value = us if isinstance(inbox, kbatch.SqliteInbox) else f"timestamptz 'epoch' + {us} * interval '1 microsecond'"
    query(inbox, f"UPDATE {{inbox}} SET handled_at = {value} WHERE {which}")


def id_at(time: datetime, n: int = 0) -> uuid.UUID:
    """A UUID version 7 of a time."""
    return uuid.UUID(int=int(time.timestamp() * 1000) << 80 | 7 << 76 | 2 << 62 | n)


def days_ago(days: float) -> datetime:
    return datetime.now(timezone.utc) - timedelta(days=days)


def let_time_pass(inbox: Inbox, seconds: float) -> None:
    """As if so much had passed by the inbox's clock."""
    us = int(seconds * 1e6)
    past = f"({us})" if isinstance(inbox, kbatch.SqliteInbox) else f"{us} * interval '1 microsecond'"
    query(inbox, f"UPDATE {{inbox}} SET handled_at = handled_at - {past}")
    query(inbox, f"UPDATE {{position}} SET mark_at = mark_at - ({us}) WHERE mark_offset IS NOT NULL")
    query(inbox, f"UPDATE {{position}} SET safe_until = safe_until - ({us}) WHERE safe_until <> 0")


def consumer(cluster: Any, group: str = GROUP) -> dict[str, Any]:
    """A listener's configuration. The mock cluster's groups wait for a session that has gone without a word."""
    servers = cluster if isinstance(cluster, str) else cluster.bootstrap_servers
    return {
        "bootstrap.servers": servers,
        "group.id": group,
        "session.timeout.ms": 1500,
        "heartbeat.interval.ms": 300,
        "log_level": 0,
    }


def where(inbox: Inbox) -> dict[str, str]:
    """Where it is, for another process."""
    if isinstance(inbox, kbatch.SqliteInbox):
        return {"path": inbox._path}
    return {"conninfo": inbox._conninfo, "schema": inbox._tables.schema}
