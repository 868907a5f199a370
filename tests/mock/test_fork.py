"""Forks: a used producer refuses in the child and goes on in the parent; an unused one works in the child."""

import os

import pytest

from kbatch.testing import MockCluster

from .processes import run


@pytest.mark.skipif(
    os.environ.get("KBATCH_SLOW_BUILD", "") not in ("", "0"),
    reason="platform: in a forked child glibc reuses the stacks of threads that are gone, whose redzones "
    "AddressSanitizer has not cleared; librdkafka's uninstrumented threads then run into them",
)
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
