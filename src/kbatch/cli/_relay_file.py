"""The file of a relay's settings, which is TOML."""

import dataclasses
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kbatch
from kbatch.cli._failure import USAGE, Failure
from kbatch.cli._settings import Setting

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What else a `Relay` takes is no number of a file.
_NOT_IN_FILES = {"self", "outbox", "producer", "retry"}
RELAY_OPTIONS = [name for name in inspect.signature(kbatch.Relay.__init__).parameters if name not in _NOT_IN_FILES]
RETRY_OPTIONS = [each.name for each in dataclasses.fields(kbatch.RetryPolicy)]
_TABLES = {"relay": RELAY_OPTIONS, "retry": RETRY_OPTIONS, "kafka": None}
_TEXTS = ("outbox", "prefix", "schema")


class RelayFile:
    """What a file says: ``outbox``, ``prefix``, ``schema``, ``notify``; tables ``relay``, ``retry``, ``kafka``."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.values: dict[str, Any] = {} if path is None else _read(path)
        for name, value in self.values.items():
            if name in _TEXTS:
                if not isinstance(value, str):
                    raise self._wrong(f"{name} must be text")
            elif name == "notify":
                if not isinstance(value, bool):
                    raise self._wrong("notify must be true or false")
            elif name not in _TABLES:
                raise self._wrong(
                    f"there is no setting {name!r}; there are outbox, prefix, schema, notify, [relay], [retry], [kafka]"
                )
            elif not isinstance(value, dict):
                raise self._wrong(f"{name} must be a table, [{name}]")
            else:
                known = _TABLES[name]
                for key in value:
                    if known is not None and key not in known:
                        raise self._wrong(f"[{name}] has no {key!r}; it has {', '.join(known)}")

    @property
    def relay(self) -> Mapping[str, Any]:
        """Options of a `Relay`."""
        found: Mapping[str, Any] = self.values.get("relay", {})
        return found

    @property
    def retry(self) -> Mapping[str, Any]:
        """What a `RetryPolicy` has."""
        found: Mapping[str, Any] = self.values.get("retry", {})
        return found

    def kafka(self) -> Iterator[Setting]:
        """Settings of librdkafka."""
        for key, value in _flat("", self.values.get("kafka", {})):
            if isinstance(value, bool):
                text = "true" if value else "false"
            elif isinstance(value, (str, int, float)):
                text = str(value)
            else:
                raise self._wrong(f"[kafka] has a value that is no text, number, true or false: {key}")
            yield Setting(key, text, f"{self._path}, [kafka]")

    def _wrong(self, text: str) -> Failure:
        return Failure(f"{self._path}: {text}", USAGE)


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise Failure(f"cannot read the configuration file {path}: {os.strerror(error.errno or 0)}", USAGE) from None
    except UnicodeDecodeError as error:
        raise Failure(f"the configuration file {path} is not UTF-8 text (byte {error.start})", USAGE) from None
    except tomllib.TOMLDecodeError as error:
        raise Failure(f"the configuration file {path} is not TOML: {error}", USAGE) from None
    return found


def _flat(before: str, table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys with dots as librdkafka has them, which TOML takes for tables within each other."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(f"{before}{key}.", value)
        else:
            yield before + key, value
