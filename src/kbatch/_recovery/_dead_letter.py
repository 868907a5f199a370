"""What is written to a dead-letter topic: the envelope itself, and headers that say why it is there."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from kbatch._errors import DeliveryError, SerializationError, exception_text, type_name
from kbatch._fastmap import Envelope

if TYPE_CHECKING:
    from kbatch._errors import KbatchError

__all__ = ["dead_letter"]

_PREFIX = "dead-letter-"


def dead_letter(
    envelope: Envelope[Any], error: KbatchError, failures: int, topic: str, default_topic: str | None, wall: float
) -> Envelope[Any] | None:
    """The envelope for the dead-letter topic; ``None`` if there can be none.

    It has the same id, key and body, no time limit, and these headers besides its own:

    - ``dead-letter-topic``: where it was to go.
    - ``dead-letter-reason``: the error as text; ``dead-letter-error``: its name, librdkafka's if it has one.
    - ``dead-letter-attempts``: how often it failed.
    - ``dead-letter-time``: when it was given up (`wall`, seconds since 1970), as in RFC 3339.
    """
    if isinstance(error, SerializationError):
        return None  # it would be one there, too
    headers = [(name, value) for name, value in envelope.headers if not name.startswith(_PREFIX)]
    reason = {
        "topic": envelope.topic or default_topic,
        "reason": exception_text(error),
        "error": error.name if isinstance(error, DeliveryError) else type_name(error),
        "attempts": str(failures),
        "time": datetime.fromtimestamp(wall, timezone.utc).isoformat().replace("+00:00", "Z"),
    }
    headers += [(_PREFIX + name, value) for name, value in reason.items()]
    changes: dict[str, Any] = {"topic": topic, "headers": headers}
    if envelope.partition is not None:
        changes["partition"] = None
    if envelope.deliver_by is not None:
        changes["deliver_by"] = None
    if envelope.scheduled_time is not None:
        changes["scheduled_time"] = None
    return Envelope.replace(envelope, **changes)  # a subclass may have another, which answers with anything
