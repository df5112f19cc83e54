"""Test the tutorial in docs/extending.md: its files form a package, and its commands run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r'^```(?P<language>\w+)(?: title="(?P<file>[^"]+)")?\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """Write the files of the page and the metadata of an installer, and return the directory."""
    directory = tmp_path_factory.mktemp("tutorial")
    for block in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        if block["file"] is not None:
            file = directory / block["file"]
            file.parent.mkdir(exist_ok=True)
            file.write_text(block["text"], encoding="utf-8")
    (directory / "squares" / "__init__.py").touch()
    project = tomllib.loads((directory / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = directory / "distillm_squares-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    entry_points = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups]
    (info / "entry_points.txt").write_text("\n".join(entry_points))
    return directory


def run(package: Path, *argv: str) -> str:
    """Run Python with the package installed and return stdout."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(ROOT)]), "COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, *argv], env=env, cwd=package, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "cannot be loaded" not in done.stderr
    return done.stdout


@pytest.mark.long
def test_gradient_of_the_divergence_matches_autograd(package):
    run(package, "check_gradient.py")


@pytest.mark.long
def test_commands_of_the_page_run(package):
    commands = [
        line.removeprefix("distillm ")
        for block in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))
        if block["language"] == "sh"
        for line in block["text"].splitlines()
    ]
    assert [command.split()[0] for command in commands] == ["methods", "distill", "eval"]
    shown, trained, scored = (
        run(package, "-m", "distillm_cli", *shlex.split(command), "--json") for command in commands
    )
    assert json.loads(shown)["method"]["name"] == "squares"
    assert "first_word" in json.loads(trained)["report"]["student_after"]
    assert json.loads(scored)["suites"]["letters"]["first_word"]["mean"] >= 0
    assert "squared_scale: 3.0" in (package / "runs" / "squares" / "recipe.yaml").read_text(encoding="utf-8")
