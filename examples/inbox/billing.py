"""Billing writes one invoice for each order: `python billing.py BOOTSTRAP`. Kill it anywhere, and start it again."""

import signal
import sqlite3
import sys

import msgspec

import kbatch


class Order(msgspec.Struct):
    number: int
    customer: str
    total_cents: int


def invoice(envelope: kbatch.ReceivedEnvelope[Order], connection: sqlite3.Connection) -> None:
    order = envelope.message
    connection.execute("INSERT INTO invoices (number, total_cents) VALUES (?, ?)", (order.number, order.total_cents))


def main(bootstrap_servers: str) -> None:
    inbox = kbatch.SqliteInbox("billing.db")
    inbox.create()
    db = sqlite3.connect("billing.db")
    db.execute("CREATE TABLE IF NOT EXISTS invoices (place INTEGER PRIMARY KEY, number INTEGER, total_cents INTEGER)")
    db.close()
    listener = kbatch.Listener(
        {"bootstrap.servers": bootstrap_servers, "group.id": "billing", "session.timeout.ms": 6000},
        ["orders"],
        invoice,
        types={"order.placed": Order},
        inbox=inbox,
        concurrency=4,
    )
    signal.signal(signal.SIGTERM, lambda *_: listener.stop())
    listener.run()


if __name__ == "__main__":
    main(sys.argv[1])
