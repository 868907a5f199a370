"""docs/testing.md shows examples/testing word for word, and each of these tests passes."""

import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kbatch.testing import MemoryProducer

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "testing"
PAGE = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def functions_of(module: ModuleType) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in vars(module).items() if name.startswith("test_"))


def test_the_page_shows_each_example() -> None:
    shown = re.findall(r"^<!-- example: (\w+) -->\n```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(shown) == PAGE.count("<!-- ")
    assert dict(shown) == {path.stem: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}


@pytest.mark.filterwarnings("default")  # kafka-python has some of its own
@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_each_example_passes(name: str, kafka_cluster: Any) -> None:
    found = list(functions_of(load(EXAMPLES / f"{name}.py")))
    assert found
    for _, test in found:
        test(*([kafka_cluster] if inspect.signature(test).parameters else []))


def points(text: str) -> list[str]:
    """The points of a list, without marks and line ends."""
    found = re.findall(r"^- (.*\n(?:  .+\n)*)", text, re.MULTILINE)
    return [re.sub(r"\s+", " ", point.replace("`", "")).strip() for point in found]


def test_the_page_and_the_docstring_name_the_same_differences() -> None:
    page = PAGE.partition("## What differs from a Producer\n")[2].partition("\n## ")[0]
    docstring = inspect.getdoc(MemoryProducer) or ""
    differences = points(docstring.partition("What differs from")[2])
    assert len(differences) > 5
    assert points(page) == differences
