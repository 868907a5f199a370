"""What was found, and how it is shown."""

import math
from statistics import median
from typing import Any

import msgspec

from benchmarks.turns import Score


class Figure(msgspec.Struct, frozen=True):
    """One number that the project promises, or gives for information when there is no target."""

    name: str
    value: float
    lowest: float
    highest: float
    unit: str = ""
    target: float | None = None
    at_most: bool = False
    digits: int = 2

    @property
    def reached(self) -> bool | None:
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    @property
    def is_far_off(self) -> bool:
        """Whether it misses its target by a factor of two, which no noise of the machine explains."""
        if self.target is None:
            return False
        return self.value > 2 * self.target if self.at_most else 2 * self.value < self.target

    def verdict(self) -> str:
        if self.target is None:
            return ""
        sign = "≤" if self.at_most else "≥"
        wanted = f"target {sign} {self.target:g}{self.unit}"
        if self.reached:
            return f"{wanted}: reached"
        return f"{wanted}: {'over' if self.at_most else 'short'} by {abs(self.value - self.target):.{self.digits}f}"


class Line(msgspec.Struct, frozen=True):
    """One side's turns: messages acknowledged per second, CPU per message of its process and of the broker's, the most
    memory it ever had and what that is more than before it sent anything, the most of the machine others used."""

    label: str
    side: str
    batch: int
    window: int
    headers: int
    options: dict[str, Any]
    rate: float
    lowest: float
    highest: float
    cpu_us: float
    broker_cpu_us: float
    peak_mib: float
    sending_mib: float
    foreign: float
    rates: list[float]
    #: of the broker's process until the end of these turns
    broker_peak_mib: float = 0.0


class LatencyLine(msgspec.Struct, frozen=True):
    """One side's paced turns, in microseconds: from when a batch was due to its answer, and of that the call alone.
    Medians over the turns, but for the longest."""

    label: str
    side: str
    batch: int
    batches_per_s: float
    batches: int
    p50: float
    p99: float
    longest: float
    call_p50: float
    call_p99: float
    foreign: float
    p50s: list[float]
    p99s: list[float]


class Section(msgspec.Struct):
    """`measure` and `settings` say to programs what `title` says to readers."""

    title: str
    measure: str = ""
    settings: dict[str, Any] = {}
    lines: list[Line] = []
    latencies: list[LatencyLine] = []
    figures: list[Figure] = []
    notes: list[str] = []
    details: dict[str, Any] = {}


def figure(name: str, values: list[float], **rest: Any) -> Figure:
    """The median of `values` with its range."""
    return Figure(name, median(values), min(values), max(values), **rest)


def line(label: str, score: Score) -> Line:
    rates, contender = score.rates, score.contender
    return Line(
        label=label,
        side=contender.side,
        batch=contender.batch,
        window=contender.window,
        headers=score.headers,
        options=contender.options,
        rate=median(rates),
        lowest=min(rates),
        highest=max(rates),
        cpu_us=score.cpu_us,
        broker_cpu_us=score.broker_cpu_us,
        peak_mib=score.peak / 2**20,
        sending_mib=(score.peak - score.resident) / 2**20,
        foreign=max(score.foreign),
        rates=[round(rate) for rate in rates],
        broker_peak_mib=score.broker_peak / 2**20,
    )


def lines(scores: dict[str, Score]) -> list[Line]:
    return [line(label, score) for label, score in scores.items()]


def percentile_us(nanoseconds: list[int], share: float) -> float:
    """The smallest of the values that at least this share of them does not exceed, in microseconds."""
    ordered = sorted(nanoseconds)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] / 1000


def latency_line(label: str, batches_per_s: float, score: Score) -> LatencyLine:
    answers = [turn.latencies_ns for turn in score.turns]
    calls = [turn.served_ns for turn in score.turns]
    p50s, p99s = ([percentile_us(each, share) for each in answers] for share in (0.5, 0.99))
    return LatencyLine(
        label=label,
        side=score.contender.side,
        batch=score.contender.batch,
        batches_per_s=batches_per_s,
        batches=sum(len(each) for each in answers),
        p50=median(p50s),
        p99=median(p99s),
        longest=max(max(each) for each in answers) / 1000,
        call_p50=median(percentile_us(each, 0.5) for each in calls),
        call_p99=median(percentile_us(each, 0.99) for each in calls),
        foreign=max(score.foreign),
        p50s=p50s,
        p99s=p99s,
    )


def standing_still(section: Section, scores: dict[str, Score], targets: dict[str, float] | None = None) -> None:
    """Adds what the competitor of each side lost (`sides/competitor.py`)."""
    for label, score in scores.items():
        still = [turn.extra["still"] / turn.messages * 1e6 for turn in score.turns]
        target = (targets or {}).get(label)
        section.figures.append(figure(label, still, unit=" µs", target=target, at_most=True))
        waiting = median(turn.extra["runnable"] / turn.extra["wall"] for turn in score.turns)
        counted = median(turn.extra["progress"] for turn in score.turns)
        section.notes.append(
            f"{label}: the competitor counted {counted:.0%} of what it counts alone; without a processor for "
            f"{waiting:.0%} of the time"
        )


def show(section: Section) -> str:
    out = [f"\n{section.title}", "-" * len(section.title)]
    if section.lines:
        out.append(
            f"  {'':44}{'messages/s':>12}{'lowest':>12}{'highest':>12}{'CPU µs each':>13}{'broker µs':>11}{'MiB':>7}"
            f"{'others':>8}"
        )
    for one in section.lines:
        rates = f"{one.rate:>12,.0f}{one.lowest:>12,.0f}{one.highest:>12,.0f}"
        costs = f"{one.cpu_us:>13.2f}{one.broker_cpu_us:>11.2f}{one.peak_mib:>7,.0f}"
        out.append(f"  {one.label:44}{rates}{costs}{one.foreign:>8.0%}")
    if section.latencies:
        out.append(
            f"  {'µs':44}{'batches/s':>10}{'p50':>9}{'p99':>9}{'longest':>9}{'call p50':>9}{'call p99':>9}"
            f"{'batches':>9}{'others':>8}"
        )
    for each in section.latencies:
        figures = (each.batches_per_s, each.p50, each.p99, each.longest, each.call_p50, each.call_p99, each.batches)
        columns = "".join(f"{value:>9,.0f}" for value in figures)
        out.append(f"  {each.label:44} {columns}{each.foreign:>8.0%}")
    for found in section.figures:
        spread = f"({found.lowest:,.{found.digits}f} to {found.highest:,.{found.digits}f})"
        if found.lowest == found.highest:
            spread = ""
        value = f"{found.value:>12,.{found.digits}f}{found.unit:4}"
        out.append(f"  {found.name:60}{value}{spread:>22}  {found.verdict()}".rstrip())
    out += [f"  {note}" for note in section.notes]
    return "\n".join(out)


def summary(sections: list[Section]) -> str:
    missed = [
        f"  {section.title}: {one.name}: {one.value:.{one.digits}f}{one.unit}, {one.verdict()}"
        for section in sections
        for one in section.figures
        if one.reached is False
    ]
    promised = sum(one.target is not None for section in sections for one in section.figures)
    head = f"\n{promised - len(missed)} of {promised} targets reached"
    return "\n".join([head + ("; not reached:" if missed else ""), *missed])
