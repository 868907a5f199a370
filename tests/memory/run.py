"""Runs one scenario while each of Python's allocations fails in turn, in a process of its own: it may crash or hang."""

import argparse
import faulthandler
import gc
import logging
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from kbatch import _fastmap
from kbatch.testing import MockCluster

from .hooks import CALLER, OTHERS, PythonHook
from .scenarios import SCENARIOS, TOPIC, World

HANG_S = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("threads", choices=["caller", "others"])
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--last", type=int, default=100_000)
    parser.add_argument("--each", type=int, default=1, help="fail each nth only")
    options = parser.parse_args()
    faulthandler.enable()
    logging.getLogger("kbatch").setLevel(logging.CRITICAL + 1)
    unraisable: list[Any] = []
    sys.unraisablehook = lambda lost: unraisable.append((lost.exc_value, lost.object, lost.exc_traceback))
    failed = 0
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, MockCluster() as cluster:
        cluster.create_topic(TOPIC, partitions=1)
        hook = PythonHook(Path(folder), {"caller": CALLER, "others": OTHERS}[options.threads])
        world = World(cluster)
        step = SCENARIOS[options.scenario](world)
        hook.nth = options.first
        while hook.nth <= options.last:
            print(f"{options.scenario}, {options.threads}: allocation {hook.nth}", flush=True)
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            failures = hook.failures()
            try:
                step(hook)
            except AssertionError:
                faulthandler.dump_traceback(all_threads=True)
                raise
            if hook.nth % 50 == 0:
                gc.collect()
            ours = [lost for lost in unraisable if concerns_kbatch(lost)]
            if ours:
                for error, thing, tb in ours:
                    print("an exception was lost:", repr(error), "in", repr(thing), file=sys.stderr)
                    traceback.print_tb(tb)
                sys.exit(1)
            unraisable.clear()
            if hook.failures() == failures:
                break
            failed += 1
            hook.nth += options.each
        faulthandler.cancel_dump_traceback_later()
        world.check_wire()
        world.end()
        assert _fastmap.pinned_buffers() == 0
    print(f"passed: {options.scenario}, {options.threads}: {failed} allocations in {time.monotonic() - begin:.1f} s")


def concerns_kbatch(lost: tuple[Any, Any, Any]) -> bool:
    _, thing, tb = lost
    while tb is not None:
        if "/kbatch/" in tb.tb_frame.f_code.co_filename:
            return True
        tb = tb.tb_next
    return "kbatch._" in str(thing)  # a function of ours; a thread of ours may fail in CPython's threading


if __name__ == "__main__":
    main()
