"""Is a broker there, and does it know the topic? Asked before the first line is sent, to fail in one line."""

import functools
import threading
import time
from typing import Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from kbatch._fastmap import monotonic
from kbatch.cli._connection import Connection
from kbatch.cli._failure import Failure

# A topic that the broker creates when it is first asked for is unknown for a moment.
_CREATION_S = 5.0
_STALLED_AFTER_S = 2.0
_LAST_S = 0.5  # before it is given up it is not told that it is tried again
_LONGEST_S = 60.0  # librdkafka takes milliseconds as an int


class _Question(threading.Thread):
    """Asks for the topic's metadata, in a thread: the call notices no Ctrl-C, and tells no error on the way."""

    def __init__(self, admin: AdminClient, topic: str, timeout_s: float) -> None:
        super().__init__(name="kbatch-preflight", daemon=True)
        self.found: Any = None
        self.error: KafkaException | None = None
        ask: Any = admin.list_topics
        self._ask = functools.partial(ask, topic, timeout=timeout_s)
        self.start()

    def run(self) -> None:
        try:
            self.found = self._ask()
        except KafkaException as error:
            self.error = error


def check_broker(config: dict[str, Any], topic: str, timeout_s: float, connection: Connection) -> None:
    """Asks for the topic's metadata; tells why no broker answers while it waits.

    Raises:
        Failure: No broker answers within the time, or the topic does not exist or may not be seen.
    """
    settings: Any = {**config, "error_cb": connection}
    admin = AdminClient(settings)
    end = monotonic() + timeout_s
    known_by = monotonic() + min(timeout_s, _CREATION_S)
    while True:
        began = monotonic()
        question = _Question(admin, topic, max(0.1, min(_LONGEST_S, end - monotonic())))
        while question.is_alive():
            question.join(0.1)
            admin.poll(0)
            if end - monotonic() > _LAST_S:
                connection.look("no broker has answered", began, _STALLED_AFTER_S)
        if question.found is None:
            if monotonic() < end:
                time.sleep(0.1)
                continue
            reason = connection.last_error or ("" if question.error is None else question.error.args[0].str())
            raise Failure(f"no broker answered within {timeout_s:g} s: {reason}")
        connection.answered(all_is_well=True)
        found = question.found
        problem = found.topics[topic].error if topic in found.topics else None
        if problem is None or problem.code() == KafkaError.LEADER_NOT_AVAILABLE:
            return
        if problem.code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
            raise Failure(f"topic {topic!r}: {problem.str()}")
        if monotonic() > known_by:
            raise Failure(f"topic {topic!r} does not exist, and the broker does not create it")
        time.sleep(0.2)
