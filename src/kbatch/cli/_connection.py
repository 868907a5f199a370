import re
import threading
from typing import Protocol

from confluent_kafka import KafkaError

from kbatch._fastmap import monotonic

# One address of several may not answer, and a broker may be restarted: what heals by itself so soon is not told.
_TOLD_AFTER_S = 1.0
_STALE_AFTER_S = 15.0  # librdkafka, which has tried again since then, would have said it again
_NOT_AGAIN_S = 30.0
_TOLD_AT_MOST = 10
# The size is the four letters.
_HTTP = re.compile(r"Invalid response size 1213486160 .*?: increase receive\.message\.max\.bytes")
# "… (after 3ms in state CONNECT, 4 identical error(s) suppressed)"
_CIRCUMSTANCES = re.compile(r" \((?:after \d+ms|\d+ identical)[^()]*(?:\(s\)[^()]*)?\)")


class _Teller(Protocol):
    def tell(self, text: str, /) -> None: ...


class Connection:
    """What librdkafka says of the connection to the brokers: an ``error_cb`` that tells it, once while it is the same.

    It is told when a second has passed in which no broker answered.
    """

    def __init__(self, screen: _Teller) -> None:
        #: The last error that tells why no broker answers.
        self.last_error = ""
        self._screen = screen
        self._mu = threading.Lock()
        self._waiting: dict[str, tuple[float, str]] = {}  # what is not told yet, and since when it is known
        self._told_at: dict[str, float] = {}
        self._told: set[str] = set()  # since a broker answered
        self._answered_at = 0.0

    def __call__(self, error: KafkaError) -> None:
        # "All brokers are down" comes after the reason and says less.
        if self.last_error and error.code() == KafkaError._ALL_BROKERS_DOWN:
            return
        text = self.last_error = _HTTP.sub("an HTTP server answers, not Kafka", error.str())
        with self._mu:
            self._waiting.setdefault(_CIRCUMSTANCES.sub("", text), (monotonic(), text))

    def look(self, stall: str = "", since: float = 0.0, after_s: float = 0.0) -> None:
        """Tells what is due; to be called several times a second.

        While anything waits for an answer, `stall` says so when `after_s` have passed `since` the last one: of a broker
        that is silent librdkafka says nothing for a minute.
        """
        now = monotonic()
        if stall and now - since >= after_s and not self._told:
            self._told.add(stall)
            self._screen.tell(f"{stall} for {after_s:g} s; it is waited for")
        if now - self._answered_at < _TOLD_AFTER_S:
            return
        with self._mu:
            due = [(key, *entry) for key, entry in self._waiting.items() if now - entry[0] >= _TOLD_AFTER_S]
            for key, _, _ in due:
                del self._waiting[key]
        self._told_at = {key: at for key, at in self._told_at.items() if now - at < _NOT_AGAIN_S}
        for key, since, text in due:
            if now - since < _STALE_AFTER_S and key not in self._told and key not in self._told_at:
                self._told.add(key)
                self._told_at[key] = now
                if len(self._told) <= _TOLD_AT_MOST:
                    self._screen.tell(f"no answer, and it is tried again: {text}")
                elif len(self._told) == _TOLD_AT_MOST + 1:
                    self._screen.tell("more errors of the connection are not shown")

    def answered(self, *, all_is_well: bool) -> None:
        """A broker answers; with `all_is_well` nothing is left that waits for another."""
        self._answered_at = monotonic()
        if all_is_well:
            with self._mu:
                self._waiting.clear()
        if self._told:
            self._told.clear()
            self._screen.tell("brokers answer again")
