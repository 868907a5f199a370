"""A listener in a process of its own: `python -m benchmarks.listener_process OPTIONS`, as JSON.

Its handler writes an invoice for each order, in the transaction in which an inbox marks the order's id. For each line
of standard input it says how many were handled, which is counted after the commit. At the end of its input it stops.
"""

import sys
import threading
from contextlib import closing
from typing import Any

import msgspec

import kbatch
from benchmarks.data import MESSAGE_TYPE, OrderPlaced
from benchmarks.database import Database
from benchmarks.sides.base import say

HANDLERS = 4
BATCH = 500


class Options(msgspec.Struct, frozen=True):
    database: Database
    bootstrap_servers: str
    topic: str


class Handled(msgspec.Struct, frozen=True):
    number: int


def main() -> None:
    options = msgspec.json.decode(sys.argv[1], type=Options)
    database = options.database
    insert = (
        f"INSERT INTO {database.prefix}invoices (order_id, customer, cents) VALUES ({', '.join(3 * [database.mark])})"
    )

    def handle(envelopes: list["kbatch.ReceivedEnvelope[OrderPlaced]"], connection: Any) -> None:
        orders = [envelope.message for envelope in envelopes]
        with closing(connection.cursor()) as cursor:
            cursor.executemany(insert, [(order.order_id, order.customer_id, order.total_cents) for order in orders])

    config = {
        "bootstrap.servers": options.bootstrap_servers,
        "group.id": f"billing-{options.topic}",
        "fetch.wait.max.ms": 10,
    }
    listener = kbatch.Listener(
        config,
        [options.topic],
        handle,
        types={MESSAGE_TYPE: OrderPlaced},
        inbox=database.inbox(),
        concurrency=HANDLERS,
        batch_size=BATCH,
    )
    thread = threading.Thread(target=listener.run)
    thread.start()
    try:
        for _ in sys.stdin:
            say(Handled(listener.stats()["handled"]))
    finally:
        listener.stop()
        thread.join()


if __name__ == "__main__":
    main()
