"""Runs many plans, makes those that fail shorter, and prints the shortest: ``make soak ARGS="--seeds 0:3000"``.

With ``--kafka`` on real brokers instead of the mock cluster, with ``--outbox`` of an outbox and its relays, with
``--whole`` of listeners as well, also with ``--kafka``; each has plans of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from tests.faults.history import MET
from tests.faults.outbox_plan import OutboxPlan, make_outbox_plan, make_whole_plan
from tests.faults.plan import Plan, make_plan
from tests.faults.worker import Result, Worker

_PATIENCE_S = 300.0  # a plan that hangs takes its time at each try


class Kind:
    """Which plans are run, and by what.

    Args:
        database: Of an outbox, "sqlite" or "postgres"; "" for a producer.
        conninfo: Where that is, if it is PostgreSQL.
        whole: With listeners.
    """

    def __init__(self, *, kafka: bool = False, database: str = "", conninfo: str = "", whole: bool = False) -> None:
        self.kafka, self.database, self.conninfo, self.whole = kafka, database, conninfo, whole

    def plan(self, seed: int) -> Plan | OutboxPlan:
        if not self.database:
            return make_plan(seed, kafka=self.kafka)
        return (
            make_whole_plan(seed, self.database, kafka=self.kafka)
            if self.whole
            else make_outbox_plan(seed, self.database)
        )

    def worker(self) -> Worker:
        place = [self.conninfo] if self.conninfo else []
        outbox = [*(["whole"] if self.whole else []), self.database, *place] if self.database else []
        return Worker(kafka=self.kafka, outbox=outbox)


def run_many(
    seeds: Iterator[int], jobs: int, told: Callable[[Result], None], enough: Callable[[], bool], kind: Kind
) -> None:
    """Runs the plans of `seeds` in `jobs` processes until they are through or `enough`."""
    lock = threading.Lock()

    def work() -> None:
        worker = kind.worker()
        try:
            while True:
                with lock:
                    seed = None if enough() else next(seeds, None)
                if seed is None:
                    return
                result = worker.run(kind.plan(seed))
                with lock:
                    told(result)
        finally:
            worker.close()

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def shorten(result: Result, run: Callable[[Any], Result], patience_s: float = _PATIENCE_S, tries: int = 2) -> Result:
    """Drops steps as long as what is left violates one of the same invariants, for `patience_s` at most."""
    deadline = time.monotonic() + patience_s

    def fails(plan: Any) -> Result | None:
        for _ in range(tries):  # what fails may not fail each time
            again = run(plan)
            if again.invariants & result.invariants:
                return again
        return None

    shortest = result
    size = max(1, len(result.plan.keep) // 2)
    while True:
        keep = shortest.plan.keep
        for start in range(0, len(keep), size):
            if time.monotonic() > deadline:
                return shortest
            shorter = fails(shortest.plan.only(keep[:start] + keep[start + size :]))
            if shorter is not None:
                shortest = shorter
                break
        else:
            if size == 1:
                return shortest
            size //= 2


def _range(text: str) -> range:
    first, _, end = text.partition(":")
    return range(int(first), int(end)) if end else range(int(first))


def _steps(text: str) -> tuple[int, ...]:
    return tuple(int(step) for step in text.split(",") if step)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--kafka", action="store_true", help="on real brokers; 0:100, one at a time")
    parser.add_argument("--outbox", choices=("sqlite", "postgres"), help="of an outbox in this database")
    parser.add_argument("--whole", choices=("sqlite", "postgres"), help="of outbox, Kafka and inbox, in this database")
    parser.add_argument("--seeds", type=_range, metavar="FIRST:END", help="default 0:3000")
    parser.add_argument("--seed", type=int, help="run this one and print its plan")
    parser.add_argument("--keep", type=_steps, metavar="0,3,5", help="with --seed: the steps to take")
    parser.add_argument("--repeat", type=int, default=1, help="with --seed: run it until it fails, so often at most")
    parser.add_argument("--jobs", type=int, help="how many plans at a time, default 3")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no plan after this time")
    parser.add_argument("--failures", type=int, default=5, help="stop after so many, default 5")
    options = parser.parse_args(arguments)
    if options.kafka and options.outbox:
        parser.error("--kafka has no plans of an outbox alone: --whole has")
    with contextlib.ExitStack() as undo:
        conninfo = ""
        database = options.whole or options.outbox or ""
        if database == "postgres":
            from tests.postgres import EXTERNAL, Server

            if not (conninfo := EXTERNAL or ""):
                server = undo.enter_context(contextlib.closing(Server()))
                server.start()
                conninfo = server.conninfo
        kind = Kind(kafka=options.kafka, database=database, conninfo=conninfo, whole=bool(options.whole))
        if options.seed is not None:
            plan = kind.plan(options.seed)
            if options.keep is not None:
                plan = plan.only(options.keep)
            return _one(kind, plan, options.repeat, shorter=options.keep is None)
        seeds = options.seeds or range(100 if options.kafka else 3_000)
        jobs = options.jobs or (1 if options.kafka else 3)
        return _many(seeds, jobs, options.seconds, options.failures, kind)


def _one(kind: Kind, plan: Plan | OutboxPlan, repeat: int, *, shorter: bool) -> int:
    print(plan, flush=True)
    worker = kind.worker()
    try:
        for _ in range(repeat):
            result = worker.run(plan)
            print(f"{len(result.violations)} violations, in {result.seconds:.1f} s", flush=True)
            if result.violations:
                print(shorten(result, worker.run) if shorter else result)
                return 1
    finally:
        worker.close()
    return 0


def _many(seeds: range, jobs: int, seconds: float, failures: int, kind: Kind) -> int:
    began = time.monotonic()
    failed: list[Result] = []
    kinds: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    promised: set[str] = set()
    plans = 0

    def told(result: Result) -> None:
        nonlocal plans
        kinds.update(result.plan.kinds)
        seen.update(result.seen)
        if isinstance(result.plan, OutboxPlan):
            promised.update(result.plan.promised)
        if result.violations:
            failed.append(result)
            print(result, flush=True)
        plans += 1
        if plans % (10 if kind.kafka else 250) == 0:
            print(f"{plans} plans in {time.monotonic() - began:.0f} s, {len(failed)} failed", flush=True)

    def enough() -> bool:
        return len(failed) >= failures or time.monotonic() - began > seconds

    run_many(iter(seeds), jobs, told, enough, kind)
    print(f"{plans} plans in {time.monotonic() - began:.0f} s, {len(failed)} failed")
    print(f"each kind of fault {min(kinds.values(), default=0)} to {max(kinds.values(), default=0)} times")
    met = {name: seen.pop(f"{MET}{name}", 0) for name in promised}
    print("outcomes:", ", ".join(f"{name} {count}" for name, count in sorted(seen.items()) if not name.startswith(MET)))
    never = sorted(name for name, count in met.items() if not count)
    if met:
        print(f"killed at each step, and each outage met, {min(met.values())} to {max(met.values())} times")
    if never:
        print(f"never: {', '.join(never)}")
    if not failed:
        if never:
            return 1
        if kind.whole:
            print("every order has exactly one effect, in order per key")
        return 0
    worker = kind.worker()
    try:
        shortened = [shorten(result, worker.run, _PATIENCE_S / len(failed)) for result in failed]
    finally:
        worker.close()
    shortest = min(shortened, key=lambda result: len(result.plan.keep))
    print(f"\nthe shortest plan that fails:\n{shortest}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
