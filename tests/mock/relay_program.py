"""A relay in a process of its own: `python -m tests.mock.relay_program SETTINGS`, which is JSON.

It runs until SIGTERM, or until the outbox is empty; with ``kill_at`` it kills itself at that call of its store.
"""

import json
import os
import random
import signal
import sys

import kbatch
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

    opened = (
        kbatch.PostgresOutbox(settings["conninfo"], schema=settings["schema"])
        if "conninfo" in settings
        else kbatch.SqliteOutbox(settings["path"])
    )
    outbox = WatchedOutbox(opened, **({"before": step} if before_it else {"after": step}))
    options = {"batch_size": 50, "max_in_flight_batches": 2, **settings.get("options", {})}
    with kbatch.Relay(outbox, settings["config"], **options) as relay:
        signal.signal(signal.SIGTERM, lambda *_: relay.stop())
        print("begun", flush=True)
        if settings.get("drain", True):
            relay.drain()
        else:
            relay.run()


if __name__ == "__main__":
    main()
