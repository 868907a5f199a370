"""kbatch's senders. Options: `form`: "batched" (`BatchedSender` under a `SendingAgent`) or "inline" (`InlineSender`);
`sender`: arguments of the first; `config`: more of librdkafka's settings; and those of one_at_a_time.py.
"""

from itertools import count
from typing import Any

import kbatch
from benchmarks.data import kbatch_envelopes
from benchmarks.sides.base import Spec
from benchmarks.sides.one_at_a_time import Send, serve


class Batched:
    def __init__(self, spec: Spec) -> None:
        self.messages = kbatch_envelopes(spec.pool, spec.headers)
        self._given_up: list[Exception] = []
        config = {"bootstrap.servers": spec.bootstrap, **spec.options.get("config", {})}
        self._producer = kbatch.Producer(config)
        self._agent = kbatch.SendingAgent(
            self._producer, spec.topic, on_failed=lambda _envelope, error: self._given_up.append(error)
        )
        self._sender = kbatch.BatchedSender(self._agent, **spec.options.get("sender", {}))
        self._accepted = 0

    def sending(self) -> Send:
        return self._sender.send

    def waiting(self) -> int:
        return len(self._sender)

    def flush(self) -> int:
        left = self._sender.flush()
        if left or self._given_up:
            raise RuntimeError(f"not everything was delivered: {left} left, {self._given_up[:1]}")
        accepted = self._sender.stats()["acked"]
        acknowledged, self._accepted = accepted - self._accepted, accepted
        return acknowledged

    def close(self) -> dict[str, Any]:
        stats = self._sender.stats()
        left = self._sender.close()
        left += self._producer.close()
        return {"left": left, "sender": stats, "stats": self._producer.stats()}


class Inline:
    def __init__(self, spec: Spec) -> None:
        self.messages = kbatch_envelopes(spec.pool, spec.headers)
        self._producer = kbatch.Producer({"bootstrap.servers": spec.bootstrap, **spec.options.get("config", {})})
        self._sender = kbatch.InlineSender(self._producer, spec.topic)
        self._numbers = count(1)
        self._before = 0

    def sending(self) -> Send:
        send, numbers = self._sender.send, self._numbers

        def send_one(envelope: kbatch.Envelope[Any]) -> None:
            send(envelope)  # raises if it was not acknowledged
            next(numbers)

        return send_one

    def waiting(self) -> int:
        return 0

    def flush(self) -> int:
        now = next(self._numbers)
        acknowledged, self._before = now - self._before - 1, now
        return acknowledged

    def close(self) -> dict[str, Any]:
        self._sender.close()
        return {"left": self._producer.close(), "stats": self._producer.stats()}


def make(spec: Spec) -> Batched | Inline:
    return Inline(spec) if spec.options.get("form") == "inline" else Batched(spec)


if __name__ == "__main__":
    serve(f"kbatch {kbatch.__version__}", make)
