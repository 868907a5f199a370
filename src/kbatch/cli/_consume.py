"""``kbatch consume``: records of a topic, printed."""

from dataclasses import dataclass

from kbatch.cli._connection import Connection
from kbatch.cli._interrupt import Interrupt
from kbatch.cli._record_text import record_line, record_text, value_line
from kbatch.cli._screen import Screen
from kbatch.cli._settings import Settings
from kbatch.cli._topic_reader import Range, TopicReader

_GRACE_S = 5.0


@dataclass(frozen=True)
class ConsumeJob:
    """What the command line asks for."""

    range: Range
    settings: Settings
    wire: str
    form: str  # "text", "json" or "values"
    group: str | None
    commit: bool
    connect_timeout_s: float


def consume(job: ConsumeJob, screen: Screen) -> int:
    """Prints the records and returns the exit status. What nobody could read is not committed."""
    connection = Connection(screen)
    reader = TopicReader(job.settings, job.range, connection, job.connect_timeout_s, job.group)
    with reader, Interrupt(None, _GRACE_S) as interrupt:
        printed: dict[int, int] = {}
        for message in reader.messages(lambda: interrupt.requested):
            if message is None:
                continue
            if job.form == "json":
                screen.print(record_line(message, job.wire))
            elif job.form == "values":
                screen.print(value_line(message).decode("utf-8", "backslashreplace") + "\n")
            else:
                screen.print(record_text(message, job.wire))
            if screen.loss is not None:
                break
            printed[message.partition() or 0] = (message.offset() or 0) + 1
        if job.commit and printed:
            reader.commit(printed)
        return interrupt.status if interrupt.requested else 0
