"""An inbox without a database, in plain Python: a third one, by what `kbatch.stores` says alone."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from kbatch.stores import Partition


@dataclass
class Position:
    """How far a group is known to have committed a partition."""

    safe_until: int = 0
    mark: tuple[int, int] | None = None  # a time, and what was the end of the log then


@dataclass
class Tables:
    handled: dict[tuple[str, UUID], int] = field(default_factory=dict)  # when
    positions: dict[tuple[str, Partition], Position] = field(default_factory=dict)
    effects: list[int] = field(default_factory=list)  # what handlers write


class MemoryInbox:
    """Its transactions run one after the other."""

    def __init__(self, retention_s: float | None = 7 * 86_400.0) -> None:
        self.retention_s = retention_s
        self.tables = Tables()
        self.lock = threading.RLock()
        self.ahead_us = 0  # of the machine's clock

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Tables]:
        with self.lock:
            tables = Tables(dict(self.tables.handled), dict(self.tables.positions), list(self.tables.effects))
            yield tables
            self.tables = tables

    def open_session(self, group: str, /) -> "MemorySession":
        return MemorySession(self, group)

    def check(self) -> None:
        pass

    def clock_us(self) -> int:
        return int(time.time() * 1e6) + self.ahead_us

    def note_offsets(self, group: str, asked_at_us: int, offsets: Mapping[Partition, tuple[int, int]], /) -> None:
        with self.transaction() as tables:
            for partition, (committed, end) in offsets.items():
                position = tables.positions.get((group, partition))
                if position is None:
                    continue  # nothing of it was handled
                safe_until, mark = position.safe_until, position.mark
                is_set_back = safe_until > asked_at_us or (mark is not None and mark[0] > asked_at_us)
                if is_set_back:
                    safe_until = 0
                elif mark is not None and mark[1] <= committed <= end:
                    safe_until = mark[0]
                if mark is None or is_set_back or mark[1] <= committed or mark[1] > end:
                    mark = (asked_at_us, end)
                tables.positions[group, partition] = Position(safe_until, mark)

    def purge_old(self) -> int:
        safe: dict[str, int] = {}
        with self.transaction() as tables:
            for (group, _), position in tables.positions.items():
                safe[group] = min(safe.get(group, position.safe_until), position.safe_until)
            newest = self.clock_us() - int((self.retention_s or 0.0) * 1e6)
            old = [each for each, at in tables.handled.items() if at < min(newest, safe.get(each[0], 0))]
            for each in old:
                del tables.handled[each]
        return len(old)


class MemorySession:
    def __init__(self, inbox: MemoryInbox, group: str) -> None:
        self.inbox, self.group = inbox, group

    def handle(self, envelope: Any, handler: Callable[[Any, Any], object], /) -> bool:
        return bool(self.handle_batch([envelope], lambda new, tables: handler(new[0], tables)))

    def handle_batch(self, envelopes: Iterable[Any], handler: Callable[[list[Any], Any], object], /) -> int:
        new = []
        with self.inbox.transaction() as tables:
            for envelope in envelopes:
                if (self.group, envelope.id) not in tables.handled:
                    tables.handled[self.group, envelope.id] = self.inbox.clock_us()
                    new.append(envelope)
                    if envelope.topic is not None and envelope.partition is not None:
                        tables.positions.setdefault((self.group, (envelope.topic, envelope.partition)), Position())
            if new:
                handler(new, tables)
        return len(new)

    def close(self) -> None:
        pass
