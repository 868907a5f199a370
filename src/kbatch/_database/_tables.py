"""What tables have in common in all databases."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar

from kbatch._errors import shown, type_name
from kbatch._fastmap import wall_time

if TYPE_CHECKING:
    from collections.abc import Callable

    from kbatch._errors import KbatchError

__all__ = ["Tables", "age_s", "driver_of", "driver_of_aio", "not_taken", "now_us"]


class Tables:
    """The tables of one outbox or inbox, by their quoted names.

    Args:
        names: What stands for ``{outbox}``, ``{meta}``, … in a statement.
        values: What stands for other words in braces.

    Attributes:
        what: What they are, and the name of the first of them.
        error: What is raised about them.
        version: Which this kbatch knows.
        meta: The columns of the one line in their table ``meta``, as `check_meta` takes them.
    """

    what: ClassVar[str]
    error: ClassVar[type[KbatchError]]
    version: ClassVar[int] = 1
    meta: ClassVar[tuple[str, ...]] = ("version",)

    def __init__(self, names: dict[str, str], values: dict[str, str]) -> None:
        self.names = names
        self._values = {**names, **values, "version": str(self.version)}

    def sql(self, statement: str) -> str:
        """A statement with the names of the tables in place of ``{outbox}``, ``{later}``, …"""
        return statement.format_map(self._values)

    def check_meta(self, version: int) -> None:
        """Raises an error for tables that are another release's."""
        if version != self.version:
            raise self.error(
                f"the {self.what} {self.names[self.what]} has tables of version {version}, and this kbatch knows "
                f"version {self.version}: use the kbatch that made them, or other tables by prefix="
            )


def driver_of(connection: Any, as_error: Callable[[BaseException], KbatchError]) -> Any:
    """What SQLAlchemy's `Connection` or `Session` uses, once its transaction has begun; anything else as it is."""
    sqlalchemy = sys.modules.get("sqlalchemy")
    orm = sys.modules.get("sqlalchemy.orm")
    if sqlalchemy is None:
        return connection
    try:
        if orm is not None and isinstance(connection, orm.Session):
            connection = connection.connection()
        if isinstance(connection, sqlalchemy.Connection):
            if not connection.in_transaction():
                connection.begin()
            return connection.connection.driver_connection
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise as_error(error) from error
    return connection


async def driver_of_aio(
    connection: Any,
    as_error: Callable[[BaseException], KbatchError],
    begins_late: Callable[[Any], bool] = lambda driver: False,
) -> Any:
    """The same for its `AsyncConnection` or `AsyncSession`.

    Args:
        begins_late: Whether SQLAlchemy begins a transaction of this driver's connection only with a statement.
    """
    sqlalchemy = sys.modules.get("sqlalchemy.ext.asyncio")
    if sqlalchemy is None or not isinstance(connection, (sqlalchemy.AsyncSession, sqlalchemy.AsyncConnection)):
        return connection
    try:
        if isinstance(connection, sqlalchemy.AsyncSession):
            connection = await connection.connection()
        if not connection.in_transaction():
            await connection.begin()
        driver = (await connection.get_raw_connection()).driver_connection
        if begins_late(driver):
            await connection.exec_driver_sql("SELECT 1")
    except sys.modules["sqlalchemy"].exc.SQLAlchemyError as error:
        raise as_error(error) from error
    return driver


def not_taken(given: object, driver: object, what: str) -> TypeError:
    """What is raised for a connection of another kind, or over another driver."""
    text = f"connection must be {what}, not {type_name(given)}"
    return TypeError(text if driver is given else f"{text} over {shown(type(driver).__module__)}")


def now_us() -> int:
    """Microseconds since 1970."""
    return int(wall_time() * 1e6)


def age_s(created_at: int | None) -> float:
    """Seconds since a row was added; 0.0 for none."""
    return 0.0 if created_at is None else max(0.0, wall_time() - created_at / 1e6)
