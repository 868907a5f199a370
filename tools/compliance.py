"""Runs the compliance suite and writes its results into docs/compliance.md: `make compliance`.

The mock cluster alone, or Apache Kafka too with ``KAFKA=1``.
"""

import hashlib
import inspect
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path

import kbatch
from kbatch.testing.compliance import TransportCompliance

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compliance.md"
CLUSTERS = {"mock": ("librdkafka's mock cluster", "tests/mock/test_compliance.py")}
CLUSTERS["kafka"] = ("Apache Kafka", "tests/kafka/test_compliance_on_kafka.py")
COLUMNS = [(mode, style) for mode in ("INLINE", "BUFFERED", "DURABLE") for style in ("threads", "asyncio")]


def names() -> list[str]:
    """The tests of the suite, as the page calls them."""
    found = [name for name in vars(TransportCompliance) if name.startswith("test_")]
    return [name.removeprefix("test_").replace("_", " ") for name in found]


def fingerprint() -> str:
    """Another one after any test of the suite has changed."""
    return hashlib.sha256(inspect.getsource(TransportCompliance).encode()).hexdigest()[:12]


def origin() -> str:
    """Of what the results are, in a sentence."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout

    commit = git("rev-parse", "--short=10", "HEAD").strip()
    changed = " and what was not committed" if git("status", "--porcelain", "--", "src", "tests") else ""
    today = datetime.now(timezone.utc).date()
    return f"kbatch {kbatch.__version__}, commit {commit}{changed}, {today}, tests `{fingerprint()}`."


def run(path: str) -> dict[str, dict[tuple[str, str], list[bool]]]:
    """By test and way to send, whether each of its wire formats has passed."""
    found: dict[str, dict[tuple[str, str], list[bool]]] = {
        name.replace(" ", "_"): defaultdict(list) for name in names()
    }
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            os.environ.get("WORKERS") or ("2" if "kafka" in path else "4"),
            f"--junitxml={report}",
            path,
        ]
        subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, "KBATCH_NIGHTLY": "1"})
        for case in ElementTree.parse(report).iter("testcase"):
            match = re.fullmatch(r"test_(\w+)\[(\w+)-(\w+)(?:-(\w+))?\]", case.get("name", ""))
            assert match is not None, case.get("name")
            failed = any(child.tag in ("failure", "error", "skipped") for child in case)
            found[match[1]][match[2], match[3]].append(not failed)
    return found


def table(found: dict[str, dict[tuple[str, str], list[bool]]]) -> str:
    """In Markdown; a number is how many wire formats were tried."""
    lines = ["| test | " + " | ".join(f"{mode}, {style}" for mode, style in COLUMNS) + " |"]
    lines.append("| --- |" + " --- |" * len(COLUMNS))
    for name, results in found.items():
        cells = []
        for column in COLUMNS:
            tried = results.get(column, [])
            mark = "passed" if tried and all(tried) else "FAILED"
            cells.append(mark if len(tried) == 1 else f"{mark} ({len(tried)})")
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(cluster: str, text: str) -> None:
    """Puts a table between its two comments of the page."""
    page = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- results: {cluster} -->\n", "<!-- end -->"
    before, rest = page.split(begin)
    PAGE.write_text(f"{before}{begin}\n{text}\n\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def main(clusters: list[str]) -> int:
    """The number of cells that have failed."""
    failed = 0
    for cluster in clusters:
        of = origin()
        found = run(CLUSTERS[cluster][1])
        write(cluster, f"{of}\n\n{table(found)}")
        failed += sum(not all(tried) for results in found.values() for tried in results.values())
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:] or ["mock"]), 1))
