"""The arrows of the design, held by reading the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import distillm_cli

PACKAGE = Path(__file__).resolve().parents[2] / "distillm_cli"
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "_recipes" not in path.parts)

# room → what it may import of this package besides itself. The command line may import everything.
EVERYBODY = {
    "errors",
    "types",
    "utils",
    "plugins",
    "config.schema",
    "config.fields",
    "config.schedule",
    "config.student_spec",
    "training.events",
}
TRAINING_ROOMS = {"losses", "rollouts", "teachers", "training"}
ARROWS: dict[str, set[str]] = {
    "utils": set(),
    "config": set(),
    "data": set(),
    "models": set(),
    **dict.fromkeys(TRAINING_ROOMS, TRAINING_ROOMS),
    "evaluation": {"rollouts.sampler", "rollouts.next_token", "data"},
    "ui": {"runs.run_results"},  # plain data, as the events are
    "runs": {"config", "data", "models", *TRAINING_ROOMS, "evaluation"},
    "api": {"config", "runs", "ui"},
}
COMMAND_LINE = {"typer", "click", "rich"}
FOREIGN: dict[str, set[str]] = {  # room → packages it has no business with
    **{room: {*COMMAND_LINE, "yaml", "transformers", "datasets"} for room in TRAINING_ROOMS},
    "utils": COMMAND_LINE,
    "data": COMMAND_LINE,
    "models": COMMAND_LINE,
    "evaluation": COMMAND_LINE,
    "config": COMMAND_LINE,
    "ui": {"typer", "click"},
    "runs": COMMAND_LINE,
    "api": COMMAND_LINE,
}
HEAVY = {"torch", "transformers", "datasets", "accelerate", "tokenizers", "safetensors", "numpy", "pyarrow", "pandas"}
# Nothing heavy at import: neither here nor in whatever these import at their top.
LIGHT_ROOTS = ("__main__", "", "api", "cli.app", "config.load", "losses.divergences", "losses.families", "ui.console")


class Import(NamedTuple):
    module: str  # dotted; without "distillm_cli." when it is ours
    ours: bool
    top: bool  # runs when the file is imported
    line: int


def imports(source: str, module: str) -> Iterator[Import]:
    """Every import of a file; ``from distillm_cli.training import engine`` counts as ``training.engine``."""

    def visit(node: ast.AST, top: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return  # types only: nothing is imported
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from told(alias.name, None, top, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield from told(base, alias.name, top, node.lineno)
        inside = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    def told(base: str, name: str | None, top: bool, line: int) -> Iterator[Import]:
        if base.split(".")[0] != "distillm_cli":
            yield Import(base, False, top, line)
            return
        inner = base.removeprefix("distillm_cli").lstrip(".")
        place = PACKAGE.joinpath(*inner.split(".")) if inner else PACKAGE
        if name and (not inner or (place / f"{name}.py").is_file() or (place / name).is_dir()):
            inner = f"{inner}.{name}".lstrip(".")
        yield Import(inner, True, top, line)

    yield from visit(ast.parse(source), True)


def broken(source: str, module: str) -> list[str]:
    """The rules of the design that a file breaks, one sentence each. module: dotted, as ``distillm_cli.training.engine``."""
    inner = module.removeprefix("distillm_cli").lstrip(".")
    room = inner.split(".")[0]
    found = []
    for module_, ours, _, line in imports(source, module):
        first = module_.split(".")[0]
        if ours and room in ARROWS:
            allowed = {room, *EVERYBODY, *ARROWS[room]}
            if module_ and not any(module_ == a or module_.startswith(f"{a}.") for a in allowed):
                found.append(f"{inner}:{line}: {room} may not import {module_}")
        if ours and room in ("errors", "types") and module_ != "utils.text":
            found.append(f"{inner}:{line}: {room} stands below everything, and imports {module_}")
        if not ours and first in FOREIGN.get(room, ()):
            found.append(f"{inner}:{line}: {room} may not import {first}")
    return found


def loaded_with(root: str, read: Callable[[str], str | None]) -> Iterator[tuple[str, Import]]:
    """(importing module, foreign import) for everything that runs when ``root`` is imported."""
    waiting, seen = [root], set()
    while waiting:
        inner = waiting.pop()
        if inner in seen or (source := read(inner)) is None:
            continue
        seen.add(inner)
        waiting.extend(inner.rsplit(".", n)[0] for n in range(1, inner.count(".") + 1))  # packages run as well
        for found in imports(source, f"distillm_cli.{inner}".rstrip(".")):
            if found.top and found.ours:
                waiting.append(found.module)
            elif found.top:
                yield inner, found


def source_of(inner: str) -> str | None:
    """The text of one of our modules by its dotted name, a package's ``__init__`` included."""
    place = PACKAGE.joinpath(*inner.split(".")) if inner else PACKAGE
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return None


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_keeps_to_its_room(path):
    module = module_of(path).removesuffix(".__init__")
    assert broken(path.read_text(encoding="utf-8"), module) == []


def test_no_file_stem_is_used_twice():
    """The commands in ``cli/`` aside, which are named after their verbs."""
    stems = [path.stem for path in SOURCES if path.stem != "__init__" and path.parent.name != "cli"]
    assert [stem for stem in stems if stems.count(stem) > 1] == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "runs").glob("*.py")), ids=lambda path: path.stem)
def test_runs_print_nothing(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert {"print"} & set(calls) == set()
    assert {"sys.stdout", "sys.stderr"} & set(names) == set()


def public_names(source: str) -> Iterator[str]:
    """The functions, classes and constants that a file defines at its top and that are no private ones."""
    for node in ast.parse(source).body:
        names = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        yield from (name for name in names if not name.startswith("_"))


def test_no_public_name_is_defined_in_two_modules():
    """Commands and the library's functions aside, which are named after the same verbs."""
    modules: dict[str, list[str]] = {}
    for path in SOURCES:
        for name in set(public_names(path.read_text(encoding="utf-8"))):
            modules.setdefault(name, []).append(module_of(path))
    del modules["main"]  # of the process (``__main__``) and of the program that it starts: one meaning
    for name in set(distillm_cli.__all__) & modules.keys():
        modules[name] = [module for module in modules[name] if module.split(".")[1] != "cli"]
    assert {name: found for name, found in modules.items() if len(found) > 1} == {}


def test_a_training_step_is_one_page():
    source = (PACKAGE / "training/trainer.py").read_text(encoding="utf-8")
    (step,) = [node for node in ast.walk(ast.parse(source)) if getattr(node, "name", None) == "train_step"]
    assert step.end_lineno - step.lineno + 1 <= 60


@pytest.mark.parametrize("path", sorted((PACKAGE.parent / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_can_be_imported(path):
    done = subprocess.run(
        [sys.executable, "-c", f"import {path.stem}"], cwd=path.parent, capture_output=True, text=True
    )
    is_peers = "No module named 'trl'" in done.stderr  # of a script that runs in an environment of its own
    assert done.returncode == 0 or is_peers, done.stderr


@pytest.mark.parametrize("root", LIGHT_ROOTS)
def test_nothing_heavy_is_loaded_with(root):
    heavy = [
        f"{inner}:{found.line} imports {found.module}"
        for inner, found in loaded_with(root, source_of)
        if found.module.split(".")[0] in HEAVY
    ]
    assert heavy == [], "import it inside the function that needs it"


# What a run needs later than its rows' tokens, and takes long to import.
LATER = {"models.loading", "models.backbone", "models.pair", "evaluation.metrics"}


def test_rows_and_tokenizer_wait_for_no_model_and_no_metric():
    ours = {inner for inner, _ in loaded_with("runs.train", source_of)}
    assert "models.tokenizer_files" in ours
    assert ours & LATER == set(), "import it where it is used: the first step waits for it"
    found = imports(source_of("models.tokenizer_files"), "distillm_cli.models.tokenizer_files")
    assert {f.module for f in found if f.module.startswith("transformers")} == {"transformers"}


def test_a_heavy_import_is_found_through_other_files():
    files = {
        "cli.app": "from distillm_cli.cli import distill, eval",
        "cli": "",
        "cli.distill": "def distill():\n    import torch",
        "cli.eval": "try:\n    from distillm_cli.ui.console import console\nexcept ImportError:\n    pass",
        "ui.console": "import numpy as np\nif TYPE_CHECKING:\n    import torch",
    }
    found = [(inner, found.module) for inner, found in loaded_with("cli.app", files.get)]
    assert found == [("ui.console", "numpy")]


def test_the_scheduler_knows_no_torch():
    source = (PACKAGE / "rollouts/scheduler.py").read_text(encoding="utf-8")
    assert not {found.module.split(".")[0] for found in imports(source, "distillm_cli.rollouts.scheduler")} & HEAVY


@pytest.mark.parametrize(
    ("source", "module", "complaint"),
    [
        ("import typer", "training.engine", "training may not import typer"),
        ("def f():\n    import yaml", "training.engine", "training may not import yaml"),
        ("from rich.table import Table", "training.engine", "training may not import rich"),
        ("from distillm_cli.data import sources", "training.engine", "training may not import data.sources"),
        ("from distillm_cli import models", "training.engine", "training may not import models"),
        ("from ..models.pair import load_pair", "training.engine", "training may not import models.pair"),
        (
            "def f():\n    from distillm_cli.training.engine import train",
            "models.pair",
            "models may not import training.engine",
        ),
        ("from distillm_cli.config.load import resolve", "training.engine", "training may not import config.load"),
        ("from distillm_cli.ui import console", "evaluation.evaluate", "evaluation may not import ui.console"),
        ("from distillm_cli.config import schema", "errors", "stands below everything"),
        ("from distillm_cli.ui.console import console", "runs.train", "runs may not import ui.console"),
        ("from rich.table import Table", "runs.train", "runs may not import rich"),
    ],
)
def test_the_rules_bite(source, module, complaint):
    (found,) = broken(source, f"distillm_cli.{module}")
    assert complaint in found


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from distillm_cli.config.schema import Train\nfrom distillm_cli.types import Batch", "training.engine"),
        ("from distillm_cli.training.events import Progress", "data.sources"),
        ("from distillm_cli.rollouts import sampler", "evaluation.evaluate"),
        ("def f():\n    import torch\n    from distillm_cli.training.engine import train", "cli.distill"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", "cli.distill"),
        ("from distillm_cli.training.events import Event", "ui.console"),
    ],
)
def test_the_rules_allow_what_the_design_allows(source, module):
    assert broken(source, f"distillm_cli.{module}") == []
