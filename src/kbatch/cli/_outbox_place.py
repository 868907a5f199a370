"""Which outbox a command is about: its name on the command line, in the environment or in a file of settings."""

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import kbatch
from kbatch.cli._failure import USAGE, Failure
from kbatch.cli._settings import VARIABLE

_SQLITE = "sqlite"
_POSTGRES = ("postgresql", "postgres")
_ALMOST_URLS = tuple(f"{kind}:" for kind in _POSTGRES)  # else the password is shown as a part of a path
_CONNINFO = re.compile(r"(^|\s)(host|hostaddr|dbname|user|password|service)\s*=")

Outbox: TypeAlias = kbatch.SqliteOutbox | kbatch.PostgresOutbox


@dataclass(frozen=True)
class Place:
    """An outbox's database and the names of its tables.

    Attributes:
        name: A path, or a URL, which may hold a password.
    """

    name: str = field(repr=False)
    prefix: str = "kbatch_"
    wire: str = "kbatch"
    schema: str | None = None
    notify: bool = False

    @property
    def shown(self) -> str:
        """The name without what may be secret: user, password and parameters."""
        kind, rest = self._split()
        return f"postgresql://{re.sub('^[^/@]*@', '', rest).partition('?')[0]}" if kind in _POSTGRES else self.name

    def open(self) -> Outbox:
        """The outbox; nothing is read yet."""
        in_postgres = functools.partial(kbatch.PostgresOutbox, notify=self.notify)
        found: Outbox = self._open(kbatch.SqliteOutbox, in_postgres, {"wire": self.wire}, "an outbox")
        return found

    def open_inbox(self) -> kbatch.SqliteInbox | kbatch.PostgresInbox:
        """The inbox in the same place; nothing is read yet."""
        found: kbatch.SqliteInbox | kbatch.PostgresInbox = self._open(
            kbatch.SqliteInbox, kbatch.PostgresInbox, {}, "an inbox"
        )
        return found

    def _open(self, in_sqlite: Any, in_postgres: Any, given: dict[str, Any], what: str) -> Any:
        kind, rest = self._split()
        options = {"prefix": self.prefix, **given}
        try:
            if kind in _POSTGRES:
                return in_postgres(f"postgresql://{rest}", schema=self.schema or "public", **options)
            if kind not in ("", _SQLITE):
                raise Failure(
                    f"{what} is a path of a SQLite file, or a URL that begins with sqlite:/// or postgresql://", USAGE
                )
            if self.notify:
                raise Failure("notify is for PostgreSQL: SQLite has no NOTIFY", USAGE)
            if self.schema is not None:
                raise Failure("--schema is for PostgreSQL: a SQLite file has none", USAGE)
            return in_sqlite(_path(rest) if kind else rest, **options)
        except kbatch.ConfigError as error:
            raise Failure(str(error), USAGE) from None

    def _split(self) -> tuple[str, str]:
        """The kind of database that a URL names, and the rest of it; a path has none."""
        scheme, separator, rest = self.name.partition("://")
        if separator:
            return scheme.lower().partition("+")[0], rest
        if _CONNINFO.search(self.name) or self.name.lower().startswith(_ALMOST_URLS):
            raise Failure("an outbox in PostgreSQL is named by a URL: postgresql://user@host/database", USAGE)
        return "", self.name


def _path(rest: str) -> str:
    host, slash, path = rest.partition("/")
    if host or not slash or not path:
        raise Failure("a URL of SQLite is sqlite:///shop.db, or sqlite:////var/lib/shop.db", USAGE)
    return path


def find_place(
    name: str | None,
    prefix: str | None,
    schema: str | None,
    file: Mapping[str, object] | None = None,
    *,
    wire: str = "kbatch",
    environment: Mapping[str, str] = os.environ,
) -> Place:
    """The place that an option names, else the environment, else a file of settings."""
    file = file or {}
    found = name or environment.get(VARIABLE) or file.get("outbox")
    if not found:
        raise Failure(f"no outbox is named: give --outbox PATH, {VARIABLE}, or outbox in a --config FILE", USAGE)
    in_schema = schema or file.get("schema")
    return Place(
        str(found),
        str(prefix or file.get("prefix") or "kbatch_"),
        wire,
        None if in_schema is None else str(in_schema),
        bool(file.get("notify")),
    )
