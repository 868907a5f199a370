import contextlib
import errno
import os
import stat
import tempfile
from pathlib import Path
from typing import BinaryIO

from kbatch.cli._failure import USAGE, Failure
from kbatch.cli._lines import LineSource
from kbatch.cli._screen import has_output


class Rejects:
    """Where the lines go that did not arrive, as they came.

    A file is written beside its place, from `begin` on, and takes the place of the last run's in `finish`. A device, a
    pipe, and the file to which standard output or standard error goes are written to as they are.

    Args:
        name: The path, ``-`` for standard output, None for nowhere.
        source: The input, which it must not be.
        config: The file of settings, which it must not be either.

    Raises:
        Failure: It cannot be written. Nothing was changed.
    """

    def __init__(self, name: str | None, source: LineSource, config: Path | None) -> None:
        #: How it is called in messages; empty for nowhere.
        self.shown = "standard output" if name == "-" else name or ""
        #: Whether it is standard output, which then has no place for anything else.
        self.is_output = False
        self._file: BinaryIO | None = None
        self._place = ""  # of a file that is to be written beside it
        self._beside = ""
        self._mode = 0
        if name is None:
            return
        if not name:
            raise Failure("--rejects must not be empty", USAGE)
        if name in ("-", "/dev/stdout") and not has_output():
            raise Failure("there is no standard output for --rejects", USAGE)
        try:
            self._prepare(name, source, config)
        except OSError as error:
            raise Failure(f"cannot write {self.shown}: {os.strerror(error.errno or 0)}", USAGE) from None

    def _prepare(self, name: str, source: LineSource, config: Path | None) -> None:
        status = None
        with contextlib.suppress(FileNotFoundError):
            status = os.fstat(1) if name == "-" else os.stat(name)
        if status is not None and stat.S_ISREG(status.st_mode):
            if (status.st_dev, status.st_ino) == source.identity:
                raise Failure(f"--rejects {name} is the input itself", USAGE)
            if config is not None and os.path.samestat(status, os.stat(config)):
                raise Failure(f"--rejects {name} is the file of settings", USAGE)
        descriptor = 1 if name == "-" else _standard_descriptor(status)
        if descriptor is not None:
            # Not opened again: the lines go where the descriptor stands.
            self._file = os.fdopen(os.dup(descriptor), "wb")
            self.is_output = descriptor == 1
        elif status is not None and not stat.S_ISREG(status.st_mode):
            self._file = os.fdopen(os.open(name, os.O_WRONLY), "wb")  # refuses a directory
        else:
            self._place = os.path.realpath(name)
            self._mode = _mode_of_new_files() if status is None else stat.S_IMODE(status.st_mode)
            if source.mode is not None:  # nobody may read the lines there who may not read them here
                self._mode &= source.mode | stat.S_IWUSR
            for needed in (os.path.dirname(self._place), *([] if status is None else [self._place])):
                os.stat(needed)
                if not os.access(needed, os.W_OK):
                    raise PermissionError(errno.EACCES, "")
            if status is None and name.endswith(os.sep):
                raise IsADirectoryError(errno.EISDIR, "")

    def begin(self) -> None:
        """From now on lines may come. Raises `Failure`."""
        if not self._place:
            return
        folder, name = os.path.split(self._place)
        try:
            descriptor, self._beside = tempfile.mkstemp(".part", name[:40] + ".", folder)
            self._file = os.fdopen(descriptor, "wb")
            os.chmod(self._beside, self._mode)
        except OSError as error:
            raise self._failure(error, USAGE) from None

    def write(self, *pieces: bytes) -> None:
        """Raises `Failure`, once; from then on it writes nothing."""
        if self._file is not None:
            try:
                self._file.writelines(pieces)
            except OSError as error:
                raise self._failure(error) from None

    def flush(self) -> None:
        """What was written survives the end of this process. Raises `Failure` as `write` does."""
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                raise self._failure(error) from None

    def finish(self) -> None:
        """Writes what is left, and gives the file its name; raises `Failure` as `write` does. May be called twice."""
        if self._file is None:
            return
        try:
            self._file.flush()
            if self._beside:
                os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
            if self._beside:
                os.replace(self._beside, self._place)
        except OSError as error:
            raise self._failure(error) from None

    def discard(self) -> None:
        """Leaves everything as it was before `begin`."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()
            if self._beside:
                with contextlib.suppress(OSError):
                    os.unlink(self._beside)

    def _failure(self, error: OSError, status: int = 1) -> Failure:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()
        text = f"cannot write {self.shown}: {os.strerror(error.errno or 0)}"
        if self._beside:
            with contextlib.suppress(OSError):
                if os.stat(self._beside).st_size:
                    text += f"; {self._beside} has what was written"
                else:
                    os.unlink(self._beside)
        return Failure(text, status)


def _standard_descriptor(status: os.stat_result | None) -> int | None:
    """1 or 2 if a file is what standard output or standard error goes to. Who opens it again overwrites it."""
    if status is None or stat.S_ISCHR(status.st_mode):  # of a terminal or /dev/null each opening is as good
        return None
    for descriptor in (1, 2):
        if os.path.samestat(status, os.fstat(descriptor)):
            return descriptor
    return None


def _mode_of_new_files() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask
