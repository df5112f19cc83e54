"""Test runs with micro-batches and steps of tokens: the same loss, resumed, and when memory runs out."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from distillm_cli.training.trainer import Trainer
from tests.e2e.test_mixture_runs import assert_same_run, interrupt_at, lines

WORDS = [
    "distill", "--recipe", "questions", "--student", "random:1x32", "--batch-size", "8", "--set", "data.size=60",
    "--set", "data.valid_limit=6", "--set", "rollout.max_new_tokens=4", "--set", "eval.report_rows=0", "--json",
    "--set", "train.threads=1", "--set", "train.log_steps=1", "--set", "student.dropout=0",
]  # fmt: skip


def test_budget_changes_no_loss(cli):
    for name, budget in (("rows", ()), ("tokens", ("--set", "train.tokens_per_batch=60"))):
        code, _, err = cli(*WORDS, *budget, "--method", "kd", "--steps", "4", "--output", name)
        assert code == 0, err
    for one, other in zip(lines("rows"), lines("tokens"), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert other[key] == (pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value), key
    weights = [load_file(f"{name}/model.safetensors") for name in ("rows", "tokens")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4)


def test_steps_of_tokens_resume_to_the_same_bits(cli, monkeypatch):
    budget = ["--set", "train.tokens_per_batch=90", "--set", "train.tokens_per_step=200"]
    argv = [*WORDS, *budget, "--method", "distillm", "--set", "schedule.phi=0.6", "--set", "schedule.warm_up=none"]
    code, result, err = cli(*argv, "--steps", "8", "--output", "full")
    assert code == 0, err
    assert result["rollout_steps"]
    with monkeypatch.context() as patched:
        interrupt_at(5, patched)
        assert cli(*argv, "--steps", "8", "--output", "resumed")[0] == 143
    code, _, err = cli(*argv, "--steps", "8", "--output", "resumed", "--resume")
    assert code == 0, err
    assert_same_run("full", "resumed")
    code, plan, err = cli("plan", *argv[1:], "--steps", "8")
    assert code == 0, err
    assert plan["tokens_per_step"] == 200


def test_budget_is_halved_when_memory_runs_out(cli, monkeypatch):
    forward_backward = Trainer._forward_backward
    seen = []

    def limited(self, batches, *args):
        size = sum(batch.ids_BT.numel() for batch in batches)
        if size > 50 and any(batch.size > 1 for batch in batches):
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen.append(size)
        return forward_backward(self, batches, *args)

    monkeypatch.setattr(Trainer, "_forward_backward", limited)
    code, _, err = cli(
        *WORDS, "--set", "train.tokens_per_batch=120", "--method", "kd", "--steps", "2", "--output", "out"
    )
    assert code == 0, err
    assert "out of memory with micro-batches of 120 tokens: continuing with 60, same batches" in " ".join(err.split())
    assert max(seen) <= 60
