"""The fault runner on a real cluster: the same ways to send, the same history, the same checker."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaException

import kbatch
from tests.faults.checker import Violation, check
from tests.faults.history import ACKED, FAILED, RETURN, History, Outcome, Rules, Sent, seen
from tests.faults.kafka_kinds import DOOMED
from tests.faults.plan import BODIES, WAYS, Plan, Send
from tests.faults.runner import Run, _Job
from tests.waiting import until

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from tests.kafka.cluster import KafkaCluster

_numbers = itertools.count()
# A broker that is killed is back within seconds; what hangs, hangs for longer than this.
_PATIENCE_S = 90.0


def run_plan(cluster: KafkaCluster, plan: Plan) -> tuple[list[Violation], Counter[str]]:
    """What the plan's run has violated, and what it met. The cluster is left as it was."""
    history = KafkaRun(cluster, plan).carry_out()
    return check(history), seen(history)


class KafkaRun(Run):
    """A run through the proxies of a real cluster. No copies are excused: it deduplicates for idempotent producers."""

    message_timeout_ms = 60_000
    hang_s = _PATIENCE_S
    patience_s = 30.0
    close_timeout_s = 80.0

    @property
    def bootstrap_servers(self) -> str:
        return str(self.cluster.proxied_servers)

    def _prepare(self) -> None:
        self.cluster.create_topic(self.topic, partitions=self.plan.partitions, config=self.topic_config)
        if DOOMED in self.plan.kinds:
            self.cluster.create_topic(self.topics["doomed"], partitions=2)

    topic_config: dict[str, str] | None = None

    def _heal(self) -> None:
        while self.at_end:
            self.at_end.pop()()
        self.cluster.heal()

    def _drop_topics(self) -> None:
        for topic in self.topics.values():
            with contextlib.suppress(KafkaException):
                self.cluster.delete_topic(topic)


class Scenario(KafkaRun):
    """A run whose steps are a test's own. A context manager; at its end every invariant has held."""

    def __init__(
        self,
        cluster: KafkaCluster,
        *,
        partitions: int = 3,
        idempotent: bool = True,
        wire: str = "kbatch",
        codes: frozenset[int] = frozenset(),
        ordered: bool = True,
        topic_config: dict[str, str] | None = None,
        max_in_flight: int = 20_000,
        **config: Any,
    ) -> None:
        plan = Plan(
            seed=next(_numbers),
            partitions=partitions,
            senders=1,
            kinds=(),
            wire=wire,
            idempotent=idempotent,
            in_flight=5,
            warm=True,
            max_in_flight=max_in_flight,
            config=tuple(config.items()),
            steps=(),
            keep=(),
        )
        super().__init__(cluster, plan)
        self.topic_config = topic_config
        self.history = History(Rules(codes=codes, ordered=ordered))
        self.expected: set[str] = set()
        self._steps = itertools.count(10_000)  # beside the runner's own

        self._failures: list[BaseException] = []

    def __enter__(self) -> Self:
        self._prepare()
        self.send(20)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.cluster.heal()
                self._conclude()
                found = self.violations()
                assert {violation.invariant for violation in found} == self.expected, "\n".join(map(str, found[:20]))
        finally:
            self._leave()

    def violations(self) -> list[Violation]:
        return check(self.history)

    # -- batches

    def send(self, count: int = 50, way: str = "send_batch", body: str = "bytes", **fields: Any) -> Sent:
        """Sends a batch, and waits for its answer."""
        job = self._begin(count, way, body, **fields)
        self._settle(job)
        assert job.sent is not None
        return job.sent

    @contextlib.contextmanager
    def sending(self, count: int = 50, way: str = "send_batch", body: str = "bytes", **fields: Any) -> Iterator[_Job]:
        """A batch that is on its way meanwhile, and has its answer at the end."""
        job = _Job(next(self._steps), Send(0, count, way, body, **fields))
        self._jobs[job.index] = job
        thread = threading.Thread(target=self._carry, args=(job,))
        thread.start()
        try:
            until(lambda: job.under_way(self.producer), "a batch in flight")
            yield job
        finally:
            thread.join(self.hang_s)
        assert not thread.is_alive(), "a sender hangs"
        self._settle(job)

    def by_hand(self, count: int) -> tuple[Sent, list[kbatch.Envelope[Any]]]:
        """A batch that the test sends itself; `answer` is to be called with its report."""
        job = _Job(next(self._steps), Send(0, count, "send_batch", "bytes"))
        messages, envelopes, _ = self._fresh(job)
        sent = Sent(job.index, self.topic, tuple(messages), frozenset({RETURN}), self.instance, next(self._events))
        self.history.sends.append(sent)
        return sent, envelopes

    def answer(self, sent: Sent, report: kbatch.DeliveryReport) -> None:
        self._answer(sent, RETURN, report)

    @contextlib.contextmanager
    def load(self, senders: int = 2, count: int = 20) -> Iterator[Callable[[int], None]]:
        """Batches all the time, of every kind; what is given waits until so many more are answered."""
        stop = threading.Event()
        answered = itertools.count()
        done = [0]

        def work(sender: int) -> None:
            for i in itertools.count(sender):
                if stop.wait(0.05):
                    return
                self._settle(self._begin(count, WAYS[i % len(WAYS)], BODIES[i % len(BODIES)]))
                done[0] = next(answered) + 1

        def more(batches: int) -> None:
            goal = done[0] + batches
            until(lambda: done[0] >= goal or self._failures, f"{batches} more batches", self.hang_s)
            assert not self._failures, self._failures

        threads = [threading.Thread(target=work, args=(sender,)) for sender in range(senders)]
        for thread in threads:
            thread.start()
        try:
            yield more
        finally:
            stop.set()
            for thread in threads:
                thread.join(self.hang_s)
        assert not any(thread.is_alive() for thread in threads), "a sender hangs"

    def resend(self, sent: Sent, **fields: Any) -> Sent:
        """Sends what failed of a batch again, with the same ids."""
        return self.send(again=sent.number, **fields)

    def outcomes(self, sent: Sent) -> tuple[Outcome, ...]:
        return next(answer.outcomes for answer in sent.answers if answer.outcomes is not None)

    def states(self, sent: Sent) -> set[str]:
        return {outcome.state for outcome in self.outcomes(sent)}

    @property
    def acked(self) -> int:
        return seen(self.history)[ACKED]

    @property
    def failed(self) -> int:
        return seen(self.history)[FAILED]

    def _begin(self, count: int, way: str, body: str, **fields: Any) -> _Job:
        job = _Job(next(self._steps), Send(0, count, way, body, **fields))
        self._jobs[job.index] = job
        self._carry(job)
        return job

    def _carry(self, job: _Job) -> None:
        try:
            self._send(job)
        except BaseException as error:
            self._failures.append(error)
            self.history.findings.append(f"step {job.index}, {job.step}, raised {error!r}")
        finally:
            job.over.set()

    def _settle(self, job: _Job) -> None:
        if job.pending is None or job.sent is None:
            return
        with contextlib.suppress(kbatch.BatchPendingError):  # no answer: the checker will say so
            self._answer(job.sent, RETURN, job.pending.wait(self.hang_s))
        job.pending = None
