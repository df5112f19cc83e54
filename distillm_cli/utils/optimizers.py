"""Build the optimizers of other libraries, imported when they are used."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from distillm_cli.errors import UsageError

EIGHT_BIT = ("adamw_8bit", "paged_adamw_8bit")


def check_optimizer(name: str, device: torch.device) -> None:
    """Raise UsageError for an optimizer of bitsandbytes without CUDA, or without bitsandbytes."""
    if name not in EIGHT_BIT:
        return
    if device.type != "cuda":
        raise UsageError(
            "usage.no_optimizer",
            f"train.optimizer {name} needs CUDA, but the device is {device.type}",
            hint="try --set train.optimizer=adafactor, whose state is as small on any device",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            "usage.no_optimizer",
            f"train.optimizer {name} needs bitsandbytes, which is not installed",
            hint="pip install 'distillm[quant]', or try --set train.optimizer=adafactor",
        )


def adafactor(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """Return transformers' Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) without relative steps.

    The learning rate then means the same as in AdamW. In torch's Adafactor it is relative to the weights' size.
    """
    from transformers import Adafactor

    return Adafactor(groups, lr=lr, scale_parameter=False, relative_step=False)


def eight_bit_adamw(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], *, paged: bool
) -> torch.optim.Optimizer:
    """Return AdamW of bitsandbytes. paged: the moments may move to host memory."""
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    return (PagedAdamW8bit if paged else AdamW8bit)(groups, lr=lr, betas=betas)
