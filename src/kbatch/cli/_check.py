"""Whether what is read back from a topic is what was sent."""

from collections.abc import Container, Iterator, Sequence
from typing import Any

from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

from kbatch._text import counted
from kbatch.cli._failure import Failure
from kbatch.cli._orders import Orders, index_of

#: The mock cluster keeps 5 MiB a partition: 64 of them hold 400,000 orders with room to spare.
PARTITIONS = 64
_READ_PATIENCE_S = 15.0
_PROBLEMS_NAMED = 5


class Check:
    """Compares every record with the order that it must be, made again from its index. Keeps one byte per order.

    Args:
        may_be_twice: Orders that may have come once more, once for each time that they are in one of these.
    """

    def __init__(self, orders: Orders, may_be_twice: Sequence[Container[int]] = ()) -> None:
        self._orders = orders
        self._may_be_twice = may_be_twice
        #: How many records came again that may have.
        self.copies = 0
        self._seen = bytearray(orders.count)
        self._last_of_customer: dict[int, int] = {}
        self._problems: list[str] = []
        self._problem_count = 0
        self.seen_count = 0

    def see(self, message: Message) -> None:
        self.seen_count += 1
        where = f"partition {message.partition()}, offset {message.offset()}"
        pairs: Any = message.headers() or []
        headers = dict(pairs)
        try:
            index = index_of(headers["id"])
            if not 0 <= index < self._orders.count:
                raise ValueError
        except (KeyError, ValueError):
            self.problem(f"{where}: no order was sent with the id header of this record")
            return
        is_copy = self._seen[index] > 0
        if is_copy and self._seen[index] > sum(index in orders for orders in self._may_be_twice):
            self.problem(f"{where}: order {index} a second time")
            return
        self._seen[index] += 1
        if message.value() != self._orders.body(index):
            self.problem(f"{where}: the body is not that of order {index}")
        if headers != self._orders.headers(index) or len(headers) != len(pairs):
            self.problem(f"{where}: the headers are not those of order {index}")
        if message.key() != self._orders.key(index).encode():
            self.problem(f"{where}: the key is not that of order {index}")
        if is_copy:  # the first one tells of the order
            self.copies += 1
            return
        customer = self._orders.customer(index)
        if self._last_of_customer.get(customer, -1) > index:
            self.problem(f"{where}: order {index} after a later one of the same customer")
        self._last_of_customer[customer] = index

    def problem(self, text: str) -> None:
        self._problem_count += 1
        if self._problem_count <= _PROBLEMS_NAMED:
            self._problems.append(text)

    def problems(self) -> list[str]:
        """What is wrong, at most a few lines; empty if every order came once, as it was sent and in order."""
        problems = list(self._problems)
        if self._problem_count > len(problems):
            problems.append(f"{self._problem_count - len(problems):,} more of this kind")
        missing = self._seen.count(0)
        if missing:
            problems.append(f"{counted(missing, 'order')} missing, the first is order {self._seen.index(0)}")
        return problems


def read_all(bootstrap_servers: str, topic: str, count: int | None, check: Check) -> Iterator[list[Message]]:
    """A topic's records from the beginning to the end, by confluent-kafka's consumer.

    Args:
        count: How many there must be; ``None`` if nobody knows.
    """
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "kbatch-demo",
            "enable.auto.commit": False,
            "check.crcs": True,
            "fetch.wait.max.ms": 20,
        }
    )
    try:
        partitions = [TopicPartition(topic, partition, 0) for partition in range(PARTITIONS)]
        stored = 0
        for partition in partitions:
            low, high = consumer.get_watermark_offsets(partition, timeout=_READ_PATIENCE_S)
            stored += high - low
        if count is not None and stored != count:
            check.problem(f"the topic holds {counted(stored, 'record')}, not {count:,}")
        consumer.assign(partitions)
        left = stored
        while left > 0:
            messages = consumer.consume(min(left, 5_000), timeout=_READ_PATIENCE_S)
            if not messages:
                check.problem(f"no more records came within {_READ_PATIENCE_S:g} s; {left:,} are left to read")
                return
            for message in messages:
                error = message.error()
                if error is not None:
                    raise Failure(f"reading back failed: {error.str()}")
            left -= len(messages)
            yield messages
    except KafkaException as error:
        raise Failure(f"reading back failed: {error.args[0].str()}") from None
    finally:
        consumer.close()
