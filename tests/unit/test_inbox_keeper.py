"""What tells an inbox how far its group has committed, with an inbox and a group that are only this test's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import kbatch.aio
from kbatch._inbox._keeper import Keeper
from tests.waiting import until


class FakeInbox:
    retention_s: float | None = 1.0

    def __init__(self) -> None:
        self.noted: list[tuple[int, Mapping[Any, Any]]] = []
        self.purged = 0

    def clock_us(self) -> int:
        return 10**15

    def note_offsets(self, group: str, asked_at: int, offsets: Mapping[Any, Any]) -> None:
        self.noted.append((asked_at, offsets))

    def purge_old(self) -> int:
        self.purged += 1
        return 0


def test_a_listener_that_runs_for_some_seconds_only_tells_what_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kbatch._inbox._keeper._FIRST_NOTE_S", 0.01)
    inbox: Any = FakeInbox()
    keeper = Keeper(inbox, "billing", lambda: {("orders", 0): (1, 2)})
    keeper.start()
    try:
        until(lambda: inbox.noted, "the first note")
    finally:
        keeper.stop()
    (asked_at, offsets), purged = inbox.noted[0], inbox.purged
    assert (asked_at < 10**15, offsets, purged) == (True, {("orders", 0): (1, 2)}, 0)


@pytest.mark.parametrize("kind", [kbatch.Listener, kbatch.aio.Listener])
def test_a_record_may_not_wait_for_longer_than_its_id_is_kept(tmp_path: Path, kind: Any) -> None:
    async def awaited(envelope: Any, connection: Any) -> None:
        pass

    def called(envelope: Any, connection: Any) -> None:
        pass

    def made(retention_s: float | None) -> Any:
        inbox = kbatch.SqliteInbox(tmp_path / "shop.db", retention_s=retention_s)
        config = {"bootstrap.servers": "localhost:1", "group.id": "billing"}
        handler = called if kind is kbatch.Listener else awaited
        return kind(config, ["orders"], handler, inbox=inbox, retry_topics=[60, 7200])

    for retention_s in (7200, 3600):
        with pytest.raises(kbatch.ConfigError, match="is not above the longest of retry_topics, 7200"):
            made(retention_s)
    for enough in (7201, None):
        made(enough)
