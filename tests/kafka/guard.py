"""Ends a test run's servers when the run ends, however it ends: its standard input is closed then.

Lines on standard input: `+PID` and `-PID` for a process that began and that was ended, `/PATH` for a folder to remove.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time


class Guard:
    """The other side: a process that outlives this one, if only for a moment."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", __file__], stdin=subprocess.PIPE, text=True, start_new_session=True
        )

    def watch(self, pid: int) -> None:
        self._tell(f"+{pid}")

    def forget(self, pid: int) -> None:
        self._tell(f"-{pid}")

    def remove(self, folder: str) -> None:
        """Removes a folder at the end."""
        self._tell(os.path.abspath(folder))

    def end(self) -> None:
        """Ends all that is watched, removes the folders; returns when that is done."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


def main() -> None:
    pids: set[int] = set()
    folders = []
    for line in map(str.strip, sys.stdin):
        if line.startswith("/"):
            folders.append(line)
        elif line.startswith("+"):
            pids.add(int(line))
        else:
            pids.discard(-int(line))
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(map(_runs, pids)):
        time.sleep(0.05)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main()
