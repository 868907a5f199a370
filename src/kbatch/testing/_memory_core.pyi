from collections.abc import Callable
from typing import Any

from kbatch._fastmap import Batch, Core, Envelope, _MappedRecord

class NativeMemoryCore(Core):
    def start_in_memory(self) -> None: ...
    def take_in_memory(
        self,
        batch: Batch,
        *,
        waker: Callable[[], object] | None = None,
        callback: Callable[[Any], object] | None = None,
    ) -> tuple[tuple[Envelope[Any], ...], list[_MappedRecord | None]]: ...
    def settle_in_memory(self, batch: Batch, outcomes: list[tuple[int, int, int, int]]) -> None: ...
    def shut_in_memory(self) -> None: ...
    def end_in_memory(self) -> None: ...
