"""Exit and signals: what was submitted is sent and answered, nothing hangs, nothing stays pinned."""

import pytest

from kbatch.testing import MockCluster

from .clients import read
from .processes import run


@pytest.fixture
def dark_cluster(kafka_cluster: MockCluster) -> MockCluster:
    """A cluster whose only broker is down: what is sent stays in flight."""
    kafka_cluster.create_topic("orders", partitions=1)
    kafka_cluster.set_broker_down(1)
    return kafka_cluster


# -- exit


def test_the_interpreter_exits_with_batches_in_flight(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    result = run(
        kafka_cluster,
        """
        producer = kbatch.Producer(CONFIG)
        for _ in range(20):
            producer.submit("orders", envelopes(100), callback=lambda report: print(report.acked))
        """,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split() == ["100"] * 20
    (records,) = read(kafka_cluster.bootstrap_servers, "orders", 2_000).values()
    assert len(records) == 2_000


@pytest.mark.parametrize("end", ["os._exit(7)", "sys.exit(7)"])
def test_exit_in_a_daemon_thread_world(dark_cluster: MockCluster, end: str) -> None:
    result = run(
        dark_cluster,
        f"""
        producer = kbatch.Producer(CONFIG)
        producer.submit("orders", envelopes(100))
        threading.Thread(target=lambda: producer.send_batch("orders", envelopes(10)), daemon=True).start()
        time.sleep(0.2)
        {end}
        """,
    )
    assert (result.returncode, result.stderr) == (7, "")


def test_a_forgotten_producer_answers_before_the_interpreter_ends(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    result = run(
        kafka_cluster,
        """
        def job():
            kbatch.Producer(CONFIG).submit("orders", envelopes(100), callback=lambda report: print(report.acked))
        job()
        """,
    )
    assert (result.returncode, result.stderr, result.stdout.split()) == (0, "", ["100"])


# -- signals


def test_a_signal_handler_may_close_the_producer(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    kafka_cluster.set_rtt(1, 1_500)
    result = run(
        kafka_cluster,
        """
        producer = kbatch.Producer(CONFIG)
        signal.signal(signal.SIGINT, lambda *_: print("left", producer.close(60), flush=True))
        print("waiting", flush=True)
        print("acked", producer.send_batch("orders", envelopes(10)).acked)
        """,
        interrupt_at="waiting",
    )
    assert result.stdout.split("\n")[:2] == ["left 0", "acked 10"], result.stderr


@pytest.mark.parametrize(("limit", "count", "in_flight"), [(100_000, 10, 10), (50, 200, 50)])
def test_ctrl_c_while_waiting_or_enqueueing(dark_cluster: MockCluster, limit: int, count: int, in_flight: int) -> None:
    result = run(
        dark_cluster,
        f"""
        producer = kbatch.Producer({{**CONFIG, "queue.buffering.max.messages": {limit}}})
        print("waiting", flush=True)
        try:
            producer.send_batch("orders", envelopes({count}))
        except KeyboardInterrupt:
            print("interrupted", len(producer), producer.close(0.1), pinned_buffers())
        """,
        interrupt_at="waiting",
    )
    assert result.stdout.strip() == f"interrupted {in_flight} {in_flight} 0", result.stderr


def test_ctrl_c_in_phase_1_sends_nothing(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    result = run(
        kafka_cluster,
        """
        producer = kbatch.Producer(CONFIG, encoder=lambda message, context: time.sleep(0.02) or b"x")
        print("waiting", flush=True)
        try:
            producer.send_batch("orders", [kbatch.Envelope(1) for _ in range(1000)])
        except KeyboardInterrupt:
            print("interrupted", producer.stats()["batches"], pinned_buffers())
        """,
        interrupt_at="waiting",
    )
    assert result.stdout.strip() == "interrupted 0 0", result.stderr


def test_ctrl_c_in_a_sender_still_answers_once(dark_cluster: MockCluster) -> None:
    result = run(
        dark_cluster,
        """
        class Callback(kbatch.SenderCallback):
            def mark_processing_failure(self, batch, error):
                print("answer", len(batch), error.report.failed, threading.current_thread().name, flush=True)
        producer = kbatch.Producer(CONFIG)
        print("waiting", flush=True)
        try:
            kbatch.KafkaSender(producer, "orders").send_batch(Callback(), kbatch.OutgoingBatch(envelopes(10)))
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        producer.close(0.1)
        """,
        interrupt_at="waiting",
    )
    assert result.stdout.split("\n")[:2] == ["interrupted", "answer 10 10 kbatch-callbacks"], result.stderr
    assert result.returncode == 0
