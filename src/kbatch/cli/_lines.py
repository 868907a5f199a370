"""Lines of a file or of standard input, in constant memory."""

import os
import queue
import stat
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO

from kbatch.cli._failure import USAGE, Failure

_BLOCK_SIZE = 256 * 1024
_BLOCKS_AHEAD = 4
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Block:
    """Whole lines, without their ends. `more` tells whether more input was at hand when they were read."""

    first_number: int
    lines: list[bytes]
    end_offset: int
    more: bool


@dataclass(frozen=True)
class Piece:
    """A part of a line that is longer than the limit; its parts come one after the other, the last marked."""

    number: int
    data: bytes
    end_offset: int
    last: bool


class LineSource:
    """Reads a file, or standard input for ``-``, ahead in a thread, so that waiting for input blocks nobody.

    Lines end with LF or CRLF, the last one also with the input. A byte order mark at the start is left out.

    Args:
        name: The path, or ``-``.
        max_line: Lines longer than so many bytes come in pieces.
    """

    def __init__(self, name: str, max_line: int) -> None:
        self.name = "standard input" if name == "-" else name
        self._file = _open(name)
        self._max_line = max_line
        self._blocks: queue.Queue[bytes | OSError] = queue.Queue(_BLOCKS_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, name="kbatch-lines", daemon=True)
        status = os.fstat(self._file.fileno())
        #: Bytes to come, where that is known.
        self.size = status.st_size if stat.S_ISREG(status.st_mode) else None
        self.identity = (status.st_dev, status.st_ino)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the reading. A thread that waits for input on a pipe or a terminal ends with the process."""
        self._closed.set()
        if self.size is not None:
            if self._thread.is_alive():
                self._thread.join()
            self._file.close()

    def _read(self) -> None:
        # The file is unbuffered: a thread that waits in a buffered one would hold a lock that the exit wants.
        while not self._closed.is_set():
            try:
                block: bytes | OSError = self._file.read(_BLOCK_SIZE)
            except OSError as error:
                block = error
            while not self._closed.is_set():
                try:
                    self._blocks.put(block, timeout=0.2)
                    break
                except queue.Full:
                    pass
            if not block or isinstance(block, OSError):
                return

    def items(self) -> Iterator[Block | Piece | None]:
        """What was read, in order; None every 0.1 s while there is nothing.

        Raises:
            Failure: The input cannot be read any further.
        """
        number = 1  # of the next line
        offset = 0
        rest: list[bytes] = []  # the beginning of the next line
        rest_size = 0
        oversized = False
        while True:
            try:
                block = self._blocks.get(timeout=0.1)
            except queue.Empty:
                yield None
                continue
            if isinstance(block, OSError):
                raise Failure(f"cannot read {self.name} after line {number - 1}: {block.strerror or block}")
            at_end = not block
            if offset == 0 and block.startswith(_BOM):
                offset, block = len(_BOM), block[len(_BOM) :]
            offset += len(block)
            *lines, tail = block.split(b"\n")
            if at_end and rest:
                lines = [b""]  # the last line has no end of its own
            if lines and rest:
                if oversized:
                    yield Piece(number, lines.pop(0), offset, last=True)
                    number += 1
                else:
                    lines[0] = b"".join((*rest, lines[0]))
                rest, rest_size, oversized = [], 0, False
            for item in self._whole(number, lines, offset):
                number += len(item.lines) if isinstance(item, Block) else 1
                yield item
            if at_end:
                return
            if tail:
                rest.append(tail)
                rest_size += len(tail)
            if rest_size > self._max_line + 1:  # + 1: it may be a CR
                yield Piece(number, b"".join(rest), offset, last=False)
                rest, oversized = [b""], True

    def _whole(self, number: int, lines: list[bytes], offset: int) -> Iterator[Block | Piece]:
        more = self.size is not None or not self._blocks.empty()
        start = 0
        for i, line in enumerate(lines):
            if line.endswith(b"\r"):
                lines[i] = line = line[:-1]
            if len(line) > self._max_line:
                if i > start:
                    yield Block(number + start, lines[start:i], offset, more)
                yield Piece(number + i, line, offset, last=True)
                start = i + 1
        if start < len(lines):
            yield Block(number + start, lines[start:], offset, more)


def _open(name: str) -> FileIO:
    if name == "-":
        if sys.stdin is None:
            raise Failure("there is no standard input to read", USAGE)
        return open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)
    try:
        return open(name, "rb", buffering=0)
    except OSError as error:
        raise Failure(f"cannot read {name}: {os.strerror(error.errno or 0)}", USAGE) from None
