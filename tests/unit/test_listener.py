"""A listener on the mock cluster: each record reaches the handler once, in order of its key, and is committed."""

import threading
from collections.abc import Callable
from typing import Any

import msgspec

import kbatch
from kbatch.testing import MockCluster


class Order(msgspec.Struct):
    number: int


def send(cluster: MockCluster, count: int, first: int = 0) -> None:
    with kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers}) as producer:
        orders = [kbatch.Envelope(Order(n), key=str(n % 7)) for n in range(first, first + count)]
        producer.send_batch("orders", orders).raise_for_errors()


def listen(
    cluster: MockCluster, handle: Callable[[kbatch.Listener, kbatch.ReceivedEnvelope[Any]], object], **options: Any
) -> None:
    def handler(envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        handle(listener, envelope)

    # The mock cluster lets a member that comes after the last one has left wait for nearly a session.
    config: dict[str, Any] = {"bootstrap.servers": cluster.bootstrap_servers, "group.id": "billing"}
    config |= {"session.timeout.ms": 1500, "heartbeat.interval.ms": 300}
    listener = kbatch.Listener(config, ["orders"], handler, types={"Order": Order}, **options)
    end = threading.Timer(30.0, listener.stop)
    end.start()
    try:
        listener.run()
    finally:
        end.cancel()


def test_each_record_reaches_the_handler_in_order_of_its_key() -> None:
    seen: list[tuple[Any, int]] = []

    def handle(listener: kbatch.Listener, envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        seen.append((envelope.key, envelope.message.number))
        if len(seen) == 1000:
            listener.stop()

    with MockCluster() as cluster:
        send(cluster, 1000)
        listen(cluster, handle, concurrency=4)
    assert sorted(number for _, number in seen) == list(range(1000))
    for key in range(7):
        of_key = [number for name, number in seen if name == str(key).encode()]
        assert of_key == sorted(of_key)


def test_what_was_handled_is_not_read_again() -> None:
    seen: list[int] = []

    def handle(listener: kbatch.Listener, envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        seen.append(envelope.message.number)
        if seen[-1] in (99, 100):
            listener.stop()

    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        send(cluster, 100)
        listen(cluster, handle)
        send(cluster, 1, first=100)
        listen(cluster, handle)
    assert seen == list(range(101))
