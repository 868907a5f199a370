"""librdkafka's settings from the command line, the environment and a file."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kbatch.cli._failure import USAGE, Failure

PREFIX = "KBATCH_"


@dataclass(frozen=True)
class Settings:
    """Keys and values as librdkafka takes them, and where each came from. Values may be secrets: never shown."""

    values: Mapping[str, str] = field(repr=False)
    origins: Mapping[str, str]

    @classmethod
    def collect(cls, options: Iterable[str], file: Path | None, environment: Mapping[str, str]) -> "Settings":
        """Settings from ``-X`` options before those from ``KBATCH_…`` variables before those from a file."""
        values: dict[str, str] = {}
        origins: dict[str, str] = {}
        for source in (_from_file(file), _from_environment(environment), _from_options(options)):
            for key, (value, origin) in source.items():
                values[key] = value
                origins[key] = origin
        return cls(values, origins)

    def explain(self, message: str) -> str:
        """An error that begins with a setting's key, with where that setting came from."""
        named = [key for key in self.origins if message.startswith(key)]
        return f"{message} (from {self.origins[max(named, key=len)]})" if named else message


Source = dict[str, tuple[str, str]]


def _from_options(options: Iterable[str]) -> Source:
    found = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key.strip():
            # Not the text itself: it may be a password.
            raise Failure("-X takes KEY=VALUE, such as -X bootstrap.servers=localhost:9092", USAGE)
        found[key.strip()] = (value, "-X")
    return found


def _from_environment(environment: Mapping[str, str]) -> Source:
    found = {}
    for name, value in environment.items():
        if name.startswith(PREFIX) and len(name) > len(PREFIX):
            key = name[len(PREFIX) :].lower().replace("__", "\0").replace("_", ".").replace("\0", "_")
            found[key] = (value, name)
    return found


def _from_file(file: Path | None) -> Source:
    if file is None:
        return {}
    try:
        text = file.read_text("utf-8-sig")
    except OSError as error:
        raise Failure(f"cannot read the configuration file {file}: {os.strerror(error.errno or 0)}", USAGE) from None
    except UnicodeDecodeError as error:
        raise Failure(f"the configuration file {file} is not UTF-8 text (byte {error.start})", USAGE) from None
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, equals, value = line.partition("=")
        if not equals or not key.strip():
            raise Failure(f"{file}, line {number}: expected key=value, or # and a comment", USAGE)
        found[key.strip()] = (value.strip(), f"{file}, line {number}")
    return found
