"""Build the optimizer with its weight decay groups, and compute the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from distillm_cli.config.schema import TrainConfig, chosen
from distillm_cli.losses.extra import Extra
from distillm_cli.training.sharding import gathered
from distillm_cli.utils.distributed_tensors import like
from distillm_cli.utils.host_space import HostSpace
from distillm_cli.utils.optimizers import EIGHT_BIT, adafactor, eight_bit_adamw

# State that has the shape of its parameter: of AdamW, of Adafactor's vectors, and of bitsandbytes.
_OF_PARAMETER = ("exp_avg", "exp_avg_sq", "state1", "state2")


def build_optimizer(module: nn.Module, train: TrainConfig, extras: Iterable[Extra] = ()) -> torch.optim.Optimizer:
    """Return the optimizer of the trainable parameters, with weight decay on matrices only, not on biases and norm scales.

    An extra with another learning rate has groups of its own. ``lr_ratio`` of a group is a multiple of the student's
    learning rate. AdamW's fused kernel is used if devices and dtypes of all parameters support it.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    ratios = {id(p): extra.lr_ratio for extra in extras for p in extra.parameters()}
    groups: list[dict[str, Any]] = []
    for ratio in dict.fromkeys([1.0, *ratios.values()]):
        members = [p for p in trainable if ratios.get(id(p), 1.0) == ratio]
        matrices, vectors = ([p for p in members if (p.ndim >= 2) == is_matrix] for is_matrix in (True, False))
        groups.append({"params": matrices, "weight_decay": train.weight_decay, "lr_ratio": ratio})
        groups.append({"params": vectors, "weight_decay": 0.0, "lr_ratio": ratio})
    groups = [group for group in groups if group["params"]]
    lr = chosen(train.lr)
    if train.optimizer == "adafactor":
        return adafactor(groups, lr)
    if train.optimizer in EIGHT_BIT:
        return eight_bit_adamw(groups, lr, train.betas, paged=train.optimizer == "paged_adamw_8bit")
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps", "xpu") for p in trainable)
    return torch.optim.AdamW(groups, lr=lr, betas=train.betas, fused=fused)


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


def optimizer_tensors(optimizer: torch.optim.Optimizer, space: HostSpace) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as named tensors: ``optimizer.PARAMETER_INDEX.KEY``.

    State that is distributed over the processes is whole in the first one, in ``space``, and empty in the others.
    """
    state = optimizer.state_dict()["state"]
    tensors = {
        f"optimizer.{i}.{key}": torch.as_tensor(value) for i, values in state.items() for key, value in values.items()
    }
    return gathered(tensors, space)


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Restore the state that ``optimizer_tensors`` returned. Raises ValueError for a tensor of another shape."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            parameter = parameters[int(index)]
            expected = _shape_of(key, parameter.shape)
            if value.ndim and expected is not None and value.shape != expected:
                raise ValueError(f"{name} has shape {list(value.shape)}, but its parameter has {list(expected)}")
            is_count = not value.ndim and value.dtype == torch.int64  # a plain number before it was saved
            state.setdefault(int(index), {})[key] = value.item() if is_count else like(value, parameter)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _shape_of(key: str, shape: torch.Size) -> torch.Size | None:
    """Return the shape of a parameter's state, None if it does not follow from the parameter's."""
    if key == "exp_avg_sq_row":
        return shape[:-1]
    if key == "exp_avg_sq_col":
        return shape[:-2] + shape[-1:]
    return shape if key in _OF_PARAMETER else None
