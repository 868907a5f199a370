"""Puts the figures of runs into docs/benchmarks.md: `make bench-docs`, or `python -m benchmarks.docs RESULTS.json ...`.

The results are kept in docs/benchmarks/: `mock.json` and `kafka.json`, and what concerns outbox, reading and inbox in
files of their own, as `outbox-mock.json`, since each may be measured alone. Plots and tables are made from these, so
that they cannot differ. On the page a table stands between `<!-- figures: kafka rivals -->` and `<!-- end -->`: the
file, and a measure of `measures.py`. Of several results for one file the later ones replace what they have anew; a file
that is kept is replaced as a whole, if any result is for it. Without arguments everything is made again from what is
kept.
"""

import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from benchmarks import results
from benchmarks.figures import Figure, LatencyLine, Line, Section
from benchmarks.results import Document

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
KEPT = ROOT / "docs" / "benchmarks"
KINDS = ("kafka", "mock")
#: What is kept apart, by what the names of its measures begin with.
PARTS = ("outbox", "reading", "inbox")
FILES = (*KINDS, *(f"{part}-{kind}" for part in PARTS for kind in KINDS))
_REGION = re.compile(r"(<!-- figures: ([\w-]+) ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def _rates(lines: list[Line]) -> str:
    head = ("", "messages/s", "lowest to highest", "CPU µs", "broker's CPU µs", "peak MiB", "of it to send", "others")
    return _table(
        head,
        [
            (
                line.label,
                f"{_round(line.rate)}",
                f"{_round(line.lowest)} to {_round(line.highest)}",
                f"{line.cpu_us:.2f}",
                f"{line.broker_cpu_us:.2f}",
                f"{line.peak_mib:.0f}",
                f"{line.sending_mib:.0f}",
                f"{line.foreign:.0%}",
            )
            for line in lines
        ],
    )


def _latencies(lines: list[LatencyLine]) -> str:
    head = ("µs", "batches/s", "call p50", "call p99", "p50 since due", "p99 since due", "longest", "batches")
    return _table(
        head,
        [
            (
                line.label,
                f"{line.batches_per_s:,.0f}",
                *(
                    f"{value:,.0f}"
                    for value in (line.call_p50, line.call_p99, line.p50, line.p99, line.longest, line.batches)
                ),
            )
            for line in lines
        ],
    )


def _figures(figures: list[Figure]) -> str:
    rows = []
    for found in figures:
        value, low, high = (f"{each:,.{found.digits}f}" for each in (found.value, found.lowest, found.highest))
        spread = f"{low} to {high}" if found.lowest != found.highest else ""
        wanted = "" if found.target is None else f"{'≤' if found.at_most else '≥'} {found.target:g}{found.unit}"
        rows.append((found.name.strip(), f"{value}{found.unit}", spread, wanted))
    targets = any(row[-1] for row in rows)
    head = ("", "median", "range", "target")
    return _table(head, rows) if targets else _table(head[:-1], [row[:-1] for row in rows])


def _round(rate: float) -> str:
    """Three digits: the others are noise."""
    digits = max(0, len(f"{rate:.0f}") - 3)
    return f"{round(rate, -digits):,.0f}"


def render(section: Section) -> str:
    parts = [f"**{section.title}**"]
    if section.lines:
        parts.append(_rates(section.lines))
    if section.latencies:
        parts.append(_latencies(section.latencies))
    if section.figures:
        parts.append(_figures(section.figures))
    parts += ["\n".join(f"- {note}" for note in section.notes)] if section.notes else []
    return "\n\n".join(parts)


def machine(document: Document) -> str:
    about, broker = document.machine, document.broker
    loads = [section.details["load"] for section in document.sections if "load" in section.details]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    parts = [
        f"- {broker['name']}, measured {about['time']} in {document.seconds / 60:.0f} minutes; "
        f"load {about['load']:.1f} before"
        + (f", {min(loads):.1f} to {max(loads):.1f} after each part" if loads else ""),
        f"- {about['processors']} x {about['processor']}, {about['memory_gib']:.0f} GiB, {about['system']}, "
        f"{about['libc']}; a cache line from one processor to another and back: {about['line_round_trip_ns']:.0f} ns",
        f"- Python {about['python']}, librdkafka {about['librdkafka']}, {versions}",
    ]
    if peak := max((line.broker_peak_mib for section in document.sections for line in section.lines), default=0.0):
        parts.append(f"- the broker's process had {peak:,.0f} MiB of memory at most")
    if document.on_kafka:
        options = " ".join(broker["java_options"])
        parts.append(f"- {broker['java']}, heap {broker['heap_mb']} MiB, {options}; logs on {broker['folder']}")
    return "\n".join(parts)


def region(document: Document | None, measure: str, plot: str = "") -> str:
    if document is None:
        return "Not measured yet."
    if measure == "machine":
        return machine(document)
    found = [render(section) for section in document.find(measure)]
    if not found:
        return "Not measured in this run."
    return "\n\n".join([f"![{measure}](benchmarks/{plot}.svg)", *found] if plot else found)


def fill(page: str, documents: Mapping[str, Document], drawn: Collection[str] = ()) -> str:
    """The page with the figures of these documents. What is kept apart has its plots, of those that are drawn, before
    its tables; of the others the page itself says where they stand."""

    def replace(match: re.Match[str]) -> str:
        opening, file, measure, end = match.groups()
        if file not in FILES:
            raise ValueError(f"no such file of results: {file}")
        plot = f"{measure}-{file.rpartition('-')[2]}"
        shown = plot if file not in KINDS and plot in drawn else ""
        return f"{opening}\n{region(documents.get(file), measure, shown)}\n\n{end}"

    return _REGION.sub(replace, page)


def kept(folder: Path = KEPT) -> dict[str, Document]:
    return {file: results.read(path) for file in FILES if (path := folder / f"{file}.json").exists()}


def parted(document: Document) -> Iterator[tuple[str, Document]]:
    """Which file what belongs to."""
    kind = document.broker["kind"]
    for part in ("", *PARTS):
        sections = [section for section in document.sections if _part(section.measure) == part]
        if sections:
            seconds = sum(section.details.get("seconds", 0.0) for section in sections) or document.seconds
            yield (
                f"{part}-{kind}" if part else kind,
                msgspec.structs.replace(document, sections=sections, seconds=seconds),
            )


def _part(measure: str) -> str:
    name = measure.partition("-")[0]
    return name if name in PARTS else ""


def write(folder: Path = KEPT, page: Path = PAGE) -> Iterator[Path]:
    """Makes plots and tables anew from what is kept."""
    from benchmarks import plots  # matplotlib, which nobody else here needs

    documents = kept(folder)
    for old in folder.glob("*.svg"):
        old.unlink()
    drawn = [path for file in documents for path in plots.draw(folder / f"{file}.json", folder)]
    yield from drawn
    if all(kind in documents for kind in KINDS):
        yield from plots.draw_summary(folder / "kafka.json", folder / "mock.json", folder)
    names = {path.stem for path in drawn}
    page.write_text(fill(page.read_text(encoding="utf-8"), documents, names), encoding="utf-8")
    yield page


def main(arguments: Sequence[str]) -> None:
    found: dict[str, Document] = {}
    for name in arguments:
        for file, document in parted(results.read(Path(name))):
            found[file] = results.merge(found[file], document) if file in found else document
    for file, document in found.items():
        results.write(KEPT / f"{file}.json", document)
    for path in write():
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main(sys.argv[1:])
