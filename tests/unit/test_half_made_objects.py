"""Objects of the compiled modules that no constructor has made, or the wrong one: an exception, and never a crash."""

import subprocess
import sys
import textwrap

import pytest

import kbatch._fastmap
import kbatch._librdkafka
import kbatch.testing._memory_core
import kbatch.testing._mock

MODULES = (kbatch._fastmap, kbatch._librdkafka, kbatch.testing._memory_core, kbatch.testing._mock)
CLASSES = sorted(
    f"{module.__name__}:{name}"
    for module in MODULES
    for name, value in vars(module).items()
    if isinstance(value, type) and value.__module__ == module.__name__
)
PUBLIC = (
    "kbatch:PendingBatch",
    "kbatch:BatchedSender",
    "kbatch:Envelope",
    "kbatch:Tombstone",
    "kbatch.aio:BatchedSender",
    "kbatch.testing:MockCluster",
)
# What is called waits for ever by its nature.
WAITS = {"wait", "_wait", "_run"}

AT_A_TIME = 6  # an interpreter for each class takes longer than what is done in it

PROGRAM = """
    import copy, faulthandler, importlib, pickle, signal, sys
    faulthandler.enable()
    signal.alarm(90)
    waits = set(sys.argv[1].split(","))
    done = 0

    def attempt(function, *arguments, **named):
        global done
        done += 1
        try:
            return function(*arguments, **named)
        except Exception:
            return None

    def try_everything(cls):
        tries = ((), (None,), (1,), ("a",), (None,) * 3, (1, 2, 3, 4, 5, 6, 7))
        made = [attempt(cls, *arguments) for arguments in tries]
        made += [attempt(cls, nonsense=1), attempt(cls.__new__, cls), attempt(cls.__new__, cls, None)]
        derived = attempt(lambda: type("Derived", (cls,), {"__init__": lambda self, *a, **k: None}))
        if derived is not None:
            made += [attempt(derived), attempt(derived, 1), attempt(derived.__new__, derived)]
        for one in made:
            if one is None:
                continue
            for _ in range(2):
                attempt(one.__init__)
                attempt(one.__init__, *(1, 2, 3))
            for copied in (copy.copy, copy.deepcopy, pickle.dumps, repr, len, list, hash, bool):
                attempt(copied, one)
            for attribute in dir(one):
                value = attempt(getattr, one, attribute)
                if callable(value) and attribute not in waits and not attribute.startswith("__"):
                    for arguments in ((), (None,), (0,), ("a",), (one,), (None, None), (0, 0), (None, None, None)):
                        attempt(value, *arguments)

    for place in sys.argv[2:]:
        module, name = place.split(":")
        done = 0
        print(place, flush=True)
        try_everything(getattr(importlib.import_module(module), name))
        assert done > 5
    print("all of them")
"""


def groups(names: list[str]) -> list[list[str]]:
    return [names[first : first + AT_A_TIME] for first in range(0, len(names), AT_A_TIME)]


@pytest.mark.parametrize("names", groups([*CLASSES, *PUBLIC]), ids=lambda names: names[0])
def test_what_is_half_made_crashes_nothing(names: list[str]) -> None:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), ",".join(sorted(WAITS)), *names]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    tried = ended.stdout.split("\n")
    assert ended.returncode == 0, f"at {tried[-2]}: {ended.stderr[-3000:]}"
    assert "all of them" in tried
