"""What holds for every test: the compiled, current extension; nothing pinned afterwards; in CI nothing skipped."""

import contextlib
import ctypes
import functools
import gc
import importlib.machinery
import itertools
import os
import signal
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

try:
    import kbatch
    from kbatch import _fastmap
except ImportError as error:
    pytest.exit(f"the tests need kbatch and its compiled modules (make build): {error}", returncode=3)

from tests import inboxes, outboxes

pytest_plugins = ["pytester"]

gc.disable()  # until all are collected: nothing of that can go, and collections would look through it again and again

# A shell that starts the tests in the background may have SIGINT ignored, nohup has SIGHUP, and what they start would
# ignore it too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

pytest.register_assert_rewrite("tests.mapping")

IN_CI = os.environ.get("CI", "") not in ("", "0", "false")
# A sanitized build: slower, and what was freed stays resident for a while.
SLOW_BUILD = os.environ.get("KBATCH_SLOW_BUILD", "") not in ("", "0")
PATIENCE_S = 10.0  # for what comes within milliseconds

_checks: dict[str, Any] = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
}
hypothesis.settings.register_profile("quick", max_examples=40, **_checks)
hypothesis.settings.register_profile("default", max_examples=75, **_checks)
hypothesis.settings.register_profile("thorough", max_examples=5000, **_checks)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("quick" if SLOW_BUILD else "default"))


def _refuse_what_is_not_built() -> None:
    compiled = Path(_fastmap.__file__)
    if not compiled.name.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)):
        pytest.exit(f"the tests need the compiled kbatch._fastmap, not {compiled} (make build)", returncode=3)
    package = compiled.parent
    suffix = compiled.name.removeprefix("_fastmap")  # this interpreter's; another's may lie beside it
    for source in [*package.rglob("*.pyx"), *package.glob("native/*.pxi"), *package.glob("*.pxd")]:
        module = source.with_name(source.stem + suffix) if source.suffix == ".pyx" else compiled
        if module.stat().st_mtime < source.stat().st_mtime:
            pytest.exit(f"{module} is older than {source.name} (make build)", returncode=3)


_refuse_what_is_not_built()

HERE = Path(__file__).parent
IN_CHECKOUT = (HERE.parent / "src").exists()
# What tests files that no wheel holds: the sources, the project's own files and programs.
NEED_THE_CHECKOUT = [
    "mock/test_migration.py",
    "mock/test_readme.py",
    "mock/test_shutdown_page.py",
    "mock/test_testing_page.py",
    "unit/test_benchmark_figures.py",
    "unit/test_binding.py",
    "unit/test_benchmark_comparison.py",
    "unit/test_mutants.py",
    "unit/test_project.py",
    "unit/test_promises.py",
]


def _refuse_another_package() -> None:
    """Away from the checkout, only what is installed in this environment is tested."""
    package = Path(_fastmap.__file__).parent
    if not IN_CHECKOUT and package.parent != Path(sysconfig.get_path("platlib")):
        pytest.exit(f"these tests are for an installed package, but kbatch is imported from {package}", returncode=3)


_refuse_another_package()


def pytest_report_header() -> list[str]:
    left_out = "" if IN_CHECKOUT else f"; without a checkout, left out: {', '.join(NEED_THE_CHECKOUT)}"
    return [f"kbatch: {Path(_fastmap.__file__).parent}{left_out}"]


# Only a debug build can let its allocations fail: `make memory`.
collect_ignore = [] if hasattr(ctypes.PyDLL(_fastmap.__file__), "kb_fail_allocation") and not SLOW_BUILD else ["memory"]
# Tests of what an installed wheel holds are for wheels, those of the sources for a checkout.
collect_ignore += ["unit/test_installed.py"] if IN_CHECKOUT else NEED_THE_CHECKOUT


@pytest.fixture(autouse=True)
def nothing_stays_pinned() -> Iterator[None]:
    """Fails a test after which librdkafka may still read from a batch's buffers.

    A producer that is not closed gives them back right after it has told of a batch: some milliseconds, not at once.
    """
    yield
    end = time.monotonic() + PATIENCE_S
    while (pinned := _fastmap.pinned_buffers()) and time.monotonic() < end:
        time.sleep(0.001)
    assert pinned == 0, f"{pinned} batches still pin their buffers after this test"


@pytest.fixture(scope="session")
def postgres_servers() -> Any:
    """The module that starts PostgreSQL, where that can be done."""
    if os.name != "posix":
        pytest.skip("platform: the suite starts no PostgreSQL here")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("platform: psycopg has no wheels for a free-threaded CPython")
    from tests import postgres

    return postgres


@pytest.fixture(scope="session")
def postgres(postgres_servers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The conninfo of a PostgreSQL server, one for all processes of the session."""
    base = tmp_path_factory.getbasetemp()
    conninfo: str = postgres_servers.shared(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)
    with outboxes.connections_kept(conninfo):
        yield conninfo


@pytest.fixture(scope="session")
def postgres_conninfo(postgres: str) -> str:
    """Where the plugin's fixtures make their tables."""
    return postgres


@pytest.fixture(scope="module")
def new_postgres(postgres_servers: Any) -> Iterator[Callable[[], Any]]:
    """Starts servers that no other process uses; they are stopped after the module."""
    with contextlib.ExitStack() as undo:

        def start() -> Any:
            server = undo.enter_context(contextlib.closing(postgres_servers.Server()))
            server.start()
            return server

        yield start


@pytest.fixture
def in_postgres(postgres: str) -> Iterator[Callable[..., kbatch.PostgresOutbox]]:
    """Makes outboxes in PostgreSQL, each in a schema of its own."""
    with contextlib.ExitStack() as undo:

        def make(**options: Any) -> kbatch.PostgresOutbox:
            if "schema" not in options:
                options["schema"] = outboxes.new_schema(postgres)
                undo.callback(outboxes.drop_schema, postgres, options["schema"])
            outbox = kbatch.PostgresOutbox(postgres, **options)
            outbox.create()
            return outbox

        yield make


@pytest.fixture(params=["sqlite", "postgres"])
def new_outbox(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., outboxes.Outbox]:
    """Makes outboxes whose tables are there, of each kind of database in turn."""
    if request.param == "sqlite":
        return functools.partial(outboxes.made, tmp_path)
    make: Callable[..., outboxes.Outbox] = request.getfixturevalue("in_postgres")
    return make


@pytest.fixture(params=["sqlite", "postgres"])
def new_inbox(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., inboxes.Inbox]]:
    """Makes inboxes whose tables are there, of each kind of database in turn."""
    if request.param == "sqlite":
        yield functools.partial(inboxes.made, tmp_path)
        return
    postgres: str = request.getfixturevalue("postgres")
    with contextlib.ExitStack() as undo:

        def make(**options: Any) -> kbatch.PostgresInbox:
            if "schema" not in options:
                options["schema"] = outboxes.new_schema(postgres)
                undo.callback(outboxes.drop_schema, postgres, options["schema"])
            inbox = kbatch.PostgresInbox(postgres, **options)
            inbox.create()
            return inbox

        yield make


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kafka",
        metavar="BOOTSTRAP",
        default=os.environ.get("KBATCH_TEST_KAFKA") or None,
        help="run tests/kafka on this cluster instead of one that is started (also: KBATCH_TEST_KAFKA)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "allocator: looks at memory, or counts on it to be used again")
    config.addinivalue_line("markers", "long: takes many seconds, so it begins before the others")


def _begin_with_the_long_ones(items: list[pytest.Item]) -> None:
    """In each of the parts that xdist's worksteal gives its workers: the others would wait for the one that is last.

    Unit tests, which are short and wait for nothing, come last in each part, where others take them over.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers == 1:
        return
    long = [item for item in items if item.get_closest_marker("long")]
    others = [item for item in items if not item.get_closest_marker("long")]
    waiting = [item for item in others if "unit" not in item.path.parts]
    units = iter([item for item in others if "unit" in item.path.parts])
    left = len(items)
    ordered: list[pytest.Item] = []
    for worker in range(workers):
        size = left // (workers - worker)
        left -= size
        mine = long[worker::workers]
        mine += waiting[len(waiting) * worker // workers : len(waiting) * (worker + 1) // workers]
        ordered += [*mine, *itertools.islice(units, max(0, size - len(mine)))]
    items[:] = [*ordered, *units]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _begin_with_the_long_ones(items)
    if not SLOW_BUILD:
        return
    for item in items:
        if item.get_closest_marker("allocator"):
            item.add_marker(pytest.mark.skip(reason="platform: AddressSanitizer keeps freed memory"))


def pytest_collection_finish() -> None:
    # The tests and their modules stay until the end: a collection, of which many tests do several, need not look at
    # them each time.
    gc.collect()
    gc.freeze()
    gc.enable()


_done = itertools.count(1)


def pytest_runtest_logfinish() -> None:
    if next(_done) % 100 == 0:  # reports, and what tests have imported
        gc.collect()
        gc.freeze()


def _fail_the_skipped(report: Any) -> None:
    if not (IN_CI and report.skipped) or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not reason.removeprefix("Skipped: ").startswith("platform:"):
        report.outcome = "failed"
        report.longrepr = f"skipped, and in CI nothing is skipped for lack of something: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    _fail_the_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    report = yield
    _fail_the_skipped(report)
    return report
