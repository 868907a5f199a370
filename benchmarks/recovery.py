"""How long after a broker's return the first acknowledgement comes."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from benchmarks.broker import MockBroker
from benchmarks.side_process import Side
from benchmarks.sides.base import Result
from benchmarks.turns import Contender, start, stored

#: Every answer takes so long, so that there are messages in flight whenever the broker goes.
RTT_MS = 20
#: Batches per round: enough to last from before the outage to after it.
BATCHES = 30
BEFORE_S = 0.2


@dataclass(frozen=True)
class Outages:
    #: seconds without a broker, one outage for each. They differ, since librdkafka tries to connect again after
    #: 0.1, 0.2, 0.4, 0.8, … s: what is left of such a pause when the broker returns is most of what is measured.
    seconds: tuple[float, ...] = (1.0, 1.3, 1.6, 2.0)
    #: processes of each side, which go through the same outages at the same time
    copies: int = 3


def recoveries(contenders: Sequence[Contender], outages: Outages) -> dict[str, list[list[float]]]:
    """Seconds from the broker's return to the first answer of each process, for each outage.

    All processes send batch after batch to one broker, which goes down and comes back for all at once.
    """
    found: dict[str, list[list[float]]] = {contender.label: [] for contender in contenders}
    with MockBroker() as broker, ExitStack() as stack:
        broker.set_delay(RTT_MS)
        sides: list[tuple[str, Side]] = []
        for contender in contenders:
            for _ in range(outages.copies):
                side = start(contender, broker, 4, 8, 0)
                sides.append((contender.label, stack.enter_context(side)))
                side.run(5 * contender.batch)
        for seconds in outages.seconds:
            for _, side in sides:
                side.begin(BATCHES * side.spec.batch, 1)
            time.sleep(BEFORE_S)
            gone_ns = time.monotonic_ns()
            broker.set_broker_down()
            time.sleep(seconds)
            back_ns = time.monotonic_ns()
            broker.set_broker_up()
            first: dict[str, list[float]] = {contender.label: [] for contender in contenders}
            for label, side in sides:
                result = side.end(BATCHES * side.spec.batch)
                first[label].append(_first_answer(label, result, gone_ns, back_ns))
            for label, delays in first.items():
                found[label].append(delays)
        broker.set_delay(0)
        for label, side in sides:
            held = stored(broker.bootstrap_servers, side.spec.topic, 4)
            # the mock cluster stores a message again if its acknowledgement was lost
            if not side.acknowledged <= held <= side.acknowledged + len(outages.seconds) * side.spec.batch:
                raise RuntimeError(f"{label}: {side.acknowledged} messages acknowledged, but the broker has {held}")
    return found


def _first_answer(label: str, result: Result, gone_ns: int, back_ns: int) -> float:
    answers = [result.start_ns + number + latency for number, latency in enumerate(result.latencies_ns)]
    before = [answer for answer in answers if answer <= back_ns]
    after = [answer for answer in answers if answer > back_ns]
    if not before or not after or before[-1] > gone_ns + 1e9:
        raise RuntimeError(f"{label}: the outage did not come between two answers")
    return (after[0] - back_ns) / 1e9
