"""The page for those who come from confluent-kafka: it shows what is in examples/migration, and each pair is run.

Before and after must leave the same records in Kafka.
"""

import asyncio
import difflib
import importlib.util
import inspect
import json
import logging
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from celery import Celery
from confluent_kafka import Producer
from confluent_kafka.schema_registry import SchemaRegistryClient

import kbatch
from kbatch.testing import ApiKey, MockCluster

from ..waiting import until
from .celery_messages import Messages
from .clients import Stored, read_back
from .test_servers import server

ROOT = Path(__file__).parents[2]
ON_KAFKA = Path(__file__).parents[1] / "kafka" / "test_transactions_on_kafka.py"
PAIRS = ROOT / "examples" / "migration"
PAGE = (ROOT / "docs" / "migrate-from-confluent-kafka.md").read_text(encoding="utf-8")

needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="platform: no process groups, gunicorn or Celery")

APPLICATIONS = {"celery", "django", "fastapi"}
# What wire="kbatch" adds; the other pairs use wire="raw", which adds nothing.
OWN_HEADERS = {"records": {"id", "message-type", "content-type", "sent-at"}}

ORDERS = [
    {
        "id": f"order-{i}",
        "customer": f"Müller {i % 7}",
        "quantity": i % 4,
        "shop": i % 3,
        "placed_ms": 1_700_000_000_000 + i,
    }
    for i in range(60)
]


def load(pair: str, side: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{pair}_{side}", PAIRS / pair / f"{side}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def send_orders(
    pair: str, side: str, cluster: MockCluster, *arguments: Any, config: dict[str, Any] | None = None, **options: Any
) -> Any:
    config = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0, **(config or {})}
    answer = load(pair, side).send_orders(config, ORDERS, *arguments, **options)
    return asyncio.run(answer) if inspect.iscoroutine(answer) else answer


def stored(cluster: MockCluster) -> list[Stored]:
    """What lies in the topic, without the times that nobody chose."""
    chosen = {order["placed_ms"] for order in ORDERS}
    records = read_back(cluster.bootstrap_servers, "orders")
    return [record._replace(timestamp=record.timestamp if record.timestamp in chosen else 0) for record in records]


@pytest.fixture(params=["before", "after"])
def side(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def clusters() -> Iterator[dict[str, MockCluster]]:
    """One for each side, alike."""
    with MockCluster() as before, MockCluster() as after:
        for cluster in (before, after):
            cluster.create_topic("orders", partitions=4)
        yield {"before": before, "after": after}


# -- the page


def test_the_page_shows_each_pair() -> None:
    shown = re.findall(r"^<!-- (before|after|changes): (\w+) -->\n```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(shown) == PAGE.count("<!-- "), "a block without its comment, or a comment without its block"
    texts = {(side, pair): (language, text) for side, pair, language, text in shown}
    assert len(texts) == len(shown)
    expected = {}
    for folder in PAIRS.iterdir():
        before, after = ((folder / f"{side}.py").read_text(encoding="utf-8") for side in ("before", "after"))
        if folder.name in APPLICATIONS:
            expected["changes", folder.name] = "diff", "".join(line + "\n" for line in changes(folder.name))
        else:
            expected["before", folder.name] = "python", before
            expected["after", folder.name] = "python", after
    assert texts == expected


def changes(application: str) -> list[str]:
    """Both files as one: each line, marked where it was removed or added."""
    before, after = (
        (PAIRS / application / f"{side}.py").read_text(encoding="utf-8").splitlines() for side in ("before", "after")
    )
    lines = list(difflib.unified_diff(before, after, lineterm="", n=len(before)))
    return [line.rstrip() for line in lines[3:]]


@pytest.mark.parametrize("application", sorted(APPLICATIONS))
def test_an_application_changes_in_15_lines(application: str) -> None:
    changed = [line for line in changes(application) if line[:1] in ("+", "-")]
    assert any(line.startswith("+") and "kbatch" in line for line in changed)
    assert 0 < len(changed) <= 15, changed  # removed and added, each counted


def test_each_pair_is_run() -> None:
    tests = " ".join(name for name in globals() if name.startswith("test_"))
    # The mock cluster's consumers see no transactions.
    folders = {folder.name for folder in PAIRS.iterdir()} - {"transactions"}
    assert "def test_the_pair_of_the_page_of_migration(" in ON_KAFKA.read_text(encoding="utf-8")
    assert {name for name in folders - SAME_RECORDS.keys() if f"test_{name}_" not in tests} == set()
    assert SAME_RECORDS.keys() | APPLICATIONS <= folders


def settings_of_the_page() -> Iterator[tuple[dict[str, str], str, str]]:
    table = PAGE.partition("## Settings that differ")[2].partition("\n## ")[0]
    for given, answer in re.findall(r"^\| (`.*?) \| (.*?) \|", table, re.MULTILINE):
        given, _, missing = re.split(", or ", given)[0].partition(" without ")
        pairs = [setting.partition("=") for setting in re.findall(r"`(.*?)`", given)]
        settings = [{key: value if equals else "given"} for key, equals, value in pairs]
        if " and " in given:
            settings = [dict(pair for each in settings for pair in each.items())]
        for each in settings:
            yield each, missing.strip("`"), answer


def test_the_table_of_settings_is_there() -> None:
    assert {answer for _, _, answer in settings_of_the_page()} == {"accepted", "accepted with a warning", "refused"}


@pytest.mark.parametrize(("settings", "missing", "answer"), list(settings_of_the_page()), ids=str)
def test_a_setting_is_accepted_or_refused_as_the_page_says(settings: dict[str, str], missing: str, answer: str) -> None:
    config = {"bootstrap.servers": "127.0.0.1:1", **settings}
    named = re.escape(missing) or "|".join(map(re.escape, settings))
    if answer == "refused":
        with pytest.raises(kbatch.ConfigError, match=named):
            kbatch.Producer(config)
    elif answer == "accepted":
        kbatch.Producer(config).close(0)
    else:
        with pytest.warns(UserWarning, match=named):
            producer = kbatch.Producer(config)
        producer.close(0)


# -- the pairs


def nothing() -> tuple[Any, ...]:
    return ()


def a_registry() -> tuple[Any, ...]:
    return (SchemaRegistryClient.new_client({"url": "mock://orders"}),)


SAME_RECORDS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "asyncio_futures": nothing,
    "avro": a_registry,
    "callbacks": nothing,
    "loop": nothing,
    "one_message": nothing,
    "queue_full": nothing,
    "records": nothing,
    "serializers": nothing,
    "shutdown": nothing,
}


@pytest.mark.parametrize("pair", SAME_RECORDS)
def test_before_and_after_send_the_same(pair: str, clusters: dict[str, MockCluster]) -> None:
    found = {}
    for side, cluster in clusters.items():
        assert send_orders(pair, side, cluster, *SAME_RECORDS[pair]()) in (None, [])
        found[side] = stored(cluster)
    own = OWN_HEADERS.get(pair, set())
    extra = {name for record in found["after"] for name, _ in record.headers if name in own}
    assert extra == own
    assert [
        record._replace(headers=[header for header in record.headers if header[0] not in own])
        for record in found["after"]
    ] == found["before"]
    assert len(found["before"]) == len(ORDERS)


def test_loop_tells_the_same_failures(side: str, kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=4)
    kafka_cluster.push_request_errors(ApiKey.PRODUCE, ["MSG_SIZE_TOO_LARGE"] * 1_000)
    failed = send_orders("loop", side, kafka_cluster)
    assert sorted(failed) == sorted((order["id"], "MSG_SIZE_TOO_LARGE") for order in ORDERS)


def test_one_message_that_fails_raises(side: str, kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=4)
    kafka_cluster.push_request_errors(ApiKey.PRODUCE, ["MSG_SIZE_TOO_LARGE"])
    with pytest.raises(Exception, match="Message size too large") as caught:
        send_orders("one_message", side, kafka_cluster)
    assert type(caught.value).__name__ == {"before": "KafkaException", "after": "BatchError"}[side]
    assert stored(kafka_cluster) == []


def test_queue_full_waits(clusters: dict[str, MockCluster]) -> None:
    config = {"queue.buffering.max.messages": 5}
    for side, cluster in clusters.items():
        cluster.set_rtt(1, 20)
        producer = Producer({"bootstrap.servers": cluster.bootstrap_servers, **config})
        for _ in range(5):
            producer.produce("others", b"x")
        with pytest.raises(BufferError):  # what the pair is about does come
            producer.produce("others", b"x")
        producer.purge()
        producer.flush()
        send_orders("queue_full", side, cluster, config=config)
    assert stored(clusters["before"]) == stored(clusters["after"])
    assert len(stored(clusters["after"])) == len(ORDERS)


def test_callbacks_are_called(side: str, kafka_cluster: MockCluster) -> None:
    kafka_cluster.set_rtt(1, 100)
    told: list[str] = []
    threads: set[threading.Thread] = set()

    def stats_cb(text: str) -> None:
        told.append(json.loads(text)["type"])
        threads.add(threading.current_thread())

    lines: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = lines.append
    logger = logging.Logger("librdkafka")
    logger.addHandler(handler)
    config = {"stats_cb": stats_cb, "statistics.interval.ms": 20, "logger": logger, "debug": "msg", "log_level": 7}
    send_orders("callbacks", side, kafka_cluster, config=config)
    assert set(told) == {"producer"}
    assert lines
    if side == "after":
        assert [thread.name for thread in threads] == ["kbatch-callbacks"]


def test_shutdown_tells_what_was_not_delivered(side: str, kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=4)
    kafka_cluster.set_broker_down(1)
    with pytest.raises((RuntimeError, kbatch.UndeliveredError), match=rf"{len(ORDERS)} messages were not "):
        send_orders("shutdown", side, kafka_cluster, timeout_s=0.2)


def test_own_tests_pass(side: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", f"{side}.py"]
    done = subprocess.run(command, cwd=PAIRS / "own_tests", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


# -- the applications


def request(url: str, body: str) -> dict[str, Any]:
    question = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(question, timeout=60) as answer:
        assert answer.status == 201
        return dict(json.loads(answer.read()))


def address(log: Path, process: subprocess.Popen[bytes], pattern: str) -> str:
    until(lambda: process.poll() is not None or re.search(pattern, log.read_text()), "the server's address")
    match = re.search(pattern, log.read_text())
    assert match, log.read_text()
    return match[1]


def contents(cluster: MockCluster) -> list[tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]]:
    return sorted((r.key, r.value, r.headers) for r in read_back(cluster.bootstrap_servers, "orders"))


@needs_posix
def test_fastapi_sends_orders(side: str, kafka_cluster: MockCluster, tmp_path: Path) -> None:
    kafka_cluster.create_topic("orders", partitions=4)
    log = tmp_path / "log"
    command = ("uvicorn", "--app-dir", "examples/migration/fastapi", "--port", "0", f"{side}:app")
    orders = [{"id": f"order-{i}", "customer": f"Müller {i}"} for i in range(10)]
    answers: list[tuple[int, int]] = []
    with server(log, *command, KAFKA=kafka_cluster.bootstrap_servers) as process:
        url = address(log, process, r"running on (http://\S+)") + "/orders"
        for order in orders:
            answer = request(url, json.dumps(order))
            answers.append((answer["partition"], answer["offset"]))
        kafka_cluster.push_request_errors(ApiKey.PRODUCE, ["MSG_SIZE_TOO_LARGE"])
        with pytest.raises(urllib.error.HTTPError, match="503") as caught:
            request(url, json.dumps(orders[0]))
        caught.value.close()
        process.send_signal(signal.SIGINT)
    found = {(r.partition, r.offset): (r.key, r.value) for r in read_back(kafka_cluster.bootstrap_servers, "orders")}
    expected = [
        (order["id"].encode(), json.dumps(order, ensure_ascii=False, separators=(",", ":")).encode())
        for order in orders
    ]
    assert [found.pop(answer) for answer in answers] == expected
    assert not found


@needs_posix
def test_django_sends_orders(side: str, kafka_cluster: MockCluster, tmp_path: Path) -> None:
    kafka_cluster.create_topic("orders", partitions=4)
    kafka_cluster.set_rtt(1, 200)  # so that orders are in flight when the server ends
    log = tmp_path / "log"
    command = ("gunicorn", "--chdir", "examples/migration/django", "--bind", "127.0.0.1:0", f"{side}:application")
    with server(log, *command, KAFKA=kafka_cluster.bootstrap_servers) as process:
        url = address(log, process, r"Listening at: (http://\S+)") + "/orders"
        ids = [request(url, f"Müller {i}")["id"] for i in range(10)]
        process.send_signal(signal.SIGTERM)
    assert contents(kafka_cluster) == sorted(
        (str(i).encode(), json.dumps({"id": i, "customer": f"Müller {n}"}).encode(), []) for n, i in enumerate(ids)
    )
    assert len(ids) == 10


@pytest.mark.long
@needs_posix
def test_celery_sends_orders(side: str, kafka_cluster: MockCluster, tmp_path: Path) -> None:
    kafka_cluster.create_topic("orders", partitions=4)
    log, messages = tmp_path / "log", Messages(tmp_path / "messages")
    orders = [{"id": f"order-{i}", "customer": f"Müller {i}"} for i in range(20)]
    client = Celery("orders", broker="filesystem://", broker_transport_options=messages.of_who_sends)
    kafka_cluster.push_request_errors(ApiKey.PRODUCE, ["MSG_SIZE_TOO_LARGE"])  # one task is tried again
    command = ("celery", "--workdir", "examples/migration/celery", "-A", side, "worker", "--concurrency", "2")
    no_peers = ("--without-mingle", "--without-gossip", "--loglevel", "INFO")
    variables = {"KAFKA": kafka_cluster.bootstrap_servers, **messages.of_the_worker}
    with server(log, *command, *no_peers, **variables) as process:
        for order in orders:
            client.send_task("send_order", [order])
        messages.deliver()
        until(lambda: process.poll() is not None or log.read_text().count(" succeeded in ") == 20, "the tasks")
        process.send_signal(signal.SIGTERM)
    assert contents(kafka_cluster) == sorted((order["id"].encode(), json.dumps(order).encode(), []) for order in orders)
    assert log.read_text().count("Retry in") == 1
