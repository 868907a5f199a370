"""Builds the sdist and, from it, a wheel for each CPython on this machine; checks them; tests what they install.

`make wheel`, or nox in an environment with the dependency group `build`. The results are in dist/. What follows `--` is
pytest's: `nox -j 2 -- tests/unit`.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import nox

# As cibuildwheel builds them: "cp314t-*" is 3.14t.
BUILDS = nox.project.load_toml("pyproject.toml")["tool"]["cibuildwheel"]["build"].split()
CPYTHONS = [f"{build[2]}.{build[3:].removesuffix('-*')}" for build in BUILDS]
# What the tests have beside the wheel: no `src`, nor anything else that they could import kbatch from.
TEST_FILES = ("tests", "examples", "pyproject.toml", "LICENSE")
# tests/kafka has a Kafka of its own to build: it tests the protocol, which no interpreter changes.
ALL_TESTS = ("tests", "--ignore=tests/kafka")
# What was installed, and what some CPythons have and others have not: they skip it.
INSTALLED = (
    "tests/unit/test_installed.py",
    "tests/unit/test_inbox_connections.py",
    "tests/unit/test_outbox_add.py",
    "tests/unit/test_outbox_aiosqlite.py",
    "tests/unit/test_sender_callbacks.py",
)
# CPythons of whose wheels only that is tested.
TESTED = os.environ.get("TESTED_CPYTHON", "").split()
WORKERS = "4"  # most tests wait for something
DIST = Path("dist").absolute()
# The tools of the checks are beside nox. pyenv shows on PATH only the versions that are selected.
PYENV = Path(os.environ.get("PYENV_ROOT") or "~/.pyenv").expanduser()
PATH = [os.path.dirname(sys.executable), os.environ.get("PATH", ""), *map(str, sorted(PYENV.glob("versions/*/bin")))]
os.environ["PATH"] = os.pathsep.join(PATH)

nox.needs_version = ">=2026.10"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False  # in CI neither: each CPython that is here is built for


@nox.session(python=False)
def sdist(session: nox.Session) -> None:
    """Build the sdist; it holds what git knows but the dot files."""
    shutil.rmtree(DIST, ignore_errors=True)
    if Path(".git").exists():
        session.run("check-sdist", "--no-isolation", "--installer", "pip", silent=True)
    else:
        session.warn("this is no git checkout: the sdist is NOT compared with the sources")
    session.run("python", "-m", "build", "--no-isolation", "--sdist", "--outdir", str(DIST), silent=True)
    session.run("twine", "check", "--strict", *map(str, DIST.iterdir()))


@nox.session(python=CPYTHONS, requires=["sdist"], allow_parallel=True)
def wheel(session: nox.Session) -> None:
    """Build a wheel from the sdist, check it, install it, test it from a copy that has no `src` beside it."""
    assert isinstance(session.python, str)
    session.env["PYTHON_GIL"] = "1"  # on from the start, so that nothing warns that an import has turned it on
    (source,) = DIST.glob("*.tar.gz")
    with tempfile.TemporaryDirectory(prefix="kbatch-wheel-") as folder:
        built = build(session, source, Path(folder))
        check(session, built, source, Path(folder))
        test = "test-free-threaded" if session.python.endswith("t") else "test"
        session.install("--require-hashes", "-r", "requirements/run.txt", "-r", f"requirements/{test}.txt")
        session.install("--no-index", f"{built}[cli]")
        copy = Path(folder, "copy")
        copy.mkdir()
        for name in TEST_FILES:
            if Path(name).is_dir():
                shutil.copytree(name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(name, copy / name)
        with session.chdir(copy):
            tests = INSTALLED if session.python in TESTED else session.posargs or ALL_TESTS
            # Each worker imports all tests: what this has compiled, they read.
            session.env["PYTHONDONTWRITEBYTECODE"] = ""
            session.run("python", "-m", "pytest", "--collect-only", "-qq", *tests, silent=True)
            options = ("-p", "no:cacheprovider", "-n", WORKERS, "--dist", "worksteal")
            session.run("python", "-m", "pytest", *options, *tests)


def build(session: nox.Session, source: Path, folder: Path) -> Path:
    """In an environment of its own, from pyproject.toml's build-system alone. The wheel has its tag afterwards."""
    session.install("--require-hashes", "-r", "requirements/pip.txt")  # an old one knows no constraints of builds
    command = ["python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", f"{folder}"]
    session.run(*command, "--build-constraint", "requirements/compile.txt", f"{source}")
    (built,) = folder.glob("*.whl")
    if sys.platform != "linux":
        return Path(shutil.copy2(built, DIST))
    session.run("auditwheel", "repair", "--wheel-dir", f"{DIST}", f"{built}", external=True)
    (repaired,) = DIST.glob(f"*-cp{str(session.python).replace('.', '')}-manylinux*.whl")
    return repaired


def check(session: nox.Session, built: Path, source: Path, folder: Path) -> None:
    """The sdist's src/ with a compiled module in place of each .pyx is what the wheel must hold."""
    shutil.unpack_archive(source, folder)
    (package,) = folder.glob("*/src")
    code = "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"
    suffix = str(session.run("python", "-c", code, silent=True)).strip()
    for module in package.rglob("*.pyx"):
        module.rename(module.with_suffix(suffix))
    session.run("check-wheel-contents", "--src-dir", f"{package}", f"{built}", external=True)
    session.run("twine", "check", "--strict", f"{built}", external=True)
