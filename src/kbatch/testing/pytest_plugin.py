"""Gives the fixture ``kafka_cluster``. pytest loads this at every start, so it imports the cluster only when asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kbatch.testing import MockCluster


@pytest.fixture
def kafka_cluster() -> Iterator[MockCluster]:
    """A fresh `kbatch.testing.MockCluster` with one broker, closed when the test ends."""
    from kbatch.testing import MockCluster

    with MockCluster() as cluster:
        yield cluster
