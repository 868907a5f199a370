"""What users may rely on: the names, their documentation, what an import does; and the layers beneath."""

import ast
import enum
import importlib
import importlib.util
import inspect
import pydoc
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import GenericAlias
from typing import Any

import msgspec
import pytest

import kbatch
from kbatch import aio, stores, testing
from kbatch.testing import aio as testing_aio

PACKAGE = Path(kbatch.__file__).parent

# Imports point down only: each module may import those above it in this list.
LAYERS = [
    {"_version", "_serialization", "_librdkafka", "_text", "_logs"},
    {"_codes"},
    {"_errors"},
    {"_callbacks", "_checks"},
    {"_fastmap"},
    {"_report", "_wire", "_config", "_loop", "_exit", "_threads"},
    {"_pending", "_events"},
    {"_transactions"},
    {"_base_producer"},
    {"_producer", "_recovery"},
    {"_batch_sender", "_options"},
    {"_database"},
    {"_inbox", "_outbox"},
    {"stores"},
    {"_receiving", "_sending"},
    {"aio"},
    {"testing"},
    {"cli"},
    {"__main__"},
]
# The same within packages.
LAYERS_WITHIN = {
    "_database": [{"_postgres_connection", "_tables"}, {"_postgres", "_sqlite"}, {"_aiosqlite"}],
    "_inbox": [
        {"_base", "_slots"},
        {"_tables"},
        {"_keeper", "_postgres_marks", "_postgres_purge", "_session"},
        {"_postgres_worker"},
        {"_postgres", "_sqlite"},
    ],
    "_outbox": [
        {"_leases", "_postgres_rows", "_snapshots", "_store"},
        {"_admission", "_fences", "_flight", "_floors", "_group", "_kept", "_relay_producer", "_tables", "_unwritten"},
        {"_dead_letters", "_postgres_tables", "_relay_loop", "_scheduled", "_sqlite_tables"},
        {"_base", "_postgres_session", "_sqlite_session"},
        {
            "_postgres_admin",
            "_postgres_listener",
            "_postgres_store",
            "_postgres_writer",
            "_sqlite_admin",
            "_sqlite_store",
            "_sqlite_writer",
        },
        {"_postgres", "_relay", "_sqlite"},
        {"_shared"},
    ],
    "_receiving": [
        {"_config", "_consumer", "_delayed", "_failures", "_positions"},
        {"_failing", "_lanes", "_missing"},
        {"_copies"},
        {"_reading", "_transacting"},
        {"_base"},
        {"_listener"},
    ],
    "_recovery": [{"_circuit", "_dead_letter", "_handle", "_retry", "_user_calls"}, {"_deaths", "_gate"}],
    "_sending": [
        {"_queue", "_watchers"},
        {"_endings", "_flights", "_given_up", "_stalls"},
        {"_send_loop"},
        {"_agent"},
        {"_batched", "_durable", "_inline"},
        {"_topic"},
    ],
}
LAYER_OF = {module: depth for depth, modules in enumerate(LAYERS) for module in modules}
LAYER_WITHIN = {
    package: {module: depth for depth, modules in enumerate(layers) for module in modules}
    for package, layers in LAYERS_WITHIN.items()
}
ABOVE_THE_ROOT = {"testing", "cli"}  # these may import what `kbatch` itself exports
# What type checkers alone see may point up: an error has the report or the batch that it tells of, and native code is
# given objects of Python; an option is a callback that is given a dead letter.
UP_FOR_TYPES = {
    ("_errors", "_fastmap"),
    ("_errors", "_pending"),
    ("_errors", "_report"),
    ("_fastmap", "_batch_sender"),
    ("_fastmap", "_wire"),
    ("_fastmap", "aio"),
    ("_options", "_outbox"),
}


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True, timeout=60
    ).stdout


# -- names

PUBLIC = """
    BatchError BatchInterruptedError BatchPendingError BatchTimeoutError BatchedSender CircuitOpenError CircuitState
    ConfigError ConsumedRecord DeadLetter DeadLetterCount DeadLetters DeliveryError DeliveryReport
    DeserializationError DurableSender Envelope ForkError InboxError InboxStatus InlineSender KafkaSender KafkaTopic
    KbatchError KeptMessage Listener ListenerError NotYetDueError OutboxError OutboxQuery OutboxStatus
    OutboxTimeoutError OutgoingBatch PendingBatch PostgresInbox PostgresOutbox Producer ProducerClosedError
    ProducerError ProducerFatalError ProducerFencedError ReceivedEnvelope Relay RetryPolicy ScheduledCount
    ScheduledMessage ScheduledMessages SenderCallback SenderClosedError SenderError SenderFullError SenderMode
    SenderProtocol SendingAgent SerializationContext SerializationError SqliteInbox SqliteOutbox Tombstone Transaction
    TransactionUnknownError
    UndeliveredError UnknownTopicError WireFormat WireReader __version__ librdkafka_version read_envelope uuid7
"""


def test_all_is_exact() -> None:
    # Written down once more: a name that comes or goes does so on purpose.
    assert kbatch.__all__ == PUBLIC.split()
    assert sorted(kbatch.__all__) == kbatch.__all__


def test_nothing_else_is_public() -> None:
    names = run("import kbatch; print(*(name for name in dir(kbatch) if not name.startswith('_')))").split()
    assert names == [name for name in kbatch.__all__ if not name.startswith("_")]


def test_star_import() -> None:
    names: dict[str, object] = {}
    exec("from kbatch import *", names)
    assert set(kbatch.__all__) <= set(names)


@pytest.mark.parametrize("name", kbatch.__all__)
def test_every_public_name_comes_from_a_private_module(name: str) -> None:
    value = getattr(kbatch, name)
    if isinstance(value, str):
        assert value
    else:
        assert value.__name__ == name
        assert value.__module__.startswith("kbatch._")


EVERY_NAME = [
    (module, name)
    for module in (kbatch, aio, stores, testing, testing_aio)
    for name in module.__all__
    if not (isinstance(getattr(module, name), GenericAlias) or name in ("MappedBatch", "Table"))  # for annotations
]
OWN = pytest.mark.parametrize(
    ("module", "name"), EVERY_NAME, ids=[f"{module.__name__}.{name}" for module, name in EVERY_NAME]
)


def own_classes(cls: type) -> list[type]:
    """What of a class's bases is kbatch's."""
    return [base for base in cls.__mro__ if base.__module__.partition(".")[0] == "kbatch"]


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """What a user may ask an object of a class for: methods, properties, fields, and what its constructors set."""
    for base in own_classes(cls):
        for name, value in vars(base).items():
            if not name.startswith("_"):
                yield name, value
        for name in inspect.get_annotations(base):
            if not name.startswith("_"):
                yield name, None
        constructor = vars(base).get("__init__")
        code = getattr(constructor, "__code__", None)
        if code is not None and Path(code.co_filename).is_file():  # else a dataclass's
            for node in ast.walk(ast.parse(inspect.cleandoc("\n" + inspect.getsource(constructor)))):
                is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
                if is_set and getattr(node.value, "id", "") == "self" and node.attr[0] != "_":
                    yield node.attr, None


def says(cls: type, name: str) -> bool:
    """Whether the documentation of a class names one of its attributes, or that of its twin for threads does."""
    bases = [*own_classes(cls), *own_classes(getattr(kbatch, cls.__name__, object))]
    text = "\n".join(inspect.cleandoc(vars(base).get("__doc__") or "") for base in bases)
    listed = rf"^ +(?:\w+, )*{name}(?:,(?:\n +| )\w+)*:"
    return re.search(listed, text, re.MULTILINE) is not None or f"``{name}``" in text


def has_literal(cls: type, name: str) -> bool:
    """Whether a text stands below a member of an enum."""
    body = ast.parse(inspect.cleandoc("\n" + inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    for node, following in pairwise(body):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return isinstance(following, ast.Expr) and isinstance(getattr(following.value, "value", None), str)
    return False


@OWN
def test_public_names_are_documented(module: Any, name: str) -> None:
    value = getattr(module, name)
    if not callable(value):
        return
    assert inspect.isclass(value) or value.__doc__
    assert not inspect.isclass(value) or vars(value).get("__doc__")
    if not inspect.isclass(value):
        return
    missing = []
    for member, content in members(value):
        has_doc = callable(content) or hasattr(content, "__get__")
        documented = has_doc and inspect.getdoc(inspect.getattr_static(value, member))
        if not (documented or says(value, member) or (issubclass(value, enum.Enum) and has_literal(value, member))):
            missing.append(member)
    if value is testing.ApiKey:  # the protocol's own names, which its documentation refers to
        missing = []
    assert missing == []


@OWN
def test_every_signature_can_be_seen(module: Any, name: str) -> None:
    value = getattr(module, name)
    if not callable(value):
        return
    inspect.signature(value)
    assert pydoc.render_doc(value)
    if inspect.isclass(value):
        for member, content in members(value):
            if callable(content) or isinstance(content, (classmethod, staticmethod)):
                inspect.signature(getattr(value, member))


def stub_of(cls: type, name: str) -> list[ast.FunctionDef]:
    """The definitions of a method in the stub: several if it is overloaded."""
    stub = ast.parse((PACKAGE / "_fastmap.pyi").read_text(encoding="utf-8"))
    bodies = {node.name: node.body for node in stub.body if isinstance(node, ast.ClassDef)}
    for base in own_classes(cls):
        found = [node for node in bodies.get(base.__name__, ()) if getattr(node, "name", None) == name]
        if found:
            return found  # type: ignore[return-value]
    return []


def parameters_of(definition: ast.FunctionDef) -> dict[str, tuple[Any, Any]]:
    arguments, empty = definition.args, inspect.Parameter.empty
    positional = [*arguments.posonlyargs, *arguments.args][1:]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    found = {}
    for kind, some, values in (
        (inspect.Parameter.POSITIONAL_OR_KEYWORD, positional, defaults),
        (inspect.Parameter.KEYWORD_ONLY, arguments.kwonlyargs, arguments.kw_defaults),
    ):
        for argument, value in zip(some, values, strict=True):
            default = empty if value is None else eval(ast.unparse(value), {"UNSET": msgspec.UNSET})
            found[argument.arg] = (kind, default)
    return found


@pytest.mark.parametrize("cls", [kbatch.Envelope, kbatch.Tombstone, kbatch.PendingBatch])
def test_a_native_constructor_is_seen_as_its_stub_has_it(cls: type) -> None:
    seen = {name: (each.kind, each.default) for name, each in inspect.signature(cls).parameters.items()}
    stubs = [parameters_of(each) for each in stub_of(cls, "__init__") or stub_of(cls, "__new__")]
    assert all(list(stub) == list(seen) for stub in stubs)
    for name, (kind, default) in seen.items():
        # An overload may ask for what another leaves out.
        assert {stub[name][0] for stub in stubs} == {kind}
        assert default in {stub[name][1] for stub in stubs}


def test_what_a_native_constructor_shows_is_what_it_takes() -> None:
    for cls, required in ((kbatch.Envelope, {"message": 1}), (kbatch.Tombstone, {"key": "k"})):
        parameters = dict(inspect.signature(cls).parameters)
        defaults = {name: each.default for name, each in parameters.items() if each.default is not each.empty}
        made = cls(**{**defaults, **required})
        assert made == cls(**required).replace(id=made.id)
        with pytest.raises(TypeError):
            cls(**required, colour="red")


def test_a_subclass_shows_its_own_constructor() -> None:
    class Own(kbatch.Envelope):
        def __init__(self, order: object) -> None:
            super().__init__(order)

    class Made(kbatch.Tombstone):
        def __new__(cls, number: int) -> "Made":
            return super().__new__(cls)

    class Inherited(kbatch.Tombstone):
        pass

    assert list(inspect.signature(Own).parameters) == ["order"]
    assert list(inspect.signature(Made).parameters) == ["number"]
    assert inspect.signature(Inherited) == inspect.signature(kbatch.Tombstone)
    assert inspect.signature(kbatch.Envelope[int]) == inspect.signature(kbatch.Envelope)


def test_private_modules_declare_what_they_export() -> None:
    for path in [*PACKAGE.glob("_*.py"), *(path for name in LAYERS_WITHIN for path in PACKAGE.glob(f"{name}/_*.py"))]:
        if path.name in ("__init__.py", "__main__.py", "_version.py"):
            continue
        names = next(
            ast.literal_eval(node.value)
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        )
        needs_psycopg = {
            "_postgres_admin.py",
            "_postgres_connection.py",
            "_postgres_listener.py",
            "_postgres_purge.py",
            "_postgres_session.py",
            "_postgres_store.py",
            "_postgres_worker.py",
            "_postgres_writer.py",
        }
        if path.name in needs_psycopg and importlib.util.find_spec("psycopg") is None:
            continue  # it is imported by who has psycopg
        module = importlib.import_module(".".join(["kbatch", *path.relative_to(PACKAGE).with_suffix("").parts]))
        assert all(hasattr(module, name) for name in names), path.name
        assert sorted(names) == names, path.name


@pytest.mark.parametrize(("of_loops", "of_threads"), [(aio, kbatch), (testing_aio, testing)], ids=["kbatch", "testing"])
def test_names_for_asyncio_are_those_of_threads(of_loops: Any, of_threads: Any) -> None:
    assert set(of_loops.__all__) <= set(of_threads.__all__)
    for name in of_loops.__all__:
        own, twin = getattr(of_loops, name), getattr(of_threads, name)
        surface = {member for member in dir(twin) if not member.startswith("_")}
        assert {member for member in dir(own) if not member.startswith("_")} == surface, name
        for member in surface:
            theirs, mine = getattr(twin, member), getattr(own, member)
            if inspect.isfunction(theirs):
                assert list(inspect.signature(mine).parameters) == list(inspect.signature(theirs).parameters), member


def test_defaults_are_those_that_are_written_down() -> None:
    # README and the docstrings name these.
    expected: dict[type, dict[str, Any]] = {
        kbatch.Producer: {"max_in_flight": 10_000, "close_timeout_s": 30.0, "wire": "kbatch"},
        kbatch.BatchedSender: {
            "batch_size": 1_000,
            "batch_bytes": 1_000_000,
            "batch_timeout_ms": 5.0,
            "max_buffered": 100_000,
            "close_timeout_s": 30.0,
        },
        kbatch.InlineSender: {"close_timeout_s": 30.0},
        kbatch.KafkaTopic: {"close_timeout_s": 30.0},
        kbatch.SendingAgent: {"failures_to_open": 3, "stalled_after_s": 30.0, "strict_order": False},
        kbatch.RetryPolicy: {
            "max_attempts": 10,
            "initial_backoff_s": 0.1,
            "max_backoff_s": 10.0,
            "multiplier": 2.0,
        },
    }
    for owner, defaults in expected.items():
        for kind in {owner, getattr(aio, owner.__name__, owner)}:
            found = inspect.signature(kind).parameters
            assert {name: found[name].default for name in defaults} == defaults, kind
    with kbatch.BatchedSender(kbatch.SendingAgent(testing.MemoryProducer(), "orders")) as sender:
        assert sender.max_buffered_bytes == 64 * 1024 * 1024


# -- what an import does


def test_an_import_brings_no_more_than_it_needs() -> None:
    loaded = run("import sys, kbatch; print(*sys.modules)").split()
    # librdkafka is taken out of confluent-kafka's folder, without its Python side.
    unwanted = ("confluent_kafka", "kbatch.testing", "kbatch.cli", "pytest", "typer", "rich", "aiokafka", "psutil")
    assert [name for name in loaded if name.startswith(unwanted)] == []


@pytest.mark.parametrize("module", ["kbatch", "kbatch.cli._app"])
def test_asyncio_is_imported_by_those_who_use_it(module: str) -> None:
    loaded = run(f"import sys, {module}; print(*sys.modules)").split()
    assert {"asyncio", "socket", "ssl"} & set(loaded) == set()


def test_asyncio_is_seen_when_it_has_been_imported() -> None:
    assert (
        run("""if True:
        import sys, types
        import kbatch
        from kbatch._fastmap import running_loop
        from kbatch.testing import MemoryProducer

        def is_refused(error):
            def fail():
                raise error
            with MemoryProducer(header_hook=fail) as producer:
                try:
                    producer.send_batch("orders", [kbatch.Envelope(1)])
                except kbatch.SerializationError as refusal:
                    return refusal.__cause__ is error

        def has_no_loop():
            try:
                running_loop()
            except RuntimeError:
                return True

        assert has_no_loop() and is_refused(ValueError("not imported"))
        sys.modules["asyncio"] = types.ModuleType("asyncio")  # as another thread sees it at first
        assert has_no_loop() and is_refused(ValueError("half made"))
        del sys.modules["asyncio"]

        import asyncio
        async def main():
            assert running_loop() is asyncio.get_running_loop()
        asyncio.run(main())
        assert has_no_loop() and is_refused(asyncio.CancelledError("whole"))
        print("seen")
    """)
        == "seen\n"
    )


def test_testing_brings_nothing_for_asyncio() -> None:
    loaded = run("import sys, kbatch.testing; print(*sys.modules)").split()
    assert [name for name in loaded if name.startswith(("kbatch.aio", "kbatch.testing.aio"))] == []


def test_an_import_leaves_the_process_as_it_was() -> None:
    assert (
        run("""if True:
        import logging, signal, threading, warnings
        def state():
            return ([signal.getsignal(number) for number in sorted(signal.valid_signals())], threading.enumerate(),
                    logging.root.handlers[:], logging.root.level, warnings.filters[:])
        before = state()
        import kbatch
        assert state() == before
        producer = kbatch.Producer({"bootstrap.servers": "127.0.0.1:1"})
        assert state() == before
        from kbatch.testing import MemoryProducer
        with MemoryProducer() as memory, kbatch.BatchedSender(kbatch.SendingAgent(memory, "orders")) as sender:
            sender.send(kbatch.Envelope(1))
        producer.submit("orders", [kbatch.Envelope(1)], callback=lambda report: None)
        assert producer.close(0) == 1
        assert state()[0] == before[0]
        print("same")
    """)
        == "same\n"
    )


def test_librdkafka_is_confluent_kafkas() -> None:
    import confluent_kafka

    version = confluent_kafka.libversion()  # text in 2.12, text and number later
    assert kbatch.librdkafka_version == (version if isinstance(version, str) else version[0])


# -- layers


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def runtime_imports(tree: ast.AST) -> Iterator[str]:
    """The modules that a Python file imports, apart from those for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if is_for_types(node):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            if node.module == "kbatch":  # names of the package, or modules
                yield from (f"kbatch.{alias.name}" if f"{alias.name}" in LAYER_OF else "kbatch" for alias in node.names)
            else:
                yield node.module
        else:
            yield from runtime_imports(node)


def imports_of(path: Path) -> set[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        found = list(runtime_imports(ast.parse(text)))
    else:
        found = re.findall(r"^\s*(?:from|import|cimport)\s+(kbatch[\w.]*)", text, re.MULTILINE)
    return {name for name in found if name == "kbatch" or name.startswith("kbatch.")}


def unit_of(path: Path) -> str:
    """The module, or for testing and cli the package, to which a source file belongs."""
    parts = path.relative_to(PACKAGE).parts
    if parts[0] == "native":
        return "_fastmap"
    return parts[0] if len(parts) > 1 else path.stem


def sources() -> list[Path]:
    found = [path for suffix in ("py", "pyx", "pxd", "pxi") for path in PACKAGE.rglob(f"*.{suffix}")]
    return [path for path in found if path != PACKAGE / "__init__.py"]


def test_every_module_has_a_layer() -> None:
    stubs = PACKAGE.rglob("*.pyi")  # all that an installed package shows of its compiled modules
    assert {unit_of(path) for path in [*sources(), *stubs]} == set(LAYER_OF)
    for package, layers in LAYER_WITHIN.items():
        modules = {path.stem for path in (PACKAGE / package).iterdir() if path.suffix in (".py", ".pyi")}
        assert modules - {"__init__"} == set(layers)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_only(path: Path) -> None:
    unit = unit_of(path)
    for name in imports_of(path):
        if name == "kbatch":
            assert unit in ABOVE_THE_ROOT, f"{path.name} imports the whole package"
            continue
        imported = name.split(".")[1]
        assert imported == unit or LAYER_OF[imported] < LAYER_OF[unit], f"{path.name} imports {name}"
        if imported == unit and unit in LAYER_WITHIN:
            layers = LAYER_WITHIN[unit]
            assert layers[name.split(".")[2]] < layers[path.stem], f"{path.name} imports {name}"


def type_imports(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    trees = (
        [tree]
        if path.suffix == ".pyi"
        else [ast.Module(node.body, []) for node in ast.walk(tree) if is_for_types(node)]
    )
    for each in trees:
        yield from (name for name in runtime_imports(each) if name.startswith("kbatch."))


def test_what_points_up_is_for_type_checkers_and_written_down() -> None:
    up = set()
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")]:
        unit = unit_of(path)
        for name in type_imports(path) if path != PACKAGE / "__init__.py" else ():
            imported = name.split(".")[1]
            if LAYER_OF[imported] >= LAYER_OF[unit] and imported != unit:
                up.add((unit, imported))
    assert up == UP_FOR_TYPES


# -- interpreters

SECOND_INTERPRETER = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters  # before 3.13
import kbatch
code = '''
try:
    import kbatch
except ImportError as error:
    print("refused:", error, flush=True)
else:
    print("imported", flush=True)
'''
interpreters.run_string(interpreters.create(), code)
"""


def test_a_second_interpreter_is_refused() -> None:
    assert run(SECOND_INTERPRETER).startswith("refused: ")


@pytest.mark.skipif(
    sys.version_info >= (3, 12),
    reason="platform: from Python 3.12 on the other one cannot import msgspec or kbatch at all",
)
def test_the_main_interpreter_is_refused_after_another_one() -> None:
    code = SECOND_INTERPRETER.replace("\nimport kbatch\n", "\n", 1) + "exec(code)"
    first, second = run(code).splitlines()
    assert first == "imported"
    assert second.startswith("refused: ")
    assert "this module can only be loaded into one interpreter per process" in second
