import json

import kbatch
from kbatch.testing import MemoryProducer


class Account:
    """The receiver: what comes twice has the same id."""

    def __init__(self):
        self.balance = 0
        self.seen = set()  # in a database: in the transaction that books

    def receive(self, record):
        envelope = kbatch.read_envelope(record)
        if envelope.id not in self.seen:
            self.seen.add(envelope.id)
            self.balance += json.loads(envelope.data)["amount"]


def test_a_payment_that_comes_twice_is_booked_once():
    producer = MemoryProducer()
    producer.fail("REQUEST_TIMED_OUT", possibly_persisted=True)  # it is stored, and the answer is lost
    payments = kbatch.KafkaTopic("payments", kbatch.SenderMode.BUFFERED, producer=producer)
    with payments.create_sender() as sender:
        sender.send(kbatch.Envelope({"amount": 40}))  # the sender sends it again
        assert sender.flush() == 0
    assert len(producer.records) == 2

    account = Account()
    for record in producer.records:
        account.receive(record)
    assert account.balance == 40
