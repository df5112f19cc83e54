"""Test that every error has a stable code and that every code is documented."""

from __future__ import annotations

import ast
import copy
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from distillm_cli.errors import DataError, DistillmError, Interrupted, RecipeError
from distillm_cli.training.recovery import InfiniteLoss

ROOT = Path(__file__).resolve().parents[2]
AREAS = {
    "DistillmError": "unexpected",
    "UsageError": "usage",
    "RecipeError": "recipe",
    "DataError": "data",
    "ModelError": "model",
    "CheckpointError": "checkpoint",
    "NonFiniteError": "numbers",
    "InfiniteLoss": "numbers",
    "OutOfMemoryError": "memory",
    "StorageError": "storage",
    "PeerProcessError": "process",
    "ServerError": "server",
    "AlarmError": "alarm",
}
WITH_FIXED_CODE = {"Interrupted"}  # the constructor sets the code


def constructed_errors() -> Iterator[tuple[str, str, ast.expr | None]]:
    """Yield location, class and first argument of every error that the package constructs."""
    for path in sorted((ROOT / "distillm_cli").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in AREAS:
                yield f"{path.name}:{node.lineno}", node.func.id, node.args[0] if node.args else None


def documented_codes() -> list[str]:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([a-z0-9_.]+)` \|", text, re.MULTILINE)


def subclasses(base: type) -> Iterator[type]:
    for subclass in base.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


def test_every_error_class_has_an_area():
    names = {
        error_class.__name__
        for error_class in (DistillmError, *subclasses(DistillmError))
        if error_class.__module__ != __name__
    }
    assert names == AREAS.keys() | WITH_FIXED_CODE
    assert InfiniteLoss in set(subclasses(DistillmError))


def test_every_error_has_a_code_of_its_area():
    """Check that a code is a literal where the error is raised, or copied from another error."""
    for location, name, code in constructed_errors():
        if isinstance(code, ast.Attribute):
            assert code.attr == "code", location
            continue
        assert isinstance(code, ast.Constant), location
        assert re.fullmatch(AREAS[name] + ("" if name == "DistillmError" else r"\.[a-z]+(_[a-z0-9]+)*"), code.value), (
            location
        )


def test_exactly_the_used_codes_are_documented():
    codes = {code.value for _, _, code in constructed_errors() if isinstance(code, ast.Constant)} | {"interrupted"}
    assert sorted(documented_codes()) == sorted(codes)


@pytest.mark.parametrize("duplicate", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy])
def test_copied_error_has_all_fields(duplicate):
    first = RecipeError("recipe.unknown_field", "a.yaml:2: trian: no such key", hint="try train")
    for error in (
        DataError("data.row_too_long", "a.jsonl:3: too long", where="a.jsonl", hint="cut it"),
        RecipeError("recipe.unknown_field", "a.yaml:2: trian: no such key", problems=(first, first)),
        Interrupted("interrupted", signal_number=15),
    ):
        copied = duplicate(error)
        assert type(copied) is type(error)
        assert str(copied) == str(error)
        for name in ("code", "what", "where", "hint", "exit_code"):
            assert getattr(copied, name) == getattr(error, name)
