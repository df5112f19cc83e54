"""Build AdamW with its weight decay groups, and compute the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from distillm_cli.config.schema import TrainConfig, chosen
from distillm_cli.losses.extra import Extra
from distillm_cli.training.sharding import gathered, like


def build_optimizer(module: nn.Module, train: TrainConfig, extras: Iterable[Extra] = ()) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters, with weight decay on matrices only, not on biases and norm scales.

    An extra with another learning rate has groups of its own. ``lr_ratio`` of a group is a multiple of the student's
    learning rate. The fused kernel is used if devices and dtypes of all parameters support it.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    ratios = {id(p): extra.lr_ratio for extra in extras for p in extra.parameters()}
    groups: list[dict[str, Any]] = []
    for ratio in dict.fromkeys([1.0, *ratios.values()]):
        members = [p for p in trainable if ratios.get(id(p), 1.0) == ratio]
        matrices, vectors = ([p for p in members if (p.ndim >= 2) == is_matrix] for is_matrix in (True, False))
        groups.append({"params": matrices, "weight_decay": train.weight_decay, "lr_ratio": ratio})
        groups.append({"params": vectors, "weight_decay": 0.0, "lr_ratio": ratio})
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps", "xpu") for p in trainable)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=chosen(train.lr), betas=train.betas, fused=fused)


def learning_rate(train: TrainConfig, step: int, steps: int) -> float:
    """Return the learning rate of step ``step`` (from 0) of ``steps``: linear warm-up, then decay to ``min_lr``."""
    peak = chosen(train.lr)
    warmup = chosen(train.warmup)
    if warmup < 1:
        warmup *= steps
    if step < warmup:
        return peak * (step + 1) / (math.ceil(warmup) + 1)
    progress = (step - warmup) / max(steps - warmup, 1)
    share = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    floor = min(train.min_lr, peak)
    return floor + (peak - floor) * share[train.lr_schedule]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as named tensors: ``optimizer.PARAMETER_INDEX.KEY``.

    State that is distributed over the processes is whole in the first one, and empty in the others.
    """
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{key}": gathered(value) for i, values in state.items() for key, value in values.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Restore the state that ``optimizer_tensors`` returned. Raises ValueError for a tensor of another shape."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, parameter, key = name.split(".")
            state.setdefault(int(parameter), {})[key] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state.items():
        for key, value in values.items():
            if value.ndim and value.shape != parameters[index].shape:
                shape = list(value.shape)
                expected = list(parameters[index].shape)
                raise ValueError(f"optimizer.{index}.{key} has shape {shape}, but its parameter has {expected}")
            values[key] = like(value, parameters[index])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
