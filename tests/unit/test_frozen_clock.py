"""Tests of others freeze `time` and `datetime`: what kbatch waits for must come all the same."""

import asyncio
import re
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import freezegun
import pytest

import kbatch
from kbatch import Envelope
from kbatch.testing import MemoryProducer
from kbatch.testing.aio import MemoryProducer as AioMemoryProducer

PACKAGE = Path(kbatch.__file__).parent
LONG_AGO = datetime(2020, 1, 1, tzinfo=timezone.utc)


@pytest.fixture(autouse=True)
def frozen(request: pytest.FixtureRequest) -> Any:
    if request.function is test_nothing_asks_a_clock_that_a_test_may_stop:
        yield None  # freezing looks through all modules
        return
    with freezegun.freeze_time(LONG_AGO, real_asyncio=getattr(request, "param", False)) as clock:
        yield clock


def test_a_sender_tries_again_while_the_clock_stands_still() -> None:
    failures = [RuntimeError("once"), RuntimeError("twice")]

    def header_hook() -> dict[str, str]:
        if failures:
            raise failures.pop()
        return {}

    producer = MemoryProducer(header_hook=header_hook)
    topic = kbatch.KafkaTopic("orders", mode=kbatch.SenderMode.BUFFERED, producer=producer)
    with topic.create_sender() as sender:
        sender.send(Envelope(1))
        assert sender.flush() == 0
    assert len(producer.records) == 1


def test_waits_end_while_the_clock_stands_still() -> None:
    with MemoryProducer({"delivery.timeout.ms": 50}, close_timeout_s=0) as producer:
        producer.hold()
        pending = producer.submit("orders", [Envelope(1)])
        with pytest.raises(kbatch.BatchPendingError):
            pending.wait(0.01)
        assert producer.flush(0.01) == 1
        assert pending.wait().failed == 1
        pending = producer.submit("orders", [Envelope(2)])
        assert producer._close(0.01) == 1
        assert pending.wait().failed == 1


def test_times_are_the_machines() -> None:
    # Both clocks: what `deliver_by` and `scheduled_time` are compared with, and what `sent-at` tells.
    with MemoryProducer() as producer:
        report = producer.send_batch(
            "orders", [Envelope(1, deliver_by=datetime.now(timezone.utc) + timedelta(hours=1))]
        )
        assert report.expired_indices == (0,)
        not_yet = datetime.now(timezone.utc) + timedelta(hours=1)  # but long ago
        assert producer.send_batch("orders", [Envelope(1, scheduled_time=not_yet)]).ok
        producer.clear()
        producer.send_batch("orders", [Envelope(2), Envelope(3, sent_at=datetime.now(timezone.utc))])
        first, second = (kbatch.read_envelope(record).sent_at for record in producer.records)
    assert first is not None
    assert first > LONG_AGO + timedelta(days=365)
    assert second == LONG_AGO


@pytest.mark.parametrize(("frozen", "real_asyncio"), [(False, False), (True, True)], indirect=["frozen"])
def test_a_time_out_on_a_loop_stands_still_unless_freezegun_leaves_asyncio_its_clock(real_asyncio: bool) -> None:
    async def main() -> None:
        async with AioMemoryProducer() as producer:
            producer.hold()
            # It is handed over long before, else all of it is told as failed: that bound is by kbatch's own clock.
            sending = asyncio.create_task(producer.send_batch("orders", [Envelope(1)], timeout=1.0))
            if real_asyncio:
                with pytest.raises(kbatch.BatchPendingError):
                    await sending
                producer.release()
            else:
                await asyncio.to_thread(time.sleep, 1.5)
                assert not sending.done()
                producer.release()
                assert (await sending).ok

    asyncio.run(main())


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_asks_a_clock_that_a_test_may_stop(path: Path) -> None:
    if path.name in ("_demo.py", "_produce.py", "_orders.py"):
        return  # how long it took, for the summary; the demo's data
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"\btime\.(?:monotonic|time|perf_counter)\w*\(|\bdatetime\.(?:utc)?now\(", text) == []
