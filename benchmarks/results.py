"""What a run leaves behind: one JSON file, from which plots and tables are made."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.figures import LatencyLine, Line, Section


class Document(msgspec.Struct):
    machine: dict[str, Any]
    #: what it was measured on: `kind` is "mock" or "kafka", `name` is for readers
    broker: dict[str, Any]
    plan: dict[str, Any]
    seconds: float
    sections: list[Section]

    @property
    def on_kafka(self) -> bool:
        return bool(self.broker["kind"] == "kafka")

    def find(self, measure: str, **settings: Any) -> Iterator[Section]:
        """The sections of a measure, those with these settings."""
        for section in self.sections:
            if section.measure == measure and section.settings.items() >= settings.items():
                yield section


def read(path: Path) -> Document:
    return msgspec.json.decode(path.read_bytes(), type=Document)


def write(path: Path, document: Document) -> None:
    """One line for each section."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = msgspec.json.encode(msgspec.structs.replace(document, sections=[])).removesuffix(b"]}")
    sections = b",\n".join(msgspec.json.encode(section) for section in document.sections)
    path.write_bytes(head + b"\n" + sections + b"\n]}\n")


def merge(first: Document, second: Document) -> Document:
    """Both runs' sections; where both have the same, the second's. What is said of machine and plan is the second's."""
    sections = {_key(section): section for section in (*first.sections, *second.sections)}
    seconds = first.seconds + second.seconds
    return msgspec.structs.replace(second, seconds=seconds, sections=list(sections.values()))


def _key(section: Section) -> tuple[str, str]:
    return section.measure, section.title


def lines_of(section: Section, side: str, *, in_flight: bool | None = None) -> list[Line]:
    """A side's lines: with several batches in flight, or one at a time."""
    return [
        line for line in section.lines if line.side == side and (in_flight is None or bool(line.window) == in_flight)
    ]


def linger_ms(line: Line) -> str:
    """The linger time that was set, "0" if none was: so kbatch and the C loop have it."""
    return str(line.options.get("config", {}).get("linger.ms", line.options.get("linger_ms", 0)))


def fastest(lines: list[Line]) -> Line:
    return max(lines, key=lambda line: line.rate)


def latency_of(section: Section, side: str) -> list[LatencyLine]:
    return [line for line in section.latencies if line.side == side]
