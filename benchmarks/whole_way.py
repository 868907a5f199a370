"""Orders on their whole way: from an application's transactions through its outbox, a relay, Kafka and a listener into
the database of another application, and the same with a relay that awaits each message.

Relay, listener and brokers are processes of their own. This one is the application: it writes a row for each order into
a table of its own, in the transaction that adds the order's envelope. In SQLite each application has a file.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import kbatch
from benchmarks.awaiting import relay_each
from benchmarks.broker import Broker, OpenBroker
from benchmarks.data import OrderPlaced, kbatch_envelopes
from benchmarks.database import Database, New, databases
from benchmarks.figures import Section, figure
from benchmarks.listener_process import Handled
from benchmarks.listener_process import Options as ListenerOptions
from benchmarks.relay_process import Count
from benchmarks.relay_process import Options as RelayOptions
from benchmarks.worker import Worker

ORDERS = 100_000
AWAITED = 2_000  # with the relay that awaits each message
FIRST = 1_000  # before the clock starts: all are connected then
TRANSACTION = 100  # orders
PARTITIONS = 32
ROUND_TRIPS_MS = (0, 1)
LOOK_EVERY_S = 0.002
PATIENCE_S = 120.0

Envelopes = list["kbatch.Envelope[OrderPlaced]"]


def whole_ways(turns: int, open_broker: OpenBroker) -> Iterator[Section]:
    """Both relays in turn, in each database and at each round trip."""
    section = Section(f"{ORDERS:,} orders from transactions through Kafka to invoices, each once", "outbox-whole")
    envelopes = kbatch_envelopes(FIRST + ORDERS)
    rates: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    with databases() as news, open_broker() as broker:
        for rtt_ms in ROUND_TRIPS_MS:
            broker.set_delay(rtt_ms)
            for _ in range(turns):
                for new in news:
                    with _Way(new, broker) as way:
                        rate = way.rate(envelopes)
                    with _Way(new, broker) as way:
                        slow = way.rate_of_each(envelopes[: FIRST + AWAITED])
                    name = f"{new().name}, round trip {rtt_ms} ms" if rtt_ms else new().name
                    rates.setdefault(f"{name}: kbatch", []).append(rate)
                    rates.setdefault(f"{name}: relay that awaits each message", []).append(slow)
                    ratios.setdefault(name, []).append(rate / slow)
    section.settings["ways"] = list(rates)
    section.figures += [figure(f"{name}, orders/s", found, digits=0) for name, found in rates.items()]
    section.figures += [
        figure(f"{name}: kbatch / relay that awaits each message", found, digits=1) for name, found in ratios.items()
    ]
    section.notes.append(
        f"{AWAITED:,} orders with the relay that awaits each message; {TRANSACTION} orders in a transaction"
    )
    yield section


class _Way:
    """Two databases, a topic between them, and a listener."""

    def __init__(self, new: New, broker: Broker) -> None:
        self._broker = broker
        self._topic = broker.new_topic("orders", PARTITIONS)
        self._shop, self._billing = new(), new()
        self._outbox = self._shop.outbox()
        self._outbox.create()
        self._billing.inbox().create()
        self._stack = ExitStack()
        self._application = self._connection(self._shop, "orders (id text PRIMARY KEY, customer text, cents integer)")
        self._looking = self._connection(
            self._billing, f"invoices (place {self._billing.numbered}, order_id text, customer text, cents integer)"
        )

    def _connection(self, database: Database, table: str) -> Any:
        connection = self._stack.enter_context(closing(database.connect()))
        connection.execute(f"CREATE TABLE {database.prefix}{table}")
        return connection

    def __enter__(self) -> "_Way":
        options = ListenerOptions(self._billing, self._broker.bootstrap_servers, self._topic)
        self._listener = self._stack.enter_context(Worker("benchmarks.listener_process", options))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def rate(self, envelopes: Envelopes) -> float:
        """Orders a second, from the first transaction until the last invoice is committed."""
        options = RelayOptions(self._shop, self._broker.bootstrap_servers)
        with Worker("benchmarks.relay_process", options) as relay:
            self._add(envelopes[:FIRST])
            self._await_invoices(FIRST)
            began = time.perf_counter()
            self._add(envelopes[FIRST:])
            self._await_invoices(len(envelopes))
            spent = time.perf_counter() - began
            self._await(lambda: relay.ask(Count).acked == len(envelopes))
        self._check(envelopes)
        return (len(envelopes) - FIRST) / spent

    def rate_of_each(self, envelopes: Envelopes) -> float:
        """The same with a relay of this process that awaits each message, once all are added."""
        messages = {envelope.id: envelope for envelope in envelopes}
        with kbatch.Producer({"bootstrap.servers": self._broker.bootstrap_servers}) as producer:
            self._add(envelopes[:FIRST])
            relay_each(self._shop, producer, self._topic, messages)
            self._await_invoices(FIRST)
            began = time.perf_counter()
            self._add(envelopes[FIRST:])
            relay_each(self._shop, producer, self._topic, messages)
            self._await_invoices(len(envelopes))
            spent = time.perf_counter() - began
        self._check(envelopes)
        return (len(envelopes) - FIRST) / spent

    def _add(self, envelopes: Envelopes) -> None:
        connection, database = self._application, self._shop
        insert = f"INSERT INTO {database.prefix}orders VALUES ({', '.join(3 * [database.mark])})"
        with closing(connection.cursor()) as cursor:
            for at in range(0, len(envelopes), TRANSACTION):
                some = envelopes[at : at + TRANSACTION]
                cursor.execute(database.begin)
                cursor.executemany(insert, [_row(envelope) for envelope in some])
                self._outbox.add(connection, some, topic=self._topic)
                cursor.execute("COMMIT")

    def _await_invoices(self, number: int) -> None:
        self._await(lambda: self._listener.ask(Handled).number >= number)

    def _await(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not done():
            if time.monotonic() > end:
                raise RuntimeError(f"after {PATIENCE_S:.0f} s {self._listener.ask(Handled).number} are handled")
            time.sleep(LOOK_EVERY_S)

    def _check(self, envelopes: Envelopes) -> None:
        """Each order has one invoice, and those of a customer came in their order."""
        invoices = self._looking.execute(
            f"SELECT order_id, customer, cents FROM {self._billing.prefix}invoices ORDER BY place"
        ).fetchall()
        if sorted(invoices) != [_row(envelope) for envelope in envelopes]:
            raise RuntimeError(f"{len(invoices)} invoices are not those of {len(envelopes)} orders")
        last: dict[str, str] = {}
        for order, customer, _ in invoices:
            if last.setdefault(customer, order) > order:
                raise RuntimeError(f"{order} came after a later one of the same customer")
            last[customer] = order


def _row(envelope: "kbatch.Envelope[OrderPlaced]") -> tuple[str, str, int]:
    order = envelope.message
    assert isinstance(order, OrderPlaced)
    return order.order_id, order.customer_id, order.total_cents
