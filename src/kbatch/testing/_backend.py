from typing import Any, Protocol


class Backend(Protocol):
    """Where a mock cluster runs. `call` names a method of `kbatch.testing._mock.Cluster`; arguments are plain data.

    `close` may be called twice, and in a forked child, where it must leave the parent's cluster alone.
    """

    def call(self, method: str, *args: Any) -> Any: ...

    def close(self) -> None: ...
