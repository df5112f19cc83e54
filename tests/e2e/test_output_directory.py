"""``--output`` as it is typed: what a run reads is never cleared for it, and two runs do not share a directory."""

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
from tests.typed import call

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--data", "rows.jsonl", "--steps", "1", "--dtype", "fp32", "--device", "cpu", "--quiet", "--json",
    "--set", "data.template=plain", "--set", "eval.report_rows=0", "--set", "train.threads=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run, with a stage before it, scores, and rows of its owner's: ``run``."""
    home, here = tmp_path_factory.mktemp("home"), Path.cwd()
    rows = "".join(json.dumps({"prompt": f"say {i}", "completion": f"it is {i}"}) + "\n" for i in range(30))
    (home / "rows.jsonl").write_text(rows, encoding="utf-8")
    os.chdir(home)
    try:
        argv = ["sft", "--model", "random:1x32", "--tokenizer", "chars", "--output", "teacher", *TINY]
        assert main(argv) == 0
        pair = ["--teacher", "teacher", "--student", "random:1x32", "--set", "student.sft_epochs=0.3"]
        assert main(["distill", *pair, "--output", "run", *TINY]) == 0
    finally:
        os.chdir(here)
    (home / "run/eval/mine/t1").mkdir(parents=True)
    for place in ("run/eval/mine/t1/predictions-seed1.jsonl", "run/rows/train.jsonl"):
        (home / place).parent.mkdir(exist_ok=True)
        (home / place).write_text(rows, encoding="utf-8")
    manifest.record(home / "run/eval/mine/t1", ["results.json", "predictions-seed1.jsonl"])  # as `distillm eval` does
    (home / "run/eval/notes.txt").write_text("mine", encoding="utf-8")
    (home / "link").symlink_to("run")
    (home / "adapter").mkdir()
    (home / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "run"}', encoding="utf-8")
    (home / "mixed").mkdir()  # a directory of links, as the hub's cache is
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (home / "mixed" / file).symlink_to(f"../run/{file}")
    return home


@pytest.fixture
def home(made, tmp_path, monkeypatch):
    monkeypatch.delenv("DISTILLM_DATA", raising=False)
    shutil.copytree(made, tmp_path / "home", symlinks=True)
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def contents(place: Path) -> dict[str, str]:
    every = (path for path in place.rglob("*") if path.is_file())
    return {path.relative_to(place).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in every}


SEQKD = ("distill", "--teacher", "teacher", "--student", "teacher", "--method", "seqkd")
PREDICTIONS = "run/eval/mine/t1/predictions-seed1.jsonl"


@pytest.mark.parametrize(
    ("argv", "named"),
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
def test_what_a_run_reads_is_never_cleared_for_it(home, capsys, argv, named, output):
    before = contents(home)
    verb, *more = argv
    code, _, err = call(capsys, verb, *TINY, *more, "--output", output, "--overwrite")
    assert code == 2
    assert err == (
        f"error: starting over in {output} would remove an input of the run; {named}; choose another --output, "
        "or copy it elsewhere first\n"
    )
    assert contents(home) == before


def test_rows_and_notes_that_no_run_wrote_survive_in_the_directory(home, capsys):
    before = contents(home / "run")
    argv = ("sft", "--model", "teacher", *TINY, "--data", "run/rows", "--output", "run", "--overwrite")
    code, result, err = call(capsys, *argv)
    assert (code, result["steps"]) == (0, 1), err
    after = contents(home / "run")
    assert {name for name in after if after[name] == before.get(name)} >= {"rows/train.jsonl", "eval/notes.txt"}
    assert not any(name.startswith(("sft/", "eval/mine")) for name in after)
    AutoModelForCausalLM.from_pretrained("run")


def test_of_two_runs_at_once_one_has_the_directory(home):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "distillm_cli", "sft", "--model", "random:1x32", "--tokenizer", "chars", *TINY]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    both = [subprocess.Popen([*argv, "--seed", seed, "--output", "same"], **pipes) for seed in ("1", "2")]
    told = [run.communicate(timeout=300) for run in both]
    codes = [run.returncode for run in both]
    assert sorted(codes) == [0, 2], told
    (_, refused), (answer, _) = told[codes.index(2)], told[codes.index(0)]
    assert refused in (
        "error: another run is active in same; wait for it, or choose another --output\n",
        "error: output directory same is not empty; choose another --output, or use --resume to continue or --overwrite to "
        "start over\n",  # where the first was done before the second began
    )
    assert json.loads(answer)["status"] == "ok"
    (seed,) = [line for line in (home / "same/recipe.yaml").read_text().splitlines() if line.startswith("  seed: ")][
        -1:
    ]
    assert seed.split()[1] == str(codes.index(0) + 1), "the files are of one run"
    AutoModelForCausalLM.from_pretrained("same")
    assert not [path.name for path in (home / "same").iterdir() if path.name.startswith(".")]
