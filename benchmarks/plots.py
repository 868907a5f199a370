"""Draws what a run found: `python -m benchmarks.plots RESULTS.json FOLDER`.

The same results make the same bytes with the same matplotlib. Text stays text, so that the files are small.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.figures import Figure as Found
from benchmarks.figures import Line, Section
from benchmarks.results import Document, fastest, lines_of, linger_ms, read

#: Okabe and Ito's colours, which the colour-blind tell apart.
COLORS = {
    "kbatch": "#d55e00",
    "cloop": "#555555",
    "recycling": "#a0a0a0",
    "confluent": "#0072b2",
    "aioproducer": "#56b4e9",
    "aiokafka": "#009e73",
    "faststream": "#cc79a7",
    "java": "#b8a400",
    "control": "#999999",
    "sender": "#d55e00",
    "sender_aio": "#e69f00",
    "produce": "#0072b2",
}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kbatch",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.facecolor": "white",
}

Plot = Callable[[Document], Figure | None]


def _thousands(value: float, _position: int | None = None) -> str:
    if value >= 1_000_000:
        return f"{value / 1e6:g} M"
    return f"{value / 1000:g} k" if value >= 1000 else f"{value:g}"


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)
    return figure, list(axes[0])


def _curve(axes: Axes, xs: list[float], lines: list[Line], label: str, color: str, style: str = "-") -> None:
    """Medians with the range of the turns."""
    _medians(axes, xs, [(line.lowest, line.rate, line.highest) for line in lines], label, color, style)


def _medians(
    axes: Axes, xs: list[float], values: list[tuple[float, float, float]], label: str, color: str, style: str = "-"
) -> None:
    """Of lowest, median and highest."""
    middle = [value for _, value, _ in values]
    below = [value - lowest for lowest, value, _ in values]
    above = [highest - value for _, value, highest in values]
    axes.errorbar(
        xs, middle, yerr=[below, above], label=label, color=color, linestyle=style, marker="o", markersize=4,
        linewidth=1.6, elinewidth=0.7, capsize=2,
    )  # fmt: skip


def _legend_below(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2)


def throughput_by_batch_size(document: Document) -> Figure | None:
    sections = sorted(document.find("loops", headers=8), key=lambda section: int(section.settings["batch"]))
    if len(sections) < 2:
        return None
    sizes = [float(section.settings["batch"]) for section in sections]
    figure, (axes,) = _panels(1, 6.4, 4.2)
    for label, side, in_flight, style in (
        ("kbatch, 5,000 in flight", "kbatch", True, "-"),
        ("kbatch, one batch at a time", "kbatch", False, "--"),
        ("C loop, 5,000 in flight", "cloop", True, "-"),
        ("C loop, one batch at a time", "cloop", False, "--"),
        ("C loop that recycles header lists, 5,000 in flight", "recycling", True, "-"),
        ("C loop that recycles header lists, one batch at a time", "recycling", False, "--"),
        ("confluent-kafka, the faster form", "confluent", None, "-"),
    ):
        found = [lines_of(section, side, in_flight=in_flight) for section in sections]
        if not all(found):
            continue
        lines = [fastest(each) for each in found]
        _curve(axes, sizes, lines, label, COLORS[side], style)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.set_xlabel("messages in a batch")
    axes.set_title(f"Acknowledged messages per second, 8 headers, {document.broker['name']}")
    _legend_below(axes)
    return figure


def _bars(axes: Axes, bars: Sequence[tuple[str, float, str, str]]) -> None:
    """A bar for each of label, value, colour and what stands at its end; the first is at the top."""
    for at, (_, value, color, text) in enumerate(reversed(bars)):
        axes.barh(at, value, color=color, height=0.66)
        axes.text(max(0.0, value), at, f" {text}", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [label for label, *_ in reversed(bars)])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, max(value for _, value, *_ in bars) * 1.17)


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=10)


def _rates(axes: Axes, section: Section) -> None:
    ordered = sorted(section.lines, key=lambda line: -line.rate)
    _bars(
        axes,
        [(_short(line), line.rate, COLORS[line.side], _thousands(float(f"{line.rate:.3g}"))) for line in ordered],
    )
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))


def rivals(document: Document) -> Figure | None:
    sections = sorted(document.find("rivals"), key=lambda section: -int(section.settings["headers"]))
    if not sections:
        return None
    figure, panels = _panels(len(sections), 4.9 * len(sections), 3.6)
    for axes, section in zip(panels, sections, strict=True):
        _rates(axes, section)
        headers = section.settings["headers"]
        axes.set_title(f"{headers} headers" if headers else "no headers")
    batch = sections[0].settings["batch"]
    _title(figure, f"Acknowledged messages per second, batches of {batch:,}, {document.broker['name']}")
    return figure


def _short(line: Line) -> str:
    return {"kbatch": "kbatch", "cloop": "C loop", "recycling": "C loop, recycling"}.get(
        line.side, line.label.replace(", publish_batch", "")
    )


def throughput_by_round_trip(document: Document) -> Figure | None:
    sections = sorted(document.find("round_trips"), key=lambda section: float(section.settings["rtt_ms"]))
    if len(sections) < 2:
        return None
    trips = [float(section.settings["rtt_ms"]) for section in sections]
    figure, panels = _panels(2, 9.6, 4.2)
    for axes, in_flight in zip(panels, (True, False), strict=True):
        for linger, style in (("0", "-"), ("1", "--"), ("5", ":")):
            lines = [_lingering(section, "kbatch", in_flight, linger) for section in sections]
            _curve(axes, trips, lines, f"kbatch, linger {linger} ms", COLORS["kbatch"], style)
        _curve(axes, trips, [_lingering(each, "cloop", in_flight, "0") for each in sections], "C loop, linger 0 ms",
               COLORS["cloop"])  # fmt: skip
        rival = [lines_of(section, "confluent") for section in sections]
        if in_flight and all(rival):
            lines = [fastest(found) for found in rival]
            window, linger = lines[0].window, linger_ms(lines[0])
            label = f"confluent-kafka, linger {linger} ms, {window:,} in flight"
            _curve(axes, trips, lines, label, COLORS["confluent"])
        axes.set_xticks(trips, [f"{trip:g}" for trip in trips])
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(_thousands))
        axes.set_xlabel("round trip, ms more than loopback")
        how = "5,000 messages in flight" if in_flight else "one batch at a time"
        axes.set_title(how)
        _legend_below(axes)
    batch = sections[0].settings["batch"]
    _title(figure, f"Acknowledged messages per second, batches of {batch:,}, 8 headers, {document.broker['name']}")
    return figure


def _lingering(section: Section, side: str, in_flight: bool, linger: str) -> Line:
    return next(line for line in lines_of(section, side, in_flight=in_flight) if linger_ms(line) == linger)


def latency(document: Document) -> Figure | None:
    sections = sorted(document.find("latency"), key=lambda section: int(section.settings["batch"]))
    if not sections:
        return None
    figure, panels = _panels(len(sections), 3.6 * len(sections), 2.6)
    for axes, section in zip(panels, sections, strict=True):
        # the C loop with kbatch at its rate, then confluent-kafka with kbatch at that one's
        ordered = list(reversed(section.latencies))
        for at, line in enumerate(ordered):
            color = COLORS[line.side]
            axes.plot([line.call_p50, line.call_p99], [at, at], color=color, linewidth=2)
            axes.plot([line.call_p50], [at], marker="o", color=color, linestyle="")
            axes.plot([line.call_p99], [at], marker="|", color=color, linestyle="", markersize=9, markeredgewidth=2)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        names = {"kbatch": "kbatch", "cloop": "C loop", "confluent": "confluent-kafka"}
        labels = [f"{names[line.side]}, {line.batches_per_s:,.0f}/s" for line in ordered]
        axes.set_yticks(range(len(ordered)), labels)
        axes.set_ylim(-0.6, len(ordered) - 0.4)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("ms")
        batch = section.settings["batch"]
        axes.set_title(f"batches of {batch:,}" if batch > 1 else "one message at a time")
    _title(figure, f"From the call to its answer, p50 (dot) to p99 (bar), {document.broker['name']}")
    return figure


def senders(document: Document) -> Figure | None:
    sections = sorted(document.find("senders"), key=lambda section: float(section.settings["rtt_ms"]))
    if not sections:
        return None
    figure, panels = _panels(len(sections), 2.6 + 2.6 * len(sections), 4.2)
    for axes, section in zip(panels, sections, strict=True):
        bars = [
            (line.label, line.rate, COLORS[line.side], _thousands(float(f"{line.rate:.3g}"))) for line in section.lines
        ]
        _bars(axes, bars)
        if section is not sections[0]:
            axes.set_yticklabels([])
        axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
        axes.set_title(f"round trip {section.settings['rtt_ms']} ms more")
    _title(figure, f"Acknowledged messages per second, one send each, {document.broker['name']}")
    return figure


def gil(document: Document) -> Figure | None:
    section = next(document.find("gil"), None)
    if section is None:
        return None
    figure, (axes,) = _panels(1, 6.4, 2.4)
    _standing_still(axes, section)
    _title(figure, f"{GIL_TITLE}, {document.broker['name']}")
    return figure


GIL_TITLE = "How long another Python thread stands still for the GIL, per message"


def _standing_still(axes: Axes, section: Section) -> None:
    bars = []
    for still, line in zip(section.figures, section.lines, strict=True):
        label = "control" if line.side == "control" else line.label
        bars.append((label, still.value, COLORS[line.side], f"{still.value:.2f} µs"))
    _bars(axes, bars)
    axes.set_xlabel("µs")


def summary(kafka: Document, mock: Document) -> Figure | None:
    """What is shown to those who read no further: rates on a real broker, and the GIL."""
    rates, still = next(kafka.find("rivals", headers=8), None), next(mock.find("gil"), None)
    if rates is None or still is None:
        return None
    figure, (left, right) = _panels(2, 9.8, 2.6)
    _rates(left, rates)
    left.set_title(f"Acknowledged messages per second, {kafka.broker['name']}")
    _standing_still(right, still)
    right.set_title("GIL taken, per message")
    return figure


def linger(document: Document) -> Figure | None:
    sections = list(document.find("linger"))
    if not sections:
        return None
    trips = sorted({section.settings["rtt_ms"] for section in sections})
    figure, panels = _panels(len(trips), 4.8 * len(trips), 3.4)
    for axes, trip in zip(panels, trips, strict=True):
        chosen = [section for section in sections if section.settings["rtt_ms"] == trip]
        for at, section in enumerate(reversed(chosen)):
            count = len(section.lines)
            for number, line in enumerate(section.lines):
                middle = at + 0.8 * ((count - 1) / 2 - number) / count
                axes.barh(middle, line.rate / section.lines[0].rate, height=0.72 / count, color=COLORS["kbatch"],
                          alpha=1 - number / count, label=line.label if at == 0 else None)  # fmt: skip
        axes.set_yticks(range(len(chosen)), [section.settings["workload"] for section in reversed(chosen)])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.axvline(1, color="#555555", linewidth=0.8)
        axes.set_title(f"round trip {trip:g} ms more" if trip else "loopback")
    panels[0].legend(loc="upper left", bbox_to_anchor=(0, -0.1), ncols=4)
    _title(figure, f"kbatch's throughput by linger.ms, 0 ms = 1, {document.broker['name']}")
    return figure


def codecs(document: Document) -> Figure | None:
    sections = sorted(document.find("codecs"), key=lambda section: int(section.settings["batch"]))
    if not sections:
        return None
    figure, panels = _panels(len(sections), 4.4 * len(sections), 2.8)
    for axes, section in zip(panels, sections, strict=True):
        names: list[str] = []
        for line in lines_of(section, "kbatch"):
            codec = line.options["config"]["compression.type"]
            its = next(each for each in lines_of(section, "cloop") if each.options == line.options)
            axes.bar(len(names) - 0.2, line.rate, width=0.38, color=COLORS["kbatch"], label=None if names else "kbatch")
            axes.bar(len(names) + 0.2, its.rate, width=0.38, color=COLORS["cloop"], label=None if names else "C loop")
            names.append(codec)
        axes.set_xticks(range(len(names)), names)
        axes.grid(visible=False, axis="x")
        axes.yaxis.set_major_formatter(FuncFormatter(_thousands))
        axes.set_title(f"batches of {section.settings['batch']:,}")
    panels[0].legend(loc="upper left", bbox_to_anchor=(0, -0.1), ncols=2)
    _title(figure, f"Messages/s by codec, 5,000 in flight, {document.broker['name']}")
    return figure


def _over(document: Document, measure: str, setting: str, label: str, title: str, *, log: bool) -> Figure | None:
    """The rates of a section over what it varies, which its first figures are about."""
    section = next(document.find(measure), None)
    if section is None:
        return None
    xs = [float(each) for each in section.settings[setting]]
    found = section.figures[: len(xs)]
    figure, (axes,) = _panels(1, 6.4, 2.8)
    _medians(axes, xs, [(each.lowest, each.value, each.highest) for each in found], "kbatch", COLORS["kbatch"])
    if log:
        axes.set_xscale("log")
    axes.set_xticks(xs, [_thousands(x) for x in xs])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.set_xlabel(label)
    _title(figure, f"{title}, {document.broker['name']}")
    return figure


def outbox_backlog(document: Document) -> Figure | None:
    title = "Rows that a relay sends per second, PostgreSQL"
    return _over(document, "outbox-backlog", "rows", "rows in the outbox", title, log=True)


def outbox_relays(document: Document) -> Figure | None:
    title = "Rows that all relays send per second, PostgreSQL"
    return _over(document, "outbox-relays", "relays", "relays, a process each", title, log=False)


def _color(name: str) -> str:
    """Of what a figure is about, by its name."""
    if "by hand" in name:
        return COLORS["confluent"]
    words = {"kbatch": "kbatch", "FastStream": "faststream", "confluent": "confluent", "aiokafka": "aiokafka",
             "without": "cloop", "awaits": "cloop"}  # fmt: skip
    return COLORS[next((side for word, side in words.items() if word in name), "kbatch")]


def _figure_bars(
    document: Document, measure: str, setting: str, title: str, text: Callable[[float], str]
) -> Figure | None:
    """Bars of a section's first figures, which are those of what its setting names."""
    section = next(document.find(measure), None)
    if section is None:
        return None
    names = section.settings[setting]
    figure, (axes,) = _panels(1, 6.8, 0.9 + 0.26 * len(names))
    found: list[tuple[str, Found]] = list(zip(names, section.figures, strict=False))
    _bars(axes, [(name, each.value, _color(name), text(each.value)) for name, each in found])
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    _title(figure, f"{title}, {document.broker['name']}")
    return figure


def _rounded(value: float) -> str:
    return _thousands(float(f"{value:.3g}"))


def outbox_whole(document: Document) -> Figure | None:
    title = "Orders per second from transactions through Kafka to invoices"
    return _figure_bars(document, "outbox-whole", "ways", title, _rounded)


def outbox_fencing(document: Document) -> Figure | None:
    return _figure_bars(document, "outbox-fencing", "ways", "Rows that a relay sends per second", _rounded)


def reading_rates(document: Document) -> Figure | None:
    return _figure_bars(document, "reading-rates", "sides", "Records read and decoded per second", _rounded)


def reading_gil(document: Document) -> Figure | None:
    title = "How long another Python thread stands still for the GIL, per record read (µs)"
    return _figure_bars(document, "reading-gil", "sides", title, lambda value: f"{value:.2f} µs")


def inbox_handling(document: Document) -> Figure | None:
    return _figure_bars(document, "inbox-handling", "ways", "Messages handled per second", _rounded)


def reading_memory(document: Document) -> Figure | None:
    section = next(document.find("reading-memory"), None)
    if section is None:
        return None
    figure, (axes,) = _panels(1, 6.4, 2.4)
    values = section.details["resident_mib"]
    between = section.details["records_between"]
    axes.plot([between * (n + 1) for n in range(len(values))], values, color=COLORS["kbatch"], linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.set_xlabel("records read")
    _title(figure, f"Resident memory while a consumer reads, MiB, {document.broker['name']}")
    return figure


def inbox_half_load(document: Document) -> Figure | None:
    section = next(document.find("inbox-half-load"), None)
    if section is None:
        return None
    names = list(reversed(section.settings["ways"]))
    figure, (axes,) = _panels(1, 7.2, 0.9 + 0.3 * len(names))
    for at, number in enumerate(reversed(range(len(names)))):
        p50, p99 = (section.figures[3 * number + each].value for each in (0, 1))
        axes.plot([p50, p99], [at, at], color=COLORS["kbatch"], linewidth=2)
        axes.plot([p50], [at], marker="o", color=COLORS["kbatch"], linestyle="")
        axes.plot([p99], [at], marker="|", color=COLORS["kbatch"], linestyle="", markersize=9, markeredgewidth=2)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("ms")
    _title(figure, f"From sent to handled at half load, p50 (dot) to p99 (bar), {document.broker['name']}")
    return figure


PLOTS: dict[str, Plot] = {
    "batch-size": throughput_by_batch_size,
    "rivals": rivals,
    "round-trip": throughput_by_round_trip,
    "latency": latency,
    "senders": senders,
    "gil": gil,
    "linger": linger,
    "codecs": codecs,
    "outbox-whole": outbox_whole,
    "outbox-backlog": outbox_backlog,
    "outbox-relays": outbox_relays,
    "outbox-fencing": outbox_fencing,
    "reading-rates": reading_rates,
    "reading-gil": reading_gil,
    "reading-memory": reading_memory,
    "inbox-handling": inbox_handling,
    "inbox-half-load": inbox_half_load,
}


def draw(source: Path, folder: Path) -> Iterator[Path]:
    """Writes a file for each plot that the results have figures for, `NAME-mock.svg` or `NAME-kafka.svg`. Each names
    the results by their SHA-256."""
    document = read(source)
    for name, plot in PLOTS.items():
        yield from _save(folder / f"{name}-{document.broker['kind']}.svg", partial(plot, document), source)


def draw_summary(kafka: Path, mock: Path, folder: Path) -> Iterator[Path]:
    """Writes the plot that takes both."""
    yield from _save(folder / "summary.svg", lambda: summary(read(kafka), read(mock)), kafka, mock)


def _save(path: Path, plot: Callable[[], Figure | None], *sources: Path) -> Iterator[Path]:
    with mpl.rc_context(STYLE):
        figure = plot()
        if figure is not None:
            digests = " ".join(hashlib.sha256(source.read_bytes()).hexdigest() for source in sources)
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None, "Source": digests})
            yield path


if __name__ == "__main__":
    for written in draw(Path(sys.argv[1]), Path(sys.argv[2])):
        print(written)
