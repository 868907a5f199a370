"""librdkafka's events become calls of the user's callbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbatch._fastmap import CallbackThread, Dispatcher, TokenRefresh
from kbatch._text import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from kbatch._config import ClientConfig
    from kbatch._fastmap import Core

__all__ = ["make_dispatcher"]


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
    if config.error_cb is not None:
        error_cb = config.error_cb

        def on_error(code: int, reason: str, fatal: bool) -> None:
            from confluent_kafka import KafkaError

            callbacks.put(error_cb, KafkaError(code, reason, fatal=fatal))

    if config.stats_cb is not None:
        stats_cb = config.stats_cb

        def on_stats(json: str) -> None:
            callbacks.put(stats_cb, json)

    if config.throttle_cb is not None:
        throttle_cb = config.throttle_cb

        def on_throttle(broker: str, broker_id: int, throttle_ms: int) -> None:
            from confluent_kafka import ThrottleEvent

            callbacks.put(throttle_cb, ThrottleEvent(broker, broker_id, throttle_ms / 1000))

    if config.logger is not None:
        logger = config.logger

        def on_log(level: int, facility: str, name: str, text: str) -> None:
            callbacks.put(logger.log, _LEVELS[level], "%s [%s] %s", facility, name, printable(text))

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


# syslog's levels as Python's
_LEVELS = (50, 50, 50, 40, 30, 20, 20, 10)
