import contextlib
import json
import os
import subprocess
import sys
from typing import IO, Any

from kbatch.testing._errors import MockClusterError

_CLOSE_TIMEOUT_S = 10.0
_ERRORS: dict[str, type[Exception]] = {
    error.__name__: error for error in (MockClusterError, OverflowError, TypeError, ValueError)
}


def environment_of_child() -> dict[str, str]:
    """A child imports what this process imports, and takes nothing from the folder it happens to start in."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        "PYTHONSAFEPATH": "1",
    }


class ProcessBackend:
    """The mock cluster in a process of its own; `kbatch.testing._server` is the other end of the pipes.

    One line of JSON asks, ``{"id": 7, "call": "create_topic", "args": ["orders", 4, 1]}``, one answers, with
    ``"result"`` or with ``"error"`` (the exception's type and its arguments). The process ends when its standard input
    closes, which the kernel sees to however this process ends.
    """

    def __init__(self, brokers: int) -> None:
        self._owner_pid = os.getpid()
        self._last_id = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kbatch.testing._server", str(brokers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment_of_child(),
            # A group of its own: a Ctrl-C on the terminal is for the program under test, not for its broker.
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests: IO[bytes] = self._process.stdin
        self._replies: IO[bytes] = self._process.stdout
        try:
            self._reply(0)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, method: str, *args: Any) -> Any:
        if self._requests.closed:
            raise MockClusterError("the mock cluster is closed")
        self._last_id += 1
        request = {"id": self._last_id, "call": method, "args": args}
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
        except OSError:
            raise self._ended() from None
        return self._reply(self._last_id)

    def _reply(self, request_id: int) -> Any:
        # A reply with another id belongs to a call that a Ctrl-C cut short.
        while True:
            line = self._replies.readline()
            if not line:
                raise self._ended()
            reply = json.loads(line)
            if reply["id"] == request_id:
                break
        if "error" in reply:
            name, args = reply["error"]
            raise _ERRORS.get(name, MockClusterError)(*args)
        return reply["result"]

    def _ended(self) -> MockClusterError:
        try:
            status = f"with exit status {self._process.wait(_CLOSE_TIMEOUT_S)}"
        except subprocess.TimeoutExpired:
            status = "without closing its pipes in order"
        return MockClusterError(f"the mock cluster's process ({self.pid}) has ended {status}; see its standard error")

    def close(self) -> None:
        if os.getpid() != self._owner_pid or self._replies.closed:
            return
        with contextlib.suppress(OSError):  # what was left to write to a process that is gone
            self._requests.close()
        try:
            self._process.wait(_CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._replies.close()
