"""The listener of ``kbatch inbox demo``, a process of its own: `python -m kbatch.cli._inbox_listener DATABASE SERVERS`.

Its handler writes an invoice for each order, in the transaction in which the inbox marks the order's id.
"""

import signal
import sqlite3
import sys

import kbatch
from kbatch.cli._orders import Order

GROUP = "billing"
TOPIC = "orders"
INVOICES = "CREATE TABLE invoices (place INTEGER PRIMARY KEY, number INTEGER, customer TEXT, total_cents INTEGER)"
_BATCH = 500


def handle(envelopes: "list[kbatch.ReceivedEnvelope[Order]]", connection: sqlite3.Connection) -> None:
    orders = [envelope.message for envelope in envelopes]
    connection.executemany(
        "INSERT INTO invoices (number, customer, total_cents) VALUES (?, ?, ?)",
        [(order.order, order.customer, order.total_cents) for order in orders],
    )


def main(path: str, servers: str) -> None:
    listener = kbatch.Listener(
        # The mock cluster's groups wait for a member that was killed until its session ends.
        {
            "bootstrap.servers": servers,
            "group.id": GROUP,
            "session.timeout.ms": 1500,
            "heartbeat.interval.ms": 300,
            "fetch.wait.max.ms": 20,
            "log_level": 0,
        },
        [TOPIC],
        handle,
        types={Order.__message_type__: Order},
        inbox=kbatch.SqliteInbox(path),
        concurrency=4,
        batch_size=_BATCH,
    )
    signal.signal(signal.SIGTERM, lambda *_: listener.stop())
    print("begins", flush=True)
    listener.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
