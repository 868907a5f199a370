"""Forks: a used producer refuses in the child and goes on in the parent; an unused one works in the child."""

from collections import Counter
from pathlib import Path

import pytest

from kbatch.testing import MockCluster

from .clients import read_back
from .processes import needs_fork, run, start

pytestmark = needs_fork


def test_a_used_producer_refuses_in_a_forked_child_and_goes_on_in_the_parent(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    code = """
        producer = kbatch.Producer(CONFIG)
        unused = kbatch.Producer(CONFIG)
        producer.send_batch("orders", envelopes(3)).raise_for_errors()
        pending = producer.submit("orders", envelopes(1000))
        child = os.fork()
        if child == 0:
            try:
                producer.send_batch("orders", envelopes(1))
            except kbatch.ForkError as error:
                assert "post_fork" in str(error)
            else:
                os._exit(2)
            assert producer.close() == 0
            ok = unused.send_batch("orders", envelopes(5)).acked == 5
            assert len({kbatch.uuid7() for _ in range(100)}) == 100
            del producer, pending
            unused.close()
            sys.stdout.flush()
            os._exit(0 if ok else 3)
        assert os.waitpid(child, 0)[1] == 0
        assert pending.wait().acked == 1000
        producer.send_batch("orders", envelopes(7)).raise_for_errors()
        producer.close()
        print("parent done", pinned_buffers())
        """
    result = run(kafka_cluster, code)
    assert result.stdout.strip() == "parent done 0", result.stderr
    assert result.returncode == 0, result.stderr


def test_a_fork_while_other_threads_map_enqueue_and_wait(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=16)  # of each of which the cluster keeps 5 MB
    kafka_cluster.set_rtt(1, 10)  # bounds what is sent
    # Each child has seconds to live: one that hangs on a lock is killed, and its status says so.
    code = """
        import faulthandler
        producer = kbatch.Producer(CONFIG, max_in_flight=300, source="parent")
        sender = kbatch.KafkaSender(producer, "orders")
        answers = []
        class Callback(kbatch.SenderCallback):
            def mark_successful(self, batch, report):
                answers.append(("successful", report.acked))
            def mark_processing_failure(self, batch, error):
                answers.append((type(error).__name__, error.report.failed))
        stop = threading.Event()
        acked = []
        def send_batch():
            while not stop.is_set():
                acked.append(producer.send_batch("orders", envelopes(100)).acked)
        def submit():
            while not stop.is_set():
                producer.submit("orders", envelopes(50), callback=lambda report: acked.append(report.acked))
        def send_by_sender():
            while not stop.is_set():
                sender.send_batch(Callback(), kbatch.OutgoingBatch(envelopes(30)))
        def flush():
            while not stop.is_set():
                producer.flush()
        threads = [threading.Thread(target=work) for work in (send_batch, send_batch, submit, send_by_sender, flush)]
        for thread in threads:
            thread.start()

        def refused(call):
            try:
                call()
            except kbatch.ForkError as error:
                assert "post_fork" in str(error)
            else:
                raise AssertionError(call)

        def child(pending):
            for _ in range(2):
                refused(lambda: producer.send_batch("orders", envelopes(1)))
                refused(lambda: producer.submit("orders", envelopes(1), callback=print))
                refused(producer.flush)
                refused(producer.purge)
                refused(producer.stats)
                if not pending.done():
                    refused(pending.wait)
                    refused(lambda: asyncio.run(wait_for(pending)))
                refused(lambda: pending.add_done_callback(print))
                answers.clear()
                sender.send_batch(Callback(), kbatch.OutgoingBatch(envelopes(3)))
                assert answers == [("ForkError", 3)], answers
                assert producer.close() == 0
                len(producer), repr(producer), repr(pending), producer.closed

        async def wait_for(pending):
            return await pending

        for number in range(20):
            time.sleep(0.01)
            pending = producer.submit("orders", envelopes(20), callback=lambda report: acked.append(report.acked))
            pid = os.fork()
            if pid == 0:
                signal.alarm(20)
                faulthandler.dump_traceback_later(15)
                try:
                    child(pending)
                except BaseException:
                    import traceback
                    traceback.print_exc()
                    os._exit(1)
                if number % 2:
                    os._exit(0)
                sys.exit()  # the way out of an interpreter, with its atexit functions
            status = os.waitpid(pid, 0)[1]
            if status:
                print("a child's status", status, file=sys.stderr, flush=True)
                os._exit(1)
        stop.set()
        for thread in threads:
            thread.join()
        assert producer.close() == 0
        print(sum(acked) + sum(acked for _, acked in answers), pinned_buffers())
        """
    result = run(kafka_cluster, code)
    assert result.returncode == 0, result.stderr
    acked, pinned = map(int, result.stdout.split())
    assert pinned == 0
    records = read_back(kafka_cluster.bootstrap_servers, "orders")
    ids = Counter(dict(record.headers)["id"] for record in records)
    assert max(ids.values()) == 1
    assert len(ids) == acked > 0


def test_a_new_producer_works_in_a_child_while_the_parents_is_in_use(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    kafka_cluster.create_topic("child", partitions=1)
    kafka_cluster.set_broker_down(1)
    code = """
        producer = kbatch.Producer(CONFIG)
        pending = producer.submit("orders", envelopes(100))
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            own = kbatch.Producer(CONFIG)
            assert own.stats()["pinned_buffers"] == 0
            sent = own.submit("child", envelopes(10))
            assert own.stats()["pinned_buffers"] == 1
            print("in flight in the child", flush=True)
            sys.stdin.readline()
            sys.exit()  # which sends what is in flight
        assert os.waitpid(child, 0)[1] == 0
        assert pending.wait().acked == 100
        producer.close()
        print("parent done", pinned_buffers(), flush=True)
        """
    with start(kafka_cluster, code) as process:
        assert process.stdout.readline() == "in flight in the child\n"
        kafka_cluster.set_broker_up(1)
        out, errors = process.communicate("go on\n", timeout=60)
    assert (process.returncode, out) == (0, "parent done 0\n"), errors
    for topic, count in (("orders", 100), ("child", 10)):
        records = read_back(kafka_cluster.bootstrap_servers, topic)
        assert [record.value for record in records] == [b"m%d" % i for i in range(count)]


def test_a_child_that_is_forked_while_brokers_are_looked_up_can_look_up_names(kafka_cluster: MockCluster) -> None:
    """glibc's getaddrinfo has a lock that stays locked in a child, if a thread of the parent had it."""
    code = """
        import socket
        for _ in range(30):
            producer = kbatch.Producer({"bootstrap.servers": "127.0.0.1:1", "log_level": 0}, close_timeout_s=0)
            told = lambda report: None
            producer.submit("orders", envelopes(1), callback=told)  # librdkafka starts to look up its broker
            pid = os.fork()
            if pid == 0:
                signal.alarm(20)
                socket.getaddrinfo("127.0.0.1", 80, flags=socket.AI_ADDRCONFIG)
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0, "it hangs"
            producer.close()
        """
    result = run(kafka_cluster, code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("made", ["in the child", "before the fork"])
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_what_a_child_of_multiprocessing_submitted_is_sent_before_it_ends(
    kafka_cluster: MockCluster, tmp_path: Path, method: str, made: str
) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    kafka_cluster.set_rtt(1, 100)
    code = f"""
        import multiprocessing
        unused = kbatch.Producer(CONFIG)
        def work(name):
            producer = unused if {made == "before the fork"} else kbatch.Producer(CONFIG)
            producer.submit("orders", [kbatch.Envelope(data=b"%s%d" % (name.encode(), i)) for i in range(50)])
        if __name__ == "__main__":
            used = kbatch.Producer(CONFIG)
            pending = used.submit("orders", envelopes(50))
            context = multiprocessing.get_context({method!r})
            children = [context.Process(target=work, args=(name,)) for name in "abc"]
            for child in children:
                child.start()
            for child in children:
                child.join(30)
            print(*[child.exitcode for child in children], pending.wait().acked)
        """
    result = run(kafka_cluster, code, directory=tmp_path)
    assert (result.returncode, result.stdout) == (0, "0 0 0 50\n"), result.stderr
    values = [record.value or b"" for record in read_back(kafka_cluster.bootstrap_servers, "orders")]
    for name in (b"m", b"a", b"b", b"c"):
        assert [value for value in values if value.startswith(name)] == [b"%s%d" % (name, i) for i in range(50)]
    assert len(values) == 200


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_thread_of_a_multiprocessing_child_goes_on_after_its_target(
    kafka_cluster: MockCluster, tmp_path: Path, method: str
) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    code = f"""
        import multiprocessing
        def work():
            producer = kbatch.Producer(CONFIG)
            producer.send_batch("orders", [])
            def go_on():
                time.sleep(0.5)  # until long after the target has returned
                producer.send_batch("orders", envelopes(10)).raise_for_errors()
                producer.close()
            threading.Thread(target=go_on).start()
        if __name__ == "__main__":
            child = multiprocessing.get_context({method!r}).Process(target=work)
            child.start()
            child.join(30)
            print(child.exitcode)
        """
    result = run(kafka_cluster, code, directory=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "0\n", "")
    assert len(read_back(kafka_cluster.bootstrap_servers, "orders")) == 10
