"""The command line, by its console script's module in processes of its own, read back by confluent-kafka's consumer."""

import bz2
import contextlib
import errno
import gzip
import http.server
import json
import lzma
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
from typer.testing import CliRunner

import kbatch
from kbatch._fastmap import WIRE_NAMES
from kbatch.cli import _demo, _json_line
from kbatch.cli._app import Wire, app
from kbatch.cli._failure import Failure
from kbatch.cli._json_line import BadLine, key_reader
from kbatch.cli._lines import Block, LineSource, Piece
from kbatch.cli._orders import Orders
from kbatch.cli._settings import Settings
from kbatch.testing import ApiKey, MockCluster
from tests.waiting import stop

from .clients import Record, read

COMMAND = [sys.executable, "-m", "kbatch"]


def environment(**variables):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KBATCH_")}
    return {**kept, "COLUMNS": "200", **variables}


def run(*arguments, input=None, timeout=60, **variables):
    """Runs ``kbatch`` and returns its exit status, standard output and standard error."""
    if isinstance(input, str):
        input = input.encode()
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=input,
        capture_output=True,
        timeout=timeout,
        env=environment(**variables),
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in out + err, err
    return done.returncode, out, err


def run_here(*arguments, **variables):
    """As `run`, in this process: faster, where nothing but the command's own words matters."""
    cleared = {name: None for name in os.environ if name.startswith("KBATCH_")}
    done = CliRunner().invoke(app, list(map(str, arguments)), env={**cleared, "COLUMNS": "200", **variables})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture(scope="module")
def shared_cluster():
    with MockCluster(process=True) as cluster:
        yield cluster


@pytest.fixture
def topic(shared_cluster, request):
    name = re.sub(r"\W", "-", request.node.name)[:200]
    shared_cluster.create_topic(name, 4)
    return name


@pytest.fixture
def servers(shared_cluster):
    return f"bootstrap.servers={shared_cluster.bootstrap_servers}"


@pytest.fixture
def lines_file(tmp_path):
    def write(data, name="input.jsonl"):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return write


def lines_of(count, size=0):
    return [json.dumps({"id": f"key-{i % 13}", "n": i, "pad": "x" * size}) for i in range(count)]


def values(records: dict[int, list[Record]]) -> list[bytes]:
    return [record.value for partition in records.values() for record in partition]


# -- demo


def test_demo_sends_reads_back_and_compares():
    status, out, err = run("demo", "--count", 3_000, "--one-at-a-time", 100)
    assert (status, err) == (0, "")
    assert "3,000 envelopes were sent, acknowledged, read back and compared" in out
    for row in ("envelopes/s", "mapping, per envelope", "p50", "p99", "one awaited message at a time", "100 in"):
        assert row in out


@pytest.mark.parametrize(("count", "batch_size"), [(1, 1_000), (7, 3), (1_000, 1_000)])
def test_demo_of_any_size(count, batch_size):
    status, out, err = run_here("demo", "-q", "--count", count, "--batch-size", batch_size, "--one-at-a-time", 0)
    assert (status, err) == (0, "")
    assert out.count("\n") == 1


@pytest.mark.parametrize("after_s", [0.5, 2.0])
def test_ctrl_c_ends_the_demo(after_s):
    command = [*COMMAND, "demo", "--count", "400000"]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), start_new_session=True
    )
    wait_for(lambda: psutil.Process(child.pid).children())  # its broker
    time.sleep(after_s)
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (130, b"", b"kbatch: interrupted\n")


def test_ctrl_c_before_the_work_of_a_command_begins():
    program = """if True:
        import sys
        import kbatch.cli
        import kbatch.cli._app

        def interrupted(**options):
            raise KeyboardInterrupt

        kbatch.cli._app.Screen = interrupted
        sys.argv = ["kbatch", "demo"]
        kbatch.cli.main()
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment(), timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"kbatch: interrupted\n")


def test_demo_orders_are_realistic():
    orders = Orders(200_000)
    sizes = [len(orders.body(index)) for index in range(1_000)]
    assert 150 <= sum(sizes) / len(sizes) <= 200
    assert len(orders.headers(5)) == 9
    assert orders.body(5) == orders.body(5)
    assert len({orders.body(index) for index in range(1_000)}) == 1_000


class Tampered:
    """A consumer's message with one thing changed."""

    def __init__(self, message, **changes):
        self._message = message
        self._changes = changes

    def __getattr__(self, name):
        return (lambda: self._changes[name]) if name in self._changes else getattr(self._message, name)


def dropped(messages):
    return messages[1:]


def doubled(messages):
    return [messages[0], *messages]


def swapped(messages):
    customers = [message.key() for message in messages]
    first = next(i for i, customer in enumerate(customers) if customers.count(customer) > 1)
    second = customers.index(customers[first], first + 1)
    messages[first], messages[second] = messages[second], messages[first]
    return messages


def changed(**make):
    def change(messages):
        changes = {name: new(getattr(messages[0], name)()) for name, new in make.items()}
        return [Tampered(messages[0], **changes), *messages[1:]]

    return change


@pytest.mark.parametrize(
    ("tamper", "problem"),
    [
        (dropped, "1 order missing"),
        (doubled, "a second time"),
        (swapped, "after a later one of the same customer"),
        (changed(value=lambda body: body.replace(b"EUR", b"EUX").replace(b"GBP", b"GBX")), "the body is not that of"),
        (changed(headers=lambda headers: headers[:-1]), "the headers are not those of"),
        (changed(headers=lambda headers: [*headers, headers[-1]]), "the headers are not those of"),
        (changed(headers=lambda headers: []), "no order was sent with the id header"),
        (changed(key=lambda key: key + b"0"), "the key is not that of"),
    ],
)
def test_demo_finds_what_is_wrong(tamper, problem, monkeypatch):
    def tampered(*arguments):
        messages = [message for part in read_all(*arguments) for message in part]
        yield tamper(messages)

    read_all = _demo.read_all
    monkeypatch.setattr(_demo, "read_all", tampered)
    result = CliRunner().invoke(app, ["demo", "--count", "500", "--one-at-a-time", "0"])
    assert result.exit_code == 1
    assert problem in result.stderr
    assert "are not what was read back" in result.stderr
    assert "none is missing" not in result.stdout


# -- produce: what arrives


def test_every_line_is_a_message(topic, servers, shared_cluster, lines_file):
    lines = lines_of(5_000)
    file = lines_file("\n".join(lines))
    headers = ("--source", "till", "--message-type", "sale")
    status, out, err = run("produce", file, "--topic", topic, "--key", "id", "-X", servers, *headers)
    assert (status, err) == (0, "")
    assert out.startswith(f"5,000 of 5,000 lines acknowledged in topic '{topic}'")
    records = read(shared_cluster.bootstrap_servers, topic, 5_000)
    assert sorted(values(records)) == sorted(line.encode() for line in lines)
    for partition in records.values():
        by_key = {}
        for record in partition:
            body = json.loads(record.value)
            assert record.key == body["id"].encode()
            assert by_key.get(record.key, -1) < body["n"], "out of order"
            by_key[record.key] = body["n"]
            headers = dict(record.headers)
            assert headers["content-type"] == b"application/json"
            assert (headers["source"], headers["message-type"]) == (b"till", b"sale")
            assert len(headers["id"]) == 36


def test_standard_input_and_raw_wire(topic, servers, shared_cluster):
    arguments = ["produce", "-", "-t", topic, "-X", servers, "--wire", "raw"]
    status, _, err = run(*arguments, input='{"a": 1}\r\n[2]\n"three"\n\n  \n4')
    assert (status, err) == (0, "")
    records = read(shared_cluster.bootstrap_servers, topic, 4)
    assert sorted(values(records)) == [b'"three"', b"4", b"[2]", b'{"a": 1}']
    assert all(record.key is None and record.headers == [] for part in records.values() for record in part)


def test_bytes_travel_as_they_are(topic, servers, shared_cluster, lines_file):
    lines = ['  {"id" : 1.50e3,\t"é": "\\u00e9 ü 😀"}  ', '{"id":"\\ud83d\\ude00"}', '{"id": -0, "half": "\\ud800"}']
    file = lines_file(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    status, _, err = run_here("produce", file, "-t", topic, "-k", "id", "-X", servers)
    assert (status, err) == (0, "")
    records = [record for part in read(shared_cluster.bootstrap_servers, topic, 3).values() for record in part]
    assert {record.value: record.key for record in records} == {
        lines[0].encode(): b"1.50e3",
        lines[1].encode(): "😀".encode(),
        lines[2].encode(): b"-0",
    }


def test_an_empty_input_is_no_failure(topic, servers, lines_file):
    status, out, err = run_here("produce", lines_file(""), "-t", topic, "-X", servers)
    assert (status, err) == (0, "")
    assert out.startswith("0 of 0 lines")


def test_a_trickle_is_not_kept_waiting_for_a_batch(topic, servers, shared_cluster):
    child = subprocess.Popen(
        [*COMMAND, "produce", "-", "-t", topic, "-X", servers],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    with child:
        for i in range(2):
            child.stdin.write(b"%d\n" % i)
            child.stdin.flush()
            assert len(values(read(shared_cluster.bootstrap_servers, topic, i + 1))) == i + 1
        child.stdin.close()
        assert child.stdout.read().startswith(b"2 of 2 lines")
    assert child.returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="platform: pipes that do not block")
def test_a_pipe_that_does_not_block_is_waited_for(topic, servers, shared_cluster):
    # as a parent with an event loop may leave it
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    command = [*COMMAND, "produce", "-", "-t", topic, "-X", servers]
    child = subprocess.Popen(command, stdin=read_end, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    os.close(read_end)
    with child:
        for i in range(2):
            os.write(write_end, b"%d\n" % i)
            assert len(values(read(shared_cluster.bootstrap_servers, topic, i + 1))) == i + 1
        os.close(write_end)
        out, err = child.communicate()
    assert (child.returncode, err) == (0, b"")
    assert out.startswith(b"2 of 2 lines")


@pytest.mark.long
def test_embedded_needs_no_broker(lines_file):
    file = lines_file("\n".join(lines_of(300)))
    # what would lead to another broker is left out
    variables = {"KBATCH_BOOTSTRAP_SERVERS": "elsewhere:1", "KBATCH_SECURITY_PROTOCOL": "ssl"}
    status, out, err = run("produce", file, "-t", "orders", "-k", "id", "--embedded", **variables)
    assert status == 0
    assert out.startswith("300 of 300 lines")
    assert "embedded broker at 127.0.0.1:" in err
    for name in ("bootstrap.servers", "metadata.broker.list"):
        result = run("produce", file, "-t", "orders", "--embedded", "-X", f"{name}=x:1")
        assert_one_line(result, 2, f"--embedded brings its own broker: leave out -X {name}")
    result = run("produce", file, "-t", "orders", "--embedded", "-q", KBATCH_METADATA_BROKER_LIST="elsewhere:1")
    assert result[0::2] == (0, "")


NAMES = ['a"b', "a\\b", "a\nb", "", "é", "😀", "$ref", "key", "__class__", "a b"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_any_name_of_json_is_a_field(name, topic, servers, shared_cluster, lines_file):
    lines = [json.dumps({name: 1.5}), json.dumps({"other": 1})]
    status, _, err = run_here("produce", lines_file("\n".join(lines)), "-t", topic, "-k", name, "-X", servers)
    assert (status, err) == (1, f"kbatch: line 2: no field {name!r}\n")
    (record,) = (record for part in read(shared_cluster.bootstrap_servers, topic, 1).values() for record in part)
    assert record.key == b"1.5"


def test_files_with_byte_order_marks_may_be_joined(topic, servers, shared_cluster, lines_file):
    mark = b"\xef\xbb\xbf"
    file = lines_file(b'%s{"id": 1}\n%s{"id": 2}\r\n%s\n{"id": 3}%s\n{"id": 4}' % (mark, mark, mark, mark))
    for arguments in ((), ("-k", "id")):
        status, out, err = run_here("produce", file, "-t", topic, "-X", servers, *arguments)
        assert status == 1
        assert err.startswith("kbatch: line 4: not JSON: Extra data at column 10")
        assert "3 of 4 lines acknowledged" in out
        assert "1 blank line skipped" in out
    got = values(read(shared_cluster.bootstrap_servers, topic, 6))
    assert sorted(got) == sorted([b'{"id": 1}', b'{"id": 2}', b'{"id": 4}'] * 2)


def test_a_line_in_another_encoding_is_refused(topic, servers, lines_file):
    file = lines_file(b"1\n" + '{"id": 1}'.encode("utf-16-le") + b"\n2\n")
    status, out, err = run_here("produce", file, "-t", topic, "-X", servers)
    assert status == 1
    assert err.startswith("kbatch: line 2: not JSON: ")
    assert out.startswith("2 of ")


OTHER_KINDS = [
    (gzip.compress(b'{"id": 1}\n'), "compressed by gzip"),
    (bz2.compress(b'{"id": 1}\n'), "compressed by bzip2"),
    (lzma.compress(b'{"id": 1}\n'), "compressed by xz"),
    ('{"id": 1}\n'.encode("utf-16"), "UTF-16 text"),
    ('{"id": 1}\n'.encode("utf-16-le"), "UTF-16 text"),
    ('{"id": 1}\n'.encode("utf-16-be"), "UTF-16 text"),
    ('{"id": 1}\n'.encode("utf-32"), "UTF-32 text"),
]


@pytest.mark.parametrize(("data", "kind"), OTHER_KINDS, ids=[kind + str(i) for i, (_, kind) in enumerate(OTHER_KINDS)])
def test_a_file_of_another_kind_is_named(data, kind, topic, servers, lines_file):
    arguments = ["-t", topic, "-X", servers]
    file = lines_file(data)
    # before any broker is asked
    result = run_here("produce", file, "-t", topic, "-X", "bootstrap.servers=127.0.0.1:1")
    assert_one_line(result, 2, f"{file} seems to be {kind}; give JSON lines in UTF-8, such as: ")
    if kind == OTHER_KINDS[0][1]:
        result = run("produce", "-", *arguments, input=data)
        assert_one_line(result, 2, f"standard input seems to be {kind}; ")
        assert result[1] == ""


@pytest.mark.parametrize("in_flight", [1, 3])
def test_no_more_lines_are_in_flight_than_allowed(in_flight, lines_file):
    with MockCluster(process=True) as cluster:
        cluster.create_topic("t", 1)
        cluster.start_request_tracking()
        arguments = ["-t", "t", "-X", f"bootstrap.servers={cluster.bootstrap_servers}", "--in-flight", in_flight]
        assert run_here("produce", lines_file("1\n" * 12), *arguments)[:1] == (0,)
        assert cluster.produce_requests() >= 12 // in_flight
        assert len(values(read(cluster.bootstrap_servers, "t", 12))) == 12
    assert run_here("demo", "--in-flight", in_flight, "--count", 30, "--one-at-a-time", 0, "-q")[0] == 0


@pytest.fixture
def submitted(monkeypatch):
    """Of each batch that a command submits in this process: how many envelopes it has, and how many are in flight."""
    batches = []
    flights = []
    submit = kbatch.Producer.submit

    def watched(producer, topic, envelopes, *arguments, **options):
        size = len(envelopes)
        flights[:] = [(pending, size) for pending, size in flights if not pending.done()]
        pending = submit(producer, topic, envelopes, *arguments, **options)
        flights.append((pending, size))
        batches.append((size, sum(size for _, size in flights)))
        return pending

    monkeypatch.setattr(kbatch.Producer, "submit", watched)
    return batches


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_batch_has_as_many_lines_as_asked_for(batch_size, lines_file, submitted):
    arguments = ["-t", "t", "--embedded", "--batch-size", batch_size]
    assert run_here("produce", lines_file("1\n" * 20), *arguments)[0] == 0
    assert [size for size, _ in submitted] == [batch_size] * (20 // batch_size)
    submitted.clear()
    assert run_here("demo", "--count", 20, "--one-at-a-time", 0, "--batch-size", batch_size, "-q")[0] == 0
    assert {size for size, _ in submitted} == {batch_size}


def test_batches_together_have_no_more_lines_in_flight_than_allowed(lines_file, submitted):
    options = ["--batch-size", 2, "--in-flight", 5]
    with MockCluster() as cluster:
        cluster.create_topic("t", 1)
        cluster.set_rtt(1, 50)
        arguments = ["-t", "t", "-X", f"bootstrap.servers={cluster.bootstrap_servers}", *options]
        assert run_here("produce", lines_file("1\n" * 20), *arguments)[0] == 0
    assert max(in_flight for _, in_flight in submitted) == 4
    submitted.clear()
    assert run_here("demo", "--count", 100, "--one-at-a-time", 0, *options, "-q")[0] == 0
    assert max(in_flight for _, in_flight in submitted) <= 5


def test_a_wire_without_headers_takes_none(lines_file):
    produce = ["produce", lines_file("1\n"), "-t", "t", "-X", "bootstrap.servers=127.0.0.1:1", "--wire", "raw"]
    for option in ("--message-type", "--source"):
        assert_one_line(run_here(*produce, option, "x"), 2, f"--wire raw has no headers: leave out {option}")


# -- produce: what does not arrive


def test_bad_lines_are_named_and_kept_and_the_rest_is_sent(topic, servers, shared_cluster, lines_file, tmp_path):
    bad = {
        2: ("nope", "not JSON: Expecting value at column 1"),
        3: ('{"id": 1,}', "not JSON: "),
        5: ('{"no": 1}', "no field 'id'"),
        6: ('{"id": null}', "field 'id' is null; a key must be text or a number"),
        7: ('{"id": {"a": 1}}', "field 'id' is an object; a key must be text or a number"),
        8: ('{"id": true}', "field 'id' is true; a key must be text or a number"),
        9: ("[1, 2]", "an array, not an object with a field 'id'"),
        10: ('{"id": NaN}', "not JSON: NaN is not a JSON value"),
        11: (b'{"id": "\xff"}', "not UTF-8: byte 0xff at column 9"),
        12: ('{"id": "\\ud800"}', "field 'id' has half a surrogate pair"),
        13: ("[" * 100_000, "nested too deeply"),
        15: ('{"id": 1', "not JSON: "),
    }
    lines = [b'{"id": %d}' % number for number in range(1, 16)]
    for number, (line, _) in bad.items():
        lines[number - 1] = line if isinstance(line, bytes) else line.encode()
    rejects = tmp_path / "rejects.jsonl"
    rejects.write_text("of an earlier run\n" * 100_000)
    arguments = ["-t", topic, "-k", "id", "-X", servers, "--rejects", rejects]
    status, out, err = run_here("produce", lines_file(b"\n".join(lines)), *arguments)
    assert status == 1
    named = dict(re.findall(r"^kbatch: line (\d+): (.*)$", err, re.MULTILINE))
    assert list(map(int, named)) == list(bad)
    for number, (_, reason) in bad.items():
        assert named[str(number)].startswith(reason)
    assert out.startswith("3 of 15 lines acknowledged")
    assert f"12 bad lines not sent\nthey are in {rejects}\n" in out
    assert rejects.read_bytes() == b"".join(lines[number - 1] + b"\n" for number in bad)
    records = read(shared_cluster.bootstrap_servers, topic, 3)
    assert sorted(values(records)) == sorted(lines[number - 1] for number in (1, 4, 14))


def test_many_bad_lines_are_counted_and_named_to_a_bound(topic, servers, lines_file):
    status, out, err = run_here("produce", lines_file("x\n" * 30_000 + "1\n"), "-t", topic, "-X", servers)
    assert status == 1
    assert err.count("\n") == 21
    assert "line 20:" in err
    assert "line 21:" not in err
    assert "1 of 30,001 lines" in out
    assert "30,000 bad lines not sent" in out


@pytest.mark.parametrize("excess", [-1, 0, 1, 300_000])
def test_lines_at_the_size_limit(excess, topic, servers, shared_cluster, lines_file, tmp_path):
    # message.max.bytes counts what is around the body as well: what is above phase 1's own limit is named by it
    limit = 50_000
    long_line = b'"' + b"x" * (limit + excess - 2) + b'"'
    file = lines_file(b"1\n" + long_line + b"\n3\n")
    rejects = tmp_path / "rejects"
    setting = f"message.max.bytes={limit}"
    status, _, err = run_here("produce", file, "-t", topic, "-X", servers, "-X", setting, "--rejects", rejects)
    assert status == 1
    assert err.startswith("kbatch: line 2: ")
    assert err.count("\n") == 1
    assert rejects.read_bytes() == long_line + b"\n"
    assert sorted(values(read(shared_cluster.bootstrap_servers, topic, 2))) == [b"1", b"3"]


@pytest.mark.parametrize("limit", ["0x200000", "+2000000"])
def test_the_limit_is_read_as_librdkafka_reads_it(limit, topic, servers, lines_file):
    file = lines_file(json.dumps("x" * 1_500_000))
    status, out, err = run_here("produce", file, "-t", topic, "-X", servers, "-X", f"message.max.bytes={limit}")
    assert (status, err) == (0, "")
    assert out.startswith("1 of 1 line acknowledged")


def test_a_line_just_below_the_limit_is_sent(topic, servers, shared_cluster, lines_file):
    line = b'"' + b"x" * 49_000 + b'"'
    arguments = ["-t", topic, "-X", servers, "-X", "message.max.bytes=50000", "--wire", "raw"]
    assert run_here("produce", lines_file(line), *arguments)[0] == 0
    assert values(read(shared_cluster.bootstrap_servers, topic, 1)) == [line]


def refuse_ten_of_thirty(tmp_path, *refusals):
    """Ten lines in one request of which the broker refuses the first attempts as told; what came of it."""
    lines = [line.encode() for line in lines_of(30)]
    rejects = tmp_path / "rejects"
    with MockCluster() as cluster:
        cluster.create_topic("t", 1)
        servers = f"bootstrap.servers={cluster.bootstrap_servers}"
        running = Running("-t", "t", "-k", "id", "-X", servers, "-X", "linger.ms=300", "--rejects", rejects)
        feed(running, lines[:10])
        wait_for(lambda: len(values(read(cluster.bootstrap_servers, "t", 1))) == 10)
        cluster.push_broker_errors(1, ApiKey.PRODUCE, [(refusal, 0) for refusal in refusals])
        feed(running, lines[10:20])
        wait_for(lambda: cluster.broker_error_stack_count(1, ApiKey.PRODUCE) == 0)
        feed(running, lines[20:])
        running.process.stdin.close()
        status, out, err = running.end()
        got = values(read(cluster.bootstrap_servers, "t", 30 - len(rejects.read_bytes().splitlines())))
    return lines, status, out, err, rejects.read_bytes().splitlines(), got


def test_refused_lines_are_named_and_kept(tmp_path):
    refused = "POLICY_VIOLATION"
    lines, status, out, err, rejects, got = refuse_ten_of_thirty(tmp_path, refused)
    assert status == 1
    assert out.startswith("20 of 30 lines acknowledged")
    assert f"10 lines not acknowledged:\n  10 lines: Broker: Policy violation ({refused})" in out
    assert re.findall(r"line (\d+): Broker: Policy violation", err) == [str(n) for n in range(11, 21)]
    assert rejects == lines[10:20]
    assert got == lines[:10] + lines[20:]


def test_a_line_that_is_refused_takes_no_others_of_its_record_batch_with_it(tmp_path):
    refused = "MSG_SIZE_TOO_LARGE"
    lines, status, out, err, rejects, got = refuse_ten_of_thirty(tmp_path, refused, refused)
    assert status == 1
    assert out.startswith("29 of 30 lines acknowledged")
    assert f"1 line not acknowledged:\n  1 line: Broker: Message size too large ({refused})" in out
    assert err == f"kbatch: line 11: Broker: Message size too large ({refused})\n"
    assert rejects == [lines[10]]
    assert sorted(got) == sorted(lines[:10] + lines[11:])


# -- produce: nothing is tried, or all is given up, with one line


def assert_one_line(result, status, text):
    assert result[0] == status, result
    assert result[2].count("\n") == 1, result[2]
    assert text in result[2]
    assert result[2].startswith("kbatch: ")


def test_wrong_files(topic, servers, lines_file, tmp_path):
    arguments = ["-t", topic, "-X", servers]
    good = lines_file("1\n")
    missing = tmp_path / "missing"
    assert_one_line(run_here("produce", missing, *arguments), 2, f"cannot read {missing}: No such file")
    assert_one_line(run_here("produce", tmp_path, *arguments), 2, "Is a directory")
    assert_one_line(run_here("produce", "", *arguments), 2, "FILE must not be empty")
    assert_one_line(run_here("produce", good, *arguments, "--rejects", tmp_path), 2, f"cannot write {tmp_path}")
    assert_one_line(run_here("produce", good, *arguments, "--rejects", ""), 2, "--rejects must not be empty")
    for path in (missing / "rejects", f"{missing}/"):
        assert_one_line(run_here("produce", good, *arguments, "--rejects", path), 2, f"cannot write {path}")
    config = lines_file("linger.ms=1\n", "settings")
    result = run_here("produce", good, *arguments, "--config", config, "--rejects", config)
    assert_one_line(result, 2, f"--rejects {config} is the file of settings")
    assert config.read_text() == "linger.ms=1\n"
    assert_one_line(run_here("produce", good, *arguments, "--rejects", good), 2, "is the input itself")
    assert good.read_text() == "1\n"
    assert_one_line(
        run_here("produce", good, *arguments, "--config", missing), 2, f"configuration file {missing}: No such"
    )
    assert_one_line(run_here("produce", good, *arguments, "--config", tmp_path), 2, "Is a directory")
    if os.geteuid():
        good.chmod(0)
        assert_one_line(run_here("produce", good, *arguments), 2, "Permission denied")


@pytest.mark.skipif(os.name == "nt", reason="platform: limits of a shell")
def test_a_disk_that_becomes_full_leaves_the_last_rejects(topic, servers, lines_file, tmp_path):
    rejects = tmp_path / "rejects"
    rejects.write_text("of an earlier run\n")
    command = [*COMMAND, "produce", str(lines_file("bad\n" * 5_000)), "-t", topic, "-X", servers]
    shell = ["sh", "-c", 'ulimit -f 8; trap "" XFSZ; "$@"', "sh", *command, "--rejects", str(rejects)]
    variables = environment(PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run(shell, capture_output=True, env=variables, timeout=60, text=True)
    assert done.returncode == 1
    (beside,) = rejects_beside(rejects)
    told = f"kbatch: cannot write {rejects}: {os.strerror(errno.EFBIG)}; {tmp_path / beside} has what was written\n"
    assert done.stderr.endswith(told)
    assert (tmp_path / beside).read_text().startswith("bad\nbad\n")
    assert rejects.read_text() == "of an earlier run\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="platform: /dev/full")
def test_a_full_disk(topic, servers, lines_file):
    file = lines_file("bad line\n" * 100_000)
    status, out, err = run_here("produce", file, "-t", topic, "-X", servers, "--rejects", "/dev/full")
    assert status == 1
    assert err.endswith(f"kbatch: cannot write /dev/full: {os.strerror(errno.ENOSPC)}\n")
    assert "they are in" not in out


def test_a_missing_broker(lines_file):
    file = lines_file("1\n")
    arguments = ["-t", "t", "--connect-timeout", "1", "-X"]
    result = run("produce", file, *arguments, "bootstrap.servers=127.0.0.1:1")
    assert_one_line(result, 1, "no broker answered within 1 s: 127.0.0.1:1/bootstrap: Connect to ")
    result = run("produce", file, *arguments, "bootstrap.servers=no-such-host.invalid:9092")
    assert_one_line(result, 1, "Failed to resolve 'no-such-host.invalid:9092'")
    assert_one_line(run("produce", file, "-t", "t"), 2, "no broker is named: give -X bootstrap.servers=HOST:PORT")


def test_wrong_settings(lines_file, servers):
    file = lines_file("1\n")
    produce = ["produce", file, "-t", "t", "-X", servers]
    assert_one_line(
        run_here(*produce, "-X", "no.such.key=1"), 2, "no.such.key is not a configuration key of librdkafka"
    )
    assert_one_line(run_here(*produce, "-X", "linger.ms=soon"), 2, "linger.ms: ")
    for settings in (["linger.ms=300001"], ["linger.ms=2", "message.timeout.ms=1"]):  # seen when librdkafka starts
        options = [option for each in settings for option in ("-X", each)]
        assert_one_line(run(*produce, *options), 2, "`message.timeout.ms` must be greater than `linger.ms`")
    assert_one_line(
        run_here(*produce, KBATCH_SASL_PASWORD="x"), 2, "sasl.pasword is not a configuration key of librdkafka"
    )
    assert_one_line(run_here(*produce, KBATCH_SASL_PASWORD="x"), 2, "(from KBATCH_SASL_PASWORD)")
    status, _, err = run_here(*produce, "--wire", "morse")
    assert status == 2
    assert "'morse' is not one of 'kbatch', 'wolverine', 'cloudevents', 'raw'" in err
    assert [wire.value for wire in Wire] == list(WIRE_NAMES)
    assert_one_line(run_here(*produce, "--wire", "cloudevents"), 2, "--wire cloudevents needs --source")
    cloud_events = ["--wire", "cloudevents", "--source", "till"]
    assert_one_line(
        run_here(*produce, *cloud_events, "--message-type", ""), 2, "message_type is empty, which the cloud"
    )
    for name in ("", "a b", "..", "a" * 250, "orders\n"):
        assert_one_line(run_here(*produce, "-t", name), 2, "--topic must be 1 to 249 letters, digits, '.', '_' and '-'")
    config = lines_file("# a comment\n\nlinger.ms = 5\nacks\n", "settings")
    assert_one_line(run_here(*produce, "--config", config), 2, f"{config}, line 4: expected key=value")
    config = lines_file("no.such.key=1\n", "settings")
    assert_one_line(run_here(*produce, "--config", config), 2, f"(from {config}, line 1)")
    config = lines_file(b"a=\xff", "settings")
    assert_one_line(run_here(*produce, "--config", config), 2, "is not UTF-8 text")


def test_settings_that_only_programs_have(lines_file):
    produce = ["produce", lines_file("1\n"), "-t", "t", "-X", "bootstrap.servers=127.0.0.1:1"]
    for key in ("error_cb", "stats_cb", "oauth_cb", "logger", "on_delivery", "dr_msg_cb", "value.serializer"):
        result = run_here(*produce, "-X", f"{key}=x")
        assert_one_line(result, 2, f"{key} is for programs; a command line has no place for it (from -X)")
    result = run_here(*produce, "-X", "transactional.id=t")
    assert_one_line(result, 2, "transactional.id is for programs: this command sends many batches at a time")


def test_secrets_are_not_shown(lines_file, servers, capfd):
    file = lines_file("1\n")
    secret = "hush-hush-17"
    config = lines_file(f"sasl.password={secret}\nsecurity.protocol=nonsense\n", "settings")
    for extra, variables in (
        (["-X", f"sasl.password:{secret}"], {}),
        (["-X", f"={secret}"], {}),
        (["-X", "acks=all", f"sasl.password={secret}"], {}),
        (["-X", f"ssl.key.password={secret}", "-X", "acks=many"], {}),
        (["--config", config], {}),
        (["-X", "no.such=1"], {"KBATCH_SASL_PASSWORD": secret}),
        (["-X", "security.protocol=sasl_plaintext", "-X", "sasl.mechanism=PLAIN"], {"KBATCH_SASL_PASSWORD": secret}),
        (
            ["-X", "security.protocol=sasl_plaintext", "-X", "sasl.mechanism=PLAIN", "-X", "sasl.username=me"],
            {"KBATCH_SASL_PASSWORD": secret},
        ),
    ):
        arguments = ["produce", file, "-t", "t", "-X", servers, "--connect-timeout", 1, *extra]
        status, out, err = run_here(*arguments, **variables)
        assert status in (1, 2)
        assert secret not in "".join([out, err, *capfd.readouterr()])  # librdkafka writes to standard error itself
        assert err.startswith("kbatch: ")


def test_a_setting_that_is_taken_for_the_file_is_not_shown():
    result = run_here("produce", "-t", "t", "-X", "acks=all", "sasl.password=hush-hush-17")
    assert_one_line(result, 2, "cannot read sasl.password=…: No such file")
    assert result[2].endswith("; a setting needs an -X of its own\n")
    assert "hush" not in result[2]


def test_no_permission(lines_file):
    with MockCluster() as cluster:
        servers = f"bootstrap.servers={cluster.bootstrap_servers}"
        cluster.set_topic_error("secret", "TOPIC_AUTHORIZATION_FAILED")
        file = lines_file("\n".join(lines_of(50_000)))
        result = run("produce", file, "-t", "secret", "-X", servers)
        assert_one_line(result, 1, "topic 'secret': Broker: Topic authorization failed")
        # seen by all, written by few
        cluster.create_topic("read-only")
        cluster.push_request_errors(ApiKey.PRODUCE, ["TOPIC_AUTHORIZATION_FAILED"] * 1_000)
        status, out, err = run("produce", file, "-t", "read-only", "-X", servers)
    assert status == 1
    assert err == ""
    assert "stopped: not allowed to write to topic 'read-only': Broker: Topic authorization failed" in out
    assert re.search(r"^line \d+ and those after it were not sent$", out, re.MULTILINE)


def test_a_topic_that_does_not_exist(lines_file):
    with MockCluster() as cluster:
        cluster.set_topic_error("gone", "UNKNOWN_TOPIC_OR_PART")
        arguments = ["-X", f"bootstrap.servers={cluster.bootstrap_servers}", "--connect-timeout", 1]
        result = run("produce", lines_file("1\n"), "-t", "gone", *arguments)
    assert_one_line(result, 1, "topic 'gone' does not exist, and the broker does not create it")


def test_where_settings_come_from(tmp_path):
    file = tmp_path / "settings"
    file.write_text("\ufeffacks=all\n  linger.ms = 7  \n#client.id=no\nssl.key.password=a=b \nclient.id=file\n")
    environment = {"KBATCH_CLIENT_ID": "env", "KBATCH_LOG__LEVEL": "3", "KBATCH_ACKS": "1", "HOME": "/", "KBATCH_": "x"}
    settings = Settings.collect(["acks=-1", "bootstrap.servers=a:1,b=2"], file, environment)
    assert settings.values == {
        "acks": "-1",
        "linger.ms": "7",
        "ssl.key.password": "a=b",
        "client.id": "env",
        "log_level": "3",
        "bootstrap.servers": "a:1,b=2",
    }
    assert settings.explain("client.id: bad") == "client.id: bad (from KBATCH_CLIENT_ID)"
    assert "a=b" not in repr(settings)
    with pytest.raises(Failure):
        Settings.collect(["acks"], None, {})


def rejects_beside(path):
    return [each.name for each in path.parent.iterdir() if each.name.startswith(path.name) and each != path]


def test_the_rejects_of_the_last_run_are_kept_until_there_are_others(topic, servers, lines_file, tmp_path):
    rejects = tmp_path / "rejects"
    rejects.write_text("of an earlier run\n")
    file = lines_file("bad\n1\n")
    for arguments in (
        ("-t", topic, "-X", servers, "-X", "linger.ms=soon"),
        ("-t", topic, "-X", servers, "--config", tmp_path / "missing"),
        ("-t", topic, "-X", "bootstrap.servers=127.0.0.1:1", "--connect-timeout", 0.5),
        ("-t", "a b", "-X", servers),
    ):
        status, _, _ = run_here("produce", file, *arguments, "--rejects", rejects)
        assert status in (1, 2)
        assert rejects.read_text() == "of an earlier run\n"
        assert rejects_beside(rejects) == []
    status, _, _ = run("produce", "-", "-t", topic, "-X", servers, "--rejects", rejects, input=gzip.compress(b"1"))
    assert status == 2
    running = Running("-t", topic, "-X", servers, "--rejects", rejects)
    wait_for(lambda: rejects_beside(rejects))
    running.interrupt()
    assert running.end()[0] == 130
    assert rejects.read_text() == "of an earlier run\n"
    assert rejects_beside(rejects) == []
    assert run("produce", file, "-t", topic, "-X", servers, "--rejects", rejects)[0] == 1
    assert rejects.read_text() == "bad\n"
    assert run("produce", lines_file("1\n"), "-t", topic, "-X", servers, "--rejects", rejects)[0] == 0
    assert rejects.read_text() == ""
    assert rejects_beside(rejects) == []


@pytest.mark.skipif(os.name == "nt", reason="platform: permissions")
def test_rejects_are_as_private_as_the_input(topic, servers, lines_file, tmp_path):
    file = lines_file("secret\n")
    rejects = tmp_path / "rejects"
    for mode, before, after in ((0o600, None, 0o600), (0o600, 0o644, 0o600), (0o444, 0o600, 0o600)):
        rejects.unlink(missing_ok=True)
        file.chmod(mode)
        if before is not None:
            rejects.touch()
            rejects.chmod(before)
        assert run_here("produce", file, "-t", topic, "-X", servers, "--rejects", rejects)[0] == 1
        assert rejects.stat().st_mode & 0o777 == after
    link = tmp_path / "link"
    link.symlink_to(rejects)
    rejects.write_text("")
    assert run_here("produce", file, "-t", topic, "-X", servers, "--rejects", link)[0] == 1
    assert link.is_symlink()
    assert rejects.read_text() == "secret\n"


def test_what_is_told_as_rejected_can_be_read(topic, servers, tmp_path):
    rejects = tmp_path / "rejects"
    running = Running("-t", topic, "-X", servers, "--rejects", rejects)
    feed(running, [b"bad"])
    assert running.process.stderr.readline().startswith(b"kbatch: line 1: not JSON")
    (beside,) = rejects_beside(rejects)
    assert (tmp_path / beside).read_bytes() == b"bad\n"
    running.process.kill()
    running.end()
    assert (tmp_path / beside).read_bytes() == b"bad\n"


@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM"])
def test_a_signal_keeps_what_was_rejected(name, topic, servers, tmp_path):
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip("platform: no SIGHUP")
    rejects = tmp_path / "rejects"
    rejects.write_text("of an earlier run\n")
    running = Running("-t", topic, "-X", servers, "--rejects", rejects)
    feed(running, [b"bad", b"2"])
    running.process.stderr.readline()
    running.interrupt(number)
    status, out, _ = running.end()
    assert status == 128 + number
    assert "1 of 2 lines acknowledged" in out
    assert "line 3 and those after it were not sent" in out
    assert rejects.read_text() == "bad\n"
    assert rejects_beside(rejects) == []


@pytest.mark.skipif(os.name == "nt", reason="platform: /dev/stdout")
@pytest.mark.parametrize("name", ["-", "/dev/stdout", "itself"])
def test_rejects_on_standard_output_are_alone_there(name, topic, servers, lines_file, tmp_path):
    out = tmp_path / "out"
    file = lines_file("bad\n1\n")
    command = [*COMMAND, "produce", str(file), "-t", topic, "-X", servers, "--rejects"]
    with out.open("wb") as stream:
        stream.write(b"before\n")
        stream.flush()
        done = subprocess.run(
            [*command, str(out) if name == "itself" else name],
            stdout=stream,
            stderr=subprocess.PIPE,
            env=environment(),
            timeout=60,
        )
    assert done.returncode == 1
    assert out.read_bytes() == b"before\nbad\n"
    assert b"\n1 of 2 lines acknowledged" in done.stderr
    status, piped, err = run(*command[len(COMMAND) :], "-")
    assert (status, piped) == (1, "bad\n")
    assert "they are in standard output\n" in err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="platform: no named pipes")
def test_rejects_into_a_named_pipe(topic, servers, lines_file, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    assert run_here("produce", lines_file("bad\n"), "-t", topic, "-X", servers, "--rejects", pipe)[0] == 1
    reader.join(10)
    assert got == [b"bad\n"]


# -- produce: what the brokers and librdkafka say


def read_lines_until(stream, text):
    lines = []
    for line in stream:
        lines.append(line)
        if text in line:
            return b"".join(lines)
    raise AssertionError(lines)


def test_it_says_that_no_broker_answers_before_the_time_is_over():
    running = Running("-t", "t", "-X", "bootstrap.servers=127.0.0.1:1", "--connect-timeout", 60)
    text = read_lines_until(
        running.process.stderr, b"no answer, and it is tried again: 127.0.0.1:1/bootstrap: Connect to"
    )
    running.interrupt()
    _, _, err = running.end()
    assert (text.decode() + err).count("no answer") == 1


def test_it_says_that_whoever_takes_the_connection_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        running = Running("-t", "t", "-X", f"bootstrap.servers={address}", "--connect-timeout", 60)
        assert running.process.stderr.readline() == b"kbatch: no broker has answered for 2 s; it is waited for\n"
        running.interrupt()
        status, _, err = running.end()
    assert (status, err) == (130, "kbatch: interrupted\n")


def test_it_says_that_an_http_server_is_no_broker(lines_file):
    class Server(http.server.BaseHTTPRequestHandler):
        def handle(self):
            self.request.recv(1_000)
            self.request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever).start()
        servers = f"bootstrap.servers=127.0.0.1:{server.server_address[1]}"
        status, _, err = run("produce", lines_file("1\n"), "-t", "t", "-X", servers, "--connect-timeout", 2)
        server.shutdown()
    assert status == 1
    assert "no broker answered within 2 s: 127.0.0.1" in err
    assert "an HTTP server answers, not Kafka" in err
    assert "receive.message.max.bytes" not in err


@pytest.mark.long
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="platform: no SIGSTOP")
def test_it_says_that_a_broker_is_silent():
    with MockCluster(process=True) as cluster:
        cluster.create_topic("t", 1)
        running = Running("-t", "t", "-X", f"bootstrap.servers={cluster.bootstrap_servers}")
        feed(running, [b"1"])
        wait_for(lambda: len(values(read(cluster.bootstrap_servers, "t", 1))) == 1)
        stop(cluster.pid)
        feed(running, [b"2"])
        assert running.process.stderr.readline() == b"kbatch: nothing was acknowledged for 10 s; it is waited for\n"
        os.kill(cluster.pid, signal.SIGCONT)
        assert running.process.stderr.readline() == b"kbatch: brokers answer again\n"
        running.process.stdin.close()
        status, out, _ = running.end()
    assert status == 0
    assert out.startswith("2 of 2 lines acknowledged")


def test_it_says_that_the_broker_went_away_and_came_back():
    with MockCluster(process=True) as cluster:
        cluster.create_topic("t", 1)
        running = Running("-t", "t", "-X", f"bootstrap.servers={cluster.bootstrap_servers}")
        feed(running, [b"1"])
        wait_for(lambda: len(values(read(cluster.bootstrap_servers, "t", 1))) == 1)
        cluster.set_broker_down()
        feed(running, [b"2"])
        text = read_lines_until(running.process.stderr, b"no answer, and it is tried again: 127.0.0.1:")
        time.sleep(1.5)  # librdkafka tries again and again
        cluster.set_broker_up()
        text += read_lines_until(running.process.stderr, b"kbatch: brokers answer again")
        running.process.stdin.close()
        status, out, err = running.end()
    assert status == 0
    assert out.startswith("2 of 2 lines acknowledged")
    told = (text.decode() + err).splitlines()
    assert len(told) == len(set(told)) <= 4


# -- produce: stopping


class Running:
    """A ``kbatch produce`` that reads its input from a pipe and can be interrupted."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [*COMMAND, "produce", "-", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
            start_new_session=True,
        )

    def interrupt(self, number=signal.SIGINT):
        # The whole group, as a terminal does.
        os.killpg(self.process.pid, number)

    def end(self, timeout=60):
        out, err = b"", b""

        def read_err():
            nonlocal err
            err = self.process.stderr.read()

        reader = threading.Thread(target=read_err)
        reader.start()
        with self.process:
            out = self.process.stdout.read()
            reader.join(timeout)
            status = self.process.wait(timeout)
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        assert b"Traceback" not in err, err.decode()
        return status, out.decode(), err.decode()


def feed(running, lines):
    """Writes lines until the process no longer takes them."""
    try:
        for line in lines:
            running.process.stdin.write(line + b"\n")
        running.process.stdin.flush()
    except BrokenPipeError:
        pass


def wait_for(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_ctrl_c_finishes_what_is_in_flight_and_says_where_it_stopped(name, lines_file):
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip("platform: no SIGHUP")
    lines = [line.encode() for line in lines_of(20_000)]
    with MockCluster(process=True) as cluster:
        cluster.create_topic("t", 1)
        cluster.set_rtt(1, 100)
        cluster.start_request_tracking()
        servers = f"bootstrap.servers={cluster.bootstrap_servers}"
        running = Running("-t", "t", "-k", "id", "-X", servers, "--in-flight", 500)
        feeder = threading.Thread(target=feed, args=(running, lines))
        feeder.start()
        wait_for(lambda: cluster.produce_requests() > 2)
        cluster.set_rtt(1, 3_000)
        requests = cluster.produce_requests()
        wait_for(lambda: cluster.produce_requests() > requests)  # so that something is in flight when the signal comes
        running.interrupt(number)
        status, out, err = running.end()
        feeder.join()
        cluster.set_rtt(1, 0)
        stopped_at = int(re.search(r"^line (\d+) and those after it were not sent$", out, re.MULTILINE)[1])
        got = values(read(cluster.bootstrap_servers, "t", stopped_at - 1))
    assert status == 128 + number
    assert 1 < stopped_at < 20_000
    assert out.startswith(f"{stopped_at - 1:,} of {stopped_at - 1:,} lines acknowledged")
    assert "\ninterrupted\n" in out
    assert "stopping: waiting up to 10 s for " in err
    assert got == lines[: stopped_at - 1]


@pytest.mark.parametrize("how", ["deadline", "second"])
def test_ctrl_c_gives_up_what_does_not_finish(how, tmp_path):
    lines = [line.encode() for line in lines_of(20_000)]
    rejects = tmp_path / "rejects"
    grace = 0.5 if how == "deadline" else 3_600
    with MockCluster(process=True) as cluster:
        cluster.create_topic("t", 1)
        servers = f"bootstrap.servers={cluster.bootstrap_servers}"
        running = Running("-t", "t", "-k", "id", "-X", servers, "--rejects", rejects, "--grace", grace)
        feed(running, lines[:1_000])
        wait_for(lambda: len(values(read(cluster.bootstrap_servers, "t", 1))) == 1_000)
        cluster.set_broker_down()
        written = []
        feeder = threading.Thread(target=feed, args=(running, (written.append(line) or line for line in lines[1_000:])))
        feeder.start()
        wait_for(lambda: len(written) > 4_000)  # more than a pipe holds, so that some of it was read
        running.interrupt()
        text = read_lines_until(running.process.stderr, b"stopping: waiting up to ")
        if how == "second":
            running.interrupt()
        status, out, err = running.end()  # long before 3,600 s
        err = text.decode() + err
        feeder.join()
        cluster.set_broker_up()
        got = values(read(cluster.bootstrap_servers, "t", 1_000))
    assert status == 130
    stopped_at = int(re.search(r"^line (\d+) and those after it were not sent$", out, re.MULTILINE)[1])
    assert 1_001 < stopped_at < 20_000
    assert out.startswith(f"1,000 of {stopped_at - 1:,} lines acknowledged")
    assert f"{stopped_at - 1_001:,} lines not acknowledged:" in out
    assert "interrupted, and what was in flight given up" in out
    assert err.count("kbatch: line ") == 20
    assert got == lines[:1_000]
    assert rejects.read_bytes().splitlines() == lines[1_000 : stopped_at - 1]


def test_ctrl_c_after_the_last_line():
    lines = [line.encode() for line in lines_of(100)]
    with MockCluster(process=True) as cluster:
        cluster.create_topic("t", 1)
        running = Running("-t", "t", "-X", f"bootstrap.servers={cluster.bootstrap_servers}")
        feed(running, [b"1"])
        wait_for(lambda: len(values(read(cluster.bootstrap_servers, "t", 1))) == 1)
        cluster.start_request_tracking()
        cluster.set_rtt(1, 1_500)
        feed(running, lines)
        running.process.stdin.close()
        wait_for(lambda: cluster.produce_requests() > 0)
        running.interrupt()
        status, out, _ = running.end()
    assert status == 130
    assert out.startswith("101 of 101 lines acknowledged")
    assert "\ninterrupted\nevery line of the input was taken\n" in out


def test_ctrl_c_while_waiting_for_input(servers, topic, shared_cluster):
    running = Running("-t", topic, "-X", servers)
    feed(running, [b"1"])
    wait_for(lambda: len(values(read(shared_cluster.bootstrap_servers, topic, 1))) == 1)
    running.interrupt()
    status, out, _ = running.end()
    assert status == 130
    assert "1 of 1 line acknowledged" in out
    assert "line 2 and those after it were not sent" in out


def test_ctrl_c_before_a_broker_answers():
    running = Running("-t", "t", "-X", "bootstrap.servers=127.0.0.1:1", "--connect-timeout", "30")
    read_lines_until(running.process.stderr, b"no answer")
    running.interrupt()
    status, _, err = running.end()
    assert (status, err) == (130, "kbatch: interrupted\n")


@pytest.mark.long
def test_a_broker_that_is_gone_for_good(tmp_path):
    lines = [line.encode() for line in lines_of(100)]
    rejects = tmp_path / "rejects"
    with MockCluster(process=True) as cluster:
        cluster.create_topic("t", 1)
        servers = f"bootstrap.servers={cluster.bootstrap_servers}"
        arguments = ["-X", servers, "-X", "message.timeout.ms=5000", "--rejects", rejects]
        running = Running("-t", "t", *arguments)
        feed(running, lines[:50])
        wait_for(lambda: len(values(read(cluster.bootstrap_servers, "t", 1))) == 50)
        cluster.set_broker_down()
        feed(running, lines[50:])
        running.process.stdin.close()
        status, out, err = running.end()
    assert status == 1
    assert out.startswith("50 of 100 lines acknowledged")
    assert "50 lines not acknowledged:" in out
    assert "_MSG_TIMED_OUT" in out
    assert "the last error of the connection: 127.0.0.1:" in out
    assert "line 51: " in err
    assert rejects.read_bytes().splitlines() == lines[50:]


# -- produce: memory, terminals


def peak_memory_of(arguments, blocks):
    """The most memory that a run took, in bytes, fed from a generator."""
    child = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    with child:
        peak = 0
        for block in blocks:
            child.stdin.write(block)
            peak = max(peak, psutil.Process(child.pid).memory_info().rss)
        child.stdin.close()
        out = child.stdout.read().decode()
    return peak, child.returncode, out


@pytest.mark.allocator
def test_memory_does_not_grow_with_the_input(topic, servers):
    arguments = ["produce", "-", "-t", topic, "-k", "id", "-X", servers]
    block = "".join(line + "\n" for line in lines_of(1_000, size=950)).encode()
    small, status, _ = peak_memory_of(arguments, [block] * 10)
    assert status == 0
    large, status, out = peak_memory_of(arguments, [block] * 70)
    assert status == 0
    assert out.startswith("70,000 of 70,000 lines")
    assert large - small < 20_000_000, f"{small:,} bytes for 10 MB, {large:,} for 70 MB"


@pytest.mark.allocator
def test_one_endless_line_takes_no_memory(topic, servers, tmp_path):
    rejects = tmp_path / "rejects"
    arguments = ["produce", "-", "-t", topic, "-X", servers, "--rejects", str(rejects)]
    small, _, _ = peak_memory_of(arguments, [b"1\n", b"x" * 2**20, b"\n2"])
    large, status, out = peak_memory_of(arguments, [b"1\n", *[b"x" * 2**20] * 100, b"\n2"])
    assert status == 1
    assert out.startswith("2 of 3 lines")
    assert rejects.stat().st_size == 100 * 2**20 + 1
    assert large - small < 20_000_000


def on_a_terminal(*arguments):
    """Runs ``kbatch`` with standard error on a terminal; returns its exit status, standard output, what was shown."""
    pty = pytest.importorskip("pty", reason="platform: no pseudo-terminals")
    master, slave = pty.openpty()
    command = [*COMMAND, *map(str, arguments)]
    variables = environment(TERM="xterm-256color", COLUMNS="100")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, env=variables) as child:
        os.close(slave)
        shown = b""
        while True:
            if select.select([master], [], [], 20)[0]:
                try:
                    data = os.read(master, 65536)
                except OSError:
                    break
                if not data:
                    break
                shown += data
        out = child.stdout.read()
    os.close(master)
    return child.returncode, out, shown


def test_a_bar_on_a_terminal_and_nowhere_else(topic, servers, lines_file):
    file = lines_file("\n".join(lines_of(2_000)))
    status, out, shown = on_a_terminal("produce", file, "-t", topic, "-X", servers)
    assert status == 0
    assert topic[:10].encode() in shown
    assert b"acknowledged" in shown
    assert b"\x1b" not in out
    assert run("produce", file, "-t", topic, "-X", servers)[2] == ""


def test_quiet_shows_no_bar_and_no_table(topic, servers, lines_file):
    file = lines_file("\n".join(lines_of(2_000)))
    status, out, shown = on_a_terminal("produce", file, "-t", topic, "-X", servers, "-q")
    assert (status, shown) == (0, b"")
    assert out.startswith(b"2,000 of 2,000 lines")
    demo = ["demo", "--count", 100, "--one-at-a-time", 0]
    status, out, shown = on_a_terminal(*demo, "-q")
    assert (status, shown) == (0, b"")
    assert out.startswith(b"100 envelopes were sent, acknowledged, read back and compared")
    status, out, shown = on_a_terminal(*demo)
    assert status == 0
    assert b"\x1b" in shown
    assert out.startswith(b"kbatch demo")


def test_a_reader_that_goes_away_changes_nothing(topic, servers, lines_file):
    file = lines_file("1\n")
    command = " ".join([*COMMAND, "produce", str(file), "-t", topic, "-X", servers])
    done = subprocess.run(
        ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"], capture_output=True, env=environment(), timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_no_bar_in_a_pipe_whatever_the_environment_says(variable, topic, servers, lines_file):
    file = lines_file("\n".join(lines_of(2_000)))
    status, out, err = run("produce", file, "-t", topic, "-X", servers, **{variable: "1"})
    assert (status, err) == (0, "")
    assert "\x1b" not in out


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="platform: a POSIX shell")
@pytest.mark.parametrize("streams", ["2>&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full", ">/dev/full"])
def test_closed_and_full_streams_change_nothing(streams, topic, servers, shared_cluster, lines_file):
    if "full" in streams and not os.path.exists("/dev/full"):
        pytest.skip("platform: /dev/full")
    lines = [b"%d" % i for i in range(3_000)]
    lines[1_500] = b"bad"
    file = lines_file(b"\n".join(lines))

    def shell(*arguments):
        command = [*COMMAND, *map(str, arguments)]
        return subprocess.run(
            ["sh", "-c", f'"$@" {streams}', "sh", *command], capture_output=True, env=environment(), timeout=60
        )

    done = shell("produce", file, "-t", topic, "-X", servers)
    assert done.returncode == 1, done
    assert b"Traceback" not in done.stdout + done.stderr
    assert len(values(read(shared_cluster.bootstrap_servers, topic, 2_999))) == 2_999
    if streams == ">/dev/full":
        full = os.strerror(errno.ENOSPC).encode()
        assert done.stderr.splitlines()[-1] == b"kbatch: cannot write to standard output: " + full
    done = shell("demo", "--count", 100, "--one-at-a-time", 0)
    assert done.returncode == 0, done
    assert b"Traceback" not in done.stdout + done.stderr
    for arguments, status in ((["--help"], 0), (["produce"], 2)):
        done = shell(*arguments)
        assert done.returncode == status
        assert b"Traceback" not in done.stdout + done.stderr


@pytest.mark.skipif(os.name == "nt", reason="platform: a POSIX shell")
@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_rejects_need_a_standard_output_that_is_there(name, topic, servers, lines_file):
    command = [*COMMAND, "produce", str(lines_file("bad\n")), "-t", topic, "-X", servers, "--rejects", name]
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *command], capture_output=True, env=environment(), timeout=60, text=True
    )
    assert (done.returncode, done.stderr) == (2, "kbatch: there is no standard output for --rejects\n")


@pytest.mark.skipif(os.name == "nt", reason="platform: locales")
def test_text_outside_of_the_locale(topic, servers, shared_cluster, lines_file):
    file = lines_file('{"ключ": "é"}')
    poor = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arguments = ["-t", topic, "-k", "ключ", "--source", "Büro", "-X", servers]
    status, _, err = run("produce", file, *arguments, **poor)
    assert (status, err) == (0, "")
    (record,) = (record for part in read(shared_cluster.bootstrap_servers, topic, 1).values() for record in part)
    assert record.key == "é".encode()
    assert dict(record.headers)["source"] == "Büro".encode()
    status, _, err = run("demo", "--count", 100, "--one-at-a-time", 0, **poor)
    assert (status, err) == (0, "")
    command = [*COMMAND, "produce", str(file), "-t", topic, "-X", servers, "-k", b"\xff"]
    done = subprocess.run(command, capture_output=True, env=environment(), timeout=60)
    assert (done.returncode, done.stderr) == (2, b"kbatch: --key must be UTF-8 text\n")


def test_what_comes_from_outside_cannot_write_on_the_terminal(topic, servers, lines_file, tmp_path):
    name = "a\x1b[2Jb\nkbatch: line 7: c"
    arguments = ["-t", topic, "-X", servers]
    assert_one_line(run_here("produce", tmp_path / name, *arguments), 2, "a\\x1b[2Jb\\nkbatch: line 7: c: No such file")
    config = ["--config", tmp_path / name]
    assert_one_line(run_here("produce", lines_file("1"), *arguments, *config), 2, "a\\x1b[2Jb\\nkbatch")
    assert_one_line(run_here("produce", lines_file("1"), *arguments, "-X", "\x1b[2J\n=1"), 2, "kbatch: … is not a")
    _, out, err = run("produce", lines_file("bad\n", "x"), *arguments, "--rejects", tmp_path / "a\x1b[2J")
    assert "they are in " in out
    assert "\x1b" not in out + err
    status, out, err = run("produce", f"--{name}", *arguments)
    assert (status, out) == (2, "")
    assert "\x1b" not in err


# -- the command as a whole


def test_version_and_help():
    assert run("--version")[1] == f"kbatch {kbatch.__version__} (librdkafka {kbatch.librdkafka_version})\n"
    status, out, _ = run("--help")
    assert status == 0
    assert "demo" in out
    assert "produce" in out
    assert "KBATCH_BOOTSTRAP_SERVERS" in run_here("produce", "--help", COLUMNS="200")[1]
    assert run_here("produce")[0] == 2
    for command in ([], ["demo"], ["produce"]):
        assert run_here(*command, "-h") == run_here(*command, "--help")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell", "pwsh"])
def test_completion(shell):
    status, out, _ = run("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert status == 0
    assert "kbatch" in out
    assert "_KBATCH_COMPLETE" in out


@pytest.mark.skipif(os.name == "nt", reason="platform: home is not HOME")
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed(shell, tmp_path):
    status, out, _ = run(
        "--install-completion", shell, HOME=str(tmp_path), _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1"
    )
    assert status == 0
    assert f"{shell} completion installed in {tmp_path}" in out.replace("\n", "")
    written = [path for path in tmp_path.rglob("*kbatch*") if path.is_file()]
    assert any("_KBATCH_COMPLETE" in path.read_text() for path in written)


def test_commands_and_values_are_completed():
    _, out, _ = run(_KBATCH_COMPLETE="complete_bash", COMP_WORDS="kbatch pro", COMP_CWORD="1")
    assert out.split() == ["produce"]
    _, out, _ = run(_KBATCH_COMPLETE="complete_bash", COMP_WORDS="kbatch produce --wire w", COMP_CWORD="3")
    assert out.split() == ["wolverine"]
    words = {"COMP_WORDS": "kbatch outbox dead d", "COMP_CWORD": "3"}
    _, out, _ = run(_KBATCH_COMPLETE="complete_bash", **words)
    assert out.split() == ["discard"]
    _, out, _ = run(_KBATCH_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="kbatch pro")
    assert '"produce"' in out
    assert "demo" not in out
    fish = {"_TYPER_COMPLETE_ARGS": "kbatch pro", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    _, out, _ = run(_KBATCH_COMPLETE="complete_fish", **fish)
    assert [line.split("\t")[0] for line in out.splitlines()] == ["produce"]
    powershell = {"_TYPER_COMPLETE_ARGS": "kbatch pro", "_TYPER_COMPLETE_WORD_TO_COMPLETE": "pro"}
    _, out, _ = run(_KBATCH_COMPLETE="complete_powershell", **powershell)
    assert out.startswith("produce:::")


def test_a_completion_of_fish_is_one_line():
    asks = {"_TYPER_COMPLETE_ARGS": "kbatch produce --", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    _, out, _ = run(_KBATCH_COMPLETE="complete_fish", **{**asks, "COLUMNS": "40"})
    offered = [line.partition("\t") for line in out.splitlines()]
    assert "--rejects" in [name for name, _, _ in offered]
    assert all(name.startswith("--") and text for name, _, text in offered)


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra(missing, tmp_path):
    (tmp_path / f"{missing}.py").write_text(f"raise ModuleNotFoundError('No module', name='{missing}')")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    status, _, err = run("demo", PYTHONPATH=path)
    assert status == 1
    assert err == f"kbatch: the command line needs {missing}; install it with: pip install 'kbatch-kafka[cli]'\n"


# -- lines and keys, by themselves


def items_of(data, max_line, tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(data)
    source = LineSource(str(path), max_line)
    source.start()
    try:
        yield from (item for item in source.items() if item is not None)
    finally:
        source.close()


@pytest.mark.parametrize("block_size", [1, 2, 3, 7, 1024])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last_end", [True, False])
def test_lines_come_whole_whatever_the_blocks(block_size, end, last_end, tmp_path, monkeypatch):
    monkeypatch.setattr("kbatch.cli._lines._BLOCK_SIZE", block_size)
    lines = [b"a", b"", b"four", b"0123456789", b"a\rb", b"01234567890", b"x" * 100, b"", b"end"]
    data = end.join(lines) + (end if last_end else b"")
    expected = dict(enumerate(lines, 1))
    got, pieces = {}, {}
    for item in items_of(data, 10, tmp_path):
        if isinstance(item, Block):
            for number, line in enumerate(item.lines, item.first_number):
                assert len(line) <= 10
                got[number] = line
        else:
            assert isinstance(item, Piece)
            pieces.setdefault(item.number, []).append(item)
    for number, parts in pieces.items():
        assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
        # in pieces, the CR of the line's end may stay
        got[number] = b"".join(part.data for part in parts).removesuffix(b"\r")
        assert len(got[number]) > 10
    assert got == expected


def test_no_lines(tmp_path):
    assert list(items_of(b"", 10, tmp_path)) == []
    assert [item.lines for item in items_of(b"\n", 10, tmp_path)] == [[b""]]


@pytest.mark.parametrize(
    ("line", "key"),
    [
        (b'{"id": "a"}', "a"),
        (b'{"id": ""}', ""),
        (b'{"id": "a\\u00e9\\n"}', "aé\n"),
        (b'{"id": 12345678901234567890123}', "12345678901234567890123"),
        (b'{"id": 1.0}', "1.0"),
        (b'{"id": -1E+5}', "-1E+5"),
        (b'{"a": {"id": 2}, "id": 1}', "1"),
        (b'{"\\u0069d": 1}', "1"),
        (b'{"id": 1, "a": 1e999}', "1"),
        (b'{"id": 1.50, "a": "\\ud800"}', "1.50"),
        (b'{"id": "b", "a": "\\ud800"}', "b"),
    ],
)
def test_keys(line, key):
    assert key_reader("id")(line) == key


def test_the_two_parsers_agree(monkeypatch):
    """What msgspec takes, Python's parser takes with the same key, and the other way round, but for half surrogates."""
    texts = [b"1", b'"x"', b"[]", b"{}", b"tru", b"1.", b"01", b"[1,]", b'{"a":1,}', b"", b" 1 ", b"-", b'"\x01"']
    ids = (b"1", b'"k"', b"null", b"[]", b"{}", b"true", b"1e5", b"-0.0", b'"\\n"', b"")
    texts += [b'{"id":%s}' % value for value in ids]
    fast = [key_reader(None), key_reader("id")]

    def refuse(_):
        raise ValueError

    class Refusing:
        decode = staticmethod(refuse)

    monkeypatch.setattr(_json_line.msgspec.json, "Decoder", lambda *_: Refusing)
    slow = [key_reader(None), key_reader("id")]

    def outcome(reader, text):
        try:
            return reader(text)
        except BadLine as error:
            return str(error)

    for text in texts:
        for one, other in zip(fast, slow, strict=True):
            assert outcome(one, text) == outcome(other, text), text
