"""Words for people: what reaches a terminal, a log line or the text of an error."""

from __future__ import annotations

__all__ = ["buffered", "counted", "printable"]


def printable(text: str) -> str:
    """A text from outside on one line: what cannot be printed is shown as `repr` shows it.

    These are line ends and other control characters, marks that turn the direction of text, and half surrogates.
    """
    # A subclass of str may override whatever is called on it.
    text = str.__str__(text)
    if text.isprintable():
        return text
    return "".join([c if c.isprintable() else c.encode("unicode_escape").decode() for c in text])


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """``1 line``, ``2,000 lines``."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def buffered(count: int) -> str:
    """So many envelopes are, before "buffered"."""
    return counted(count, "envelope is", "envelopes are")
