"""The planted defects of `make mutants` still fit the sources."""

from pathlib import Path

import pytest

import kbatch

from ..mutants.places import find, sources
from ..mutants.planted import MUTANTS, Mutant

PACKAGE = Path(kbatch.__file__).parent


@pytest.fixture(scope="module")
def texts() -> list[tuple[Path, str]]:
    return sources(PACKAGE.parent)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_defect_fits(mutant: Mutant, texts: list[tuple[Path, str]]) -> None:
    if not (PACKAGE / "_fastmap.pyx").exists():
        pytest.skip("platform: installed without its sources")
    assert len(find(PACKAGE.parent, mutant.where, mutant.old, texts)) == 1
    assert mutant.new != mutant.old


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_its_tests_are_there(mutant: Mutant) -> None:
    root = Path(__file__).parents[2]
    assert [
        name for name in mutant.tests.partition(" -k ")[0].split() if not (root / name.partition("::")[0]).exists()
    ] == []


def test_there_are_at_least_twenty_and_each_has_its_name() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20
