"""Test RobustKD from the command line: its stage, resume, outputs, and invalid settings."""

from __future__ import annotations

import hashlib
import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distillm_cli.cli.app import main
from distillm_cli.training.trainer import Trainer
from tests import tiny
from tests.command_line import assert_error
from tests.marks import long

SHORT = [
    "--recipe", "questions", "--method", "robustkd", "--student", "random:1x32", "--steps", "4", "--batch-size", "4",
    "--set", "data.size=60", "--set", "robustkd.blocks=2", "--set", "robustkd.mask_rows=0.4",
    "--set", "eval.report_rows=3", "--set", "rollout.max_new_tokens=6", "--set", "data.valid_limit=8",
    "--set", "eval.max_new_tokens=6", "--set", "train.save_steps=1", "--set", "train.log_steps=1",
    "--set", "train.threads=1", "--json",
]  # fmt: skip


def argv(tmp_path, family, *more):
    teacher = ["--teacher", "builtin" if family == "builtin" else tiny.save(tmp_path / "teacher", family)]
    return ["distill", *SHORT, *teacher, *more]


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def digests(directory):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in directory.iterdir() if f.is_file()}


def test_run_writes_masks_and_a_plain_student(cli, tmp_path):
    command = argv(tmp_path, "llama", "--set", "robustkd.mask_epochs=4")
    before = digests(tmp_path / "teacher")
    code, result, err = cli(*command, "--output", "run")
    assert code == 0, err
    assert digests(tmp_path / "teacher") == before
    assert "learning masks for the teacher's last 2 blocks first" in err
    assert "teacher with masks" in err
    assert result["teacher_cache"]["mode"] == "off"
    assert {"student_before", "student_after", "teacher"} == set(result["report"])
    masks = load_file("run/mask/mask.safetensors")
    assert {name: list(value.shape) for name, value in masks.items()} == {"mask": [2, 32], "feature": [2, 32]}
    in_stage = [line["loss"] for line in lines(tmp_path / "run" / "mask") if "loss" in line]
    assert sum(in_stage[-6:]) < sum(in_stage[:6])
    checkpoint = load_file("run/checkpoints/step-000004/training.safetensors")
    connector = checkpoint["extras.robustkd.connectors.1.weight"]
    assert connector.shape == (32, 32)
    assert torch.equal(checkpoint["extras.robustkd.mask_KD"], masks["mask"])
    model = AutoModelForCausalLM.from_pretrained("run")
    assert not any("connector" in name for name, _ in model.named_parameters())
    assert cli(*command, "--output", "run", "--overwrite")[0] == 0
    code, _, err = cli(*command, "--output", "off", "--set", "robustkd.blocks=0")
    assert_error((code, _, err), "recipe.unused_field", "robustkd.mask_rows")


def interrupted(cli, monkeypatch, command, at):
    """Run a command that is interrupted before a step: ``at`` counts the steps of the stage and of the run together."""
    begin_step = Trainer._begin_step
    seen = []

    def interrupt(self, *args):
        seen.append(self)
        if len(seen) == at:
            signal.raise_signal(signal.SIGINT)
        return begin_step(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_begin_step", interrupt)
        code, _, err = cli(*command)
    assert code == 130, err


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", ["--set", "schedule.kind=on", "--divergence", "skl", "--set", "student.sft_epochs=0.1"]),
        long("t5", ["--student", "random:t5:1x32"]),
    ],
)
def test_resume_in_both_stages_matches_uninterrupted_run(cli, monkeypatch, tmp_path, family, more):
    command = argv(tmp_path, family, *more)
    code, full, err = cli(*command, "--output", "full")
    assert code == 0, err
    sft_steps = len([line for line in lines(tmp_path / "full/sft") if "loss" in line]) if "sft" in " ".join(more) else 0
    for at in (sft_steps + 3, sft_steps + 6 + 3):  # of 6 steps of the masks and 4 of the run
        name = f"resumed-{at}"
        interrupted(cli, monkeypatch, [*command, "--output", name], at)
        assert (tmp_path / name / "checkpoints").exists() == (at > sft_steps + 6)
        code, result, err = cli("distill", "--resume", "--output", name, "--json")
        assert (code, result["steps"]) == (0, 4), err
        assert result["report"] == full["report"]
        for file in ("model.safetensors", "mask/mask.safetensors", "checkpoints/step-000004/training.safetensors"):
            expected, found = load_file(f"full/{file}"), load_file(f"{name}/{file}")
            assert all(torch.equal(value, found[key]) for key, value in expected.items()), file


def test_extras_off_leave_no_file(cli, tmp_path):
    plain = argv(tmp_path, "llama")
    keys = [key for key in plain if key.startswith("robustkd.")]
    command = [
        word for i, word in enumerate(plain) if word not in keys and (plain[i + 1 : i + 2] or [""])[0] not in keys
    ]
    code, _, err = cli(*command, "--method", "kd", "--output", "kd")
    assert code == 0, err
    assert not (tmp_path / "kd" / "mask").exists()
    assert not any("extras" in name for name in load_file("kd/checkpoints/step-000004/training.safetensors"))


@pytest.mark.parametrize(
    ("more", "code", "mentions"),
    [
        (["--teacher-cache", "disk"], "recipe.fields_conflict", ["teacher.cache disk", "robustkd.blocks"]),
        (["--teacher-cache", "memory"], "recipe.fields_conflict", ["--teacher-cache off"]),
        (["--set", "okd.rank=4"], "recipe.fields_conflict", ["okd.rank", "robustkd.blocks"]),
        (["--set", "teacher.quantize=4bit"], "recipe.fields_conflict", ["teacher.quantize 4bit"]),
        (["--set", "robustkd.blocks=9"], "usage.invalid_blocks", ["the teacher has 2 blocks"]),
    ],
)
def test_invalid_settings_are_one_line(cli, tmp_path, more, code, mentions):
    assert_error(cli(*argv(tmp_path, "llama", *more), "--output", "out"), code, *mentions)


def test_plan_names_the_stage(cli, tmp_path, capsys):
    command = argv(tmp_path, "llama")
    code, result, err = cli("plan", *command[1:])
    assert code == 0, err
    assert result["masks"] == {"share_of_rows": 0.4, "epochs": 1}
    assert "robustkd.blocks" in result["teacher_cache"]["why"]
    shown = [word for word in command if word != "--json"]
    assert main([*shown, "--dry-run", "--output", "dry"]) == 0
    assert main(["plan", *shown[1:]]) == 0
    assert "1 epoch on 40% of the rows" in capsys.readouterr().out
