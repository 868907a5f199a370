"""How a command runs: what it raises becomes one line and an exit status."""

import os
from collections.abc import Callable
from enum import Enum

import typer

import kbatch
from kbatch.cli._failure import USAGE, Failure
from kbatch.cli._screen import Screen, has_output


class Wire(str, Enum):
    KBATCH = "kbatch"
    WOLVERINE = "wolverine"
    CLOUDEVENTS = "cloudevents"
    RAW = "raw"


def typed(option: str, value: str) -> str:
    """What was typed: where the locale has no such characters Python has kept their bytes, which are UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(value).decode()
        except ValueError:
            raise Failure(f"{option} must be UTF-8 text", USAGE) from None
    return value


def exit_with(work: Callable[[], int], screen: Screen, *, prints: bool = False) -> None:
    """Ends the command with the status that `work` returns.

    With `prints` it has done nothing but print, so it has failed if that did not arrive. That a reader went away
    (``| head``) is no failure.
    """
    try:
        status = work()
    except Failure as failure:
        screen.tell(str(failure))
        status = failure.status
    except kbatch.KbatchError as error:
        screen.tell(for_people(error))
        status = 1
    except KeyboardInterrupt:
        screen.tell("interrupted")
        status = 130
    if prints and status == 0 and screen.loss is not None and not isinstance(screen.loss, BrokenPipeError):
        if not has_output():  # what else it is, is told at the end of all commands
            screen.tell("there is no standard output to print to")
        status = 1
    raise typer.Exit(status)


def for_people(error: kbatch.KbatchError) -> str:
    """What an error says, with the command beside the method that it names."""
    return str(error) + command_of(error)


def command_of(error: BaseException) -> str:
    """The command that does what an error says; nothing where there is none."""
    kinds: dict[type[kbatch.KbatchError], str] = {kbatch.OutboxError: "outbox", kbatch.InboxError: "inbox"}
    what = next((what for kind, what in kinds.items() if isinstance(error, kind)), None)
    return f" (kbatch {what} create)" if what and "create()" in str(error) else ""
