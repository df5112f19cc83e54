"""Test runs on stored rows: the same bits as without a store, also after a resume, and in processes that start together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distillm_cli.cli.app import main
from distillm_cli.data.builtin import rows as builtin_rows
from tests.command_line import assert_error, untimed

RUN = [
    "distill", "--teacher", "builtin", "--student", "random:1x32", "--data", "rows.jsonl", "--max-length", "64",
    "--dtype", "fp32", "--device", "cpu", "--batch-size", "4", "--steps", "10", "--json",
    "--set", "data.template=plain", "--set", "data.valid_limit=5", "--set", "eval.report_rows=2",
    "--set", "train.threads=1", "--set", "train.eval_steps=5", "--set", "train.save_steps=4", "--set", "train.keep=9",
    "--set", "schedule.kind=adaptive", "--set", "schedule.phi=0.7", "--set", "schedule.capacity=16",
    "--set", "rollout.max_new_tokens=6", "--set", "eval.max_new_tokens=6", "--set", "rollout.bulk=2",
    "--set", "schedule.warm_up=none",
]  # fmt: skip


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    """Change to a directory with rows. Return a function that distills: more options → (exit code, JSON object, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILLM_CACHE", str(tmp_path / "cache"))
    write_rows(60)

    def call(*more):
        capsys.readouterr()
        code = main([str(word) for word in (*RUN, *more)])
        out, err = capsys.readouterr()
        return code, json.loads(out), err

    return call


def write_rows(count):
    records = [
        {"instruction": question, "output": answers[0]} for question, answers, _ in builtin_rows("train", count, 1)
    ]
    Path("rows.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))


def bits(output):
    """Return the weights and the figures of a run, without its times."""
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return (Path(output) / "model.safetensors").read_bytes(), [untimed(line) for line in lines]


def test_stored_rows_give_the_same_run(cli):
    for output, store in (("off", "off"), ("cold", "on"), ("warm", "on")):
        code, result, err = cli("--output", output, "--set", f"data.store={store}")
        assert code == 0, err
        assert result["replay_steps"] > 0
        assert ("stored the token ids" in err) == (output == "cold")
    assert bits("off") == bits("cold") == bits("warm")
    stages = ["--set", "student.sft_epochs=0.5", "--set", "student.ptp=0.5"]
    for output, store in (("stages-off", "off"), ("stages-on", "on")):
        code, _, err = cli("--output", output, "--set", f"data.store={store}", *stages)
        assert code == 0, err
    assert bits("stages-off") == bits("stages-on")


@pytest.mark.long
def test_resume_on_stored_rows_is_exact(cli, tmp_path):
    for output in ("whole", "resumed"):
        code, _, err = cli("--output", output, "--set", "data.store=on")
        assert code == 0, err
    for step in ("step-000010", "step-000008"):
        (tmp_path / "resumed" / "checkpoints" / step).rename(tmp_path / step)
    code, result, err = cli("--output", "resumed", "--set", "data.store=on", "--resume")
    assert (code, result["steps"]) == (0, 10), err
    assert bits("resumed")[0] == bits("whole")[0]
    (tmp_path / "resumed" / "checkpoints" / "step-000010").rename(tmp_path / "moved")
    code, result, err = cli("--output", "resumed", "--resume", "--set", "data.store=off")
    assert code == 0, err
    assert bits("resumed")[0] == bits("whole")[0]

    (tmp_path / "resumed" / "checkpoints" / "step-000010").rename(tmp_path / "again")
    write_rows(59)
    assert_error(
        cli("--output", "resumed", "--set", "data.store=on", "--resume"), "checkpoint.changed", "training rows"
    )


@pytest.mark.long
def test_processes_that_start_together_share_one_store(cli, tmp_path):
    command = [sys.executable, "-m", "distillm_cli", *RUN, "--set", "data.store=on", "--steps", "1"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*command, "--output", f"p{i}"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for i in range(2)
    ]
    errors = [process.communicate()[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert bits("p0") == bits("p1")
    stores = sorted(path.name.partition("-")[0] for path in (tmp_path / "cache" / "rows").glob("[rt]*"))
    assert stores == ["rows", "tokens"]
    assert sum("stored the token ids" in text for text in errors) == 1
