"""kbatch's pytest plugin: the fixture ``kafka_cluster``.

pytest imports this in every project of an environment with kbatch. So it stands outside the package and imports it only
when a test asks for the fixture: `import kbatch` takes a while, and fails where confluent-kafka is broken.
"""

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
