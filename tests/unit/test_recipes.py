"""Every shipped recipe is valid, says how to run it, and means what its comment says."""

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


def test_the_shipped_recipes():
    tasks = {"samsum-t5", "xsum-t5", "wmt14-t5", "iwslt-mt5", "gsm8k"}
    assert set(shipped()) - PIPELINES == tasks | {
        "quickstart", "quickstart-teacher", "dolly-gpt2", "dolly-opt", "dolly-openllama", "g2p", "g2p-teacher",
    }  # fmt: skip
    assert {
        "quickstart-pipeline", "dolly-gpt2-pipeline", "dolly-opt-pipeline", "dolly-openllama-pipeline",
        "qwen3-pipeline", "llama-3.2-pipeline",
    } <= PIPELINES  # fmt: skip
    assert {path.parent for path in shipped().values()} == {ROOT / "recipes"}


@pytest.mark.parametrize("name", shipped())
def test_a_recipe_opens_with_the_command_that_runs_it(name, tmp_path):
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
def test_the_commands_in_a_pipelines_comments_name_its_stages(name):
    pipeline = load_pipeline(name)
    for line in shipped()[name].read_text(encoding="utf-8").splitlines():
        _, found, rest = line.partition("--only ")
        if line.startswith("#") and found:
            chosen = rest.split()[0].split(",")
            assert set(chosen) <= set(pipeline.names)
            read = {read for stage in chosen for read in pipeline[stage].depends_on}
            assert read <= set(chosen), "a line to type runs as it stands"
        for word in re.findall(r"--set (\S+=\d\S*)", line) if line.startswith("#") else ():
            load_pipeline(name, [word])


def test_the_pipelines_of_the_paper_have_the_papers_settings():
    """docs/methods.md#settings, size by size: divergence, learning rate, batch, epochs."""
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
def test_the_commands_in_a_recipes_comments_resolve(name):
    """`distillm sft --model … --lr …` lines in comments are documentation that must not rot."""
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
            flags=flags(verb, **{k[2:].replace("-", "_"): v for k, v in given.items()}),
        )


def test_dolly_gpt2_is_the_papers_setting():
    r = resolve(command="distill", recipe="dolly-gpt2").recipe
    assert (r.teacher.path, r.student.path, r.data.source, r.data.template) == ("gpt2-xl", "gpt2", "dolly", "alpaca")
    assert (r.objective.divergence, r.objective.alpha, r.objective.kd_weight) == ("skl", 0.1, 1.0)
    assert (r.schedule.kind, r.schedule.capacity, r.schedule.epsilon, r.schedule.levels) == ("adaptive", 1000, 0.1, 10)
    assert (r.train.lr, r.train.batch_size, r.train.epochs, r.train.weight_decay) == (5e-4, 8, 20, 1e-2)
    assert (r.train.clip, r.train.lr_schedule, r.train.min_lr) == (1.0, "cosine", 1e-7)
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
