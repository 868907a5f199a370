"""An exception at each line of kbatch's Python in turn, in the calling thread, as Ctrl-C may raise one."""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import kbatch

if TYPE_CHECKING:
    from collections.abc import Callable

PACKAGE = str(Path(kbatch.__file__).parent)
TESTING = str(Path(PACKAGE, "testing"))  # producers in memory: what is Python there is librdkafka otherwise


class Injected(BaseException):
    """What is raised, unless a test wants something else."""


class Injector:
    """Raises at the `nth` line that the calling thread executes in `kbatch`.

    Not at the end of a `with` block: CPython looks at no signal between the block and ``__exit__``.
    """

    def __init__(self, nth: int, make: Callable[[], BaseException] = Injected) -> None:
        self.place: str | None = None  # where it raised; None: there were fewer lines
        self._left = nth
        self._make = make
        self._within: dict[FrameType, set[int]] = {}

    def run(self, function: Callable[[], Any]) -> BaseException | None:
        """What `function` raised."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            function()
        except BaseException as error:
            return error.with_traceback(None)  # frames hold what must not be held by them alone
        finally:
            sys.settrace(before)
            self._within.clear()
        return None

    def _enter(self, frame: FrameType, event: str, _: object) -> Any:
        path = frame.f_code.co_filename
        if not path.startswith(PACKAGE) or path.startswith(TESTING) or frame.f_code.co_name == "__del__":
            return None
        return self._line

    def _line(self, frame: FrameType, event: str, _: object) -> Any:
        if event != "line" or self.place is not None:
            return self._line
        if frame.f_lineno in _with_lines(frame.f_code.co_filename):
            within = self._within.setdefault(frame, set())
            if frame.f_lineno in within:
                within.remove(frame.f_lineno)
                return self._line
            within.add(frame.f_lineno)
        self._left -= 1
        if self._left == 0:
            self.place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
            raise self._make()
        return self._line


@functools.cache
def _with_lines(path: str) -> frozenset[int]:
    tree = ast.parse(Path(path).read_text("utf-8"))
    return frozenset(node.lineno for node in ast.walk(tree) if isinstance(node, (ast.With, ast.AsyncWith)))
