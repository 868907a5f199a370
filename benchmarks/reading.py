"""What reading costs: its thread, the GIL and memory, and how fast whole programs read.

Of the thread: kbatch's native consumer beside a C loop and confluent-kafka. All records are in librdkafka's queues
before a turn begins, so what is measured is what the application's thread does: it takes them off, reads id, message
type, key and value of each, and gives them back.

Of whole programs: processes of their own (`reader.py`) read a topic from its beginning, one after the other.
"""

import ctypes
import gc
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from statistics import median
from typing import Any

import confluent_kafka
import msgspec

import kbatch
from benchmarks.broker import Broker, OpenBroker
from benchmarks.data import kbatch_envelopes
from benchmarks.figures import Section, figure
from benchmarks.library import build, librdkafka_path
from benchmarks.reader import LISTENERS_BATCH, Options, Read
from benchmarks.reader import SIDES as READERS
from benchmarks.sides.competitor import NICE, processors
from benchmarks.worker import Worker
from kbatch._events import make_dispatcher
from kbatch._fastmap import CallbackThread
from kbatch._receiving._config import ConsumerConfig
from kbatch._receiving._consumer import BEGINNING, ConsumerCore

RECORDS = 40_000
PARTITIONS = 16  # the mock cluster keeps 5 MiB of each
MANY_PARTITIONS = 32
FILLED_AT_ONCE = 5_000
BATCH = 1_000
HEADERS = 8
OVER_C_LOOP_US = 0.6
#: An eighth of what `read_envelope` took when reading was planned, 11.7 µs. It was made faster since then.
KBATCH_US = 11.7 / 8
QUIET_S = 0.15

#: reads so many records and returns how many bytes it saw
Reads = Callable[[int], int]


def settings(broker: Broker) -> dict[str, str]:
    return {
        "bootstrap.servers": broker.bootstrap_servers,
        "group.id": "readers",
        "enable.auto.commit": "false",
        "auto.offset.reset": "earliest",
        "queued.min.messages": "1000000",
        "queued.max.messages.kbytes": "1000000",
        "fetch.wait.max.ms": "10",
        "log_level": "0",
    }


@contextmanager
def c_loop(broker: Broker, topic: str) -> Iterator[Reads]:
    library = ctypes.CDLL(str(build("readloop", shared=True)))
    library.open_reader.restype = ctypes.c_void_p
    library.read_all.restype = ctypes.c_int64
    library.read_all.argtypes = (ctypes.c_void_p, ctypes.c_long, ctypes.c_long)
    library.close_reader.argtypes = (ctypes.c_void_p,)
    texts = [text.encode() for pair in settings(broker).items() for text in pair]
    pairs = (ctypes.c_char_p * (len(texts) + 1))(*texts, None)
    reader = library.open_reader(librdkafka_path().encode(), pairs, topic.encode(), PARTITIONS)
    if not reader:
        raise RuntimeError("the C loop cannot be opened")
    try:
        yield lambda count: int(library.read_all(reader, count, BATCH))
    finally:
        library.close_reader(reader)


@contextmanager
def core_of(broker: Broker, topic: str) -> Iterator[ConsumerCore]:
    config = ConsumerConfig.parse(settings(broker))
    core = ConsumerCore(config.native, make_dispatcher(config, CallbackThread("callbacks"), lambda: None), "kbatch")
    core.assign([(topic, n, BEGINNING) for n in range(PARTITIONS)])
    try:
        yield core
    finally:
        core.close(10.0)


@contextmanager
def kbatch_side(broker: Broker, topic: str) -> Iterator[Reads]:
    with core_of(broker, topic) as core:

        def read(count: int) -> int:
            size = 0
            while count > 0:
                envelopes, _ = core.poll(min(BATCH, count), 1.0)
                count -= len(envelopes)
                for envelope in envelopes:
                    assert envelope.id is not None
                    assert envelope.message_type is not None
                    size += len(envelope.key) + len(envelope.data)  # type: ignore[arg-type]
            return size

        yield read


@contextmanager
def kbatch_polls(broker: Broker, topic: str) -> Iterator[Reads]:
    with core_of(broker, topic) as core:

        def read(count: int) -> int:
            while count > 0:
                count -= len(core.poll(min(BATCH, count), 1.0)[0])
            return 0

        yield read


@contextmanager
def confluent(broker: Broker, topic: str, take: Callable[[Any], int]) -> Iterator[Reads]:
    consumer = confluent_kafka.Consumer(settings(broker))
    consumer.assign([confluent_kafka.TopicPartition(topic, n, BEGINNING) for n in range(PARTITIONS)])

    def read(count: int) -> int:
        size = 0
        while count > 0:
            messages = consumer.consume(min(BATCH, count), 1.0)
            count -= len(messages)
            for message in messages:
                size += take(message)
        return size

    try:
        yield read
    finally:
        consumer.close()


def by_hand(message: Any) -> int:
    headers = dict(message.headers())
    uuid.UUID(headers["id"].decode())
    headers["message-type"].decode()
    return len(message.key()) + len(message.value())


def by_read_envelope(message: Any) -> int:
    envelope = kbatch.read_envelope(message)
    assert envelope.id is not None
    assert envelope.message_type is not None
    return len(envelope.key) + len(envelope.data)  # type: ignore[arg-type]


Open = Callable[[Broker, str], AbstractContextManager[Reads]]
SIDES: dict[str, Open] = {
    "C loop": c_loop,
    "kbatch": kbatch_side,
    "kbatch, nothing asked for": kbatch_polls,
    "confluent-kafka, headers read in Python": lambda broker, topic: confluent(broker, topic, by_hand),
    "read_envelope of confluent-kafka's messages": lambda broker, topic: confluent(broker, topic, by_read_envelope),
}


def readings(turns: int, open_broker: OpenBroker) -> Iterator[Section]:
    """What it costs the thread that reads."""
    with open_broker() as broker:
        topic = broker.new_topic("reading", PARTITIONS)
        _fill(broker, topic, RECORDS)
        yield _cost(turns, broker, topic)


def memory_of_reading(records: int, open_broker: OpenBroker) -> Iterator[Section]:
    with open_broker() as broker:
        topic = broker.new_topic("reading", PARTITIONS)
        _fill(broker, topic, RECORDS)
        yield _memory(records, broker, topic)


def rates(turns: int, records: int, open_broker: OpenBroker) -> Iterator[Section]:
    """How fast programs read a topic that is full."""
    section = Section(
        f"Reading: a topic of {records:,} orders with 8 headers from its beginning, each decoded", "reading-rates"
    )
    found = _read(turns, records, open_broker, competitor=False)
    for name, reads in found.items():
        section.figures.append(figure(f"{name}, records/s", [each.rate for each in reads], digits=0))
    for name, reads in found.items():
        spent = [each.cpu_s / each.records * 1e6 for each in reads]
        section.figures.append(figure(f"{name}, processor time of the process", spent, unit=" µs"))
    mine = f"kbatch.Listener, batches of {LISTENERS_BATCH}", "kbatch.Listener, one at a time"
    for name, reads in found.items():
        if name not in mine:
            own = mine["one at a time" in name or "async for" in name]
            ratios = [one.rate / other.rate for one, other in zip(found[own], reads, strict=True)]
            section.figures.append(figure(f"{own} / {name}", ratios))
    section.settings["sides"] = list(found)
    yield section


def still(turns: int, records: int, open_broker: OpenBroker) -> Iterator[Section]:
    """For how long another thread has to wait for the GIL."""
    section = Section(
        f"GIL for each record read: what a competing thread loses, {records:,} orders with 8 headers, each decoded",
        "reading-gil",
    )
    found = _read(turns, records, open_broker, competitor=True)
    for name, reads in found.items():
        section.figures.append(figure(name, [each.still_s / each.records * 1e6 for each in reads], unit=" µs"))
    section.settings["sides"] = list(found)
    yield section


def _read(turns: int, records: int, open_broker: OpenBroker, *, competitor: bool) -> dict[str, list[Read]]:
    found: dict[str, list[Read]] = {name: [] for name in READERS}
    with open_broker() as broker, ExitStack() as stack:
        topic = broker.new_topic("reading", MANY_PARTITIONS)
        _fill(broker, topic, records, MANY_PARTITIONS)
        if competitor:
            broker.confine(processors()[1], NICE)
        options = Options("", broker.bootstrap_servers, topic, records, competitor)
        workers = {
            name: stack.enter_context(Worker("benchmarks.reader", msgspec.structs.replace(options, side=name)))
            for name in READERS
        }
        names = list(READERS)
        for turn in range(turns + 1):
            for name in names:
                read = workers[name].ask(Read, f"{name}-{turn}".replace(" ", "-"))
                if turn:  # the first warms up
                    found[name].append(read)
            names.reverse()
    return found


def _fill(broker: Broker, topic: str, records: int, partitions: int = PARTITIONS) -> None:
    envelopes = kbatch_envelopes(min(records, RECORDS), HEADERS)
    with kbatch.Producer({"bootstrap.servers": broker.bootstrap_servers}) as producer:
        for at in range(0, records, FILLED_AT_ONCE):
            some = (envelopes[n % len(envelopes)].replace(partition=n % partitions)
                    for n in range(at, min(at + FILLED_AT_ONCE, records)))  # fmt: skip
            producer.send_batch(topic, list(some)).raise_for_errors()


def _await_quiet() -> None:
    # Until librdkafka has fetched all there is.
    before = -1.0
    while (now := time.process_time()) - before > 0.1 * QUIET_S:
        before = now
        time.sleep(QUIET_S)


def _turn(broker: Broker, topic: str, open_side: Open) -> float:
    """µs of this thread for each record."""
    with open_side(broker, topic) as read:
        read(1_000)
        _await_quiet()
        gc.collect()
        began = time.thread_time()
        read(RECORDS - 1_000)
        return (time.thread_time() - began) / (RECORDS - 1_000) * 1e6


def _cost(turns: int, broker: Broker, topic: str) -> Section:
    section = Section(
        f"Reading: processor time of the thread that reads, for each record of {HEADERS} headers, {BATCH:,} at a time",
        "reading",
    )
    spent: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(turns + 1):
        for name, open_side in SIDES.items():
            if (took := _turn(broker, topic, open_side)) and turn:  # the first warms up
                spent[name].append(took)
    for name, values in spent.items():
        target = round(KBATCH_US, 2) if name == "kbatch" else None
        section.figures.append(figure(name, values, unit=" µs", target=target, at_most=target is not None))
    section.figures += [
        figure(
            "kbatch over the C loop",
            [mine - its for mine, its in zip(spent["kbatch"], spent["C loop"], strict=True)],
            unit=" µs",
            target=OVER_C_LOOP_US,
            at_most=True,
        ),
        figure(
            "read_envelope / kbatch",
            [
                other / mine
                for mine, other in zip(
                    spent["kbatch"], spent["read_envelope of confluent-kafka's messages"], strict=True
                )
            ],
        ),
        figure(
            "confluent-kafka in Python / kbatch",
            [
                other / mine
                for mine, other in zip(spent["kbatch"], spent["confluent-kafka, headers read in Python"], strict=True)
            ],
        ),
    ]
    section.details["records"] = RECORDS
    return section


def _resident_mib() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def _memory(records: int, broker: Broker, topic: str) -> Section:
    """The records are read again and again, by one consumer, with the last 1,000 envelopes kept."""
    section = Section(f"Reading: memory over {records:,} records", "reading-memory")
    kept: list[Any] = []
    samples: list[float] = []
    with core_of(broker, topic) as core:
        left = records
        in_round = 0
        while left > 0:
            envelopes, _ = core.poll(BATCH, 1.0)
            left -= len(envelopes)
            in_round += len(envelopes)
            kept = [*kept, *envelopes][-1_000:]
            if in_round >= RECORDS:
                in_round = 0
                core.assign([(topic, n, BEGINNING) for n in range(PARTITIONS)])
                samples.append(_resident_mib())
    samples = samples or [_resident_mib()]
    quarter = max(1, len(samples) // 4)
    section.figures += [
        figure("resident, first quarter", samples[:quarter], unit=" MiB", digits=1),
        figure("resident, last quarter", samples[-quarter:], unit=" MiB", digits=1),
        figure("growth", [median(samples[-quarter:]) - median(samples[:quarter])], unit=" MiB", digits=1),
    ]
    section.details |= {"resident_mib": [round(each, 1) for each in samples], "records_between": RECORDS}
    return section
