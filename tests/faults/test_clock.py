"""The wall clock jumps while batches are in flight. libfaketime moves it, for one process and as it runs."""

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kbatch.testing import MockCluster
from tests.mock.clients import read_back

HOUR_S = 3_600

PROGRAM = """
    import os, sys, threading, time
    import kbatch
    clock, servers, jump_s = sys.argv[1], sys.argv[2], int(sys.argv[3])

    def jump(seconds):
        with open(clock + ".new", "w") as file:
            file.write(f"{seconds:+d}")
        os.replace(clock + ".new", clock)

    config = {"bootstrap.servers": servers, "message.timeout.ms": 10_000, "log_level": 0}
    producer = kbatch.Producer(config, max_in_flight=60)  # batches wait for room, too
    producer.send_batch("orders", [kbatch.Envelope(data=b"warm")]).raise_for_errors()
    sent = 0

    def batch():
        global sent
        sent += 50
        return [kbatch.Envelope(data=b"%d" % i) for i in range(sent - 50, sent)]

    for seconds in (0, jump_s, 0, -jump_s, 0):
        before, steady = time.time(), time.monotonic()
        timer = threading.Timer(0.04, jump, [seconds])
        timer.start()
        pending = [producer.submit("orders", batch()) for _ in range(4)]
        for one in pending:
            one.wait(timeout=20).raise_for_errors()
        timer.join()
        timer = threading.Timer(0.01, jump, [0])
        timer.start()
        producer.send_batch("orders", batch(), timeout=20).raise_for_errors()
        timer.join()
        jump(seconds)
        moved = (time.time() - before) - (time.monotonic() - steady)
        print(round(moved / 60), flush=True)
    producer.close(5)
    """


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="platform: libfaketime is preloaded")
@pytest.mark.skipif(
    os.environ.get("KBATCH_SLOW_BUILD", "") not in ("", "0"), reason="platform: the sanitizer is preloaded, too"
)
@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S])
def test_a_clock_that_jumps_neither_expires_nor_stalls_a_batch(tmp_path: Path, jump_s: int) -> None:
    spec = importlib.util.find_spec("libfaketime")
    assert spec is not None
    assert spec.origin is not None
    (library,) = Path(spec.origin).parent.rglob("libfaketime.so.1")
    clock = tmp_path / "clock"
    clock.write_text("+0")
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    with MockCluster(process=True) as cluster:
        cluster.create_topic("orders")
        cluster.set_rtt(-1, 60)
        arguments = (str(clock), cluster.bootstrap_servers, str(jump_s))
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(PROGRAM), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert result.returncode == 0, result.stderr
        # The clock did jump, in minutes: there, back, the other way, back.
        minutes = jump_s // 60
        assert result.stdout.split() == [str(move) for move in (0, minutes, -minutes, -minutes, minutes)]
        values = [record.value for record in read_back(cluster.bootstrap_servers, "orders")]
    assert values == [b"warm", *(b"%d" % i for i in range(1_250))]
