"""What must agree between files that no compiler compares."""

import re
from pathlib import Path
from types import ModuleType

import kbatch
from kbatch import _version

ROOT = Path(__file__).parents[2]


def test_changelog_begins_with_this_version():
    heading = re.search(r"^## \[(.+?)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heading is not None
    version, date = heading.groups()
    assert version == _version.__version__
    assert date == "Unreleased" or re.fullmatch(r"\d{4}-\d{2}-\d{2}", date)


def test_the_package_tells_its_version():
    assert kbatch.__version__ == _version.__version__


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
    builds = re.search(r'^build = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert builds is not None
    assert [build for build in builds[1].split() if not re.fullmatch(r"cp3\d+-\*", build)] == []
