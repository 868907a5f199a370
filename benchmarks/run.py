"""Measures kbatch against its yardsticks and prints the table: `python -m benchmarks.run`, or `make bench`.

Exit status 0 says that everything was measured and every message accounted for, not that every target was reached; with
--strict it says both.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import plots, results
from benchmarks.broker import MockBroker
from benchmarks.data import HEADER_COUNTS, POOL
from benchmarks.figures import show, summary
from benchmarks.library import HERE, build, java_program
from benchmarks.machine import describe, line_round_trip_ns, load
from benchmarks.measures import GROUPS, MEASURES, ON_KAFKA, ON_MOCK
from benchmarks.plan import LATENCY, Plan
from benchmarks.recovery import Outages
from benchmarks.relays import FIRST
from benchmarks.turns import Effort

RESULTS = HERE / "results"
PATIENCE_MINUTES = 20.0
#: Options that are the plan's.
CHANGES = ("sizes", "headers", "partitions", "backlogs", "memory_envelopes")


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part.replace("_", "")) for part in text.split(","))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few minutes' worth: 8 headers, one round, 5 turns")
    parser.add_argument("--kafka", action="store_true", help="on a real Apache Kafka, which is started for it")
    parser.add_argument("--only", metavar="NAMES", help=f"some of: {','.join((*MEASURES, *GROUPS))}")
    parser.add_argument("--sizes", type=numbers, metavar="N,…", help="batch sizes (default 100,1000,10000)")
    parser.add_argument("--headers", type=numbers, metavar="N,…", help="headers per message, of 0, 8, 15 (default all)")
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds of 7 turns for each figure with a target (3)")
    parser.add_argument("--seconds", type=float, metavar="S", help="length of a turn (default 0.25)")
    parser.add_argument("--partitions", type=int, metavar="N", help="partitions of each topic (default 4)")
    parser.add_argument("--backlogs", type=numbers, metavar="N,…",
                        help="rows of outboxes whose first rows a relay sends; the largest takes a minute to fill "
                        "(default 50000,300000,1000000,5000000)")  # fmt: skip
    parser.add_argument("--memory-envelopes", type=int, metavar="N",
                        help="sent, and read, while memory is watched (default 10000000)")  # fmt: skip
    parser.add_argument("--brokers", type=int, default=1, metavar="N", help="of the mock cluster (default 1)")
    parser.add_argument("--log-folder", type=Path, metavar="DIR", help="where the real Kafka keeps its logs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the JSON goes, with the plots beside it "
                        "(default benchmarks/results/TIME/)")  # fmt: skip
    parser.add_argument("--patience", type=float, default=PATIENCE_MINUTES, metavar="MINUTES",
                        help="after so long no turn is taken again because other programs were busy (20)")  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="exit status 1 if a target is not reached")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a target is missed by a factor of two")
    options = parser.parse_args(arguments)
    if options.only and (wrong := set(options.only.split(",")) - set(MEASURES) - set(GROUPS)):
        parser.error(f"--only: no such measure: {', '.join(sorted(wrong))}")
    if options.backlogs and min(options.backlogs) < FIRST:
        parser.error(f"--backlogs: {FIRST:,} rows of each are sent in a turn")
    if options.headers and set(options.headers) - set(HEADER_COUNTS):
        parser.error("--headers: choose from 0, 8 and 15")
    if options.sizes and any(size < 1 or POOL % size for size in options.sizes):
        parser.error(f"--sizes: each must divide {POOL}")
    return options


def plan_of(options: argparse.Namespace) -> Plan:
    plan = Plan()
    if options.quick:
        brief = Effort(rounds=1, turns=5, seconds=0.2)
        plan = Plan(headers=(8,), effort=brief, less=brief, memory_envelopes=1_000_000, tune=False,
                    backlogs=(50_000, 300_000), relay_rows=150_000, read_records=30_000,
                    half_load_s=3.0,
                    latency=replace(LATENCY, turns=5), outages=Outages((1.0, 1.6)))  # fmt: skip
    changes: dict[str, Any] = {name: value for name in CHANGES if (value := getattr(options, name)) is not None}
    if options.kafka and not options.quick:
        plan = replace(plan, headers=(8,), effort=replace(plan.effort, rounds=1, turns=9))
    effort, less = plan.effort, plan.less
    if options.repeats is not None:
        effort = Effort(options.repeats, effort.turns, effort.seconds)
    if options.seconds is not None:
        effort = Effort(effort.rounds, effort.turns, options.seconds)
        less = Effort(less.rounds, less.turns, options.seconds)
    values = {name: getattr(plan, name) for name in Plan.__dataclass_fields__}
    return Plan(**(values | changes | {"effort": effort, "less": less}))


def describe_plan(plan: Plan) -> dict[str, Any]:
    names = (*CHANGES, "effort", "less", "tune", "latency", "outages", "relay_rows", "read_records", "half_load_s")
    found: dict[str, Any] = msgspec.to_builtins({name: getattr(plan, name) for name in names})
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    plan = plan_of(options)
    for program in ("cloop", "machine", "delay"):
        build(program)
    with ExitStack() as stack:
        if not options.kafka:
            plan = replace(plan, open_broker=partial(MockBroker, options.brokers))
            name = "mock cluster" if options.brokers == 1 else f"mock cluster of {options.brokers} brokers"
            return run(options, plan, {"kind": "mock", "name": name})
        from benchmarks.real import KafkaBroker, class_path  # needs Java and Maven

        start = time.monotonic()
        broker = stack.enter_context(KafkaBroker(options.log_folder))
        about = broker.describe() | {"warm_up_rates": [round(rate) for rate in broker.warm_up()]}
        print(f"{about['name']} started and warmed up in {time.monotonic() - start:.0f} s", flush=True)
        plan = replace(plan, open_broker=broker.session, class_path=class_path() if java_program("javac") else None)
        if plan.class_path is None:
            print("no javac: Kafka's own producer takes no part")
        return run(options, plan, about)


def run(options: argparse.Namespace, plan: Plan, broker: dict[str, Any]) -> int:
    machine = describe()
    print(
        f"kbatch {machine['versions']['kbatch-kafka']}, confluent-kafka {machine['versions']['confluent-kafka']}, "
        f"librdkafka {machine['librdkafka']}, msgspec {machine['versions']['msgspec']}, Python {machine['python']}\n"
        f"{machine['processors']} x {machine['processor']}, {machine['system']}, {machine['libc']}, "
        f"load {machine['load']:.1f}, cache line from one processor to another and back "
        f"{machine['line_round_trip_ns'] or 0:.0f} ns\n"
        f"{broker['name']} in its own process, {plan.partitions} partitions, acks=all, idempotent; medians of turns "
        "that alternate"
    )
    document = results.Document(machine, broker, describe_plan(plan), 0.0, [])
    path = options.json or RESULTS / f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}" / f"{broker['kind']}.json"
    start = before = time.monotonic()
    chosen: Sequence[str] = ON_KAFKA if options.kafka else ON_MOCK
    if options.only:
        chosen = [name for each in options.only.split(",") for name in GROUPS.get(each, (each,))]
    for name, measure in MEASURES.items():
        if name not in chosen:
            continue
        patient = time.monotonic() - start < 60 * options.patience
        for section in measure(replace(plan, patient=patient)):
            # the state of the machine, which on a shared one changes within minutes
            section.details |= {"line_round_trip_ns": line_round_trip_ns(), "load": load()}
            before, took = time.monotonic(), time.monotonic() - before
            section.details["seconds"] = round(took, 1)
            if options.kafka:  # the targets are the mock cluster's, but for those against Kafka's own producer
                section.figures = [
                    figure if "Java producer" in figure.name else msgspec.structs.replace(figure, target=None)
                    for figure in section.figures
                ]
            document.sections.append(section)
            document.seconds = time.monotonic() - start
            results.write(path, document)  # what is measured stays, whatever becomes of the rest
            print(show(section), flush=True)
    sections = document.sections
    print(summary(sections))
    written = [path, *plots.draw(path, path.parent)]
    print(f"took {document.seconds:.0f} s; written: {' '.join(map(str, written))}")
    missed = any(figure.reached is False for section in sections for figure in section.figures)
    if options.check and (far := [one.name for section in sections for one in section.figures if one.is_far_off]):
        print(f"missed by a factor of two: {'; '.join(far)}")
        return 1
    return 1 if missed and options.strict else 0


if __name__ == "__main__":
    sys.exit(main())
