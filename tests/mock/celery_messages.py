"""Messages for a Celery worker, in files.

A worker of kombu's `filesystem` transport may read a file before its writer has written it, and then ends. So what is
sent here goes to a folder beside the worker's own, and from there to it when it is whole.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class Messages:
    """`folder` is a new one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written, self._whole = folder / "written", folder / "whole"
        self._written.mkdir(parents=True)
        self._whole.mkdir()

    def _options(self, out: Path) -> dict[str, str]:
        places = {"data_folder_in": self._whole, "data_folder_out": out, "control_folder": self._folder / "control"}
        return {name: str(path) for name, path in places.items()}

    @property
    def of_the_worker(self) -> dict[str, str]:
        """Its variables."""
        return self._variables(self._whole)

    @property
    def of_who_sends(self) -> dict[str, Any]:
        """The transport options."""
        return self._options(self._written)

    def _variables(self, out: Path) -> dict[str, str]:
        return {"CELERY_BROKER": "filesystem://", "CELERY_BROKER_OPTIONS": json.dumps(self._options(out))}

    def send_by(self, code: str, folder: Path, **variables: str) -> None:
        """Runs code that sends, in a process of its own."""
        environment = {**os.environ, **variables, **self._variables(self._written)}
        subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True)
        self.deliver()

    def deliver(self) -> None:
        """Gives the worker what was sent by now."""
        for path in sorted(self._written.iterdir()):
            path.rename(self._whole / path.name)
