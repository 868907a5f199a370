"""Which outbox or inbox a command is about: its name in an option, in the environment or in a file of settings."""

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import kbatch
from kbatch.cli._failure import USAGE, Failure
from kbatch.cli._settings import INBOX_VARIABLE, OUTBOX_VARIABLE

if TYPE_CHECKING:
    from typing_extensions import Self

_SQLITE = "sqlite"
_POSTGRES = ("postgresql", "postgres")
_ALMOST_URLS = tuple(f"{kind}:" for kind in _POSTGRES)  # else the password is shown as a part of a path
_CONNINFO = re.compile(r"(^|\s)(host|hostaddr|dbname|user|password|service)\s*=")

Outbox: TypeAlias = kbatch.SqliteOutbox | kbatch.PostgresOutbox
Inbox: TypeAlias = kbatch.SqliteInbox | kbatch.PostgresInbox


@dataclass(frozen=True)
class Place:
    """A database and the names of the tables there.

    Attributes:
        what: What the tables are: the name of the option, and of the setting in a file.
        variable: The environment variable that names it.
        name: A path, or a URL, which may hold a password.
    """

    what: ClassVar[str]
    variable: ClassVar[str]
    name: str = field(repr=False)
    prefix: str = "kbatch_"
    schema: str | None = None

    @classmethod
    def find(
        cls,
        name: str | None,
        prefix: str | None,
        schema: str | None,
        file: Mapping[str, object],
        *,
        environment: Mapping[str, str] = os.environ,
        **others: Any,
    ) -> "Self":
        """The place that an option names, else the environment, else a file of settings."""
        what, variable = cls.what, cls.variable
        found = name or environment.get(variable) or file.get(what)
        if not found:
            raise Failure(f"no {what} is named: give --{what} PATH, {variable}, or {what} in a --config FILE", USAGE)
        in_schema = schema or file.get("schema")
        return cls(
            str(found),
            str(prefix or file.get("prefix") or "kbatch_"),
            None if in_schema is None else str(in_schema),
            **others,
        )

    @property
    def shown(self) -> str:
        """The name without what may be secret: user, password and parameters."""
        kind, rest = self._split()
        return f"postgresql://{re.sub('^[^/@]*@', '', rest).partition('?')[0]}" if kind in _POSTGRES else self.name

    def open(self) -> Outbox | Inbox:
        """What is there; nothing is read yet."""
        raise NotImplementedError

    def _open(self, in_sqlite: Any, in_postgres: Any, **given: Any) -> Any:
        kind, rest = self._split()
        options = {"prefix": self.prefix, **given}
        try:
            if kind in _POSTGRES:
                return in_postgres(f"postgresql://{rest}", schema=self.schema or "public", **options)
            if kind not in ("", _SQLITE):
                raise Failure(
                    f"an {self.what} is a path of a SQLite file, or a URL that begins with sqlite:/// or postgresql://",
                    USAGE,
                )
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
            raise Failure(f"an {self.what} in PostgreSQL is named by a URL: postgresql://user@host/database", USAGE)
        return "", self.name


def _path(rest: str) -> str:
    host, slash, path = rest.partition("/")
    if host or not slash or not path:
        raise Failure("a URL of SQLite is sqlite:///shop.db, or sqlite:////var/lib/shop.db", USAGE)
    return path


@dataclass(frozen=True)
class OutboxPlace(Place):
    """Where an outbox is."""

    what = "outbox"
    variable = OUTBOX_VARIABLE
    wire: str = "kbatch"
    notify: bool = False

    def open(self) -> Outbox:
        """The outbox; nothing is read yet."""
        in_postgres = functools.partial(kbatch.PostgresOutbox, notify=self.notify)
        found: Outbox = self._open(self._in_sqlite, in_postgres, wire=self.wire)
        return found

    def _in_sqlite(self, path: str, **options: Any) -> kbatch.SqliteOutbox:
        if self.notify:
            raise Failure("notify is for PostgreSQL: SQLite has no NOTIFY", USAGE)
        return kbatch.SqliteOutbox(path, **options)


@dataclass(frozen=True)
class InboxPlace(Place):
    """Where an inbox is."""

    what = "inbox"
    variable = INBOX_VARIABLE

    def open(self) -> Inbox:
        """The inbox; nothing is read yet."""
        found: Inbox = self._open(kbatch.SqliteInbox, kbatch.PostgresInbox)
        return found
