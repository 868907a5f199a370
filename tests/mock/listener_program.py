"""A listener with an inbox in a process of its own: `python -m tests.mock.listener_program SETTINGS`, which is JSON.

Its handler writes the numbers of orders into a table. It runs until SIGTERM; with ``kill_at`` it kills itself at that
step of its sessions.
"""

import json
import os
import random
import signal
import sys
from typing import Any

import kbatch
from kbatch._inbox._session import InboxSession

STEPS = ("_begin", "_give", "_commit")


def watch(session: InboxSession, kill_at: int) -> None:
    """Has a session kill the process before or after a step of its work with the database."""

    def watched(name: str) -> Any:
        method = getattr(session, name)

        def call(*arguments: Any) -> Any:
            step(f"before {name}")
            answer = method(*arguments)
            step(f"after {name}")
            return answer

        return call

    def step(name: str) -> None:
        global steps
        steps += 1
        if steps == kill_at:
            print(name, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    for name in STEPS:
        setattr(session, name, watched(name))


steps = 0


def main() -> None:
    settings = json.loads(sys.argv[1])
    table, kill_at = settings["table"], settings.get("kill_at", 0)
    inbox: Any = (
        kbatch.PostgresInbox(settings["conninfo"], schema=settings["schema"])
        if "conninfo" in settings
        else kbatch.SqliteInbox(settings["path"])
    )
    open_session = inbox.open_session

    def opened(group: str) -> InboxSession:
        session: InboxSession = open_session(group)
        watch(session, kill_at)
        return session

    inbox.open_session = opened
    seeded = random.Random(kill_at)
    batch = seeded.choice((None, 20))

    def handle(given: Any, connection: Any) -> None:
        for envelope in given if isinstance(given, list) else (given,):
            connection.execute(f"INSERT INTO {table} (n) VALUES ({int(envelope.data)})")

    listener = kbatch.Listener(
        settings["config"], ["orders"], handle, inbox=inbox, concurrency=3, batch_size=batch, commit_interval_s=0.2
    )
    signal.signal(signal.SIGTERM, lambda *_: listener.stop())
    listener.run()


if __name__ == "__main__":
    main()
