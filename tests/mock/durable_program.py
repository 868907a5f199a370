"""An application that sends through an outbox: `python -m tests.mock.durable_program SETTINGS`, which is JSON.

Its threads, or tasks, send numbers, and tell each once `send` has returned, on standard output. With ``kill_at`` it
kills itself at that step of its writer, with ``relay`` it has a relay of its own.
"""

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import kbatch
from kbatch import aio
from tests.relays import numbered

SETTINGS = json.loads(sys.argv[1])
LOCK = threading.Lock()
steps = 0


def step() -> None:
    global steps
    with LOCK:
        steps += 1
        if steps == SETTINGS.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)


def tell(number: int) -> None:
    os.write(1, b"%d\n" % number)  # whole, and not lost when this is killed


class Writer:
    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def commit(self, take: Callable[[], Sequence[Any]]) -> bool:
        def taken() -> Sequence[Any]:
            step()
            group = take()
            step()
            return group

        step()
        done: bool = self.writer.commit(taken)
        step()
        return done

    def close(self) -> None:
        self.writer.close()


class Steps:
    def open_writer(self) -> Any:
        step()
        return Writer(super().open_writer())  # type: ignore[misc]


class InSqlite(Steps, kbatch.SqliteOutbox):
    pass


class InPostgres(Steps, kbatch.PostgresOutbox):
    pass


def main() -> None:
    place = SETTINGS["where"]
    outbox = (InSqlite if "path" in place else InPostgres)(**place, wire="raw")
    options = {"config": SETTINGS["config"]} if SETTINGS["relay"] else {}
    lanes = [
        range(first, SETTINGS["end"], SETTINGS["lanes"])
        for first in range(SETTINGS["begin"], SETTINGS["begin"] + SETTINGS["lanes"])
    ]
    kind: Any = aio.KafkaTopic if SETTINGS["aio"] else kbatch.KafkaTopic
    topic = kind("orders", kbatch.SenderMode.DURABLE, outbox=outbox, **options)

    if SETTINGS["aio"]:

        async def work(sender: Any, numbers: range) -> None:
            for envelope, number in zip(numbered(numbers, SETTINGS["lanes"]), numbers, strict=True):
                await sender.send(envelope)
                tell(number)

        async def run() -> None:
            async with topic.create_sender() as sender:
                await asyncio.gather(*(work(sender, numbers) for numbers in lanes))

        asyncio.run(run())
        return

    def send(sender: Any, numbers: range) -> None:
        for envelope, number in zip(numbered(numbers, SETTINGS["lanes"]), numbers, strict=True):
            sender.send(envelope)
            tell(number)

    with topic.create_sender() as sender:
        threads = [threading.Thread(target=send, args=(sender, numbers)) for numbers in lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
