import kbatch
from kbatch.testing import MemoryProducer


def test_an_outage_that_ends_costs_nothing():
    producer = MemoryProducer()
    producer.down()
    pending = producer.submit("orders", [kbatch.Envelope({"id": 1})])
    assert not pending.done()
    producer.up()
    assert pending.wait().ok
    assert len(producer.records) == 1


def test_an_outage_longer_than_delivery_timeout_ms():
    producer = MemoryProducer()
    producer.down(timeout=0)  # the time-out comes at once
    report = producer.send_batch("orders", [kbatch.Envelope({"id": 1})])
    assert isinstance(report.exception(), kbatch.BatchTimeoutError)
    producer.up()
    assert producer.send_batch("orders", [kbatch.Envelope({"id": 1})]).ok
