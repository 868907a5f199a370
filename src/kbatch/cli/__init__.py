"""The command line: ``kbatch demo``, ``produce``, ``consume``, ``listen``, ``replay``, ``dead-topic``,
``relay``, ``outbox``. Needs the extra ``kbatch-kafka[cli]``."""

import gc
import os
import sys

__all__ = ["main"]


def main() -> None:
    """The console script ``kbatch``: runs the command that `sys.argv` names and exits with its status."""
    _fill_standard_descriptors()
    if "_KBATCH_COMPLETE" in os.environ:
        os.environ["TERMINAL_WIDTH"] = "10000"  # fish takes each line for a completion, so the framework may wrap none
    # What is imported stays until the end: neither now nor at the end is it searched for garbage. A fifth of the time
    # that a short command takes.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        from kbatch.cli._app import app
        from kbatch.cli._screen import plain_streams
    except KeyboardInterrupt:
        print("kbatch: interrupted", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich", "click"):
            raise
        print(
            f"kbatch: the command line needs {error.name}; install it with: pip install 'kbatch-kafka[cli]'",
            file=sys.stderr,
        )
        sys.exit(1)
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
    with plain_streams():
        try:
            app(prog_name="kbatch")
        except SystemExit as ended:
            # Before a command's work begins, it is the framework that Ctrl-C ends.
            if isinstance(getattr(ended.__context__, "__cause__", None), KeyboardInterrupt):
                print("kbatch: interrupted", file=sys.stderr)
            raise


def _fill_standard_descriptors() -> None:
    # Else the next file or connection would be standard error, to which librdkafka writes.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
