"""How much is measured, and on which broker: the options of the command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.broker import MockBroker, OpenBroker
from benchmarks.data import HEADER_COUNTS
from benchmarks.recovery import Outages
from benchmarks.relays import BACKLOGS
from benchmarks.turns import Contender, Effort, Score, take_turns

FULL = Effort(rounds=3, turns=7, seconds=0.25)
LESS = Effort(rounds=1, turns=7, seconds=0.25)
LATENCY = Effort(rounds=1, turns=11, seconds=0.1, batches=100)
TRIAL = Effort(rounds=1, turns=5, seconds=0.15)
OUTAGES = Outages()


@dataclass(frozen=True)
class Plan:
    sizes: tuple[int, ...] = (100, 1_000, 10_000)
    headers: tuple[int, ...] = HEADER_COUNTS
    partitions: int = 4
    effort: Effort = FULL
    #: for what is shown for information
    less: Effort = LESS
    memory_envelopes: int = 10_000_000
    #: rows in outboxes whose first rows a relay sends
    backlogs: tuple[int, ...] = BACKLOGS
    #: rows that several relays send
    relay_rows: int = 300_000
    #: of the whole way, for each database and round trip
    way_turns: int = 3
    #: of a topic that consumers read in each turn
    read_records: int = 100_000
    half_load_s: float = 8.0
    tune: bool = True
    latency: Effort = LATENCY
    outages: Outages = OUTAGES
    open_broker: OpenBroker = MockBroker
    #: where Kafka's own Java classes are, if they are to take part
    class_path: str | None = None
    #: take turns again while other programs are busy
    patient: bool = True

    @property
    def all_turns(self) -> int:
        """For what is not started anew in each round."""
        return self.effort.rounds * self.effort.turns

    def take_turns(self, contenders: Sequence[Contender], effort: Effort | None = None, **how: Any) -> dict[str, Score]:
        """`turns.take_turns` where this plan says; `less` effort unless told otherwise."""
        how = {"partitions": self.partitions, "patient": self.patient} | how
        return take_turns(contenders, effort or self.less, open_broker=self.open_broker, **how)

    def best(self, trials: Sequence[Contender], headers: int = 8, **how: Any) -> Contender:
        """The fastest by trial; the first of them where nothing is to be tried out."""
        if not self.tune:
            return trials[0]
        scores = self.take_turns(trials, TRIAL, headers=headers, **how)
        return max(trials, key=lambda trial: median(scores[trial.label].rates))
