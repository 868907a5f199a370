"""What every way to send and to receive promises, as tests that pytest runs against a cluster of yours.

Subclass `TransportCompliance`, give it the brokers, and pytest collects each test for each mode of sending, with
threads and with asyncio::

    class TestTransport(TransportCompliance):
        @pytest.fixture
        def bootstrap_servers(self, kafka_cluster):
            return kafka_cluster.bootstrap_servers

The names of the tests are those of Wolverine's transport compliance, as far as kbatch has what they test. It has no
request and reply, no message bus, no sagas, no rate limits and no health of endpoints: tests of these are left out.
"a fault reaches its subscriber with the payload intact" is the end of
`test_will_move_to_dead_letter_queue_without_any_exception_match`: kbatch publishes no faults, a dead letter is one.
"""

import asyncio
import contextlib
import inspect
import multiprocessing
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

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


def _by_key(envelopes: Iterable[Any]) -> dict[str, list[int]]:
    """The numbers of each key's orders, in their order."""
    numbers: dict[str, list[int]] = defaultdict(list)
    for envelope in envelopes:
        key = envelope.key if isinstance(envelope.key, str) else envelope.key.decode()
        numbers[key].append(envelope.message.number)
    return numbers


def _now() -> datetime:
    return datetime.fromtimestamp(wall_time(), timezone.utc)


def _send(
    servers: str, folder: str, mode: kbatch.SenderMode, style: str, wire: str, envelopes: list[Any], topic: str
) -> None:
    """By a sender of its own, which is closed when all is acknowledged; from an event loop by a task for each envelope,
    which begin in the order of the envelopes."""
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

    def in_flight(self) -> int:
        """How many records are read and not handled."""
        return int(self._listener.stats()["in_flight"])

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


def _run(target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """In a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    process.join(2 * _LONGEST_S)
    assert process.exitcode == 0


class _Seen(NamedTuple):
    """What a receiver in another process tells of an envelope."""

    topic: str
    key: str | bytes
    message: _Order


def _receive(connection: Any, count: int, style: str, config: dict[str, Any], topics: list[str], options: Any) -> None:
    """As many envelopes, by a listener of this process."""
    listening = _Listening(style, config, topics, None, options)
    try:
        listening.until(lambda: len(listening.received) >= count)
    finally:
        listening.stop()
    connection.send([_Seen(each.topic, each.key or b"", each.message) for each in listening.received])


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
            "topic.metadata.refresh.interval.ms": 1000,  # not each broker knows at once of a topic that was just made
            **settings,
        }

    def send(self, *envelopes: Any, topic: str | None = None) -> None:
        _send(*self._arguments, list(envelopes), topic or self.topic)

    def send_from_another_process(self, *envelopes: Any, topic: str | None = None) -> None:
        _run(_send, (*self._arguments, list(envelopes), topic or self.topic))

    def received_by_another_process(self, count: int, *topics: str, **options: Any) -> list[_Seen]:
        ours, theirs = multiprocessing.get_context("spawn").Pipe(duplex=False)
        with ours, theirs:
            _run(_receive, (theirs, count, *self._listener(topics, "", options)))
            assert ours.poll()
            seen: list[_Seen] = ours.recv()
        return seen

    def _listener(self, topics: Iterable[str], group: str, options: dict[str, Any]) -> tuple[Any, ...]:
        """What a listener is made of."""
        options = {"types": {"compliance.order": _Order}, "wire": self._wire, "commit_interval_s": 0.1, **options}
        return self._style, {**self._config, "group.id": group or self.group}, list(topics or (self.topic,)), options

    @contextlib.contextmanager
    def listening(self, *topics: str, handler: Any = None, group: str = "", **options: Any) -> Iterator[_Listening]:
        style, config, names, options = self._listener(topics, group, options)
        listening = _Listening(style, config, names, handler, options)
        try:
            yield listening
        finally:
            listening.stop()


class TransportCompliance:
    """Each test runs for INLINE, BUFFERED and DURABLE, with threads and asyncio; some for each wire format.

    A subclass has the fixture ``bootstrap_servers``; ``create_topic`` and ``consumer_settings`` may be overridden, too.
    So may ``mode``, ``style`` and ``wire``, to run the tests in other ways.
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
        sent = [kbatch.Envelope(_Order(n), key=f"k{n % 5}") for n in range(30)]
        transport.send(*sent[:15])
        with transport.listening(concurrency=4) as first:
            first.until(lambda: len(first.received) == 15)
        transport.send(*sent[15:])
        with transport.listening(concurrency=4) as second:
            second.until(lambda: len(second.received) == 15)
        assert _by_key(first.received) == _by_key(sent[:15])
        assert _by_key(second.received) == _by_key(sent[15:])

    def test_stop_receiving_when_too_busy_and_restart(self, transport: _Transport) -> None:
        transport.send(*(kbatch.Envelope(_Order(n), key=str(n)) for n in range(60)))
        gate = threading.Event()

        def handler(envelope: kbatch.ReceivedEnvelope[Any]) -> None:
            assert gate.wait(_LONGEST_S)

        fetched: list[int] = []
        group = f"{transport.group}-roomy"
        with (
            transport.listening(handler=handler, concurrency=2, max_in_flight=4) as busy,
            transport.listening(handler=handler, group=group) as roomy,
        ):
            try:
                busy.until(lambda: busy.in_flight() >= 2)

                def all_are_fetched() -> bool:
                    fetched.append(busy.in_flight())
                    return roomy.in_flight() == 60

                roomy.until(all_are_fetched)  # so there was time to fetch them
            finally:
                gate.set()
            busy.until(lambda: len(busy.received) == 60)
        assert max(fetched) <= 4
        assert sorted(message.number for message in busy.messages()) == list(range(60))

    # -- from one node to another

    @pytest.mark.parametrize("wire", _WIRES)
    def test_send_from_one_node_to_another_by_destination(self, transport: _Transport) -> None:
        sent = [kbatch.Envelope(_Order(n, "é" * n), key=f"k{n % 7}") for n in range(70)]
        transport.send_from_another_process(*sent)
        with transport.listening(concurrency=4) as listening:
            listening.until(lambda: len(listening.received) == 70)
        assert sorted(listening.messages(), key=lambda order: order.number) == [each.message for each in sent]
        assert _by_key(listening.received) == _by_key(sent)
        assert len({each.partition for each in listening.received}) > 1

    def test_send_from_one_node_to_another_by_rule(self, transport: _Transport) -> None:
        other = f"{transport.topic}-other"
        transport.create_topic(other)
        sent = [kbatch.Envelope(_Order(n), key=f"k{n % 3}", topic=other if n % 2 else None) for n in range(40)]
        transport.send_from_another_process(*sent)
        received = transport.received_by_another_process(40, transport.topic, other, concurrency=4)
        for topic in (None, other):
            of_topic = [each for each in received if each.topic == (topic or transport.topic)]
            assert _by_key(of_topic) == _by_key(each for each in sent if each.topic == topic)

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
