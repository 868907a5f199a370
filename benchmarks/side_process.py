"""Starts a side and talks to it."""

import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from benchmarks.library import build, build_java, java_program, librdkafka_path
from benchmarks.sides.base import Result, Spec


def command_line(name: str, spec: Spec, data: Path | None) -> list[str]:
    if name not in ("cloop", "recycling", "java"):
        return [sys.executable, "-m", f"benchmarks.sides.{name}_side", msgspec.json.encode(spec).decode()]
    if data is None:
        raise ValueError(f"{name} needs a file of prepared messages")
    where = [str(data), spec.bootstrap, spec.topic, str(spec.batch), str(spec.window)]
    config = [f"{key}={value}" for key, value in spec.options.get("config", {}).items()]
    if name != "java":
        lists = "new" if name == "cloop" else "recycled"
        return [str(build("cloop")), librdkafka_path(), *where, lists, *config]
    java = [java_program("java") or "java", "-Xmx1g", "-cp", build_java(spec.options["class_path"]), "JavaSide"]
    return [*java, *where, spec.options.get("form", "send"), *config]


class Side:
    """A running side, on these processors if some are named. `final` holds what it said when it was closed."""

    def __init__(self, name: str, spec: Spec, *, data: Path | None = None, processors: set[int] | None = None) -> None:
        self.name = name
        self.spec = spec
        self.final: dict[str, Any] = {}
        command = command_line(name, spec, data)
        if processors:
            command = ["taskset", "--cpu-list", ",".join(map(str, sorted(processors))), *command]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        ready = self._read(dict[str, Any])
        #: messages acknowledged so far
        self.acknowledged: int = ready.get("acknowledged", 0)
        #: bytes of memory before anything is sent
        self.resident: int = ready["resident"]

    def __enter__(self) -> "Side":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, count: int, interval_ns: int = 0) -> Result:
        """Lets the side send `count` messages, a batch at each interval if there is one, and checks that all were
        acknowledged."""
        self.begin(count, interval_ns)
        return self.end(count)

    def begin(self, count: int, interval_ns: int = 0) -> None:
        """The first half of `run`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count} {interval_ns}\n")
        self._process.stdin.flush()

    def end(self, count: int) -> Result:
        """The second half of `run`."""
        result: Result = self._read(Result)
        if result.acknowledged != count or result.messages != count:
            raise RuntimeError(f"{self.name}: {result.acknowledged} of {count} messages acknowledged")
        self.acknowledged += count
        return result

    def close(self) -> dict[str, Any]:
        """Ends the side and returns what it says at its end. May be called again."""
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            return self.final
        self._process.stdin.close()
        self.final = self._read(dict[str, Any])
        assert self._process.stdout is not None
        self._process.stdout.close()
        if status := self._process.wait():
            raise RuntimeError(f"{self.name} ended with status {status}")
        return self.final

    def _read(self, kind: Any) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self._process.wait()}")
        return msgspec.json.decode(line, type=kind)
