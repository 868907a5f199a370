"""Names of parametrized cases that are the same in each process, so that a test can be asked for by its name."""

import re

# Addresses, ids of version 7 and times since 1970.
_OF_THIS_PROCESS = re.compile(r" at 0x[0-9a-f]+|[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f-]{21}|\b\d{10}\.\d+")


def shown(value: object) -> str:
    """A value's text without what differs in another process; for `ids`."""
    return _OF_THIS_PROCESS.sub("", str(value))
