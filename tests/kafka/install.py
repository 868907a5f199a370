"""Apache Kafka as `pom.xml` names it: resolved by Maven, run by the machine's Java."""

import hashlib
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "kafka"
OLDEST_JAVA = 17  # Kafka 4's brokers


class NotInstalled(Exception):
    """What this machine lacks to run Kafka."""


@cache
def java() -> str:
    home = os.environ.get("JAVA_HOME")
    program = shutil.which("java", path=f"{home}/bin" if home else None)
    if program is None:
        raise NotInstalled(f"Kafka needs Java {OLDEST_JAVA} or newer: no java in {'JAVA_HOME' if home else 'PATH'}")
    said = subprocess.run([program, "-version"], capture_output=True, text=True).stderr
    version = re.search(r'version "(\d+)', said)
    if version is None or int(version[1]) < OLDEST_JAVA:
        raise NotInstalled(f"Kafka needs Java {OLDEST_JAVA} or newer: {program} is {said.splitlines()[:1]}")
    return program


@cache
def class_path() -> str:
    """The jars, from Maven's own repository; the first call of a machine downloads about 60 MB."""
    pom = HERE / "pom.xml"
    kept = BUILD / f"classpath-{hashlib.sha256(pom.read_bytes()).hexdigest()[:12]}"
    if kept.exists() and all(map(os.path.exists, (text := kept.read_text()).split(os.pathsep))):
        return text
    maven = shutil.which("mvn")
    if maven is None:
        raise NotInstalled("Kafka's jars come by Maven: no mvn in PATH")
    BUILD.mkdir(parents=True, exist_ok=True)
    fresh = kept.with_suffix(f".{os.getpid()}")
    command = [maven, "--batch-mode", "--quiet", "--file", str(pom), "dependency:build-classpath"]
    run = subprocess.run([*command, f"-Dmdep.outputFile={fresh}"], capture_output=True, text=True, timeout=600)
    if run.returncode:
        raise NotInstalled(f"Maven cannot get Kafka's jars: {run.stdout[-2000:]}{run.stderr[-2000:]}")
    fresh.replace(kept)
    return kept.read_text()


def missing() -> str | None:
    """What this machine lacks, in one line; None if Kafka can run."""
    try:
        java()
        class_path()
    except NotInstalled as error:
        return " ".join(str(error).split())
    return None
