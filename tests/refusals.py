"""Why a configuration is refused, be it when the producer is made or when it starts."""

from __future__ import annotations

from typing import Any

import kbatch


def refusal(config: dict[str, Any]) -> kbatch.ConfigError | None:
    try:
        producer = kbatch.Producer(config)
        try:
            producer._core.start()
        finally:
            producer.close(0)
    except kbatch.ConfigError as error:
        return error
    return None
