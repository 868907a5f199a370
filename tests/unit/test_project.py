"""What must agree between files that no compiler compares."""

import ast
import inspect
import itertools
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import kbatch
from kbatch import _version
from kbatch.cli import _app, _inbox_app, _outbox_app
from kbatch.testing.compliance import TransportCompliance
from tools import compliance

ROOT = Path(__file__).parents[2]


def test_changelog_begins_with_this_version():
    heading = re.search(r"^## \[(.+?)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heading is not None
    version, date = heading.groups()
    assert version == _version.__version__
    assert date == "Unreleased" or re.fullmatch(r"\d{4}-\d{2}-\d{2}", date)


def test_the_package_tells_its_version():
    assert kbatch.__version__ == _version.__version__


def test_the_wheels_that_are_built_are_those_of_the_readme():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (built,) = re.findall(r'^build = "(.*)"', text, re.MULTILINE)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in re.findall(r"^\| .*(?:wheel|tested).*$", readme, re.MULTILINE)
    ]
    (heading, *platforms) = rows
    assert heading[:3] == ["platform", "CPython", "wheel"]
    versions: dict[str, set[str]] = {}
    for platform, cpython, *_ in platforms:
        for part in cpython.split(", "):
            first, _, last = part.partition(" to ")
            minors = range(int(first.removesuffix("t")[2:]), int((last or first).removesuffix("t")[2:]) + 1)
            tag = "t-*" if first.endswith("t") else "-*"
            versions.setdefault(platform, set()).update(f"cp3{minor}{tag}" for minor in minors)
    assert {frozenset(found) for found in versions.values()} == {frozenset(built.split())}
    assert 'skip = "*-musllinux_*"' in text


def test_make_run_sends_as_many_orders_as_the_readme_says():
    assert inspect.signature(_app.demo).parameters["count"].default == 200_000
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^run: .*\n\t\$\(BIN\)/kbatch demo \$\(ARGS\)$", makefile, re.MULTILINE)


def test_make_run_outbox_adds_as_many_orders_as_the_readme_says():
    options = inspect.signature(_outbox_app.demo).parameters
    assert (options["count"].default, options["kills"].default) == (100_000, 2)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^run-outbox: .*\n\t\$\(BIN\)/kbatch outbox demo \$\(ARGS\)$", makefile, re.MULTILINE)


def test_make_run_inbox_adds_as_many_orders_as_the_readme_says():
    options = inspect.signature(_inbox_app.demo).parameters
    assert options["count"].default == 100_000
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^run-inbox: .*\n\t\$\(BIN\)/kbatch inbox demo \$\(ARGS\)$", makefile, re.MULTILINE)


def test_all_is_exact():
    public = {
        name for name, value in vars(kbatch).items() if not (name.startswith("_") or isinstance(value, ModuleType))
    }
    assert set(kbatch.__all__) - {"__version__"} == public
    assert len(kbatch.__all__) == len(set(kbatch.__all__))


def test_each_compiled_module_has_a_stub():
    # stubtest passes over a module without one
    package = ROOT / "src" / "kbatch"
    sources = list(package.rglob("*.pyx"))
    assert sources
    assert [source.name for source in sources if not source.with_suffix(".pyi").exists()] == []


def test_no_two_files_of_tests_have_the_same_name():
    # `pytest -k`, a report and a person name a file without its folder.
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(names) > 80
    assert [name for name, count in names.items() if count > 1] == []


def test_a_test_that_a_docstring_of_tests_names_is_there():
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    suites = {path: path.read_text(encoding="utf-8") for path in (ROOT / "src" / "kbatch" / "testing").glob("*.py")}
    defined = {
        name for text in (texts | suites).values() for name in re.findall(r"^ *(?:async )?def (\w+)", text, re.M)
    }
    files = {path.name for path in texts}
    named = {
        name: path.name
        for path, text in texts.items()
        for name in re.findall(r"`(?:\w+/)*(test_\w+(?:\.py)?)`", ast.get_docstring(ast.parse(text)) or "")
    }
    assert len(named) > 30
    assert {name: where for name, where in named.items() if name not in defined | files} == {}


def test_packages_and_compiled_modules_are_found_not_listed():
    sources = [source.relative_to(ROOT / "src") for source in (ROOT / "src").rglob("*.pyx")]
    packages = [source.parent.relative_to(ROOT / "src") for source in (ROOT / "src").rglob("__init__.py")]
    assert sources
    assert packages
    names = [".".join(path.with_suffix("").parts) for path in (*sources, *packages) if len(path.parts) > 1]
    for file in ("pyproject.toml", "setup.py", "MANIFEST.in", "Makefile"):
        words = set(re.findall(r"[\w.]+(?![\w.:])", (ROOT / file).read_text(encoding="utf-8")))
        assert words & set(names) == set(), file


def test_ci_runs_each_tier_of_tests_and_each_check():
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    calls = re.findall(r"^[^#\n]*\bmake (?:-j 2 )?--no-print-directory ([a-z -]*[a-z])", text, re.MULTILINE)
    targets = ["build-tests", "test", "memory", "lint", "types", "stubtest", "test-kafka", "wheel", "bench-check"]
    assert " ".join(calls).split() == targets
    # What runs beside the tests on Kafka is waited for, and what it fails with is the end.
    assert 'wait "$checks" || { cat "$beside"; exit 1; }' in text
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipes = dict(re.findall(r"^([a-z-]+): .*\n(?:\t.*\n)*\t(.+)$", makefile, re.MULTILINE))
    # Between them they run all of tests/.
    assert recipes["test"] == "$(PYTEST) -n $(WORKERS) --dist worksteal --ignore=tests/kafka $(ARGS)"
    assert recipes["test-kafka"] == "$(PYTEST) -n 2 --dist loadfile tests/kafka $(ARGS)"
    assert re.search("^test-all: test test-kafka ", makefile, re.MULTILINE)


def test_build_requirements_are_the_same_with_and_without_isolation():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    isolated = re.search(r"^requires = (\[.*?\])", text, re.MULTILINE)
    group = re.search(r"^compile = (\[.*?\])", text, re.MULTILINE)
    assert isolated is not None
    assert group is not None
    assert sorted(re.findall(r'"(.*?)"', group[1])) == sorted(re.findall(r'"(.*?)"', isolated[1]))


def test_nothing_claims_to_work_without_the_gil():
    # Until it is tested on a free-threaded CPython, which turns the GIL on for an extension that does not declare it.
    sources = [ROOT / "setup.py", *(ROOT / "src").rglob("*.pyx"), *(ROOT / "src").rglob("*.pxi")]
    assert len(sources) > 5
    assert [source.name for source in sources if "freethreading_compatible" in source.read_text("utf-8")] == []
    # Until then its tests must have it on from the start, or the warning about that fails them.
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    builds = re.search(r'^build = "(.*)"', text, re.MULTILINE)
    assert builds is not None
    for build in builds[1].split():
        if "t-" in build:
            assert re.search(rf'^select = "{re.escape(build)}"(\n.+)*PYTHON_GIL = "1"', text, re.MULTILINE), build


def test_no_cython_code_has_a_list_comprehension():
    for path in [*(ROOT / "src").rglob("*.pyx"), *(ROOT / "src").rglob("*.pxi")]:
        text = re.sub(r"#.*", "", path.read_text(encoding="utf-8"))
        while True:
            innermost = re.findall(r"\[[^\[\]]*\]", text)
            assert not [each for each in innermost if re.search(r"\sfor\s.*\sin\s", each, re.DOTALL)], path
            if not innermost:
                break
            text = re.sub(r"\[[^\[\]]*\]", "", text)


def test_each_action_is_pinned_to_a_commit():
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert [path.name for path in workflows] == ["bench.yml", "ci.yml", "wheels.yml"]
    uses = [line for path in workflows for line in path.read_text("utf-8").splitlines() if "uses:" in line]
    assert len(uses) > 5
    ours = "uses: $/.github/workflows/ci.yml"
    pinned = re.compile(r"uses: [\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")
    assert [line for line in uses if not pinned.search(line) and line.strip() != ours] == []


def test_one_action_has_one_version():
    text = "".join(path.read_text("utf-8") for path in (ROOT / ".github" / "workflows").glob("*.yml"))
    versions: dict[str, set[str]] = {}
    for action, version in re.findall(r"uses: ([\w./-]+)@(.+)", text):
        versions.setdefault(action, set()).add(version)
    assert [action for action, found in versions.items() if len(found) > 1] == []


def test_what_is_published_was_built_here_and_needs_no_password():
    text = (ROOT / ".github" / "workflows" / "wheels.yml").read_text(encoding="utf-8")
    jobs = dict(re.findall(r"^  (\w+):\n((?:(?: {3,}.*)?\n)+)", text.partition("\njobs:\n")[2], re.MULTILINE))
    assert list(jobs) == ["ci", "sdist", "wheels", "publish"]
    assert [name for name, job in jobs.items() if "id-token: write" in job] == ["publish"]
    assert "startsWith(github.ref, 'refs/tags/v')" in jobs["publish"]
    assert "needs: [ci, sdist, wheels]" in jobs["publish"]
    assert "always()" not in text  # what has failed, or was left out, stops it
    assert "uses: $/.github/workflows/ci.yml" in jobs["ci"]
    assert "startsWith(github.ref, 'refs/tags/')" in jobs["ci"]
    ci = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "  workflow_call:" in ci
    assert "group: ci-${{ github.ref }}" in ci  # by the caller's name it would wait for, or end, its caller
    assert "name: pypi\n" in jobs["publish"]
    assert "secrets." not in text


def locked(name: str) -> dict[str, set[str]]:
    """The packages of a file of `make lock`, each with its versions: a CPython or a system may need its own."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    assert "://" not in text
    found: dict[str, set[str]] = {}
    for entry in re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]:
        first, *hashes = entry.replace(" \\\n", "\n").splitlines()
        match = re.fullmatch(r"([a-z0-9-]+)(?:\[[a-z0-9,-]+\])?==([\w.+!]+)(?: ; .+)?", first)
        assert match is not None, first
        assert hashes, first
        assert [line for line in hashes if not re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}", line)] == [], first
        found.setdefault(match[1], set()).add(match[2])
    return found


LOCKS = sorted(path.stem for path in (ROOT / "requirements").glob("*.txt"))


def groups() -> dict[str, set[str]]:
    """The dependency groups of pyproject.toml, each with the packages that it names itself."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("\n[dependency-groups]\n")[2].partition("\n[tool")[0]
    lists = re.findall(r"^([a-z-]+) = \[((?:.|\n)*?)\](?:  #.*)?$", section, re.MULTILINE)
    return {name: set(re.findall(r'(?<![=] )"([A-Za-z][\w-]*)', content)) for name, content in lists}


def test_what_is_installed_to_build_and_test_is_locked():
    assert sorted([*groups(), "run"]) == sorted([*LOCKS, "dev"])
    for name, packages in groups().items():
        if name != "dev":
            assert {package.lower() for package in packages} <= locked(name).keys(), name
    files = [*(ROOT / ".github" / "workflows").glob("*.yml"), *(ROOT / name for name in (".ci/run", "Makefile"))]
    for path in [*files, ROOT / "pyproject.toml"]:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "pip install" in line]
        assert [line for line in lines if "--require-hashes" not in line and "--no-index" not in line] == []
    # `pip wheel` installs too: what it builds with, which is constrained to the lock.
    calls = re.findall(r"session\.install\(.*|\*command.*", (ROOT / "noxfile.py").read_text(encoding="utf-8"))
    assert len(calls) > 3
    locked_options = ("--require-hashes", "--no-index", '"--build-constraint", "requirements/compile.txt"')
    assert [call for call in calls if not any(option in call for option in locked_options)] == []


def test_the_locks_agree():
    for one, other in itertools.combinations(LOCKS, 2):
        mine, theirs = locked(one), locked(other)
        for package in mine.keys() & theirs.keys():
            assert mine[package] <= theirs[package] or theirs[package] <= mine[package], (one, other, package)


def design() -> str:
    return (ROOT / "DESIGN.md").read_text(encoding="utf-8")


def test_the_design_lists_its_headings():
    anchors = [
        (2 * (len(marks) - 2), title, re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-"))
        for marks, title in re.findall(r"^(##+) (.*)$", design(), re.MULTILINE)
        if title != "Contents"
    ]
    contents = design().partition("\n## Contents\n")[2].partition("\n## ")[0]
    assert contents.strip("\n").splitlines() == [
        f"{' ' * depth}- [{title}](#{anchor})" for depth, title, anchor in anchors
    ]


def test_the_map_of_the_design_has_each_file_and_no_other():
    section = design().partition("\n## File map\n")[2].partition("\n## ")[0]
    table = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    named = {name.rpartition("/")[2] for name in re.findall(r"`([\w./]+\.(?:py|pyx|pxi|h))`", table)}
    package = ROOT / "src" / "kbatch"
    files = {
        path.relative_to(package)
        for folder in (
            ".",
            "_database",
            "_inbox",
            "_outbox",
            "_receiving",
            "_recovery",
            "_sending",
            "native",
            "testing",
        )
        for path in package.joinpath(folder).glob("*.*")
        if path.suffix in {".py", ".pyx", ".pxi", ".h"}
    }
    # What says nothing about itself, and the plugin beside the package.
    silent = {"__init__.py", "_version.py"}
    assert {path.name for path in files} - silent == named - {"pytest_kbatch.py"} - silent


def test_the_page_of_compliance_has_each_test_as_it_is_now_and_none_that_failed():
    page = compliance.PAGE.read_text(encoding="utf-8")
    assert len(compliance.names()) > 15
    ways = [f"{mode}, {style}" for mode, style in compliance.COLUMNS]
    for cluster in compliance.CLUSTERS:
        table = page.split(f"<!-- results: {cluster} -->\n")[1].split("<!-- end -->")[0]
        says = re.search(
            r"^kbatch \S+, commit [0-9a-f]{10}\b.*, \d{4}-\d{2}-\d{2}, tests `(\w+)`\.$", table, re.MULTILINE
        )
        assert says is not None
        assert says[1] == compliance.fingerprint(), f"the table {cluster!r} is of other tests: make compliance KAFKA=1"
        heading, _, *rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
        ]
        assert heading == ["test", *ways]
        assert [name for name, *_ in rows] == compliance.names()
        for name, *cells in rows:
            test = getattr(TransportCompliance, f"test_{name.replace(' ', '_')}")
            all_ways = any(mark.args[0] == "wire" for mark in getattr(test, "pytestmark", ()))
            assert cells == ["passed (3)" if all_ways or way == "BUFFERED, threads" else "passed" for way in ways], name
