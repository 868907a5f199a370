"""What a relay does in our databases: the suite that every outbox has to pass, and what is about our SQL alone."""

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from kbatch.stores import OutboxStore, Reading
from kbatch.testing.compliance import OutboxCompliance
from tests import outboxes
from tests.outboxes import Outbox, in_sqlite
from tests.relays import numbered

NOTHING: dict[str, Any] = {"done": [], "done_later": [], "failures": [], "failures_later": []}


@pytest.fixture
def outbox(new_outbox: Callable[..., Outbox]) -> Outbox:
    return new_outbox()


@pytest.fixture
def store(outbox: Outbox) -> Iterator[OutboxStore]:
    store = outbox.open_store()
    yield store
    store.close()


def renew(store: OutboxStore, owner: str, **options: Any) -> tuple[dict[int, int], int]:
    leases, share = store.renew(owner, 60.0, **{"release": (), "avoid": (), **options})
    return dict(leases), share


def read(
    store: OutboxStore,
    floors: Mapping[int, int],
) -> Reading:
    return store.read(floors, limit=10_000, max_bytes=10**9, in_flight=tuple)


class TestOutboxStore(outboxes.OurStores, OutboxCompliance):
    pass


# -- leases


@in_sqlite
def test_a_lease_that_runs_out_while_it_is_renewed_is_not_told(outbox: Outbox) -> None:
    store: Any = outbox.open_store()
    renew(store, "first")
    connection = store._connection
    expire = outbox._tables.sql("UPDATE {lease} SET until = 0 WHERE bucket = 5")

    class Late:
        in_transaction = property(lambda self: connection.in_transaction)

        def execute(self, sql: str, *arguments: Any) -> Any:
            if sql.startswith("UPDATE") and "SET until = ?, length" in sql:
                connection.execute(expire)
            return connection.execute(sql, *arguments)

    store._connection = Late()
    mine, _ = renew(store, "first", avoid=(5,))
    connection.close()
    assert set(mine) == set(range(64)) - {5}


@pytest.mark.parametrize(("back_s", "relays"), [(-50, 1), (50, 1), (70, 0), (3600, 0)])
def test_a_relay_of_before_the_clock_was_set_back_is_not_counted(
    outbox: Outbox, store: OutboxStore, back_s: int, relays: int
) -> None:
    renew(store, "first")  # for 60 seconds
    outboxes.let_time_pass(outbox, -back_s)
    assert outbox.status().relays == relays


# -- the plans of its statements


def test_what_is_not_due_is_not_read(outbox: Outbox) -> None:
    store = outbox.open_store()
    plans = outboxes.explained(store)
    store.read_due(range(64), avoid=(), longest_s=60.0, limit=10)
    store.close()
    assert ["kbatch_outbox_later_at" in plan for plan in plans] == [True, True]


def test_rows_are_found_by_the_primary_key_whatever_the_statistics_say(outbox: Outbox, store: OutboxStore) -> None:
    outboxes.query(outbox, "ANALYZE")  # of empty tables
    outboxes.add(outbox, numbered(range(3000), keys=300))
    mine, _ = renew(store, "first")
    plans = outboxes.explained(store)
    reading = read(store, dict.fromkeys(range(64), 0))
    store.settle(mine, **{**NOTHING, "done": [row[:2] for row in reading.rows]})
    assert plans
    for plan in plans:
        assert not re.search("SCAN (?!place)|Seq Scan on (?!kbatch_outbox_lease)|Sort", plan), plan


# -- what is scheduled


def schedule(outbox: Outbox, numbers: range, due_in_s: float, **options: Any) -> None:
    """Rows that are due in so many seconds."""
    moment = datetime.now(timezone.utc) + timedelta(days=1)
    outboxes.add(outbox, numbered(numbers, scheduled_time=moment, **options))
    outboxes.query(
        outbox,
        f"UPDATE {{later}} SET due_at = {{now}} + {int(due_in_s * 1000)} "
        "WHERE scheduled = 1 AND due_at > {now} + 80000000",
    )


def admit(store: OutboxStore, leases: Mapping[int, int]) -> int:
    return store.admit_scheduled(leases, store.due_scheduled(list(leases), avoid=(), limit=100))


def test_what_is_admitted_is_as_old_as_if_it_was_added_when_it_was_due(outbox: Outbox, store: OutboxStore) -> None:
    mine, _ = renew(store, "relay")
    schedule(outbox, range(3), -1.0)
    schedule(outbox, range(3, 6), 3600.0)
    outboxes.add(outbox, numbered(range(6, 9)))
    assert admit(store, mine) == 3
    assert outbox.status().scheduled == 3
    assert store.left() == 6
    assert outbox.status().oldest_age_s < 60


def test_what_is_scheduled_and_what_waits_are_found_by_indexes_of_their_own(outbox: Outbox) -> None:
    schedule(outbox, range(30), 3600.0)
    store = outbox.open_store()
    plans = outboxes.explained(store)
    store.read_due(range(64), avoid=(), longest_s=60.0, limit=100)
    store.due_scheduled(range(64), avoid=(), limit=100)
    store.close()
    assert len(plans) == 3
    for plan in plans:
        assert "kbatch_outbox_later_at" in plan, plan
