"""A SQLite database with tables of kbatch, and connections of event loops to it."""

from __future__ import annotations

import sqlite3
import sys
from typing import TYPE_CHECKING, Any, TypeVar, cast

from kbatch._database._sqlite import SqliteDatabase
from kbatch._database._tables import driver_of_aio, not_taken

if TYPE_CHECKING:
    from collections.abc import Callable

    import aiosqlite

    from kbatch._errors import KbatchError

__all__ = ["AioSqliteDatabase"]

_T = TypeVar("_T")


class AioSqliteDatabase(SqliteDatabase):
    """The same for connections of aiosqlite, each of which is one of ``sqlite3`` on a thread of its own."""

    async def _driver_aio(self, connection: Any) -> aiosqlite.Connection:
        driver = await driver_of_aio(connection, self._as_error)
        module = sys.modules.get("aiosqlite")
        if module is None or not isinstance(driver, module.Connection):
            what = "an aiosqlite.Connection, or SQLAlchemy's AsyncConnection or AsyncSession over one"
            error = not_taken(connection, driver, what)
            if isinstance(driver, sqlite3.Connection):
                raise TypeError(f"{error}: {self._shown.replace('aio.', '')} takes one of sqlite3")
            raise error
        driver = cast("aiosqlite.Connection", driver)
        self._check_aio(driver)
        return driver

    def _check_aio(self, driver: aiosqlite.Connection) -> None:
        try:
            self._check_connection(cast("sqlite3.Connection", driver))  # of which it has what is asked
        except ValueError as error:
            raise self._closed() from error

    def _closed(self) -> KbatchError:
        """Of what aiosqlite says by a ValueError, in the words of ``sqlite3``."""
        return self._tables.as_error(sqlite3.ProgrammingError("Cannot operate on a closed database."), self._path)

    async def _on_its_thread(self, driver: aiosqlite.Connection, step: Callable[[sqlite3.Connection], _T]) -> _T:
        """Calls `step` on the thread of a connection, so that no statement of another task comes between its own.

        If the task is cancelled, `step` is not called if it has not begun, and runs to its end otherwise. Nothing that
        the task does with the connection afterwards comes before that.

        aiosqlite has no call for this. It fetches rows on that thread, and ``sqlite3`` has a cursor's ``row_factory``
        make a row, which gets the cursor, and so the connection.
        """
        steps = [step]  # the thread keeps the cursor until its next call, and needs not keep what this has
        answers: list[_T] = []
        errors: list[BaseException] = []

        def make_row(cursor: sqlite3.Cursor, _: object) -> None:
            try:
                taken = steps.pop()
            except IndexError:
                return
            try:
                answers.append(taken(cursor.connection))
            except BaseException as error:
                errors.append(error)

        try:
            # Again, since CPython 3.10 may find no row after a rollback that met a cursor with this statement.
            for _ in range(2):
                cursor = await driver.execute("SELECT 1")
                cursor.row_factory = make_row  # type: ignore[assignment]
                await cursor.fetchone()
                if not steps:
                    break
        except (sqlite3.Error, ValueError) as error:
            if not (answers or errors):
                if isinstance(error, ValueError):
                    raise self._closed() from error
                self._check_aio(driver)  # another task may have ended the transaction
                raise self._tables.as_error(error, self._path) from error
        finally:
            steps.clear()
        if errors:
            raise errors.pop()  # this frame is in its traceback
        if not answers:
            raise self._tables.error(
                f"the {self._tables.what} in {self._path}: aiosqlite has cursors without a row_factory of their own; "
                "use aiosqlite 0.19 or later"
            )
        return answers[0]
