"""What `make wheel` refuses: wrong contents, what is linked, interpreters that cannot build."""

import io
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tools import wheels
from tools.wheels import CheckError, Interpreter

PACKAGE = [
    "kbatch/__init__.py",
    "kbatch/_fastmap.pyi",
    "kbatch/_fastmap.pyx",
    "kbatch/native/map.pxi",
    "kbatch/native/platform.h",
    "kbatch/_librdkafka.pxd",
    "kbatch/py.typed",
    "kbatch/testing/_mock.pyx",
    "pytest_kbatch.py",
]
SUFFIX = ".cpython-312-x86_64-linux-gnu.so"
INFO = "kbatch_kafka-1.2.dist-info"
WHEEL = [
    "kbatch/__init__.py",
    "kbatch/_fastmap.pyi",
    f"kbatch/_fastmap{SUFFIX}",
    "kbatch/py.typed",
    f"kbatch/testing/_mock{SUFFIX}",
    "pytest_kbatch.py",
    *(f"{INFO}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt")),
    f"{INFO}/licenses/LICENSE",
]


def test_the_contents_of_a_wheel() -> None:
    wheels.check_wheel(WHEEL, PACKAGE, SUFFIX, "1.2")


@pytest.mark.parametrize("missing", WHEEL)
def test_a_wheel_without(missing: str) -> None:
    with pytest.raises(CheckError, match=f"missing: {missing}"):
        wheels.check_wheel([name for name in WHEEL if name != missing], PACKAGE, SUFFIX, "1.2")


@pytest.mark.parametrize(
    "extra",
    [
        "kbatch/_fastmap.c",
        "kbatch/_fastmap.pyx",
        "kbatch/native/platform.h",
        "kbatch/_fastmap.cpython-311-x86_64-linux-gnu.so",
        "tests/conftest.py",
        "benchmarks/run.py",
        "kbatch_kafka.libs/librdkafka.so.1",
    ],
)
def test_a_wheel_with(extra: str) -> None:
    with pytest.raises(CheckError, match=f"should not be there: {extra}"):
        wheels.check_wheel([*WHEEL, extra], PACKAGE, SUFFIX, "1.2")


def test_a_file_that_is_in_a_wheel_twice() -> None:
    with pytest.raises(CheckError, match=r"twice: kbatch/py\.typed"):
        wheels.check_wheel([*WHEEL, "kbatch/py.typed"], PACKAGE, SUFFIX, "1.2")


SOURCES = [
    "src/kbatch/__init__.py",
    "tests/conftest.py",
    "LICENSE",
    ".gitignore",
    ".github/workflows/ci.yml",
    ".ci/run",
]
EGG_INFO = ("PKG-INFO", "SOURCES.txt", "dependency_links.txt", "entry_points.txt", "requires.txt", "top_level.txt")
SDIST = [
    f"kbatch_kafka-1.2/{name}"
    for name in (*SOURCES[:3], "PKG-INFO", "setup.cfg", *(f"src/kbatch_kafka.egg-info/{name}" for name in EGG_INFO))
]


def test_an_sdist_is_all_but_the_dot_files() -> None:
    wheels.check_sdist(SDIST, SOURCES, "1.2")
    with pytest.raises(CheckError, match=r"missing: kbatch_kafka-1\.2/tests/conftest\.py"):
        wheels.check_sdist([name for name in SDIST if "conftest" not in name], SOURCES, "1.2")
    with pytest.raises(CheckError, match=r"should not be there: kbatch_kafka-1.2/src/kbatch/_fastmap\.c$"):
        wheels.check_sdist([*SDIST, "kbatch_kafka-1.2/src/kbatch/_fastmap.c"], SOURCES, "1.2")


def test_a_wheel_links_nothing_but_libc() -> None:
    wheels.check_libraries({"a.so": ["libc.so.6", "libpthread.so.0", "ld-linux-aarch64.so.1"], "b.so": []})
    with pytest.raises(CheckError, match=r"b\.so links librdkafka\.so\.1, libz\.so\.1"):
        wheels.check_libraries({"a.so": ["libc.so.6"], "b.so": ["libz.so.1", "libc.so.6", "librdkafka.so.1"]})
    with pytest.raises(CheckError, match="no compiled module"):
        wheels.check_libraries({})


def interpreter(path: str = "python", version: tuple[int, int, int] = (3, 12, 1), **changes: object) -> Interpreter:
    usual: dict[str, object] = {
        "final": True,
        "implementation": "CPython",
        "free_threaded": False,
        "suffix": SUFFIX,
        "headers": True,
        "ensurepip": True,
    }
    return Interpreter(path, version, **{**usual, **changes})  # type: ignore[arg-type]


def test_each_version_once_the_first_that_can_build() -> None:
    found = [
        interpreter("a", (3, 13, 0)),
        interpreter("b", (3, 12, 4), headers=False),
        interpreter("c", (3, 12, 1)),
        interpreter("d", (3, 12, 9)),
        interpreter("e", (3, 9, 20)),
        interpreter("f", (3, 10, 16), implementation="PyPy"),
        interpreter("g", (3, 11, 2), ensurepip=False),
        interpreter("h", (3, 14, 0), free_threaded=True),
        interpreter("i", (3, 14, 0)),
    ]
    usable, unusable = wheels.choose(found)
    assert [(one.path, one.tag) for one in usable] == [("c", "cp312"), ("a", "cp313"), ("i", "cp314"), ("h", "cp314t")]
    assert [(one.path, one.lacks) for one in unusable] == [
        ("g", "it cannot make environments (ensurepip or venv is missing)")
    ]


def test_why_an_interpreter_is_left_out() -> None:
    assert interpreter().lacks == ""
    assert "headers" in interpreter(headers=False).lacks
    assert "pre-release" in interpreter(final=False).lacks
    assert "no wheels" in interpreter(version=(3, 13, 0), free_threaded=True).lacks
    assert interpreter(version=(3, 14, 0), free_threaded=True).lacks == ""


def test_this_interpreter_is_found() -> None:
    found = wheels.probe(sys.executable)
    assert found is not None
    assert found.version == sys.version_info[:3]
    assert sys.executable in wheels.candidates()


def test_what_is_no_interpreter_is_passed_over(tmp_path: Path) -> None:
    assert wheels.probe(str(tmp_path / "missing")) is None
    script = tmp_path / "python3.12"  # as pyenv's shims for versions that are not selected
    script.write_text("#!/bin/sh\nexit 127\n")
    script.chmod(0o755)
    assert wheels.probe(str(script)) is None


def test_neither_switches_nor_paths_reach_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SANITIZE", "PYTHONPATH"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("PYTHON_GIL", raising=False)
    assert not {"SANITIZE", "PYTHONPATH"} & wheels.environment().keys()
    assert "PYTHON_GIL" not in wheels.environment(interpreter())
    assert wheels.environment(interpreter(version=(3, 14, 0), free_threaded=True))["PYTHON_GIL"] == "1"


def test_the_package_is_read_from_the_sdist(tmp_path: Path) -> None:
    sdist = tmp_path / "s.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for name in (
            *("src/kbatch/__init__.py", "src/kbatch/aio/__init__.py", "src/pytest_kbatch.py"),
            *("setup.py", "src/kbatch_kafka.egg-info/x"),
        ):
            archive.addfile(tarfile.TarInfo(f"kbatch_kafka-1.2/{name}"), io.BytesIO())
    assert wheels.package_files(sdist, "1.2") == ["kbatch/__init__.py", "kbatch/aio/__init__.py", "pytest_kbatch.py"]


def test_one_failure_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    def work(one: Interpreter) -> str:
        if one.tag == "cp311":
            raise CheckError("no good")
        return one.path

    three = [interpreter("a", (3, 10, 0)), interpreter("b", (3, 11, 0)), interpreter("c", (3, 12, 0))]
    assert wheels.for_each(three, 2, work) == {"cp310": "a", "cp312": "c"}
    assert "FAILED: no good" in capsys.readouterr().out


def test_a_zip_of_nothing_is_no_wheel(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive, pytest.raises(CheckError, match="missing"):
        wheels.check_wheel(archive.namelist(), PACKAGE, SUFFIX, "1.2")
