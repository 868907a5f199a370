"""Apache Kafka on this machine, for tests and benchmarks: real brokers in KRaft mode, in a temporary folder.

Each broker listens for

- PLAINTEXT: anyone, everything;
- PROXIED: the same behind a `FaultProxy` of its own, which is what it tells clients to come back to;
- TLS: a client may show a certificate of the run's CA, and then may do what the ACLs allow to `User:CN=...`;
- EXPIRED: TLS with a broker's certificate that has expired;
- SASL: SCRAM-SHA-512 over TLS, with ACLs.
"""

import base64
import itertools
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._acl import AclBinding, AclBindingFilter, AclOperation, AclPermissionType
from confluent_kafka.admin._resource import ResourcePatternType, ResourceType
from confluent_kafka.cimpl import NewTopic

from tests.kafka import certificates, install
from tests.kafka.guard import Guard
from tests.kafka.proxy import FaultProxy
from tests.waiting import stop

if TYPE_CHECKING:
    from typing_extensions import Self

LISTENERS = {"PLAINTEXT": "PLAINTEXT", "PROXIED": "PLAINTEXT", "TLS": "SSL", "EXPIRED": "SSL", "SASL": "SASL_SSL"}
SASL_USER, SASL_PASSWORD = "alice", "alice's password"
START_TIMEOUT_S = 90.0
#: Up soon and small; a broker that shall be fast takes the JVM's own choice.
QUICK_START = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")
_API_VERSIONS = 18

_topic_numbers = itertools.count()
_given: set[int] = set()  # ports, which may be free only because their brokers do not run yet


class Broker:
    """One process. Its ports stay the same when it is started again."""

    def __init__(self, node: int, folder: Path, guard: Guard, make_proxy: Callable[[int], FaultProxy]) -> None:
        self.node = node
        self.folder = folder
        self.ports = {name: free_port() for name in (*LISTENERS, "CONTROLLER")}
        self.proxy = make_proxy(self.ports["PROXIED"])
        self.heap_mb = 256
        self.java_options: Sequence[str] = QUICK_START
        self.process: subprocess.Popen[bytes] | None = None
        self._guard = guard

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Starts the process; `KafkaCluster.wait_until_up` tells when it is of use."""
        assert not self.runs
        with open(self.folder / "broker.log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    *_java(self.heap_mb, self.java_options),
                    f"-Dlog4j2.configurationFile={install.HERE / 'log4j2.properties'}",
                    "kafka.Kafka",
                    str(self.folder / "server.properties"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is the test's
            )
        self._guard.watch(self.pid)

    def kill(self) -> None:
        """SIGKILL: what a crash of the process is."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """An orderly end: leaders move first."""
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        """SIGSTOP: connections stay, nothing answers."""
        stop(self.pid)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def answers(self) -> bool:
        """Whether it serves clients: a broker that has just been started does not, whatever the others say of it."""
        question = struct.pack(">ihhih", 10, _API_VERSIONS, 0, 1, -1)
        try:
            with socket.create_connection(("127.0.0.1", self.ports["PLAINTEXT"]), timeout=5) as connection:
                connection.sendall(question)
                return connection.recv(1) != b""
        except OSError:
            return False

    def log_tail(self) -> str:
        return (self.folder / "broker.log").read_text(errors="replace")[-4000:]

    def _end(self, number: signal.Signals) -> None:
        if not self.runs:
            return
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(number)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(30)
        self._guard.forget(self.pid)


class ExternalCluster:
    """A cluster that is not ours, reached without encryption: topics can be made, and no more."""

    def __init__(self, bootstrap_servers: str) -> None:
        self._bootstrap_servers = bootstrap_servers
        self._admin: AdminClient | None = None

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._admin = None

    @property
    def bootstrap_servers(self) -> str:
        return self._bootstrap_servers

    @property
    def admin(self) -> AdminClient:
        if self._admin is None:
            self._admin = AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})
        return self._admin

    def create_topic(
        self, name: str | None = None, *, partitions: int = 4, config: dict[str, str] | None = None
    ) -> str:
        """Creates a topic, waits until each partition has its leader, returns its name (a fresh one by default)."""
        name = name or f"topic-{os.getpid()}-{next(_topic_numbers)}"
        new = NewTopic(name, num_partitions=partitions, replication_factor=-1, config=config or {})
        self.admin.create_topics([new], operation_timeout=30)[name].result(30)

        def led() -> bool:
            topic = self.admin.list_topics(name, timeout=5).topics[name]
            return topic.error is None and len(topic.partitions) == partitions and _all_in_sync(topic.partitions)

        self._wait(led)
        return name

    def delete_topic(self, name: str) -> None:
        self.admin.delete_topics([name], operation_timeout=30)[name].result(30)

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            why: Exception | str = "not yet"
            try:
                if condition():
                    return
            except (KafkaException, KeyError) as error:
                why = error
            if time.monotonic() > deadline or self._is_gone():
                raise TimeoutError(f"Kafka does not get there: {why}{self._last_words()}")
            time.sleep(0.05)

    def _is_gone(self) -> bool:
        return False

    def _last_words(self) -> str:
        return ""


class KafkaCluster(ExternalCluster):
    """`brokers` brokers that are controllers as well. With three: replication 3 and `min.insync.replicas=2`.

    `settings` are added to each broker's. A context manager; whatever becomes of this process, the brokers end with it.
    """

    def __init__(
        self,
        brokers: int = 1,
        *,
        heap_mb: int = 256,
        settings: dict[str, Any] | None = None,
        folder: str | None = None,
        java_options: Sequence[str] = QUICK_START,
        make_proxy: Callable[[int], FaultProxy] = FaultProxy,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kbatch-kafka-", dir=folder))
        self._guard = Guard()
        self._guard.remove(str(self.folder))
        self.brokers: list[Broker] = []
        self._admin = None
        try:
            certificates.make(self.folder / "certificates")
            for node in range(1, brokers + 1):
                broker = Broker(node, self.folder / f"broker-{node}", self._guard, make_proxy)
                broker.heap_mb = heap_mb
                broker.java_options = java_options
                self.brokers.append(broker)
            for broker in self.brokers:
                broker.folder.mkdir()
                text = "".join(f"{key}={value}\n" for key, value in self._properties(broker, settings or {}).items())
                (broker.folder / "server.properties").write_text(text)
            self._format()
            for broker in self.brokers:
                broker.start()
            self.wait_until_up()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        super().close()
        for broker in self.brokers:
            broker.proxy.close()
        self._guard.end()
        for broker in self.brokers:
            if broker.process is not None:
                broker.process.wait(30)

    # --- where to connect -------------------------------------------------------------------------------------------

    @property
    def bootstrap_servers(self) -> str:
        return self.bootstrap("PLAINTEXT")

    @property
    def proxied_servers(self) -> str:
        """Through the proxies: what clients learn of the brokers are the proxies' ports."""
        return ",".join(f"127.0.0.1:{broker.proxy.port}" for broker in self.brokers)

    def bootstrap(self, listener: str) -> str:
        return ",".join(f"127.0.0.1:{broker.ports[listener]}" for broker in self.brokers)

    @property
    def proxies(self) -> list[FaultProxy]:
        return [broker.proxy for broker in self.brokers]

    def certificate(self, name: str) -> str:
        return str(self.folder / "certificates" / f"{name}.pem")

    def tls(self, certificate: str | None = None, listener: str = "TLS") -> dict[str, str]:
        """A client's configuration for TLS, with a certificate of its own if it is named."""
        config = {
            "bootstrap.servers": self.bootstrap(listener),
            "security.protocol": "SSL",
            "ssl.ca.location": self.certificate("ca"),
        }
        if certificate is not None:
            pem = self.certificate(certificate)
            config |= {"ssl.certificate.location": pem, "ssl.key.location": pem}
        return config

    def sasl(self, user: str = SASL_USER, password: str = SASL_PASSWORD) -> dict[str, str]:
        """A client's configuration for SASL/SCRAM over TLS."""
        return {
            "bootstrap.servers": self.bootstrap("SASL"),
            "security.protocol": "SASL_SSL",
            "ssl.ca.location": self.certificate("ca"),
            "sasl.mechanism": "SCRAM-SHA-512",
            "sasl.username": user,
            "sasl.password": password,
        }

    # --- its state --------------------------------------------------------------------------------------------------

    def wait_until_up(self) -> None:
        """Until every broker is known and every partition has its leader and all replicas in sync."""
        self._wait(self._is_up)

    def heal(self) -> None:
        """Whatever a test did: no fault in the proxies, every broker runs and is in sync."""
        for broker in self.brokers:
            broker.proxy.heal()
            if broker.runs:
                broker.resume()
            else:
                broker.start()
        self.wait_until_up()

    def leader(self, topic: str, partition: int = 0) -> Broker:
        """The broker that leads a partition now."""
        leader = -1

        def known() -> bool:
            nonlocal leader
            leader = self.admin.list_topics(topic, timeout=5).topics[topic].partitions[partition].leader
            return leader > 0 and self.brokers[leader - 1].runs

        self._wait(known)
        return self.brokers[leader - 1]

    def allow(self, principal: str, topic: str, *operations: AclOperation) -> None:
        """Lets a principal (`User:alice`) do something with a topic."""
        self._acl(principal, ResourceType.TOPIC, topic, operations)

    def forbid(self, principal: str, topic: str) -> None:
        """Takes back what `allow` gave."""
        anything = AclBindingFilter(
            ResourceType.TOPIC,
            topic,
            ResourcePatternType.LITERAL,
            principal,
            None,  # type: ignore[arg-type]  # any host, of which the stub does not know
            AclOperation.ANY,
            AclPermissionType.ANY,
        )
        self.admin.delete_acls([anything])[anything].result(30)
        self._wait(lambda: not self.admin.describe_acls(anything).result(10))

    def allow_transactions(self, principal: str, transactional_id: str) -> None:
        operations = (AclOperation.WRITE, AclOperation.DESCRIBE)
        self._acl(principal, ResourceType.TRANSACTIONAL_ID, transactional_id, operations)

    def _acl(self, principal: str, kind: ResourceType, name: str, operations: Iterable[AclOperation]) -> None:
        literal, allow = ResourcePatternType.LITERAL, AclPermissionType.ALLOW
        bindings = {AclBinding(kind, name, literal, principal, "*", each, allow) for each in operations}
        for future in self.admin.create_acls(list(bindings)).values():
            future.result(30)
        # The brokers learn of it a moment later.
        theirs = AclBindingFilter(
            kind,
            name,
            literal,
            principal,
            None,  # type: ignore[arg-type]
            AclOperation.ANY,
            AclPermissionType.ANY,
        )
        self._wait(lambda: len(self.admin.describe_acls(theirs).result(10)) >= len(bindings))

    # --- its making -------------------------------------------------------------------------------------------------

    def _properties(self, broker: Broker, settings: dict[str, Any]) -> dict[str, Any]:
        several = len(self.brokers) > 1
        replicas = len(self.brokers)
        voters = (f"{each.node}@127.0.0.1:{each.ports['CONTROLLER']}" for each in self.brokers)
        advertised = {name: broker.ports[name] for name in LISTENERS} | {"PROXIED": broker.proxy.port}
        protocols = LISTENERS | {"CONTROLLER": "PLAINTEXT"}
        return {
            "node.id": broker.node,
            "process.roles": "broker,controller",
            "controller.quorum.voters": ",".join(voters),
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "PLAINTEXT",
            "listeners": ",".join(f"{name}://127.0.0.1:{port}" for name, port in broker.ports.items()),
            "advertised.listeners": ",".join(f"{name}://127.0.0.1:{port}" for name, port in advertised.items()),
            "listener.security.protocol.map": ",".join(f"{name}:{each}" for name, each in protocols.items()),
            "log.dirs": broker.folder / "data",
            # Who may do what.
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": self.certificate("ca"),
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": self.certificate("broker"),
            "listener.name.expired.ssl.keystore.type": "PEM",
            "listener.name.expired.ssl.keystore.location": self.certificate("expired_broker"),
            "listener.name.tls.ssl.client.auth": "requested",
            # A certificate's name has more parts, some of them random.
            "ssl.principal.mapping.rules": r"RULE:^.*?(CN=[^,]+).*$/$1/",
            "sasl.enabled.mechanisms": "SCRAM-SHA-512",
            "listener.name.sasl.scram-sha-512.sasl.jaas.config": (
                "org.apache.kafka.common.security.scram.ScramLoginModule required;"
            ),
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",
            # Nothing appears by itself, nothing is larger than it need be.
            "auto.create.topics.enable": "false",
            "num.partitions": 4,
            "offsets.topic.num.partitions": 2,
            "transaction.state.log.num.partitions": 2,
            "default.replication.factor": replicas,
            "offsets.topic.replication.factor": replicas,
            "transaction.state.log.replication.factor": replicas,
            "transaction.state.log.min.isr": 2 if several else 1,
            "min.insync.replicas": 2 if several else 1,
            "num.network.threads": 2,
            "num.io.threads": 4,
            "background.threads": 2,
            "num.recovery.threads.per.data.dir": 1,
            "log.cleaner.dedupe.buffer.size": 4 << 20,
            # A broker that is gone is missed soon; three on two cores must not miss each other.
            "broker.session.timeout.ms": 4000,
            "broker.heartbeat.interval.ms": 500,
            "controller.quorum.election.timeout.ms": 1000,
            "controller.quorum.fetch.timeout.ms": 3000,
            "replica.lag.time.max.ms": 6000,
            "group.initial.rebalance.delay.ms": 0,
            "group.min.session.timeout.ms": 1000,
            "group.consumer.min.session.timeout.ms": 1000,
            "group.consumer.min.heartbeat.interval.ms": 100,
            "transaction.abort.timed.out.transaction.cleanup.interval.ms": 1000,
            **settings,
        }

    def _format(self) -> None:
        """Formats the first broker's folder, and gives the others a copy with their own number."""
        first, *others = self.brokers
        command = [
            *_java(128),
            "kafka.tools.StorageTool",
            "format",
            "--config",
            str(first.folder / "server.properties"),
        ]
        command += ["--cluster-id", "a2JhdGNoIGZvciB0ZXN0cw"]
        command += ["--add-scram", f'SCRAM-SHA-512=[name={SASL_USER},password="{SASL_PASSWORD}"]']
        run = subprocess.run(command, capture_output=True, text=True, timeout=START_TIMEOUT_S)
        if run.returncode:
            raise RuntimeError(f"Kafka's storage cannot be formatted: {run.stdout}{run.stderr}")
        for broker in others:
            data = broker.folder / "data"
            shutil.copytree(first.folder / "data", data)
            meta = (data / "meta.properties").read_text()
            meta = re.sub(r"(?m)^node\.id=.*$", f"node.id={broker.node}", meta)
            directory = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
            meta = re.sub(r"(?m)^directory\.id=.*$", f"directory.id={directory}", meta)
            (data / "meta.properties").write_text(meta)

    def _is_up(self) -> bool:
        if not all(broker.answers() for broker in self.brokers):
            return False
        metadata = self.admin.list_topics(timeout=5)
        return len(metadata.brokers) == len(self.brokers) and all(
            _all_in_sync(topic.partitions) for topic in metadata.topics.values()
        )

    def _is_gone(self) -> bool:
        return not any(broker.runs for broker in self.brokers)

    def _last_words(self) -> str:
        return "".join(f"\n--- broker {broker.node}:\n{broker.log_tail()}" for broker in self.brokers)


def _all_in_sync(partitions: dict[int, Any]) -> bool:
    return all(each.leader > 0 and len(each.isrs) == len(each.replicas) for each in partitions.values())


def _java(heap_mb: int, options: Sequence[str] = QUICK_START) -> list[str]:
    return [install.java(), f"-Xms{heap_mb // 2}m", f"-Xmx{heap_mb}m", *options, "-cp", install.class_path()]


def free_port() -> int:
    """A port that is free now, and that the system gives to no outgoing connection later."""
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
