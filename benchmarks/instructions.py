"""Instructions per envelope, counted by valgrind: `python -m benchmarks.instructions`, or `make bench-instructions`.

Each side sends twice under callgrind, a small count and a larger one; the difference divided by the difference of the
counts leaves out start-up, connecting and loading. All threads of the process are counted, librdkafka's too. Unlike
time, this hardly depends on the machine or on who else uses it; it says nothing about waiting for memory.

The C loop finds its bodies ready, so kbatch is counted twice: with bodies that are bytes already, which is the same
work on both sides, and with messages that it encodes.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.broker import MockBroker
from benchmarks.data import prepare
from benchmarks.library import BUILD
from benchmarks.side_process import command_line
from benchmarks.sides.base import Spec

TARGET = 1.25
POOL = 2_000
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "C loop": ("cloop", {}),
    "kbatch, bodies given as bytes": ("kbatch", {"encoded": True}),
    "kbatch, messages encoded": ("kbatch", {}),
}
_TOTAL = re.compile(r"^(?:summary|totals): (\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Setting:
    batch: int
    window: int
    headers: int
    messages: int
    partitions: int


def count_instructions(command: list[str], messages: int) -> int:
    """Instructions of a side's whole life in which it sends `messages`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind.out"
        run = subprocess.run(
            ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--quiet", *command],
            input=f"{messages}\n",
            capture_output=True,
            text=True,
            timeout=900,
        )
        if run.returncode:
            raise RuntimeError(f"{command[0]} under valgrind ended with status {run.returncode}:\n{run.stderr[-2000:]}")
        total = _TOTAL.search(out.read_text(errors="replace"))
    if total is None:
        raise RuntimeError(f"callgrind wrote no total for {command[0]}")
    return int(total[1])


def per_envelope(side: str, options: dict[str, Any], setting: Setting) -> float:
    data = prepare(BUILD / "small", setting.headers, count=POOL).path
    counts = (max(setting.batch, setting.messages // 10 // setting.batch * setting.batch), setting.messages)
    totals = []
    for messages in counts:
        with MockBroker() as broker:
            topic = broker.new_topic(side, setting.partitions)
            spec = Spec(
                broker.bootstrap_servers, topic, setting.batch, setting.window, setting.headers, 0, POOL, False, options
            )
            totals.append(count_instructions(command_line(side, spec, data), messages))
    return (totals[1] - totals[0]) / (counts[1] - counts[0])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.instructions", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--batch", type=int, default=1_000)
    parser.add_argument("--window", type=int, default=0, help="messages in flight; 0 (default): one batch at a time")
    parser.add_argument("--headers", type=int, default=8)
    parser.add_argument("--messages", type=int, default=30_000, help="the larger of the two counts")
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    if shutil.which("valgrind") is None:
        sys.exit("valgrind is not installed")
    if POOL % options.batch or options.messages % options.batch:
        sys.exit(f"--batch must divide {POOL} and --messages")
    setting = Setting(options.batch, options.window, options.headers, options.messages, options.partitions)
    found: dict[str, list[float]] = {label: [] for label in SIDES}
    for _ in range(options.repeats):
        for label, (side, side_options) in SIDES.items():
            found[label].append(per_envelope(side, side_options, setting))
    loop = median(found["C loop"])
    print(
        f"instructions per envelope, batches of {setting.batch:,}, {setting.headers} headers; target ≤ {TARGET} times"
    )
    for label, counts in found.items():
        middle = median(counts)
        spread = f"({min(counts):,.0f} to {max(counts):,.0f})"
        print(f"  {label:32}{middle:>10,.0f}{spread:>20}{middle / loop:>8.2f} times")
    return 0


if __name__ == "__main__":
    sys.exit(main())
