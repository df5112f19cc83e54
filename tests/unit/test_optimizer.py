"""Test the learning rate schedule and weight decay groups."""

import pytest
import torch
from torch import nn

from distillm_cli.config.schema import TrainConfig
from distillm_cli.training.optimizer import build_optimizer, learning_rate, load_optimizer_tensors, optimizer_tensors


def rates(steps=100, **train):
    train = {"lr": 1e-3, "warmup": 0} | train
    return [learning_rate(TrainConfig(**train), step, steps) for step in range(steps)]


def test_cosine_schedule_falls_from_lr_to_min_lr():
    values = rates(lr_schedule="cosine", min_lr=1e-7)
    assert values[0] == pytest.approx(1e-3)
    assert values[50] == pytest.approx((1e-3 + 1e-7) / 2)
    assert values[-1] < 1e-5
    assert values == sorted(values, reverse=True)


def test_linear_and_constant_schedules():
    assert rates(lr_schedule="linear", min_lr=0)[25] == pytest.approx(0.75e-3)
    assert set(rates(lr_schedule="constant")) == {1e-3}


@pytest.mark.parametrize("warmup", [10, 0.1])
def test_warmup_rises_linearly_from_above_zero(warmup):
    values = rates(lr_schedule="constant", warmup=warmup)
    assert 0 < values[0] < values[5] < values[9] < 1e-3
    assert values[10] == 1e-3
    assert values[5] - values[4] == pytest.approx(values[1] - values[0])


def test_only_matrices_have_weight_decay():
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    groups = build_optimizer(module, TrainConfig(lr=1e-3, weight_decay=0.3)).param_groups
    assert [(g["weight_decay"], [p.ndim for p in g["params"]]) for g in groups] == [(0.3, [2]), (0.0, [1, 1, 1])]
    module[0].weight.requires_grad_(False)
    assert len(build_optimizer(module, TrainConfig(lr=1e-3)).param_groups) == 1


def test_optimizer_state_round_trips_as_named_tensors():
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    first = build_optimizer(module, TrainConfig(lr=1e-3))
    for _ in range(3):
        module(torch.randn(4, 3)).sum().backward()
        first.step()
    second = build_optimizer(module, TrainConfig(lr=1e-3))
    load_optimizer_tensors(second, optimizer_tensors(first))
    for a, b in zip(first.state.values(), second.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
