"""The recipes of docs/shutdown.md, each in its server: ended by SIGTERM with envelopes buffered, nothing is lost."""

import fcntl
import http.client
import inspect
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import termios
import threading
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import gunicorn.config
import psutil
import pytest
import uvicorn
import yaml
from celery import Celery

import kbatch
from kbatch.testing import ApiKey, MockCluster

from ..waiting import until
from .celery_messages import Messages
from .clients import end_offsets
from .processes import needs_fork
from .test_servers import EXAMPLES, post, server, values

pytestmark = needs_fork

TOPIC = "events"
# Whether the broker comes back before the deadline of the closing; that deadline is long, or short.
ENDINGS = {"the broker comes back": "30", "the broker stays away": "1"}
PAGE = Path(__file__).parents[2] / "docs" / "shutdown.md"


@pytest.fixture
def cluster(kafka_cluster: MockCluster) -> MockCluster:
    kafka_cluster.create_topic(TOPIC, partitions=1)
    return kafka_cluster


@pytest.fixture(params=ENDINGS)
def ending(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def address(log: Path, process: subprocess.Popen[bytes], pattern: str) -> str:
    until(lambda: process.poll() is not None or re.search(pattern, log.read_text()), "the server's address")
    match = re.search(pattern, log.read_text())
    assert match, log.read_text()
    return match[1]


def to_go(log: Path) -> list[int]:
    """What each process of the server had buffered when it began to close its sender."""
    return [int(count) for count in re.findall(r"Closing the sender, (\d+) envelopes to go", log.read_text())]


def not_sent(log: Path) -> int:
    return sum(int(count) for count in re.findall(r"(\d+) envelopes were not sent", log.read_text()))


def end(process: subprocess.Popen[bytes], log: Path, cluster: MockCluster, ending: str, *, senders: int = 1) -> None:
    """SIGTERM while no broker is there, which comes back when the senders are being closed, or not before the end."""
    process.send_signal(signal.SIGTERM)
    until(lambda: process.poll() is not None or len(to_go(log)) == senders, "the closing")
    if ending == "the broker stays away":
        until(lambda: process.poll() is not None, "the server's end")
    cluster.set_broker_up(1)


def check(cluster: MockCluster, log: Path, ending: str, expected: list[str]) -> None:
    """All that was accepted was buffered until the end; then it was sent, or counted."""
    assert sum(to_go(log)) == len(expected), log.read_text()
    if ending == "the broker comes back":
        assert sorted(values(cluster, TOPIC)) == sorted(expected)
        assert not_sent(log) == 0
    else:
        assert end_offsets(cluster.bootstrap_servers, TOPIC) == {0: 0}
        assert not_sent(log) == len(expected), log.read_text()


def end_under_load(
    process: subprocess.Popen[bytes], url: str, cluster: MockCluster, signal_number: int = signal.SIGTERM
) -> None:
    """Clients send until the server is gone, or the mock cluster would lose the first records: it keeps 5 MB of them.

    What was accepted is in the log, and nothing is there twice.
    """
    accepted: list[str] = []
    asked: list[str] = []
    refusals: set[int] = set()

    def client(name: str) -> None:
        for turn in range(400):
            lines = [f"{name}-{turn}-{i}" for i in range(20)]
            asked.extend(lines)
            try:
                status, _ = post(url, lines)
            except urllib.error.HTTPError as answer:
                with answer:
                    refusals.add(answer.code)
                return
            except (OSError, http.client.HTTPException):
                return  # the server is gone, perhaps in the middle of its answer
            assert status == 202
            accepted.extend(lines)

    clients = [threading.Thread(target=client, args=(str(number),)) for number in range(6)]
    for thread in clients:
        thread.start()
    until(lambda: process.poll() is not None or len(accepted) > 1_000, "accepted events")
    process.send_signal(signal_number)
    for thread in clients:
        thread.join(60)
    until(lambda: process.poll() is not None, "the server's end")
    assert refusals <= {503}
    log_of_topic = Counter(values(cluster, TOPIC))
    assert set(log_of_topic.values()) == {1}
    assert set(accepted) <= set(log_of_topic) <= set(asked)


# -- FastAPI

UVICORN = ("uvicorn", "--app-dir", "examples", "--timeout-graceful-shutdown", "20", "--port", "0")
UVICORN += ("shutdown_fastapi:app",)
UVICORN_IS_AT = r"running on (http://\S+)"


def test_fastapi_closes_its_sender_in_the_lifespan(cluster: MockCluster, tmp_path: Path, ending: str) -> None:
    log = tmp_path / "log"
    variables = {"KAFKA": cluster.bootstrap_servers, "CLOSE_TIMEOUT_S": ENDINGS[ending]}
    lines = [f"event {i}" for i in range(8_000)]
    with server(log, *UVICORN, status=-signal.SIGTERM, **variables) as process:
        url = address(log, process, UVICORN_IS_AT) + "/events"
        cluster.set_broker_down(1)
        for start in range(0, len(lines), 500):
            assert post(url, lines[start : start + 500]) == (202, '{"accepted":500}')
        end(process, log, cluster, ending)
    check(cluster, log, ending, lines)


def test_fastapi_ends_under_load(cluster: MockCluster, tmp_path: Path) -> None:
    cluster.set_rtt(1, 20)
    log = tmp_path / "log"
    with server(log, *UVICORN, status=-signal.SIGTERM, KAFKA=cluster.bootstrap_servers) as process:
        end_under_load(process, address(log, process, UVICORN_IS_AT) + "/events", cluster)
    assert not_sent(log) == 0


# -- gunicorn

GUNICORN = ("gunicorn", "--chdir", "examples", "-c", "examples/shutdown_gunicorn_conf.py", "--bind", "127.0.0.1:0")
GUNICORN_IS_AT = r"Listening at: (http://\S+)"


def booted(log: Path, process: subprocess.Popen[bytes], workers: int = 2) -> str:
    until(lambda: process.poll() is not None or log.read_text().count("Booting worker") == workers, "the workers")
    return address(log, process, GUNICORN_IS_AT)


@pytest.mark.parametrize("options", [(), ("--preload",)], ids=["each worker imports", "preloaded"])
def test_gunicorn_closes_its_senders_in_worker_exit(
    cluster: MockCluster, tmp_path: Path, ending: str, options: tuple[str, ...]
) -> None:
    log = tmp_path / "log"
    variables = {"KAFKA": cluster.bootstrap_servers, "CLOSE_TIMEOUT_S": ENDINGS[ending]}
    sent: list[str] = []
    processes: set[str] = set()
    with server(log, *GUNICORN, *options, "shutdown_gunicorn:app", **variables) as process:
        url = booted(log, process)
        cluster.set_broker_down(1)

        def both_have_answered() -> bool:
            lines = [f"{len(sent)}-{i}" for i in range(500)]
            status, answer = post(url, lines)
            assert status == 202
            sent.extend(lines)
            processes.add(answer.partition(":")[0])
            return len(processes) == 2 and len(sent) > 15_000

        until(both_have_answered, "answers of both workers")
        end(process, log, cluster, ending, senders=2)
    check(cluster, log, ending, sent)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_gunicorn_ends_under_load(cluster: MockCluster, tmp_path: Path, signal_number: int) -> None:
    cluster.set_rtt(1, 20)
    log = tmp_path / "log"
    with server(log, *GUNICORN, "shutdown_gunicorn:app", KAFKA=cluster.bootstrap_servers) as process:
        end_under_load(process, booted(log, process), cluster, signal_number)
    assert not_sent(log) == 0


# -- Celery


@pytest.fixture
def messages(tmp_path: Path) -> Messages:
    return Messages(tmp_path / "messages")


@pytest.fixture
def celery(cluster: MockCluster, messages: Messages) -> dict[str, str]:
    """The variables of a worker."""
    return {"KAFKA": cluster.bootstrap_servers, **messages.of_the_worker}


CELERY = ("celery", "--workdir", "examples", "-A", "shutdown_celery", "worker")
CELERY += ("--concurrency", "2", "--loglevel", "INFO")
ALONE = ("--without-mingle", "--without-gossip")
TASKS, TASK_SIZE = 40, 200
OF_THE_TASKS = [f'"{number}-{i}"' for number in range(TASKS) for i in range(TASK_SIZE)]


def run_tasks(process: subprocess.Popen[bytes], log: Path, cluster: MockCluster, messages: Messages, task: str) -> None:
    program = (
        f"from shutdown_celery import {task} as task\n"
        f"for number in range({TASKS}): task.delay([f'{{number}}-{{i}}' for i in range({TASK_SIZE})])"
    )
    messages.send_by(program, EXAMPLES, KAFKA=cluster.bootstrap_servers)
    until(lambda: process.poll() is not None or log.read_text().count(" succeeded in ") == TASKS, "the tasks")


@pytest.mark.long
def test_celery_closes_its_senders_in_worker_process_shutdown(
    cluster: MockCluster, tmp_path: Path, celery: dict[str, str], messages: Messages, ending: str
) -> None:
    log = tmp_path / "log"
    with server(log, *CELERY, *ALONE, CLOSE_TIMEOUT_S=ENDINGS[ending], **celery) as process:
        until(lambda: process.poll() is not None or " ready." in log.read_text(), "the worker")
        cluster.set_broker_down(1)
        run_tasks(process, log, cluster, messages, "record")
        end(process, log, cluster, ending, senders=2)
    check(cluster, log, ending, OF_THE_TASKS)


@pytest.mark.long
def test_a_celery_task_that_flushes_is_done_when_kafka_has_its_events(
    cluster: MockCluster, tmp_path: Path, celery: dict[str, str], messages: Messages
) -> None:
    log = tmp_path / "log"
    with server(log, *CELERY, *ALONE, **celery) as process:
        run_tasks(process, log, cluster, messages, "record_safely")
        cluster.set_broker_down(1)
        process.send_signal(signal.SIGTERM)
        until(lambda: process.poll() is not None, "the worker's end")
    cluster.set_broker_up(1)
    assert to_go(log) == [0, 0]
    assert sorted(values(cluster, TOPIC)) == sorted(OF_THE_TASKS)


@pytest.mark.long
@pytest.mark.parametrize("what", ["cannot be mapped", "not permitted"])
def test_a_celery_task_that_flushes_fails_when_an_event_is_given_up(
    cluster: MockCluster, tmp_path: Path, celery: dict[str, str], messages: Messages, what: str
) -> None:
    log = tmp_path / "log"
    event = "\ud800" if what == "cannot be mapped" else "x"
    if what == "not permitted":
        cluster.push_request_errors(ApiKey.PRODUCE, ["TOPIC_AUTHORIZATION_FAILED"] * 100)
    program = f"from shutdown_celery import record_safely\nrecord_safely.delay([{event!r}])"
    with server(log, *CELERY, *ALONE, **celery) as process:
        messages.send_by(program, EXAMPLES, KAFKA=cluster.bootstrap_servers)
        until(lambda: process.poll() is not None or " raised unexpected: " in log.read_text(), "the failure")
        process.send_signal(signal.SIGTERM)
        until(lambda: process.poll() is not None, "the worker's end")
    text = log.read_text()
    assert " succeeded in " not in text
    assert re.search(r"UndeliveredError\(.1 envelope was given up; the first: ", text)
    assert values(cluster, TOPIC) == []


# -- Kubernetes


def waiting_bytes(pipe: int) -> int:
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, b"\0\0\0\0"), sys.byteorder)


@pytest.mark.parametrize("is_process_1", [False, True])
def test_a_program_of_its_own_handles_the_signal(
    cluster: MockCluster, tmp_path: Path, ending: str, is_process_1: bool
) -> None:
    command = [sys.executable, "shutdown_worker.py"]
    if is_process_1:
        command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", *command]
        if not shutil.which("unshare") or subprocess.run([*command[:6], "true"], check=False).returncode:
            pytest.skip("platform: no process may be the first of its namespace")
    log = tmp_path / "log"
    lines = [f"event {i}" for i in range(8_000)]
    variables = {"KAFKA": cluster.bootstrap_servers, "CLOSE_TIMEOUT_S": ENDINGS[ending]}
    cluster.set_broker_down(1)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=EXAMPLES, env={**os.environ, **variables}, stdin=subprocess.PIPE, stdout=output, stderr=output
        )
    with process:
        try:
            assert process.stdin is not None
            process.stdin.write("".join(f"{line}\n" for line in lines).encode())
            process.stdin.flush()
            until(lambda: waiting_bytes(process.stdin.fileno()) == 0, "the last line")
            worker = psutil.Process(process.pid)
            if is_process_1:
                (worker,) = worker.children()
            # Impatience changes nothing, and is needed: CPython looks for signals, then it reads. One that comes in
            # between is noticed when the reading ends.
            until(lambda: process.poll() is not None or to_go(log) or worker.send_signal(signal.SIGTERM), "the closing")
            if is_process_1:
                worker.send_signal(signal.SIGTERM)
            if ending == "the broker stays away":
                until(lambda: process.poll() is not None, "the end")
            cluster.set_broker_up(1)
            until(lambda: process.poll() is not None, "the end")
        finally:
            process.kill()
    assert process.returncode == (ending == "the broker stays away"), log.read_text()
    # What it had read of the last buffer, but not sent when the signal came, is its source's to keep.
    check(cluster, log, ending, lines[: to_go(log)[0]])


def manifest() -> dict:
    return yaml.safe_load((EXAMPLES / "shutdown_kubernetes.yaml").read_text())["spec"]["template"]["spec"]


def test_the_deadlines_of_the_pod_fit_into_each_other() -> None:
    pod = manifest()
    (container,) = pod["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    settings = runpy.run_path(str(EXAMPLES / "shutdown_gunicorn_conf.py"))
    assert float(variables["CLOSE_TIMEOUT_S"]) < settings["graceful_timeout"]
    assert float(variables["CLOSE_TIMEOUT_S"]) < settings["timeout"]
    pre_stop_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pre_stop_s + settings["graceful_timeout"] < pod["terminationGracePeriodSeconds"]


def test_the_container_of_the_pod_ends_as_kubernetes_ends_it(cluster: MockCluster, tmp_path: Path) -> None:
    (container,) = manifest()["containers"]
    here = {"0.0.0.0:8000": "127.0.0.1:0"}
    command = [here.get(argument, argument) for argument in container["command"]]
    variables = {each["name"]: each["value"] for each in container["env"]}
    variables["KAFKA"] = cluster.bootstrap_servers
    lines = [f"event {i}" for i in range(2_000)]
    log = tmp_path / "log"
    with server(log, *command, **variables) as process:
        url = booted(log, process)
        cluster.set_broker_down(1)
        pre_stop = subprocess.Popen(container["lifecycle"]["preStop"]["exec"]["command"])
        for start in range(0, len(lines), 100):
            post(url, lines[start : start + 100])
        assert pre_stop.wait(60) == 0
        end(process, log, cluster, "the broker comes back", senders=2)
    check(cluster, log, "the broker comes back", lines)


# -- the page


def test_the_page_shows_the_examples_as_they_are() -> None:
    shown = dict(
        re.findall(r"^<!-- example: (\S+) -->\n```\w+\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    )
    assert shown == {path.name: path.read_text() for path in EXAMPLES.glob("shutdown_*")}


def test_the_table_of_deadlines_has_the_true_defaults() -> None:
    rows = re.findall(r"^\| (\w+) \|.*?\| `(\S+)` \| (.*?) \|", PAGE.read_text(), re.MULTILINE)
    found = {(who, setting): default for who, setting, default in rows}
    celery = Celery().conf
    close_timeout_s = inspect.signature(kbatch.BatchedSender).parameters["close_timeout_s"].default
    assert {place: found.get(place) for place in found if place[0] not in ("Kubernetes", "Docker", "systemd")} == {
        ("kbatch", "close_timeout_s"): f"{close_timeout_s:.0f} s",
        ("uvicorn", "--timeout-graceful-shutdown"): "none",
        ("gunicorn", "graceful_timeout"): f"{gunicorn.config.GracefulTimeout.default} s",
        ("gunicorn", "timeout"): f"{gunicorn.config.Timeout.default} s",
        ("Celery", "worker_proc_alive_timeout"): f"{celery.worker_proc_alive_timeout:.0f} s",
        ("Celery", "task_time_limit"): "none",
    }
    assert uvicorn.Config("app").timeout_graceful_shutdown is None
    assert celery.task_time_limit is None
