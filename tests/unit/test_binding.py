"""What an import says when confluent-kafka's librdkafka cannot be used, each time in a process of its own."""

import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kbatch import _librdkafka

SOURCE = Path(__file__).parents[2] / "src" / "kbatch" / "_librdkafka.pyx"
FUNCTIONS = re.findall(r'symbol\(\s*"(rd_kafka_\w+)"', SOURCE.read_text(encoding="utf-8"))
SUFFIXES = importlib.machinery.EXTENSION_SUFFIXES
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")

pytestmark = pytest.mark.skipif(sys.platform == "win32" or COMPILER is None, reason="platform: no C compiler named cc")


class Outcome:
    def __init__(self, completed: subprocess.CompletedProcess[str]) -> None:
        self.failed = completed.returncode != 0
        self.output = completed.stdout
        self.error = completed.stderr.partition("ImportError: ")[2].strip()
        assert self.failed == bool(self.error), completed.stderr


def attempt(*folders: Path, before: str = "", module: str = "kbatch._librdkafka") -> Outcome:
    """Imports kbatch where `folders` come before the installed packages."""
    code = f"{before}\nimport {module}\nprint(kbatch._librdkafka.path, kbatch._librdkafka.version)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    return Outcome(
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    )


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package confluent_kafka that holds nothing yet and may be found, but not imported."""
    folder = tmp_path / "confluent_kafka"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('kbatch imports the Python side of confluent-kafka')\n")
    return folder


@pytest.fixture
def compiled(package: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes the package's extension: a librdkafka of this version with these functions."""

    def make(version: int, text: str, functions: list[str], suffix: str = SUFFIXES[0]) -> Path:
        own = {
            "rd_kafka_version": f"int rd_kafka_version(void) {{ return {version}; }}",
            "rd_kafka_version_str": f'const char *rd_kafka_version_str(void) {{ return "{text}"; }}',
        }
        lines = [own.get(name, f"void {name}(void) {{}}") for name in functions]
        source = tmp_path / "stand_in.c"
        source.write_text("\n".join([*lines, "int stand_in;"]) + "\n")
        library = package / f"cimpl{suffix}"
        assert COMPILER is not None
        subprocess.run([COMPILER, "-shared", "-fPIC", "-w", "-o", library, source], check=True, timeout=60)
        return library

    return make


def test_the_functions_are_known() -> None:
    assert len(FUNCTIONS) > 30
    assert FUNCTIONS[:2] == ["rd_kafka_version_str", "rd_kafka_version"]
    assert len(set(FUNCTIONS)) == len(FUNCTIONS)


def test_the_installed_one() -> None:
    outcome = attempt()
    assert outcome.output.split() == [_librdkafka.path, _librdkafka.version]
    assert os.path.dirname(_librdkafka.path).endswith("confluent_kafka")


@pytest.mark.parametrize("module", ["kbatch._librdkafka", "kbatch", "kbatch.testing._mock"])
def test_confluent_kafka_is_missing(module: str) -> None:
    outcome = attempt(before="import sys; sys.modules['confluent_kafka'] = None", module=module)
    assert outcome.error == (
        "kbatch needs confluent-kafka, whose librdkafka it uses, but no package named 'confluent_kafka' is installed "
        f"for {sys.executable}; install it with: pip install 'confluent-kafka>=2.12'"
    )


def test_a_module_of_that_name_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "confluent_kafka.py").write_text("")
    assert "no package named 'confluent_kafka' is installed" in attempt(tmp_path).error


def test_no_extension_where_it_should_be(package: Path, tmp_path: Path) -> None:
    error = attempt(tmp_path).error
    assert error.startswith("kbatch found confluent-kafka but could not open its librdkafka; tried:")
    for suffix in SUFFIXES:
        assert f"{package / f'cimpl{suffix}'}: no such file" in error


def test_a_file_that_is_no_library(package: Path, tmp_path: Path) -> None:
    file = package / f"cimpl{SUFFIXES[0]}"
    file.write_text("not a library\n")
    error = attempt(tmp_path).error
    assert error.startswith("kbatch found confluent-kafka but could not open its librdkafka; tried:")
    # The loader's own words, and every other path.
    reason = re.search(rf"{re.escape(str(file))}: (.+)", error)
    assert reason is not None
    assert "no such file" not in reason[1]
    assert error.count("no such file") == len(SUFFIXES) - 1


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="platform: root may read everything")
def test_a_file_that_must_not_be_read(package: Path, tmp_path: Path) -> None:
    file = package / f"cimpl{SUFFIXES[0]}"
    file.write_text("")
    file.chmod(0)
    assert f"{file}: " in attempt(tmp_path).error


def test_a_folder_that_is_no_library(package: Path, tmp_path: Path) -> None:
    (package / f"cimpl{SUFFIXES[0]}").mkdir()
    assert "could not open its librdkafka; tried:" in attempt(tmp_path).error


@pytest.mark.parametrize(("version", "text"), [(0x010902FF, "1.9.2"), (0x020BFFFF, "2.11.255")])
def test_too_old(compiled: Callable[..., Path], tmp_path: Path, version: int, text: str) -> None:
    library = compiled(version, text, FUNCTIONS)
    assert attempt(tmp_path).error == (
        f"kbatch needs librdkafka 2.12.0 or newer, but {library} carries {text}; "
        "install it with: pip install 'confluent-kafka>=2.12'"
    )


@pytest.mark.parametrize("suffix", [SUFFIXES[0], SUFFIXES[-1]])
def test_just_new_enough(compiled: Callable[..., Path], tmp_path: Path, suffix: str) -> None:
    library = compiled(0x020C00FF, "2.12.0", FUNCTIONS, suffix)
    assert attempt(tmp_path).output.split() == [str(library), "2.12.0"]


@pytest.mark.parametrize("missing", [FUNCTIONS[2], FUNCTIONS[len(FUNCTIONS) // 2], FUNCTIONS[-1]])
def test_a_function_is_missing(compiled: Callable[..., Path], tmp_path: Path, missing: str) -> None:
    library = compiled(0x020C00FF, "2.12.0", [name for name in FUNCTIONS if name != missing])
    assert attempt(tmp_path).error == (
        f"librdkafka 2.12.0 of {library} has no function {missing}; kbatch needs 2.12.0 or newer"
    )


def test_a_library_without_librdkafka(compiled: Callable[..., Path], tmp_path: Path) -> None:
    library = compiled(0, "", [])
    assert attempt(tmp_path).error == (
        f"librdkafka of unknown version of {library} has no function rd_kafka_version_str; kbatch needs 2.12.0 or newer"
    )


def test_error_texts() -> None:
    assert _librdkafka.error_text(-192) == ("_MSG_TIMED_OUT", "Local: Message timed out")
    assert _librdkafka.error_text(3)[0] == "UNKNOWN_TOPIC_OR_PART"
    name, text = _librdkafka.error_text(9_999)
    assert name
    assert text
