"""docs/promises.md: each promise still stands, word for word, in its source, and each test that it names is there."""

import ast
import functools
import importlib
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

import kbatch
import kbatch.aio
import kbatch.testing
import kbatch.testing.aio
from kbatch.cli._app import app
from kbatch.testing import compliance

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
# What stands for words that are left out, or holds words that the source does not have.
GAP = re.compile(r"…|\[[^\]]*\]")


class Source(NamedTuple):
    """A file and a heading of it; or names that have docstrings; or a command."""

    place: str
    part: str


class Row(NamedTuple):
    source: Source
    promise: str
    tests: tuple[str, ...]


def rows() -> Iterator[Row]:
    place = part = ""
    for line in PAGE.splitlines():
        if line.startswith("## "):
            place, part = line[3:], ""
        elif line.startswith("### "):
            part = line[4:].replace("`", "")
        elif line.startswith("|") and line not in ("| promise | tests |", "| --- | --- |"):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            assert len(cells) == 2, line
            yield Row(Source(place, part), cells[0], tuple(re.findall(r"`([^`]*)`", cells[1])))


ROWS = list(rows())
SOURCES = list(dict.fromkeys(row.source for row in ROWS))


def words(text: str) -> str:
    """A text without marks and line ends."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(re.sub("[`*]", "", text).replace("|", " ").split())


# -- the sources


@functools.cache
def sections(path: str) -> dict[str, str]:
    """What stands under each heading of a page, up to the next one; the first has what is above all of them, too."""
    found: dict[str, str] = {}
    title, fenced = "", False
    for line in (ROOT / path).read_text(encoding="utf-8").splitlines():
        fenced ^= line.lstrip().startswith("```")
        heading = None if fenced else re.match(r"#+ (.*)", line)
        if heading is None:
            found[title] = found.get(title, "") + line + "\n"
        else:
            title = words(heading[1])
            assert title not in found, f"{path} has two headings {title!r}"
            found[title] = ""
    return found


def named(name: str) -> object:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise LookupError(name)


def docstrings(name: str) -> Iterator[str]:
    """Of what is named, and of its public members."""
    found = named(name)
    yield inspect.getdoc(found) or ""
    if inspect.isclass(found):
        for base in found.__mro__:
            if base.__module__.startswith("kbatch"):
                for member, value in vars(base).items():
                    is_public = not member.startswith("_") or member in ("__await__", "__len__")
                    if is_public and hasattr(value, "__get__"):  # no plain value
                        yield inspect.getdoc(value) or ""


def helps(command: str) -> Iterator[str]:
    """What ``--help`` shows."""
    found = typer.main.get_command(app)
    for name in command.split()[1:]:
        found = found.commands[name]  # type: ignore[attr-defined]
    yield found.help or ""
    for option in found.params:
        yield getattr(option, "help", None) or ""


@functools.cache
def text_of(source: Source) -> str:
    if source.place == "Docstrings":
        return words("\n".join(text for name in source.part.split(", ") for text in docstrings(name)))
    if source.place == "Help of the command line":
        return words("\n".join(helps(source.part)))
    return words(sections(source.place)[source.part])


def is_in(promise: str, text: str) -> bool:
    """Whether its pieces stand there, in this order."""
    place = 0
    for piece in filter(None, map(words, GAP.split(promise))):
        place = text.find(piece, place)
        if place < 0:
            return False
        place += len(piece)
    return place > 0


# -- the tests


@functools.cache
def names_of_tests(path: str) -> frozenset[str]:
    found = set()
    for node in ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
            for base in node.bases:  # a suite that is for others, too
                suite = getattr(compliance, ast.unparse(base), object)
                found |= {f"{node.name}::{name}" for name in dir(suite)}
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
    return frozenset(name for name in found if re.search(r"(^|::)test_\w+$", name))


def is_a_test(name: str) -> bool:
    path, _, test = name.partition("::")
    return (ROOT / "tests" / path).is_file() and test in names_of_tests(path)


# -- the page


@pytest.mark.parametrize(
    ("promise", "stands"),
    [
        ("`acks=0` is refused", True),
        ("[acks=1] warns … of loss", True),
        ("warns of losses", False),
        ("of loss … warns", False),
        ("acks=0 is accepted", False),
        ("… [nothing of it]", False),
    ],
)
def test_a_promise_is_there_word_for_word(promise: str, stands: bool) -> None:
    assert is_in(promise, words("**`acks=0`** is\nrefused, | [acks=1](here) warns | of loss")) is stands


def test_no_promise_is_empty_or_stands_there_twice() -> None:
    assert len(ROWS) > 100
    assert [row for row in ROWS if len(words(GAP.sub("", row.promise))) < 8 or not row.tests] == []
    counted = Counter((row.source, words(row.promise)) for row in ROWS)
    assert [promise for promise, count in counted.items() if count > 1] == []


def test_no_heading_is_without_promises_or_stands_there_twice() -> None:
    places = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    assert places == list(dict.fromkeys(source.place for source in SOURCES))
    assert len(re.findall(r"^### ", PAGE, re.MULTILINE)) == len(SOURCES)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: f"{source.place}, {source.part}")
def test_each_promise_stands_in_its_source(source: Source) -> None:
    text = text_of(source)
    assert [row.promise for row in ROWS if row.source == source and not is_in(row.promise, text)] == []


def test_each_test_is_there() -> None:
    assert [(row.promise, name) for row in ROWS for name in row.tests if not is_a_test(name)] == []


def test_each_page_for_users_has_promises() -> None:
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} | {"README.md"}
    assert {source.place for source in SOURCES} >= pages - {"docs/promises.md"}


@pytest.mark.parametrize(
    "module", [kbatch, kbatch.aio, kbatch.testing, kbatch.testing.aio], ids=lambda module: module.__name__
)
def test_each_public_name_has_promises(module: Any) -> None:
    promised = {named(name) for source in SOURCES if source.place == "Docstrings" for name in source.part.split(", ")}
    # These say what they are, and nothing besides.
    without = (
        "CircuitState ConsumedRecord SenderMode ProducerError Request SenderError SenderProtocol WireFormat WireReader"
    )
    names = [name for name in module.__all__ if callable(getattr(module, name)) and name not in without.split()]
    assert [name for name in names if getattr(module, name) not in promised] == []
