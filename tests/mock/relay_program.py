"""A relay in a process of its own: `python -m tests.mock.relay_program SETTINGS`, which is JSON.

It runs until SIGTERM, or until the outbox is empty; with ``kill_at`` it kills itself at that call of its store,
and with ``stop_at_reading`` it stops itself behind that reading, until SIGCONT. With ``aio`` it runs on an event loop.
"""

import asyncio
import json
import os
import random
import signal
import sys

import kbatch
import kbatch.aio
from tests.relays import WatchedOutbox


def main() -> None:
    settings = json.loads(sys.argv[1])
    steps = 0
    # Before a call or after it: a transaction that was committed, but that the relay does not know of.
    before_it = random.Random(settings.get("kill_at", 0)).random() < 0.5

    def step(name: str) -> None:
        nonlocal steps
        steps += 1
        if steps == settings.get("kill_at"):
            print(name, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    readings = 0

    def after_reading(name: str) -> None:
        nonlocal readings
        readings += name == "read"
        if name == "read" and readings == settings["stop_at_reading"]:
            print(name, flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)

    opened = (
        kbatch.PostgresOutbox(settings["conninfo"], schema=settings["schema"])
        if "conninfo" in settings
        else kbatch.SqliteOutbox(settings["path"])
    )
    watch = {"before": step} if before_it else {"after": step}
    outbox = WatchedOutbox(opened, **({"after": after_reading} if "stop_at_reading" in settings else watch))
    options = {"batch_size": 50, "max_in_flight_batches": 2, **settings.get("options", {})}
    drains = settings.get("drain", True)
    if settings.get("aio"):
        asyncio.run(on_loop(kbatch.aio.Relay(outbox, settings["config"], **options), drains))
        return
    with kbatch.Relay(outbox, settings["config"], **options) as relay:
        signal.signal(signal.SIGTERM, lambda *_: relay.stop())
        print("begun", flush=True)
        if drains:
            relay.drain()
        else:
            relay.run()


async def on_loop(relay: kbatch.aio.Relay, drains: bool) -> None:
    async with relay:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, relay.stop)
        print("begun", flush=True)
        await (relay.drain() if drains else relay.run())


if __name__ == "__main__":
    main()
