"""Test runs on a CUDA device against the same runs on the CPU. Skipped without a GPU."""

import os

import pytest
import torch
from safetensors.torch import load_file

from distillm_cli.config.methods import METHODS
from tests.command_line import call

# DISTILLM_TEST_DEVICE=cpu runs this file without a GPU.
DEVICE = os.environ.get("DISTILLM_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FIELDS = (
    "data.size=60", "data.template=plain", "data.valid_limit=4", "eval.report_rows=0", "train.eval_steps=2",
    "train.save_steps=2", "train.batch_size=4", "rollout.max_new_tokens=4", "eval.max_new_tokens=4", "student.dtype=fp32",
    "teacher.dtype=fp32",
)  # fmt: skip


def run(capsys, method, device, output, *more):
    fields = [word for field in FIELDS for word in ("--set", field)]
    argv = ("--teacher", "builtin", "--student", "random:1x32", "--data", "builtin", "--steps", "4", "--device", device)
    code, result, err = call(capsys, "distill", "--method", method, *argv, *fields, "--output", output, "--json", *more)
    assert code == 0, err
    return result


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"sft"}))
def test_method_draws_same_steps_as_on_cpu(method, capsys, tmp_path):
    here = run(capsys, method, "cpu", tmp_path / "cpu")
    there = run(capsys, method, DEVICE, tmp_path / "device")
    counts = ("steps", "dataset_steps", "rollout_steps", "replay_steps", "teacher_steps")
    assert [there[name] for name in counts] == [here[name] for name in counts]
    assert there["valid_loss"] == pytest.approx(here["valid_loss"], rel=0.02)


def test_losses_on_rows_equal_those_on_cpu(capsys, tmp_path):
    here = run(capsys, "kd", "cpu", tmp_path / "cpu")
    there = run(capsys, "kd", DEVICE, tmp_path / "device")
    assert there["train_loss"] == pytest.approx(here["train_loss"], rel=1e-3)
    assert there["valid_loss"] == pytest.approx(here["valid_loss"], rel=1e-3)


def test_resume_on_device_matches_uninterrupted_run(capsys, tmp_path):
    constant = ("--set", "train.lr_schedule=constant")
    run(capsys, "distillm", DEVICE, tmp_path / "whole", *constant)
    run(capsys, "distillm", DEVICE, tmp_path / "parts", *constant, "--steps", "2")
    run(capsys, "distillm", DEVICE, tmp_path / "parts", *constant, "--resume")
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-3, atol=1e-4)
