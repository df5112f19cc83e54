"""Products with few rows: weights that are laid out once for many of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# A layout is chosen for so many rows and serves other numbers as well. Laying a weight out costs a few products.
_ROWS = 32


class Linear:
    """x @ weight.T + bias for x [rows, in], weight [out, in] as it is now.

    On a CPU a bf16 weight is laid out here for the processor's own bf16 products, which otherwise happens in every one of
    them; the numbers are the same. Anything else is left as it is. Not for autocast, which would not see it.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.packed: torch.Tensor | None = None
        mkldnn = torch.ops.mkldnn
        if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported():
            self.packed = mkldnn._reorder_linear_weight(self.weight.contiguous(), _ROWS)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
