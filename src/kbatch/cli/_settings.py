"""librdkafka's settings from the command line, the environment and a file."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kbatch._config import canonical, shown_key
from kbatch.cli._failure import USAGE, Failure

PREFIX = "KBATCH_"
#: Each names a database, and is no setting of librdkafka: the URL may hold a password.
OUTBOX_VARIABLE = "KBATCH_OUTBOX"
INBOX_VARIABLE = "KBATCH_INBOX"
# The last one is the pytest plugin's.
_NO_SETTINGS = {OUTBOX_VARIABLE, INBOX_VARIABLE, "KBATCH_TEST_POSTGRES"}

# What Kubernetes sets for each Service of the namespace. A Service `kbatch` gives these names the prefix above, and so
# does a Service `kbatch-…`.
_SERVICE_LINK = re.compile(
    r"(KBATCH(?:_[A-Z0-9_]+?)??)_(?:SERVICE_HOST|SERVICE_PORT(?:_[A-Z0-9_]+)?"
    r"|PORT(?:_[0-9]+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)?)"
)
_VARIABLE_TEXT = re.compile("[A-Z0-9_]*")


@dataclass(frozen=True)
class Setting:
    """A key of librdkafka as it was written, its value and where it stands."""

    key: str = field(repr=False)  # it may hold a secret when the line is no setting
    value: str = field(repr=False)
    origin: str


class Settings:
    """Keys and values as librdkafka takes them, and where each came from. Values may be secrets: never shown."""

    def __init__(self, found: dict[str, Setting]) -> None:
        self._found = found  # by the one name of a key that may have several

    @classmethod
    def collect(
        cls, options: Iterable[str], file: Path | Iterable[Setting] | None, environment: Mapping[str, str]
    ) -> "Settings":
        """Settings from ``-X`` options before those from ``KBATCH_…`` variables before those from a file.

        librdkafka's aliases are one key. Of two options, or of two lines of the file, the last one counts.

        Args:
            file: One of lines ``key=value``, or what was read from another.
        """
        found: dict[str, Setting] = {}
        lines = _from_file(file) if file is None or isinstance(file, Path) else file
        for source in (lines, _from_environment(environment), _from_options(options)):
            found.update((canonical(setting.key), setting) for setting in source)
        return cls(found)

    @property
    def values(self) -> dict[str, str]:
        """What a producer takes: each key as it was written."""
        return {setting.key: setting.value for setting in self._found.values()}

    def find(self, key: str) -> Setting | None:
        """The setting of a key, whichever of librdkafka's names for it was written."""
        return self._found.get(canonical(key))

    def explain(self, message: str) -> str:
        """An error that begins with a setting's key, with where that setting came from."""
        # The first of those that are shown alike is the one that is refused.
        named = {shown_key(setting.key): setting.origin for setting in reversed(self._found.values())}
        begins = [key for key in named if message.startswith(key)]
        return f"{message} (from {named[max(begins, key=len)]})" if begins else message


def _from_options(options: Iterable[str]) -> Iterator[Setting]:
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key.strip():
            # Not the text itself: it may be a password.
            raise Failure("-X takes KEY=VALUE, such as -X bootstrap.servers=localhost:9092", USAGE)
        yield Setting(key.strip(), value, "-X")


def _from_environment(environment: Mapping[str, str]) -> Iterator[Setting]:
    found: dict[str, Setting] = {}
    for name, value in environment.items():
        if name in _NO_SETTINGS or not name.startswith(PREFIX) or len(name) == len(PREFIX):
            continue
        if not _is_of_a_service(name, environment):
            key = name[len(PREFIX) :].lower().replace("__", "\0").replace("_", ".").replace("\0", "_")
            setting = Setting(key, value, _shown_variable(name))
            other = found.setdefault(canonical(key), setting)
            if other.value != value:  # variables have no order
                raise Failure(
                    f"{other.origin} and {setting.origin} are two names of one setting and have different values; "
                    "set one",
                    USAGE,
                )
    yield from found.values()


def _is_of_a_service(name: str, environment: Mapping[str, str]) -> bool:
    match = _SERVICE_LINK.fullmatch(name)
    # Of another Service than `kbatch` a name might be a mistyped key, unless the Service is there.
    return match is not None and (match[1] == "KBATCH" or f"{match[1]}_SERVICE_HOST" in environment)


def _shown_variable(name: str) -> str:
    begin = _VARIABLE_TEXT.match(name)
    assert begin is not None
    return name if begin[0] == name else begin[0] + "…"


def _from_file(file: Path | None) -> Iterator[Setting]:
    if file is None:
        return
    try:
        text = file.read_text("utf-8-sig")
    except OSError as error:
        raise Failure(f"cannot read the configuration file {file}: {os.strerror(error.errno or 0)}", USAGE) from None
    except UnicodeDecodeError as error:
        raise Failure(f"the configuration file {file} is not UTF-8 text (byte {error.start})", USAGE) from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, equals, value = line.partition("=")
        if not equals or not key.strip():
            raise Failure(f"{file}, line {number}: expected key=value, or # and a comment", USAGE)
        yield Setting(key.strip(), value.strip(), f"{file}, line {number}")
