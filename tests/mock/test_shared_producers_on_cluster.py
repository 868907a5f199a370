"""Producers that senders share, on a cluster: what a forked child finds; a successor that sends."""

import pytest

import kbatch
from kbatch._recovery._handle import ProducerHandle
from kbatch.testing import MockCluster

from .clients import read_back
from .processes import needs_fork, run


@pytest.fixture
def cluster(kafka_cluster: MockCluster) -> MockCluster:
    kafka_cluster.create_topic("orders", partitions=1)
    return kafka_cluster


def test_the_successor_sends_as_its_predecessor_did(cluster: MockCluster) -> None:
    config = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0, "client.id": "shop"}
    names = ["x-trace"]
    with kbatch.Producer(config, wire="wolverine", source="shop", header_hook=lambda: [(names[0], "7")]) as given:
        handle = ProducerHandle.of(given)
        use = handle.acquire()
        given._core.inject_fatal_error(45, "made up")
        with pytest.raises(kbatch.ProducerFatalError):
            given.send_batch("orders", [kbatch.Envelope(data=b"lost")])
        handle.replace(given)
        assert isinstance(handle.producer, kbatch.Producer)
        handle.producer.send_batch("orders", [kbatch.Envelope(data=b"sent")]).raise_for_errors()
        assert "shop" in repr(handle.producer)
        use.release(30)
    (record,) = read_back(cluster.bootstrap_servers, "orders")
    assert record.value == b"sent"
    assert {"x-trace": b"7", "source": b"shop", "wolverine-protocol-version": b"1.0"}.items() <= dict(
        record.headers
    ).items()


@pytest.mark.parametrize("used", [False, True], ids=["not started", "started"])
class TestFork:
    pytestmark = needs_fork

    def test_what_the_parent_shares_is_the_childs_only_if_it_was_not_started(
        self, cluster: MockCluster, used: bool
    ) -> None:
        code = f"""
            from kbatch._recovery._handle import ProducerHandle
            used = {used}
            prototype = kbatch.Producer(CONFIG)
            parents = ProducerHandle.shared("settings", prototype)
            if used:
                parents.handle.producer.send_batch("orders", envelopes(1)).raise_for_errors()
            child = os.fork()
            if child == 0:
                own = ProducerHandle.shared("settings", prototype)
                assert (own.handle is parents.handle) == (not used), (own.handle, parents.handle)
                second = ProducerHandle.shared("settings", prototype)
                assert second.handle is own.handle
                own.handle.producer.send_batch("orders", envelopes(2)).raise_for_errors()
                if used:
                    try:
                        parents.handle.producer.send_batch("orders", envelopes(1))
                    except kbatch.ForkError:
                        pass
                    else:
                        os._exit(2)
                    assert parents.release(5) == 0
                else:
                    assert parents.release(5) == 0
                    assert not own.handle.producer.closed
                assert own.release(5) == 0
                assert second.release(5) == 0
                assert own.handle.producer.closed
                sys.stdout.flush()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            parents.handle.producer.send_batch("orders", envelopes(4)).raise_for_errors()
            assert parents.release(5) == 0
            assert parents.handle.producer.closed
            print("done")
            """
        result = run(cluster, code)
        assert result.stdout.strip() == "done", result.stderr
        assert result.returncode == 0, result.stderr
        assert len(read_back(cluster.bootstrap_servers, "orders")) == used + 2 + 4


class TestForkInTheMiddle:
    pytestmark = needs_fork

    def test_a_fork_waits_for_who_takes_and_gives(self, cluster: MockCluster) -> None:
        # A lock that a thread of the parent holds would be held for ever in the child.
        code = """
            import faulthandler
            from kbatch._recovery._handle import ProducerHandle
            prototype = kbatch.Producer(CONFIG)
            stop = threading.Event()
            def take_and_give():
                while not stop.is_set():
                    ProducerHandle.shared("settings", prototype).release(0)
            threads = [threading.Thread(target=take_and_give) for _ in range(3)]
            for thread in threads:
                thread.start()
            statuses = []
            for _ in range(50):
                child = os.fork()
                if child == 0:
                    faulthandler.dump_traceback_later(20, exit=True)
                    handle = ProducerHandle.shared("settings", prototype).handle
                    handle.replace(handle.producer)
                    os._exit(0)
                statuses.append(os.waitpid(child, 0)[1])
            stop.set()
            for thread in threads:
                thread.join()
            print(set(statuses))
            """
        result = run(cluster, code)
        assert result.stdout.strip() == "{0}", result.stderr


@pytest.mark.parametrize("used", [False, True], ids=["not used", "used"])
class TestForkedTopic:
    pytestmark = needs_fork

    def test_a_topic_of_the_parent_makes_senders_in_the_child(self, cluster: MockCluster, used: bool) -> None:
        code = f"""
            used = {used}
            topic = kbatch.KafkaTopic("orders", mode=kbatch.SenderMode.INLINE, config=CONFIG)
            parents = topic.create_sender()
            if used:
                parents.send(kbatch.Envelope("parent"))
            child = os.fork()
            if child == 0:
                with topic.create_sender() as own:
                    assert (own._handle is parents._handle) == (not used)
                    own.send(kbatch.Envelope("child"))
                assert own._handle.producer.closed == used  # else the parent's copy still has it
                assert parents.close() == 0
                assert own._handle.producer.closed
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            parents.send(kbatch.Envelope("parent"))
            assert parents.close() == 0
            print("done")
            """
        result = run(cluster, code)
        assert result.stdout.strip() == "done", result.stderr
        expected = [b'"parent"'] * used + [b'"child"', b'"parent"']
        assert [record.value for record in read_back(cluster.bootstrap_servers, "orders")] == expected
