"""A Kafka for the measurements: librdkafka's mock cluster, alone in a child process.

    with Broker() as broker:
        topic = broker.create_topic("orders", partitions=4)
        ...  # clients use broker.bootstrap_servers

It is the same librdkafka on both ends, it keeps 5 MiB per partition in memory and writes nothing to disk, so it costs
as little as a broker can and favours no side. The child obeys one JSON command per line of standard input and ends
with its parent.
"""

import ctypes
import json
import subprocess
import sys
from types import TracebackType
from typing import Any

from benchmarks.library import load_librdkafka


class Broker:
    """A running mock cluster with one broker."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.broker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.bootstrap_servers: str = self._answer()
        self._topics = 0

    def __enter__(self) -> "Broker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def create_topic(self, prefix: str, partitions: int) -> str:
        """Creates a topic with a name of its own, so that no measurement sees another's records."""
        self._topics += 1
        name = f"{prefix}-{self._topics}"
        self._do("create_topic", name, partitions)
        return name

    def set_rtt(self, milliseconds: int) -> None:
        """Delays every response by so many milliseconds."""
        self._do("set_rtt", milliseconds)

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _do(self, command: str, *arguments: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, *arguments]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the mock cluster's process ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"mock cluster: {answer['error']}")
        return answer["result"]


def _serve() -> None:
    lib = load_librdkafka()
    for name, result, arguments in (
        ("rd_kafka_conf_new", ctypes.c_void_p, ()),
        ("rd_kafka_conf_set", ctypes.c_int, (ctypes.c_void_p, *[ctypes.c_char_p] * 3, ctypes.c_size_t)),
        ("rd_kafka_new", ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)),
        ("rd_kafka_mock_cluster_new", ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int)),
        ("rd_kafka_mock_cluster_bootstraps", ctypes.c_char_p, (ctypes.c_void_p,)),
        ("rd_kafka_mock_topic_create", ctypes.c_int, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int)),
        ("rd_kafka_mock_broker_set_rtt", ctypes.c_int, (ctypes.c_void_p, ctypes.c_int32, ctypes.c_int)),
        ("rd_kafka_err2str", ctypes.c_char_p, (ctypes.c_int,)),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments

    def answer(result: Any = None, error: str | None = None) -> None:
        print(json.dumps({"result": result} if error is None else {"error": error}), flush=True)

    why = ctypes.create_string_buffer(512)
    conf = lib.rd_kafka_conf_new()
    lib.rd_kafka_conf_set(conf, b"log_level", b"3", why, len(why))  # no warning that this client knows no broker
    handle = lib.rd_kafka_new(0, conf, why, len(why))  # 0: a producer
    if not handle:
        answer(error=why.value.decode())
        return
    cluster = lib.rd_kafka_mock_cluster_new(handle, 1)
    answer(lib.rd_kafka_mock_cluster_bootstraps(cluster).decode())
    for line in sys.stdin:
        match json.loads(line):
            case ["create_topic", str(name), int(partitions)]:
                code = lib.rd_kafka_mock_topic_create(cluster, name.encode(), partitions, 1)
            case ["set_rtt", int(milliseconds)]:
                code = lib.rd_kafka_mock_broker_set_rtt(cluster, -1, milliseconds)
            case command:
                answer(error=f"no such command: {command}")
                continue
        answer(error=lib.rd_kafka_err2str(code).decode() if code else None)


if __name__ == "__main__":
    _serve()
