"""Connections to PostgreSQL that a function of the application makes: for passwords that expire, and TLS of its own."""

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

import kbatch
from kbatch import ConfigError, DurableSender, Envelope, InboxError, OutboxError, PostgresInbox, PostgresOutbox, aio
from kbatch.testing import MockCluster
from tests import outboxes
from tests.listening import config_of, running, send
from tests.waiting import until

KINDS: list[Any] = [PostgresOutbox, aio.PostgresOutbox, PostgresInbox, aio.PostgresInbox]
SECRET = "hunter2-hunter2"


class Maker:
    """Makes connections, or raises what it is to raise."""

    def __init__(self, conninfo: str, **options: Any) -> None:
        self.conninfo, self.options = conninfo, options
        self.made: list[psycopg.Connection[Any]] = []
        self.failures: list[Exception] = []
        self.tries = 0

    def __call__(self) -> psycopg.Connection[Any]:
        self.tries += 1
        if self.failures:
            raise self.failures[0]
        self.made.append(psycopg.connect(self.conninfo, **self.options))
        return self.made[-1]

    def end_all(self) -> None:
        """The server ends the connections that there are."""
        pids = [each.info.backend_pid for each in self.made if not each.closed]
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            connection.execute("SELECT pg_terminate_backend(pid) FROM unnest(%s::integer[]) AS pid", (pids,))


@pytest.fixture
def schema(postgres: str) -> Iterator[str]:
    name = outboxes.new_schema(postgres)
    yield name
    outboxes.drop_schema(postgres, name)


@pytest.fixture
def maker(postgres: str) -> Maker:
    return Maker(postgres)


def made(maker: Maker, schema: str, **options: Any) -> PostgresOutbox:
    outbox = PostgresOutbox(connect=maker, schema=schema, wire="raw", **options)
    outbox.create()
    return outbox


def config(cluster: MockCluster) -> dict[str, Any]:
    return {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0, "delivery.timeout.ms": 3000}


@pytest.mark.parametrize("options", [{}, {"autocommit": True, "row_factory": dict_row, "client_encoding": "latin1"}])
def test_each_connection_of_kbatchs_own_is_made_by_it_and_closed(
    postgres: str, schema: str, kafka_cluster: MockCluster, options: dict[str, Any]
) -> None:
    maker = Maker(postgres, **options)
    outbox = made(maker, schema, notify=True)
    with psycopg.connect(postgres) as connection:
        outbox.add(connection, [Envelope(data=b"1", key="k"), Envelope(data="ü".encode(), key="ü")], topic="orders")
    with DurableSender(outbox, "orders") as sender:
        assert sender.send(Envelope(data=b"2", key="k"))
    with kbatch.Relay(outbox, config(kafka_cluster)) as relay:
        assert relay.drain(30) == 0
        assert relay.stats()["acked"] == 3
    assert outbox.dead_letters.find() == []
    assert outbox.status().waiting == 0
    until(lambda: all(connection.closed for connection in maker.made), "the end of all of them")
    assert maker.tries == len(maker.made) >= 6  # create, a writer, a store, what listens, an admin, status


def test_a_relay_and_a_sender_go_on_after_a_loss_with_new_ones(
    maker: Maker, schema: str, kafka_cluster: MockCluster, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = made(maker, schema)
    topic = kbatch.KafkaTopic("orders", kbatch.SenderMode.DURABLE, outbox=outbox, config=config(kafka_cluster))
    with topic.create_sender() as sender:
        assert sender.send(Envelope(data=b"1", key="k"))
        until(lambda: outbox.status().waiting == 0, "its relay")
        maker.failures.append(RuntimeError("the vault is sealed"))
        maker.end_all()
        tries = maker.tries
        with contextlib.suppress(OutboxError):
            sender.send(Envelope(data=b"2", key="k"))  # it may still be told that its connection is lost
        with pytest.raises(OutboxError, match="connect has failed: RuntimeError: the vault is sealed") as caught:
            sender.send(Envelope(data=b"2", key="k"))
        assert isinstance(caught.value.__cause__, RuntimeError)
        until(lambda: maker.tries > tries + 5, "that the relay tries again and again")
        maker.failures.clear()
        assert sender.send(Envelope(data=b"3", key="k"))
        until(lambda: outbox.status().waiting == 0, "its relay")
    assert "a relay cannot use its outbox, and tries again" in caplog.text


def test_a_listener_waits_while_no_connection_can_be_made(
    maker: Maker, schema: str, kafka_cluster: MockCluster, caplog: pytest.LogCaptureFixture
) -> None:
    kafka_cluster.create_topic("orders", 1)
    inbox = PostgresInbox(connect=maker, schema=schema)
    inbox.create()
    maker.failures.append(PermissionError("the token has expired"))
    handled: list[int] = []

    def handle(envelope: kbatch.ReceivedEnvelope[Any], connection: psycopg.Connection[Any]) -> None:
        row = connection.execute("SELECT 1").fetchone()
        assert row == (1,)
        handled.append(envelope.offset)

    send(kafka_cluster, 3)
    listener = kbatch.Listener(config_of(kafka_cluster), ["orders"], handle, inbox=inbox)
    listener._first_wait_s = listener._longest_wait_s = 0.05
    with listener, running(listener) as raised:
        until(lambda: "connect has failed: PermissionError: the token has expired" in caplog.text, "that it waits")
        maker.failures.clear()
        until(lambda: len(handled) == 3, "the records")
    assert raised == []
    assert listener.stats()["attempts_failed"] == 0


def test_an_inbox_of_a_loop_uses_them(maker: Maker, schema: str, kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", 1)
    inbox = aio.PostgresInbox(connect=maker, schema=schema)
    handled: list[int] = []

    async def handle(envelope: kbatch.ReceivedEnvelope[Any], connection: psycopg.AsyncConnection[Any]) -> None:
        await connection.execute("SELECT 1")
        handled.append(envelope.offset)

    async def main() -> None:
        await inbox.create()
        async with aio.Listener(config_of(kafka_cluster), ["orders"], handle, inbox=inbox) as listener:
            task = asyncio.create_task(listener.run())
            while len(handled) < 3:
                await asyncio.sleep(0.01)
            listener.stop()
            await task
        assert (await inbox.status()).handled == 3

    send(kafka_cluster, 3)
    asyncio.run(main())
    until(lambda: all(connection.closed for connection in maker.made), "the end of all of them")


def in_transaction(maker: Maker) -> psycopg.Connection[Any]:
    connection = maker()
    connection.execute("SELECT 1")
    return connection


def in_pipeline_mode(maker: Maker) -> psycopg.Connection[Any]:
    connection = maker()
    connection.pgconn.enter_pipeline_mode()
    return connection


def closed(maker: Maker) -> psycopg.Connection[Any]:
    connection = maker()
    connection.close()
    return connection


def of_a_pool(maker: Maker) -> psycopg.Connection[Any]:
    connection: Any = maker()
    connection._pool = object()
    return connection  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (in_transaction, "in no transaction: this one is in a transaction, which connect has to commit"),
        (in_pipeline_mode, "this one is in pipeline mode"),
        (closed, "this one is closed"),
        (of_a_pool, "this one is a pool's"),
        (lambda maker: None, r"must return a psycopg\.Connection, not NoneType"),
        (lambda maker: psycopg.AsyncConnection.connect(maker.conninfo), r"psycopg\.Connection, not coroutine"),
    ],
)
def test_what_is_of_no_use_is_told_and_closed(
    maker: Maker, schema: str, make: Callable[[Maker], Any], says: str
) -> None:
    outbox = PostgresOutbox(connect=lambda: make(maker), schema=schema)
    with pytest.raises(OutboxError, match=says):
        outbox.create()
    inbox = PostgresInbox(connect=lambda: make(maker), schema=schema)
    with pytest.raises(InboxError, match=says) as caught:
        inbox.status()
    assert not caught.value.is_outage
    assert all(connection.closed for connection in maker.made)


def test_one_that_it_has_returned_before_is_left_alone(maker: Maker, schema: str) -> None:
    outbox = made(maker, schema)
    kept = maker()
    shared = PostgresOutbox(connect=lambda: kept, schema=schema)
    with contextlib.closing(shared.open_store()) as store:
        with pytest.raises(OutboxError, match="connect must return a new connection each time"):
            shared.open_store()
        assert store.left() == 0
    assert kept.closed
    assert outbox.status().waiting == 0


def test_its_errors_have_the_hints_of_all_others(maker: Maker, schema: str) -> None:
    maker.failures.append(psycopg.OperationalError("connection refused"))
    with pytest.raises(OutboxError, match=r"connection refused; .*is the server there, and is connect right"):
        PostgresOutbox(connect=maker, schema=schema).status()
    maker.failures[0] = psycopg.errors.InvalidPassword("no")
    with pytest.raises(InboxError, match="look at the user and the password of connect") as caught:
        PostgresInbox(connect=maker, schema=schema).status()
    assert caught.value.is_outage
    maker.failures[0] = psycopg.errors.TooManyConnections("no more")
    with pytest.raises(OutboxError, match="the server has no connection left"):
        PostgresOutbox(connect=maker, schema=schema).status()


def test_no_exception_of_an_end_is_an_outage(schema: str) -> None:
    def connect() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PostgresOutbox(connect=connect, schema=schema).status()


async def connected_later() -> Any: ...


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_options(kind: Any) -> None:
    for options in ({}, {"conninfo": "postgresql://", "connect": print}):
        with pytest.raises(ConfigError, match="give either conninfo or connect"):
            kind(**options)
    for connect, says in (
        ("postgresql://", "connect must be callable, not str"),
        (lambda conninfo: None, "connect must take no arguments"),
        (connected_later, "connect must not be a coroutine function: connections of kbatch's own are used on threads"),
        (psycopg.AsyncConnection.connect, "connect must not be a coroutine function"),
    ):
        with pytest.raises(ConfigError, match=says):
            kind(connect=connect)


@pytest.mark.parametrize("kind", KINDS)
def test_no_secret_is_shown(kind: Any) -> None:
    database = kind(connect=functools.partial(psycopg.connect, f"postgresql://user:{SECRET}@127.0.0.1:1/x"))
    told = repr(database)
    try:
        asyncio.run(database.status()) if kind.__module__.startswith("kbatch.aio") else database.status()
    except (OutboxError, InboxError) as error:
        told += f"{error} {error!r} {error.__cause__}"
    assert "is connect right" in told
    assert SECRET not in told


def test_a_function_that_needs_arguments_shows_none_that_it_has() -> None:
    def connect(host: str, *, password: str) -> Any: ...

    with pytest.raises(ConfigError, match=r"connect must take no arguments, which .*connect does not") as caught:
        PostgresOutbox(connect=functools.partial(connect, password=SECRET))  # type: ignore[call-arg]
    assert SECRET not in str(caught.value)


def test_threads_may_call_it_at_the_same_time(maker: Maker, schema: str) -> None:
    outbox = made(maker, schema)
    errors: list[Exception] = []

    def ask() -> None:
        try:
            for _ in range(5):
                outbox.status()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(connection.closed for connection in maker.made)
