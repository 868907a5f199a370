"""kbatch. One batch at a time is `send_batch`; batches in flight are `submit`, which keeps the bound itself
(`max_in_flight`), while the program collects the reports of batches that are done.

Options: `form` of the second kind: "bound" (as said) or "oldest" (at most as many batches as the window holds, at
least two, and the oldest is waited for before the next is submitted); `encoded`: the bodies are bytes already;
`just_in_time`: each batch's envelopes are made just before it is sent (the time is in the turn, but in neither phase);
`threads`: so many threads send one batch at a time each, on the same producer; `config`: more of librdkafka's settings.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import kbatch
from benchmarks.data import envelope_options, kbatch_envelopes, plain_value
from benchmarks.sides.base import Spec, serve


class Sender:
    def __init__(self, spec: Spec) -> None:
        self._topic = spec.topic
        self._batch = spec.batch
        self._pending: deque[kbatch.PendingBatch] = deque()
        self._next = 0
        bound = spec.options.get("form", "bound") == "bound"
        self._most_batches = 1_000_000 if bound else max(2, spec.window // spec.batch)
        self._producer = kbatch.Producer(
            {"bootstrap.servers": spec.bootstrap, **spec.options.get("config", {})},
            wire="raw" if spec.values or not spec.headers else "kbatch",
            max_in_flight=spec.window if spec.window and bound else 20_000,
        )
        made: list[Any]
        encoded, self._just_in_time = (bool(spec.options.get(name)) for name in ("encoded", "just_in_time"))
        if spec.values:
            value = bytearray(plain_value(spec.values))
            made = [{"data": bytes(value)} for _ in range(spec.pool)]
            if not self._just_in_time:
                made = [kbatch.Envelope(**options) for options in made]
        elif self._just_in_time:
            made = envelope_options(spec.pool, spec.headers, encoded=encoded)
        else:
            made = kbatch_envelopes(spec.pool, spec.headers, encoded=encoded)
        self._batches = [made[at : at + spec.batch] for at in range(0, spec.pool, spec.batch)]
        self._in_flight = bool(spec.window)
        self._shares = spec.options.get("threads", 0)
        self._threads = ThreadPoolExecutor(self._shares) if self._shares else None

    def _batch_after(self) -> "list[kbatch.Envelope[Any]]":
        batch: list[Any] = self._batches[self._next]
        self._next = (self._next + 1) % len(self._batches)
        return [kbatch.Envelope(**options) for options in batch] if self._just_in_time else batch

    def send(self, count: int) -> int:
        if self._threads is not None:
            batches = count // self._batch
            shares = [batches // self._shares + (n < batches % self._shares) for n in range(self._shares)]
            return sum(self._threads.map(self._send_one_at_a_time, [share * self._batch for share in shares]))
        return self._send_in_flight(count) if self._in_flight else self._send_one_at_a_time(count)

    def _send_one_at_a_time(self, count: int) -> int:
        acknowledged = 0
        for _ in range(count // self._batch):
            report = self._producer.send_batch(self._topic, self._batch_after())
            report.raise_for_errors()
            acknowledged += report.acked
        return acknowledged

    def _send_in_flight(self, count: int) -> int:
        acknowledged = 0
        pending = self._pending
        for _ in range(count // self._batch):
            while pending and (len(pending) >= self._most_batches or pending[0].done()):
                acknowledged += pending.popleft().wait().raise_for_errors().acked
            pending.append(self._producer.submit(self._topic, self._batch_after()))
        while pending:
            acknowledged += pending.popleft().wait().raise_for_errors().acked
        return acknowledged

    def close(self) -> dict[str, Any]:
        left = self._producer.close()
        return {"left": left, "stats": self._producer.stats()}


if __name__ == "__main__":
    serve(f"kbatch {kbatch.__version__}", Sender)
