"""Senders and topics, as a user types them."""

from typing_extensions import assert_type

import kbatch
from kbatch import aio


def blocking(producer: kbatch.Producer, settings: dict[str, str | int]) -> None:
    with kbatch.InlineSender(producer, "orders") as sender:
        assert_type(sender, kbatch.InlineSender)
        assert_type(sender.send(kbatch.Envelope(1), timeout=5), kbatch.DeliveryReport)
        assert_type(sender.close(1.5), int)
    topic = kbatch.KafkaTopic("orders", kbatch.SenderMode.BUFFERED, config={**settings, "linger.ms": 5}, wire="raw")
    assert_type(topic.create_sender(), kbatch.BatchedSender)
    assert_type(topic.batch_size, int | None)
    with topic.create_sender() as made:
        made.send(kbatch.Envelope(1))
        assert_type(made.flush(5), int)
    assert_type(kbatch.KafkaTopic("orders", mode=kbatch.SenderMode.INLINE, producer=producer).name, str)
    kbatch.KafkaTopic("orders", mode="inline", producer=producer)  # type: ignore[call-overload]
    kbatch.KafkaTopic("orders", kbatch.SenderMode.INLINE, producer=settings)  # type: ignore[call-overload]
    kbatch.KafkaTopic("orders", kbatch.SenderMode.INLINE, producer=producer, config=settings)  # type: ignore[call-overload]
    kbatch.KafkaTopic("orders", kbatch.SenderMode.INLINE, producer=producer, wire="raw")  # type: ignore[call-overload]
    kbatch.KafkaTopic("orders", kbatch.SenderMode.INLINE)  # type: ignore[call-overload]
    kbatch.InlineSender(7, "orders")  # type: ignore[arg-type]
    agent = kbatch.SendingAgent(producer, "orders", strict_order=True, retry=None)
    kbatch.SendingAgent(producer, "orders", strict_order=None)  # type: ignore[arg-type]
    kbatch.SendingAgent(producer, "orders", colour="red")  # type: ignore[call-arg]
    assert_type(kbatch.BatchedSender(agent, batch_size=10, close_timeout_s=5).close(), int)
    kbatch.BatchedSender(agent, batch_size="10")  # type: ignore[arg-type]
    with_default = kbatch.KafkaTopic("orders", kbatch.SenderMode.BUFFERED, producer=producer, strict_order=None)
    assert_type(with_default.strict_order, bool | None)


async def on_a_loop(producer: aio.Producer, blocking: kbatch.Producer) -> None:
    async with aio.InlineSender(producer, None) as sender:
        assert_type(await sender.send(kbatch.Envelope(1)), kbatch.DeliveryReport)
        assert_type(await sender.close(), int)
    topic = aio.KafkaTopic("orders", mode=kbatch.SenderMode.INLINE, producer=producer)
    assert_type(topic.create_sender(), aio.InlineSender)
    async with topic.create_sender() as made:
        await made.send(kbatch.Envelope(1))
    aio.InlineSender(blocking, "orders")  # type: ignore[arg-type]
