"""The figures in the documentation are those of the results that are kept beside it."""

import hashlib
import re

import pytest

from benchmarks import docs, results
from benchmarks.figures import Figure, LatencyLine, Line, Section
from benchmarks.results import Document

BROKERS = docs.kept()


def section(rate: float = 123_456.0) -> Section:
    line = Line(
        label="kbatch, one at a time", side="kbatch", batch=10, window=0, headers=8, options={}, rate=rate,
        lowest=99_000.0, highest=1_500_000.0, cpu_us=1.234, broker_cpu_us=0.5, peak_mib=48.6, sending_mib=9.9,
        foreign=0.01, rates=[1],
    )  # fmt: skip
    late = LatencyLine(
        label="C loop", side="cloop", batch=1, batches_per_s=2_000.0, batches=11, p50=150.2, p99=1_234.5,
        longest=9_999.0, call_p50=140.0, call_p99=1_000.0, foreign=0.0, p50s=[], p99s=[],
    )  # fmt: skip
    ratio = Figure("kbatch / C loop", 0.951, 0.9, 1.0, target=0.9)
    return Section("Batches", "loops", {"batch": 10}, [line], [late], [ratio], ["a note"])


def document(*sections: Section) -> Document:
    return Document({}, {"kind": "mock", "name": "mock cluster"}, {}, 1.0, list(sections))


@pytest.mark.parametrize(
    ("figure", "far_off"),
    [
        (Figure("", 0.5, 0, 1, target=1.0), False),
        (Figure("", 0.49, 0, 1, target=1.0), True),
        (Figure("", 2.0, 0, 9, target=1.0, at_most=True), False),
        (Figure("", 2.1, 0, 9, target=1.0, at_most=True), True),
        (Figure("", 1.0, 0, 9, target=8.0, least=1.0), False),
        (Figure("", 0.9, 0, 9, target=8.0, least=1.0), True),
        (Figure("", 0.1, 0, 9, least=1.0), False),
    ],
)
def test_a_check_allows_for_a_factor_of_two(figure: Figure, far_off: bool):
    assert figure.is_far_off == far_off


def test_a_section_becomes_tables():
    text = docs.render(section())
    assert "| kbatch, one at a time | 123,000 | 99,000 to 1,500,000 | 1.23 | 0.50 | 49 | 10 | 1% |" in text
    assert "| C loop | 2,000 | 140 | 1,000 | 150 | 1,234 | 9,999 | 11 |" in text
    assert "| kbatch / C loop | 0.95 | 0.90 to 1.00 | ≥ 0.9 |" in text
    assert text.endswith("- a note")


def test_only_what_stands_between_the_marks_is_rewritten():
    page = "before\n<!-- figures: mock loops -->\nold | table\n<!-- end -->\nafter\n"
    filled = docs.fill(page, {"mock": document(section())})
    assert filled.startswith("before\n<!-- figures: mock loops -->\n\n**Batches**\n")
    assert filled.endswith("- a note\n\n<!-- end -->\nafter\n")
    assert "old" not in filled
    assert docs.fill(filled, {"mock": document(section())}) == filled
    assert "111,000" in docs.fill(filled, {"mock": document(section(rate=111_111.0))})


def test_a_mark_with_a_broker_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="kafak"):
        docs.fill("<!-- figures: kafak loops -->\n<!-- end -->", {})


def test_what_was_not_measured_says_so():
    page = docs.fill(
        "<!-- figures: mock gil -->\n<!-- end -->\n<!-- figures: kafka gil -->\n<!-- end -->", {"mock": document()}
    )
    assert "Not measured in this run." in page
    assert "Not measured yet." in page


def test_of_two_results_the_second_replaces_what_it_has():
    first, second = document(section(rate=1.0), Section("Other", "loops")), document(section(rate=2.0))
    merged = results.merge(first, second)
    assert [(each.title, [line.rate for line in each.lines]) for each in merged.sections] == [
        ("Batches", [2.0]),
        ("Other", []),
    ]
    assert merged.seconds == 2.0


def test_the_page_has_the_figures_that_are_kept():
    page = docs.PAGE.read_text(encoding="utf-8")
    assert "<!-- figures: kafka rivals -->" in page
    drawn = {plot.stem for plot in docs.KEPT.glob("*.svg")}
    assert page == docs.fill(page, BROKERS, drawn), "run make bench-docs"


@pytest.mark.parametrize("plot", sorted(docs.KEPT.glob("*.svg")), ids=lambda plot: plot.stem)
def test_the_plots_are_of_the_results_that_are_kept(plot):
    name, _, kind = plot.stem.rpartition("-")
    part = name.partition("-")[0]
    files = [f"{part}-{kind}" if part in docs.PARTS else kind] if name else docs.KINDS
    for file in files:
        digest = hashlib.sha256((docs.KEPT / f"{file}.json").read_bytes()).hexdigest()
        assert digest in plot.read_text(encoding="utf-8"), "run make bench-docs"
    assert plot.stat().st_size < 60_000


def test_pages_name_plots_that_exist_and_all_of_them():
    names = set()
    for page in (docs.PAGE, docs.ROOT / "README.md"):
        for name in re.findall(r"\]\(([^)]*\.svg)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / name).exists(), f"{page.name}: {name}"
            names.add((page.parent / name).resolve())
    assert names == {path.resolve() for path in docs.KEPT.glob("*.svg")}
