"""`benchmarks.compare`: what counts as a loss, and what cannot be compared."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from benchmarks.compare import ComparisonError


def run(folder: str = "/base", c_loop: float = 0.02, librdkafka: str = "2.16.1", **seconds: float) -> dict[str, Any]:
    """A file of pytest-benchmark's, as far as it is read. test_send… are those that send."""
    times = {"test_c_loop": c_loop, "test_c_loop_cpu": c_loop / 2, "test_rival": 1.0, **seconds}

    def group(name: str) -> str:
        if name == "test_rival":
            return "for comparison"
        return "sending" if name == "test_c_loop" or name.startswith("test_send") else "computing"

    return {
        "kbatch": {"folder": folder, "librdkafka": librdkafka},
        "benchmarks": [
            {"name": name, "group": group(name), "stats": {"min": time, "median": time * 5}}
            for name, time in times.items()
        ],
    }


def test_ratios_are_of_the_c_loop_by_the_fastest_rounds_of_all_runs() -> None:
    runs = [run(c_loop=0.04, test_send=0.03, test_map=0.005), run(c_loop=0.02, test_send=0.06, test_map=0.001)]
    assert compare.ratios(runs) == pytest.approx({"test_send": 0.03 / 0.02, "test_map": 0.001 / 0.01})


@pytest.mark.parametrize(("seconds", "lost"), [(0.0300, 0), (0.0344, 0), (0.0346, 1), (0.3, 1), (0.01, 0)])
def test_a_loss_of_more_than_15_percent(seconds: float, lost: int) -> None:
    changes = compare.compare([run(test_send=0.03)], [run("/head", test_send=seconds)])
    assert len(compare.losses(changes, compare.MOST)) == lost


def test_a_slower_machine_is_no_loss() -> None:
    slow = run("/head", c_loop=0.06, test_send=0.09, test_map=0.003)
    changes = compare.compare([run(test_send=0.03, test_map=0.001)], [slow])
    assert [change.factor for change in changes] == pytest.approx([1.0, 1.0])


def test_a_faster_machine_hides_no_loss() -> None:
    changes = compare.compare([run(test_send=0.03)], [run("/head", c_loop=0.01, test_send=0.03)])
    assert [change.name for change in compare.losses(changes, compare.MOST)] == ["test_send"]


def test_what_one_side_lacks_is_left_out() -> None:
    changes = compare.compare([run(test_send=0.03, test_gone=1.0)], [run("/head", test_send=0.03, test_new=1.0)])
    assert [change.name for change in changes] == ["test_send"]


def test_what_cannot_be_compared() -> None:
    good, head = run(test_send=0.03), run("/head", test_send=0.03)
    with pytest.raises(ComparisonError, match="both sides measured /base"):
        compare.compare([good], [good])
    with pytest.raises(ComparisonError, match="different builds"):
        compare.compare([good, head], [head])
    with pytest.raises(ComparisonError, match=r"different librdkafkas: 2\.15\.0, 2\.16\.1"):
        compare.compare([good], [run("/head", librdkafka="2.15.0", test_send=0.03)])
    with pytest.raises(ComparisonError, match="no benchmark is on both sides"):
        compare.compare([good], [run("/head")])
    without = {**head, "benchmarks": head["benchmarks"][1:]}
    with pytest.raises(ComparisonError, match="no test_c_loop"):
        compare.compare([good], [without])


def test_a_loss_is_doubted_and_believed_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    base, head = Path("/base"), Path("/head")
    order: list[Path] = []

    def noisy(sources: Path, _: object) -> dict[str, Any]:
        order.append(sources)
        disturbed = sources == head and order.count(head) < 3
        return run(str(sources), test_send=0.04 if disturbed else 0.03)

    monkeypatch.setattr(compare, "measure", noisy)
    changes = compare.measure_in_turns(base, head, 2, 6, compare.MOST, [])
    assert compare.losses(changes, compare.MOST) == []
    assert order == [base, head, head, base, base, head]  # nobody always goes first

    order.clear()
    monkeypatch.setattr(
        compare,
        "measure",
        lambda sources, _: order.append(sources) or run(str(sources), test_send=0.04 if sources == head else 0.03),
    )
    changes = compare.measure_in_turns(base, head, 2, 6, compare.MOST, [])
    assert len(compare.losses(changes, compare.MOST)) == 1
    assert len(order) == 12


def test_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, head, slow = tmp_path / "base.json", tmp_path / "head.json", tmp_path / "slow.json"
    base.write_text(json.dumps(run(test_send=0.03)), encoding="utf-8")
    head.write_text(json.dumps(run("/head", test_send=0.033)), encoding="utf-8")
    slow.write_text(json.dumps(run("/head", test_send=0.036)), encoding="utf-8")
    assert compare.main([str(base), str(head)]) == 0
    assert "LOSS" not in capsys.readouterr().out
    assert compare.main([str(base), str(slow)]) == 1
    assert "+20.0%  LOSS" in capsys.readouterr().out
    assert compare.main([str(base), str(base)]) == 2
    with pytest.raises(SystemExit):
        compare.main([str(base)])
