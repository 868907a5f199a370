"""The command ``kbatch inbox demo``: the whole way of an order, whoever is killed on it."""

import re

import pytest

from kbatch.cli import _inbox_demo
from kbatch.cli._orders import Orders

from .test_cli_outbox import run, run_here


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
