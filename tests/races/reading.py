"""Threads that read by one consumer, ask it and close it, all at once, and others that look at what it gives out."""

import contextlib
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import kbatch
from kbatch import Envelope, Producer, ReceivedEnvelope
from kbatch._errors import ProducerClosedError
from kbatch._events import make_dispatcher
from kbatch._fastmap import CallbackThread
from kbatch._receiving._config import ConsumerConfig
from kbatch._receiving._consumer import BEGINNING, END, ConsumerCallError, ConsumerCore

Partition = tuple[str, int]

#: Of the topics that the senders' rounds fill.
PARTITIONS = [("orders", 0), ("orders", 1), ("stock", 0), ("mail", 2)]
_HEADERS = [("a header that is read by all", b"1")]


def core_of(config: dict[str, Any]) -> ConsumerCore:
    parsed = ConsumerConfig.parse(config)
    dispatcher = make_dispatcher(parsed, CallbackThread("kbatch-callbacks"), lambda: None)
    return ConsumerCore(parsed.native, dispatcher)


def config_of(bootstrap_servers: str, dice: random.Random) -> dict[str, Any]:
    return {
        "bootstrap.servers": bootstrap_servers,
        "group.id": f"group {dice.randrange(10**9)}",
        "session.timeout.ms": 1500,
        "heartbeat.interval.ms": 100,
        "log_level": 0,
        "auto.offset.reset": "earliest",
        "fetch.wait.max.ms": 5,
        "queued.min.messages": dice.choice((1, 100_000)),
        "enable.partition.eof": dice.random() < 0.5,
        "statistics.interval.ms": dice.choice((0, 10)),
        "partition.assignment.strategy": dice.choice(("range", "cooperative-sticky")),
    }


def look_at(envelope: ReceivedEnvelope[Any], dice: random.Random) -> None:
    """Asks for what is made when it is asked for; other threads ask the same envelope."""
    deeds: list[Callable[[], object]] = [
        lambda: envelope.id,
        lambda: envelope.key,
        lambda: envelope.data,
        lambda: envelope.headers,
        lambda: envelope.raw_headers,
        lambda: envelope.raw_value,
        lambda: envelope.message_type,
        lambda: envelope.sent_at,
        lambda: envelope.content_type,
        lambda: envelope.timestamp,
        lambda: envelope.error,
        lambda: hash((envelope.topic, envelope.partition, envelope.offset)),
        lambda: envelope.replace(topic="mail"),
        lambda: envelope.decode(bytes.hex) if envelope.data is not None else None,
        lambda: repr(envelope),
    ]
    for deed in dice.sample(deeds, 5):
        deed()


class Given:
    """What was read last, for many threads."""

    def __init__(self) -> None:
        self.envelopes: deque[ReceivedEnvelope[Any]] = deque(maxlen=200)
        self.count = 0


def poll(core: ConsumerCore, dice: random.Random, given: Given, over: threading.Event, *, by_hand: bool) -> None:
    """The one thread that polls, and does what only that one may."""
    read = dict.fromkeys(PARTITIONS, True)
    while not over.is_set():
        try:
            envelopes, _ = core.poll(dice.choice((0, 1, 10, 1000)), dice.choice((0, 0.001, 0.01)))
            given.envelopes.extend(envelopes)
            given.count += len(envelopes)
            if core.rebalance() is not None:
                core.answer()
            if dice.random() < 0.2:
                each = dice.choice(PARTITIONS)
                read[each] = not read[each]
                core.read([each], read[each])
            if by_hand and dice.random() < 0.05:
                places = [(*each, dice.choice((BEGINNING, END, 0))) for each in dice.sample(PARTITIONS, 3)]
                core.assign(places)
            if dice.random() < 0.05:
                core.seek([(*dice.choice(PARTITIONS), 0)], 0.1)
            if dice.random() < 0.2 and given.envelopes:
                last = given.envelopes[-1]
                core.begin_commit([(last.topic, last.partition, last.offset + 1)])
            core.commit_answer([])
        except ConsumerCallError:
            pass
        except ProducerClosedError:
            return


def ask(core: ConsumerCore, dice: random.Random, over: threading.Event) -> None:
    """What any thread may."""
    some = dice.sample(PARTITIONS, 2)
    deeds: list[Callable[[], object]] = [
        *[core.wake] * 10,
        lambda: core.pause(some),
        lambda: core.resume(some),
        lambda: core.resume(PARTITIONS),
        lambda: core.ends(PARTITIONS),
        lambda: core.commit([(*each, 0) for each in some]),
        lambda: core.commit([(*each, 0) for each in some], 0.05),
        lambda: core.committed(PARTITIONS, 0.05),
        lambda: core.offsets_for_times([(*each, END) for each in PARTITIONS], 0.05),
        lambda: core.watermarks("orders", 0, 0.05),
        lambda: core.partitions("orders", 0.05),
        core.member_id,
        core.assignment_lost,
        core.membership,
        core.name,
        lambda: repr(core),
    ]
    while not over.is_set():
        with contextlib.suppress(ConsumerCallError):
            try:
                dice.choice(deeds)()
            except ProducerClosedError:
                return


def look(given: Given, dice: random.Random, over: threading.Event) -> None:
    while not over.is_set():
        try:
            envelope = given.envelopes[dice.randrange(len(given.envelopes))]
        except (IndexError, ValueError):
            time.sleep(0.001)
            continue
        look_at(envelope, dice)


def fill(bootstrap_servers: str) -> None:
    with Producer({"bootstrap.servers": bootstrap_servers, "log_level": 0}) as producer:
        batch = [
            Envelope(data=b"x" * (n % 3 * 2_000), key=f"k{n}", topic=topic, partition=partition, headers=_HEADERS)
            for n in range(300)
            for topic, partition in PARTITIONS
        ]
        producer.send_batch(None, batch).raise_for_errors()


def core_round(bootstrap_servers: str, dice: random.Random, seconds: float) -> int:
    """One consumer, by hand or as a member of a group, closed in the middle or when all is quiet; how much it read."""
    by_hand = dice.random() < 0.5
    config = config_of(bootstrap_servers, dice)
    core = core_of(config)
    given, over = Given(), threading.Event()
    if by_hand:
        core.assign([(*each, BEGINNING) for each in PARTITIONS])
    else:
        core.subscribe(sorted({topic for topic, _ in PARTITIONS}))
    threads = [threading.Thread(target=poll, args=(core, seeded(dice), given, over), kwargs={"by_hand": by_hand})]
    threads += [threading.Thread(target=ask, args=(core, seeded(dice), over)) for _ in range(2)]
    threads += [threading.Thread(target=look, args=(given, seeded(dice), over)) for _ in range(3)]
    other = None if by_hand or dice.random() < 0.5 else core_of(config)
    if other is not None:  # it takes some of the partitions
        other.subscribe(["orders"])
        beside = (other, seeded(dice), Given(), over)
        threads.append(threading.Thread(target=poll, args=beside, kwargs={"by_hand": False}))
    for thread in threads:
        thread.start()
    end = time.monotonic() + 20
    while not given.count and time.monotonic() < end:  # a group takes its time
        time.sleep(0.01)
    time.sleep(seconds)
    if dice.random() < 0.5:
        over.set()
        for thread in threads:
            thread.join()
    closers = [threading.Thread(target=core.close, args=(10.0,)) for _ in range(dice.choice((1, 2)))]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join()
    over.set()
    for thread in threads:
        thread.join()
    if other is not None:
        other.close(10.0)
    return given.count


def listener_round(bootstrap_servers: str, dice: random.Random, seconds: float) -> int:
    """A listener whose handlers look at the same envelopes as others do; some send in transactions."""
    given, over = Given(), threading.Event()
    batch_size = dice.choice((None, 20))

    def handle(handled: Any) -> None:
        for envelope in handled if isinstance(handled, list) else [handled]:
            given.envelopes.append(envelope)
            given.count += 1
            look_at(envelope, threads_dice())

    def handle_and_send(handled: Any, transaction: kbatch.Transaction) -> None:
        handle(handled)
        transaction.send("mail", [Envelope(data=b"x", headers=_HEADERS)])

    def threads_dice() -> random.Random:
        return random.Random(threading.get_ident())

    def watch() -> None:
        while not over.is_set():
            listener.stats()
            listener.lag()
            assert len(repr(listener)) > 0

    config = config_of(bootstrap_servers, dice)
    config.pop("enable.partition.eof")
    options: dict[str, Any] = {"concurrency": 4, "batch_size": batch_size}
    topics = ["orders", "stock"]
    listener = (
        kbatch.Listener(config, topics, handle_and_send, transactional_id=config["group.id"], **options)
        if dice.random() < 0.5
        else kbatch.Listener(config, topics, handle, commit_interval_s=0.02, **options)
    )
    runner = threading.Thread(target=listener.run)
    threads = [threading.Thread(target=look, args=(given, seeded(dice), over)), threading.Thread(target=watch)]
    for thread in (runner, *threads):
        thread.start()
    end = time.monotonic() + 20
    while not given.count and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(seconds)
    listener.stop()
    runner.join()
    over.set()
    for thread in threads:
        thread.join()
    return given.count


def seeded(dice: random.Random) -> random.Random:
    return random.Random(dice.random())
