"""Has a change made kbatch slower? `make bench-compare BASE=origin/main`; `python -m benchmarks.compare --base HEAD~1`.

pytest-benchmark runs the micro-benchmarks on a build of the base and on the working tree's, in turns on this machine.
The benchmarks themselves are the working tree's both times. Each run has the C loop among its benchmarks, and what is
compared is the ratio of a benchmark to it, so that a machine that changes its speed changes both. A ratio that grew by
more than 15 % fails.

    python -m benchmarks.compare base.json head.json      compares what pytest-benchmark wrote earlier

Of all rounds of all runs of a side the fastest counts. What disturbs a round (another process, another virtual machine)
only ever makes it longer, so the minimum converges where the median follows the load: on a busy 2-core machine the
C loop's medians of 40 rounds went from 44 to 69 ms, its CPU time's minima from 15.6 to 18.5. For the same reason a loss
is not believed at once: up to `--most-runs` runs are made, and the minimum of what is not slower comes down in them.

Benchmarks that send take wall-clock time and are compared with that of the C loop. The others only compute, and are
compared with the C loop's CPU time, which is steadier.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BASE_TREE = ROOT / "build" / "base"
MOST = 1.15
#: which yardstick belongs to a group of benchmarks
YARDSTICKS = {"sending": "test_c_loop", "computing": "test_c_loop_cpu"}
SWITCHES = {"DEBUG", "SANITIZE", "COVERAGE", "ANNOTATE", "QUICK"}

Run = Mapping[str, Any]  # one file of pytest-benchmark's


class ComparisonError(Exception):
    """Why these runs cannot be compared."""


@dataclass(frozen=True)
class Change:
    name: str
    base: float
    head: float

    @property
    def factor(self) -> float:
        return self.head / self.base


def ratios(runs: Sequence[Run]) -> dict[str, float]:
    """Of each benchmark that is kbatch's: its fastest round, divided by the fastest of its yardstick."""
    fastest: dict[str, float] = {}
    groups: dict[str, str | None] = {}
    for run in runs:
        for benchmark in run["benchmarks"]:
            name = benchmark["name"]
            fastest[name] = min(fastest.get(name, float("inf")), benchmark["stats"]["min"])
            groups[name] = benchmark["group"]
    missing = [name for name in YARDSTICKS.values() if not fastest.get(name)]
    if missing:
        raise ComparisonError(f"without the C loop there is nothing to compare with: no {', '.join(missing)}")
    return {
        name: seconds / fastest[YARDSTICKS[group]]
        for name, seconds in fastest.items()
        if (group := groups[name]) in YARDSTICKS and name not in YARDSTICKS.values()
    }


def compare(base: Sequence[Run], head: Sequence[Run]) -> list[Change]:
    """The benchmarks that both have."""
    before, after = ratios(base), ratios(head)
    carried = {run["kbatch"]["librdkafka"] for run in [*base, *head]}
    if len(carried) != 1:
        raise ComparisonError(f"measured with different librdkafkas: {', '.join(sorted(carried))}")
    folders = [{run["kbatch"]["folder"] for run in side} for side in (base, head)]
    if any(len(side) != 1 for side in folders):
        raise ComparisonError("the runs of a side measured different builds of kbatch")
    if folders[0] == folders[1]:
        raise ComparisonError(f"both sides measured {folders[0].pop()}")
    changes = [Change(name, before[name], after[name]) for name in after if name in before]
    if not changes:
        raise ComparisonError("no benchmark is on both sides")
    return changes


def losses(changes: Iterable[Change], most: float) -> list[Change]:
    return [change for change in changes if change.factor > most]


def table(changes: Iterable[Change], most: float) -> str:
    lines = [f"{'of the C loop, per 10,000 messages':52}{'base':>12}{'head':>12}{'change':>10}"]
    for change in sorted(changes, key=lambda one: -one.factor):
        verdict = "  LOSS" if change.factor > most else ""
        lines.append(f"{change.name:52}{change.base:12.3g}{change.head:12.3g}{change.factor - 1:+10.1%}{verdict}")
    return "\n".join(lines)


# --- measuring ------------------------------------------------------------------------------------------------------


def build_base(revision: str) -> Path:
    """Compiles that revision in a tree of its own; the folder to import it from."""
    environment = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    subprocess.run(["rm", "-rf", BASE_TREE], check=True)
    BASE_TREE.mkdir(parents=True)
    with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
        subprocess.run(["git", "-C", ROOT, "archive", "-o", archive.name, revision], check=True)
        subprocess.run(["tar", "-xf", archive.name, "-C", BASE_TREE], check=True)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--parallel", str(os.cpu_count() or 1)]
    subprocess.run(command, cwd=BASE_TREE, env=environment, check=True, timeout=900)
    return BASE_TREE / "src"


def measure(sources: Path, pytest_arguments: Sequence[str]) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "pytest", "benchmarks/micro", "-q", "-p", "no:cacheprovider"]
        command += ["--benchmark-max-time=0.3", f"--benchmark-json={result}", *pytest_arguments]
        environment = {**os.environ, "PYTHONPATH": os.fspath(sources)}
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        # A benchmark of something new fails on the base; what is left of both is compared.
        if not result.exists() or not result.stat().st_size:
            raise ComparisonError(f"pytest wrote no results for {sources}:\n{run.stdout}{run.stderr}")
        measured: Run = json.loads(result.read_text(encoding="utf-8"))
    if Path(measured["kbatch"]["folder"]) != sources / "kbatch":
        raise ComparisonError(f"{measured['kbatch']['folder']} was measured, not {sources}")
    return measured


def measure_in_turns(
    base: Path, head: Path, runs: int, most_runs: int, most: float, pytest_arguments: Sequence[str]
) -> list[Change]:
    """`runs` runs of each side, first one then the other, and more while there is a loss to be doubted."""
    found: dict[Path, list[Run]] = {base: [], head: []}
    for turn in range(most_runs):
        for side in (base, head) if turn % 2 == 0 else (head, base):
            found[side].append(measure(side, pytest_arguments))
        if turn + 1 >= runs:
            changes = compare(found[base], found[head])
            lost = losses(changes, most)
            print(f"after {turn + 1} runs of each: {len(lost)} of {len(changes)} seem to have lost", flush=True)
            if not lost:
                break
    return changes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="base.json head.json: compare these, measure nothing")
    parser.add_argument("--base", metavar="REVISION", help="measure this revision and the working tree")
    parser.add_argument("--runs", type=int, default=2, help="of each side, at least (%(default)s)")
    parser.add_argument(
        "--most-runs", type=int, default=6, help="of each side, if there seems to be a loss (%(default)s)"
    )
    parser.add_argument("--most", type=float, default=MOST, help="by how much a ratio may grow (%(default)s)")
    parser.add_argument("-k", dest="select", help="only these benchmarks, and the C loop, as in pytest -k")
    options = parser.parse_args(arguments)
    if bool(options.base) == bool(options.files) or len(options.files) not in (0, 2):
        parser.error("give --base, or two files")
    if not 1 <= options.runs <= options.most_runs:
        parser.error("--runs must be at least 1 and at most --most-runs")
    try:
        if options.files:
            base, head = (json.loads(path.read_text(encoding="utf-8")) for path in options.files)
            changes = compare([base], [head])
        else:
            selected = ["-k", f"c_loop or ({options.select})"] if options.select else []
            changes = measure_in_turns(
                build_base(options.base), ROOT / "src", options.runs, options.most_runs, options.most, selected
            )
    except ComparisonError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(changes, options.most))
    return 1 if losses(changes, options.most) else 0


if __name__ == "__main__":
    sys.exit(main())
