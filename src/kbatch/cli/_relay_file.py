"""The file of a relay's settings."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import kbatch
from kbatch.cli._toml_file import TomlFile

# What else a `Relay` takes is no number of a file.
_NOT_IN_FILES = {"self", "outbox", "producer", "retry", "on_state_change"}
RELAY_OPTIONS = [name for name in inspect.signature(kbatch.Relay.__init__).parameters if name not in _NOT_IN_FILES]
RETRY_OPTIONS = [each.name for each in dataclasses.fields(kbatch.RetryPolicy)]


class RelayFile(TomlFile):
    """What a file says: ``outbox``, ``prefix``, ``schema``, ``notify``; tables ``relay``, ``retry``, ``kafka``."""

    top: ClassVar[Mapping[str, type]] = {"outbox": str, "prefix": str, "schema": str, "notify": bool}
    tables: ClassVar[Mapping[str, Sequence[str] | None]] = {
        "relay": RELAY_OPTIONS,
        "retry": RETRY_OPTIONS,
        "kafka": None,
    }

    @property
    def relay(self) -> Mapping[str, Any]:
        """Options of a `Relay`."""
        return self.table("relay")
