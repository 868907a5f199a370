import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table


class Bar:
    """A progress bar, or nothing at all where nobody sees it."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def show(self, completed: float, note: str = "") -> None:
        self._progress.update(self._task, completed=completed, note=note)


class Screen:
    """What the user sees: results on standard output, everything else on standard error, a bar on a terminal only."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._err = Console(stderr=True)

    def say(self, text: str) -> None:
        """A result."""
        _write(sys.stdout, text)

    def tell(self, text: str) -> None:
        """A problem, or a remark on the way."""
        _write(sys.stderr, f"kbatch: {text}")

    def show(self, table: Table) -> None:
        """A result as a table."""
        Console().print(table)

    @contextmanager
    def bar(self, label: str, total: float | None, *, of_bytes: bool = False) -> Iterator[Bar]:
        columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn()]
        columns.append(DownloadColumn() if of_bytes else MofNCompleteColumn())
        columns += [TextColumn("{task.fields[note]}"), TimeElapsedColumn()]
        visible = not self.quiet and self._err.is_terminal
        with Progress(*columns, console=self._err, disable=not visible, transient=True) as progress:
            yield Bar(progress, progress.add_task(label, total=total, note=""))


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _write(stream: TextIO, text: str) -> None:
    # Names of files may hold bytes that are no text in the stream's encoding.
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except BrokenPipeError:
        # Whoever read it has gone (``| head``); that must not change the exit status, nor fail again at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
