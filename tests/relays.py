"""Relays whose store tells, or stops, at its steps; what an outbox's history must look like."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import kbatch
from kbatch import Envelope


class WatchedStore:
    """Calls `before` and `after` around each call of a store, with its name."""

    def __init__(self, store: Any, before: Callable[[str], object], after: Callable[[str], object]) -> None:
        self._store, self._before, self._after = store, before, after

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            self._before(name)
            result = method(*arguments, **keywords)
            self._after(name)
            return result

        return call


class WatchedOutbox:
    """An outbox whose relays' stores are watched."""

    def __init__(
        self,
        outbox: kbatch.SqliteOutbox | kbatch.PostgresOutbox,
        *,
        before: Callable[[str], object] = lambda name: None,
        after: Callable[[str], object] = lambda name: None,
    ) -> None:
        self.outbox, self.before, self.after = outbox, before, after

    def watch(self, watcher: Callable[[], object]) -> None:
        self.outbox.watch(watcher)

    def unwatch(self, watcher: Callable[[], object]) -> None:
        self.outbox.unwatch(watcher)

    def open_store(self) -> Any:
        self.before("open_store")
        return WatchedStore(self.outbox.open_store(), lambda name: self.before(name), lambda name: self.after(name))


def numbered(numbers: Iterable[int], keys: int = 20, **options: Any) -> list[Envelope]:
    """Envelopes whose bodies are numbers; of each key these grow in the order of the call."""
    return [Envelope(data=b"%d" % n, key=f"k{n % keys}", **options) for n in numbers]


def check_history(
    committed: Iterable[int], records: Iterable[Any], *, copies: int | None = 0, in_order: bool = True
) -> None:
    """What was committed is in the log; nothing else; per key in order, as far as first copies go.

    Args:
        records: As `clients.read_back` gives them.
        copies: How many records may be there more than once; ``None`` for any number.
        in_order: Nothing has timed out, so that nothing may have been overtaken by what was in flight with it.
    """
    seen: set[int] = set()
    of_key: dict[bytes | None, list[int]] = defaultdict(list)
    doubled = 0
    for record in records:
        number = int(record.value)
        if number in seen:
            doubled += 1
            continue
        seen.add(number)
        of_key[record.key].append(number)
    expected = set(committed)
    assert seen == expected, f"lost {sorted(expected - seen)[:10]}, invented {sorted(seen - expected)[:10]}"
    for key, numbers in of_key.items():
        assert numbers == sorted(numbers) or not in_order, f"key {key!r} is out of order"
    assert copies is None or doubled <= copies, f"{doubled} copies"
