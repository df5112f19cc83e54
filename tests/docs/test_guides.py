"""Check the commands of the README and of all pages: each is parsed, and the settings of a training are resolved."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from distillm_cli.cli.app import app, main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```(?:sh|bash)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
# Programs print their arguments; of launchers, those after the name of the package. No program of the machine is found.
SUBSTITUTES = """
PATH=
distillm() { printf '%s\\0' "$@" >&3; printf '\\0' >&3; }
launcher() { while [ $# -gt 0 ]; do shift; [ "$1" = distillm_cli ] && { shift; distillm "$@"; return; }; done; }
srun() { "$@"; }
.venv/bin/distillm() { distillm "$@"; }
torchrun() { launcher "$@"; }
accelerate() { launcher "$@"; }
"""
OF_THE_TUTORIAL = {"squares", "letters"}  # names that docs/extending.md adds, and its own test uses


def commands(page: Path, directory: Path) -> list[list[str]]:
    """Return the arguments of each ``distillm`` in the page's blocks, as bash expands them in its loops and variables."""
    found = []
    for indent, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        script = SUBSTITUTES + "".join(line.removeprefix(indent) for line in text.splitlines(keepends=True))
        out = directory / "arguments"
        with out.open("wb") as file:
            argv = [shutil.which("bash"), "-c", f"exec 3>&1 >/dev/null 2>&1\n{script}"]
            environment = {"SLURM_ARRAY_TASK_ID": "4"}
            subprocess.run(argv, cwd=directory, env=environment, stdout=file, stdin=subprocess.DEVNULL, check=False)
        found += [call.split("\0") for call in out.read_text(encoding="utf-8").split("\0\0") if call]
    return [argv for argv in found if "…" not in argv]


def parse(argv: list[str]) -> None:
    """Parse a command line without running it. Raises the parser's error."""
    command = get_command(app)
    context = command.make_context("distillm", list(argv), ignore_unknown_options=True)
    rest = [*getattr(context, "_protected_args", ()), *context.args]
    while hasattr(command, "resolve_command") and rest:
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
        rest = [*getattr(context, "_protected_args", ()), *context.args]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_the_page_parse(page, tmp_path):
    for argv in commands(page, tmp_path):
        if not OF_THE_TUTORIAL & set(argv):
            parse(argv)


def test_substitutes_expand_loops_and_launchers(tmp_path):
    """Check that the test sees commands in loops, in arrays, in lists of commands, and after launchers."""
    (sweep, *others) = [
        argv for argv in commands(ROOT / "docs" / "sweeps.md", tmp_path) if "--alpha" in argv and "--json" in argv
    ]
    assert len(others) == 5
    assert sweep[sweep.index("--alpha") + 1] == "0.0"
    task = next(
        argv
        for argv in commands(ROOT / "docs" / "sweeps.md", tmp_path)
        if "runs/sweep/a0.1-s11" in argv and "--json" not in argv
    )
    assert task[task.index("--seed") + 1] == "11"
    assert ["run", "dolly-gpt2-pipeline"] in commands(ROOT / "docs" / "paper.md", tmp_path)
    assert any(argv[0] == "distill" for argv in commands(ROOT / "docs" / "scale.md", tmp_path))
    with pytest.raises(Exception, match="No such option"):
        parse(["distill", "--no-such-flag"])


def test_settings_of_trainings_resolve(tmp_path, capsys, monkeypatch):
    """Resolve every training of the pages with ``--dry-run``; recipes of the reader's are skipped."""
    monkeypatch.chdir(tmp_path)
    trainings = {}
    for page in PAGES:
        for argv in commands(page, tmp_path):
            if argv[0] in ("sft", "distill") and not OF_THE_TUTORIAL & set(argv):
                trainings.setdefault(tuple(argv), page.name)
    assert len(trainings) > 25
    for argv, page in trainings.items():
        recipe = argv[argv.index("--recipe") + 1] if "--recipe" in argv else ""
        if recipe.endswith(".yaml") or "--resume" in argv:
            continue
        options = [word for word in argv if word not in ("--dry-run", "--json", "--warm-teacher-cache", "--compare")]
        code = main([*options, "--dry-run", "--json"])
        out, err = capsys.readouterr()
        assert code == 0, f"{page}: distillm {' '.join(argv)}: {err}"
        assert json.loads(out)["status"] == "ok"


def test_picture_of_the_readme_needs_no_network():
    picture = (ROOT / "docs" / "images" / "run.svg").read_text(encoding="utf-8")
    assert "student&#160;after" in picture
    assert re.findall(r"(?:url\(|href=)[\"']?https?:[^\"')]*", picture) == []
