"""The file of a listener's settings."""

import inspect
from collections.abc import Mapping, Sequence
from typing import ClassVar

import kbatch
from kbatch.cli._relay_file import RETRY_OPTIONS
from kbatch.cli._toml_file import TomlFile

# Objects of Python, or what stands elsewhere in the file.
_NOT_IN_FILES = {
    "self", "config", "topics", "handler", "types", "retry", "reject_on", "producer", "inbox", "on_dead"
}  # fmt: skip
LISTEN_OPTIONS = [name for name in inspect.signature(kbatch.Listener.__init__).parameters if name not in _NOT_IN_FILES]


class ListenFile(TomlFile):
    """What a file says: ``handler``, ``topics``, ``reject_on``, where the inbox is, and the tables ``types``,
    ``listener``, ``retry`` and ``kafka``."""

    top: ClassVar[Mapping[str, type]] = {
        "handler": str, "topics": list, "reject_on": list, "inbox": str, "prefix": str, "schema": str
    }  # fmt: skip
    tables: ClassVar[Mapping[str, Sequence[str] | None]] = {
        "types": None,
        "listener": LISTEN_OPTIONS,
        "retry": RETRY_OPTIONS,
        "kafka": None,
    }
