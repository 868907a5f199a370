"""librdkafka's error codes are named once, and no other file types them again."""

import ast
import re
from pathlib import Path

import pytest

import kbatch
from kbatch import _codes
from kbatch._librdkafka import error_text

PACKAGE = Path(kbatch.__file__).parent
NAMES = {name: value for name, value in vars(_codes).items() if name.isupper() and isinstance(value, int)}
PERSISTENCE = {name for name in NAMES if name.endswith("PERSISTED")}
ROLES = {name for name in NAMES if name.endswith("_CODE")}  # a second name, by what kbatch has the code for
CODES = {name: value for name, value in NAMES.items() if name not in PERSISTENCE | ROLES}
NUMBERS = set(CODES.values())
SETS = [value for name, value in vars(_codes).items() if name.endswith("_CODES")]


def test_a_code_is_called_as_librdkafka_calls_it() -> None:
    assert {name: error_text(code)[0].removeprefix("_") for name, code in CODES.items()} == {
        name: name for name in CODES
    }
    assert {NAMES[role] for role in ROLES} <= NUMBERS


def test_a_code_is_there_for_a_meaning() -> None:
    assert set().union(*SETS, (NAMES[role] for role in ROLES)) == NUMBERS


def test_a_code_is_found_by_librdkafkas_name() -> None:
    found = _codes.codes_by_name()
    assert (found["_MSG_TIMED_OUT"], found["NO_ERROR"], found["MSG_SIZE_TOO_LARGE"]) == (-192, 0, 10)
    assert {error_text(code)[0]: code for code in NUMBERS}.items() <= found.items()
    assert not [name for name in found if name.startswith("ERR_")]


def test_the_native_declarations_have_the_same_numbers() -> None:
    if not (PACKAGE / "_librdkafka.pxd").exists():
        pytest.skip("platform: installed without its sources")
    text = (PACKAGE / "_librdkafka.pxd").read_text(encoding="utf-8")
    declared = dict(re.findall(r" RD_KAFKA_RESP_ERR_(\w+) = (-?\d+)", text))
    assert {name: error_text(int(code))[0] for name, code in declared.items()} == {name: name for name in declared}
    statuses = dict(re.findall(r" RD_KAFKA_MSG_STATUS_(\w+) = (\d)", text))
    assert {name: int(value) for name, value in statuses.items()} == {name: NAMES[name] for name in PERSISTENCE}


# -- no other file


def has_code(*nodes: ast.AST) -> bool:
    for node in nodes:
        for each in ast.walk(node):
            if (
                isinstance(each, ast.UnaryOp)
                and isinstance(each.op, ast.USub)
                and isinstance(each.operand, ast.Constant)
            ):
                if -each.operand.value in NUMBERS:
                    return True
            elif isinstance(each, ast.Constant) and type(each.value) is int and each.value in NUMBERS:
                return True
    return False


def is_of_codes(name: str | None) -> bool:
    return name is not None and (name.lstrip("_") in CODES or re.search(r"(^|[._])codes?$", name.lower()) is not None)


def types_a_code(node: ast.AST) -> bool:
    """A negative one anywhere; a positive one, which may be any number, beside a name of codes, or among its like."""
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.operand, ast.Constant) and isinstance(node.op, ast.USub) and has_code(node)
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        return any(is_of_codes(ast.unparse(side)) for side in sides) and has_code(*sides)
    if isinstance(node, ast.Assign):
        return any(is_of_codes(ast.unparse(target)) for target in node.targets) and has_code(node.value)
    if isinstance(node, ast.keyword):
        return is_of_codes(node.arg) and has_code(node.value)
    if isinstance(node, ast.Call):
        return ast.unparse(node.func).endswith("DeliveryError") and has_code(*node.args)
    if isinstance(node, (ast.Set, ast.Tuple, ast.List)):
        return len(node.elts) > 2 and all(has_code(each) for each in node.elts)
    return False


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_code_is_typed_in_one_file(path: Path) -> None:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    found = [ast.unparse(node) for node in nodes if types_a_code(node)]
    assert bool(found) == (path.name == "_codes.py"), found


def test_native_code_has_its_codes_from_the_declarations() -> None:
    for path in [*PACKAGE.rglob("*.pxi"), *PACKAGE.rglob("*.pyx")]:
        code = re.sub(r'"""[\s\S]*?"""|#.*', "", path.read_text(encoding="utf-8"))
        assert not {int(number) for number in re.findall(r"-\d{3}\b", code)} & NUMBERS, path.name
