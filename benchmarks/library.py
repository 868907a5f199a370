"""Finds the librdkafka that the installed confluent-kafka carries, and compiles the C and Java programs."""

import ctypes
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import confluent_kafka

HERE = Path(__file__).resolve().parent
BUILD = HERE / "build"


class _SymbolInfo(ctypes.Structure):
    """What dladdr(3) fills in."""

    _fields_ = (
        ("file_name", ctypes.c_char_p),
        ("file_base", ctypes.c_void_p),
        ("symbol_name", ctypes.c_char_p),
        ("symbol_address", ctypes.c_void_p),
    )


def _open_extension() -> ctypes.CDLL:
    folder = Path(confluent_kafka.__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"cimpl{suffix}"
        if path.exists():
            return ctypes.CDLL(os.fspath(path))
    raise FileNotFoundError(f"no cimpl extension in {folder}")


def librdkafka_path() -> str:
    """The file that holds librdkafka's functions, as the dynamic loader knows it.

    A program without Python cannot load confluent-kafka's extension, which needs Python's symbols, so the loader
    is asked where one of librdkafka's functions came from.
    """
    function = ctypes.cast(_open_extension().rd_kafka_version, ctypes.c_void_p)
    info = _SymbolInfo()
    dladdr = ctypes.CDLL(None).dladdr
    dladdr.argtypes = (ctypes.c_void_p, ctypes.POINTER(_SymbolInfo))
    if not dladdr(function, ctypes.byref(info)) or not info.file_name:
        raise OSError("the dynamic loader does not know where librdkafka came from")
    return os.fsdecode(info.file_name)


def compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name.split()[0]):
            return name
    sys.exit("benchmarks need a C compiler: none of $CC, cc, gcc, clang was found")


def build(name: str, *, shared: bool = False) -> Path:
    """The program, or the shared library, made from `name`.c, compiled if the source is newer."""
    source, program = HERE / f"{name}.c", BUILD / (f"{name}.so" if shared else name)
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        BUILD.mkdir(exist_ok=True)
        command = [*compiler().split(), "-O3", "-std=gnu11", "-Wall", "-Wextra", "-pthread", "-o", str(program)]
        command += ["-shared", "-fPIC"] if shared else []
        subprocess.run([*command, str(source), "-ldl"], check=True)
    return program


def java_program(name: str) -> str | None:
    """`java` or `javac`: JAVA_HOME's, else the one in PATH."""
    home = os.environ.get("JAVA_HOME")
    return shutil.which(name, path=f"{home}/bin" if home else None)


def build_java(class_path: str) -> str:
    """Compiles sides/JavaSide.java if it is newer than what was made of it; returns the class path with it."""
    source, made = HERE / "sides" / "JavaSide.java", BUILD / "JavaSide.class"
    if not made.exists() or made.stat().st_mtime < source.stat().st_mtime:
        BUILD.mkdir(exist_ok=True)
        subprocess.run([java_program("javac") or "javac", "-cp", class_path, "-d", str(BUILD), str(source)], check=True)
    return f"{BUILD}{os.pathsep}{class_path}"
