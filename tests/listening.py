"""For tests of listeners: what is sent, what has come, and a listener on a thread."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

import kbatch
from kbatch.testing import MockCluster
from tests.waiting import until


class Order(msgspec.Struct):
    number: int


def config_of(cluster: Any, group: str = "billing", **settings: Any) -> dict[str, Any]:
    # The mock cluster lets a member that comes after the last one has left wait for nearly a session, and a fetch for
    # its whole time, also when there is something by then.
    return {
        "bootstrap.servers": cluster.bootstrap_servers,
        "group.id": group,
        "session.timeout.ms": 1500,
        "heartbeat.interval.ms": 300,
        "fetch.wait.max.ms": 20,
        **{name.replace("_", "."): value for name, value in settings.items()},
    }


def send(
    cluster: Any,
    count: int,
    first: int = 0,
    *,
    topic: str = "orders",
    keys: int | None = 7,
    partition: int | None = None,
) -> None:
    with kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers}) as producer:
        orders = [
            kbatch.Envelope(Order(n), key=None if keys is None else str(n % keys), partition=partition)
            for n in range(first, first + count)
        ]
        producer.send_batch(topic, orders).raise_for_errors()


def committed(cluster: Any, group: str = "billing", topic: str = "orders", partitions: int = 4) -> dict[int, int]:
    """By partition, the offsets that the group has committed."""
    import confluent_kafka

    consumer = confluent_kafka.Consumer({"bootstrap.servers": cluster.bootstrap_servers, "group.id": group})
    try:
        asked = [confluent_kafka.TopicPartition(topic, number) for number in range(partitions)]
        return {each.partition: each.offset for each in consumer.committed(asked, timeout=10) if each.offset >= 0}
    finally:
        consumer.close()


@contextlib.contextmanager
def running(listener: kbatch.Listener) -> Iterator[list[BaseException]]:
    """A listener in `run` on a thread, stopped at the end; what `run` has raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            listener.run()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield raised
    finally:
        listener.stop()
        thread.join(60)
        assert not thread.is_alive(), "run has not ended"


@contextlib.contextmanager
def ended_after(seconds: float, stop: Callable[[], object]) -> Iterator[None]:
    """A listener that never sees what it waits for is stopped."""
    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def signal_after(begun: threading.Event, number: int) -> None:
    """Sends this process a signal once something has begun."""

    def wait() -> None:
        begun.wait(60)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


__all__ = ["MockCluster", "Order", "committed", "config_of", "ended_after", "running", "send", "signal_after", "until"]
