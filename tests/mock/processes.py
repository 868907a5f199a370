"""Programs that use kbatch in a process of their own, where they may be forked, interrupted and ended."""

import signal
import subprocess
import sys
import textwrap
import time

from kbatch.testing import MockCluster


def run(cluster: MockCluster, code: str, *, interrupt_at: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh interpreter; sends SIGINT once it has printed `interrupt_at`."""
    preamble = f"""
        import os, signal, sys, threading, time
        import kbatch
        from kbatch._fastmap import pinned_buffers
        CONFIG = {{"bootstrap.servers": {cluster.bootstrap_servers!r}, "log_level": 0}}
        def envelopes(count):
            return [kbatch.Envelope(data=b"m%d" % i) for i in range(count)]
        """
    program = textwrap.dedent(preamble) + textwrap.dedent(code)
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out = ""
    if interrupt_at is not None:
        assert process.stdout is not None
        while interrupt_at not in (line := process.stdout.readline()):
            assert line, process.communicate()
            out += line
        time.sleep(0.3)  # into the wait that follows
        process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(program, process.returncode, out + rest, errors)
