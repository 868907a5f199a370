"""Lines of a file or of standard input, in constant memory."""

import contextlib
import os
import queue
import select
import stat
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO

from kbatch._config import shown_key
from kbatch.cli._failure import USAGE, Failure

_BLOCK_SIZE = 256 * 1024
_BLOCKS_AHEAD = 4
_BOM = b"\xef\xbb\xbf"

# How what is no text of JSON lines begins, what it seems to be, and how it becomes text. UTF-32 is before UTF-16.
_KINDS = (
    (b"\x1f\x8b", "compressed by gzip", "gzip -dc"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "zstd -dc"),
    (b"\xfd7zXZ\x00", "compressed by xz", "xz -dc"),
    (b"BZh", "compressed by bzip2", "bzip2 -dc"),
    (b"\x04\x22\x4d\x18", "compressed by lz4", "lz4 -dc"),
    (b"PK\x03\x04", "a ZIP archive", "unzip -p"),
    (b"\xff\xfe\x00\x00", "UTF-32 text", "iconv -f UTF-32 -t UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32 text", "iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "UTF-16 text", "iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "iconv -f UTF-16 -t UTF-8"),
    (b"{\x00", "UTF-16 text", "iconv -f UTF-16LE -t UTF-8"),
    (b"[\x00", "UTF-16 text", "iconv -f UTF-16LE -t UTF-8"),
    (b"\x00{", "UTF-16 text", "iconv -f UTF-16BE -t UTF-8"),
    (b"\x00[", "UTF-16 text", "iconv -f UTF-16BE -t UTF-8"),
    (b"PAR1", "a Parquet file", None),
    (b"Obj\x01", "an Avro file", None),
)
_LONGEST_BEGINNING = 16


@dataclass(frozen=True)
class Block:
    """Whole lines, without their ends. `more` tells whether more input was at hand when they were read."""

    first_number: int
    lines: list[bytes]
    end_offset: int
    more: bool

    @property
    def next_number(self) -> int:
        return self.first_number + len(self.lines)


@dataclass(frozen=True)
class Piece:
    """A part of a line that is longer than the limit; its parts come one after the other, the last marked."""

    number: int
    data: bytes
    end_offset: int
    last: bool

    @property
    def next_number(self) -> int:
        return self.number + 1 if self.last else self.number


class LineSource:
    """Reads a file, or standard input for ``-``, ahead in a thread, so that waiting for input blocks nobody.

    Lines end with LF or CRLF, the last one also with the input. A byte order mark is left out, also at the start of a
    later line: files with marks may have been joined.

    Args:
        name: The path, or ``-``.
        max_line: Lines longer than so many bytes come in pieces.

    Raises:
        Failure: The file cannot be read, or is of another kind.
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
        #: Its permissions; None for what is no file.
        self.mode = None if self.size is None else stat.S_IMODE(status.st_mode)
        if self.size is not None and hasattr(os, "pread"):
            try:
                with contextlib.suppress(OSError):  # told when it is read
                    self._check_kind(os.pread(self._file.fileno(), _LONGEST_BEGINNING, self._file.tell()))
            except Failure:
                self._file.close()
                raise

    def start(self) -> None:
        self._thread.start()

    def _check_kind(self, beginning: bytes) -> None:
        for mark, kind, command in _KINDS:
            if beginning.startswith(mark):
                hint = "" if command is None else f", such as: {command} FILE | kbatch produce -"
                raise Failure(f"{self.name} seems to be {kind}; give JSON lines in UTF-8{hint}", USAGE)

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
                block: bytes | OSError | None = self._file.read(_BLOCK_SIZE)
            except OSError as error:
                block = error
            if block is None:  # a pipe that another process has set not to block
                select.select([self._file], (), (), 0.2)
                continue
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
            Failure: The input cannot be read any further, or is of another kind.
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
                where = f" after line {number - 1}" if number > 1 else ""
                raise Failure(f"cannot read {self.name}{where}: {block.strerror or block}")
            at_end = not block
            if offset == 0:
                self._check_kind(block)
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
            if line.startswith(_BOM):
                lines[i] = line = line[len(_BOM) :]
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
    if not name:
        raise Failure("FILE must not be empty", USAGE)
    if name == "-":
        if sys.stdin is None:
            raise Failure("there is no standard input to read", USAGE)
        return open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)
    try:
        return open(name, "rb", buffering=0)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        key, equals, _ = name.partition("=")
        if equals and key == shown_key(key):  # what follows may be a password
            raise Failure(f"cannot read {key}=…: {reason}; a setting needs an -X of its own", USAGE) from None
        raise Failure(f"cannot read {name}: {reason}", USAGE) from None
