"""Test MiniLLM on the built-in pair, interrupted within a round, and with invalid settings."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distillm_cli.training.trainer import Trainer
from tests import tiny
from tests.command_line import assert_error
from tests.marks import long

SHORT = [
    "--recipe", "questions", "--method", "minillm", "--student", "random:1x32", "--steps", "6", "--batch-size", "4",
    "--set", "data.size=40", "--set", "eval.report_rows=4", "--set", "rollout.bulk=2", "--set", "schedule.inner_epochs=2",
    "--set", "rollout.max_new_tokens=8", "--set", "data.valid_limit=8",
    "--set", "train.log_steps=1", "--set", "train.threads=1", "--json",
]  # fmt: skip


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_quickstart_pair_in_rounds(cli, tmp_path):
    code, result, err = cli("distill", *SHORT, "--output", "run")
    assert code == 0, err
    assert (result["steps"], result["rollout_steps"], result["replay_steps"]) == (6, 4, 2)
    assert result["sampled_sequences"] == 16
    assert set(result["report"]) == {"student_before", "student_after", "teacher"}
    steps = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert [line["source"] for line in steps] == ["rollout", "rollout", "replay", "replay", "rollout", "rollout"]
    assert all(line["reward"] < 0 for line in steps)
    assert "reward -" in err
    assert "Of 6 steps 4 (67%) used fresh rollouts and 2 (33%) replayed rollouts." in err
    assert "Each step also used" in err
    assert not result["teacher_cache"]["model_left"], "the teacher is needed for sampling"
    AutoModelForCausalLM.from_pretrained("run")


@pytest.mark.parametrize(("family", "cache"), [("llama", "memory"), long("llama", "disk"), long("t5", "memory")])
def test_resume_within_a_round_matches_uninterrupted_run(cli, monkeypatch, tmp_path, family, cache):
    """Check an interruption in the second epoch, where the cached teacher states of the rows are read again.

    The states must be computed in the same batch composition as before, because rounding depends on it.
    """
    teacher = "builtin" if family == "llama" else tiny.save(tmp_path / "teacher", family)
    argv = ["distill", *SHORT, "--steps", "10", "--teacher", teacher]
    argv += ["--set", "eval.report_rows=0", "--set", "data.size=16"]
    argv += ["--teacher-cache", cache, "--set", "teacher.cache_dir=states"]
    code, full, err = cli(*argv, "--output", "full")
    assert code == 0, err
    used = full["teacher_cache"]
    assert (used["mode"], used["rows"], used["model_left"]) == (cache, 16, False)
    assert used["bytes"] > 0
    begin_step = Trainer._begin_step

    def interrupt(self, *args):
        if self.state.step == 6:
            signal.raise_signal(signal.SIGINT)
        return begin_step(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_begin_step", interrupt)
        assert cli(*argv, "--output", "resumed")[0] == 130
    code, result, err = cli(*argv, "--output", "resumed", "--resume")
    assert (code, result["steps"]) == (0, 10), err
    weights = [load_file(f"{directory}/model.safetensors") for directory in ("full", "resumed")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_only_outputs_are_cached_within_one_epoch(cli, monkeypatch):
    pools, cached = [], []
    begin_step = Trainer._begin_step

    def record(self, *args):
        pools.append(self.pool)
        cached.append(sum(s.teacher_hidden_ND is not None for s in self.pool.replay.rollouts))
        return begin_step(self, *args)

    monkeypatch.setattr(Trainer, "_begin_step", record)
    code, result, err = cli("distill", *SHORT, "--output", "run")  # 6 steps of an epoch of 10
    assert (code, result["teacher_cache"]["mode"], result["teacher_cache"]["rows"]) == (0, "memory", 0), err
    assert 0 < max(cached) <= 2 * 4, "the outputs of a round, and no rows"
    assert pools[0].waiting == {}


def test_plan_counts_teacher_sampling_and_cached_states(cli):
    _, plan, err = cli("plan", *SHORT)
    assert "cached in memory" in err, "each output of a round is trained on twice"
    rounds = SHORT.index("schedule.inner_epochs=2")  # not a field of gkd
    _, gkd_plan, _ = cli("plan", *SHORT[: rounds - 1], *SHORT[rounds + 1 :], "--method", "gkd")
    assert plan["memory"]["rollout_cache"] == gkd_plan["memory"]["rollout_cache"]
    assert plan["memory"]["teacher_rollout_cache"] > 4 * plan["memory"]["rollout_cache"]
    assert (plan["sequences_per_step"], gkd_plan["sequences_per_step"]) == (8, 4)
    outputs = 2 * 4 * 8  # batches, rows, tokens
    assert plan["teacher_cache"]["rollout_bytes"] == outputs * 128 * 4
    assert plan["teacher_cache"]["bytes"] == 0, "6 steps of an epoch of 10"
    _, longer_plan, _ = cli("plan", *SHORT, "--steps", "12")
    assert longer_plan["teacher_cache"]["bytes"] == longer_plan["data"]["response_tokens"] * 128 * 4
    assert longer_plan["memory"]["teacher_states"] == longer_plan["teacher_cache"]["bytes"]
    assert longer_plan["step_flops"]["replay"] < plan["step_flops"]["replay"], (
        "the states of the rows are read from the cache"
    )


@pytest.mark.parametrize(
    ("method", "setting", "code", "mention"),
    [
        ("minillm", "schedule.kind=off", "recipe.fields_conflict", "objective.policy_gradient"),
        ("minillm", "schedule.fresh=buffer", "recipe.unused_field", "schedule.fresh = buffer"),
        ("gkd", "objective.row_weight=0.5", "recipe.fields_conflict", "objective.row_weight"),
        ("minillm", "objective.ratio_clip=0", "recipe.invalid_value", "objective.ratio_clip"),
        ("minillm", "rollout.teacher_mix=1", "recipe.invalid_value", "rollout.teacher_mix"),
        ("minillm", "schedule.inner_epochs=0", "recipe.invalid_value", "schedule.inner_epochs"),
    ],
)
def test_invalid_setting_is_an_error(cli, method, setting, code, mention):
    outcome = cli("distill", *SHORT, "--method", method, "--set", setting, "--output", "run")
    assert_error(outcome, code, mention)
