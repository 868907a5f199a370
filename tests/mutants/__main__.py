"""`python -m tests.mutants [WORD ...]`: plants the defects whose names contain a word (all, if none is given), one at a
time, in a copy of the repository, builds it and runs the suite. Fails if the suite does not. `--jobs` copies at a time.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue

from .places import find
from .planted import MUTANTS, Mutant

REPOSITORY = Path(__file__).resolve().parents[2]
COPIES = REPOSITORY / "build" / "mutants"
END_S = 1500
COPIED = (
    "pyproject.toml",
    "setup.py",
    *("README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "MANIFEST.in", "Makefile"),
    *(".ci", ".github", "benchmarks", "docs", "examples", "requirements", "src", "tests", "tools"),
)
BUILD = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
# A test that hangs has found the defect, too.
TEST = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", "--timeout=60"]


def run(copy: Path, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "HYPOTHESIS_PROFILE": "quick", **environment}
    with subprocess.Popen(
        command, cwd=copy, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            output, _ = process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:  # a thread that hangs keeps pytest from ending
            process.kill()
            output, _ = process.communicate()
            return subprocess.CompletedProcess(command, 1 if "\nFAILED " in output else -signal.SIGKILL, output)
    return subprocess.CompletedProcess(command, process.returncode, output)


def copy_repository(copy: Path) -> None:
    copy.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_*.c", "*.egg-info", "results")
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=ignore)
        elif source.exists():
            shutil.copy2(source, copy / name)


def build(copy: Path) -> str | None:
    """Compiles what is there; the compiler's words if it refuses."""
    os.utime(copy / "src/kbatch/_fastmap.pyx")  # its time stands for those of the files that it includes
    built = run(copy, BUILD, QUICK="1")
    return built.stdout if built.returncode else None


def plant(copy: Path, mutant: Mutant) -> tuple[Path, str]:
    """Writes the defect into the copy; the file and what was in it before."""
    ((file, at),) = find(copy / "src", mutant.where, mutant.old)
    original = file.read_text(encoding="utf-8")
    file.write_text(original[:at] + mutant.new + original[at + len(mutant.old) :], encoding="utf-8")
    return file, original


def test(copy: Path, mutant: Mutant) -> str | None:
    """The test that finds the defect, or None."""
    for tests in (mutant.tests.split(), ["tests", "--ignore=tests/kafka"]):  # Kafka is not in the copy
        result = run(copy, [*TEST, *tests])
        if result.returncode == 1:
            failed = [line for line in result.stdout.splitlines() if line.startswith(("FAILED tests", "ERROR tests"))]
            first = failed[0].split(" - ")[0]
            if "::" not in first:  # a file that cannot be imported finds nothing
                raise SystemExit(f"the tests did not run:\n{result.stdout}")
            return first
        if result.returncode < 0:
            return f"killed by {signal.Signals(-result.returncode).name}"
        if result.returncode:
            raise SystemExit(f"the tests did not run:\n{result.stdout}")
    return None


def is_found(copy: Path, mutant: Mutant) -> bool:
    start = time.monotonic()
    file, original = plant(copy, mutant)
    refusal = None if file.suffix == ".py" else build(copy)
    found = "DOES NOT COMPILE\n" + refusal if refusal else test(copy, mutant)
    print(f"{mutant.name}: {found or 'NOT FOUND'} ({time.monotonic() - start:.0f} s)", flush=True)
    file.write_text(original, encoding="utf-8")
    return not refusal and found is not None


def main() -> bool:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="copies at a time")
    options = parser.parse_args()
    chosen = [one for one in MUTANTS if not options.words or any(word in one.name for word in options.words)]
    # One build does for those in Python, so they come first.
    chosen.sort(key=lambda one: find(REPOSITORY / "src", one.where, one.old)[0][0].suffix != ".py")
    waiting: SimpleQueue[Mutant] = SimpleQueue()
    for mutant in chosen:
        waiting.put(mutant)
    shutil.rmtree(COPIES, ignore_errors=True)
    first = COPIES / "0"
    copy_repository(first)
    if refusal := build(first):
        raise SystemExit(refusal)
    copies = [first, *(COPIES / str(job) for job in range(1, options.jobs))]
    for copy in copies[1:]:
        shutil.copytree(first, copy)

    def work(copy: Path) -> list[bool]:
        found = []
        while True:
            try:
                mutant = waiting.get_nowait()
            except Empty:
                return found
            found.append(is_found(copy, mutant))

    with ThreadPoolExecutor(options.jobs) as pool:
        found = [one for ones in pool.map(work, copies) for one in ones]
    print(f"{sum(found)} of {len(chosen)} planted defects found")
    return len(chosen) > sum(found)


sys.exit(main())
