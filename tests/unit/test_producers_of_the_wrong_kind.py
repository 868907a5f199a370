"""A producer of the other kind, or none at all, is refused where it is given."""

from typing import Any

import pytest

import kbatch
from kbatch import aio
from kbatch.testing import MemoryProducer
from kbatch.testing.aio import MemoryProducer as AioMemoryProducer

NONE = [None, "orders", {"bootstrap.servers": "127.0.0.1:1"}, kbatch.Producer, object()]
SENDERS = ["KafkaSender", "SendingAgent", "InlineSender"]


@pytest.mark.parametrize("name", SENDERS)
@pytest.mark.parametrize(("module", "other"), [(kbatch, aio), (aio, kbatch)], ids=["threads", "asyncio"])
def test_a_producer_of_the_other_kind_is_refused(module: Any, other: Any, name: str) -> None:
    wrong = (MemoryProducer if module is aio else AioMemoryProducer)()
    error = TypeError if name == "KafkaSender" else kbatch.ConfigError
    for given in (other.Producer({"bootstrap.servers": "127.0.0.1:1"}), wrong):
        with pytest.raises(error, match=rf"producer must be a {module.Producer._shown}, not {given._shown}"):
            getattr(module, name)(given, "orders")


@pytest.mark.parametrize("wrong", NONE, ids=lambda wrong: type(wrong).__name__)
@pytest.mark.parametrize("name", SENDERS)
@pytest.mark.parametrize("module", [kbatch, aio], ids=["threads", "asyncio"])
def test_what_is_no_producer_is_refused(module: Any, name: str, wrong: Any) -> None:
    error = TypeError if name == "KafkaSender" else kbatch.ConfigError
    with pytest.raises(error, match="producer must be a "):
        getattr(module, name)(wrong, "orders")


@pytest.mark.parametrize(("module", "other"), [(kbatch, aio), (aio, kbatch)], ids=["threads", "asyncio"])
def test_an_agent_of_the_other_kind_is_refused(module: Any, other: Any) -> None:
    producer = (MemoryProducer if other is kbatch else AioMemoryProducer)()
    for wrong in (other.SendingAgent(producer, "orders"), producer, None):
        with pytest.raises(kbatch.ConfigError, match=r"agent must be a "):
            module.BatchedSender(wrong)
