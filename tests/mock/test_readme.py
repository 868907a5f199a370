"""The code of README.md runs as it stands there."""

import ast
import asyncio
import inspect
import re
import threading
import types
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroSerializer

import kbatch
from kbatch.testing import MockCluster
from tests import outboxes
from tests.relays import numbered

from .clients import end_offsets

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SHOP = "postgresql://localhost/shop"
# What `import kbatch` gives: the modules of the package that a sample needs besides, it imports itself.
IMPORTED = types.SimpleNamespace(**{name: getattr(kbatch, name) for name in kbatch.__all__})
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


class Order(NamedTuple):
    id: int


def place_order(somewhere: Any) -> None:
    """By a producer or by a sender."""
    envelope = kbatch.Envelope(Order(1), key="order-1")
    if isinstance(somewhere, kbatch.Producer):
        somewhere.send_batch("orders", [envelope])
    else:
        somewhere.send(envelope)


@pytest.fixture
def shop(postgres: str) -> Iterator[str]:
    """The conninfo of a database in PostgreSQL."""
    import psycopg

    name = f"shop_{uuid.uuid4().hex}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        yield psycopg.conninfo.make_conninfo(postgres, dbname=name)
        connection.execute(f"DROP DATABASE {name}")


def test_there_is_code() -> None:
    assert len(BLOCKS) >= 10


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_runs(
    block: str,
    kafka_cluster: MockCluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.chdir(tmp_path)
    if SHOP in block:
        block = block.replace(SHOP, request.getfixturevalue("shop"))
    kafka_cluster.create_topic("orders", partitions=1)
    servers = kafka_cluster.bootstrap_servers
    orders = [Order(n) for n in range(10)]
    told: list[kbatch.DeliveryReport] = []
    outbox = outboxes.made(tmp_path, "dead.db")
    outboxes.add(outbox, numbered(range(3)))
    outboxes.move_to_dead(outbox, "seq < 3")
    with kbatch.Producer({"bootstrap.servers": servers}) as producer:
        names: dict[str, Any] = {
            "kbatch": IMPORTED,
            "producer": producer,
            "outbox": outbox,
            "Order": Order,
            "stop_soon": lambda listener: threading.Timer(1.0, listener.stop).start(),
            "order": orders[0],
            "orders": orders,
            "envelopes": [kbatch.Envelope(order, key=str(order.id)) for order in orders],
            "on_report": told.append,
            "place_order": place_order,
            "AvroSerializer": AvroSerializer,
            "registry": SchemaRegistryClient.new_client({"url": "mock://"}),
            "schema": '"long"',
        }
        text = block.replace("localhost:9092", servers)
        text = text.replace("listener.run()", "stop_soon(listener); listener.run()")
        code = compile(text, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        if code.co_flags & inspect.CO_COROUTINE:
            asyncio.run(eval(code, names))
        else:
            exec(code, names)
        for name in re.findall(r"^def (test_\w+)\(kafka_cluster\)", block, re.MULTILINE):
            names[name](kafka_cluster)
    assert [report.acked for report in told] == [10] * block.count("callback=on_report")
    if ".send" in block and "kbatch.testing" not in block:
        assert end_offsets(servers, "orders")[0] > 0
