"""Test that every shipped recipe is valid, names its command, and has the settings it documents."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from distillm_cli.config.load import resolve, shipped, to_yaml
from distillm_cli.config.methods import METHODS
from distillm_cli.config.pipeline_recipe import is_pipeline, load_pipeline
from tests.command_line import flags

ROOT = Path(__file__).resolve().parents[2]


PIPELINES = {name for name in shipped() if is_pipeline(name)}


def test_set_of_shipped_recipes():
    tasks = {"samsum-t5", "xsum-t5", "wmt14-t5", "iwslt-mt5", "gsm8k"}
    assert set(shipped()) - PIPELINES == tasks | {
        "quickstart", "questions", "quickstart-teacher", "dolly-gpt2", "dolly-opt", "dolly-openllama", "g2p", "g2p-teacher",
    }  # fmt: skip
    assert {
        "quickstart-pipeline", "dolly-gpt2-pipeline", "dolly-opt-pipeline", "dolly-openllama-pipeline",
        "qwen3-pipeline", "llama-3.2-pipeline",
    } <= PIPELINES  # fmt: skip
    assert {path.parent for path in shipped().values()} == {ROOT / "recipes"}


@pytest.mark.parametrize("name", shipped())
def test_recipe_starts_with_its_command(name, tmp_path):
    command, summary = shipped()[name].read_text(encoding="utf-8").splitlines()[:2]
    words = shlex.split(command.removeprefix("# "))
    assert command.startswith("# distillm ")
    assert summary.startswith("# ")
    assert summary.endswith(".")
    if name in PIPELINES:
        assert words[1:] == ["run", name]
        assert load_pipeline(name).name == name
        return
    assert words[words.index("--recipe") + 1] == name

    resolved = resolve(command=words[1], recipe=name)
    assert METHODS[resolved.recipe.method].verb == words[1]
    assert resolved.name == name
    (tmp_path / "recipe.yaml").write_text(to_yaml(resolved))
    assert resolve(command=words[1], recipe=tmp_path / "recipe.yaml").recipe == resolved.recipe


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_commands_in_pipeline_comments_name_its_stages(name):
    pipeline = load_pipeline(name)
    for line in shipped()[name].read_text(encoding="utf-8").splitlines():
        _, found, rest = line.partition("--only ")
        if line.startswith("#") and found:
            stages = rest.split()[0].split(",")
            assert set(stages) <= set(pipeline.names)
            inputs = {inputs for stage in stages for inputs in pipeline[stage].depends_on}
            assert inputs <= set(stages), "the commented command can be run as is"
        for word in re.findall(r"--set (\S+=\d\S*)", line) if line.startswith("#") else ():
            load_pipeline(name, [word])


def test_paper_pipelines_have_the_papers_settings():
    """Check divergence, learning rate, batch size and epochs of each size against docs/methods.md#settings."""
    settings = {
        "dolly-gpt2-pipeline": {
            "120m": ("gpt2", "skl", 5e-4, 8, 20),
            "340m": ("gpt2-medium", "srkl", 5e-4, 8, 20),
            "760m": ("gpt2-large", "srkl", 1e-4, 4, 10),
        },
        "dolly-opt-pipeline": {
            "125m": ("facebook/opt-125m", "srkl", 5e-5, 8, 20),
            "350m": ("facebook/opt-350m", "srkl", 5e-5, 8, 20),
            "1300m": ("facebook/opt-1.3b", "srkl", 5e-5, 8, 10),
        },
    }
    teachers = {
        "dolly-gpt2-pipeline": ("gpt2-xl", 5e-5, 2, 10),
        "dolly-opt-pipeline": ("facebook/opt-2.7b", 5e-5, 4, 10),
    }
    for name, sizes in settings.items():
        pipeline = load_pipeline(name)
        r = pipeline["teacher"].resolved.recipe
        assert (r.student.path, r.train.lr, r.train.batch_size, r.train.epochs) == teachers[name]
        for size, (model, divergence, lr, batch, epochs) in sizes.items():
            start, r = (pipeline[f"{part}-{size}"].resolved.recipe for part in ("student", "distill"))
            assert (start.student.path, start.train.epochs, start.train.select) == (model, 3, "valid_loss")
            assert (start.train.lr, start.train.batch_size) == (lr, batch)
            found = (r.objective.divergence, r.train.lr, r.train.batch_size, r.train.epochs)
            assert found == (divergence, lr, batch, epochs)
            assert (r.objective.alpha, r.schedule.kind, r.train.select, r.train.seed) == (
                0.1,
                "adaptive",
                "rouge_l",
                10,
            )
            assert pipeline[f"distill-{size}"].depends_on == ("teacher", f"student-{size}")
            scored = pipeline[f"eval-{size}"].resolved.recipe.eval
            assert (len(scored.suites), scored.seeds, scored.no_repeat_ngram_size) == (5, (10, 20, 30, 40, 50), 6)


@pytest.mark.parametrize("name", shipped())
def test_commands_in_recipe_comments_resolve(name):
    """Check the `distillm sft --model … --lr …` lines in comments."""
    for line in shipped()[name].read_text(encoding="utf-8").splitlines():
        _, found, rest = line.partition("distillm ")
        if not (line.startswith("#") and found and rest.startswith(("sft --", "distill --"))):
            continue
        verb, *words = shlex.split(rest)
        options = dict(zip(words[::2], words[1::2], strict=True))
        recipe = options.pop("--recipe", None)
        options.pop("--output", None)
        sets = [options.pop("--set")] if "--set" in options else None
        resolve(
            command=verb,
            recipe=recipe,
            sets=sets,
            flags=flags(verb, **{k[2:].replace("-", "_"): v for k, v in options.items()}),
        )


def test_dolly_gpt2_has_the_papers_settings():
    r = resolve(command="distill", recipe="dolly-gpt2").recipe
    assert (r.teacher.path, r.student.path, r.data.source, r.data.template) == ("gpt2-xl", "gpt2", "dolly", "alpaca")
    assert (r.objective.divergence, r.objective.alpha, r.objective.kd_weight) == ("skl", 0.1, 1.0)
    assert (r.schedule.kind, r.schedule.capacity, r.schedule.epsilon, r.schedule.levels) == ("adaptive", 1000, 0.1, 10)
    assert (r.train.lr, r.train.batch_size, r.train.epochs, r.train.weight_decay) == (5e-4, 8, 20, 1e-2)
    assert (r.train.clip, r.train.lr_schedule, r.train.min_lr) == (1.0, "cosine", 1e-7)
    assert (r.train.seed, r.train.select, r.data.max_length, r.data.max_prompt_length) == (10, "rouge_l", 512, 256)
    assert (r.eval.seeds, r.eval.no_repeat_ngram_size, r.eval.max_new_tokens) == ((10, 20, 30, 40, 50), 6, 256)


def test_dolly_opt_has_the_papers_settings():
    r = resolve(command="distill", recipe="dolly-opt").recipe
    assert (r.teacher.path, r.student.path) == ("facebook/opt-2.7b", "facebook/opt-125m")
    assert (r.objective.divergence, r.train.lr, r.train.batch_size, r.train.epochs) == ("srkl", 5e-5, 8, 20)


def test_installed_package_finds_its_recipes(tmp_path):
    """Check the layout of a wheel, which has recipes/ at distillm_cli/_recipes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {
        "recipes": "distillm_cli/_recipes"
    }

    package = tmp_path / "distillm_cli"
    shutil.copytree(ROOT / "distillm_cli", package, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copytree(ROOT / "recipes", package / "_recipes")
    (tmp_path / "recipes").mkdir()  # another package's directory in site-packages
    (tmp_path / "recipes" / "other.yaml").touch()
    script = (
        "from distillm_cli.config.load import resolve, shipped; resolve(command='distill', recipe='quickstart');"
        "print(*shipped(), shipped()['g2p'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [*shipped(), str(package / "_recipes" / "g2p.yaml")], done.stderr
