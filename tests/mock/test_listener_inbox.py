"""A listener with an inbox: each message has one effect, whatever the database does; while it is away, it is waited
for."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kbatch
from kbatch import Envelope, InboxError
from kbatch.testing import MockCluster
from tests import inboxes, outboxes
from tests.inboxes import GROUP, Inbox, in_postgres, in_sqlite
from tests.listening import running
from tests.waiting import until


@pytest.fixture
def inbox(new_inbox: Callable[..., Inbox]) -> Inbox:
    return new_inbox()


@pytest.fixture
def effects(inbox: Inbox) -> str:
    return inboxes.effects(inbox)


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=3)
        yield cluster


def send(cluster: MockCluster, envelopes: list[Envelope]) -> list[Envelope]:
    with kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers}) as producer:
        producer.send_batch("orders", envelopes).raise_for_errors()
    return envelopes


def orders(count: int, first: int = 0) -> list[Envelope]:
    return [Envelope(data=b"%d" % n, key=f"k{n % 7}") for n in range(first, first + count)]


def listener(cluster: MockCluster, inbox: Inbox, handler: Any, **options: Any) -> kbatch.Listener:
    return kbatch.Listener(inboxes.consumer(cluster), ["orders"], handler, inbox=inbox, **options)


def writer(effects: str) -> Callable[[Any, Any], None]:
    def handle(envelope: Envelope, connection: Any) -> None:
        connection.execute(f"INSERT INTO {effects} (n) VALUES ({int(envelope.data)})")  # type: ignore[arg-type]

    return handle


def check(inbox: Inbox, effects: str, count: int) -> None:
    """Every order has one effect, in the order of its key."""
    found = inboxes.numbers(inbox, effects)
    assert sorted(found) == list(range(count))
    of_key: dict[int, list[int]] = defaultdict(list)
    for n in found:
        of_key[n % 7].append(n)
    assert all(each == sorted(each) for each in of_key.values())


def handled(inbox: Inbox) -> int:
    return inbox.status().handled


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_message_that_comes_twice_has_one_effect(
    cluster: MockCluster, inbox: Inbox, effects: str, concurrency: int
) -> None:
    given = send(cluster, orders(200))
    send(cluster, given)
    with running(of := listener(cluster, inbox, writer(effects), concurrency=concurrency)) as raised:
        until(lambda: of.stats()["handled"] == 400, "all of them")
    assert raised == []
    check(inbox, effects, 200)
    assert inboxes.ids(inbox) == {each.id for each in given}


def test_a_handler_of_batches_has_those_that_are_new(cluster: MockCluster, inbox: Inbox, effects: str) -> None:
    given = send(cluster, orders(300))
    send(cluster, given[:150])
    sizes: list[int] = []

    def handle(envelopes: list[Envelope], connection: Any) -> None:
        sizes.append(len(envelopes))
        for envelope in envelopes:
            writer(effects)(envelope, connection)

    with running(of := listener(cluster, inbox, handle, batch_size=50)):
        until(lambda: of.stats()["handled"] == 450, "all of them")
    check(inbox, effects, 300)
    assert sum(sizes) == 300
    assert max(sizes) > 1


def test_a_record_whose_handler_raises_is_not_marked_and_comes_again(
    cluster: MockCluster, inbox: Inbox, effects: str
) -> None:
    send(cluster, orders(50))
    failed: list[int] = []

    def handle(envelope: Any, connection: Any) -> None:
        writer(effects)(envelope, connection)
        if int(envelope.data) == 30 and not failed:
            failed.append(30)
            raise KeyError("a fault of the handler")

    once = kbatch.RetryPolicy(max_attempts=1)
    with running(listener(cluster, inbox, handle, retry=once)) as raised:
        until(lambda: raised, "its end")
    assert isinstance(raised[0], KeyError)
    assert 30 not in inboxes.numbers(inbox, effects)
    with running(listener(cluster, inbox, handle)) as raised:
        until(lambda: handled(inbox) == 50, "all of them")
    assert raised == []
    check(inbox, effects, 50)


def test_a_record_that_is_tried_again_has_one_effect_and_one_that_never_succeeds_has_none(
    cluster: MockCluster, inbox: Inbox, effects: str
) -> None:
    send(cluster, orders(50))
    failed: list[int] = []

    def handle(envelope: Any, connection: Any) -> None:
        writer(effects)(envelope, connection)
        number = int(envelope.data)
        if number == 49 or (number == 30 and failed.count(30) < 2):
            failed.append(number)
            raise KeyError("a fault of the handler")

    policy = kbatch.RetryPolicy(max_attempts=3, initial_backoff_s=0.01)
    of = listener(cluster, inbox, handle, retry=policy, dead_letter_topic="dead", concurrency=3)
    with running(of) as raised:
        until(lambda: of.stats()["handled"] == 50, "all of them")
        assert of.stats()["dead"] == 1
    assert raised == []
    assert sorted(failed) == [30, 30, 49, 49, 49]
    check(inbox, effects, 49)
    assert handled(inbox) == 49


@in_sqlite
def test_a_locked_database_is_waited_for_and_counts_as_no_failure(
    cluster: MockCluster, inbox: Inbox, effects: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kbatch._database._sqlite._BUSY_TIMEOUT_S", 0.05)
    send(cluster, orders(100))
    of = listener(cluster, inbox, writer(effects), concurrency=3)
    with inboxes.transaction(inbox) as blocking, running(of) as raised:
        until(lambda: "waits for its inbox" in caplog.text, "that it waits")
        time.sleep(0.5)
        assert of.stats()["handled"] == of.stats()["failed"] == 0
        blocking.execute("COMMIT")
        until(lambda: of.stats()["handled"] == 100, "all of them")
        blocking.execute("BEGIN")
    assert raised == []
    assert caplog.text.count("waits for its inbox") == 1
    check(inbox, effects, 100)


@in_sqlite
def test_a_listener_that_waits_for_its_inbox_can_be_stopped(
    cluster: MockCluster, inbox: Inbox, effects: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kbatch._database._sqlite._BUSY_TIMEOUT_S", 0.05)
    send(cluster, orders(100))
    with inboxes.transaction(inbox):
        with running(of := listener(cluster, inbox, writer(effects), concurrency=3, close_timeout_s=3600)) as raised:
            until(lambda: "waits for its inbox" in caplog.text and of.stats()["running"] == 3, "that it waits")
        assert raised == []
        assert of.stats()["abandoned"] == 3
    with running(listener(cluster, inbox, writer(effects), concurrency=3)):
        until(lambda: handled(inbox) == 100, "all of them")
    check(inbox, effects, 100)


@in_postgres
def test_a_connection_that_is_cut_again_and_again(cluster: MockCluster, inbox: Inbox, effects: str) -> None:
    send(cluster, orders(400))

    def handle(envelope: Any, connection: Any) -> None:
        writer(effects)(envelope, connection)
        if int(envelope.data) % 50 == 7 and envelope.id not in cut:
            cut.add(envelope.id)
            pid = connection.info.backend_pid
            outboxes.run(inbox, f"SELECT pg_terminate_backend({pid})")

    cut: set[Any] = set()
    with running(of := listener(cluster, inbox, handle, concurrency=4)) as raised:
        until(lambda: of.stats()["handled"] == 400, "all of them", 60)
        assert of.stats()["failed"] == 0
    assert raised == []
    assert len(cut) == 8
    check(inbox, effects, 400)


def test_postgresql_that_is_stopped_and_started_is_waited_for(
    cluster: MockCluster, new_postgres: Callable[[], Any]
) -> None:
    server = new_postgres()
    inbox = kbatch.PostgresInbox(server.conninfo)
    inbox.create()
    effects = inboxes.effects(inbox)
    send(cluster, orders(300))
    with running(of := listener(cluster, inbox, writer(effects), concurrency=4)) as raised:
        until(lambda: of.stats()["handled"] > 20, "some")
        server.stop()
        send(cluster, orders(50, 300))
        time.sleep(0.5)
        server.start()
        until(lambda: of.stats()["handled"] == 350, "all of them", 60)
        assert of.stats()["failed"] == 0
        server.stop()
        server.start()
        send(cluster, orders(50, 350))
        until(lambda: of.stats()["handled"] == 400, "all of them", 60)
    assert raised == []
    check(inbox, effects, 400)


def test_without_tables_it_does_not_begin(cluster: MockCluster, inbox: Inbox) -> None:
    outboxes.query(inbox, "DROP TABLE {meta}")
    with pytest.raises(InboxError, match=r"call create\(\)"):
        listener(cluster, inbox, lambda envelope, connection: None).run()


def test_a_handler_that_commits_ends_the_listener(cluster: MockCluster, inbox: Inbox, effects: str) -> None:
    send(cluster, orders(1))
    with running(listener(cluster, inbox, lambda envelope, connection: connection.commit())) as raised:
        until(lambda: raised, "its end")
    assert isinstance(raised[0], InboxError)
    assert "the handler has ended the transaction" in str(raised[0])


@in_postgres
def test_its_connections_are_given_back(cluster: MockCluster, inbox: Inbox, effects: str) -> None:
    send(cluster, orders(50))

    def connections() -> int:
        statement = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'kbatch' AND query LIKE '%inbox%'"
        ((count,),) = outboxes.rows(inbox, f"{statement} AND query LIKE '%{inbox._tables.schema[6:18]}%'")  # type: ignore[union-attr]
        return int(count)

    with running(of := listener(cluster, inbox, writer(effects), concurrency=3)):
        until(lambda: of.stats()["handled"] == 50, "all of them")
    until(lambda: connections() == 0, "the end of its connections")


def test_it_tells_how_far_it_has_committed_and_purges_what_is_old_and_not_at_its_start(
    cluster: MockCluster, inbox: Inbox, effects: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kbatch._inbox._keeper._NOTE_EVERY_S", 0.05)
    monkeypatch.setattr("kbatch._inbox._keeper._MARGIN_US", 0)
    old = inboxes.days_ago(10)
    send(cluster, [each.replace(id=inboxes.id_at(old, n)) for n, each in enumerate(orders(100))])
    with running(of := listener(cluster, inbox, writer(effects), commit_interval_s=0.1)):
        until(lambda: of.stats()["handled"] == 100, "all of them")
        until(lambda: inbox.status().safe_until.get(GROUP), "what it tells")
    assert handled(inbox) == 100
    monkeypatch.setattr("kbatch._inbox._keeper._PURGE_EVERY_S", 0.2)
    inboxes.handled_at(inbox, inboxes.days_ago(10))
    send(cluster, orders(1, 100))
    with running(listener(cluster, inbox, writer(effects))):
        until(lambda: handled(inbox) < 100, "that it purges")


@pytest.mark.parametrize("inbox", [object(), "shop.db"])
def test_a_wrong_inbox_and_a_handler_that_takes_no_connection(inbox: Any) -> None:
    with pytest.raises(kbatch.ConfigError, match="inbox must be"):
        kbatch.Listener({"bootstrap.servers": "x", "group.id": "g"}, ["orders"], print, inbox=inbox)
    with pytest.raises(kbatch.ConfigError, match="handler must take"):
        kbatch.Listener(
            {"bootstrap.servers": "x", "group.id": "g"},
            ["orders"],
            lambda envelope: None,
            inbox=kbatch.SqliteInbox("shop.db"),
        )
