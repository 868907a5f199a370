"""The batches that `make fuzz` kept: each kind that it has seen, as short as it was seen, and what it has found."""

import pytest

from tests.fuzz import corpus
from tests.fuzz.generate import Nasty
from tests.fuzz.replay import Replay


@pytest.fixture(scope="module")
def replay():
    return Replay()


def test_the_corpus_agrees_with_the_reference(replay):
    lines = corpus.lines()
    assert len(lines) >= 100
    answers = [replay.batch(*corpus.read(line)) for line in lines]
    assert {type(answer).__name__ for answer in answers} == {"list", "Failed", "str"}


def test_the_corpus_says_all():
    for line in corpus.lines():
        assert corpus.written(*corpus.read(line)) == line


def test_the_first_batches_of_a_seed(replay):
    for number in range(300):
        replay.batch(*Nasty(20261123, number).batch())
