"""``kbatch inbox``: its tables and what is in them; the demo, the whole way of an order, whoever is killed on it."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

import kbatch
from kbatch import Envelope
from kbatch.cli import _inbox_demo
from kbatch.cli._orders import Orders
from kbatch.cli._screen import Screen
from tests import inboxes
from tests.inboxes import GROUP, Inbox, accept, days_ago, handled_at, id_at, ids, where

from .test_cli import assert_one_line
from .test_cli_outbox import run, run_here

OLD = {id_at(days_ago(9), n) for n in range(5)}
NEW = {id_at(days_ago(0), n) for n in range(3)}


@pytest.fixture
def inbox(new_inbox: Callable[[], Inbox]) -> Inbox:
    """Five ids that were handled 9 days ago, three that were handled now."""
    inbox = new_inbox()
    accept(inbox, [Envelope({}, id=each) for each in OLD])
    handled_at(inbox, days_ago(9))
    accept(inbox, [Envelope({}, id=each) for each in NEW])
    return inbox


def here(inbox: Inbox, *arguments: Any) -> tuple[int, str, str]:
    found = where(inbox)
    schema = ("--schema", found["schema"]) if "schema" in found else ()
    done: tuple[int, str, str] = run_here(
        "inbox", *arguments, *schema, KBATCH_INBOX=found.get("path") or found["conninfo"]
    )
    return done


def rows(out: str) -> Iterator[Any]:
    return map(json.loads, out.splitlines())


# -- tables


def test_create_makes_an_inbox_and_ddl_prints_what_it_executes(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    ddl = kbatch.SqliteInbox(path, prefix="x_").ddl()
    assert run_here("inbox", "ddl", "-i", path, "--prefix", "x_") == (0, ddl, "")
    assert not path.exists()
    for name in (path, f"sqlite:///{path}"):
        done = run_here("inbox", "create", "--inbox", name, "--prefix", "x_")
        assert done == (0, f"the inbox is ready: {name}\n", "")
    assert kbatch.SqliteInbox(path, prefix="x_").status().handled == 0


def test_an_inbox_in_postgresql_is_named_by_its_url(postgres: str, postgres_schema: str) -> None:
    url = postgres.replace("postgresql://", "postgresql+psycopg://")
    status, out, err = run_here("inbox", "create", "-i", url, "--schema", postgres_schema, "--prefix", "x_")
    assert (status, err) == (0, "")
    assert re.fullmatch(r"the inbox is ready: postgresql://[\w.:]+/\w+\n", out)
    assert kbatch.PostgresInbox(postgres, schema=postgres_schema, prefix="x_").status().handled == 0
    done = run_here("inbox", "ddl", "-i", "postgresql://u:secret@h/d", "--schema", postgres_schema)
    assert done == (0, kbatch.PostgresInbox("", schema=postgres_schema).ddl(), "")


def test_an_inbox_is_named_by_an_option_else_by_a_variable_else_by_a_listeners_file(tmp_path: Path) -> None:
    for name in ("option", "variable", "file"):
        accept(inboxes.made(tmp_path, name, prefix="x_"), [Envelope({}) for _ in name])
    config = tmp_path / "listen.toml"
    file = json.dumps(str(tmp_path / "file"))
    config.write_text(f"topics = ['orders']\ninbox = {file}\nprefix = 'x_'\n[kafka]\ngroup.id = 'billing'\n")
    asks = ("inbox", "status", "--json", "--config", config)
    variable = {"KBATCH_INBOX": str(tmp_path / "variable")}
    for options, variables, expected in (
        (("-i", tmp_path / "option"), variable, 6), ((), variable, 8), ((), {}, 4)
    ):  # fmt: skip
        status, out, _ = run_here(*asks, *options, **variables)
        assert (status, *rows(out)) == (0, {"handled": expected, "safe_until": {}})


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("status",), 2, "no inbox is named: give --inbox PATH, KBATCH_INBOX, or inbox in a --config FILE"),
        (("purge", "-y", "-i", "none.db"), 1, r"there is no database .*none.db; call .* \(kbatch inbox create\)"),
        (("create", "-i", "."), 1, "the inbox in .*: unable to open database file"),
        (("status", "-i", "host=h password=secret"), 2, "an inbox in PostgreSQL is named by a URL: postgresql://user@"),
        (("status", "-i", "postgresql://u:secret@127.0.0.1:1/d"), 1, "is conninfo right"),
        (("status", "-i", "oracle://u:secret@h/d"), 2, "an inbox is a path of a SQLite file, or a URL"),
        (("status", "-i", "x", "--schema", "shop"), 2, "--schema is for PostgreSQL"),
        (("purge", "-i", "x", "--older-than", "soon"), 2, "--older-than takes a number and s, m, h or d"),
        (("purge", "-i", "x", "--committed", "billing"), 2, "--committed takes GROUP=TIME, such as billing=now"),
        (("purge", "-i", "x", "--committed", "billing=soon"), 2, "--committed takes a time with its zone, such as"),
        (("status", "-i", "x", "--config", "relay.toml"), 2, "there is no setting 'outbox'"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(
    arguments: tuple[str, ...], status: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("relay.toml").write_text("outbox = 'shop.db'\n")
    result = run_here("inbox", *arguments)
    assert (result[0], result[1], result[2].count("\n")) == (status, "", 1)
    assert re.search(message, result[2])
    assert "secret" not in result[2]


# -- what is in it


def test_status_shows_how_much_and_up_to_when_each_group_has_committed(inbox: Inbox) -> None:
    asked_at = inbox.clock_us()
    for group in (GROUP, "[red]mail"):
        order = Envelope(data=b"", topic="orders", partition=0)
        with contextlib.closing(inbox.open_session(group)) as session:
            session.handle(order, lambda *_: None)
        inbox.note_offsets(group, asked_at, {("orders", 0): (7, 7)})
    inbox.note_offsets(GROUP, asked_at + 1, {("orders", 0): (7, 7)})
    until = datetime.fromtimestamp(asked_at / 1e6, timezone.utc)
    status, out, err = here(inbox, "status")
    assert (status, err) == (0, "")
    assert re.search(r"ids that were handled\W+10\W", out)
    assert re.search(rf"committed by {GROUP} up to\W+{until:%Y-%m-%d %H:%M:%S}Z", out)
    assert re.search(r"committed by \[red\]mail up to\W+not known", out)
    assert "4 or more" in here(inbox, "status", "--count-up-to", 4)[1]
    found = {"handled": 10, "safe_until": {GROUP: until.isoformat(), "[red]mail": None}}
    assert list(rows(here(inbox, "status", "--json")[1])) == [found]


def test_purge_deletes_what_is_old_and_committed(inbox: Inbox) -> None:
    assert here(inbox, "purge", "--yes") == (0, "0 ids purged\n", "")  # no listener has told what is committed
    claim = f"{GROUP}={days_ago(50).isoformat()}"
    assert here(inbox, "purge", "--yes", "--committed", claim)[:2] == (0, "0 ids purged\n")
    assert here(inbox, "purge", "--yes", "--older-than", "60d", "--committed", f"{GROUP}=now")[1] == "0 ids purged\n"
    status, out, err = here(inbox, "purge", "--yes", "--json", "--committed", f"{GROUP}=now", "--committed", "a=b=now")
    assert (status, list(rows(out)), err) == (0, [{"purged": 5}], "")
    assert ids(inbox) == NEW


def test_purge_asks_before_or_is_told_yes(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    question = "purge ids that were handled 2d ago or before, for good"
    assert_one_line(here(inbox, "purge", "--older-than", "2d"), 2, f"{question}? Say so by --yes")
    asked = []
    monkeypatch.setattr(Screen, "is_asked", True)
    monkeypatch.setattr(Screen, "ask", lambda _, text: asked.append(text) or len(asked) > 1)
    options = ("purge", "--older-than", "2d", "--committed", f"{GROUP}=2040-01-31T12:00:00+01:00")
    assert here(inbox, *options) == (1, "", "")
    assert ids(inbox) == OLD | NEW
    assert here(inbox, *options) == (0, "5 ids purged\n", "")
    assert asked == [f"{question}; committed, as you say: {GROUP} up to 2040-01-31 11:00:00Z?"] * 2


def test_nobody_is_asked_about_an_inbox_that_is_empty(tmp_path: Path) -> None:
    assert here(inboxes.made(tmp_path), "purge") == (0, "0 ids purged\n", "")


# -- the demo


@pytest.mark.long
def test_the_demo_of_the_inbox_kills_relays_and_listeners_and_finds_one_invoice_for_each_order() -> None:
    status, out, err = run("inbox", "demo", "--count", 20_000, "--one-at-a-time", 50, timeout=150)
    assert (status, err) == (0, "")
    assert "20,000 orders were committed, relayed, received and invoiced: each once" in out
    assert re.search(r"listener 4, a process, invoiced", out)
    assert out.count("and was killed") == 4


def test_the_demo_of_the_inbox_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _inbox_demo.ListenerProcesses.rows

    def lost(self: _inbox_demo.ListenerProcesses) -> list[tuple[int, str, int]]:
        return list(rows(self))[1:]

    monkeypatch.setattr(_inbox_demo.ListenerProcesses, "rows", lost)
    options = ("--count", 500, "--relay-kills", 0, "--listener-kills", 0, "--one-at-a-time", 0)
    status, _, err = run_here("inbox", "demo", *options)
    assert status == 1
    assert "1 order without an invoice" in err


def test_what_is_wrong_with_invoices() -> None:
    orders = Orders(50)
    rows = [(order.order, order.customer, order.total_cents) for order in map(orders.order, range(50))]
    assert _inbox_demo.check_invoices(rows, orders) == []
    assert "was invoiced twice" in _inbox_demo.check_invoices([*rows, rows[-1]], orders)[0]
    assert "nobody has committed" in _inbox_demo.check_invoices([*rows, (7, "customer", 1)], orders)[0]
    assert "is another's" in _inbox_demo.check_invoices([(rows[0][0], rows[1][1], 0), *rows[1:]], orders)[0]
    assert any("after a later one" in problem for problem in _inbox_demo.check_invoices(rows[::-1], orders))
    assert _inbox_demo.check_invoices([], orders) == ["50 orders without an invoice, the first is 1000000"]
