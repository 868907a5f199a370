"""Sends transactions and kills itself in the second one, at a step that its arguments name."""

import json
import os
import signal
import sys
from typing import Any

import kbatch
from kbatch import _transactions
from kbatch._transactions import Transactions


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(settings: str, topic: str, step: str, first: int, count: int) -> None:
    producer = kbatch.Producer(json.loads(settings))
    transactions = producer._transactions
    assert transactions is not None
    current = first
    call = Transactions._call

    def dying_call(self: Transactions, which: int) -> Any:
        dying = current == first + 1 or which == _transactions._INIT
        names = {_transactions._INIT: "init", _transactions._BEGIN: "begin", _transactions._COMMIT: "commit"}
        if dying and step == names.get(which):
            die()
        error = call(self, which)
        if dying and step == "committed" and which == _transactions._COMMIT:
            die()
        return error

    run = Transactions._run

    def dying_run(self: Transactions, batch: Any) -> None:
        if current == first + 1 and step == "hold":
            die()
        run(self, batch)
        if current == first + 1 and step == "answer":
            die()

    held = transactions._held

    class Held:
        """The batches on hold, but for their enqueueing."""

        def __getattr__(self, name: str) -> Any:
            return getattr(held, name)

        def wait_for_decision(self, batch: Any) -> bool:
            if current == first + 1 and step == "enqueue":
                die()
            return held.wait_for_decision(batch)

    Transactions._call = dying_call  # type: ignore[method-assign]
    Transactions._run = dying_run  # type: ignore[method-assign]
    transactions._held = Held()  # type: ignore[assignment]
    for current in range(first, first + count):
        size = 1 + current % 7 * 40
        report = producer.send_batch(
            topic, [kbatch.Envelope({"batch": current, "n": n, "of": size}) for n in range(size)]
        )
        report.raise_for_errors()
        os.write(1, b"%d\n" % current)
    producer.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
