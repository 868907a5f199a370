"""Which outbox a command is about: its name on the command line, in the environment or in a file of settings."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import kbatch
from kbatch.cli._failure import USAGE, Failure
from kbatch.cli._settings import VARIABLE

_SQLITE = "sqlite"
_POSTGRES = ("postgresql", "postgres")
_PUBLIC = "public"


@dataclass(frozen=True)
class Place:
    """An outbox's database and the names of its tables.

    Attributes:
        name: A path, or a URL, which may hold a password.
    """

    name: str = field(repr=False)
    prefix: str = "kbatch_"
    wire: str = "kbatch"
    schema: str = _PUBLIC

    @property
    def shown(self) -> str:
        """The name without a password."""
        if "://" not in self.name:
            return self.name
        return re.sub(r"\?.*", "?…", re.sub(r"//.*@", "//…@", self.name))

    def open(self) -> kbatch.SqliteOutbox | kbatch.PostgresOutbox:
        """The outbox; nothing is read yet."""
        scheme, separator, rest = self.name.partition("://")
        if not separator:
            return self._sqlite(self.name)
        if scheme.lower() == _SQLITE:
            host, slash, path = rest.partition("/")
            if host or not slash or not path:
                raise Failure("a URL of SQLite is sqlite:///shop.db, or sqlite:////var/lib/shop.db", USAGE)
            return self._sqlite(path)
        if scheme.lower().partition("+")[0] in _POSTGRES:
            try:
                return kbatch.PostgresOutbox(
                    f"postgresql://{rest}", schema=self.schema, prefix=self.prefix, wire=self.wire
                )
            except kbatch.ConfigError as error:
                raise Failure(str(error), USAGE) from None
        raise Failure("an outbox is a path of a SQLite file, or a URL: sqlite:///… or postgresql://…", USAGE)

    def _sqlite(self, path: str) -> kbatch.SqliteOutbox:
        if self.schema != _PUBLIC:
            raise Failure("--schema is for PostgreSQL", USAGE)
        try:
            return kbatch.SqliteOutbox(path, prefix=self.prefix, wire=self.wire)
        except kbatch.ConfigError as error:
            raise Failure(str(error), USAGE) from None


def find_place(
    name: str | None,
    prefix: str | None,
    file: Mapping[str, object] | None = None,
    *,
    schema: str | None = None,
    wire: str = "kbatch",
    environment: Mapping[str, str] = os.environ,
) -> Place:
    """The place that an option names, else the environment, else a file of settings."""
    file = file or {}
    found = name or environment.get(VARIABLE) or file.get("outbox")
    if not found:
        raise Failure(f"no outbox is named: give --outbox PATH, {VARIABLE}, or outbox in a --config FILE", USAGE)
    return Place(
        str(found),
        str(prefix or file.get("prefix") or "kbatch_"),
        wire,
        str(schema or file.get("schema") or _PUBLIC),
    )
