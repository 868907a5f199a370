"""What a long-running command tells, line by line, each with its time."""

import datetime
import json
import logging
from types import TracebackType

from kbatch._fastmap import wall_time
from kbatch._text import printable
from kbatch.cli._screen import Screen


class Log(logging.Handler):
    """Lines on standard error: for people, or for programs one JSON object each.

    For the time of a ``with`` block it has what kbatch itself logs.
    """

    def __init__(self, screen: Screen, *, as_json: bool = False) -> None:
        super().__init__(logging.INFO)
        self._screen = screen
        self._as_json = as_json
        self._logger = logging.getLogger("kbatch")

    def tell(self, message: str, level: str = "info") -> None:
        """One line."""
        at = datetime.datetime.fromtimestamp(int(wall_time()), datetime.timezone.utc)
        now = at.isoformat().replace("+00:00", "Z")
        if self._as_json:
            self._screen.log(json.dumps({"time": now, "level": level, "message": message}))
        else:
            self._screen.log(printable(f"{now} {'' if level == 'info' else level + ': '}{message}"))

    def emit(self, record: logging.LogRecord) -> None:
        """As `logging.Handler.emit`."""
        self.tell(record.getMessage(), record.levelname.lower())

    def __enter__(self) -> "Log":
        self._logger.addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._logger.removeHandler(self)
