"""What users give to be called."""

from __future__ import annotations

import functools
import inspect
import sys
import types
import weakref
from typing import TYPE_CHECKING, Any

from kbatch._errors import type_name

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "ReportCallback",
    "call_fault",
    "callback_name",
    "check_callback",
    "encoder_fault",
    "has_coroutine_methods",
    "is_coroutine_function",
    "loops_own",
    "refuse_coroutine",
]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

_METHODS = (
    *("mark_successful", "mark_processing_failure", "mark_serialization_failure", "mark_timed_out"),
    *("mark_topic_does_not_exist", "mark_circuit_open"),
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


def loops_own(function: Any) -> str | None:
    """What `function` is if nobody but an event loop may call it: it would do nothing on a thread, or wake nobody."""
    if is_coroutine_function(function):
        return "a coroutine function"
    future = getattr(sys.modules.get("asyncio"), "Future", ())  # nothing is one as long as asyncio is not imported
    is_asyncios = str(getattr(function, "__module__", "")).startswith("asyncio.")
    if isinstance(getattr(function, "__self__", None), future) or (
        is_asyncios and not str(getattr(function, "__name__", "")).endswith("_threadsafe")
    ):
        name = callback_name(function)
        remedy = (
            "asyncio.wait takes asyncio.ensure_future(…) of a batch"
            if "<locals>" in name
            else "use loop.call_soon_threadsafe"
        )
        return f"asyncio's {name}, which only an event loop may call ({remedy})"
    return None


def call_fault(function: Any, *arguments: str) -> str | None:
    """Why it cannot be called with these arguments, by position; ``None`` if it can, or if nobody knows.

    The text goes on after the name of an option.
    """
    if not callable(function):
        return f"must be callable, not {type_name(function)}"
    if _plainly_takes(function, len(arguments)):
        return None
    signature = _signature(function)
    if signature is None:
        return None
    try:
        signature.bind(*arguments)
    except TypeError:
        return f"must take {_shown_arguments(arguments)}, but {callback_name(function)} takes {signature}"
    return None


def check_callback(name: str, function: Any, *arguments: str, takes_coroutines: bool = False) -> None:
    """Raises TypeError for what cannot be called with these arguments, and on a thread for what needs a loop."""
    fault = call_fault(function, *arguments)
    owned = None if fault or takes_coroutines else loops_own(function)
    if owned is not None:
        fault = f"must not be {owned}: it is called on a thread of the producer, where nothing awaits"
    if fault is not None:
        raise TypeError(f"{name} {fault}")


def encoder_fault(encoder: Callable[..., Any]) -> str | None:
    """As `call_fault`, of an encoder, whose context must not become an option of something else."""
    wrapped = "write a function (message, context) -> bytes that calls it"
    fault = call_fault(encoder, "message", "context")
    if fault is not None:
        return f"{fault}; {wrapped}"
    signature = _signature(encoder)
    if signature is None:
        return f"must take (message, context), and {callback_name(encoder)} does not tell what it takes; {wrapped}"
    positional = [each for each in signature.parameters.values() if each.kind in _POSITIONAL]
    if len(positional) < 2:
        return None  # *arguments
    second = positional[1]
    knows = second.default is second.empty or second.name.startswith("_") or "context" in second.name
    if knows or "ctx" in second.name:
        return None
    name = callback_name(encoder)
    return f"gets a context as its second argument, which {name} would take for {second.name!r}; {wrapped}"


def _plainly_takes(function: Any, count: int) -> bool:
    # The common cases, in a fraction of the time.
    if type(function) is types.MethodType:
        function, count = function.__func__, count + 1
    if type(function) is not types.FunctionType:
        return False
    code = function.__code__
    least = code.co_argcount - len(function.__defaults__ or ())
    return least <= count <= code.co_argcount and not code.co_kwonlyargcount


def _signature(function: Any) -> inspect.Signature | None:
    try:
        # A decorator may take something else than what it wraps.
        return inspect.signature(function, follow_wrapped=False)
    except MemoryError:
        raise
    except Exception:  # of many builtins; or a property of the user's fails
        return None


def _shown_arguments(names: tuple[str, ...]) -> str:
    return f"({', '.join(names)})" if names else "no arguments"


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
