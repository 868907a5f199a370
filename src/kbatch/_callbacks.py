"""What users give to be called."""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
import types
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

from kbatch._errors import type_name

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "ReportCallback",
    "callback_name",
    "check_callback",
    "has_coroutine_methods",
    "is_coroutine_function",
    "marked_as_coroutine_function",
    "refuse_coroutine",
]

_F = TypeVar("_F", bound="Callable[..., Any]")

_METHODS = (
    *("mark_successful", "mark_processing_failure", "mark_serialization_failure", "mark_timed_out"),
    *("mark_topic_does_not_exist", "mark_sender_is_latched"),
)
_plain: weakref.WeakSet[type] = weakref.WeakSet()  # callbacks of these have no coroutine method


class ReportCallback:
    """Calls a user's callback with the report of the batch that it is called with."""

    __slots__ = ("user_callback",)

    def __init__(self, user_callback: Callable[[Any], object]) -> None:
        self.user_callback = user_callback

    def __call__(self, batch: Any) -> object:
        return self.user_callback(batch.report)


def callback_name(function: object) -> str:
    """How a log names a user's callback. Not its repr: that of a functools.partial shows the arguments."""
    try:
        while True:
            if isinstance(function, functools.partial):
                function = function.func
            elif hasattr(type(function), "user_callback"):  # ours, around the user's
                function = function.user_callback  # type: ignore[attr-defined]
            else:
                return str(function.__qualname__)  # type: ignore[attr-defined]
    except BaseException:  # it has none, or its class is the user's
        return type_name(function)


def is_coroutine_function(function: object) -> bool:
    """Whether a call of it has to be awaited."""
    while isinstance(function, functools.partial):
        function = function.func
    call = getattr(function, "__call__", None)  # noqa: B004
    return any(inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each) for each in (function, call))


def check_callback(name: str, function: object, *, takes_coroutines: bool = False) -> None:
    """Raises TypeError for what cannot be called, and for a coroutine function that nobody would await."""
    if function is not None and not callable(function):
        raise TypeError(f"{name} must be callable, not {type_name(function)}")
    if not takes_coroutines and is_coroutine_function(function):
        raise TypeError(
            f"{name} must not be a coroutine function: it is called on a thread of the producer, where nothing awaits"
        )


def has_coroutine_methods(callback: object) -> bool:
    """Whether a method of a `SenderCallback` has to be awaited, as far as its class tells."""
    kind = type(callback)
    if kind in _plain:
        return False
    if any(is_coroutine_function(getattr(kind, name, None)) for name in _METHODS):
        return True
    _plain.add(kind)
    return False


def refuse_coroutine(answer: object) -> None:
    """Raises TypeError if a callback has answered with a coroutine, which nobody would await: it has done nothing."""
    if isinstance(answer, types.CoroutineType):
        answer.close()
        raise TypeError("it made a coroutine, which nothing awaits here; kbatch.aio takes coroutine functions")


def marked_as_coroutine_function(function: _F) -> _F:
    """For inspect and for mocks: it takes its arguments when it is called, and returns a coroutine.

    Up to Python 3.11 only asyncio and unittest.mock see it.
    """
    if sys.version_info >= (3, 12):
        return inspect.markcoroutinefunction(function)
    function._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]
    return function
