"""What an installed wheel has, and a checkout need not have: `make wheel` and cibuildwheel run these."""

import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import kbatch

DISTRIBUTION = importlib.metadata.distribution("kbatch-kafka")
# The only libraries that a wheel for Linux may ask the system for: what belongs to libc.
LIBC = re.compile(r"(libc|libpthread|libdl|librt|libm)\.so\.\d+|(/.*/)?ld-linux.*|linux-vdso\.so\.\d+")


def foreign(listed: str) -> list[str]:
    """The libraries in what ldd prints that do not belong to libc."""
    names = [line.split()[0] for line in listed.splitlines() if line.strip() != "statically linked"]
    return [name for name in names if not LIBC.fullmatch(name)]


@pytest.mark.skipif(sys.platform != "linux", reason="platform: ldd is Linux's")
def test_its_compiled_modules_link_nothing_but_libc():
    # librdkafka is found at run time. auditwheel grafts what it does not know, but lets libz, libstdc++ and others be.
    modules = [file.locate() for file in DISTRIBUTION.files or () if file.suffix == ".so"]
    assert modules
    for module in modules:
        listed = subprocess.run(["ldd", str(module)], check=True, capture_output=True, text=True, timeout=60).stdout
        assert "libc.so" in listed
        assert foreign(listed) == [], module


def test_what_does_not_belong_to_libc():
    ours = "\tlinux-vdso.so.1 (0x7f)\n\tlibm.so.6 => /lib/libm.so.6 (0x7f)\n\tlibc.so.6 => /lib/libc.so.6 (0x7f)\n"
    loader = "\t/lib64/ld-linux-x86-64.so.2 (0x7f)\n"
    assert foreign(ours + loader) == []
    theirs = "\tlibz.so.1 => /lib/libz.so.1 (0x7f)\n\tlibrdkafka.so.1 => not found\n"
    assert foreign(ours + theirs + loader) == ["libz.so.1", "librdkafka.so.1"]


def test_its_licence_is_the_projects():
    licence = Path(__file__).parents[2] / "LICENSE"
    assert DISTRIBUTION.read_text("licenses/LICENSE") == licence.read_text(encoding="utf-8")


def test_its_metadata_are_these_files():
    folder = f"kbatch_kafka-{kbatch.__version__}.dist-info/"
    found = {
        file.as_posix().removeprefix(folder) for file in DISTRIBUTION.files or () if file.as_posix().startswith(folder)
    }
    ours = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    assert found - {"INSTALLER", "REQUESTED", "direct_url.json"} == ours  # pip's


def test_its_metadata_tell_the_version():
    assert DISTRIBUTION.version == kbatch.__version__


def test_each_module_can_be_imported():
    names = [module.name for module in pkgutil.walk_packages(kbatch.__path__, "kbatch.")]
    assert {"kbatch._fastmap", "kbatch.aio", "kbatch.cli", "kbatch.testing"} <= set(names)
    for name in {*names, "pytest_kbatch"} - {"kbatch.__main__"}:
        importlib.import_module(name)


@pytest.mark.parametrize("command", [["kbatch"], [sys.executable, "-m", "kbatch"]], ids=["kbatch", "python -m kbatch"])
def test_the_command_is_there(command):
    if command == ["kbatch"]:
        command = [str(Path(sysconfig.get_path("scripts"), "kbatch"))]
    assert "demo" in subprocess.run([*command, "--help"], check=True, capture_output=True, timeout=60).stdout.decode()
