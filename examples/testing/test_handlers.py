import msgspec

import kbatch
from kbatch.testing import MemoryListener


class Order(msgspec.Struct):
    id: int
    amount: int


def handle(envelope):
    if envelope.message.amount < 0:
        raise ValueError("nobody pays this")


def test_a_bad_order_is_a_dead_letter_and_takes_no_others_with_it():
    listener = MemoryListener(handle, types={"order": Order}, retry_topics=[5], dead_letter_topic="billing.dead")
    orders = [Order(1, 40), Order(2, -1), Order(3, 20)]
    outcomes = listener.send(*(kbatch.Envelope(each, key=str(each.id), message_type="order") for each in orders))
    assert [each.outcome for each in outcomes] == ["handled", "dead", "handled"]
    assert outcomes[1].topics == ["test", "test", "test", "test.retry.5"]  # three attempts in place, one after 5 s
    (letter,) = listener.dead_letters
    assert ("exception-message", b"nobody pays this") in letter.headers()
