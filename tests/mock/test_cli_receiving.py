"""``kbatch listen``, ``consume``, ``replay`` and ``dead-topic``, read back by confluent-kafka's consumer."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition

import kbatch
from kbatch.cli._failure import Failure
from kbatch.cli._listen import _abort
from kbatch.cli._topic_reader import TopicReader
from kbatch.testing import MockCluster
from tests.waiting import until

from .clients import produce, produce_named, read, read_back
from .test_cli import COMMAND, assert_one_line, environment, run, run_here

SHOP = """
import sys
import msgspec

class Order(msgspec.Struct):
    n: int

class Sold(Exception):
    pass

def handle(envelope):
    sys.stdout.write(f"handled {envelope.message.n}\\n")  # in one piece: there are two threads
    sys.stdout.flush()
    if envelope.message.n == 1:
        raise LookupError("no stock")
    if envelope.message.n == 2:
        raise Sold("out")

broken = 7
"""


@pytest.fixture(scope="module")
def cluster() -> Any:
    with MockCluster(process=True) as made:
        yield made


@pytest.fixture
def servers(cluster: MockCluster) -> tuple[str, str]:
    return "-X", f"bootstrap.servers={cluster.bootstrap_servers}"


@pytest.fixture
def topic(cluster: MockCluster, request: pytest.FixtureRequest) -> str:
    name = re.sub(r"\W", "-", request.node.name)[:150]
    cluster.create_topic(name, 1)
    cluster.create_topic(f"{name}.dead", 1)
    return name


def send(cluster: MockCluster, topic: str, *numbers: int, headers: Any = ()) -> None:
    with kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers}) as producer:
        orders = [
            kbatch.Envelope({"n": n}, key=f"k{n % 2}", message_type="order", timestamp=1_700_000_000_000 + n * 60_000,
                            headers=headers)
            for n in numbers
        ]  # fmt: skip
        producer.send_batch(topic, orders).raise_for_errors()


def rows(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def numbers(out: str) -> list[int]:
    return [json.loads(line)["n"] for line in out.splitlines()]


def bury(cluster: MockCluster, topic: str, count: int) -> None:
    """Dead letters as a listener sends them."""
    letters = []
    for n in range(count):
        failure = {
            "attempts": "3",
            "exception-type": "LookupError",
            "exception-message": "no stock" if n % 2 else "[red]gone",
            "failed-at": "1700000000250",
            "failed-group": "billing",
            "original-destination": f"kafka://topic/{topic}",
            "original-partition": "0",
            "original-offset": str(n),
            "original-timestamp": "1690000000000",
        }
        own = [("h", b"\xff"), ("h", None), ("message-type", b"order")]
        headers = own + [(name, text.encode()) for name, text in failure.items()]
        letters.append({"value": b'{"n": %d}' % n, "key": b"k%d" % (n % 2), "headers": headers})
    assert produce(cluster.bootstrap_servers, f"{topic}.dead", letters) == [None] * count


# -- consume


def test_consume_prints_records_with_their_headers(cluster: MockCluster, topic: str, servers: tuple[str, str]) -> None:
    send(cluster, topic, 0, headers=[("h", b"\xff")])
    status, out, err = run_here("consume", topic, *servers)
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == f"{topic} [0] at offset 0, 2023-11-14T22:13:20.000Z, key k0, order"
    assert "  message-type: order" in out.splitlines()
    assert "  h: hex ff" in out.splitlines()
    assert out.splitlines()[-1] == '  {"n":0}'
    (row,) = rows(run_here("consume", topic, *servers, "--json")[1])
    (stored,) = read_back(cluster.bootstrap_servers, topic)
    assert row.pop("id") == dict(stored.headers)["id"].decode()
    headers = row.pop("headers")
    assert {"name": "h", "value_base64": "/w=="} in headers
    assert len(headers) == len(stored.headers)
    assert row == {
        "topic": topic, "partition": 0, "offset": 0, "time": "2023-11-14T22:13:20.000Z", "key": "k0",
        "message_type": "order", "attempts": 0, "value": {"n": 0},
    }  # fmt: skip


def test_consume_begins_and_ends_where_it_is_told(cluster: MockCluster, topic: str, servers: tuple[str, str]) -> None:
    send(cluster, topic, *range(6))

    def consumed(*options: Any) -> list[int]:
        status, out, err = run_here("consume", topic, *servers, "--values", *options)
        assert (status, err) == (0, "")
        return numbers(out)

    assert consumed() == [0, 1, 2, 3, 4, 5]
    assert consumed("--from", 4) == [4, 5]
    assert consumed("--from", 2, "--until", 4) == [2, 3]
    assert consumed("--count", 2) == [0, 1]
    assert consumed("--key", "k1") == [1, 3, 5]
    assert consumed("--key", "k1", "-n", 2) == [1, 3]
    assert consumed("--from", "end") == []
    assert consumed("--partition", 0, "--from", 5) == [5]
    at = datetime.fromtimestamp(1_700_000_000 + 180, timezone.utc)
    assert consumed("--from", "1s") == []
    # The mock cluster answers questions for times with the end, whatever the time.
    assert set(consumed("--from", at.isoformat())) <= {3, 4, 5}


def test_what_consume_prints_as_values_produce_reads(
    cluster: MockCluster, topic: str, servers: tuple[str, str]
) -> None:
    produce(cluster.bootstrap_servers, topic, [{"value": b'{"n": 1,\n "k": "a"}'}, {"value": b'{"n": 2, "k": "b"}'}])
    status, out, _ = run("consume", topic, *servers, "--values")
    assert (status, len(out.splitlines())) == (0, 2)
    status, _, err = run("produce", "-", "-t", f"{topic}.dead", "-k", "k", *servers, input=out)
    assert status == 0, err
    copies = read_back(cluster.bootstrap_servers, f"{topic}.dead")
    assert [(each.key, json.loads(each.value or b"")) for each in copies] == [
        (b"a", {"n": 1, "k": "a"}), (b"b", {"n": 2, "k": "b"})
    ]  # fmt: skip


def test_what_consume_prints_as_json_produce_sends_again(
    cluster: MockCluster, topic: str, servers: tuple[str, str]
) -> None:
    values = [
        b'{"price": 1.00, "n": 123456789012345678901234567890,\n "name": "\xc3\xa9\xc2\x9b", "big": 1e400}',
        b'"\\ud800"', b'"\xff"', b"no JSON", b"null", b" null", None, b"", b"\x00\xff", b"[" * 2000 + b"]" * 2000,
    ]  # fmt: skip
    headers = [("h", b"\xff"), ("h", None), ("h", b""), ("type", "caf\u00e9".encode())]
    keys = [b"k", b"\xff\x00", b"", None]
    given = [
        {"key": keys[n % 4], "value": value, "headers": headers[: n % 5]} for n, value in enumerate(values)
    ]  # fmt: skip
    assert produce(cluster.bootstrap_servers, topic, given) == [None] * len(values)
    status, out, _ = run("consume", topic, *servers, "--json")
    assert (status, len(out.splitlines()), out.isascii()) == (0, len(values), True)
    assert '"price":1.00,' in out
    status, _, err = run("produce", "-", "-t", f"{topic}.dead", "--records", *servers, input=out)
    assert status == 0, err
    copies = read_back(cluster.bootstrap_servers, f"{topic}.dead")
    assert [(each.key, list(each.headers)) for each in copies] == [(each["key"], each["headers"]) for each in given]
    assert [each.value for each in copies[1:]] == values[1:]
    price = '{"price":1.00,"n":123456789012345678901234567890,"name":"\\u00e9\\u009b","big":1e400}'
    assert copies[0].value == price.encode()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"n": 1}', "it has no `value`"),
        ("[1]", "Expected `object`, got `array`"),
        ("{", "not JSON"),
        ('{"key": 1, "value": 2}', "`$.key`"),
        ('{"headers": [{"name": "h"}], "value": 2}', "header 'h' has no `value`"),
        ('{"key_base64": "?", "value": 2}', "Invalid base64"),
    ],
)
def test_a_line_that_is_no_record_is_named_and_kept(
    cluster: MockCluster, topic: str, servers: tuple[str, str], tmp_path: Path, line: str, says: str
) -> None:
    kept = tmp_path / "rejects"
    asks = ("produce", "-", "-t", topic, "--records", "--rejects", str(kept), *servers)
    status, _, err = run(*asks, input=f'{{"value": 1}}\n\n{line}\n')
    assert (status, kept.read_text()) == (1, f"{line}\n")
    assert says in err
    assert "line 3: " in err
    assert [each.value for each in read_back(cluster.bootstrap_servers, topic)] == [b"1"]


@pytest.mark.parametrize(
    "options", [("--key", "n"), ("--message-type", "order"), ("--source", "shop"), ("--wire", "raw")]
)
def test_records_have_keys_and_headers_of_their_own(
    topic: str, servers: tuple[str, str], options: tuple[str, str]
) -> None:
    asks = ("produce", "-", "-t", topic, "--records", *options, *servers)
    assert_one_line(run_here(*asks), 2, f"leave out {options[0]}")


@pytest.mark.long
def test_a_header_whose_name_is_no_text_stops_nothing(
    cluster: MockCluster, topic: str, servers: tuple[str, str], tmp_path: Path
) -> None:
    produce_named(cluster.bootstrap_servers, topic, b"\xff", b"1")
    send(cluster, topic, 2, headers=[("original-destination", f"kafka://topic/{topic}.dead")])
    why = "the name of one of its headers is not UTF-8"
    status, out, err = run("consume", topic, *servers)  # not here: what goes wrong ends a process
    assert (status, err) == (0, "")
    assert out.splitlines()[1:3] == [f"  not readable: {why}", "  1"]
    assert out.splitlines()[-1] == '  {"n":2}'
    status, out, err = run("consume", topic, *servers, "--json")
    assert (status, err) == (0, "")
    bad, good = rows(out)
    assert (bad["error"], bad["headers"], bad["value"], bad["key"]) == (why, None, 1, None)
    assert good["value"] == {"n": 2}
    again = tmp_path / "again"
    again.write_text(out.splitlines()[0])
    told = run_here("produce", again, "-t", topic, "--records", *servers)[2]
    assert "line 1: not a record as `kbatch consume --json` prints it: Expected `array`, got `null`" in told
    status, out, err = run("dead-topic", "list", topic, *servers, "--json")
    assert (status, err) == (0, "")
    assert [each["error"] for each in rows(out)] == [why, ""]
    status, out, err = run("dead-topic", "show", topic, "0:0", *servers)
    assert (status, err) == (0, "")
    assert out.splitlines()[1:] == [f"  not readable: {why}", "  1"]
    left_out = "kbatch: 1 record left out: the name of a header is not UTF-8\n"
    for to in ((), ("--to", f"{topic}.dead")):
        assert run("replay", topic, *servers, "--dry-run", *to) == (
            0,
            f"would be replayed: 1 to {topic}.dead\n",
            left_out,
        )
    assert run("replay", topic, *servers, "--yes") == (1, f"1 record replayed: 1 to {topic}.dead\n", left_out)
    assert [each.value for each in read_back(cluster.bootstrap_servers, f"{topic}.dead")] == [b'{"n":2}']


def test_a_time_of_no_calendar_is_no_time(cluster: MockCluster, topic: str, servers: tuple[str, str]) -> None:
    late = [253_402_300_799_000, 253_402_300_800_000, 1_700_000_000_000_000]  # the last are microseconds
    given: list[dict[str, Any]] = [{"value": b"1", "timestamp": each} for each in late]
    assert produce(cluster.bootstrap_servers, topic, given) == [None] * 3
    status, out, err = run_here("consume", topic, *servers, "--json")
    assert (status, err) == (0, "")
    assert [each["time"] for each in rows(out)] == ["9999-12-31T23:59:59.000Z", None, None]
    assert ", no time, " in run_here("consume", topic, *servers, "--from", 2)[1]
    assert run_here("consume", topic, *servers, "--values", "--from", "999999999d")[0] == 0


def test_consume_commits_for_a_group_only_when_it_is_asked_to(
    cluster: MockCluster, topic: str, servers: tuple[str, str]
) -> None:
    send(cluster, topic, *range(4))
    asks = ("consume", topic, *servers, "--values", "--group", f"g-{topic}", "--from", "committed")

    def committed() -> int:
        consumer = Consumer({"bootstrap.servers": cluster.bootstrap_servers, "group.id": f"g-{topic}"})
        try:
            return int(consumer.committed([TopicPartition(topic, 0)], timeout=10)[0].offset)
        finally:
            consumer.close()

    assert numbers(run_here(*asks)[1]) == [0, 1, 2, 3]
    assert committed() < 0
    assert numbers(run_here(*asks, "--count", 3, "--commit")[1]) == [0, 1, 2]
    assert committed() == 3
    assert numbers(run_here(*asks)[1]) == [3]


def test_consume_commits_nothing_that_could_not_be_printed(
    cluster: MockCluster, topic: str, servers: tuple[str, str]
) -> None:
    send(cluster, topic, *range(4))
    asks = [*COMMAND, "consume", topic, *servers, "--values", "--group", f"g-{topic}", "--commit"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(asks, stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), timeout=60)
    assert (done.returncode, done.stderr) == (1, "kbatch: cannot write to standard output: No space left on device\n")
    without = ["sh", "-c", '"$@" >&-', "sh", *asks]
    done = subprocess.run(without, stderr=subprocess.PIPE, text=True, env=environment(), timeout=60)
    assert (done.returncode, done.stderr) == (1, "kbatch: there is no standard output to print to\n")
    consumer = Consumer({"bootstrap.servers": cluster.bootstrap_servers, "group.id": f"g-{topic}"})
    try:
        assert consumer.committed([TopicPartition(topic, 0)], timeout=10)[0].offset < 0
    finally:
        consumer.close()


def test_consume_ends_when_its_reader_is_gone(cluster: MockCluster, topic: str, servers: tuple[str, str]) -> None:
    send(cluster, topic, 0)
    asks = [*COMMAND, "consume", topic, *servers, "--values", "--follow"]
    pipe = subprocess.PIPE
    with subprocess.Popen(asks, stdout=pipe, stderr=pipe, text=True, env=environment()) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == '{"n":0}\n'
            process.stdout.close()
            send(cluster, topic, 1)
            assert process.wait(timeout=60) == 0
            assert process.stderr is not None
            assert process.stderr.read() == ""
        finally:
            process.kill()


def test_consume_follows_until_it_is_interrupted(cluster: MockCluster, topic: str, servers: tuple[str, str]) -> None:
    send(cluster, topic, 0)
    command = [*COMMAND, "consume", topic, *servers, "--values", "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"n": 0}
        send(cluster, topic, 1)
        assert json.loads(process.stdout.readline()) == {"n": 1}
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


@pytest.mark.skipif(os.name == "nt", reason="platform: signals")
@pytest.mark.parametrize("signals", [1, 2])
def test_what_can_lose_nothing_ends_at_the_second_signal_whatever_it_waits_for(signals: int) -> None:
    program = f"""if True:
        import signal, time
        from kbatch.cli._interrupt import Interrupt

        with Interrupt(None, {0.05 if signals == 1 else 1000}):
            for _ in range({signals}):
                signal.raise_signal(signal.SIGTERM)
            while True:
                time.sleep(60)
    """
    assert subprocess.run([sys.executable, "-c", program], env=environment(), timeout=60).returncode == 143


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("consume", "t"), "no broker is named"),
        (("consume", "t", "--from", "soon"), "--from takes beginning, end, an offset, an age"),
        (("consume", "t", "--group", "g", "--from", "soon"), "--from takes beginning, end, committed, an offset"),
        (("consume", "t", "--until", "beginning"), "--until takes end, an offset"),
        (("consume", "t", "--group", "g", "--until", "committed"), "--until takes end, an offset"),
        (("consume", "t", "--until", "soon"), "--until takes end, an offset"),
        (("consume", "t", "--from", "committed"), "--from committed needs --group"),
        (("replay", "t", "--from", "committed"), "--from committed needs --group, which consume has"),
        (("consume", "t", "--json", "--values"), "two forms"),
        (("consume", "t", "--commit"), "--commit is for a --group"),
        (("consume", "t", "--commit", "--group", "g", "--key", "k"), "--commit passes by what --key leaves out"),
        (("dead-topic", "replay", "t"), "say which: PARTITION:OFFSET"),
        (("dead-topic", "replay", "t", "0:1", "--all"), "say which: PARTITION:OFFSET"),
        (("dead-topic", "show", "t", "7"), "a record is named by PARTITION:OFFSET"),
        (("listen", "t"), "no handler is named"),
        (("listen", "--handler", "json:loads"), "no topic is named"),
        (("listen", "t", "--handler", "json"), "--handler takes MODULE:NAME"),
        (("listen", "t", "--handler", "nowhere:handle"), "cannot import nowhere:handle: ModuleNotFoundError"),
    ],
)
def test_what_is_wrong_in_a_command_line_is_said_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    servers = () if message.startswith("no broker") else ("-X", "bootstrap.servers=localhost:1")
    assert_one_line(run_here(*arguments, *servers), 2, message)


# -- dead letters


def test_dead_letters_are_listed_and_shown(cluster: MockCluster, topic: str, servers: tuple[str, str]) -> None:
    bury(cluster, topic, 3)
    found = rows(run_here("dead-topic", "list", f"{topic}.dead", *servers, "--json")[1])
    assert found[1] == {
        "place": "0:1", "failed_at": "2023-11-14T22:13:20Z", "origin": f"{topic} [0] 1", "key": "k1", "attempts": "3",
        "error": "LookupError: no stock",
    }  # fmt: skip
    assert [each["place"] for each in found] == ["0:0", "0:1", "0:2"]
    status, out, _ = run_here("dead-topic", "list", f"{topic}.dead", *servers, "--error", "[red]", "--limit", 1)
    assert status == 0
    assert "0:0" in out
    assert "0:2" not in out
    assert rows(run_here("dead-topic", "list", f"{topic}.dead", *servers, "--json", "--origin", "other")[1]) == []
    status, out, err = run_here("dead-topic", "show", f"{topic}.dead", "0:1", *servers)
    assert (status, err) == (0, "")
    assert "  exception-message: no stock" in out
    assert '  {"n": 1}' in out
    assert_one_line(run_here("dead-topic", "show", f"{topic}.dead", "0:9", *servers), 1, "1 record not found")


def test_replay_sends_records_back_as_they_were(cluster: MockCluster, topic: str, servers: tuple[str, str]) -> None:
    bury(cluster, topic, 3)
    dead = f"{topic}.dead"
    status, out, _ = run_here("replay", dead, *servers, "--dry-run")
    assert (status, out) == (0, f"would be replayed: 3 to {topic}\n")
    asked = f"replay 3 records (3 to {topic})? Say so by --yes"
    assert_one_line(run_here("replay", dead, *servers), 2, asked)
    assert read_back(cluster.bootstrap_servers, topic) == []
    status, out, err = run_here("replay", dead, *servers, "--yes", "--key", "k0")
    assert (status, out, err) == (0, f"2 records replayed: 2 to {topic}\n", "")
    copies = read_back(cluster.bootstrap_servers, topic)
    assert [(each.key, each.value) for each in copies] == [(b"k0", b'{"n": 0}'), (b"k0", b'{"n": 2}')]
    own = [("h", b"\xff"), ("h", None), ("message-type", b"order")]
    assert [each.headers for each in copies] == [own] * 2
    status, out, _ = run_here("dead-topic", "replay", dead, "0:1", *servers, "--yes", "--json")
    assert (status, rows(out)) == (0, [{"replayed": 1, "found": 1, "dry_run": False}])
    assert read_back(cluster.bootstrap_servers, topic)[2].value == b'{"n": 1}'
    assert len(read_back(cluster.bootstrap_servers, dead)) == 3


def test_replay_of_a_topic_onto_itself_ends(cluster: MockCluster, topic: str, servers: tuple[str, str]) -> None:
    send(cluster, topic, *range(5))
    told = "5 records do not say which topic was the first; give --to TOPIC"
    assert_one_line(run_here("replay", topic, *servers, "--yes"), 2, told)
    status, out, _ = run_here("replay", topic, *servers, "--yes", "--to", topic, "--from", 1, "--until", 3)
    assert (status, out) == (0, f"2 records replayed: 2 to {topic}\n")
    stored = read_back(cluster.bootstrap_servers, topic)
    assert [json.loads(each.value or b"")["n"] for each in stored] == [0, 1, 2, 3, 4, 1, 2]
    assert stored[5].headers == stored[1].headers
    status, out, _ = run_here("replay", topic, *servers, "--to", topic, "--from", "end")
    assert (status, out) == (0, "nothing is there to be replayed\n")


def test_replay_of_some_sends_those_that_were_counted_whatever_partition_comes_first(
    cluster: MockCluster, topic: str, servers: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = 0

    class Reader(TopicReader):
        def messages(self, is_over: Any) -> Iterator[Any]:
            nonlocal passes
            passes += 1
            found = [each for each in super().messages(is_over) if each is not None]
            found.sort(key=lambda each: each.partition(), reverse=passes % 2 == 0)
            yield from found

    monkeypatch.setattr("kbatch.cli._replay.TopicReader", Reader)
    both = f"{topic}.both"
    cluster.create_topic(both, 2)
    given = [{"value": b"%d" % n, "partition": n % 2} for n in range(8)]
    assert produce(cluster.bootstrap_servers, both, given) == [None] * 8
    status, out, err = run_here("replay", both, *servers, "--yes", "--to", topic, "--count", 3)
    assert (status, out, err) == (0, f"3 records replayed: 3 to {topic}\n", "")
    assert [each.value for each in read_back(cluster.bootstrap_servers, topic)] == [b"0", b"2", b"4"]
    assert passes == 2


def test_replay_from_an_age_sends_what_was_counted_however_long_that_took(
    cluster: MockCluster, topic: str, servers: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begins = iter(range(3))

    class Reader(TopicReader):
        def _offsets_of(self, point: tuple[str, int], marks: dict[int, tuple[int, int]]) -> dict[int, int]:
            # The cluster knows no times.
            return {0: next(begins)} if point[0] == "time" else super()._offsets_of(point, marks)

    monkeypatch.setattr("kbatch.cli._replay.TopicReader", Reader)
    send(cluster, topic, *range(3))
    status, out, err = run_here("replay", topic, *servers, "--yes", "--to", f"{topic}.dead", "--from", "1h")
    assert (status, out, err) == (0, f"3 records replayed: 3 to {topic}.dead\n", "")


def test_replay_sends_nothing_if_a_record_that_is_named_is_not_there(
    cluster: MockCluster, topic: str, servers: tuple[str, str]
) -> None:
    bury(cluster, topic, 2)
    for places in (("0:0", "0:7"), ("0:7",), ("0:0", "3:0")):
        told = run_here("dead-topic", "replay", f"{topic}.dead", *places, *servers, "--yes")
        assert_one_line(told, 1, "1 record not found")
    assert read_back(cluster.bootstrap_servers, topic) == []


@pytest.mark.skipif(os.name == "nt", reason="platform: no pseudo-terminals")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_the_question_of_replay(
    cluster: MockCluster, topic: str, servers: tuple[str, str], number: int, status: int
) -> None:
    pty = pytest.importorskip("pty", reason="platform: no pseudo-terminals")
    bury(cluster, topic, 2)
    master, slave = pty.openpty()
    command = [*COMMAND, "replay", f"{topic}.dead", *servers]
    with subprocess.Popen(command, stdin=slave, stdout=subprocess.PIPE, stderr=slave, env=environment()) as child:
        try:
            os.close(slave)
            shown = b""
            while b"[y/N]" not in shown:
                shown += os.read(master, 1000)
            child.send_signal(number)
            assert child.wait(60) == status
        finally:
            child.kill()
    os.close(master)
    assert read_back(cluster.bootstrap_servers, topic) == []


def test_a_signal_ends_a_replay_that_no_broker_answers(
    kafka_cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    kafka_cluster.create_topic("t")
    send(kafka_cluster, "t", *range(3))
    real = kbatch.Producer.send_batch
    closed = []

    def send_batch(producer: kbatch.Producer, *arguments: Any) -> kbatch.DeliveryReport:
        kafka_cluster.set_broker_down()

        def interrupt() -> None:
            until(lambda: len(producer), "something is in flight")
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            return real(producer, *arguments)
        finally:
            thread.join()
            closed.append(producer.closed)

    monkeypatch.setattr("kbatch.Producer.send_batch", send_batch)
    monkeypatch.setattr("kbatch.cli._replay._GRACE_S", 0.1)  # a second signal would do as well
    servers = ("-X", f"bootstrap.servers={kafka_cluster.bootstrap_servers}", "-X", "delivery.timeout.ms=20000")
    status, out, _ = run_here("replay", "t", *servers, "--yes", "--to", "other")
    assert (status, out, closed) == (130, "0 of 3 replayed\n", [True])


# -- listen


@pytest.fixture
def shop(cluster: MockCluster, topic: str, tmp_path: Any) -> Any:
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "listen.toml").write_text(f"""
handler = "shop:handle"
topics = ["{topic}"]
reject_on = ["shop:Sold"]

[types]
order = "shop:Order"

[listener]
dead_letter_topic = "{topic}.dead"
concurrency = 2

[retry]
max_attempts = 2

[kafka]
bootstrap.servers = "{cluster.bootstrap_servers}"
group.id = "g-{topic}"
session.timeout.ms = 1500
heartbeat.interval.ms = 300
""")
    return tmp_path


@contextlib.contextmanager
def listening(shop: Any, *options: str) -> "Iterator[subprocess.Popen[str]]":
    command = [*COMMAND, "listen", "--config", "listen.toml", *options]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=shop, stdout=pipe, stderr=pipe, text=True, env=environment()) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_listen_hands_records_to_a_handler_until_a_signal(
    cluster: MockCluster, topic: str, shop: Any, number: int, status: int
) -> None:
    send(cluster, topic, *range(6))
    with listening(shop, "--json") as process:
        assert process.stdout is not None
        seen = []
        while len(seen) < 7:  # one of them twice
            line = process.stdout.readline()
            assert line, process.communicate(timeout=60)
            seen.append(int(line.split()[1]))
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert sorted(seen) == [0, 1, 1, 2, 3, 4, 5]
    told = [json.loads(line) for line in err.splitlines()]
    assert told[0]["message"] == f"listener of {topic} begins"
    assert told[-1]["message"].startswith("stopped by a signal; 6 done, 3 failed attempts, 2 dead")
    (counted,) = rows(out)
    assert (counted["exit_status"], counted["dead"], counted["in_flight"]) == (status, 2, 0)
    letters = read_back(cluster.bootstrap_servers, f"{topic}.dead")
    kinds = [dict(each.headers)["exception-type"] for each in letters]
    assert sorted(kinds) == [b"LookupError", b"shop.Sold"]


@pytest.mark.parametrize(("options", "seconds"), [((), 20), (("--grace", "7"), 7)])
def test_a_signal_leaves_to_handlers_what_the_option_or_the_file_says(
    shop: Any, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], seconds: float
) -> None:
    given: list[Any] = []

    def interrupt(abort: Any, grace_s: float) -> Any:
        given.append(grace_s)
        raise Failure("enough")

    made = kbatch.Listener

    def listener(*arguments: Any, **listeners: Any) -> kbatch.Listener:
        given.append(listeners["close_timeout_s"])
        return made(*arguments, **listeners)

    monkeypatch.setattr("kbatch.cli._listen.Interrupt", interrupt)
    monkeypatch.setattr("kbatch.Listener", listener)
    monkeypatch.chdir(shop)
    file = shop / "listen.toml"
    file.write_text(file.read_text().replace("concurrency = 2", "concurrency = 2\nclose_timeout_s = 20"))
    status, _, err = run_here("listen", "--config", "listen.toml", *options)
    assert (status, err) == (1, "kbatch: enough\n")
    assert given == [seconds, seconds + 15]  # for the last commit, and to leave the group


@pytest.mark.parametrize(("running", "told"), [(1, "handlers do not end"), (0, "brokers do not answer")])
def test_listen_that_is_ended_hard_says_for_whom_it_has_waited(
    monkeypatch: pytest.MonkeyPatch, running: int, told: str
) -> None:
    exits: list[int] = []
    texts: list[str] = []
    monkeypatch.setattr("os._exit", exits.append)
    log = SimpleNamespace(tell=lambda text, level: texts.append(text))
    _abort(log, SimpleNamespace(stats=lambda: {"running": running}), 143)  # type: ignore[arg-type]
    assert exits == [143]
    assert texts[0].startswith(told)


def test_listen_with_an_inbox_gives_its_connection_to_the_handler(cluster: MockCluster, topic: str, shop: Any) -> None:
    kbatch.SqliteInbox(shop / "shop.db").create()
    handler = (
        'def handle(envelope, connection):\n    print(type(connection).__name__, envelope.message["n"], flush=True)\n'
    )
    (shop / "shop.py").write_text(handler)
    settings = f"""
handler = "shop:handle"
topics = ["{topic}"]
inbox = "shop.db"
[types]
order = "builtins:dict"
[kafka]
bootstrap.servers = "{cluster.bootstrap_servers}"
group.id = "g-{topic}"
"""
    (shop / "listen.toml").write_text(settings)
    send(cluster, topic, 7)
    with listening(shop) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "Connection 7\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 143


def test_listen_has_its_inbox_where_the_environment_says_and_names_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = (
        "handler = 'builtins:print'\ntopics = ['orders']\n[kafka]\ngroup.id = 'g'\nbootstrap.servers = '127.0.0.1:1'\n"
    )
    Path("listen.toml").write_text("inbox = 'shop.db'\n" + file)
    status, out, err = run_here("listen", "--config", "listen.toml", KBATCH_INBOX="other.db")
    assert (status, out) == (1, "")
    assert re.search(r"it cannot go on: InboxError: .*other\.db; call create\(\) .* \(kbatch inbox create\)", err)


def test_listen_that_cannot_go_on_says_why(cluster: MockCluster, topic: str, shop: Any) -> None:
    text = (shop / "listen.toml").read_text().replace(f'dead_letter_topic = "{topic}.dead"', "")
    (shop / "listen.toml").write_text(text)
    send(cluster, topic, *range(6))
    with listening(shop) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "it cannot go on: " in err.splitlines()[-1]
    assert re.search("no stock|out", err.splitlines()[-1])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("concurrency = 2", "concurrency = 0", "concurrency must be an int from 1"),
        ("concurrency = 2", "color = 2", "[listener] has no 'color'; it has wire, concurrency"),
        ("max_attempts = 2", "max_attempts = 0", "[retry] max_attempts must be 1 or more"),
        ("shop:handle", "shop:broken", "handler must be callable, not int"),
        ("shop:Order", "shop:Nothing", "[types] order: cannot import shop:Nothing: AttributeError"),
        ("topics =", "topic =", "there is no setting 'topic'; there are handler, topics"),
        ("group.id =", "group.x =", "group.x is not a configuration key of librdkafka"),
    ],
)
def test_what_is_wrong_in_the_file_is_said_in_one_line(shop: Any, old: str, new: str, message: str) -> None:
    file = shop / "listen.toml"
    file.write_text(file.read_text().replace(old, new))
    with listening(shop) as process:
        out, err = process.communicate(timeout=60)
    assert_one_line((process.returncode, out, err), 2, message)


@pytest.mark.parametrize("is_in_file", [True, False])
def test_listen_sends_in_transactions(cluster: MockCluster, topic: str, shop: Any, is_in_file: bool) -> None:
    text = (shop / "shop.py").read_text().replace("def handle(", "def other(")
    text += f"""
import kbatch

def handle(envelope, transaction):
    transaction.send("{topic}.dead", [kbatch.Envelope(envelope.message.n)])
"""
    (shop / "shop.py").write_text(text)
    file = (shop / "listen.toml").read_text().replace(f'dead_letter_topic = "{topic}.dead"', "")
    if is_in_file:
        file = file.replace("concurrency = 2", 'transactional_id = "billing-1"')
    (shop / "listen.toml").write_text(file)
    send(cluster, topic, *range(3))
    options = () if is_in_file else ("--transactional-id", "billing-1")
    with listening(shop, "--json", *options) as process:
        assert process.stderr is not None
        begins = json.loads(process.stderr.readline())["message"]
        assert begins == f"listener of {topic} begins, in transactions of billing-1"
        found: list[Any] = []
        while len(found) < 3:
            records = read(cluster.bootstrap_servers, f"{topic}.dead", 0).get(0, [])
            found = [record.value for record in records if record.headers]
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert found == [b"0", b"1", b"2"]
    assert json.loads(err.splitlines()[-1])["message"].startswith("stopped by a signal; 3 done")


def test_listen_refuses_transactions_with_an_inbox(shop: Any) -> None:
    text = (shop / "listen.toml").read_text()
    (shop / "listen.toml").write_text('inbox = "shop.db"\n' + text)
    (shop / "shop.py").write_text(
        (shop / "shop.py").read_text().replace("handle(envelope)", "handle(envelope, other, *more)")
    )
    with listening(shop, "--transactional-id", "billing-1") as process:
        out, err = process.communicate(timeout=60)
    assert_one_line((process.returncode, out, err), 2, "transactional_id contradicts inbox")
