"""Does cibuildwheel build what we mean it to? Compares its own list, for each job of wheels.yml, with the one below.

`make lint`, or `python -m tools.builds`. It builds nothing.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / ".github" / "workflows" / "wheels.yml"
CPYTHONS = ("cp310", "cp311", "cp312", "cp313", "cp314", "cp314t")
#: cibuildwheel's platform and architecture, and how it calls them in the name of a build
PLATFORMS = {
    ("linux", "x86_64"): "manylinux_x86_64",
    ("linux", "aarch64"): "manylinux_aarch64",
    ("macos", "arm64"): "macosx_arm64",
    ("macos", "x86_64"): "macosx_x86_64",
    ("windows", "AMD64"): "win_amd64",
}


def jobs() -> list[tuple[str, str]]:
    """Platform and architecture of each job of the workflow."""
    text = WORKFLOW.read_text(encoding="utf-8")
    return re.findall(r"^ +- \{ platform: (\w+), arch: (\w+), runner: [\w.-]+ \}$", text, re.MULTILINE)


def builds(platform: str, arch: str) -> list[str]:
    command = [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers"]
    command += ["--platform", platform, "--archs", arch, str(ROOT)]
    # What these variables say would be taken for the project's settings.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CIBW_")}
    return subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=120
    ).stdout.split()


def main() -> int:
    if sys.version_info < (3, 11):
        print("SKIPPED: cibuildwheel 4 needs Python 3.11 itself")
        return 0
    if sorted(jobs()) != sorted(PLATFORMS):
        print(f"{WORKFLOW.name} has jobs for {jobs()}, not for {sorted(PLATFORMS)}", file=sys.stderr)
        return 1
    wrong = 0
    for (platform, arch), name in PLATFORMS.items():
        expected = [f"{cpython}-{name}" for cpython in CPYTHONS]
        found = builds(platform, arch)
        print(f"{platform} {arch}: {' '.join(found)}")
        if sorted(found) != sorted(expected):
            print(f"  expected: {' '.join(expected)}", file=sys.stderr)
            wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
