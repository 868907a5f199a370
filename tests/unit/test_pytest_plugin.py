"""The pytest plugin is loaded in every project: it must cost nothing there, and break nothing."""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import kbatch

SOURCES = str(Path(kbatch.__file__).parents[1])


def run_pytest(folder: Path, test: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(test)
    path = os.pathsep.join(map(str, (*paths, SOURCES)))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_it.py"]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_the_entry_point_is_outside_the_package() -> None:
    (entry_point,) = {point.value for point in entry_points(group="pytest11", name="kbatch")}
    assert entry_point == "pytest_kbatch"


def test_a_run_that_asks_for_no_fixture_imports_nothing(tmp_path: Path) -> None:
    test = """
import sys

def test_nothing():
    assert "pytest_kbatch" in sys.modules
    assert not {"kbatch", "confluent_kafka", "msgspec"} & sys.modules.keys()
"""
    run = run_pytest(tmp_path, test)
    assert run.returncode == 0, run.stdout


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder with a confluent_kafka that cannot be imported."""
    folder = tmp_path / "broken"
    (folder / "confluent_kafka").mkdir(parents=True)
    (folder / "confluent_kafka" / "__init__.py").write_text("raise ImportError('librdkafka.so.1: no such file')")
    return folder


def test_a_broken_confluent_kafka_fails_only_who_asks_for_the_fixture(tmp_path: Path, broken: Path) -> None:
    test = """
def test_nothing():
    pass

def test_something(kafka_cluster):
    pass
"""
    run = run_pytest(tmp_path, test, broken)
    assert "1 passed, 1 error" in run.stdout, run.stdout
    assert "ImportError: kbatch found confluent-kafka" in run.stdout
