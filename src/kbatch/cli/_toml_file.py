"""A file of a long-running command's settings, which is TOML."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from kbatch.cli._failure import USAGE, Failure
from kbatch.cli._settings import Setting

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class TomlFile:
    """What a file says: texts, and tables of which each has these keys, or any."""

    #: Names at the top, and of what kind they are.
    top: ClassVar[Mapping[str, type]]
    tables: ClassVar[Mapping[str, Sequence[str] | None]]
    _KINDS: ClassVar[Mapping[type, str]] = {str: "text", list: "a list", bool: "true or false"}

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.values: dict[str, Any] = {} if path is None else _read(path)
        for name, value in self.values.items():
            if name in self.top:
                if not isinstance(value, self.top[name]):
                    raise self.wrong(f"{name} must be {self._KINDS[self.top[name]]}")
            elif name not in self.tables:
                known = ", ".join((*self.top, *(f"[{each}]" for each in self.tables)))
                raise self.wrong(f"there is no setting {name!r}; there are {known}")
            elif not isinstance(value, dict):
                raise self.wrong(f"{name} must be a table, [{name}]")
            else:
                keys = self.tables[name]
                for key in value:
                    if keys is not None and key not in keys:
                        raise self.wrong(f"[{name}] has no {key!r}; it has {', '.join(keys)}")

    def table(self, name: str) -> Mapping[str, Any]:
        """What a table has; nothing where there is none."""
        found: Mapping[str, Any] = self.values.get(name, {})
        return found

    @property
    def retry(self) -> Mapping[str, Any]:
        """What a `RetryPolicy` has."""
        return self.table("retry")

    def kafka(self) -> Iterator[Setting]:
        """Settings of librdkafka."""
        for key, value in _flat("", self.table("kafka")):
            if isinstance(value, bool):
                text = "true" if value else "false"
            elif isinstance(value, (str, int, float)):
                text = str(value)
            else:
                raise self.wrong(f"[kafka] has a value that is no text, number, true or false: {key}")
            yield Setting(key, text, f"{self._path}, [kafka]")

    def wrong(self, text: str) -> Failure:
        """What is wrong in the file ends the command."""
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
