"""Another server in place of one that has failed: first as a standby, which only reads; then it is promoted."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from kbatch import DurableSender, Envelope, InboxError, OutboxError, PostgresInbox, PostgresOutbox
from tests import outboxes


@pytest.fixture
def server(new_postgres: Callable[[], Any]) -> Any:
    return new_postgres()


def test_a_standby_is_an_outage_that_says_what_to_do_and_after_its_promotion_all_goes_on(server: Any) -> None:
    inbox = PostgresInbox(server.conninfo)
    outbox = PostgresOutbox(server.conninfo)
    for each in (inbox, outbox):
        each.create()
    session = inbox.open_session("billing")
    order = Envelope({"n": 1})
    with DurableSender(outbox, "orders") as sender:
        assert sender.send(order)
        server.stand_by()
        for _ in range(2):
            with pytest.raises(InboxError, match="to the primary server") as caught:
                session.handle(order, lambda envelope, connection: None)
            assert caught.value.is_outage
            with pytest.raises(OutboxError, match="to the primary server"):
                sender.send(order)
        server.promote()
        assert session.handle(order, lambda envelope, connection: None)
        assert sender.send(order)
    session.close()
    assert outbox.status().waiting == 2


def test_what_was_read_before_a_failover_is_not_deleted_by_its_number_after_it(server: Any) -> None:
    outbox = PostgresOutbox(server.conninfo, wire="raw")
    outbox.create()
    outboxes.add(outbox, [Envelope(data=b"of the old server", key="k")])
    ((place,),) = outboxes.query(outbox, "SELECT row(bucket, seq)::text FROM {outbox}")
    reads: dict[str, Any] = {"release": (), "avoid": ()}
    store = outbox.open_store()
    before = dict(store.renew("relay", 3600.0, **reads)[0])
    found = store.read(dict.fromkeys(before, 0), limit=10, max_bytes=1000, in_flight=list)
    done = [row[:2] for row in found.rows]
    with contextlib.suppress(OutboxError):
        store.close()
    server.stand_by()
    store = outbox.open_store()
    with pytest.raises(OutboxError, match="to the primary server"):
        store.renew("relay", 3600.0, **reads)
    server.promote()  # this connection stays
    # It lacks the row, and gives its number once more.
    outboxes.query(outbox, "DELETE FROM {outbox}")
    outboxes.query(outbox, "ALTER TABLE {outbox} ALTER COLUMN seq RESTART WITH 1")
    outboxes.add(outbox, [Envelope(data=b"of the new one", key="k")])
    assert outboxes.query(outbox, "SELECT row(bucket, seq)::text FROM {outbox}") == [(place,)]
    settle: dict[str, Any] = {"done_later": [], "failures": [], "failures_later": []}
    (bucket,) = {each for each, _ in done}
    assert store.settle({bucket: before[bucket]}, done=done, **settle) == {bucket}
    assert outboxes.bodies(outbox) == [b"of the new one"]
    after = dict(store.renew("relay", 3600.0, **reads)[0])
    assert set(after) == set(before)
    assert all(after[each] != before[each] for each in after)
    assert store.settle({bucket: after[bucket]}, done=done, **settle) == set()
    assert outboxes.bodies(outbox) == []
    store.close()
