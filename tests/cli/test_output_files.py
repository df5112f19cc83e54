"""Check the files of an output directory: the result, the header of the recipe, and the rows of the report."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import yaml

from distillm_cli import __version__
from distillm_cli.cli.app import main
from distillm_cli.training.checkpoint import read_checkpoint
from distillm_cli.utils import manifest
from tests.command_line import assert_error, call

ARGV = (
    *("sft", "--model", "random:1x32", "--tokenizer", "words", "--data", "rows.jsonl", "--steps", "2"),
    *("--batch-size", "4", "--max-length", "64", "--device", "cpu", "--dtype", "fp32"),
    *("--set", "eval.max_new_tokens=4", "--set", "eval.report_rows=2"),
)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """Change to a directory with rows. Return it."""
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"say {i}", "output": f"{i} is said"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_run_writes_result_recipe_header_and_report(workdir, capsys):
    code, printed, err = call(capsys, *ARGV, "--output", "out", "--json", "--keep", "0")
    assert code == 0, err
    assert json.loads((workdir / "out/result.json").read_text()) == printed
    assert "result.json" in manifest.recorded(workdir / "out")

    first = (workdir / "out/recipe.yaml").read_text().splitlines()[0]
    assert re.fullmatch(
        rf"# Written by distillm {re.escape(__version__)} on \S.*, \d{{4}}-\d\d-\d\d \d\d:\d\d UTC", first
    )

    report = json.loads((workdir / "out/eval/report/student-after.json").read_text())
    assert len(report["answers"]) == len(report["prompts"]) == len(report["references"]) == 2
    for prompt, (reference,) in zip(report["prompts"], report["references"], strict=True):
        number = re.search(r"say (\d+)", prompt)[1]
        assert reference == f"{number} is said"

    assert "Removed 1 checkpoint (" in err
    assert not (workdir / "out/checkpoints").exists()
    assert "model before, step 0" in err
    assert "student" not in err


def test_recipe_header_has_the_command_line(workdir, capsys, monkeypatch):
    argv = [*ARGV, "--output", "out", "--json", "--set", "data.template=plain"]
    monkeypatch.setattr("sys.argv", ["/usr/bin/distillm", *argv])
    assert main(argv) == 0
    lines = (workdir / "out/recipe.yaml").read_text().splitlines()
    assert lines[1] == f"# Command: distillm {' '.join(argv)}"
    assert yaml.safe_load((workdir / "out/recipe.yaml").read_text())["train"]["steps"] == 2
    assert "Kept 1 checkpoint (" in capsys.readouterr().err


def test_foreign_result_file_is_not_overwritten(workdir, capsys):
    (workdir / "out").mkdir()
    (workdir / "out/result.json").write_text("mine")
    outcome = call(capsys, *ARGV, "--output", "out", "--json", "--overwrite")
    assert_error(outcome, "usage.output_exists", "out/result.json")
    assert (workdir / "out/result.json").read_text() == "mine"


def test_older_best_checkpoint_keeps_weights_only(workdir, capsys):
    argv = [*ARGV, "--output", "out", "--json", "--set", "train.save_steps=1", "--set", "train.eval_steps=1"]
    # The first step is the best one: the learning rate is far too high.
    argv += ["--steps", "3", "--lr", "5", "--set", "train.warmup=0", "--set", "train.select=valid_loss"]
    code, result, err = call(capsys, *argv)
    assert (code, result["best_step"]) == (0, 1), err
    best, newest = sorted((workdir / "out/checkpoints").iterdir())
    assert (best.name, newest.name) == ("step-000001", "step-000003")
    assert (newest / "training.safetensors").exists()
    assert not (best / "training.safetensors").exists()
    assert read_checkpoint(best).tensors == {}

    shutil.rmtree(newest)
    assert_error(call(capsys, *argv, "--resume"), "checkpoint.weights_only", "step-000001")
