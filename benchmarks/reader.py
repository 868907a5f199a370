"""A process that reads a topic to its end, anew for each line of its input: `python -m benchmarks.reader OPTIONS`.

Each side reads id, message type and key of each record, decodes the body to an `OrderPlaced`, and commits its offsets
as it comes. The clocks run from when it gets its first records until it has so many.
"""

import asyncio
import gc
import resource
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import aiokafka  # type: ignore[import-untyped]
import confluent_kafka
import faststream.kafka
import msgspec

import kbatch
from benchmarks.data import MESSAGE_TYPE, OrderPlaced
from benchmarks.sides.base import say
from benchmarks.sides.competitor import Competitor

BATCH = 1_000
LISTENERS_BATCH = 500
#: that makes no difference to who reads as fast as it can
QUICK_FETCH = {"fetch.wait.max.ms": 10, "auto.offset.reset": "earliest", "log_level": 0}


class Options(msgspec.Struct, frozen=True):
    side: str
    bootstrap_servers: str
    topic: str
    records: int
    #: a thread of pure Python competes for the GIL
    competitor: bool = False


class Read(msgspec.Struct, frozen=True):
    records: int
    seconds: float
    cpu_s: float
    still_s: float = 0.0

    @property
    def rate(self) -> float:
        return self.records / self.seconds


class Turn:
    """Clocks, and where to read from."""

    def __init__(self, options: Options, group: str, competitor: Competitor | None) -> None:
        self.servers = options.bootstrap_servers
        self.topic = options.topic
        self.group = group
        self.records = options.records
        self._competitor = competitor
        self._began: tuple[float, float] | None = None
        self._read: Read | None = None
        if competitor is not None:
            competitor.begin()

    def begin(self) -> None:
        """The first records are there. May be called again."""
        if self._began is None:
            self._began = time.perf_counter(), _cpu_s()
            if self._competitor is not None:
                self._competitor.make_native_threads_nicer()

    def end(self) -> None:
        """All are read."""
        if self._began is None or self._read is not None:
            return
        seconds, cpu_s = time.perf_counter() - self._began[0], _cpu_s() - self._began[1]
        still_s = self._competitor.end()["still"] if self._competitor is not None else 0.0
        self._read = Read(self.records, seconds, cpu_s, still_s)

    def result(self) -> Read:
        if self._read is None:
            raise RuntimeError("a consumer ended before it had all")
        return self._read


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# -- kbatch


def _take(envelope: "kbatch.ReceivedEnvelope[Any]") -> None:
    if envelope.id is None or envelope.message_type != MESSAGE_TYPE or envelope.key is None or not envelope.message:
        raise RuntimeError("a record is not as it was sent")


def _listen(turn: Turn, handle: Callable[[Any], None], **options: Any) -> None:
    config = {"bootstrap.servers": turn.servers, "group.id": turn.group, **QUICK_FETCH}
    listener = kbatch.Listener(config, [turn.topic], handle, types={MESSAGE_TYPE: OrderPlaced}, **options)
    thread = threading.Thread(target=listener.run)
    thread.start()
    try:
        while thread.is_alive() and listener.stats()["handled"] < turn.records:
            time.sleep(0.002)
        turn.end()
    finally:
        listener.stop()
        thread.join()


def kbatch_batches(turn: Turn) -> None:
    def handle(envelopes: Any) -> None:
        turn.begin()
        for envelope in envelopes:
            _take(envelope)

    _listen(turn, handle, batch_size=LISTENERS_BATCH)


def kbatch_single(turn: Turn) -> None:
    def handle(envelope: Any) -> None:
        turn.begin()
        _take(envelope)

    _listen(turn, handle)


# -- confluent-kafka


def confluent_consume(turn: Turn) -> None:
    consumer = confluent_kafka.Consumer({"bootstrap.servers": turn.servers, "group.id": turn.group, **QUICK_FETCH})
    consumer.subscribe([turn.topic])
    decode = msgspec.json.Decoder(OrderPlaced).decode
    left = turn.records
    while left > 0:
        messages: list[Any] = consumer.consume(BATCH, 1.0)
        for message in messages:
            turn.begin()
            if message.error():
                raise RuntimeError(str(message.error()))
            headers = dict(message.headers())
            uuid.UUID(headers["id"].decode())
            headers["message-type"].decode()
            message.key().decode()
            decode(message.value())
            left -= 1
    turn.end()
    consumer.close()


# -- aiokafka, and FastStream over it


def _take_record(record: Any, decode: Callable[[bytes], object]) -> object:
    headers = dict(record.headers)
    uuid.UUID(headers["id"].decode())
    headers["message-type"].decode()
    record.key.decode()
    return decode(record.value)


async def _started(turn: Turn) -> Any:
    consumer = aiokafka.AIOKafkaConsumer(
        turn.topic,
        bootstrap_servers=turn.servers,
        group_id=turn.group,
        auto_offset_reset="earliest",
        fetch_max_wait_ms=10,
    )
    await consumer.start()
    return consumer


async def _getmany(turn: Turn) -> None:
    decode = msgspec.json.Decoder(OrderPlaced).decode
    consumer = await _started(turn)
    left = turn.records
    while left > 0:
        for records in (await consumer.getmany(timeout_ms=1_000, max_records=BATCH)).values():
            turn.begin()
            for record in records:
                _take_record(record, decode)
            left -= len(records)
    turn.end()
    await consumer.stop()


async def _iterate(turn: Turn) -> None:
    decode = msgspec.json.Decoder(OrderPlaced).decode
    consumer = await _started(turn)
    left = turn.records
    async for record in consumer:
        turn.begin()
        _take_record(record, decode)
        left -= 1
        if left <= 0:
            break
    turn.end()
    await consumer.stop()


async def _subscribe(turn: Turn, batch: bool) -> None:
    # The decoder is ours, since FastStream's own reads JSON by the standard library.
    decode = msgspec.json.Decoder(OrderPlaced).decode
    broker = faststream.kafka.KafkaBroker(turn.servers, logger=None, apply_types=False)
    left = turn.records
    done = asyncio.Event()

    async def read(message: Any) -> Any:
        turn.begin()
        raw = message.raw_message
        return [_take_record(record, decode) for record in raw] if batch else _take_record(raw, decode)

    async def handle(body: Any) -> None:
        nonlocal left
        left -= len(body) if batch else 1
        if left <= 0:
            done.set()

    options: dict[str, Any] = {"batch": True, "max_records": BATCH} if batch else {}
    broker.subscriber(
        turn.topic, group_id=turn.group, auto_offset_reset="earliest", fetch_max_wait_ms=10, decoder=read, **options
    )(handle)
    await broker.start()
    await done.wait()
    turn.end()
    await broker.stop()


SIDES: dict[str, Callable[[Turn], None]] = {
    f"kbatch.Listener, batches of {LISTENERS_BATCH}": kbatch_batches,
    "kbatch.Listener, one at a time": kbatch_single,
    "confluent-kafka, consume(1,000)": confluent_consume,
    "aiokafka, getmany": lambda turn: asyncio.run(_getmany(turn)),
    "aiokafka, async for": lambda turn: asyncio.run(_iterate(turn)),
    "FastStream over aiokafka, batches": lambda turn: asyncio.run(_subscribe(turn, True)),
    "FastStream over aiokafka, one at a time": lambda turn: asyncio.run(_subscribe(turn, False)),
}


def main() -> None:
    options = msgspec.json.decode(sys.argv[1], type=Options)
    competitor = Competitor() if options.competitor else None
    for line in sys.stdin:
        gc.collect()
        turn = Turn(options, line.strip(), competitor)
        SIDES[options.side](turn)
        say(turn.result())


if __name__ == "__main__":
    main()
