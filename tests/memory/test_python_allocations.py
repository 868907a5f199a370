"""Each of Python's allocations in the calling thread fails once: an answer, no crash, and the producer goes on.

In the threads of a producer none fails here: CPython's threading.Thread.start() waits for ever when the new thread has
no memory to begin, and a threading.Condition stays locked when its __exit__ has none to be called.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .scenarios import SCENARIOS

# What is waited for comes by the threads of a producer.
NOT_HERE = ("statistics", "errors", "tokens")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in NOT_HERE])
@pytest.mark.timeout(400)
def test_each_allocation_fails_once(name: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.memory.run", name, "caller"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([path for path in sys.path if path])},
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert ended.returncode == 0, f"{ended.stdout[-200:]}\n{ended.stderr}"
    told = re.search(r"^passed: .*: (\d+) allocations", ended.stdout, re.MULTILINE)
    assert told is not None
    print(told[0])
    assert int(told[1]) >= 3
