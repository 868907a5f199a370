"""Is a broker there, and does it know the topic? Asked before the first line is sent, to fail in one line."""

import time
import warnings
from typing import Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from kbatch._config import ProducerConfig
from kbatch._fastmap import monotonic
from kbatch.cli._failure import USAGE, Failure

# A topic that the broker creates when it is first asked for is unknown for a moment.
_CREATION_S = 5.0


class LastError:
    """An ``error_cb`` that keeps the last error that tells why no broker answers."""

    def __init__(self) -> None:
        self.text = ""

    def __call__(self, error: KafkaError) -> None:
        # "All brokers are down" comes after the reason and says less.
        if not self.text or error.code() != KafkaError._ALL_BROKERS_DOWN:
            self.text = error.str()


def check_broker(config: dict[str, Any], topic: str, timeout_s: float) -> None:
    """Asks for the topic's metadata.

    Raises:
        Failure: The settings do not go together, no broker answers within the time, or the topic does not exist or
            may not be seen.
    """
    last_error = LastError()
    settings: Any = {**config, "error_cb": last_error}
    try:
        admin = AdminClient(settings)
    except (KafkaException, ValueError) as error:
        # What librdkafka sees only when it starts: settings that do not go together, a certificate that is not there.
        reason = error.args[0].str() if isinstance(error, KafkaException) else str(error)
        with warnings.catch_warnings():  # the producer has told
            warnings.simplefilter("ignore")
            raise Failure(ProducerConfig.parse(config).native.without_hidden(reason), USAGE) from None
    end = monotonic() + timeout_s
    known_by = monotonic() + min(timeout_s, _CREATION_S)
    patience_s = 0.5  # the call does not notice Ctrl-C, so it is short at first
    while True:
        try:
            found = admin.list_topics(topic, timeout=max(0.1, min(patience_s, end - monotonic())))
        except KafkaException as error:
            if monotonic() < end:
                patience_s *= 2
                continue
            admin.poll(0)
            reason = last_error.text or error.args[0].str()
            raise Failure(f"no broker answered within {timeout_s:g} s: {reason}") from None
        problem = found.topics[topic].error if topic in found.topics else None
        if problem is None or problem.code() == KafkaError.LEADER_NOT_AVAILABLE:
            return
        if problem.code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
            raise Failure(f"topic {topic!r}: {problem.str()}")
        if monotonic() > known_by:
            raise Failure(f"topic {topic!r} does not exist, and the broker does not create it")
        time.sleep(0.2)
