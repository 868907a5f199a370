"""Threads that send, submit, await, listen, flush, purge, ask and close, all at once, over and over. Of three rounds
one reads, and one adds to an outbox that relays empty."""

import argparse
import asyncio
import contextlib
import faulthandler
import logging
import random
import threading
import time
from collections.abc import Callable

import kbatch
from kbatch import Envelope, Producer, Tombstone, _fastmap

from ..loops import beside
from . import reading, relaying

TOPICS = ("orders", "stock", "mail")
HANG_S = 300


class Counted:
    """How many answers came for how many batches."""

    def __init__(self) -> None:
        self.mutex = threading.Lock()
        self.batches = 0
        self.answers = 0

    def batch(self) -> None:
        with self.mutex:
            self.batches += 1

    def answer(self, report: object) -> None:
        with self.mutex:
            self.answers += 1


def batch_of(dice: random.Random) -> list[Envelope[object]]:
    size = dice.choice((1, 3, 40, 300))
    bodies: list[Envelope[object]] = [Envelope({"n": n}, key=f"k{n}", topic=dice.choice(TOPICS)) for n in range(size)]
    return [
        *bodies,
        Tombstone(b"k"),
        Envelope(data=bytearray(b"x" * 100)),
        Envelope(data=b"y" * dice.choice((1, 70_000))),
    ]


def ended(wait: Callable[..., object], *timeout: float) -> None:
    """Waits, and takes what was given up; whoever is first is told of it."""
    with contextlib.suppress(kbatch.UndeliveredError):
        wait(*timeout)


def work(producer: Producer, dice: random.Random, counted: Counted, over: threading.Event) -> None:
    def send() -> None:
        assert len(producer.send_batch("orders", batch_of(dice)).offsets) > 0

    def impatient() -> None:
        with contextlib.suppress(kbatch.BatchPendingError):
            producer.send_batch("orders", batch_of(dice), timeout=dice.choice((0, 0.001, 0.01)))

    def submit() -> None:
        producer.submit("orders", batch_of(dice))

    def called_back() -> None:
        # counted when it is taken: a producer that refuses does not call back
        pending = producer.submit("orders", batch_of(dice), callback=counted.answer)
        counted.batch()
        if dice.random() < 0.5:
            counted.batch()
            pending.add_done_callback(counted.answer)
        if dice.random() < 0.5:
            pending.wait()

    def awaited() -> None:
        async def several() -> None:
            await asyncio.gather(*(producer.submit("orders", batch_of(dice)) for _ in range(3)))

        asyncio.run(several())

    def on_a_loop() -> None:
        other = beside(producer)

        async def cancelled() -> None:
            task = asyncio.create_task(other.send_batch("orders", batch_of(dice)))
            await asyncio.sleep(dice.choice((0, 0.001)))
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

        async def submitted() -> None:
            assert len((await (await other.submit("orders", batch_of(dice)))).offsets) > 0

        async def impatient() -> None:
            with contextlib.suppress(kbatch.BatchPendingError):
                await other.send_batch("orders", batch_of(dice), timeout=dice.choice((0, 0.001, 0.01)))

        async def several() -> None:
            await asyncio.gather(*(dice.choice((cancelled, submitted, impatient))() for _ in range(4)))

        asyncio.run(several())

    def flush() -> None:
        ended(producer.flush, dice.choice((0, 0.01, 1)))

    deeds: list[Callable[[], None]] = [
        send,
        send,
        impatient,
        submit,
        submit,
        called_back,
        awaited,
        on_a_loop,
        on_a_loop,
        flush,
        lambda: ask(producer),
    ]
    while not over.is_set():
        try:
            dice.choice(deeds)()
            if dice.random() < 0.01:
                producer.purge()
        except kbatch.ProducerClosedError:
            return


def send_singly(sender: kbatch.BatchedSender, dice: random.Random, over: threading.Event) -> None:
    def impatient() -> None:
        with contextlib.suppress(kbatch.SenderFullError):
            sender.send(Envelope(1, key=f"k{dice.randrange(5)}"), timeout=dice.choice((0, 0.001)))

    deeds: list[Callable[[], object]] = [
        *[lambda: sender.send(Envelope({"n": 1}, key=f"k{dice.randrange(5)}"))] * 20,
        *[lambda: sender.try_send(Envelope(data=b"x" * dice.choice((1, 2_000))))] * 10,
        lambda: sender.send(Envelope(object())),
        impatient,
        lambda: ended(sender.flush, dice.choice((0, 0.01, 0.1))),
        sender.stats,
        lambda: repr(sender),
    ]
    while not over.is_set():
        try:
            dice.choice(deeds)()
        except kbatch.SenderClosedError:
            return


def ask(producer: Producer) -> None:
    producer.stats()
    assert len(repr(producer)) > 0
    assert producer.closed in (False, True)
    assert len(producer) >= 0


def watch(producer: Producer, over: threading.Event) -> None:
    """Asks on, while it closes and after."""
    batches: list[kbatch.PendingBatch] = []
    while not over.wait(0.0002):
        ask(producer)
        if len(batches) < 3:
            with contextlib.suppress(kbatch.ProducerClosedError):
                batches.append(producer.submit("orders", [Envelope(1)]))
        for batch in batches:
            assert batch.begun
            assert len(repr(batch)) > 0
            if batch.latency_s == batch.latency_s:
                assert len(batch.report) == 1
        batches = [batch for batch in batches if not batch.done()]


def round_of(bootstrap_servers: str, dice: random.Random, seconds: float) -> None:
    counted = Counted()
    config = {
        "bootstrap.servers": bootstrap_servers,
        "log_level": 0,
        "enable.idempotence": dice.random() < 0.3,
        "linger.ms": dice.choice((0, 5)),
        "queue.buffering.max.messages": dice.choice((100, 1_000, 100_000)),
    }
    if dice.random() < 0.5:
        config |= {"statistics.interval.ms": 10, "stats_cb": lambda text: None, "error_cb": lambda error: None}
    producer = Producer(config, max_in_flight=dice.choice((50, 1_000, 20_000)))
    over = threading.Event()
    threads = [
        threading.Thread(target=work, args=(producer, random.Random(dice.random()), counted, over)) for _ in range(4)
    ]
    agent = kbatch.SendingAgent(producer, "orders", on_failed=lambda envelope, error: None)
    sender = kbatch.BatchedSender(agent, batch_size=20, batch_timeout_ms=1, max_buffered=50)
    threads += [
        threading.Thread(target=send_singly, args=(sender, random.Random(dice.random()), over)) for _ in range(2)
    ]
    all_over = threading.Event()
    watcher = threading.Thread(target=watch, args=(producer, all_over))
    for thread in (watcher, *threads):
        thread.start()
    time.sleep(seconds)
    ending = dice.choice(("close", "close twice", "stop first", "forget"))
    if ending in ("stop first", "forget"):
        over.set()
        for thread in threads:
            thread.join()
    closers = [threading.Thread(target=ended, args=(producer.close, dice.choice((0, 0.05, 10))))] * (
        ending == "close twice"
    )
    for closer in closers:
        closer.start()
    if dice.random() < 0.5:
        ended(sender.close, dice.choice((0, 0.05)))
    if ending != "forget":
        ended(producer.close, dice.choice((0, 0.05, 10)))
    else:
        ended(producer.flush)
    ended(sender.close, 10)
    for thread in [*threads, *closers]:
        thread.join()
    told = sender.stats()
    assert told["acked"] + told["failed"] == told["accepted"], told
    assert len(sender) == 0
    all_over.set()
    watcher.join()
    del producer, agent, sender, threads, closers, thread, watcher
    deadline = time.monotonic() + 60
    while _fastmap.pinned_buffers() or counted.answers < counted.batches:
        assert time.monotonic() < deadline, (_fastmap.pinned_buffers(), counted.answers, counted.batches)
        time.sleep(0.01)
    assert counted.answers == counted.batches


def main() -> None:
    parser = argparse.ArgumentParser(prog="make tsan ARGS=…", description=__doc__)
    parser.add_argument("bootstrap_servers")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a round before it is ended")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=("sending", "reading", "relaying"))
    options = parser.parse_args()
    logging.getLogger("kbatch").setLevel(logging.CRITICAL)  # circuits open when producers are closed under senders
    faulthandler.dump_traceback_later(HANG_S + options.rounds * options.seconds * 10, exit=True)
    dice = random.Random(options.seed)
    reading.fill(options.bootstrap_servers)
    read = relayed = 0
    for number in range(options.rounds):
        kind = options.only or ("sending", "reading", "relaying")[number % 3]
        if kind == "sending":
            round_of(options.bootstrap_servers, dice, options.seconds)
        elif kind == "reading":
            read_round = dice.choice((reading.core_round, reading.core_round, reading.listener_round))
            read += read_round(options.bootstrap_servers, dice, options.seconds)
        else:
            relayed += relaying.relay_round(options.bootstrap_servers, dice, options.seconds)
    print(f"{options.rounds} rounds of seed {options.seed}, {read} records read, {relayed} relayed")


if __name__ == "__main__":
    main()
