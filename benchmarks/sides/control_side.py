"""The control of the GIL figure: a process whose only thread besides the competitor waits while the C loop, a process
of its own, sends. Nobody takes the GIL, so the competitor must stand still for no time at all, busy machine or not.

Options: `command`, the C loop's command line.
"""

import json
import subprocess
from typing import Any

from benchmarks.sides.base import read_spec, serve


def main() -> None:
    spec = read_spec()
    loop = subprocess.Popen(spec.options["command"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert loop.stdin is not None
    assert loop.stdout is not None
    loop.stdout.readline()

    def send(count: int) -> int:
        assert loop.stdin is not None
        assert loop.stdout is not None
        loop.stdin.write(f"{count}\n")
        loop.stdin.flush()
        return int(json.loads(loop.stdout.readline())["acknowledged"])

    def close() -> dict[str, Any]:
        loop.communicate()
        return {}

    serve(spec, "control", send, close)


if __name__ == "__main__":
    main()
