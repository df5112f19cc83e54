"""MiniLLM as typed: on the quickstart pair, stopped inside a round, and told what it cannot do."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distillm_cli.training.trainer import Trainer
from tests import tiny

SHORT = [
    "--recipe", "quickstart", "--method", "minillm", "--student", "random:1x32", "--steps", "6", "--batch-size", "4",
    "--set", "data.size=40", "--set", "eval.report_rows=4", "--set", "rollout.bulk=2", "--set", "schedule.inner_epochs=2",
    "--set", "rollout.max_new_tokens=8", "--set", "data.valid_limit=8",
    "--set", "train.log_steps=1", "--set", "train.threads=1", "--json",
]  # fmt: skip


def lines(place):
    return [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]


def test_the_quickstart_pair_in_rounds(typed, tmp_path):
    code, result, err = typed("distill", *SHORT, "--output", "run")
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
    assert not result["teacher_cache"]["model_left"], "it samples"
    AutoModelForCausalLM.from_pretrained("run")


@pytest.mark.parametrize(("family", "cache"), [("llama", "memory"), ("llama", "disk"), ("t5", "memory")])
def test_interrupted_with_half_a_round_to_serve_it_goes_on_as_if_nothing_had_happened(
    typed, monkeypatch, tmp_path, family, cache
):
    """In the second epoch, so that what the teacher said of the rows is read again. It is kept, and counted, with the rows:
    a resumed run that met them in other company would round otherwise."""
    teacher = "builtin" if family == "llama" else tiny.save(tmp_path / "teacher", family)
    argv = [
        "distill",
        *SHORT,
        "--steps",
        "10",
        "--set",
        "eval.report_rows=0",
        "--set",
        "data.size=16",
        "--teacher",
        teacher,
    ]
    argv += ["--teacher-cache", cache, "--set", "teacher.cache_dir=states"]
    code, whole, err = typed(*argv, "--output", "whole")
    assert code == 0, err
    kept = whole["teacher_cache"]
    assert (kept["mode"], kept["rows"], kept["model_left"]) == (cache, 16, False)
    assert kept["bytes"] > 0
    begin_step = Trainer._begin_step

    def killed(self, *args):
        if self.state.step == 6:
            signal.raise_signal(signal.SIGINT)
        return begin_step(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_begin_step", killed)
        assert typed(*argv, "--output", "cut")[0] == 130
    code, result, err = typed(*argv, "--output", "cut", "--resume")
    assert (code, result["steps"]) == (0, 10), err
    ends = [load_file(f"{place}/model.safetensors") for place in ("whole", "cut")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_of_outputs_that_come_back_beside_rows_that_do_not_only_the_outputs_are_kept(typed, monkeypatch):
    pools, kept = [], []
    begin_step = Trainer._begin_step

    def seen(self, *args):
        pools.append(self.pool)
        kept.append(sum(s.teacher_hidden_ND is not None for s in self.pool.replay.rollouts))
        return begin_step(self, *args)

    monkeypatch.setattr(Trainer, "_begin_step", seen)
    code, result, err = typed("distill", *SHORT, "--output", "run")  # 6 steps of an epoch of 10
    assert (code, result["teacher_cache"]["mode"], result["teacher_cache"]["rows"]) == (0, "memory", 0), err
    assert 0 < max(kept) <= 2 * 4, "the outputs of a round, and no row beside them"
    assert pools[0].waiting == {}


def test_the_plan_counts_what_the_teacher_keeps_while_it_samples(typed):
    _, ours, err = typed("plan", *SHORT)
    assert "cached in memory" in err, "a round's outputs are trained on twice"
    rounds = SHORT.index("schedule.inner_epochs=2")  # which gkd does not have
    _, alone, _ = typed("plan", *SHORT[: rounds - 1], *SHORT[rounds + 1 :], "--method", "gkd")
    assert ours["memory"]["rollout_cache"] == alone["memory"]["rollout_cache"]
    assert ours["memory"]["teacher_rollout_cache"] > 4 * ours["memory"]["rollout_cache"]
    assert (ours["sequences_per_step"], alone["sequences_per_step"]) == (8, 4)
    outputs = 2 * 4 * 8  # batches, rows, tokens
    assert ours["teacher_cache"]["rollout_bytes"] == outputs * 128 * 4
    assert ours["teacher_cache"]["bytes"] == 0, "6 steps of an epoch of 10"
    _, longer, _ = typed("plan", *SHORT, "--steps", "12")
    assert longer["teacher_cache"]["bytes"] == longer["data"]["response_tokens"] * 128 * 4
    assert longer["memory"]["teacher_states"] == longer["teacher_cache"]["bytes"]
    assert longer["step_flops"]["replay"] < ours["step_flops"]["replay"], "rows are read from what is kept"


@pytest.mark.parametrize(
    ("method", "setting", "said"),
    [
        ("minillm", "schedule.kind=off", "objective.policy_gradient needs student outputs"),
        ("minillm", "schedule.fresh=buffer", "--set schedule.fresh = buffer; it applies to on, mixed"),
        ("gkd", "objective.row_weight=0.5", "objective.row_weight needs objective.policy_gradient"),
        ("minillm", "objective.ratio_clip=0", "expected a number > 0 and < 1"),
        ("minillm", "rollout.teacher_mix=1", "expected a number ≥ 0 and < 1"),
        ("minillm", "schedule.inner_epochs=0", "expected an integer ≥ 1"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(typed, method, setting, said):
    code, result, err = typed("distill", *SHORT, "--method", method, "--set", setting, "--output", "run")
    assert code == 2
    assert said in err
    assert said in result["message"]
