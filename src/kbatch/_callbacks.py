"""What users give to be called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

__all__ = ["call_fault", "check_callback", "encoder_fault", "is_coroutine_function"]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def is_coroutine_function(function: object) -> bool:
    """Whether a call of it has to be awaited."""
    call = getattr(function, "__call__", None)  # noqa: B004
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def call_fault(function: Any, *arguments: str) -> str | None:
    """Why it cannot be called with these arguments, by position; ``None`` if it can, or if nobody knows.

    The text goes on after the name of an option.
    """
    if not callable(function):
        return f"must be callable, not {type(function).__name__}"
    if _plainly_takes(function, len(arguments)):
        return None
    signature = _signature(function)
    if signature is None:
        return None
    try:
        signature.bind(*arguments)
    except TypeError:
        return f"must take {_shown_arguments(arguments)}, but {_name(function)} takes {signature}"
    return None


def check_callback(callback: Any, argument: str) -> None:
    """Raises TypeError for a callback that cannot be called with this argument."""
    fault = call_fault(callback, argument)
    if fault is not None:
        raise TypeError(f"callback {fault}")


def encoder_fault(encoder: Callable[..., Any]) -> str | None:
    """As `call_fault`, of an encoder, whose context must not become an option of something else."""
    wrapped = "write a function (message, context) -> bytes that calls it"
    fault = call_fault(encoder, "message", "context")
    if fault is not None:
        return f"{fault}; {wrapped}"
    signature = _signature(encoder)
    if signature is None:
        return f"must take (message, context), and {_name(encoder)} does not tell what it takes; {wrapped}"
    positional = [each for each in signature.parameters.values() if each.kind in _POSITIONAL]
    if len(positional) < 2:
        return None  # *arguments
    second = positional[1]
    knows = second.default is second.empty or second.name.startswith("_") or "context" in second.name
    if knows or "ctx" in second.name:
        return None
    return f"gets a context as its second argument, which {_name(encoder)} would take for {second.name!r}; {wrapped}"


def _plainly_takes(function: Any, count: int) -> bool:
    # The common cases, in a fraction of the time.
    if type(function) is MethodType:
        function, count = function.__func__, count + 1
    if type(function) is not FunctionType:
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


def _name(function: Any) -> str:
    name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else type(function).__qualname__
