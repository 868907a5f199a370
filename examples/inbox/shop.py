"""A shop commits orders and their messages together, and a relay sends them: `python shop.py BOOTSTRAP COUNT`."""

import sqlite3
import sys

import msgspec

import kbatch


class Order(msgspec.Struct):
    number: int
    customer: str
    total_cents: int


def main(bootstrap_servers: str, count: int) -> None:
    outbox = kbatch.SqliteOutbox("shop.db")
    outbox.create()
    db = sqlite3.connect("shop.db")
    db.execute("CREATE TABLE IF NOT EXISTS orders (number INTEGER PRIMARY KEY, customer TEXT, total_cents INTEGER)")
    for number in range(count):
        order = Order(number, f"customer-{number % 100}", 100 + number)
        with db:  # one transaction
            db.execute("INSERT INTO orders VALUES (?, ?, ?)", (order.number, order.customer, order.total_cents))
            outbox.add(db, [kbatch.Envelope(order, key=order.customer, message_type="order.placed", topic="orders")])
    db.close()
    with kbatch.Relay(outbox, {"bootstrap.servers": bootstrap_servers}) as relay:
        relay.drain()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
