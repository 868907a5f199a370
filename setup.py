"""Builds the Cython extensions. Switches, each an environment variable set to 1:

DEBUG     -O0, assertions, Python-level line tracing off, allocations that a test can let fail
SANITIZE  AddressSanitizer and UndefinedBehaviorSanitizer, or ThreadSanitizer if it is "thread" (with DEBUG's flags)
COVERAGE  line tracing for Cython.Coverage
QUICK     -O0, for a build that is thrown away after some tests
COMPILED  nothing is compiled: `build_ext --inplace` has done it (an editable installation would do it once more)
"""

import os
import sys

from Cython.Build import cythonize
from setuptools import Extension, setup


def switched_on(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


DEBUG, SANITIZE, COVERAGE, QUICK = (switched_on(name) for name in ("DEBUG", "SANITIZE", "COVERAGE", "QUICK"))

compile_args: list[str] = []
link_args: list[str] = []
if sys.platform != "win32":
    compile_args += ["-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers"]
    if DEBUG or SANITIZE:
        compile_args += ["-O0" if DEBUG else "-O1", "-g3", "-UNDEBUG", "-fno-omit-frame-pointer"]
    else:
        compile_args += ["-O0" if QUICK else "-O3", "-g1", "-fvisibility=hidden"]
    if SANITIZE:
        sanitizers = "-fsanitize=" + ("thread" if os.environ["SANITIZE"] == "thread" else "address,undefined")
        compile_args += [sanitizers, "-fno-sanitize-recover=undefined"]
        link_args += [sanitizers]

macros = [("CYTHON_TRACE_NOGIL", "1")] if COVERAGE else []
if (DEBUG or SANITIZE) and sys.platform != "win32":
    macros += [("KBATCH_FAULTS", "1")]


# Each .pyx is a module; Cython names it by its packages.
extension = Extension(
    "*",
    ["src/**/*.pyx"],
    include_dirs=["src/kbatch/native"],
    define_macros=macros,
    extra_compile_args=compile_args,
    extra_link_args=link_args,
)


def compiled() -> list[Extension]:
    return cythonize(
        [extension],
        include_path=["src"],
        force=DEBUG or SANITIZE or COVERAGE,
        annotate=switched_on("ANNOTATE"),
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "initializedcheck": False,
            "cdivision": True,
            "embedsignature": True,
            "embedsignature.format": "python",
            "linetrace": COVERAGE,
        },
    )


setup(ext_modules=[] if switched_on("COMPILED") else compiled())
