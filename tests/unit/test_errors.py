"""Errors: every error has a stable code, and every code is documented."""

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
}
OF_THE_CLASS = {"Interrupted"}  # its constructor sets the one code of all of them


def raised() -> Iterator[tuple[str, str, ast.expr | None]]:
    """Yield place, class and first argument of every error that the package constructs."""
    for path in sorted((ROOT / "distillm_cli").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in AREAS:
                yield f"{path.name}:{node.lineno}", node.func.id, node.args[0] if node.args else None


def documented() -> list[str]:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([a-z0-9_.]+)` \|", text, re.MULTILINE)


def subclasses(of: type) -> Iterator[type]:
    for one in of.__subclasses__():
        yield one
        yield from subclasses(one)


def test_every_class_of_errors_has_an_area():
    names = {one.__name__ for one in (DistillmError, *subclasses(DistillmError)) if one.__module__ != __name__}
    assert names == AREAS.keys() | OF_THE_CLASS
    assert InfiniteLoss in set(subclasses(DistillmError))


def test_every_error_has_a_code_of_its_area():
    """A code is written where the error is raised, or is that of the error it is made from."""
    for place, name, code in raised():
        if isinstance(code, ast.Attribute):
            assert code.attr == "code", place
            continue
        assert isinstance(code, ast.Constant), place
        assert re.fullmatch(AREAS[name] + ("" if name == "DistillmError" else r"\.[a-z]+(_[a-z0-9]+)*"), code.value), (
            place
        )


def test_codes_are_documented_once_and_no_others():
    codes = {code.value for _, _, code in raised() if isinstance(code, ast.Constant)} | {"interrupted"}
    assert sorted(documented()) == sorted(codes)


@pytest.mark.parametrize("twice", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy])
def test_a_copy_of_an_error_is_whole(twice):
    first = RecipeError("recipe.unknown_field", "a.yaml:2: trian: no such key", hint="try train")
    for error in (
        DataError("data.row_too_long", "a.jsonl:3: too long", where="a.jsonl", hint="cut it"),
        RecipeError("recipe.unknown_field", "a.yaml:2: trian: no such key", problems=(first, first)),
        Interrupted("interrupted", signal_number=15),
    ):
        again = twice(error)
        assert type(again) is type(error)
        assert str(again) == str(error)
        for name in ("code", "what", "where", "hint", "exit_code"):
            assert getattr(again, name) == getattr(error, name)
