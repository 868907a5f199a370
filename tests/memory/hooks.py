"""How an allocation is made to fail."""

import ctypes
import os
import subprocess
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kbatch import _fastmap
from kbatch._receiving import _consumer
from kbatch.testing import _mock


class Outcome:
    """What came of a call during which an allocation may have failed."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.value: Any = None
        self.error: BaseException | None = None
        self.trace = ""
        try:
            self.value = function()
        except BaseException as error:
            # Its frames would keep alive what is looked at afterwards.
            self.trace = traceback.format_exc()
            self.error = error.with_traceback(None)


class NativeHook:
    """The nth of kbatch's own allocations fails, in whatever thread it is made.

    Each module counts its own, and what one has allocated another may free.
    """

    def __init__(self, *modules: Any) -> None:
        self._libraries = [ctypes.PyDLL(module.__file__) for module in modules or (_fastmap, _consumer)]
        for library in self._libraries:
            library.kb_fail_allocation.argtypes = [ctypes.c_int64]
            library.kb_failed_allocations.restype = ctypes.c_int64
            library.kb_live_allocations.restype = ctypes.c_int64
        self.nth = 0

    def failures(self) -> int:
        return sum(library.kb_failed_allocations() for library in self._libraries)

    def live(self) -> int:
        return sum(library.kb_live_allocations() for library in self._libraries)

    def _fail(self, nth: int) -> None:
        for library in self._libraries:
            library.kb_fail_allocation(nth)

    def __call__(self, function: Callable[[], Any]) -> Outcome:
        self._fail(self.nth)
        try:
            return Outcome(function)
        finally:
            self._fail(0)


CALLER, OTHERS = 1, 2


class PythonHook:
    """The nth of Python's allocations fails: in the calling thread, or in all others. Once installed, it stays."""

    def __init__(self, folder: Path, threads: int) -> None:
        library = folder / "nomemory.so"
        source = Path(__file__).with_name("nomemory.c")
        include = sysconfig.get_path("include")
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", f"-I{include}", "-o", library, source], check=True)
        self._library = ctypes.PyDLL(str(library))
        self._library.nomemory_call.restype = ctypes.py_object
        self._library.nomemory_call.argtypes = [ctypes.py_object, ctypes.c_int64, ctypes.c_int]
        self._library.nomemory_failures.restype = ctypes.c_int64
        self._library.nomemory_install()
        self._threads = threads
        self.nth = 0

    def failures(self) -> int:
        return self._library.nomemory_failures()

    def __call__(self, function: Callable[[], Any]) -> Outcome:
        return Outcome(lambda: self._library.nomemory_call(function, self.nth, self._threads))


def mock_hook() -> NativeHook:
    return NativeHook(_mock)
