"""The threads that all senders of this process share."""

from __future__ import annotations

import os

from kbatch._fastmap import SharedThreads

__all__ = ["CALLBACKS", "PROBES"]

# A callback that takes longer does not hold up those of other senders.
CALLBACKS = SharedThreads("kbatch-sender-callbacks", 0.1)
# A probe may take seconds while brokers do not answer; those of another cluster have an answer meanwhile.
PROBES = SharedThreads("kbatch-probe", 0.5)


def _forget() -> None:
    CALLBACKS.forget()
    PROBES.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
