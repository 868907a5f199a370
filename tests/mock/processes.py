"""Programs that use kbatch in a process of their own, where they may be forked, interrupted and ended."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kbatch.testing import MockCluster

# For tests that fork after a producer was used.
needs_fork = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="platform: no fork"),
    pytest.mark.skipif(
        os.environ.get("KBATCH_SLOW_BUILD", "") not in ("", "0"),
        reason="platform: in a forked child glibc reuses the stacks of threads that are gone, whose redzones "
        "AddressSanitizer has not cleared; librdkafka's uninstrumented threads then run into them",
    ),
]


def program(cluster: MockCluster, code: str) -> str:
    """`code` after what each of these programs needs."""
    preamble = f"""
        import asyncio, os, signal, sys, threading, time
        import kbatch
        from kbatch._fastmap import pinned_buffers
        CONFIG = {{"bootstrap.servers": {cluster.bootstrap_servers!r}, "log_level": 0, "reconnect.backoff.max.ms": 200}}
        def envelopes(count):
            return [kbatch.Envelope(data=b"m%d" % i) for i in range(count)]
        """
    return textwrap.dedent(preamble) + textwrap.dedent(code)


@contextlib.contextmanager
def start(cluster: MockCluster, code: str, directory: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """A fresh interpreter that runs `code`; with a `directory`, as a file in it, which multiprocessing can import."""
    text = program(cluster, code)
    arguments = ["-c", text]
    if directory is not None:
        (directory / "program.py").write_text(text)
        arguments = [str(directory / "program.py")]
    process = subprocess.Popen(
        [sys.executable, "-W", "error", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def run(
    cluster: MockCluster,
    code: str,
    *,
    interrupt_at: str | None = None,
    signal_number: int = signal.SIGINT,
    delay_s: float = 0.3,
    directory: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs `code` to its end; sends a signal `delay_s` after it has printed `interrupt_at`."""
    with start(cluster, code, directory) as process:
        out = ""
        if interrupt_at is not None:
            assert process.stdout is not None
            while interrupt_at not in (line := process.stdout.readline()):
                assert line, process.communicate(timeout=60)
                out += line
            time.sleep(delay_s)  # into what follows
            process.send_signal(signal_number)
        rest, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(code, process.returncode, out + rest, errors)
