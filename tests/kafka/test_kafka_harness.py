"""The brokers and the proxies themselves."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._acl import AclOperation

from tests.kafka.cluster import KafkaCluster
from tests.kafka.proxy import Direction, FaultProxy
from tests.mock.clients import produce, read_back
from tests.waiting import until


def test_what_is_written_is_read(kafka: KafkaCluster) -> None:
    topic = kafka.create_topic()
    assert produce(kafka.bootstrap_servers, topic, [{"value": b"1"}, {"value": b"2"}]) == [None, None]
    assert {record.value for record in read_back(kafka.bootstrap_servers, topic)} == {b"1", b"2"}


def test_clients_come_back_to_the_proxies(kafka3: KafkaCluster) -> None:
    admin = AdminClient({"bootstrap.servers": kafka3.proxied_servers})
    brokers = admin.list_topics(timeout=10).brokers
    assert {each.port for each in brokers.values()} == {broker.proxy.port for broker in kafka3.brokers}


def test_three_brokers_replicate_three_times_and_want_two(kafka3: KafkaCluster) -> None:
    topic = kafka3.create_topic(partitions=3)
    partitions = kafka3.admin.list_topics(topic, timeout=10).topics[topic].partitions
    assert [len(each.replicas) for each in partitions.values()] == [3, 3, 3]


def test_a_killed_broker_comes_back(kafka3: KafkaCluster) -> None:
    topic = kafka3.create_topic(partitions=1)
    leader = kafka3.leader(topic)
    leader.kill()
    kafka3.heal()  # at once: nobody has missed it yet
    assert leader.answers()


ORPHAN = """
import sys, time
from tests.kafka.guard import Guard
import subprocess
guard = Guard()
process = subprocess.Popen(["sleep", "600"], start_new_session=True)
guard.watch(process.pid)
guard.remove(sys.argv[1])
print(process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="platform: no /proc")
def test_what_a_killed_run_leaves_is_ended(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", ORPHAN, str(folder)], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        server = int(run.stdout.readline())
        os.kill(server, signal.SIGSTOP)  # as a test that was killed may leave it
        run.kill()
    until(lambda: not Path(f"/proc/{server}").exists() and not folder.exists(), "the end of what the run started")


class Echo:
    """A server that sends back what it gets, for one connection."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.proxy = FaultProxy(self.listener.getsockname()[1])
        self.client = socket.create_connection(("127.0.0.1", self.proxy.port), timeout=10)
        self.server, _ = self.listener.accept()
        self.server.settimeout(10)

    def __enter__(self) -> "Echo":
        return self

    def __exit__(self, *_: object) -> None:
        self.proxy.close()
        for each in (self.client, self.server, self.listener):
            each.close()


def test_the_proxy_forwards_and_counts() -> None:
    with Echo() as echo:
        echo.client.sendall(b"question")
        assert echo.server.recv(100) == b"question"
        echo.server.sendall(b"answer")
        assert echo.client.recv(100) == b"answer"
        assert echo.proxy.forwarded == {Direction.TO_BROKER: 8, Direction.TO_CLIENT: 6}


def test_the_proxy_delays() -> None:
    with Echo() as echo:
        echo.proxy.delay(0.2)
        begin = time.monotonic()
        echo.client.sendall(b"question")
        assert echo.server.recv(100) == b"question"
        assert time.monotonic() - begin >= 0.2
        echo.server.sendall(b"answer")
        assert echo.client.recv(100) == b"answer"
        assert time.monotonic() - begin >= 0.4


def test_the_proxy_drops_one_direction_only() -> None:
    with Echo() as echo:
        echo.proxy.drop(Direction.TO_CLIENT)
        echo.client.sendall(b"question")
        assert echo.server.recv(100) == b"question"
        echo.server.sendall(b"answer")
        until(lambda: echo.proxy.dropped[Direction.TO_CLIENT] == 6, "what is dropped")
        echo.proxy.heal()
        assert not _alive(echo.client)  # nothing of it came, and the connection is no more


def test_the_proxy_cuts_and_refuses() -> None:
    with Echo() as echo:
        echo.proxy.refuse()
        with pytest.raises(ConnectionError):
            echo.client.recv(100)
        assert not _serves(echo.proxy)
        echo.proxy.heal()
        with socket.create_connection(("127.0.0.1", echo.proxy.port), timeout=10) as other:
            other.sendall(b"again")
            server, _ = echo.listener.accept()
            with server:
                assert server.recv(100) == b"again"


def _serves(proxy: FaultProxy) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as connection:
            return _alive(connection)
    except ConnectionError:
        return False


def _alive(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) != b""
    except ConnectionError:
        return False


@pytest.mark.parametrize(
    ("who", "may"),
    [("client", True), ("expired_client", False), (None, True)],
    ids=["a certificate", "one that expired", "none"],
)
def test_tls(one_broker: KafkaCluster, who: str | None, may: bool) -> None:
    admin = AdminClient({**one_broker.tls(who), "log_level": 0})
    assert _answers(admin) is may


def test_the_brokers_certificate_is_looked_at(one_broker: KafkaCluster) -> None:
    assert not _answers(AdminClient({**one_broker.tls(listener="EXPIRED"), "log_level": 0}))


@pytest.mark.parametrize(("password", "may"), [("alice's password", True), ("another", False)])
def test_sasl(one_broker: KafkaCluster, password: str, may: bool) -> None:
    assert _answers(AdminClient({**one_broker.sasl(password=password), "log_level": 0})) is may


def _answers(admin: AdminClient) -> bool:
    try:
        admin.list_topics(timeout=3)
    except KafkaException:
        return False
    return True


def test_what_a_certificate_may_do(one_broker: KafkaCluster) -> None:
    topic = one_broker.create_topic()
    config = one_broker.tls("client")
    servers = config.pop("bootstrap.servers")
    principal = "User:CN=client"

    def written() -> bool:
        (error,) = produce(servers, topic, [{"value": b"x"}], **config)
        return error is None

    assert not written()
    one_broker.allow(principal, topic, AclOperation.WRITE)
    assert written()
    one_broker.forbid(principal, topic)
    assert not written()
