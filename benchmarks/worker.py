"""A process that answers: a line to it, a line of JSON from it. It ends when its input does."""

import subprocess
import sys
from types import TracebackType
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


class Worker:
    """`python -m MODULE OPTIONS`, with the options as JSON."""

    def __init__(self, module: str, options: Any) -> None:
        self._name = module
        command = [sys.executable, "-m", module, msgspec.json.encode(options).decode()]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(by_force=error is not None)

    def ask(self, answer: type[T], line: str = "") -> T:
        self.tell(line)
        return self.hear(answer)

    def tell(self, line: str = "") -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def hear(self, answer: type[T]) -> T:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name} ended with status {self._process.wait()}")
        return msgspec.json.decode(line, type=answer)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def close(self, *, by_force: bool = False) -> None:
        if by_force:
            self._process.kill()
        self._process.communicate()
        if self._process.returncode and not by_force:
            raise RuntimeError(f"{self._name} ended with status {self._process.returncode}")
