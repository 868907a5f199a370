"""Event loops beside threads."""

import kbatch
from kbatch import aio


def beside(producer: kbatch.Producer) -> aio.Producer:
    """A producer for asyncio on the core of one that blocks, so that batches of both kinds meet."""
    other = object.__new__(aio.Producer)
    vars(other).update(vars(producer))
    other._prepare()
    return other
