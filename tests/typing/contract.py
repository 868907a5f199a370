"""The batch callback contract, implemented on both of its sides."""

from typing import Any

from typing_extensions import assert_type

import kbatch


class Recorder(kbatch.SenderCallback):
    """Overrides what it needs."""

    def __init__(self) -> None:
        self.lost: list[kbatch.Envelope[Any]] = []

    def mark_successful(self, batch: kbatch.OutgoingBatch, report: kbatch.DeliveryReport) -> None:
        assert_type(batch.envelopes, tuple[kbatch.Envelope[Any], ...])

    def mark_processing_failure(self, batch: kbatch.OutgoingBatch, error: kbatch.KbatchError) -> None:
        assert error.report is not None
        self.lost += [batch.envelopes[index] for index in error.report.errors]


class OpenCircuit:
    """A sender of the user's own; `SenderProtocol` without inheriting from it."""

    def send_batch(self, callback: kbatch.SenderCallback, batch: kbatch.OutgoingBatch) -> None:
        callback.mark_circuit_open(batch, kbatch.KbatchError("the circuit is open"))


class NoSender:
    def send_batch(self, batch: kbatch.OutgoingBatch) -> None: ...


class WrongCallback(kbatch.SenderCallback):
    def mark_successful(self, batch: kbatch.OutgoingBatch) -> None: ...  # type: ignore[override]


def send(sender: kbatch.SenderProtocol, envelopes: list[kbatch.Envelope[int]]) -> None:
    batch = kbatch.OutgoingBatch(envelopes)
    assert_type(len(batch), int)
    for envelope in batch:
        assert_type(envelope, kbatch.Envelope[Any])
    sender.send_batch(Recorder(), batch)


def main(producer: kbatch.Producer) -> None:
    send(kbatch.KafkaSender(producer, "orders"), [kbatch.Envelope(1)])
    send(kbatch.KafkaSender(producer, None), [kbatch.Envelope(1, topic="t")])
    send(OpenCircuit(), [])
    send(NoSender(), [])  # type: ignore[arg-type]
    kbatch.KafkaSender(producer, "orders").send_batch(Recorder(), [])  # type: ignore[arg-type]
