"""Plots from results: `make bench-test`. They need matplotlib, so they are no part of the suite."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import docs, plots
from benchmarks.figures import Figure, LatencyLine, Line, Section
from benchmarks.measures import CODECS, LINGERS_MS, MEASURES
from benchmarks.results import Document, read, write

SVG = "{http://www.w3.org/2000/svg}"


def line(
    label: str,
    side: str,
    config: dict[str, str] | None = None,
    *,
    rate: float = 200_000.0,
    batch: int = 1_000,
    window: int = 0,
) -> Line:
    return Line(
        label=label, side=side, batch=batch, window=window, headers=8, options={"config": config} if config else {},
        rate=rate, lowest=0.9 * rate, highest=1.2 * rate, cpu_us=4.0, broker_cpu_us=1.0, peak_mib=50.0, sending_mib=9.0,
        foreign=0.0, rates=[],
    )  # fmt: skip


def senders(batch: int) -> list[Line]:
    both = [line("", side, batch=batch, window=window) for side in ("kbatch", "cloop", "recycling")
            for window in (0, 9)]  # fmt: skip
    return [*both, line("its best", "confluent", batch=batch, window=50_000)]


def late(side: str) -> LatencyLine:
    return LatencyLine(
        label=side, side=side, batch=1, batches_per_s=1_000.0, batches=9, p50=150.0, p99=900.0, longest=1_000.0,
        call_p50=140.0, call_p99=800.0, foreign=0.0, p50s=[], p99s=[],
    )  # fmt: skip


def lingering(rtt_ms: int) -> list[Line]:
    return [
        line("", "kbatch", {"linger.ms": str(ms)}, window=window, rate=1e5 / (1 + rtt_ms + ms))
        for ms in LINGERS_MS
        for window in (0, 9)
    ]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Results with every measure that is drawn."""
    sections = [Section("", "loops", {"batch": batch, "headers": 8}, senders(batch)) for batch in (100, 1_000, 10_000)]
    sections += [Section("", "loops", {"batch": 100, "headers": 0}, senders(100))]
    sections += [Section("", "rivals", {"batch": 1_000, "headers": headers}, senders(1_000)) for headers in (8, 0)]
    sections += [
        Section("", "round_trips", {"batch": 1_000, "rtt_ms": ms}, [*senders(1_000)[2:], *lingering(ms)])
        for ms in (0, 1, 5)
    ]
    sections += [
        Section("", "latency", {"batch": batch}, latencies=[late(side) for side in ("cloop", "kbatch", "confluent")])
        for batch in (1, 100)
    ]
    still = [Figure("kbatch", 0.9, 0.8, 1.0, " µs"), Figure("control", -0.01, -0.01, 0.0, " µs")]
    sections += [Section("", "gil", {}, [line("kbatch", "kbatch"), line("control", "control")], figures=still)]
    one_by_one = [line("C loop", "cloop"), line("BatchedSender", "sender"), line("errors only", "produce")]
    sections += [Section("", "senders", {"rtt_ms": ms}, one_by_one) for ms in (0, 1)]
    by_linger = [line(f"linger {ms} ms", "kbatch", {"linger.ms": str(ms)}) for ms in LINGERS_MS]
    sections += [Section("", "linger", {"rtt_ms": ms, "workload": "batches of 10"}, by_linger) for ms in (0, 1)]
    by_codec = [line("", side, {"compression.type": codec}) for codec in CODECS for side in ("kbatch", "cloop")]
    sections += [Section("", "codecs", {"batch": 1_000}, by_codec)]
    rate = Figure("50,000 rows, rows/s", 120_000.0, 100_000.0, 140_000.0, digits=0)
    milliseconds = Figure("p50", 3.0, 3.0, 3.0, " ms")
    sections += [
        Section("", "outbox-whole", {"ways": ["SQLite: kbatch", "SQLite: that awaits"]}, figures=2 * [rate]),
        Section("", "outbox-backlog", {"rows": [50_000, 5_000_000]}, figures=[rate, rate]),
        Section("", "outbox-relays", {"relays": [1, 2, 4]}, figures=3 * [rate]),
        Section("", "outbox-fencing", {"ways": ["without", "with fencing"]}, figures=2 * [rate]),
        Section("", "reading-rates", {"sides": ["kbatch.Listener", "FastStream"]}, figures=2 * [rate]),
        Section("", "reading-gil", {"sides": ["kbatch.Listener", "FastStream"]}, figures=2 * [rate]),
        Section("", "reading-memory", figures=[rate], details={"resident_mib": [90.0, 91.0], "records_between": 9}),
        Section("", "inbox-handling", {"ways": ["SQLite: kbatch", "SQLite: by hand"]}, figures=2 * [rate]),
        Section("", "inbox-half-load", {"ways": ["SQLite"]}, figures=3 * [milliseconds]),
    ]
    path = tmp_path / "results.json"
    write(path, Document({}, {"kind": "mock", "name": "mock cluster"}, {}, 1.0, sections))
    return path


def texts(path: Path) -> str:
    return " ".join("".join(each.itertext()) for each in ElementTree.parse(path).iter(f"{SVG}text"))


def test_every_plot_is_drawn_from_results_that_have_its_measure(results: Path, tmp_path: Path) -> None:
    drawn = {path.name: path for path in plots.draw(results, tmp_path / "plots")}
    assert list(drawn) == [f"{name}-mock.svg" for name in plots.PLOTS]
    for path in drawn.values():
        assert "mock cluster" in texts(path) or "GIL" in texts(path)
        assert path.stat().st_size < 60_000, path.name


def test_plots_show_what_the_results_say(results: Path, tmp_path: Path) -> None:
    drawn = {path.name: texts(path) for path in plots.draw(results, tmp_path)}
    assert "kbatch, one batch at a time" in drawn["batch-size-mock.svg"]
    assert "200 k" in drawn["rivals-mock.svg"]
    assert "0.90 µs" in drawn["gil-mock.svg"]
    assert all(codec in drawn["codecs-mock.svg"] for codec in CODECS)
    assert all(f"kbatch, linger {ms} ms" in drawn["round-trip-mock.svg"] for ms in LINGERS_MS)


def test_the_same_results_make_the_same_files(results: Path, tmp_path: Path) -> None:
    one, other = (
        {path.name: path.read_bytes() for path in plots.draw(results, tmp_path / folder)} for folder in ("one", "other")
    )
    assert one
    assert one == other
    changed = read(results)
    changed.seconds = 2.0
    write(results, changed)
    assert all(path.read_bytes() != one[path.name] for path in plots.draw(results, tmp_path / "changed"))


def test_the_summary_takes_both(results: Path, tmp_path: Path) -> None:
    (summary,) = plots.draw_summary(results, results, tmp_path)
    assert "0.90 µs" in texts(summary)
    assert "200 k" in texts(summary)


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write(path, Document({}, {"kind": "kafka", "name": "Apache Kafka"}, {}, 1.0, []))
    assert list(plots.draw(path, tmp_path)) == []
    assert list(plots.draw_summary(path, path, tmp_path)) == []


def test_results_are_read_as_they_were_written(results: Path, tmp_path: Path) -> None:
    document = read(results)
    write(tmp_path / "again.json", document)
    assert (tmp_path / "again.json").read_bytes() == results.read_bytes()
    assert len(document.sections) == len(results.read_bytes().splitlines()) - 2


def test_page_and_plots_are_made_from_what_is_kept(results: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mock.json").write_bytes(results.read_bytes())
    (kept / "old.svg").write_text("<svg/>")
    page = tmp_path / "page.md"
    page.write_text("<!-- figures: mock codecs -->\n<!-- end -->\n")
    written = {path.name for path in docs.write(kept, page)}
    assert written == {"page.md", *(f"{name}-mock.svg" for name in plots.PLOTS)}
    assert not (kept / "old.svg").exists()
    assert "| 200,000 |" in page.read_text()


def test_outbox_reading_and_inbox_are_kept_apart_and_drawn_from_there(results: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    for file, document in docs.parted(read(results)):
        write(kept / f"{file}.json", document)
    assert sorted(path.stem for path in kept.iterdir()) == ["inbox-mock", "mock", "outbox-mock", "reading-mock"]
    page = tmp_path / "page.md"
    page.write_text("<!-- figures: outbox-mock outbox-backlog -->\n<!-- end -->\n")
    written = {path.name for path in docs.write(kept, page)}
    assert written == {"page.md", *(f"{name}-mock.svg" for name in plots.PLOTS)}
    assert "| 50,000 rows, rows/s | 120,000 | 100,000 to 140,000 |" in page.read_text()
    assert "(benchmarks/outbox-backlog-mock.svg)" in page.read_text()
    assert "5 M" in texts(kept / "outbox-backlog-mock.svg")
    assert "FastStream" in texts(kept / "reading-rates-mock.svg")


def test_every_file_and_measure_that_the_page_names_is_there(results: Path) -> None:
    page = docs.PAGE.read_text(encoding="utf-8")
    regions = re.findall(r"<!-- figures: ([\w-]+) ([\w-]+) -->", page)
    assert {file for file, _ in regions} <= set(docs.FILES)
    for measure in MEASURES:
        if measure.startswith(docs.PARTS):
            assert any(each == measure for _, each in regions), measure
    for name in re.findall(r"\(benchmarks/([\w-]+)\.svg\)", page):
        assert name == "summary" or name.rpartition("-")[0] in plots.PLOTS, name
