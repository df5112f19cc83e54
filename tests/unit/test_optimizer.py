"""Test the learning rate schedule and weight decay groups."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from distillm_cli.config.schema import TrainConfig
from distillm_cli.training.optimizer import (
    build_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
)
from distillm_cli.utils.host_space import HostSpace
from distillm_cli.utils.optimizers import check_optimizer
from tests.codes import raises_code


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


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_restored_optimizer_takes_the_same_steps(name):
    config = TrainConfig(lr=1e-3, optimizer=name)
    inputs = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1))

    def train(module, optimizer, steps):
        for step in steps:
            module(inputs[step]).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def new_module():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))

    whole = new_module()
    train(whole, build_optimizer(whole, config), range(6))
    first = new_module()
    optimizer = build_optimizer(first, config)
    train(first, optimizer, range(3))
    tensors = load(save(optimizer_tensors(optimizer, HostSpace(Path()))))  # as in a checkpoint
    second = new_module()
    second.load_state_dict(first.state_dict())
    restored = build_optimizer(second, config)
    load_optimizer_tensors(restored, tensors)
    train(second, restored, range(3, 6))
    for (key, a), b in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
        assert not torch.equal(a, first.state_dict()[key])


def test_adafactor_stores_a_row_and_a_column():
    module = nn.Linear(7, 5)
    optimizer = build_optimizer(module, TrainConfig(lr=1e-3, optimizer="adafactor"))
    module(torch.randn(4, 7)).sum().backward()
    optimizer.step()
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in optimizer_tensors(optimizer, HostSpace(Path())).items()
        if tensor.ndim
    }
    assert shapes == {
        "optimizer.0.exp_avg_sq_row": (5,),
        "optimizer.0.exp_avg_sq_col": (7,),
        "optimizer.1.exp_avg_sq": (5,),
    }
    with pytest.raises(ValueError, match=r"optimizer.0.exp_avg_sq_col has shape \[5\]"):
        load_optimizer_tensors(optimizer, {"optimizer.0.exp_avg_sq_col": torch.zeros(5)})


def test_eight_bit_optimizer_needs_cuda_and_bitsandbytes(monkeypatch):
    for name in ("adamw_8bit", "paged_adamw_8bit"):
        with raises_code("usage.no_optimizer", f"train.optimizer {name}", "CUDA", "adafactor"):
            check_optimizer(name, torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with raises_code("usage.no_optimizer", "pip install 'distillm[quant]'"):
        check_optimizer("adamw_8bit", torch.device("cuda"))
    check_optimizer("adafactor", torch.device("cpu"))
