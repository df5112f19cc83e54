"""Multiply few rows on a CPU with weights in a layout that is computed once."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from distillm_cli.models import cpu

# Number of rows that a layout is optimized for. Other numbers work as well.
_ROWS = 32

# A layout is a second copy of the weight. Above this size (half a gigabyte of bf16) it needs too much memory.
_MOST_WEIGHTS = 1 << 28


class PackedLinear:
    """Compute x @ weight.T + bias for x [rows, in] and weight [out, in] as it is now.

    On a CPU a bf16 weight is converted to the layout of the processor's bf16 products, which otherwise happens in every
    product. The results are the same. Other weights are not converted. Autocast has no effect on it.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.packed: torch.Tensor | None = None
        is_bf16_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        if is_bf16_on_cpu and weight.numel() <= _MOST_WEIGHTS and cpu.is_enabled() and can_pack():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, _ROWS)

    def __call__(self, x: torch.Tensor, activation: nn.Module | None = None) -> torch.Tensor:
        """Return activation(product). The tanh form of GELU is fused into a packed product."""
        is_gelu = type(activation) is nn.GELU and activation.approximate == "tanh"
        if self.packed is None:
            y = F.linear(x, self.weight, self.bias)
        else:
            name, form = ("gelu", "tanh") if is_gelu else ("none", "")
            y = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, name, [], form)
        is_done = activation is None or (is_gelu and self.packed is not None)
        return y if is_done else activation(y)


class PackedWeights:
    """Hold the layouts of frozen weights, computed at first use and again after a weight has changed."""

    def __init__(self):
        self._made: dict[tuple, tuple[torch.Tensor, int, PackedLinear]] = {}

    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, start: int, stop: int | None, *, transposed: bool
    ) -> PackedLinear | None:
        """Return the product with rows start:stop of a weight [out, in] or its transpose; None if no layout helps."""
        key = (id(weight), start, stop)
        known, version, product = self._made.get(key, (None, None, None))
        if known is not weight or version != weight._version:
            rows = (weight.t() if transposed else weight)[start:stop]
            product = PackedLinear(rows, None if bias is None else bias[start:stop])
            self._made[key] = (weight, weight._version, product)
        return product if product.packed is not None else None


@cache
def can_pack() -> bool:
    """Return whether this build of torch has the operators (of its compiler) and this processor the instructions."""
    names = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    has_operators = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
    return has_operators and torch.ops.mkldnn._is_mkldnn_bf16_supported()
