"""Maps nasty batches, one after the other, and compares each with the reference."""

import argparse
import multiprocessing
import sys
from pathlib import Path

from tests.fuzz.run import run


def main() -> None:
    parser = argparse.ArgumentParser(prog="make fuzz ARGS=…", description=__doc__)
    parser.add_argument("--envelopes", type=int, default=200_000, help="how many at least")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the batch to begin with, to repeat one")
    parser.add_argument("--keep", type=Path, help="write the shortest envelope of each kind to this file")
    options = parser.parse_args()
    # In a process of its own, so that a crash can be told too.
    at = multiprocessing.RawValue("q", options.first)
    process = multiprocessing.get_context("spawn").Process(target=run, args=(options, at))
    process.start()
    process.join()
    if process.exitcode and process.exitcode < 0:
        print(f"signal {-process.exitcode} in --seed {options.seed} --first {at.value}", file=sys.stderr)
    sys.exit(1 if process.exitcode else 0)


if __name__ == "__main__":
    main()
