"""Check the dependency rules of the packages by reading their imports."""

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

# Package → the other packages and modules that it may import. The command line may import everything.
SHARED = {
    "errors",
    "types",
    "utils",
    "plugins",
    "config.schema",
    "config.fields",
    "config.schedule",
    "config.student_spec",
    "training.distributed",
    "training.events",
}
TRAINING_PACKAGES = {"losses", "rollouts", "teachers", "training"}
ALLOWED: dict[str, set[str]] = {
    "utils": set(),
    "config": set(),
    "data": set(),
    "servers": set(),
    "models": {"servers"},
    **{package: {*TRAINING_PACKAGES, "servers"} for package in TRAINING_PACKAGES},
    "extras": {"models", "config.extras", *TRAINING_PACKAGES},
    "evaluation": {
        "config.suite_file",
        "rollouts.sampler",
        "rollouts.next_token",
        "data",
        "losses.attacks",
        "losses.fused",
        "losses.plain",
        "teachers.local",
    },
    "ui": {"runs.run_results", "runs.output_dir", "runs.watch"},  # plain data, as the events are
    "runs": {"config", "data", "models", "extras", "servers", *TRAINING_PACKAGES, "evaluation"},
    "api": {"config", "runs", "ui"},
}
COMMAND_LINE = {"typer", "click", "rich"}
FORBIDDEN: dict[str, set[str]] = {  # package → third-party packages that it must not import
    **{package: {*COMMAND_LINE, "yaml", "transformers", "datasets"} for package in TRAINING_PACKAGES},
    "utils": COMMAND_LINE,
    "servers": {*COMMAND_LINE, "torch", "transformers"},
    "data": COMMAND_LINE,
    "models": COMMAND_LINE,
    "extras": COMMAND_LINE,
    "evaluation": COMMAND_LINE,
    "config": COMMAND_LINE,
    "ui": {"typer", "click"},
    "runs": COMMAND_LINE,
    "api": COMMAND_LINE,
}
HEAVY = {"torch", "transformers", "datasets", "accelerate", "tokenizers", "safetensors", "numpy", "pyarrow", "pandas"}
# Modules that must not load a heavy package when they are imported, directly or through other modules.
LIGHT_MODULES = ("__main__", "", "api", "cli.app", "config.load", "losses.divergences", "losses.families", "ui.console")


class Import(NamedTuple):
    module: str  # dotted; without "distillm_cli." for modules of this package
    own: bool
    top: bool  # runs when the file is imported
    line: int


def imports(source: str, module: str) -> Iterator[Import]:
    """Yield the imports of a file; ``from distillm_cli.training import engine`` counts as ``training.engine``."""

    def visit(node: ast.AST, top: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return  # types only: nothing is imported
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from resolved(alias.name, None, top, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield from resolved(base, alias.name, top, node.lineno)
        inside = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    def resolved(base: str, name: str | None, top: bool, line: int) -> Iterator[Import]:
        if base.split(".")[0] != "distillm_cli":
            yield Import(base, False, top, line)
            return
        dotted_name = base.removeprefix("distillm_cli").lstrip(".")
        place = PACKAGE.joinpath(*dotted_name.split(".")) if dotted_name else PACKAGE
        if name and (not dotted_name or (place / f"{name}.py").is_file() or (place / name).is_dir()):
            dotted_name = f"{dotted_name}.{name}".lstrip(".")
        yield Import(dotted_name, True, top, line)

    yield from visit(ast.parse(source), True)


def violations(source: str, module: str) -> list[str]:
    """Return the violations of the dependency rules in a file, one sentence each.

    module: dotted, as ``distillm_cli.training.engine``.
    """
    dotted_name = module.removeprefix("distillm_cli").lstrip(".")
    package = dotted_name.split(".")[0]
    found = []
    for module_, own, _, line in imports(source, module):
        first = module_.split(".")[0]
        if own and package in ALLOWED:
            allowed = {package, *SHARED, *ALLOWED[package]}
            if module_ and not any(module_ == a or module_.startswith(f"{a}.") for a in allowed):
                found.append(f"{dotted_name}:{line}: {package} may not import {module_}")
        if own and package in ("errors", "types") and module_ != "utils.text":
            found.append(f"{dotted_name}:{line}: {package} must not import {module_}")
        if not own and first in FORBIDDEN.get(package, ()):
            found.append(f"{dotted_name}:{line}: {package} may not import {first}")
    return found


def loaded_with(root: str, read: Callable[[str], str | None]) -> Iterator[tuple[str, Import]]:
    """Yield (importing module, third-party import) for everything that is loaded when ``root`` is imported."""
    queue, seen = [root], set()
    while queue:
        dotted_name = queue.pop()
        if dotted_name in seen or (source := read(dotted_name)) is None:
            continue
        seen.add(dotted_name)
        # parent packages are imported as well
        queue.extend(dotted_name.rsplit(".", n)[0] for n in range(1, dotted_name.count(".") + 1))
        for found in imports(source, f"distillm_cli.{dotted_name}".rstrip(".")):
            if found.top and found.own:
                queue.append(found.module)
            elif found.top:
                yield dotted_name, found


def source_of(dotted_name: str) -> str | None:
    """Return the source of a module or package of distillm_cli by its dotted name, or None."""
    place = PACKAGE.joinpath(*dotted_name.split(".")) if dotted_name else PACKAGE
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return None


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_follows_dependency_rules(path):
    module = module_of(path).removesuffix(".__init__")
    assert violations(path.read_text(encoding="utf-8"), module) == []


def test_file_stems_are_unique():
    """Check that no two modules share a stem, except commands in ``cli/``, which are named after their verbs."""
    stems = [path.stem for path in SOURCES if path.stem != "__init__" and path.parent.name != "cli"]
    assert [stem for stem in stems if stems.count(stem) > 1] == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "runs").glob("*.py")), ids=lambda path: path.stem)
def test_runs_modules_print_nothing(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert {"print"} & set(calls) == set()
    assert {"sys.stdout", "sys.stderr"} & set(names) == set()


def public_names(source: str) -> Iterator[str]:
    """Yield the public functions, classes and constants that a file defines at its top level."""
    for node in ast.parse(source).body:
        names = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        yield from (name for name in names if not name.startswith("_"))


def test_public_names_are_defined_once():
    """Check this except for commands and library functions, which are named after the same verbs."""
    modules: dict[str, list[str]] = {}
    for path in SOURCES:
        for name in set(public_names(path.read_text(encoding="utf-8"))):
            modules.setdefault(name, []).append(module_of(path))
    del modules["main"]  # entry points of the process (``__main__``) and of the program: one meaning
    for name in set(distillm_cli.__all__) & modules.keys():
        modules[name] = [module for module in modules[name] if module.split(".")[1] != "cli"]
    assert {name: found for name, found in modules.items() if len(found) > 1} == {}


def test_train_step_is_at_most_60_lines():
    source = (PACKAGE / "training/trainer.py").read_text(encoding="utf-8")
    (step,) = [node for node in ast.walk(ast.parse(source)) if getattr(node, "name", None) == "train_step"]
    assert step.end_lineno - step.lineno + 1 <= 60


@pytest.mark.long
def test_benchmarks_can_be_imported():
    """Check it in one process, which imports the packages that they share once."""
    directory = PACKAGE.parent / "benchmarks"
    names = sorted(path.stem for path in directory.glob("*.py"))
    script = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name == "trl", name  # a script that runs in its own environment
    except BaseException as error:
        raise AssertionError(name) from error
"""
    done = subprocess.run([sys.executable, "-c", script, *names], cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("root", LIGHT_MODULES)
def test_module_loads_no_heavy_package(root):
    heavy = [
        f"{dotted_name}:{found.line} imports {found.module}"
        for dotted_name, found in loaded_with(root, source_of)
        if found.module.split(".")[0] in HEAVY
    ]
    assert heavy == [], "import it inside the function that needs it"


# Modules that are slow to import and that a run does not need until its rows are tokenized.
LATER = {"models.loading", "models.backbone", "models.pair", "evaluation.metrics"}


def test_tokenizing_imports_no_model_or_metric():
    loaded = {dotted_name for dotted_name, _ in loaded_with("runs.train", source_of)}
    assert "models.tokenizer_files" in loaded
    assert loaded & LATER == set(), "import it where it is used: it delays the first step"
    found = imports(source_of("models.tokenizer_files"), "distillm_cli.models.tokenizer_files")
    assert {f.module for f in found if f.module.startswith("transformers")} == {"transformers"}


def test_heavy_import_is_found_through_other_modules():
    files = {
        "cli.app": "from distillm_cli.cli import distill, eval",
        "cli": "",
        "cli.distill": "def distill():\n    import torch",
        "cli.eval": "try:\n    from distillm_cli.ui.console import console\nexcept ImportError:\n    pass",
        "ui.console": "import numpy as np\nif TYPE_CHECKING:\n    import torch",
    }
    found = [(dotted_name, found.module) for dotted_name, found in loaded_with("cli.app", files.get)]
    assert found == [("ui.console", "numpy")]


def test_scheduler_imports_no_heavy_package():
    source = (PACKAGE / "rollouts/scheduler.py").read_text(encoding="utf-8")
    assert not {found.module.split(".")[0] for found in imports(source, "distillm_cli.rollouts.scheduler")} & HEAVY


@pytest.mark.parametrize(
    ("source", "module", "violation"),
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
        ("from distillm_cli.config import schema", "errors", "errors must not import config.schema"),
        ("from distillm_cli.ui.console import console", "runs.train", "runs may not import ui.console"),
        ("from rich.table import Table", "runs.train", "runs may not import rich"),
    ],
)
def test_violations_are_reported(source, module, violation):
    (found,) = violations(source, f"distillm_cli.{module}")
    assert violation in found


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
def test_allowed_imports_are_accepted(source, module):
    assert violations(source, f"distillm_cli.{module}") == []
