"""The command line: ``kbatch demo``, ``kbatch produce``. Needs the extra ``kbatch-kafka[cli]``."""

import sys

__all__ = ["main"]


def main() -> None:
    """The console script ``kbatch``: runs the command that `sys.argv` names and exits with its status."""
    try:
        from kbatch.cli._app import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich", "click"):
            raise
        print(
            f"kbatch: the command line needs {error.name}; install it with: pip install 'kbatch-kafka[cli]'",
            file=sys.stderr,
        )
        sys.exit(1)
    app(prog_name="kbatch")
