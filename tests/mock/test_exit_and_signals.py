"""Exit and signals: what was submitted is sent and answered, nothing hangs, nothing stays pinned."""

import re
import signal
import time

import pytest

from kbatch.testing import MockCluster

from .clients import read_back
from .processes import run, start


@pytest.fixture
def dark_cluster(kafka_cluster: MockCluster) -> MockCluster:
    """A cluster whose only broker is down: what is sent stays in flight."""
    kafka_cluster.create_topic("orders", partitions=1)
    kafka_cluster.set_broker_down(1)
    return kafka_cluster


# -- exit


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
    is_silent = end.startswith("os")
    # The thread may have its report by then.
    told = r"nobody was told: 1[01]0 messages were not acknowledged; the first: Local: Purged in queue .*\n"
    assert result.returncode == 7
    assert re.fullmatch("" if is_silent else told, result.stderr)


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


ENDS = {
    "main returns": (0, ""),
    "sys.exit": (7, "sys.exit(7)"),
    "an exception": (1, "raise ZeroDivisionError"),
    "os._exit": (7, "os._exit(7)"),
    "a callback runs": (0, "running.wait()"),
}


@pytest.mark.parametrize("end", ["main returns", "sys.exit", "an exception"])
def test_what_is_in_flight_is_sent_before_the_interpreter_ends(kafka_cluster: MockCluster, end: str) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    kafka_cluster.set_rtt(1, 50)
    status, code = ENDS[end]
    result = run(
        kafka_cluster,
        f"""
        producer = kbatch.Producer(CONFIG)
        for _ in range(10):
            producer.submit("orders", envelopes(100), callback=lambda report: print(report.acked))
        {code}
        """,
    )
    assert (result.returncode, result.stdout.split()) == (status, ["100"] * 10), result.stderr
    assert ("ZeroDivisionError" in result.stderr) == (end == "an exception")
    assert [record.value for record in read_back(kafka_cluster.bootstrap_servers, "orders")] == [
        b"m%d" % i for _ in range(10) for i in range(100)
    ]


# What daemon threads do while the interpreter ends under them.
LOOPS = {
    "send_batch": 'producer.send_batch("orders", envelopes(10))',
    "submit": 'producer.submit("orders", envelopes(10), callback=lambda report: None)',
    "sender": 'kbatch.KafkaSender(producer, "orders").send_batch(Quiet(), kbatch.OutgoingBatch(envelopes(10)))',
    "await": 'asyncio.run(wait_for(producer.submit("orders", envelopes(10))))',
    "flush": "producer.flush()",
    "wait": 'producer.submit("orders", envelopes(10)).wait(0.001)',
    "new producers": "new()",
}


@pytest.mark.parametrize("end", ["main returns", "sys.exit", "os._exit"])
@pytest.mark.parametrize("work", LOOPS)
def test_daemon_threads_go_on_while_the_interpreter_ends(kafka_cluster: MockCluster, work: str, end: str) -> None:
    kafka_cluster.create_topic("orders", partitions=4)
    status, code = ENDS[end]
    result = run(
        kafka_cluster,
        f"""
        class Quiet(kbatch.SenderCallback):
            def mark_processing_failure(self, batch, error):
                pass
        async def wait_for(pending):
            return await pending
        producer = kbatch.Producer(CONFIG, max_in_flight=1000)
        def new():
            with kbatch.Producer(CONFIG, close_timeout_s=0) as own:
                own.submit("orders", envelopes(10))
        turns = []
        def loop():
            while True:
                try:
                    {LOOPS[work]}
                except (kbatch.KbatchError, RuntimeError):  # closed at exit; no thread to be had then
                    pass
                turns.append(1)
        producer.send_batch("orders", envelopes(1)).raise_for_errors()
        for _ in range(4):
            threading.Thread(target=loop, daemon=True).start()
        while len(turns) < 20:
            time.sleep(0.001)
        print("end", flush=True)
        {code}
        """,
    )
    assert (result.returncode, result.stdout) == (status, "end\n"), result.stderr
    assert "Fatal" not in result.stderr, result.stderr


def test_exit_while_a_callback_runs(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    result = run(
        kafka_cluster,
        """
        producer = kbatch.Producer(CONFIG)
        running = threading.Event()
        def slow(report):
            running.set()
            time.sleep(0.5)
            print("slow", report.acked)
            producer.submit("orders", envelopes(2), callback=lambda report: print("too late", report.acked))
        producer.submit("orders", envelopes(3), callback=slow)
        producer.submit("orders", envelopes(4), callback=lambda report: print("next", report.acked))
        running.wait()
        """,
    )
    assert (result.returncode, result.stdout) == (0, "slow 3\nnext 4\n"), result.stderr
    assert "ProducerClosedError" in result.stderr  # what the slow one tried is refused, and logged
    assert len(read_back(kafka_cluster.bootstrap_servers, "orders")) == 7


def test_exit_does_not_wait_for_a_callback_that_never_ends(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    result = run(
        kafka_cluster,
        """
        producer = kbatch.Producer(CONFIG)
        running = threading.Event()
        def endless(report):
            running.set()
            while True:
                time.sleep(0.01)
        producer.submit("orders", envelopes(3), callback=endless)
        running.wait()
        print("end", flush=True)
        """,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "end\n", "")


@pytest.mark.parametrize("daemon", [False, True])
def test_exit_while_an_event_loop_awaits(dark_cluster: MockCluster, daemon: bool) -> None:
    result = run(
        dark_cluster,
        f"""
        producer = kbatch.Producer(CONFIG)
        async def main():
            waits = [asyncio.ensure_future(wait_for(producer.submit("orders", envelopes(5)))) for _ in range(3)]
            await asyncio.sleep(0.1)
            print("awaiting", flush=True)
            await asyncio.gather(*waits)
        async def wait_for(pending):
            return await pending
        if {daemon}:
            threading.Thread(target=asyncio.run, args=(main(),), daemon=True).start()
            time.sleep(1)
            sys.exit(7)
        else:
            signal.signal(signal.SIGALRM, lambda *_: sys.exit(7))
            signal.setitimer(signal.ITIMER_REAL, 1)
            asyncio.run(main())
        """,
    )
    assert (result.returncode, result.stdout) == (7, "awaiting\n"), result.stderr
    assert "Fatal" not in result.stderr, result.stderr


def test_sigterm_ends_the_process_at_once(dark_cluster: MockCluster) -> None:
    # The library installs no handlers: a program that wants to send what is in flight handles the signal.
    code = """
        producer = kbatch.Producer(CONFIG)
        producer.submit("orders", envelopes(5))
        print("waiting", flush=True)
        producer.send_batch("orders", envelopes(10))
        """
    result = run(dark_cluster, code, interrupt_at="waiting", signal_number=signal.SIGTERM)
    assert (result.returncode, result.stderr) == (-signal.SIGTERM, "")


def test_sigterm_that_ends_the_program_in_order_sends_what_is_in_flight(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    kafka_cluster.set_rtt(1, 200)
    code = """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
        producer = kbatch.Producer(CONFIG)
        producer.submit("orders", envelopes(5), callback=lambda report: print("submitted", report.acked))
        print("waiting", flush=True)
        producer.send_batch("orders", envelopes(10))
        """
    result = run(kafka_cluster, code, interrupt_at="waiting", signal_number=signal.SIGTERM)
    assert (result.returncode, result.stdout) == (3, "submitted 5\n"), result.stderr
    assert len(read_back(kafka_cluster.bootstrap_servers, "orders")) == 15


# -- signals


def test_a_signal_handler_may_close_the_producer(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    kafka_cluster.set_rtt(1, 500)
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


@pytest.mark.parametrize("end", ["close", "flush"])
def test_a_signal_handler_may_wait_for_its_own_batch_in_line(kafka_cluster: MockCluster, end: str) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    kafka_cluster.set_rtt(1, 100)
    result = run(
        kafka_cluster,
        f"""
        producer = kbatch.Producer(CONFIG, max_in_flight=5)
        signal.signal(signal.SIGINT, lambda *_: print("left", producer.{end}(60), flush=True))
        print("waiting", flush=True)
        print("acked", producer.send_batch("orders", envelopes(30)).acked)
        """,
        interrupt_at="waiting",
    )
    assert result.stdout.split("\n")[:2] == ["left 0", "acked 30"], result.stderr


@pytest.mark.parametrize(("limit", "count", "in_flight"), [(100_000, 10, 10), (50, 200, 32)])
def test_ctrl_c_while_waiting_or_enqueueing(dark_cluster: MockCluster, limit: int, count: int, in_flight: int) -> None:
    result = run(
        dark_cluster,
        f"""
        producer = kbatch.Producer({{**CONFIG, "queue.buffering.max.messages": {limit}}})
        print("waiting", flush=True)
        try:
            producer.send_batch("orders", envelopes({count}))
        except KeyboardInterrupt:
            print("interrupted", len(producer), end=" ")
        try:
            producer.close(0.1)
        except kbatch.UndeliveredError as error:  # no report has told
            print("undelivered", error.count, producer.close(), pinned_buffers())
        """,
        interrupt_at="waiting",
    )
    assert result.stdout.strip() == f"interrupted {in_flight} undelivered {count} {in_flight} 0", result.stderr


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


def test_ctrl_c_in_phase_1_of_a_huge_batch_sends_nothing(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    # The native encoder never lets go of the GIL, and runs no Python code that would see the signal.
    result = run(
        kafka_cluster,
        """
        def hook():
            calls.append(1)  # before the signal, which may come while this prints
            if len(calls) == 1:
                print("mapping", flush=True)
        calls = []
        huge = [kbatch.Envelope({"order": 1})] * 3_000_000
        with kbatch.Producer(CONFIG, header_hook=hook) as producer:
            try:
                producer.send_batch("orders", huge)
            except KeyboardInterrupt:
                stats = producer.stats()
                print("interrupted", stats["envelopes"], stats["batches"], pinned_buffers())
            print(producer.send_batch("orders", envelopes(5)).acked)
        """,
        interrupt_at="mapping",
        delay_s=0,
    )
    assert result.stdout == "interrupted 0 0 0\n5\n", result.stderr
    assert len(read_back(kafka_cluster.bootstrap_servers, "orders")) == 5


# Of a batch that is interrupted: what it is made of, and how many of it are on their way then, which come once the
# broker is there.
PHASES = {
    "phase 1": ("[kbatch.Envelope(i) for i in range(1_000)]", 0),
    "phase 2": ("envelopes(200)", 32),
    "waiting": ("envelopes(20)", 20),
}
CALLS = {
    "send_batch": 'producer.send_batch("orders", batch)',
    "submit and wait": 'producer.submit("orders", batch).wait()',
    "submit and flush": 'producer.submit("orders", batch); producer.flush()',
    "submit with a callback": 'producer.submit("orders", batch, callback=answer).wait()',
    "sender": 'kbatch.KafkaSender(producer, "orders").send_batch(Callback(), kbatch.OutgoingBatch(batch))',
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_producer_is_as_good_as_before_after_ctrl_c(dark_cluster: MockCluster, phase: str, call: str) -> None:
    batch, on_their_way = PHASES[phase]
    code = f"""
        def encode(message, context):
            if message == 0:
                print("begun", flush=True)
            time.sleep(0.02)
            return b"x"
        answers = []
        def answer(report):
            answers.append(("report", report.acked, report.failed))
        class Callback(kbatch.SenderCallback):
            def mark_processing_failure(self, batch, error):
                answers.append((type(error).__name__, error.report.acked, error.report.failed))
            def mark_successful(self, batch, report):
                answers.append(("successful", report.acked, report.failed))
        producer = kbatch.Producer({{**CONFIG, "queue.buffering.max.messages": 50}}, encoder=encode)
        batch = {batch}
        if {phase != "phase 1"}:
            print("begun", flush=True)
        try:
            {CALLS[call]}
        except KeyboardInterrupt:
            print("interrupted", len(producer), flush=True)
        sys.stdin.readline()
        try:
            assert producer.flush() == 0
        except kbatch.UndeliveredError as error:
            print("undelivered", error.count)
        print(producer.send_batch("orders", envelopes(5)).acked)
        producer.close()
        print(pinned_buffers(), answers)
        """
    with start(dark_cluster, code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.5)  # into what is to be interrupted
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == f"interrupted {on_their_way}\n"
        dark_cluster.set_broker_up(1)
        out, errors = process.communicate("go on\n", timeout=60)
    answers: list[object] = []
    if call == "sender":
        answers = [
            {
                "phase 1": ("BatchInterruptedError", 0, 1_000),
                "phase 2": ("BatchError", 32, 168),
                "waiting": ("successful", 20, 0),
            }[phase]
        ]
    elif call == "submit with a callback" and phase != "phase 1":
        answers = [("report", on_their_way, 168 if phase == "phase 2" else 0)]
    is_told = call in ("sender", "submit with a callback")
    lost = "undelivered 168\n" if phase == "phase 2" and not is_told else ""
    assert (process.returncode, out) == (0, f"{lost}5\n0 {answers}\n"), errors
    values = [record.value for record in read_back(dark_cluster.bootstrap_servers, "orders")]
    assert values == [b"m%d" % i for i in (*range(on_their_way), *range(5))]


def test_a_signal_handler_that_flushes_and_raises_gives_up_what_is_not_on_its_way(dark_cluster: MockCluster) -> None:
    code = """
        producer = kbatch.Producer({**CONFIG, "queue.buffering.max.messages": 50})
        def on_signal(*_):
            producer.flush(0.3)
            raise KeyboardInterrupt
        signal.signal(signal.SIGINT, on_signal)
        print("begun", flush=True)
        try:
            producer.send_batch("orders", envelopes(200))
        except KeyboardInterrupt:
            end = time.monotonic() + 10
            while len(producer) > 32 and time.monotonic() < end:
                time.sleep(0.01)
            print("interrupted", len(producer), flush=True)
        sys.stdin.readline()
        try:
            producer.flush()
        except kbatch.UndeliveredError as error:
            print("undelivered", error.count)
        producer.close()
        print(pinned_buffers())
        """
    with start(dark_cluster, code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.5)  # into what is to be interrupted
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted 32\n"
        dark_cluster.set_broker_up(1)
        out, errors = process.communicate("go on\n", timeout=60)
    assert (process.returncode, out) == (0, "undelivered 168\n0\n"), errors
    values = [record.value for record in read_back(dark_cluster.bootstrap_servers, "orders")]
    assert values == [b"m%d" % i for i in range(32)]


def test_ctrl_c_in_a_block_sends_what_is_in_flight_first(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    kafka_cluster.set_rtt(1, 200)
    code = """
        try:
            with kbatch.Producer(CONFIG) as producer:
                producer.submit("orders", envelopes(5), callback=lambda report: print("acked", report.acked))
                print("waiting", flush=True)
                time.sleep(60)
        except KeyboardInterrupt:
            print("interrupted")
        """
    result = run(kafka_cluster, code, interrupt_at="waiting")
    assert (result.returncode, result.stdout) == (0, "acked 5\ninterrupted\n"), result.stderr
    assert len(read_back(kafka_cluster.bootstrap_servers, "orders")) == 5


def test_ctrl_c_while_closing(dark_cluster: MockCluster) -> None:
    code = """
        answers = []
        producer = kbatch.Producer(CONFIG)
        pending = producer.submit("orders", envelopes(10), callback=lambda report: answers.append(report.failed))
        print("closing", flush=True)
        try:
            producer.close(60)
        except KeyboardInterrupt:
            print("interrupted", producer.closed, pending.done(), answers, pinned_buffers(), producer.close())
        """
    result = run(dark_cluster, code, interrupt_at="closing")
    assert (result.returncode, result.stdout) == (0, "interrupted True True [10] 0 10\n"), result.stderr
