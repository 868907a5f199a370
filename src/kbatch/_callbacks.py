"""What users give to be called."""

from __future__ import annotations

import inspect

__all__ = ["is_coroutine_function"]


def is_coroutine_function(function: object) -> bool:
    """Whether a call of it has to be awaited."""
    call = getattr(function, "__call__", None)  # noqa: B004
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)
