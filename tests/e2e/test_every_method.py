"""Run every method on the built-in pair for a few steps, and check its metrics."""

import json
import math

import pytest

from distillm_cli.cli.app import main
from distillm_cli.config.methods import METHODS
from distillm_cli.losses.fused import AGREEMENT_FIGURES
from tests.command_line import fields_of

FEW = (
    "data.size=60", "data.valid_limit=8", "eval.report_rows=0", "train.threads=1", "train.eval_steps=2",
    "train.log_steps=1", "train.batch_size=4", "rollout.max_new_tokens=4", "objective.kd_weight=1", "objective.kd_warmup=0",
)  # fmt: skip
ADAPTIVE = ("schedule.phi=1", "schedule.warm_up=none")  # student outputs from the first step
FIGURES = {
    "minillm": {"reward"},
    "mixkd": {"mixup_share", "mixup_loss"},
    "kdiga": {"input_gradient"},
    "disco": {"temperature"},
}
CASES = [(name, m.preset["schedule.kind"]) for name, m in METHODS.items() if m.verb == "distill"]
CASES += [(name, "adaptive") for name in ("akl", "ab", "taid", "atkd")]
KEYS = {"step", "epoch", "source", "loss", "lr", "grad_norm", "phi", "tokens", "seconds"}
HEALTH = {"train_tokens_per_second", "student_entropy", *AGREEMENT_FIGURES, "sampling_tokens_per_second", "replay_age"}
HEALTH |= {"rollout_length", "rollout_length_p90", "rollout_cut", "rollout_distinct2"}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_method_runs_and_logs_its_metrics(name, kind, tmp_path, capsys):
    method = ["--method", name, *(["--schedule", kind] if kind != METHODS[name].preset["schedule.kind"] else [])]
    few = FEW + (ADAPTIVE if kind == "adaptive" else ()) + (() if kind == "off" else ("rollout.bulk=1",))
    words = [word for field in fields_of(name, few) for word in ("--set", field)]
    run = ["distill", "--recipe", "questions", *method, "--steps", "3", "--output", str(tmp_path / "o"), *words]
    code = main([*run, "--json", "--quiet"])
    out, err = capsys.readouterr()
    assert code == 0, err
    result = json.loads(out)
    assert (result["status"], result["steps"]) == ("ok", 3)
    lines = [json.loads(line) for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 3
    extra = FIGURES.get(name, set())
    assert all(KEYS <= set(line) <= KEYS | HEALTH | extra for line in steps)
    # In nats per token, the loss of an untrained student is at most a few times log V.
    # A policy gradient adds rewards of both signs to the reverse KL, which is large for a confident teacher.
    # The loss of MixKD has three parts, and CTCD's divergence the factor T² = 4.
    low, high = {"minillm": (-math.inf, 10), "mixkd": (0, 9), "ctcd": (0, 6)}.get(name, (0, 3))
    assert all(low <= line["loss"] < high * math.log(100) for line in steps)
    assert all(line["grad_norm"] > 0 for line in steps)
    assert [line["step"] for line in lines if "valid_loss" in line] == [0, 2, 3]
    if kind in ("off", "adaptive"):
        assert {line["source"] for line in steps} <= ({"dataset"} if kind == "off" else {"rollout", "replay"})
