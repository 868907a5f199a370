"""What a relay does in our databases: the suite that every outbox has to pass, and what is about our SQL alone.

Of the original's compliance suite of a message store an outbox has these:

- store one and many outgoing: `test_what_was_committed_is_there_as_it_goes_on_the_wire` (`test_outbox_add.py`) and
  `test_few_rows_and_many_are_stored_alike` (`test_outbox_postgres.py`)
- counts: `test_status_counts_up_to_a_bound_and_tells_the_oldest` (`test_outbox_add.py`)
- delete one and many outgoing: `test_delete_one_and_many_outgoing`
- increment attempts, move to dead letters: `test_increment_attempts`, `test_move_to_dead_letters_with_all_that_it_had`
- with a missing source: `test_move_to_dead_letters_with_a_missing_source`
- schedule execution: `test_schedule_execution`
- dead letters, and what is scheduled: `test_dead_letters.py` says which test is which

Of its suite of nodes, which are relays here and whose assignments are buckets:

- none on a blank slate: `test_none_on_a_blank_slate`
- persist one; the only known node leads, and knows all: `test_the_only_known_node_holds_all_buckets`
- write assignments, add one, remove one; a second node is balanced; hand-over between nodes:
  `test_a_second_node_is_balanced`, `test_hand_over_between_nodes`
- a bucket is held by one only: `test_a_bucket_is_held_by_one_only`, `test_take_over_with_racing_nodes`
- delete one; eject a stale one; every bucket survives the loss of the node that held it:
  `test_delete_one`, `test_eject_a_stale_one`,
  `test_every_bucket_survives_the_loss_of_the_nodes_that_held_it`
- registering again after an ejection:
  `test_registering_again_after_an_ejection_keeps_identity_and_restores_assignments`
- take over with racing nodes: `test_take_over_with_racing_nodes`
- with relays at work, `mock/test_relay.py` says which test is which

Left out:

- incoming messages, mark handled: an inbox has these (`test_inbox_store.py`)
- discard and reassign outgoing, fetch by owner: a row has no owner; its bucket has one, and changes hands as a whole
- load incoming counts: an inbox counts per group only; messages that are not handled are in Kafka
- the row of a health check: a renewal writes the line of a relay anew, whether it exists or not
- old records of nodes: none are kept, a renewal removes the lines that have run out
- clearing all: nothing clears an outbox; a relay takes part by a renewal, however its line came to be gone
- a leader: there is none, each relay takes its share by itself
"""

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from kbatch._outbox._leases import Leases, Times
from kbatch.stores import Failure, OutboxStore, Reading
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


def placed(outbox: Outbox, table: str = "outbox") -> list[tuple[int, int]]:
    return outboxes.query(outbox, f"SELECT bucket, seq FROM {{{table}}} ORDER BY seq")


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
    outboxes.add(outbox, numbered(range(3000), keys=3000))
    outboxes.query(
        outbox,
        "INSERT INTO {later} (bucket, seq, id, packed, created_at, due_at, attempts, last_error, key_hash) "
        "SELECT bucket, seq, id, packed, created_at, {now} + 30000 + seq, 1, 'refused', seq FROM {outbox}",
    )
    store = outbox.open_store()
    plans = outboxes.explained(store)
    for scheduled in (0, 1):
        outboxes.query(outbox, f"UPDATE {{later}} SET scheduled = {scheduled}, due_at = due_at + {scheduled * 10**8}")
        outboxes.query(outbox, "ANALYZE")  # a relay may have few buckets, which look as if they were quick to read
        for buckets in (range(64), [3]):
            assert store.read_due(buckets, avoid=(), longest_s=60.0, limit=10) == []
    store.close()
    assert ["kbatch_outbox_later_at" in plan for plan in plans] == [True] * 8


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


# -- by the names of the original's suites, see above


def test_move_to_dead_letters_with_a_missing_source(outbox: Outbox, store: OutboxStore) -> None:
    outboxes.add(outbox, numbered(range(6), keys=6))
    places = placed(outbox)
    mine, _ = renew(store, "relay")
    dead = [Failure(bucket, seq, None, 3, f"error {seq}", None) for bucket, seq in places]
    outboxes.query(outbox, "DELETE FROM {outbox} WHERE seq = 2")
    assert store.settle(mine, **{**NOTHING, "failures": dead[:3]}) == set()
    assert placed(outbox, "dead") == [places[0], places[2]]
    # Neither are those invented that are in another table, nor is what is dead moved once more.
    again = [each._replace(error="again") for each in dead[:3]]
    assert store.settle(mine, **{**NOTHING, "failures": again, "failures_later": [*again, dead[3]]}) == set()
    assert (placed(outbox), placed(outbox, "later")) == (places[3:], [])
    assert outboxes.query(outbox, "SELECT last_error FROM {dead} ORDER BY seq") == [("error 1",), ("error 3",)]
    outboxes.move_to_later(outbox, 4, 5)
    outboxes.query(outbox, "DELETE FROM {later} WHERE seq = 4")
    assert store.settle(mine, **{**NOTHING, "failures_later": dead[3:5]}) == set()
    assert placed(outbox, "dead") == [places[0], places[2], places[4]]
    assert (placed(outbox), placed(outbox, "later")) == (places[5:], [])


def test_registering_again_after_an_ejection_keeps_identity_and_restores_assignments(
    outbox: Outbox, store: OutboxStore
) -> None:
    renew(store, "first")
    renew(store, "second")
    renew(store, "first", release=range(32))
    second, _ = renew(store, "second")
    # Its line is gone, and its leases hold.
    outboxes.query(outbox, "DELETE FROM {relay} WHERE owner = 'second'")
    first, share = renew(store, "first")
    assert (set(first), share) == (set(range(32, 64)), 64)
    assert renew(store, "second") == (second, 32)
    # Its leases have run out, too, and another relay has taken its buckets.
    for table in ("lease", "relay"):
        outboxes.query(outbox, f"UPDATE {{{table}}} SET until = 0 WHERE owner = 'second'")
    first, share = renew(store, "first")
    assert (set(first), share) == (set(range(64)), 64)
    assert renew(store, "second") == ({}, 32)
    renew(store, "first", release=second)
    again, share = renew(store, "second")
    assert (again, share) == ({bucket: token + 2 for bucket, token in second.items()}, 32)
    assert outboxes.query(outbox, "SELECT owner FROM {relay} ORDER BY owner") == [("first",), ("second",)]


def test_take_over_with_racing_nodes(outbox: Outbox, store: OutboxStore) -> None:
    count, stale_rounds, most_rounds = 6, 5, 30
    owners = [f"relay {n}" for n in range(count)]
    held = {owner: Leases(60.0) for owner in owners}
    turn = threading.Barrier(count + 1, timeout=30)
    is_over = False
    errors: list[BaseException] = []

    def work(owner: str) -> None:
        leases = held[owner]
        store = outbox.open_store()
        try:
            while True:
                turn.wait()
                if is_over:
                    return
                release = set(leases.leaving)
                found, share = store.renew(owner, 60.0, release=release, avoid=())
                leases.drop(release)
                leases.renewed(Times(0.0, 0.0), found, share)
                turn.wait()
        except BaseException as error:
            errors.append(error)
            turn.abort()
        finally:
            store.close()

    threads = [threading.Thread(target=work, args=(owner,)) for owner in owners]
    for thread in threads:
        thread.start()
    try:
        for number in range(most_rounds):
            is_stale = number < stale_rounds
            if is_stale:  # all want what it had, and remove it
                renew(store, "stale")
                for table in ("lease", "relay"):
                    outboxes.query(outbox, f"UPDATE {{{table}}} SET until = 0 WHERE owner = 'stale'")
            turn.wait()  # they begin
            turn.wait()  # all have renewed
            believed = [(bucket, token) for leases in held.values() for bucket, token in leases.tokens.items()]
            assert len(dict(believed)) == len(believed)  # no bucket has two owners
            stored = set(outboxes.query(outbox, "SELECT bucket, token FROM {lease}"))
            assert {
                (bucket, token % 2**63) for bucket, token in believed
            } <= stored  # PostgreSQL's say besides on which server
            assert outboxes.query(outbox, "SELECT owner FROM {relay} ORDER BY owner") == [(owner,) for owner in owners]
            shares = [len(leases.tokens) for leases in held.values()]
            if not is_stale and sum(shares) == 64 and max(shares) <= 11:
                break
        else:
            pytest.fail(f"all have not got their shares, but {shares}")
    except threading.BrokenBarrierError:
        pytest.fail(f"a relay did not renew: {errors}")
    finally:
        is_over = True
        if not turn.broken:
            turn.wait()
        for thread in threads:
            thread.join()
