"""Where a planted defect goes: found by the function that it is in, so that code can move between files."""

import re
from collections.abc import Iterable
from pathlib import Path

# What begins a function, a class or a struct, in Python, Cython or C; its name is the first group.
BEGINS = re.compile(
    r"\s*(?:(?:async )?def (\w+)\(|(?:cdef )?class (\w+)\b|c(?:p?)def (?:struct|enum|union) (\w+):"
    r"|cp?def [^=#]*?(\w+)\()|(?:typedef |static |struct )[^;=]*?(\w+)\("
)
SUFFIXES = ("py", "pyx", "pxd", "pxi", "h")


def sources(root: Path) -> list[tuple[Path, str]]:
    """The files below `root`, the folder of the package, and their texts."""
    files = sorted(path for suffix in SUFFIXES for path in root.rglob(f"*.{suffix}"))
    return [(file, file.read_text(encoding="utf-8")) for file in files]


def find(root: Path, where: str, old: str, texts: Iterable[tuple[Path, str]] | None = None) -> list[tuple[Path, int]]:
    """Each file below `root`, the folder of the package, and index of `old` in a function with this name.

    where="" is what is in no function or class. A class is what its methods leave of it. `texts` are those that
    `sources` has read before.
    """
    found = []
    for file, text in sources(root) if texts is None else texts:
        at = text.find(old)
        while at != -1:
            name = name_at(file.relative_to(root), text, at)
            if name == where or (where and name.endswith("." + where)):
                found.append((file, at))
            at = text.find(old, at + 1)
    return found


def name_at(file: Path, text: str, at: int) -> str:
    """The function of the line at `at`, with its classes and the public packages: "aio.Producer.close"."""
    inside: list[tuple[int, str]] = []  # indentation and name
    for line in text[: text.find("\n", at) + 1].splitlines():
        code = line.strip()
        indentation = len(line) - len(line.lstrip())
        if not code or code.startswith(("#", ")", "}")) or (file.suffix == ".h" and code.startswith("{")):
            continue
        while inside and inside[-1][0] >= indentation:
            inside.pop()
        if begins := BEGINS.match(line):
            inside.append((indentation, next(filter(None, begins.groups()))))
    if not inside:
        return ""
    packages = [part for part in file.parts[:-1] if part not in ("kbatch", "native") and part[0] != "_"]
    return ".".join([*packages, *(name for _, name in inside)])
