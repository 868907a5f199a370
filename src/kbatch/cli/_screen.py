import contextlib
import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
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
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from kbatch._text import printable


class Bar:
    """A progress bar, or nothing at all where nobody sees it."""

    def __init__(self, update: Callable[..., object] | None = None) -> None:
        self._update = update

    @property
    def is_seen(self) -> bool:
        """Whether anybody sees it."""
        return self._update is not None

    def show(self, completed: float, note: str = "") -> None:
        if self._update is not None:
            self._update(completed=completed, note=note)


class Stream:
    """Standard output or standard error: it may be closed, full, a pipe that nobody reads or a terminal that is gone.

    Writing never raises: what became of the messages does not depend on whether anybody is told. `error` is the first
    failure.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.is_there = stream is not None
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        # Not every encoding has every character.
        self._try(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        self._try("")

    def isatty(self) -> bool:
        try:
            return self._stream is not None and self._stream.isatty()
        except ValueError:  # it is closed
            return False

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError("there is no such stream")
        return self._stream.fileno()

    def _try(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError as error:
            self.error = self.error or error
            # What is left in the buffer must not fail again at the exit, and change the exit status there.
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
        except ValueError:  # it is closed
            self.error = self.error or _closed()


def _closed() -> OSError:
    return OSError(errno.EBADF, os.strerror(errno.EBADF))


class PlainStream:
    """What stands for `sys.stdout` and `sys.stderr`, for code that writes what was typed or found as it is.

    The framework does, and the standard library's logging.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.encoding = stream.encoding
        self.flush, self.isatty, self.fileno = stream.flush, stream.isatty, stream.fileno

    def write(self, text: str) -> int:
        pieces = re.split(r"([\n\t])", text)
        self.stream.write("".join(piece if piece in ("\n", "\t") else printable(piece) for piece in pieces))
        return len(text)


@contextmanager
def plain_streams() -> Iterator[None]:
    """For the time of a command: the standard streams are plain, and at its end what was not written is told."""
    before = sys.stdout, sys.stderr
    out, err = Stream(sys.stdout), Stream(sys.stderr)
    sys.stdout, sys.stderr = PlainStream(out), PlainStream(err)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        # That a reader went away (``| head``) is nothing to tell.
        if out.error is not None and not isinstance(out.error, BrokenPipeError):
            err.write(f"kbatch: cannot write to standard output: {os.strerror(out.error.errno or 0)}\n")


def has_output() -> bool:
    """Whether the process was started with a standard output."""
    return _stream(sys.stdout).is_there


def _stream(standard: TextIO | None) -> Stream:
    return standard.stream if isinstance(standard, PlainStream) else Stream(standard)


class Screen:
    """What the user sees: results on standard output, everything else on standard error, a bar on a terminal only."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        #: Whether standard output is for something else, so that results go to standard error as well.
        self.output_is_taken = False

    def say(self, text: str) -> None:
        """A result."""
        self._results().write(printable(text) + "\n")

    def tell(self, text: str) -> None:
        """A problem, or a remark on the way."""
        _stream(sys.stderr).write(f"kbatch: {printable(text)}\n")

    def log(self, line: str) -> None:
        """A line on the way that is complete as it is."""
        _stream(sys.stderr).write(line + "\n")

    def print(self, text: str) -> None:
        """A result of several lines, as it is."""
        self._results().write(text)

    @property
    def loss(self) -> OSError | None:
        """Why results do not arrive: the disk is full, who read them is gone, or there never was an output."""
        results = self._results()
        return results.error if results.is_there else _closed()

    @property
    def is_asked(self) -> bool:
        """Whether somebody can answer a question: standard input and standard error are a terminal."""
        return sys.stdin is not None and sys.stdin.isatty() and _stream(sys.stderr).isatty()

    def ask(self, question: str) -> bool:
        """Whether somebody says yes."""
        _stream(sys.stderr).write(f"{printable(question)} [y/N] ")
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    @contextmanager
    def live(self, label: str) -> Iterator[Bar]:
        """A line that changes in its place, of what never ends."""
        with self._progress([SpinnerColumn(), TextColumn("{task.description}", markup=False)], label, None) as bar:
            yield bar

    def show(self, table: Table) -> None:
        """A result as a table."""
        Console(file=self._results()).print(table)  # type: ignore[arg-type]

    @contextmanager
    def bar(self, label: str, total: float | None, *, of_bytes: bool = False) -> Iterator[Bar]:
        columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn()]
        columns.append(DownloadColumn() if of_bytes else MofNCompleteColumn())
        with self._progress(columns, label, total) as bar:
            yield bar

    @contextmanager
    def _progress(self, columns: list[ProgressColumn], label: str, total: float | None) -> Iterator[Bar]:
        stream = _stream(sys.stderr)
        # Not what rich takes for a terminal: FORCE_COLOR makes it take a pipe for one.
        if self.quiet or not stream.isatty():
            yield Bar()
            return
        columns = [*columns, TextColumn("{task.fields[note]}", markup=False), TimeElapsedColumn()]
        console = Console(file=stream)  # type: ignore[arg-type]
        with Progress(*columns, console=console, transient=True) as progress:
            yield Bar(functools.partial(progress.update, progress.add_task(label, total=total, note="")))

    def _results(self) -> Stream:
        return _stream(sys.stderr if self.output_is_taken else sys.stdout)
