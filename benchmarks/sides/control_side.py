"""The control of the GIL figure: a process whose only thread besides the competitor waits while the C loop, a process
of its own, sends. Nobody takes the GIL, so the competitor must stand still for no time at all, busy machine or not.

Options: `command`, the C loop's command line.
"""

import json
import subprocess
from typing import Any

from benchmarks.sides.base import Spec, serve


class Sender:
    def __init__(self, spec: Spec) -> None:
        self._loop = subprocess.Popen(spec.options["command"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._loop.stdout is not None
        answer: dict[str, Any] = json.loads(self._loop.stdout.readline())
        return answer

    def send(self, count: int) -> int:
        assert self._loop.stdin is not None
        self._loop.stdin.write(f"{count}\n")
        self._loop.stdin.flush()
        return int(self._answer()["acknowledged"])

    def close(self) -> dict[str, Any]:
        self._loop.communicate()
        return {}


if __name__ == "__main__":
    serve("control", Sender)
