"""Test the mean of a student's last weights, and its resume."""

import torch
from torch.testing import assert_close

from distillm_cli.models.backbone import Backbone
from distillm_cli.runs.weight_mean import WeightMean, snapshot_steps
from tests import tiny

TOKENIZER = tiny.tokenizer()


def student(seed):
    return Backbone(tiny.model("llama-tied", len(TOKENIZER), seed=seed), TOKENIZER)


def copy(state):
    return {name: weight.clone() for name, weight in state.items()}


def test_snapshots_are_in_the_last_third():
    assert snapshot_steps(240) == [170, 180, 190, 200, 210, 220, 230, 240]
    assert snapshot_steps(3) == [2, 3]
    assert snapshot_steps(1) == [1]


def test_mean_of_a_resumed_run_is_that_of_all_snapshots(tmp_path):
    states = [copy(student(seed).state()) for seed in (1, 2, 3)]
    whole = WeightMean()
    for state in states:
        whole.add(state)
    resumed = WeightMean()
    resumed.add(states[0])
    resumed.save(tmp_path, 5)
    assert WeightMean.load(tmp_path, 6).count == 0  # of another checkpoint
    resumed = WeightMean.load(tmp_path, 5)
    for state in states[1:]:
        resumed.add(state)

    model = student(4)
    own = copy(model.state())
    for mean in (whole, resumed):
        with mean.used_by(model):
            for name, weight in model.state().items():
                if weight.is_floating_point():
                    assert_close(weight, torch.stack([state[name] for state in states]).mean(0), rtol=1e-5, atol=1e-6)
        assert_close(dict(model.state()), own, rtol=0, atol=0)


def test_a_mean_without_snapshots_changes_nothing(tmp_path):
    model = student(1)
    own = copy(model.state())
    empty = WeightMean()
    empty.save(tmp_path, 1)
    assert not any(tmp_path.iterdir())
    with WeightMean.load(tmp_path, 1).used_by(model):
        assert_close(dict(model.state()), own, rtol=0, atol=0)
