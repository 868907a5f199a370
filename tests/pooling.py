"""A PgBouncer in transaction mode before a PostgreSQL server of a test's own."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.waiting import until

_WHERE = f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin"  # Debian's place, where not everyone's PATH leads


@contextlib.contextmanager
def pool_before(server: Any) -> Iterator[str]:
    """The conninfo of one that has three connections to the server."""
    program = shutil.which("pgbouncer", path=_WHERE)
    if program is None:
        pytest.skip("no PgBouncer is installed" if sys.platform == "linux" else "platform: no PgBouncer is installed")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    settings = server.directory / "pgbouncer.ini"
    settings.write_text(
        f"[databases]\npostgres = host=127.0.0.1 port={server.port} user=postgres\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        "pool_mode = transaction\ndefault_pool_size = 3\nserver_login_retry = 1\n"
    )
    user = {"user": "nobody"} if os.geteuid() == 0 else {}
    with subprocess.Popen([program, "-q", str(settings)], stderr=subprocess.DEVNULL, **user) as process:
        until(lambda: _accepts(port), "PgBouncer")
        try:
            yield f"postgresql://postgres@127.0.0.1:{port}/postgres?sslmode=disable"
        finally:
            process.terminate()


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
