"""``kbatch outbox`` and ``kbatch relay``, in processes of their own where signals and terminals matter."""

import contextlib
import json
import os
import re
import signal
import subprocess
import uuid
from datetime import datetime, timedelta, timezone

import pytest

import kbatch
from kbatch import Envelope
from kbatch._fastmap import unpack_record
from kbatch.cli import _outbox_demo
from kbatch.cli._failure import Failure
from kbatch.testing import MockCluster
from tests import outboxes
from tests.outboxes import named
from tests.relays import check_history, numbered
from tests.waiting import until

from .clients import read_back, read_committed
from .test_cli import COMMAND, assert_one_line, environment, on_a_terminal, run, run_here

QUICK = ("-X", "delivery.timeout.ms=1000", "-X", "reconnect.backoff.max.ms=100")


@pytest.fixture
def outbox(new_outbox):
    return new_outbox()


@pytest.fixture
def file_outbox(tmp_path):
    """For what is alike in all databases."""
    return outboxes.made(tmp_path)


@pytest.fixture
def dead(outbox):
    """Five dead letters, of which one is no text."""
    order = {"order": 7, "name": "[red]Grün"}
    outboxes.add(outbox, [Envelope(order, key="k1", message_type="order.placed", headers={"h": b"\xff"})])
    outboxes.add(outbox, [Envelope(data=b"\xff\x00", key=b"\xfe", topic="bills"), *numbered(range(3))])
    outboxes.move_to_dead(outbox, "true")
    return outbox


def here(outbox, *arguments, **variables):
    _, name, *schema = named(outbox)
    return run_here("outbox", *arguments, *schema, KBATCH_OUTBOX=name, **variables)


def rows(out):
    return [json.loads(line) for line in out.splitlines()]


# -- tables


def test_create_makes_an_outbox_and_status_shows_it(tmp_path):
    path = tmp_path / "shop.db"
    for name in (path, f"sqlite:///{path}"):
        status, out, err = run_here("outbox", "create", "--outbox", name)
        assert (status, out, err) == (0, f"the outbox is ready: {name}\n", "")
    outbox = kbatch.SqliteOutbox(path)
    outboxes.add(outbox, numbered(range(1500)))
    status, out, err = run_here("outbox", "status", "-o", path)
    assert (status, err) == (0, "")
    assert re.search(r"to be sent\W+1,500\W", out)
    status, out, _ = run_here("outbox", "status", "-o", path, "--json", "--count-up-to", 1000)
    assert status == 0
    (found,) = rows(out)
    assert 0 < found.pop("oldest_age_s") < 60
    assert found == {"waiting": 1000, "later": 0, "scheduled": 0, "dead": 0, "relays": 0, "unvacuumed": 0}
    assert "1,000 or more" in run_here("outbox", "status", "-o", path, "--count-up-to", 1000)[1]


def test_an_outbox_in_postgresql_is_named_by_its_url(postgres, in_postgres):
    schema = in_postgres()._tables.schema
    status, out, err = run_here("outbox", "create", "-o", postgres, "--schema", schema, "--prefix", "x_")
    assert (status, err) == (0, "")
    assert re.fullmatch(r"the outbox is ready: postgresql://[\w.:]+/\w+\n", out)
    outbox = kbatch.PostgresOutbox(postgres, schema=schema, prefix="x_")
    outboxes.add(outbox, numbered(range(1500)))
    url = postgres.replace("postgresql://", "postgresql+psycopg://")
    found = rows(run_here("outbox", "status", "-o", url, "--schema", schema, "--prefix", "x_", "--json")[1])[0]
    assert 0 < found.pop("oldest_age_s") < 60
    assert found.pop("unvacuumed") >= 0
    assert found == {"waiting": 1500, "later": 0, "scheduled": 0, "dead": 0, "relays": 0}
    assert "has not freed yet" in run_here("outbox", "status", "-o", url, "--schema", schema, "--prefix", "x_")[1]
    status, out, err = run_here("outbox", "ddl", "-o", "postgresql://u:secret@h/d", "--schema", schema)
    assert (status, out, err) == (0, kbatch.PostgresOutbox("", schema=schema).ddl(), "")


def test_ddl_is_what_the_library_says_and_needs_no_database(tmp_path):
    path = tmp_path / "none.db"
    status, out, err = run_here("outbox", "ddl", "-o", path, "--prefix", "x_")
    assert (status, err) == (0, "")
    assert out == kbatch.SqliteOutbox(path, prefix="x_").ddl()
    assert not path.exists()


def test_an_outbox_is_named_by_an_option_else_by_a_variable_else_by_a_file(tmp_path):
    for name in ("option", "variable", "file"):
        outboxes.add(outboxes.made(tmp_path, name, prefix="x_"), numbered(range(len(name))))
    config = tmp_path / "relay.toml"
    config.write_text(f"outbox = {json.dumps(str(tmp_path / 'file'))}\nprefix = 'x_'\n")
    asks = ("outbox", "status", "--json", "--config", config)
    variable = {"KBATCH_OUTBOX": str(tmp_path / "variable")}
    assert rows(run_here(*asks, "-o", tmp_path / "option", **variable)[1])[0]["waiting"] == 6
    assert rows(run_here(*asks, **variable)[1])[0]["waiting"] == 8
    assert rows(run_here(*asks)[1])[0]["waiting"] == 4


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="platform: no full device")
def test_what_only_prints_fails_if_that_cannot_be_written(file_outbox):
    outboxes.add(file_outbox, numbered(range(2)))
    outboxes.move_to_dead(file_outbox, "true")
    asks = ("ddl",), ("dead", "list", "--json"), ("dead", "replay", "--all")
    for arguments in asks:
        command = [*COMMAND, "outbox", *arguments, *named(file_outbox)]
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment(), timeout=60)
        # What was changed is changed: that is what its status tells.
        assert done.returncode == (0 if "replay" in arguments else 1), (arguments, done.stderr)
        assert done.stderr == b"kbatch: cannot write to standard output: No space left on device\n"
    assert outboxes.bodies(file_outbox) == [b"0", b"1"]
    piped = " ".join([*COMMAND, "outbox", "ddl", *map(str, named(file_outbox))])
    done = subprocess.run(
        ["bash", "-c", f"{piped} | true; exit ${{PIPESTATUS[0]}}"], capture_output=True, env=environment(), timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("status",), 2, "no outbox is named: give --outbox PATH, KBATCH_OUTBOX, or outbox in a --config FILE"),
        (
            ("status", "-o", "none.db"),
            1,
            r"there is no database .*none.db; call create\(\) .* \(kbatch outbox create\)",
        ),
        (("create", "-o", "."), 1, "the outbox in .*: unable to open database file"),
        (("status", "-o", "sqlite://x/y"), 2, "a URL of SQLite is sqlite:///shop.db, or sqlite:////var/lib/shop.db"),
        (("status", "-o", "postgresql://u:secret@127.0.0.1:1/d"), 1, "is conninfo right"),
        (("status", "-o", "postgresql+psycopg://u:secret@127.0.0.1:1/d"), 1, "is conninfo right"),
        (("status", "-o", "postgresql://u:sec/ret@127.0.0.1:1/d"), 2, "/ is %2F"),
        (("status", "-o", "postgresql://u:x@secret@127.0.0.1:1/d"), 2, "@ is %40"),
        (("status", "-o", "postgresql://u:sec%ret@127.0.0.1:1/d"), 1, "written as %XX"),
        (("status", "-o", "postgresql://u:x?secret/x@127.0.0.1:1/d"), 1, "written as %XX"),
        (("status", "-o", "postgresql://127.0.0.1:1/d?pasword=secret"), 1, "written as %XX"),
        (("status", "-o", "host=h password=secret"), 2, "is named by a URL: postgresql://user@host/database"),
        (("status", "-o", "postgresql:/u:secret@h/d"), 2, "is named by a URL: postgresql://user@host/database"),
        (("status", "-o", "postgres:u:secret@h/d"), 2, "is named by a URL: postgresql://user@host/database"),
        (("status", "-o", "x", "--schema", "shop"), 2, "--schema is for PostgreSQL"),
        (("status", "-o", "postgresql://h/d", "--schema", "s" * 64), 2, "schema=.* makes names of 64 bytes"),
        (("status", "-o", "oracle://u:secret@h/d"), 2, "an outbox is a path of a SQLite file, or a URL"),
        (("status", "-o", ":memory:"), 2, "path must be a file"),
        (("status", "-o", "x", "--prefix", "a-b"), 2, "prefix must begin a table's name"),
        (("dead", "replay", "-o", "x"), 2, "say which: numbers or ids, --topic, --type or --error; or --all"),
        (("dead", "discard", "-o", "x", "--all", "7"), 2, "--all goes without numbers or ids"),
        (("dead", "show", "-o", "x", "seven"), 2, "a message is named by its number, or by its id"),
        (("dead", "show", "-o", "x", "7", str(uuid.UUID(int=7))), 2, "give numbers or ids, not both at a time"),
        (("dead", "list", "-o", "x", "--older-than", "soon"), 2, "--older-than takes a number and s, m, h or d"),
        (("dead", "list", "-o", "x", "--older-than", "9999999d"), 2, "--older-than is out of range: 9999999d"),
        (("dead", "list", "-o", "x", "--newer-than", "999999999d"), 2, "--newer-than is out of range: 999999999d"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(arguments, status, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_here("outbox", *arguments)
    assert (result[0], result[1], result[2].count("\n")) == (status, "", 1)
    assert re.search(message, result[2])
    assert not re.search("secret|sec|ret@", result[2])


# -- dead letters


def test_dead_letters_are_listed_in_pages(dead):
    status, out, err = here(dead, "dead", "list")
    assert (status, err) == (0, "")
    assert "order.placed" in out
    assert "hex fe" in out
    found = rows(here(dead, "dead", "list", "--json")[1])
    assert [each["number"] for each in found] == [1, 2, 3, 4, 5]
    assert found[0]["key"] == "k1"
    assert found[1]["key_base64"] == "/g=="
    assert found[0]["topic"] == "orders"
    assert datetime.fromisoformat(found[0]["died_at"]) == datetime(1970, 1, 1, 0, 0, 1, tzinfo=timezone.utc)
    status, out, err = here(dead, "dead", "list", "--limit", 2)
    assert err == "kbatch: there are more: --offset 2, or --limit 0 for all\n"
    status, out, err = here(dead, "dead", "list", "--limit", 2, "--offset", 3, "--json")
    assert ([each["number"] for each in rows(out)], err) == ([4, 5], "")
    assert len(rows(here(dead, "dead", "list", "--limit", 0, "--json")[1])) == 5


def test_dead_letters_are_chosen_and_counted(dead):
    def numbers(*arguments):
        return [each["number"] for each in rows(here(dead, "dead", "list", "--json", *arguments)[1])]

    assert numbers("--topic", "bills") == [2]
    assert numbers("--type", "order.placed") == [1]
    assert numbers("--error", "REFUSED", "3", "4") == [3, 4]
    assert numbers("--newer-than", "1h") == []
    assert numbers("--older-than", "1h") == [1, 2, 3, 4, 5]
    assert numbers(dead.dead_letters.find()[2].id) == [3]
    _, out, _ = here(dead, "dead", "list", "--summary", "--json")
    assert [(each["topic"], each["message_type"], each["letters"]) for each in rows(out)] == [
        ("orders", "bytes", 3),
        ("orders", "order.placed", 1),
        ("bills", "bytes", 1),
    ]
    assert "order.placed" in here(dead, "dead", "list", "--summary")[1]
    assert here(dead, "dead", "list", "--summary", "--topic", "none") == (0, "no dead letters\n", "")
    assert here(dead, "dead", "list", "--topic", "none") == (0, "no dead letters\n", "")


def test_a_dead_letter_is_shown_with_its_headers_and_its_body(dead):
    status, out, err = here(dead, "dead", "show", 1, 2)
    assert (status, err) == (0, "")
    assert '"name": "[red]Grün"' in out  # no markup
    assert "body, 31 bytes:" in out
    assert "header h" in out
    assert "hex ff 00" in out
    first, second = rows(here(dead, "dead", "show", 1, 2, "--json")[1])
    assert json.loads(first["value"]) == {"order": 7, "name": "[red]Grün"}
    assert {"name": "h", "value_base64": "/w=="} in first["headers"]
    assert second["value_base64"] == "/wA="
    assert here(dead, "dead", "show", 1, 77)[::2] == (1, "kbatch: 1 dead letter not found\n")
    outboxes.query(dead, f"UPDATE {{dead}} SET packed = {outboxes.literal(dead, b'0')} WHERE seq = 1")
    assert "damaged" in here(dead, "dead", "show", 1)[1]
    assert "damaged" in rows(here(dead, "dead", "show", 1, "--json")[1])[0]


def test_dead_letters_are_replayed(dead):
    assert here(dead, "dead", "replay", 3, 4) == (0, "2 dead letters will be sent again\n", "")
    assert outboxes.bodies(dead) == [b"1", b"2"] or outboxes.bodies(dead) == [b"0", b"1"]
    assert here(dead, "dead", "replay", 3, 5)[:2] == (1, "1 dead letter will be sent again\n")
    outboxes.query(dead, "UPDATE {dead} SET deliver_by = 1 WHERE seq = 1")
    status, out, err = here(dead, "dead", "replay", "--all")
    assert (status, err) == (1, "")
    assert out == "1 dead letter will be sent again\n1 stay dead: they have expired, or cannot be read\n"
    assert rows(here(dead, "dead", "replay", "--all", "--json")[1]) == [{"replayed": 0, "left": 1}]


def test_what_destroys_asks_before_or_is_told_yes(dead):
    assert_one_line(here(dead, "dead", "discard", "--topic", "bills"), 2, "discard 1 dead letter for good? Say so by")
    assert dead.status().dead == 5
    assert here(dead, "dead", "discard", "--topic", "bills", "--yes") == (0, "1 dead letter discarded\n", "")
    assert rows(here(dead, "dead", "discard", "--all", "-y", "--json")[1]) == [{"discarded": 4}]
    assert here(dead, "dead", "discard", 1, "-y")[:2] == (1, "0 dead letters discarded\n")
    outboxes.add(dead, numbered(range(2)))
    outboxes.move_to_later(dead, 6, 7)
    assert_one_line(here(dead, "later", "cancel", "--all"), 2, "cancel 2 messages for good? Say so by --yes")
    assert here(dead, "later", "cancel", 6, "--yes") == (0, "1 message cancelled\n", "")
    assert rows(here(dead, "later", "cancel", "--all", "-y", "--json")[1]) == [{"cancelled": 1}]


@pytest.mark.skipif(os.name == "nt", reason="platform: no pseudo-terminals")
@pytest.mark.parametrize(("answer", "left"), [("y\n", 0), ("\n", 5), ("no\n", 5)])
def test_a_question_on_a_terminal_is_answered_there(dead, answer, left):
    pty = pytest.importorskip("pty", reason="platform: no pseudo-terminals")
    master, slave = pty.openpty()
    command = [*COMMAND, "outbox", "dead", "discard", "--all", *named(dead)]
    with subprocess.Popen(command, stdin=slave, stdout=subprocess.PIPE, stderr=slave, env=environment()) as child:
        os.write(master, answer.encode())
        out = child.communicate(timeout=30)[0]
    os.close(slave)
    os.close(master)
    assert child.returncode == (0 if left == 0 else 1)
    assert out == (b"5 dead letters discarded\n" if left == 0 else b"")
    assert dead.status().dead == left


def test_what_comes_while_somebody_thinks_is_not_deleted(outbox, monkeypatch):
    outboxes.add(outbox, numbered(range(5)))
    outboxes.move_to_dead(outbox, "seq <= 3")
    outboxes.move_to_later(outbox, 4, 5)
    outboxes.add(outbox, numbered(range(5, 7)))
    asked = []

    def ask(screen, question):
        asked.append(question)
        if "dead letters" in question:
            outboxes.move_to_dead(outbox, "true")
        else:
            outboxes.move_to_later(outbox, 8, 8)
        return True

    monkeypatch.setattr("kbatch.cli._screen.Screen.is_asked", True)
    monkeypatch.setattr("kbatch.cli._screen.Screen.ask", ask)
    monkeypatch.setattr("kbatch.cli._outbox._PAGE", 2)
    assert here(outbox, "dead", "discard", "--all") == (0, "3 dead letters discarded\n", "")
    assert outbox.status().dead == 2
    outboxes.add(outbox, numbered(range(1)))
    assert here(outbox, "later", "cancel", "--topic", "orders") == (0, "2 messages cancelled\n", "")
    assert asked == ["discard 3 dead letters for good?", "cancel 2 messages for good?"]
    assert outbox.status().later == 1


def test_what_waits_is_listed(outbox):
    outboxes.add(outbox, numbered(range(3)))
    outboxes.move_to_later(outbox, 1, 3)
    status, out, err = here(outbox, "later", "list")
    assert (status, err) == (0, "")
    assert "due" in out
    assert {each["number"] for each in rows(here(outbox, "later", "list", "2", "3", "--json")[1])} == {2, 3}
    assert "due_at" in rows(here(outbox, "later", "list", "--json")[1])[0]
    assert here(outbox, "later", "list", "--topic", "x") == (0, "no messages\n", "")
    (count,) = rows(here(outbox, "later", "list", "--summary", "--json")[1])
    assert (count["topic"], count["message_type"], count["messages"]) == ("orders", "bytes", 3)
    assert "messages" in here(outbox, "later", "list", "--summary")[1]
    assert here(outbox, "later", "list", "--summary", "--topic", "x") == (0, "no messages\n", "")


def test_what_waits_is_rescheduled(outbox):
    outboxes.add(outbox, numbered(range(3), scheduled_time=datetime.now(timezone.utc) + timedelta(days=1)))
    assert here(outbox, "later", "reschedule", 1, "--at", "2030-01-31T12:00:00Z")[:2] == (
        0,
        "1 message due 2030-01-31 12:00:00Z\n",
    )
    due = {each["number"]: each["due_at"] for each in rows(here(outbox, "later", "list", "--json")[1])}
    assert due[1] == "2030-01-31T12:00:00+00:00"
    assert rows(here(outbox, "later", "reschedule", "--all", "--in", "0s", "--json")[1]) == [{"rescheduled": 3}]
    due_at = [datetime.fromisoformat(each["due_at"]) for each in rows(here(outbox, "later", "list", "--json")[1])]
    assert max(due_at) <= datetime.now(timezone.utc)
    assert here(outbox, "later", "reschedule", 77, "--in", "0s")[0] == 1
    for options, message in (
        (["--all"], "say when: --at TIME or --in AGE"),
        (["--all", "--at", "2030-01-31T12:00:00Z", "--in", "1s"], "say when: --at TIME or --in AGE"),
        (["--all", "--at", "2030-01-31"], "--at takes a time with its zone, such as 2030-01-31T12:00:00Z"),
        (["--all", "--in", "soon"], "--in takes a number and s, m, h or d, such as 90s, 15m, 2h, 7d"),
        (["--all", "--in", "9999999d"], "--in is out of range: 9999999d"),
        (["--all", "--at", "0001-01-01T00:00:00+14:00"], "--at is out of range: 0001-01-01T00:00:00+14:00"),
    ):
        assert_one_line(here(outbox, "later", "reschedule", *options), 2, message)


def test_a_dead_letter_is_edited_and_sent_again(dead, tmp_path):
    (before,) = dead.dead_letters.find(kbatch.OutboxQuery(numbers=[1]))
    (tmp_path / "body").write_bytes(b'{"mended": true}')
    assert here(dead, "dead", "edit", 1, "--body", tmp_path / "body", "--to", "mended", "--key", "k")[:2] == (
        0,
        "dead letter 1 will be sent again, changed\n",
    )
    ((packed,),) = outboxes.query(dead, "SELECT packed FROM {outbox}")
    topic, _, _, key, value, headers = unpack_record(packed)
    assert (topic, key, value) == ("mended", b"k", b'{"mended": true}')
    assert dict(headers)["id"] == str(before.id).encode()
    assert dead.status().dead == 4
    assert_one_line(here(dead, "dead", "edit", 1, "--to", "x"), 1, "there is no dead letter 1")
    assert_one_line(here(dead, "dead", "edit", 2), 2, "say what is changed: --body FILE, --to TOPIC or --key KEY")
    missing = tmp_path / "none"
    assert_one_line(here(dead, "dead", "edit", 2, "--body", missing), 2, f"--body {missing}: No such file or directory")
    assert here(dead, "dead", "edit", 2, "--to", "a b")[0] == 1


def test_a_file_says_whether_relays_are_notified(outbox, kafka_cluster: MockCluster, tmp_path):
    config = tmp_path / "relay.toml"
    config.write_text("notify = true\n")
    _, name, *schema = named(outbox)
    arguments = ("relay", "--config", config, *schema, "-X", servers(kafka_cluster))
    if isinstance(outbox, kbatch.SqliteOutbox):
        result = run_here(*arguments, "--drain", KBATCH_OUTBOX=name)
        assert_one_line(result, 2, "notify is for PostgreSQL: SQLite has no NOTIFY")
        return
    with relaying(*arguments[1:], KBATCH_OUTBOX=name) as process:
        asks = "SELECT listens FROM {relay}"
        until(lambda: outboxes.query(outbox, asks) == [(1,)] or process.poll() is not None, "that it listens")
        assert process.poll() is None, process.communicate()
        process.terminate()
        process.communicate(timeout=30)
    config.write_text("notify = 1\n")
    assert_one_line(run_here(*arguments, KBATCH_OUTBOX=name), 2, "notify must be true or false")


# -- relay


@contextlib.contextmanager
def relaying(*arguments, **variables):
    command = [*COMMAND, "relay", *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**variables)
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def servers(cluster):
    return f"bootstrap.servers={cluster.bootstrap_servers}"


def owners(outbox):
    return outboxes.query(outbox, "SELECT count(*) FROM {lease} WHERE owner IS NOT NULL")[0][0]


def test_relay_drains_an_outbox_by_a_file_of_settings(outbox, kafka_cluster: MockCluster, tmp_path):
    outboxes.add(outbox, numbered(range(500)))
    config = tmp_path / "relay.toml"
    _, name, *schema = named(outbox)
    config.write_text(
        f"""
        outbox = {json.dumps(name)}
        prefix = "kbatch_"
        {f"schema = {json.dumps(schema[1])}" if schema else ""}
        [relay]
        batch_size = 100
        [retry]
        max_attempts = 3
        [kafka]
        bootstrap.servers = "{kafka_cluster.bootstrap_servers}"
        "delivery.timeout.ms" = 1000
        socket.keepalive.enable = true
        """
    )
    status, out, err = run("relay", "--config", config, "--drain")
    assert (status, out) == (0, "")
    lines = err.splitlines()
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ relay of .* to 127\.0\.0\.1:\d+ begins$", lines[0])
    assert "@" not in lines[0]
    assert lines[-1].endswith("the outbox is empty: 500 acknowledged")
    check_history(range(500), read_back(kafka_cluster.bootstrap_servers, "orders"))


def test_relay_fences_by_a_file_of_settings(outbox, kafka_cluster: MockCluster, tmp_path):
    outboxes.add(outbox, numbered(range(500)))
    config = tmp_path / "relay.toml"
    config.write_text('[relay]\nfencing = "kafka"\n')
    arguments = (*named(outbox), "--config", config, "-X", servers(kafka_cluster))
    status, _, err = run("relay", *arguments, "--drain")
    assert status == 0, err
    check_history(range(500), read_committed(kafka_cluster.bootstrap_servers, "orders"))


def test_relay_tells_programs_in_json(outbox, kafka_cluster: MockCluster):
    outboxes.add(outbox, numbered(range(10)))
    status, out, err = run("relay", *named(outbox), "-X", servers(kafka_cluster), "--drain", "--json")
    assert status == 0
    (end,) = rows(out)
    assert (end["acked"], end["exit_status"], end["reason"]) == (10, 0, "the outbox is empty")
    assert (end["state"], end["last_error"]) == ("closed", None)
    assert {tuple(each) for each in rows(err)} == {("time", "level", "message")}


@pytest.mark.skipif(os.name == "nt", reason="platform: no such signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_relay_with_its_work_recorded_and_its_buckets_handed_back(
    outbox, kafka_cluster: MockCluster, name
):
    number = getattr(signal, name)
    outboxes.add(outbox, numbered(range(100)))
    with relaying(*named(outbox), *QUICK, KBATCH_BOOTSTRAP_SERVERS=kafka_cluster.bootstrap_servers) as process:
        until(lambda: outbox.status().waiting == 0, "all sent")
        assert owners(outbox) == 64
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (128 + number, "")
    assert "stopping" in err
    assert "stopped by a signal: 100 acknowledged" in err
    assert owners(outbox) == 0
    assert outbox.status().relays == 0


@pytest.mark.skipif(os.name == "nt", reason="platform: no such signals")
@pytest.mark.parametrize(("options", "seconds"), [((), 120), (("--grace", "7"), 7)])
def test_a_signal_leaves_to_what_is_in_flight_what_the_option_or_the_file_says(
    file_outbox, tmp_path, monkeypatch, options, seconds
):
    given = []

    def interrupt(abort, grace_s):
        given.append(grace_s)
        raise Failure("enough")

    made = kbatch.Relay

    def relay(*arguments, **relays):
        given.append(relays["close_timeout_s"])
        return made(*arguments, **relays)

    monkeypatch.setattr("kbatch.cli._relay.Interrupt", interrupt)
    monkeypatch.setattr("kbatch.Relay", relay)
    config = tmp_path / "relay.toml"
    config.write_text("[relay]\nclose_timeout_s = 120\n[kafka]\nbootstrap.servers = 'localhost:1'\n")
    status, _, err = run_here("relay", "--config", config, *named(file_outbox), *options)
    assert (status, err) == (1, "kbatch: enough\n")
    assert given == [seconds, seconds]


def test_a_second_signal_gives_up_what_is_in_flight_at_once(outbox, kafka_cluster: MockCluster):
    outboxes.add(outbox, numbered(range(1)))
    arguments = (*named(outbox), "-X", servers(kafka_cluster), "-X", "delivery.timeout.ms=600000", "--grace", 600)
    with relaying(*arguments) as process:
        until(lambda: outbox.status().waiting == 0, "its start")
        kafka_cluster.set_broker_down()
        outboxes.add(outbox, numbered(range(1, 11)))
        lines = []
        process.send_signal(signal.SIGTERM)
        while "stopping" not in (line := process.stderr.readline()):
            assert line, lines
            lines.append(line)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by a signal" in err
    assert outbox.status().waiting == 10
    assert owners(outbox) == 0


def test_relay_says_that_the_time_is_over(file_outbox):
    outboxes.add(file_outbox, numbered(range(10)))
    arguments = (*named(file_outbox), "-X", "bootstrap.servers=127.0.0.1:1", "--drain", "--timeout", 1.5, "--grace", 0)
    status, out, err = run("relay", *arguments, *QUICK)
    assert (status, out) == (3, "")
    assert "no answer, and it is tried again: 127.0.0.1:1" in err
    assert "the time is over, and 10 messages are left, or more: 0 acknowledged" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "there is no setting 'x'; there are outbox, prefix, schema, notify, [relay], [retry]"),
        ("outbox = 1", "outbox must be text"),
        ("kafka = 1", "kafka must be a table, [kafka]"),
        ("[relay]\nowner = 1", "[relay] has no 'owner'; it has batch_size, "),
        ("[relay]\nfencing = 1", "fencing must be 'kafka' or None, not 1"),
        ("[relay]\nbatch_size = 0", "batch_size must be an int from 1 to 100,000, not 0"),
        ("[retry]\nmax_attempts = 0", "[retry] max_attempts must be 1 or more"),
        ("[kafka]\nx = []", "[kafka] has a value that is no text, number, true or false: x"),
        ("[kafka]\nlinger.mss = 1", "linger.mss"),
        ("[kafka]\nsasl.mechanism = 'PLAIN'\nenable.idempotence = false", "enable.idempotence=false"),
        ("[kafka", "is not TOML: "),
    ],
)
def test_a_wrong_file_of_settings_is_told_in_one_line(text, message, file_outbox, tmp_path):
    config = tmp_path / "relay.toml"
    config.write_text(text)
    result = run_here("relay", *named(file_outbox), "--config", config, "--drain", "-X", "bootstrap.servers=x:1")
    assert result[0] == 2
    assert message in result[2].splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no broker is named: give -X bootstrap.servers=HOST:PORT, KBATCH_BOOTSTRAP_SERVERS"),
        (("-X", "bootstrap.servers=x:1", "--timeout", "5"), "--timeout is for --drain"),
        (("-X", "bootstrap.servers=x:1", "stray"), "-X takes KEY=VALUE as one argument"),
        (("-X", "bootstrap.servers=x:1", "-X", "error_cb=x"), "error_cb is for programs"),
        (("-X", "bootstrap.servers=x:1", "-X", "linger.ms=soon"), "linger.ms"),
        (("-X", "bootstrap.servers=x:1", "-X", "security.protocol=ssl", "-X", "ssl.ca.location=/none"), "ssl.ca"),
        (("--config", "/none/relay.toml"), "cannot read the configuration file /none/relay.toml"),
    ],
)
def test_wrong_options_of_a_relay_are_told(arguments, message, file_outbox):
    status, out, err = run_here("relay", *named(file_outbox), *arguments)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_a_relay_without_tables_ends_and_says_what_to_do(tmp_path):
    status, out, err = run_here("relay", "-o", tmp_path / "none.db", "-X", "bootstrap.servers=x:1")
    assert (status, out) == (1, "")
    assert "(kbatch outbox create)" in err


@pytest.mark.parametrize(
    "text",
    [
        "[kafka]\nsasl.passwrd = 'hunter2'",
        "[kafka]\nsasl.password = hunter2",
        "[kafka\nsasl.password = 'hunter2'",
        "[kafka]\nsasl.password = ['hunter2']",
        "sasl.password = 'hunter2'",
        "outbox = 'postgresql://user:hunter2@127.0.0.1:1/db'",
        "[kafka]\nsasl.password = 'hunter2'\nenable.idempotence = false",
    ],
)
def test_secrets_of_a_relay_are_not_shown(text, file_outbox, tmp_path):
    config = tmp_path / "relay.toml"
    config.write_text(text)
    place = () if "outbox" in text else named(file_outbox)
    status, out, err = run_here("relay", *place, "--config", config, "--drain", "-X", "bootstrap.servers=x:1")
    assert status == (1 if "outbox" in text else 2)
    assert "hunter" not in out + err
    status, out, err = run_here("outbox", "status", "--config", config)
    assert "hunter" not in out + err


@pytest.mark.skipif(os.name == "nt", reason="platform: no pseudo-terminals")
def test_a_relay_on_a_terminal_shows_a_live_line(outbox, kafka_cluster: MockCluster):
    outboxes.add(outbox, numbered(range(100)))
    status, out, shown = on_a_terminal("relay", *named(outbox), "-X", servers(kafka_cluster), *QUICK, "--drain")
    assert (status, out) == (0, b"")
    assert b"in flight" in shown


# -- the demo


@pytest.mark.long
def test_the_demo_of_the_outbox_kills_relays_and_finds_everything():
    status, out, err = run("outbox", "demo", "--count", 20_000, timeout=100)
    assert (status, err) == (0, "")
    assert "20,000 orders were committed, relayed, read back and compared: none is lost, invented, changed" in out
    for row in ("orders/s", "rolled back", "relay 3 waited", "messages/s", "was killed", "records read back"):
        assert row in out


def test_the_demo_of_the_outbox_finds_what_is_wrong(monkeypatch):
    def lost(*arguments):
        yield [message for part in read_all(*arguments) for message in part][1:]

    read_all = _outbox_demo.read_all
    monkeypatch.setattr(_outbox_demo, "read_all", lost)
    status, _, err = run_here("outbox", "demo", "--count", 500, "--kills", 0)
    assert status == 1
    assert "1 order missing" in err
    assert "are not what was read back" in err
