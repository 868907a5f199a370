"""The file of a relay's settings."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import kbatch
from kbatch._options import RelayOptions
from kbatch.cli._toml_file import TomlFile

_NOT_IN_FILES = {"retry", "on_state_change", "on_dead"}  # the first has a table of its own, others are for programs
RELAY_OPTIONS = [each.name for each in dataclasses.fields(RelayOptions) if each.name not in _NOT_IN_FILES]
RELAY_OPTIONS.append("close_timeout_s")
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
