"""What every way to send and to receive promises, as tests that pytest runs against a cluster of yours.

Subclass `TransportCompliance`, give it the brokers, and pytest collects each test for each mode of sending, with
threads and with asyncio::

    class TestTransport(TransportCompliance):
        @pytest.fixture
        def bootstrap_servers(self, kafka_cluster):
            return kafka_cluster.bootstrap_servers

The names of the tests are those of Wolverine's transport compliance, as far as kbatch has what they test. It has no
request and reply, no message bus, no sagas, no rate limits and no health of endpoints: tests of these are left out.
"""

import asyncio
import contextlib
import inspect
import multiprocessing
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest

import kbatch
import kbatch.aio
from kbatch._fastmap import monotonic, wall_time
from kbatch.testing._inbox_compliance import InboxCompliance
from kbatch.testing._outbox_compliance import DeadLetterCompliance, OutboxCompliance

__all__ = ["DeadLetterCompliance", "InboxCompliance", "OutboxCompliance", "TransportCompliance"]

_LONGEST_S = 60.0
_MODES = tuple(kbatch.SenderMode)
_STYLES = ("threads", "asyncio")
_WIRES = ("kbatch", "wolverine", "cloudevents")


class _Order(msgspec.Struct):
    __message_type__ = "compliance.order"
    number: int
    text: str = "é"


class _Received(msgspec.Struct):
    """What a receiver knows of an order."""

    number: int


class _Refused(Exception):
    pass


def _now() -> datetime:
    return datetime.fromtimestamp(wall_time(), timezone.utc)


def _send(
    servers: str, folder: str, mode: kbatch.SenderMode, style: str, wire: str, envelopes: list[Any], topic: str
) -> None:
    """By a sender of its own, which is closed when all is acknowledged."""
    config = {"bootstrap.servers": servers}
    options: dict[str, Any] = {"config": config}
    mapping: dict[str, Any] = {"wire": wire, "source": "compliance"}
    if mode is kbatch.SenderMode.DURABLE:
        outbox = kbatch.SqliteOutbox(str(Path(folder, "outbox.db")), **mapping)
        outbox.create()
        options["outbox"] = outbox
    else:
        options |= mapping
    if style == "threads":
        with kbatch.KafkaTopic(topic, mode, **options).create_sender() as sender:
            for envelope in envelopes:
                sender.send(envelope)
        return

    async def send() -> None:
        async with kbatch.aio.KafkaTopic(topic, mode, **options).create_sender() as sender:
            await asyncio.gather(*(sender.send(envelope) for envelope in envelopes))

    asyncio.run(send())


class _Listening:
    """A listener that runs, and what it has received."""

    def __init__(self, style: str, config: dict[str, Any], topics: list[str], handler: Any, options: Any) -> None:
        self.received: list[kbatch.ReceivedEnvelope[Any]] = []
        self.error: BaseException | None = None

        def handle(envelope: kbatch.ReceivedEnvelope[Any]) -> None:
            if handler is not None:
                handler(envelope)
            self.received.append(envelope)

        async def handle_on_loop(envelope: kbatch.ReceivedEnvelope[Any]) -> None:
            await asyncio.to_thread(handle, envelope)

        self._listener: Any
        if style == "threads":
            self._listener = kbatch.Listener(config, topics, handle, **options)
        else:
            self._listener = kbatch.aio.Listener(config, topics, handle_on_loop, **options)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            running = self._listener.run()
            if inspect.isawaitable(running):

                async def run() -> None:
                    await running

                asyncio.run(run())
        except BaseException as error:
            self.error = error

    def messages(self) -> list[Any]:
        return [envelope.message for envelope in self.received]

    def until(self, condition: Callable[[], object]) -> None:
        end = monotonic() + _LONGEST_S
        while not condition():
            assert self.error is None, self.error
            assert monotonic() < end, f"received so far: {self.messages()}"
            time.sleep(0.01)

    def stop(self) -> None:
        self._listener.stop()
        self._thread.join(_LONGEST_S)
        assert not self._thread.is_alive(), "the listener does not end"
        assert self.error is None, self.error


class _Transport:
    """One topic of a test's own, one way to send to it, one way to listen."""

    def __init__(
        self,
        servers: str,
        folder: Path,
        mode: kbatch.SenderMode,
        style: str,
        wire: str,
        settings: dict[str, Any],
        create_topic: Callable[[str], object],
    ) -> None:
        self.topic = f"compliance-{uuid.uuid4().hex[:12]}"
        self.group = f"{self.topic}-group"
        self.mode = mode
        self._arguments = servers, str(folder), mode, style, wire
        self._wire = wire
        self._style = style
        self.create_topic = create_topic
        create_topic(self.topic)
        self._config = {
            "bootstrap.servers": servers,
            "group.id": self.group,
            **settings,
        }

    def send(self, *envelopes: Any, topic: str | None = None) -> None:
        _send(*self._arguments, list(envelopes), topic or self.topic)

    def send_from_another_process(self, *envelopes: Any, topic: str | None = None) -> None:
        arguments = (*self._arguments, list(envelopes), topic or self.topic)
        process = multiprocessing.get_context("spawn").Process(target=_send, args=arguments)
        process.start()
        process.join(_LONGEST_S)
        assert process.exitcode == 0

    @contextlib.contextmanager
    def listening(self, *topics: str, handler: Any = None, group: str = "", **options: Any) -> Iterator[_Listening]:
        options = {"types": {"compliance.order": _Order}, "wire": self._wire, "commit_interval_s": 0.1, **options}
        config = {**self._config, "group.id": group or self.group}
        listening = _Listening(self._style, config, list(topics or (self.topic,)), handler, options)
        try:
            yield listening
        finally:
            listening.stop()


class TransportCompliance:
    """Each test runs for INLINE, BUFFERED and DURABLE, with threads and asyncio; some for each wire format.

    A subclass has the fixture ``bootstrap_servers``; ``create_topic`` and ``consumer_settings`` may be overridden, too.
    """

    @pytest.fixture
    def bootstrap_servers(self) -> str:
        raise NotImplementedError("a subclass of TransportCompliance has a fixture `bootstrap_servers`")

    @pytest.fixture
    def create_topic(self, bootstrap_servers: str) -> Callable[[str], object]:
        """Makes a topic, by default by a request to the brokers."""

        def create(name: str) -> None:
            from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

            client = AdminClient({"bootstrap.servers": bootstrap_servers})
            client.create_topics([NewTopic(name, num_partitions=3)])[name].result(_LONGEST_S)

        return create

    @pytest.fixture
    def consumer_settings(self) -> dict[str, Any]:
        """librdkafka's keys for listeners, besides those that the tests need."""
        return {}

    @pytest.fixture(params=_MODES, ids=lambda mode: mode.name)
    def mode(self, request: pytest.FixtureRequest) -> Any:
        return request.param

    @pytest.fixture(params=_STYLES)
    def style(self, request: pytest.FixtureRequest) -> Any:
        return request.param

    @pytest.fixture
    def wire(self) -> str:
        return "kbatch"

    @pytest.fixture
    def transport(
        self,
        bootstrap_servers: str,
        consumer_settings: dict[str, Any],
        create_topic: Callable[[str], object],
        tmp_path: Path,
        mode: kbatch.SenderMode,
        style: str,
        wire: str,
    ) -> _Transport:
        return _Transport(bootstrap_servers, tmp_path, mode, style, wire, consumer_settings, create_topic)

    # -- listeners

    def test_all_listeners_accept_on_startup(self, transport: _Transport) -> None:
        topics = [f"{transport.topic}-{n}" for n in range(3)]
        for n, topic in enumerate(topics):
            transport.create_topic(topic)
            transport.send(kbatch.Envelope(_Order(n)), topic=topic)
        with transport.listening(*topics) as listening:
            listening.until(lambda: len(listening.received) == 3)
        assert sorted((each.topic, each.message.number) for each in listening.received) == [
            (topic, n) for n, topic in enumerate(topics)
        ]

    def test_stop_and_restart_listeners(self, transport: _Transport) -> None:
        transport.send(*(kbatch.Envelope(_Order(n), key="a") for n in range(5)))
        with transport.listening() as first:
            first.until(lambda: len(first.received) == 5)
        transport.send(*(kbatch.Envelope(_Order(n), key="a") for n in range(5, 10)))
        with transport.listening() as second:
            second.until(lambda: len(second.received) == 5)
        numbers = [message.number for message in first.messages() + second.messages()]
        assert sorted(numbers) == list(range(10))
        assert sorted(numbers[:5]) == list(range(5))

    def test_stop_receiving_when_too_busy_and_restart(self, transport: _Transport) -> None:
        transport.send(*(kbatch.Envelope(_Order(n), key=str(n)) for n in range(60)))
        gate = threading.Event()
        begun: list[int] = []

        def handler(envelope: kbatch.ReceivedEnvelope[Any]) -> None:
            begun.append(envelope.message.number)
            assert gate.wait(_LONGEST_S)

        with transport.listening(handler=handler, concurrency=2, max_in_flight=4) as listening:
            listening.until(lambda: len(begun) == 2)
            time.sleep(0.5)
            assert len(begun) == 2
            gate.set()
            listening.until(lambda: len(listening.received) == 60)
        assert sorted(begun) == list(range(60))

    # -- from one node to another

    @pytest.mark.parametrize("wire", _WIRES)
    def test_send_from_one_node_to_another_by_destination(self, transport: _Transport) -> None:
        orders = [_Order(n, "é" * n) for n in range(20)]
        transport.send_from_another_process(*(kbatch.Envelope(order, key=f"k{order.number % 3}") for order in orders))
        with transport.listening() as listening:
            listening.until(lambda: len(listening.received) == 20)
        assert sorted(listening.messages(), key=lambda order: order.number) == orders
        if transport.mode is kbatch.SenderMode.DURABLE:  # the others' envelopes were sent by tasks of their own
            for key in (b"k0", b"k1", b"k2"):
                numbers = [each.message.number for each in listening.received if each.key == key]
                assert len(numbers) >= 6

    def test_send_from_one_node_to_another_by_rule(self, transport: _Transport) -> None:
        other = f"{transport.topic}-other"
        transport.create_topic(other)
        transport.send_from_another_process(kbatch.Envelope(_Order(1)), kbatch.Envelope(_Order(2), topic=other))
        with transport.listening(transport.topic, other) as listening:
            listening.until(lambda: len(listening.received) == 2)
        places = {each.message.number: each.topic for each in listening.received}
        assert places == {1: transport.topic, 2: other}

    def test_send_and_wait(self, transport: _Transport) -> None:
        # What a closed sender has sent is there: a group that begins now, at the beginning, finds it.
        transport.send(kbatch.Envelope(_Order(1)))
        with transport.listening() as listening:
            listening.until(lambda: len(listening.received) == 1)
        assert listening.messages() == [_Order(1)]

    # -- what an envelope carries

    @pytest.mark.parametrize("wire", _WIRES)
    def test_every_field_arrives(self, transport: _Transport) -> None:
        number = uuid.uuid4()
        sent = kbatch.Envelope(
            _Order(7),
            key="key",
            id=number,
            headers=[("a", b"1"), ("b", "é")],
            correlation_id="correlation",
            conversation_id=str(uuid.uuid4()),
            parent_id="parent",
            tenant_id="tenant",
            user_name="user",
        )
        transport.send(sent)
        with transport.listening() as listening:
            listening.until(lambda: len(listening.received) == 1)
        (got,) = listening.received
        fields = ("id", "correlation_id", "conversation_id", "parent_id", "tenant_id", "user_name")
        assert [getattr(got, field) for field in fields] == [getattr(sent, field) for field in fields]
        assert (got.key, got.message, got.message_type) == (b"key", _Order(7), "compliance.order")
        assert [pair for pair in got.headers if pair[0] in ("a", "b")] == [("a", b"1"), ("b", "é".encode())]
        assert got.data == b'{"number":7,"text":"\xc3\xa9"}'

    def test_tags_envelope_with_its_source(self, transport: _Transport) -> None:
        transport.send(kbatch.Envelope(_Order(1)))
        with transport.listening() as listening:
            listening.until(lambda: len(listening.received) == 1)
        assert listening.received[0].source == "compliance"

    def test_correlation_id_is_on_everything(self, transport: _Transport) -> None:
        transport.send(*(kbatch.Envelope(_Order(n), correlation_id=f"c{n}") for n in range(5)))
        with transport.listening() as listening:
            listening.until(lambda: len(listening.received) == 5)
        assert {each.message.number: each.correlation_id for each in listening.received} == {
            n: f"c{n}" for n in range(5)
        }

    def test_schedule_send(self, transport: _Transport) -> None:
        due = _now() + timedelta(seconds=2)
        later = kbatch.Envelope(_Order(1), scheduled_time=due)
        if transport.mode is kbatch.SenderMode.INLINE:  # which waits for nothing
            with pytest.raises(kbatch.NotYetDueError):
                transport.send(later)
            return
        came: list[datetime] = []
        with transport.listening(handler=lambda _: came.append(_now())) as listening:
            transport.send(later, kbatch.Envelope(_Order(2)))
            if transport.mode is kbatch.SenderMode.DURABLE:  # its relay ended with the sender: another comes later
                time.sleep(max(0.0, (due - _now()).total_seconds()))
                transport.send(kbatch.Envelope(_Order(3)))
                listening.until(lambda: len(listening.received) >= 3)
            listening.until(lambda: 1 in [message.number for message in listening.messages()])
        index = [message.number for message in listening.messages()].index(1)
        assert came[index] >= due

    def test_sent_as_one_type_and_received_as_another(self, transport: _Transport) -> None:
        transport.send(kbatch.Envelope(_Order(5)))
        with transport.listening(types={"compliance.order": _Received}) as listening:
            listening.until(lambda: len(listening.received) == 1)
        assert listening.messages() == [_Received(5)]

    def test_sent_and_received_as_text(self, transport: _Transport) -> None:
        transport.send(kbatch.Envelope(data='"é"'.encode(), message_type="text"))
        with transport.listening(types={"text": str}) as listening:
            listening.until(lambda: len(listening.received) == 1)
        assert listening.messages() == ["é"]

    # -- failures

    def test_requeue(self, transport: _Transport) -> None:
        failed: list[int] = []

        def handler(envelope: kbatch.ReceivedEnvelope[Any]) -> None:
            if not failed:
                failed.append(envelope.message.number)
                raise _Refused

        transport.send(*(kbatch.Envelope(_Order(n), key="a", partition=0) for n in range(3)))
        with transport.listening(handler=handler) as listening:
            listening.until(lambda: len(listening.received) == 3)
        numbers = [message.number for message in listening.messages()]
        assert numbers == sorted(numbers, key=lambda number: (number != failed[0], numbers.index(number)))

    def test_requeue_increments_attempts(self, transport: _Transport) -> None:
        attempts: list[int] = []

        def handler(envelope: kbatch.ReceivedEnvelope[Any]) -> None:
            attempts.append(envelope.attempts)
            if len(attempts) < 3:
                raise _Refused

        transport.send(kbatch.Envelope(_Order(1)))
        options: dict[str, Any] = {"retry": kbatch.RetryPolicy(max_attempts=1), "retry_topics": [0.1, 0.2]}
        for topic in (f"{transport.group}.retry.0.1", f"{transport.group}.retry.0.2"):
            transport.create_topic(topic)
        with transport.listening(handler=handler, dead_letter_topic=f"{transport.topic}.dead", **options) as listening:
            listening.until(lambda: len(listening.received) == 1)
        assert attempts == [0, 1, 2]

    def test_schedule_retry(self, transport: _Transport) -> None:
        begun: list[float] = []

        def handler(envelope: kbatch.ReceivedEnvelope[Any]) -> None:
            begun.append(wall_time())
            if len(begun) == 1:
                raise _Refused

        transport.send(kbatch.Envelope(_Order(1), key="a"))
        options: dict[str, Any] = {"retry": kbatch.RetryPolicy(max_attempts=1), "retry_topics": [1]}
        transport.create_topic(f"{transport.group}.retry.1")
        with transport.listening(handler=handler, dead_letter_topic=f"{transport.topic}.dead", **options) as listening:
            listening.until(lambda: len(listening.received) == 1)
        assert begun[1] - begun[0] >= 0.99
        assert (listening.received[0].key, listening.messages()) == (b"a", [_Order(1)])

    @pytest.mark.parametrize("wire", _WIRES)
    def test_will_move_to_dead_letter_queue_without_any_exception_match(self, transport: _Transport) -> None:
        attempts: list[int] = []

        def handler(envelope: kbatch.ReceivedEnvelope[Any]) -> None:
            if envelope.message.number == 1:
                attempts.append(1)
                raise _Refused("no")

        dead = f"{transport.topic}.dead"
        transport.create_topic(dead)
        transport.send(*(kbatch.Envelope(_Order(n), key="a", headers={"h": "v"}) for n in range(3)))
        retry = kbatch.RetryPolicy(max_attempts=2, initial_backoff_s=0.01)
        with transport.listening(handler=handler, dead_letter_topic=dead, retry=retry) as listening:
            listening.until(lambda: len(listening.received) == 2)
            with transport.listening(dead, group=f"{transport.group}-dead") as letters:
                letters.until(lambda: len(letters.received) == 1)
        (letter,) = letters.received
        assert len(attempts) == 2
        # A fault reaches its subscriber with the payload intact.
        assert (letter.key, letter.message, letter.data) == (b"a", _Order(1), b'{"number":1,"text":"\xc3\xa9"}')
        headers = dict(letter.headers)
        assert (headers["h"], headers["exception-message"]) == (b"v", b"no")
        assert headers["original-destination"] == f"kafka://topic/{transport.topic}".encode()

    def test_will_move_to_dead_letter_queue_with_exception_match(self, transport: _Transport) -> None:
        attempts: list[int] = []

        def handler(envelope: kbatch.ReceivedEnvelope[Any]) -> None:
            attempts.append(1)
            raise _Refused

        dead = f"{transport.topic}.dead"
        transport.create_topic(dead)
        transport.send(kbatch.Envelope(_Order(1)))
        with (
            transport.listening(handler=handler, dead_letter_topic=dead, reject_on=[_Refused]),
            transport.listening(dead, group=f"{transport.group}-dead") as letters,
        ):
            letters.until(lambda: len(letters.received) == 1)
        assert (len(attempts), letters.messages()) == (1, [_Order(1)])
