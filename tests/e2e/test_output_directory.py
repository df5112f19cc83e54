"""Test ``--output``: a run never deletes its inputs, and two runs do not share a directory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from distillm_cli.cli.app import main
from distillm_cli.utils import manifest
from tests.command_line import assert_error, call

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--data", "rows.jsonl", "--steps", "1", "--dtype", "fp32", "--device", "cpu", "--quiet", "--json",
    "--set", "data.template=plain", "--set", "eval.report_rows=0", "--set", "train.threads=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Make a finished run in ``run``, with an sft stage, scores, and files of the user. Return the parent directory."""
    workdir, previous = tmp_path_factory.mktemp("home"), Path.cwd()
    rows = "".join(json.dumps({"prompt": f"say {i}", "completion": f"it is {i}"}) + "\n" for i in range(30))
    (workdir / "rows.jsonl").write_text(rows, encoding="utf-8")
    os.chdir(workdir)
    try:
        argv = ["sft", "--model", "random:1x32", "--tokenizer", "chars", "--output", "teacher", *TINY]
        assert main(argv) == 0
        pair = ["--teacher", "teacher", "--student", "random:1x32", "--set", "student.sft_epochs=0.3"]
        assert main(["distill", *pair, "--output", "run", *TINY]) == 0
    finally:
        os.chdir(previous)
    (workdir / "run/eval/mine/t1").mkdir(parents=True)
    for file in ("run/eval/mine/t1/predictions-seed1.jsonl", "run/rows/train.jsonl"):
        (workdir / file).parent.mkdir(exist_ok=True)
        (workdir / file).write_text(rows, encoding="utf-8")
    # As `distillm eval` does.
    manifest.record(workdir / "run/eval/mine/t1", ["results.json", "predictions-seed1.jsonl"])
    (workdir / "run/eval/notes.txt").write_text("mine", encoding="utf-8")
    (workdir / "link").symlink_to("run")
    (workdir / "adapter").mkdir()
    (workdir / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "run"}', encoding="utf-8")
    (workdir / "mixed").mkdir()  # a directory of links, as in the hub cache
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (workdir / "mixed" / file).symlink_to(f"../run/{file}")
    return workdir


@pytest.fixture
def workdir(finished_run, tmp_path, monkeypatch):
    monkeypatch.delenv("DISTILLM_DATA", raising=False)
    shutil.copytree(finished_run, tmp_path / "home", symlinks=True)
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def contents(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


SEQKD = ("distill", "--teacher", "teacher", "--student", "teacher", "--method", "seqkd")
PREDICTIONS = "run/eval/mine/t1/predictions-seed1.jsonl"


@pytest.mark.parametrize(
    ("argv", "mention"),
    [
        (("sft", "--model", "run"), "--model run"),
        (("sft", "--model", "link"), "--model link"),
        (("sft", "--model", "mixed"), "--model mixed"),
        (("sft", "--model", "adapter"), "--model adapter, an adapter of run"),
        (("sft", "--model", "run/sft"), "--model run/sft"),
        (("sft", "--model", "run/checkpoints/step-000001"), "--model run/checkpoints/step-000001"),
        (("sft", "--model", "random:1x32", "--tokenizer", "run"), "--tokenizer run"),
        (("sft", "--model", "run/config.json", "--tokenizer", "teacher"), "--model run/config.json"),
        (("distill", "--teacher", "teacher", "--student", "run"), "--student run"),
        (("distill", "--teacher", "run", "--student", "teacher"), "--teacher run"),
        (("sft", "--model", "teacher", "--data", PREDICTIONS), f"--data {PREDICTIONS}"),
        (("sft", "--model", "teacher", "--set", f"data.valid={PREDICTIONS}"), f"data.valid = {PREDICTIONS}"),
        (("sft", "--recipe", "run/sft/recipe.yaml"), "--recipe run/sft/recipe.yaml"),
        (
            (*SEQKD, "--set", f"data.teacher_samples={PREDICTIONS}"),
            f"data.teacher_samples = {PREDICTIONS}",
        ),
    ],
)
@pytest.mark.parametrize("output", ["run", "link"])
def test_overwrite_never_deletes_inputs(workdir, capsys, argv, mention, output):
    before = contents(workdir)
    verb, *more = argv
    outcome = call(capsys, verb, *TINY, *more, "--output", output, "--overwrite")
    assert_error(outcome, "usage.output_is_input", output, mention)
    assert contents(workdir) == before


def test_overwrite_does_not_delete_files_of_the_user(workdir, capsys):
    before = contents(workdir / "run")
    argv = ("sft", "--model", "teacher", *TINY, "--data", "run/rows", "--output", "run", "--overwrite")
    code, result, err = call(capsys, *argv)
    assert (code, result["steps"]) == (0, 1), err
    after = contents(workdir / "run")
    assert {name for name in after if after[name] == before.get(name)} >= {"rows/train.jsonl", "eval/notes.txt"}
    assert not any(name.startswith(("sft/", "eval/mine")) for name in after)
    AutoModelForCausalLM.from_pretrained("run")


@pytest.mark.long
def test_only_one_of_two_runs_uses_the_directory(workdir):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "distillm_cli", "sft", "--model", "random:1x32", "--tokenizer", "chars", *TINY]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    runs = [subprocess.Popen([*argv, "--seed", seed, "--output", "same"], **pipes) for seed in ("1", "2")]
    outputs = [run.communicate(timeout=300) for run in runs]
    codes = [run.returncode for run in runs]
    assert sorted(codes) == [0, 2], outputs
    failure, result = (json.loads(outputs[codes.index(code)][0]) for code in (2, 0))
    # The output exists if the first run was finished when the second one started.
    assert failure["error"] in ("usage.output_in_use", "usage.output_exists")
    assert result["status"] == "ok"
    lines = (workdir / "same/recipe.yaml").read_text().splitlines()
    seed = [line for line in lines if line.startswith("  seed: ")][-1]
    assert seed.split()[1] == str(codes.index(0) + 1), "all files are from one run"
    AutoModelForCausalLM.from_pretrained("same")
    assert not [path.name for path in (workdir / "same").iterdir() if path.name.startswith(".")]
