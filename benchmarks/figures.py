"""What was found, and how it is shown."""

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

    def verdict(self) -> str:
        if self.target is None:
            return ""
        sign = "≤" if self.at_most else "≥"
        wanted = f"target {sign} {self.target:g}{self.unit}"
        if self.reached:
            return f"{wanted}: reached"
        return f"{wanted}: {'over' if self.at_most else 'short'} by {abs(self.value - self.target):.{self.digits}f}"


class Line(msgspec.Struct, frozen=True):
    """One side's turns: messages acknowledged per second, CPU per message, the most of the machine others used."""

    label: str
    rate: float
    lowest: float
    highest: float
    cpu_us: float
    foreign: float
    rates: list[float]


class Section(msgspec.Struct):
    title: str
    lines: list[Line] = []
    figures: list[Figure] = []
    notes: list[str] = []
    details: dict[str, Any] = {}


def figure(name: str, values: list[float], **rest: Any) -> Figure:
    """The median of `values` with its range."""
    return Figure(name, median(values), min(values), max(values), **rest)


def line(label: str, score: Score) -> Line:
    rates = score.rates
    return Line(
        label, median(rates), min(rates), max(rates), score.cpu_us, max(score.foreign), [round(rate) for rate in rates]
    )


def lines(scores: dict[str, Score]) -> list[Line]:
    return [line(label, score) for label, score in scores.items()]


def show(section: Section) -> str:
    out = [f"\n{section.title}", "-" * len(section.title)]
    if section.lines:
        out.append(f"  {'':44}{'messages/s':>12}{'lowest':>12}{'highest':>12}{'CPU µs each':>13}{'others':>8}")
    for one in section.lines:
        rates = f"{one.rate:>12,.0f}{one.lowest:>12,.0f}{one.highest:>12,.0f}"
        out.append(f"  {one.label:44}{rates}{one.cpu_us:>13.2f}{one.foreign:>8.0%}")
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
