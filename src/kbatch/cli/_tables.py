"""What ``kbatch outbox`` and ``kbatch inbox`` do alike: their tables are made, and what is in them is shown."""

from rich.table import Table

from kbatch._text import printable
from kbatch.cli._place import Place
from kbatch.cli._screen import Screen


def create(place: Place, screen: Screen) -> int:
    """Makes what is missing."""
    place.open().create()
    screen.say(f"the {place.what} is ready: {place.shown}")
    return 0


def ddl(place: Place, screen: Screen) -> int:
    """The statements that make the tables."""
    screen.print(place.open().ddl())
    return 0


def sheet(place: Place) -> Table:
    """For its status."""
    table = Table(show_header=False, title=f"{place.what} {printable(place.shown)}", title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    return table


def number(count: int, count_up_to: int) -> str:
    """How many were counted."""
    return f"{count:,}" + (" or more" if count >= count_up_to else "")
