"""librdkafka's events become calls of the user's callbacks."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from kbatch._fastmap import CallbackThread, Dispatcher, TokenRefresh
from kbatch._text import counted, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from kbatch._config import ClientConfig
    from kbatch._fastmap import Core

__all__ = ["make_dispatcher"]

_logger = logging.getLogger("kbatch")

# Behind a callback that takes long, or hangs, so many of them wait at most.
_MOST_WAITING = 1_000
_MOST_WAITING_BEFORE_STATS = 100  # they may be of a megabyte each, and the next ones say more


def make_dispatcher(
    config: ClientConfig,
    callbacks: CallbackThread,
    find_core: Callable[[], Core | None],
    others: tuple[CallbackThread, ...] = (),
) -> Dispatcher:
    """Turns librdkafka's events into calls of the user's callbacks, which have confluent-kafka's signatures.

    `others` end with the producer, too.
    """
    on_error = on_stats = on_log = on_oauth = on_throttle = None
    events = _Events(callbacks)
    if config.error_cb is not None:
        error_cb = config.error_cb

        def on_error(code: int, reason: str, fatal: bool) -> None:
            from confluent_kafka import KafkaError

            most = math.inf if fatal else _MOST_WAITING  # there is one, and the producer is of no use after it
            events.put(error_cb, KafkaError(code, reason, fatal=fatal), most_waiting=most)

    if config.stats_cb is not None:
        stats_cb = config.stats_cb

        def on_stats(json: str) -> None:
            events.put(stats_cb, json, most_waiting=_MOST_WAITING_BEFORE_STATS)

    if config.throttle_cb is not None:
        throttle_cb = config.throttle_cb

        def on_throttle(broker: str, broker_id: int, throttle_ms: int) -> None:
            from confluent_kafka import ThrottleEvent

            events.put(throttle_cb, ThrottleEvent(broker, broker_id, throttle_ms / 1000))

    if config.logger is not None:
        logger = config.logger

        def on_log(level: int, facility: str, name: str, text: str) -> None:
            events.put(logger.log, _LEVELS[level], "%s [%s] %s", facility, name, printable(text))

    if config.oauth_cb is not None:
        oauth_cb = config.oauth_cb
        refresher = CallbackThread("kbatch-oauth")  # its own: a token must not wait behind other callbacks
        others = (*others, refresher)

        def on_oauth(oauth_config: str | None) -> None:
            refresher.put(TokenRefresh(oauth_cb, oauth_config, find_core))

    return Dispatcher(
        callbacks,
        others,
        on_error=on_error,
        on_stats=on_stats,
        on_log=on_log,
        on_oauth=on_oauth,
        throttle_cb=on_throttle,
    )


class _Events:
    """Puts events behind what waits for the callback thread already. If too many of them wait they are dropped; answers
    of batches, which go the same way, count for nothing here."""

    def __init__(self, callbacks: CallbackThread) -> None:
        self._callbacks = callbacks
        self._put = self._dropped = 0  # the dispatcher's
        self._begun = self._told = 0  # the callback thread's

    def put(self, callback: Callable[..., object], *arguments: object, most_waiting: float = _MOST_WAITING) -> None:
        if self._put - self._begun >= most_waiting:
            self._dropped += 1
            return
        self._callbacks.put(self._begin)  # a call of its own: what the callback raises is logged with its own name
        self._put += 1
        self._callbacks.put(callback, *arguments)

    def _begin(self) -> None:
        self._begun += 1
        dropped = self._dropped - self._told
        if dropped:
            self._told += dropped
            _logger.warning(
                "%s of librdkafka had no room behind slow callbacks and were dropped", counted(dropped, "event")
            )


# syslog's levels as Python's
_LEVELS = (50, 50, 50, 40, 30, 20, 20, 10)
