"""A listener with a transactional_id, in a process of its own that kills itself at a step.

`python -m tests.kafka.transactional_listener SETTINGS`, from the root.
Its handler sends on what it gets. SETTINGS is JSON; without ``step`` it runs until SIGTERM.
"""

import asyncio
import json
import os
import signal
import sys
from typing import Any

import kbatch
from kbatch import _transactions, aio
from kbatch._receiving import _transacting
from kbatch._transactions import Transactions

STEPS = ("init", "handler", "begin", "enqueue", "before offsets", "offsets", "commit", "committed", "done")


def main() -> None:
    settings = json.loads(sys.argv[1])
    wanted, at = settings.get("step"), settings.get("at", 3)
    seen = 0

    def step(name: str) -> None:
        nonlocal seen
        if name == wanted:
            seen += 1
            if seen == (1 if name == "init" else at):
                os.kill(os.getpid(), signal.SIGKILL)

    call, send_offsets, decide = Transactions._call, _transacting._send_offsets, Transactions._send_offsets
    names = {_transactions._INIT: "init", _transactions._BEGIN: "begin", _transactions._COMMIT: "commit"}

    def dying_call(self: Transactions, which: int) -> Any:
        step(names.get(which, ""))
        error = call(self, which)
        if which == _transactions._COMMIT:
            step("committed")
        return error

    def dying_send_offsets(*arguments: Any) -> Any:
        step("before offsets")
        answer = send_offsets(*arguments)
        step("offsets")
        return answer

    def dying_decide(self: Transactions, batch: Any) -> int:
        step("enqueue")
        return decide(self, batch)

    Transactions._call = dying_call  # type: ignore[method-assign]
    Transactions._send_offsets = dying_decide  # type: ignore[method-assign]
    _transacting._send_offsets = dying_send_offsets

    def handle(given: Any, transaction: kbatch.Transaction) -> None:
        for envelope in given if isinstance(given, list) else (given,):
            sent = kbatch.Envelope(data=envelope.data, key=envelope.key.decode(), message_type="Order")
            transaction.send(settings["out"], [sent])
        step("handler")

    async def awaited(given: Any, transaction: aio.Transaction) -> None:
        for envelope in given if isinstance(given, list) else (given,):
            sent = kbatch.Envelope(data=envelope.data, key=envelope.key.decode(), message_type="Order")
            await transaction.send(settings["out"], [sent])
        step("handler")

    is_aio = settings.get("kind") == "asyncio"
    make: Any = aio.Listener if is_aio else kbatch.Listener
    listener = make(
        settings["config"],
        [settings["topic"]],
        awaited if is_aio else handle,
        transactional_id=settings["id"],
        batch_size=settings.get("batch_size"),
        concurrency=settings.get("concurrency", 1),
    )
    commit = listener._transacting.commit

    def dying_commit(*arguments: Any) -> None:
        commit(*arguments)
        step("done")

    listener._transacting.commit = dying_commit
    signal.signal(signal.SIGTERM, lambda *_: listener.stop())
    if is_aio:
        asyncio.run(listener.run())
    else:
        listener.run()


if __name__ == "__main__":
    main()
