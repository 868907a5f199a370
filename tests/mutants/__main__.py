"""`python -m tests.mutants [WORD ...]`: plants the defects whose names contain a word (all, if none is given), one at a
time, in a copy of the repository, builds it and runs the suite. Fails if the suite does not.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from .planted import MUTANTS, Mutant

REPOSITORY = Path(__file__).resolve().parents[2]
COPY = REPOSITORY / "build" / "mutants"
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


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(COPY / "src"), "HYPOTHESIS_PROFILE": "quick", **environment}
    with subprocess.Popen(
        command, cwd=COPY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            output, _ = process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:  # a thread that hangs keeps pytest from ending
            process.kill()
            output, _ = process.communicate()
            return subprocess.CompletedProcess(command, 1 if "\nFAILED " in output else -signal.SIGKILL, output)
    return subprocess.CompletedProcess(command, process.returncode, output)


def copy_repository() -> None:
    shutil.rmtree(COPY, ignore_errors=True)
    COPY.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_*.c", "*.egg-info", "results")
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, COPY / name, ignore=ignore)
        elif source.exists():
            shutil.copy2(source, COPY / name)


def build() -> str | None:
    """Compiles what is there; the compiler's words if it refuses."""
    os.utime(COPY / "src/kbatch/_fastmap.pyx")  # its time stands for those of the files that it includes
    built = run(BUILD, QUICK="1")
    return built.stdout if built.returncode else None


def is_native(mutant: Mutant) -> bool:
    return not mutant.file.endswith(".py")


def find(mutant: Mutant) -> str | None:
    """The test that finds the defect, or None."""
    for tests in (mutant.tests.split(), ["tests", "--ignore=tests/kafka"]):  # Kafka is not in the copy
        result = run([*TEST, *tests])
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


def main(words: list[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    chosen.sort(key=is_native)  # one build does for all of the others
    copy_repository()
    if refusal := build():
        raise SystemExit(refusal)
    missed = []
    for mutant in chosen:
        start = time.monotonic()
        file = COPY / "src" / "kbatch" / mutant.file
        original = file.read_text(encoding="utf-8")
        assert original.count(mutant.old) == 1, mutant.name
        file.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
        refusal = build() if is_native(mutant) else None
        found = "DOES NOT COMPILE\n" + refusal if refusal else find(mutant)
        if refusal or found is None:
            missed.append(mutant.name)
        print(f"{mutant.name}: {found or 'NOT FOUND'} ({time.monotonic() - start:.0f} s)", flush=True)
        file.write_text(original, encoding="utf-8")
    print(f"{len(chosen) - len(missed)} of {len(chosen)} planted defects found")
    return bool(missed)


sys.exit(main(sys.argv[1:]))
