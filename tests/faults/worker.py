"""A process that runs plans, so that a crash or a hang is the result of a seed and not the end of the run.

``python -m tests.faults.worker [kafka] [[whole] sqlite | [whole] postgres CONNINFO]`` reads ``[seed, kept steps]`` from
standard input and answers each with a line of JSON; `Worker` is the other end.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from tests.faults.checker import Violation
from tests.faults.history import MET
from tests.faults.outbox_plan import OutboxPlan, make_outbox_plan, make_whole_plan
from tests.faults.plan import Plan, make_plan

#: A plan that takes longer hangs. The longest take a few seconds.
DEADLINE_S = 90.0
KAFKA_DEADLINE_S = WHOLE_DEADLINE_S = 400.0
_TAIL = 6_000


class Result(NamedTuple):
    plan: Plan | OutboxPlan
    violations: tuple[str, ...]
    seconds: float
    seen: dict[str, int]

    @property
    def met(self) -> set[str]:
        """The steps at which a process was killed, and the faults that have happened."""
        return {name.removeprefix(MET) for name in self.seen if name.startswith(MET)}

    @property
    def invariants(self) -> set[str]:
        return {violation.partition(":")[0] for violation in self.violations}

    @property
    def command(self) -> str:
        keep = "" if len(self.plan.keep) == len(self.plan.steps) else f" --keep {','.join(map(str, self.plan.keep))}"
        target, own = self.plan.command
        return f'make {target} ARGS="{own}--seed {self.plan.seed}{keep}"'

    def __str__(self) -> str:
        shown = [f"  {violation}" for violation in self.violations[:6]]
        more = [f"  and {len(self.violations) - 6} more"] if len(self.violations) > 6 else []
        return "\n".join([str(self.plan), "violated:", *shown, *more, f"again: {self.command}"])


class Worker:
    """Runs one plan at a time in a process, which is started anew after a crash, a hang, or a failure."""

    def __init__(self, *, kafka: bool = False, outbox: Sequence[str] = ()) -> None:
        self._kafka = kafka
        self._arguments = [*(["kafka"] if kafka else []), *outbox]
        self._process: subprocess.Popen[str] | None = None
        self._replies: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()

    def run(self, plan: Plan | OutboxPlan) -> Result:
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        began = time.monotonic()
        with contextlib.suppress(OSError):
            process.stdin.write(json.dumps([plan.seed, plan.keep]) + "\n")
            process.stdin.flush()
        violations: list[str] = []
        deadline_s = KAFKA_DEADLINE_S if self._kafka else DEADLINE_S
        if "whole" in self._arguments:
            deadline_s = WHOLE_DEADLINE_S  # its members' sessions end one after the other
        seen: dict[str, int] = {}
        try:
            line = self._replies.get(timeout=deadline_s)
        except queue.Empty:
            process.send_signal(signal.SIGABRT)  # faulthandler writes where each thread stands
            violations = [f"hang: no end within {deadline_s} s\n{self._stop()}"]
        else:
            if not line:
                violations = [f"crash: {self._stop()}"]
            else:
                violations, seen = json.loads(line)
                if violations:
                    self._stop()
        return Result(plan, tuple(violations), time.monotonic() - began, seen)

    def close(self) -> None:
        self._stop()
        self._errors.close()

    def _start(self) -> None:
        self._errors.seek(0)
        self._errors.truncate()
        self._replies = replies = queue.SimpleQueue()
        self._process = process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.faults.worker", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=Path(__file__).parents[2],
        )

        def read() -> None:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    replies.put(line)
            replies.put("")

        self._reader = threading.Thread(target=read, daemon=True)
        self._reader.start()

    def _stop(self) -> str:
        """Ends the process; its exit status and the end of what it wrote to standard error."""
        process, self._process = self._process, None
        if process is None:
            return ""
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            status = process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        self._reader.join(20)
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - _TAIL))
        return f"exit status {status}\n{self._errors.read().decode(errors='replace')}"


def _taken(arguments: list[str], word: str) -> bool:
    found = arguments[:1] == [word]
    del arguments[: int(found)]
    return found


def main() -> None:
    arguments = sys.argv[1:]
    on_kafka, is_whole = (_taken(arguments, word) for word in ("kafka", "whole"))
    run: Callable[[int, tuple[int, ...]], tuple[list[Violation], Counter[str]]]
    cluster: Any = contextlib.nullcontext()
    if on_kafka:
        from tests.kafka.cluster import KafkaCluster

        cluster = KafkaCluster(1 if arguments else 3)
    if arguments:
        from tests.faults.outbox_runner import run_outbox_plan

        database, place = arguments[0], "".join(arguments[1:])
        run_one: Callable[[OutboxPlan, str], tuple[list[Violation], Counter[str]]] = run_outbox_plan
        if on_kafka:
            from tests.kafka.histories import run_history

            run_one = functools.partial(run_history, cluster)

        def run(seed: int, keep: tuple[int, ...]) -> tuple[list[Violation], Counter[str]]:
            make = functools.partial(make_whole_plan, kafka=on_kafka) if is_whole else make_outbox_plan
            return run_one(make(seed, database).only(keep), place)

    else:
        run_plan: Callable[[Any, Plan], tuple[list[Violation], Counter[str]]]
        if on_kafka:
            from tests.kafka.scenario import run_plan
        else:
            from kbatch.testing import MockCluster
            from tests.faults.runner import BROKERS, run_plan

            cluster = MockCluster(BROKERS)

        def run(seed: int, keep: tuple[int, ...]) -> tuple[list[Violation], Counter[str]]:
            return run_plan(cluster, make_plan(seed, kafka=on_kafka).only(keep))

    faulthandler.enable()
    # Replies have a descriptor to themselves: whatever else prints, goes to standard error.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with cluster:
        for line in sys.stdin:
            seed, keep = json.loads(line)
            violations, seen = run(seed, tuple(keep))
            replies.write(json.dumps([[str(violation) for violation in violations], seen]) + "\n")
            replies.flush()
            if violations:  # nothing that was left behind shall disturb the next plan
                os._exit(0)


if __name__ == "__main__":
    main()
