"""Every shipped recipe is valid, says how to run it, and means what its comment says."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from distillm_cli.config.load import resolve, shipped, to_yaml
from distillm_cli.config.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]


def test_the_shipped_recipes():
    tasks = {"samsum-t5", "xsum-t5", "wmt14-t5", "iwslt-mt5", "gsm8k"}
    assert set(shipped()) == tasks | {
        "quickstart",
        "quickstart-teacher",
        "dolly-gpt2",
        "dolly-opt",
        "g2p",
        "g2p-teacher",
    }
    assert {path.parent for path in shipped().values()} == {ROOT / "recipes"}


@pytest.mark.parametrize("name", shipped())
def test_a_recipe_opens_with_the_command_that_runs_it(name, tmp_path):
    command, summary = shipped()[name].read_text(encoding="utf-8").splitlines()[:2]
    words = shlex.split(command.removeprefix("# "))
    assert command.startswith("# distillm ")
    assert words[words.index("--recipe") + 1] == name
    assert summary.startswith("# ")
    assert summary.endswith(".")

    resolved = resolve(command=words[1], recipe=name)
    assert METHODS[resolved.recipe.method].verb == words[1]
    assert resolved.name == name
    (tmp_path / "recipe.yaml").write_text(to_yaml(resolved))
    assert resolve(command=words[1], recipe=tmp_path / "recipe.yaml").recipe == resolved.recipe


@pytest.mark.parametrize("name", shipped())
def test_the_commands_in_a_recipes_comments_resolve(name):
    """`distillm sft --model … --lr …` lines in comments are documentation that must not rot."""
    from distillm_cli.cli.options import flags

    for line in shipped()[name].read_text(encoding="utf-8").splitlines():
        _, found, rest = line.partition("distillm ")
        if not (line.startswith("#") and found and rest.startswith(("sft --", "distill --"))):
            continue
        verb, *words = shlex.split(rest)
        given = dict(zip(words[::2], words[1::2], strict=True))
        recipe = given.pop("--recipe", None)
        given.pop("--output", None)
        sets = [given.pop("--set")] if "--set" in given else None
        resolve(
            command=verb,
            recipe=recipe,
            sets=sets,
            flags=flags(**{k[2:].replace("-", "_"): v for k, v in given.items()}),
        )


def test_dolly_gpt2_is_the_papers_setting():
    r = resolve(command="distill", recipe="dolly-gpt2").recipe
    assert (r.teacher.path, r.student.path, r.data.source, r.data.template) == ("gpt2-xl", "gpt2", "dolly", "alpaca")
    assert (r.objective.divergence, r.objective.alpha, r.objective.kd_weight) == ("skl", 0.1, 1.0)
    assert (r.schedule.kind, r.schedule.capacity, r.schedule.epsilon, r.schedule.levels) == ("adaptive", 1000, 0.1, 10)
    assert (r.train.lr, r.train.batch_size, r.train.epochs, r.train.weight_decay) == (5e-4, 8, 20, 1e-2)
    assert (r.train.clip, r.train.warmup, r.train.lr_schedule, r.train.min_lr) == (1.0, 0, "cosine", 1e-7)
    assert (r.train.seed, r.train.select, r.data.max_length, r.data.max_prompt_length) == (10, "rouge_l", 512, 256)
    assert (r.eval.seeds, r.eval.no_repeat_ngram_size, r.eval.max_new_tokens) == ((10, 20, 30, 40, 50), 6, 256)


def test_dolly_opt_is_the_papers_setting():
    r = resolve(command="distill", recipe="dolly-opt").recipe
    assert (r.teacher.path, r.student.path) == ("facebook/opt-2.7b", "facebook/opt-125m")
    assert (r.objective.divergence, r.train.lr, r.train.batch_size, r.train.epochs) == ("srkl", 5e-5, 8, 20)


def test_an_installation_finds_its_recipes_inside_the_package(tmp_path):
    """A wheel puts recipes/ at distillm_cli/_recipes; laid out like that, names resolve without a checkout."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {
        "recipes": "distillm_cli/_recipes"
    }

    package = tmp_path / "distillm_cli"
    shutil.copytree(ROOT / "distillm_cli", package, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copytree(ROOT / "recipes", package / "_recipes")
    (tmp_path / "recipes").mkdir()  # somebody else's, beside the package in site-packages
    (tmp_path / "recipes" / "theirs.yaml").touch()
    script = (
        "from distillm_cli.config.load import resolve, shipped; resolve(command='distill', recipe='quickstart');"
        "print(*shipped(), shipped()['g2p'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", script]
    seen = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert seen.stdout.split() == [*shipped(), str(package / "_recipes" / "g2p.yaml")], seen.stderr
