"""What on_failed may do with its own sender."""

import asyncio
from typing import Any

import pytest

import kbatch
from kbatch import Envelope, aio
from kbatch.testing import AioMemoryProducer, MemoryProducer

UNMAPPABLE = object()


@pytest.mark.parametrize("method", ["flush", "drain", "close"])
def test_it_must_not_wait_for_itself(method: str) -> None:
    errors: list[BaseException] = []

    def on_failed(envelope: Envelope[Any], error: kbatch.KbatchError) -> None:
        try:
            getattr(sender, method)()
        except kbatch.SenderError as refusal:
            errors.append(refusal)

    with kbatch.BatchedSender(kbatch.SendingAgent(MemoryProducer(), "orders", on_failed=on_failed)) as sender:
        sender.send(Envelope(UNMAPPABLE))
        assert sender.flush(30) == 0
        assert "use another thread" in str(errors[0])
        sender.send(Envelope(1))


def test_it_may_send() -> None:
    producer = MemoryProducer()

    def on_failed(envelope: Envelope[Any], error: kbatch.KbatchError) -> None:
        sender.send(envelope.replace(message="instead"))

    with kbatch.BatchedSender(kbatch.SendingAgent(producer, "orders", on_failed=on_failed)) as sender:
        sender.send(Envelope(UNMAPPABLE))
        assert sender.flush(30) == 0
        assert sender.flush(30) == 0  # what was sent before the first has ended
        assert [envelope.message for envelope in producer.envelopes] == ["instead"]


@pytest.mark.parametrize("method", ["flush", "drain", "close"])
def test_a_coroutine_must_not_wait_for_itself_but_its_tasks_may(method: str) -> None:
    async def main() -> None:
        errors: list[BaseException] = []
        tasks: list[asyncio.Task[int]] = []

        async def on_failed(envelope: Envelope[Any], error: kbatch.KbatchError) -> None:
            try:
                await getattr(sender, method)()
            except kbatch.SenderError as refusal:
                errors.append(refusal)
            tasks.append(asyncio.get_running_loop().create_task(getattr(sender, method)()))

        sender = aio.BatchedSender(aio.SendingAgent(AioMemoryProducer(), "orders", on_failed=on_failed))
        await sender.send(Envelope(UNMAPPABLE))
        assert await sender.flush(30) == 0
        assert "use another thread or task" in str(errors[0])
        assert await tasks[0] == 0
        await sender.close()

    asyncio.run(main())
