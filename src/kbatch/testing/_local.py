from typing import Any

from kbatch.testing._mock import Cluster


class LocalBackend:
    """The mock cluster in threads of this process."""

    def __init__(self, brokers: int) -> None:
        self._cluster = Cluster(brokers)

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self._cluster, method)(*args)

    def close(self) -> None:
        self._cluster.close()
