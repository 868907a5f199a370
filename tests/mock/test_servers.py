"""The examples for gunicorn and Celery: producers and forks as these servers have them."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kbatch.testing import MockCluster

from ..waiting import until
from .celery_messages import Messages
from .clients import end_offsets, read_back
from .processes import needs_fork

pytestmark = needs_fork

EXAMPLES = Path(__file__).parents[2] / "examples"


@contextmanager
def server(log: Path, *arguments: str, status: int = 0, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server of the examples, with its output in a file; killed with its children if it does not end by itself."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=EXAMPLES.parent,  # as the pages have it
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
        until(lambda: process.poll() is not None, "the server's end")
        assert process.returncode == status, log.read_text()
        with pytest.raises(ProcessLookupError):  # none of its processes is left behind
            os.killpg(process.pid, 0)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def url_of(log: Path, process: subprocess.Popen[bytes], workers: int) -> str:
    until(
        lambda: process.poll() is not None or log.read_text().count("Booting worker") == workers,
        "gunicorn's workers",
    )
    match = re.search(r"Listening at: (http://\S+)", log.read_text())
    assert match, log.read_text()
    return match[1]


def post(url: str, lines: list[str]) -> tuple[int, str]:
    with urllib.request.urlopen(url, "\n".join(lines).encode(), timeout=60) as response:
        return response.status, response.read().decode()


def process_of(answer: str) -> int:
    match = re.match(r"process (\d+): ", answer)
    assert match, answer
    return int(match[1])


def gunicorn(*arguments: str) -> tuple[str, ...]:
    options = ("--preload", "--workers", "2", "--bind", "127.0.0.1:0", "--graceful-timeout", "30")
    return ("gunicorn", "--chdir", "examples", *options, *arguments)


def test_gunicorn_with_a_producer_made_before_the_fork(kafka_cluster: MockCluster, tmp_path: Path) -> None:
    kafka_cluster.create_topic("orders", partitions=4)
    kafka_cluster.set_rtt(1, 20)  # so that requests are under way when the server is told to stop
    log = tmp_path / "log"
    acked: list[str] = []
    processes: set[int] = set()
    asked = Counter[str]()

    def client(name: str) -> None:
        for turn in range(1_000_000):
            lines = [f'{{"order": "{name}-{turn}-{i}"}}' for i in range(20)]
            asked.update(lines)
            try:
                status, answer = post(url, lines)
            except OSError:
                return  # the server is gone
            assert status == 200
            acked.extend(lines)
            processes.add(process_of(answer))

    command = gunicorn("--threads", "4", "gunicorn_preload:app")
    with server(log, *command, KAFKA=kafka_cluster.bootstrap_servers) as process:
        url = url_of(log, process, workers=2)
        clients = [threading.Thread(target=client, args=(str(number),)) for number in range(6)]
        for thread in clients:
            thread.start()
        until(lambda: len(processes) == 2 and len(acked) > 1_000, "answers of both workers")
        process.send_signal(signal.SIGTERM)
        for thread in clients:
            thread.join(60)
    assert process.pid not in processes
    log_of_topic = Counter(values(kafka_cluster, "orders"))
    assert set(log_of_topic.values()) == {1}
    assert set(acked) <= set(log_of_topic) <= set(asked)


def values(cluster: MockCluster, topic: str) -> list[str]:
    return [(record.value or b"").decode() for record in read_back(cluster.bootstrap_servers, topic)]


def test_gunicorn_with_a_producer_used_before_the_fork(kafka_cluster: MockCluster, tmp_path: Path) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    kafka_cluster.create_topic("starts", partitions=1)
    log = tmp_path / "log"
    command = gunicorn("gunicorn_post_fork:app")
    with server(log, *command, KAFKA=kafka_cluster.bootstrap_servers) as process:
        url = url_of(log, process, workers=2)
        for _ in range(3):
            with pytest.raises(urllib.error.HTTPError) as caught:
                post(url, ["an order"])
            with caught.value as answer:
                assert answer.code == 500
                assert "post_fork" in answer.read().decode()
        process.send_signal(signal.SIGTERM)
    assert end_offsets(kafka_cluster.bootstrap_servers, "orders") == {0: 0}
    assert values(kafka_cluster, "starts") == [f'{{"process":{process.pid}}}']


def test_gunicorn_with_a_producer_of_its_own_for_each_worker(kafka_cluster: MockCluster, tmp_path: Path) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    kafka_cluster.create_topic("starts", partitions=1)
    log = tmp_path / "log"
    processes: Counter[int] = Counter()
    command = gunicorn("-c", "examples/gunicorn_post_fork_conf.py", "gunicorn_post_fork:app")
    with server(log, *command, KAFKA=kafka_cluster.bootstrap_servers) as process:
        url = url_of(log, process, workers=2)

        def both_have_answered() -> bool:
            lines = [f"{sum(processes.values())}-{i}" for i in range(5)]
            status, answer = post(url, lines)
            assert status == 200
            processes[process_of(answer)] += 1
            return len(processes) == 2

        until(both_have_answered, "answers of both workers")
        process.send_signal(signal.SIGTERM)
    expected = [f"{turn}-{i}" for turn in range(sum(processes.values())) for i in range(5)]
    assert values(kafka_cluster, "orders") == expected


@pytest.mark.long
def test_celery_with_a_producer_made_before_the_fork(kafka_cluster: MockCluster, tmp_path: Path) -> None:
    kafka_cluster.create_topic("orders", partitions=2)
    kafka_cluster.create_topic("events", partitions=1)
    log = tmp_path / "log"
    messages = Messages(tmp_path / "messages")
    servers = kafka_cluster.bootstrap_servers
    tasks, size = 30, 20
    send = f"[send_orders.delay([{{'id': task * {size} + i}} for i in range({size})]) for task in range({tasks})]"
    note = "[note.delay([{'event': i}]) for i in range(4)]"

    def call(code: str) -> None:
        messages.send_by(f"from celery_tasks import note, send_orders; {code}", EXAMPLES, KAFKA=servers)

    command = ["celery", "--workdir", "examples", "-A", "celery_tasks"]
    command += ["worker", "--concurrency", "2", "--loglevel", "DEBUG", "--without-mingle", "--without-gossip"]
    with server(log, *command, KAFKA=servers, **messages.of_the_worker) as process:
        call(send)
        until(lambda: process.poll() is not None or log.read_text().count(" succeeded in ") == tasks, "the tasks")
        kafka_cluster.set_broker_down(1)
        call(note)
        until(lambda: process.poll() is not None or log.read_text().count(" succeeded in ") == tasks + 4, "the notes")
        process.send_signal(signal.SIGTERM)
        until(lambda: "Stopping Pool" in log.read_text(), "the end of the pool")
        time.sleep(3)  # the pool ends its processes a second after this, unless the handler keeps them
        kafka_cluster.set_broker_up(1)
    assert sorted(values(kafka_cluster, "orders")) == sorted(f'{{"id":{i}}}' for i in range(tasks * size))
    assert sorted(values(kafka_cluster, "events")) == [f'{{"event":{i}}}' for i in range(4)]
    assert len(set(re.findall(r"ForkPoolWorker-\d+", log.read_text()))) == 2
