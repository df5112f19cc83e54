"""Test a third-party package that adds a divergence, a metric, a method and a data set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from tests.marks import long

ROOT = Path(__file__).resolve().parents[2]

DIVERGENCE = '''
"""Squared differences of probabilities."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from distillm_cli.config.fields import DivergenceConfig
from distillm_cli.losses.divergences import Divergence, register_divergence


class SquaredConfig(DivergenceConfig):
    """The parameter of ``squared``."""

    squared_scale: Annotated[float, Field(gt=0, le=10)] = Field(1.0, description="Factor of the squared differences.")


@register_divergence("squared", config=SquaredConfig)
@dataclass(frozen=True)
class Squared(Divergence):
    """Compute scale · Σ (p − q)²."""

    squared_scale: float

    def between(self, p, q, with_grad=True):
        gap_NV = q.prob_NV - p.prob_NV
        h_NV = 2 * self.squared_scale * gap_NV * q.prob_NV if with_grad else None
        return self.squared_scale * gap_NV.square().sum(-1), h_NV
'''
METRIC = '''
"""The length of a response."""

from distillm_cli.evaluation.metrics import RatioMetric, register_metric


@register_metric("characters", label="characters", higher_is_better=False)
class Characters(RatioMetric):
    """Count characters."""

    def count(self, prediction, references):
        return len(prediction) / 100, 1
'''
METHOD = '''
"""A preset."""

from distillm_cli.config.methods import Method, register_method

register_method(
    Method(
        name="squares",
        verb="distill",
        summary="squared differences on the data set's responses",
        paper="unpublished",
        preset={"objective.divergence": "squared", "objective.squared_scale": 3.0, "schedule.kind": "off"},
    )
)
'''
DATASET = '''
"""Rows of the same letters."""

from distillm_cli.data.known import GeneratedDataset, register_dataset


def read(split):
    words = [chr(97 + i % 26) + chr(97 + i // 26) for i in range(40 if split == "train" else 6)]
    return ({"instruction": "repeat", "input": word, "output": word} for word in words)


register_dataset("letters", GeneratedDataset(read, splits=("train", "test")))
'''
PARTS = {"divergences": DIVERGENCE, "metrics": METRIC, "methods": METHOD, "datasets": DATASET}


def install(site: Path, files: dict[str, str], entry_points: dict[str, str]) -> Path:
    """Write the files of an installed package. files: module → source. entry_points: group → module."""
    for module, source in files.items():
        (site / f"{module}.py").write_text(source, encoding="utf-8")
    info = site / "distillm_squares-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: distillm-squares\nVersion: 1.0\n")
    lines = [f"[distillm.{group}]\nsquares = {module}\n" for group, module in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return site


@pytest.fixture(scope="module", params=["four files", long("one file")])
def package(request, tmp_path_factory) -> Path:
    site = tmp_path_factory.mktemp("site")
    if request.param == "one file":
        return install(site, {"squares": "\n".join(PARTS.values())}, dict.fromkeys(PARTS, "squares"))
    return install(
        site, {f"squares_{group}": text for group, text in PARTS.items()}, {g: f"squares_{g}" for g in PARTS}
    )


@pytest.fixture
def cli(package, tmp_path):
    """Return a function that runs a command line with the package installed: (exit code, stdout, stderr)."""
    return lambda *argv: run(package, tmp_path, *argv)


def run(package: Path, workdir: Path, *argv: str) -> tuple[int, str, str]:
    path = os.pathsep.join([str(package), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": path, "COLUMNS": "160", "DISTILLM_CACHE": str(workdir / "cache")}
    env.pop("DISTILLM_DATA", None)
    command = [sys.executable, "-m", "distillm_cli", *argv]
    process = subprocess.run(command, env=env, cwd=workdir, capture_output=True, text=True, timeout=300)
    return process.returncode, process.stdout, process.stderr


def test_help_and_lists_have_plugin_names(cli):
    words = " ".join(cli("distill", "--help")[1].replace("│", " ").split())
    assert "atkd, squared." in words
    assert "disco, squares." in words
    assert "gsm8k, pronounce, letters, builtin." in words
    words = " ".join(cli("eval", "--help")[1].replace("│", " ").split())
    assert "length, characters." in words
    code, out, err = cli("methods")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].split("\t")[:3] == ["squares", "unpublished", "squared scale=3"]
    shown = cli("methods", "show", "squares")[1]
    assert "objective.squared_scale = 3.0    (a number > 0 and ≤ 10)" in shown
    assert "Factor of the squared differences." in shown


def test_recipes_are_checked_against_plugin_schema(cli, tmp_path):
    good = "method: squares\nobjective: {squared_scale: 2.5}\ndata: {source: letters}\ntrain: {select: characters}\n"
    (tmp_path / "good.yaml").write_text(good)
    (tmp_path / "bad.yaml").write_text(good.replace("2.5", "25"))
    assert cli("recipes", "validate", "good.yaml") == (0, "good.yaml\tok\n", "")
    code, _, err = cli("recipes", "validate", "bad.yaml")
    assert (code, err.count("error: bad.yaml:2: objective.squared_scale = 25")) == (2, 1)
    schema = jsonschema.Draft202012Validator(json.loads(cli("schema")[1]))
    recipe = {"method": "squares", "objective": {"squared_scale": 2.5}, "train": {"select": "characters"}}
    assert schema.is_valid(recipe)
    assert not schema.is_valid(recipe | {"objective": {"squared_scale": 25}})
    assert not schema.is_valid(recipe | {"method": "cubes"})


@pytest.mark.long
@pytest.mark.parametrize("package", ["four files"], indirect=True)
def test_plugins_are_used_in_training_and_eval(cli, tmp_path):
    short = ["--teacher", "builtin", "--student", "random:1x32", "--steps", "4", "--data", "letters", "--json"]
    short += ["--set", "data.template=plain"]
    short += ["--set", "eval.report_rows=3", "--set", "rollout.max_new_tokens=4", "--set", "eval.max_new_tokens=4"]
    selection = [f"--set={field}" for field in ("train.select=characters", "eval.metrics=[characters]")]
    selection += ["--set", "train.eval_steps=2"]
    code, out, err = cli("distill", *short, *selection, "--method", "squares", "--output", "a")
    assert code == 0, err
    result = json.loads(out)
    recipe = (tmp_path / "a" / "recipe.yaml").read_text()
    assert "divergence: squared" in recipe
    assert "squared_scale: 3.0" in recipe
    assert 0 < result["report"]["student_after"]["characters"] <= 4

    code, out, err = cli(
        "distill", *short, "--divergence", "squared", "--set", "objective.squared_scale=0.5", "--output", "b"
    )
    assert code == 0, err
    assert "squared_scale: 0.5" in (tmp_path / "b" / "recipe.yaml").read_text()

    code, out, err = cli(
        "eval", "a", "--suite", "letters", "--metric", "characters", "--greedy", "--max-new-tokens", "4", "--json"
    )
    assert code == 0, err
    suite = json.loads(out)["suites"]["letters"]
    assert suite["rows"] == 6
    lines = (tmp_path / "a" / "eval" / "letters").rglob("predictions-greedy.jsonl")
    predictions = [json.loads(line) for line in next(lines).read_text().splitlines()]
    assert suite["characters"]["mean"] == pytest.approx(sum(len(row["output"]) for row in predictions) / 6)


def test_broken_package_is_a_warning(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    install(site, {"broken": "import nothing_of_this_name"}, {"metrics": "broken"})
    code, out, err = run(site, tmp_path, "recipes", "validate", "quickstart")
    assert (code, out) == (0, "quickstart\tok\n")
    assert err == (
        "warning: plug-in squares of distillm-squares (distillm.metrics) cannot be loaded; ModuleNotFoundError: No module "
        "named 'nothing_of_this_name'; fix or uninstall distillm-squares\n"
    )


def test_duplicate_name_is_a_warning(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    install(site, {"second": METRIC.replace('"characters"', '"bleu"', 1)}, {"metrics": "second"})
    code, _, err = run(site, tmp_path, "recipes", "validate", "quickstart")
    assert code == 0
    assert "metrics: bleu is registered twice; by distillm_cli.evaluation.metrics and by second" in err
