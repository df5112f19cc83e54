"""Make the copy of a model that decodes: in another dtype, an adapter merged in."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from distillm_cli.models.model_families import is_transformers_class

if TYPE_CHECKING:
    from distillm_cli.models.lora import Adapter


def working_copy(model: nn.Module, dtype: torch.dtype, adapter: Adapter | None = None) -> nn.Module:
    """Copy a model in evaluation mode, its float32 weights in ``dtype``; config and most buffers are the model's own.

    What transformers keeps in float32 when it loads a model in this dtype stays float32 here too, rotary frequencies
    among it. Tables of sinusoids are cast as it casts them: they are added to states. Weights that need no cast are not
    copied. adapter: the one in the model's layers, merged into the copy, which is a plain model.
    """
    kept = [*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    if dtype == torch.float16:
        kept += [*(getattr(model, "_keep_in_fp32_modules", None) or ())]
    memo: dict[int, Any] = {id(model.config): model.config} | {id(buffer): buffer for buffer in model.buffers()}
    to_cast = _cast_buffers(model, dtype)
    memo |= {id(buffer): buffer.to(dtype) for name, buffer in model.named_buffers() if name in to_cast}

    def made(name: str, weight: torch.Tensor) -> nn.Parameter:
        same = weight.dtype != torch.float32 or any(part in name.split(".") for part in kept)
        return nn.Parameter(weight.detach() if same else weight.detach().to(dtype), requires_grad=False)

    adapted = {} if adapter is None else adapter.merged_layers(made)
    memo |= adapted
    inside = {id(weight) for module in model.modules() if id(module) in adapted for weight in module.parameters()}
    for name, weight in model.named_parameters():
        if id(weight) not in inside:
            memo[id(weight)] = made(name, weight)
    # Whatever the memo holds is not copied, so the float32 weights are never there twice, and tied ones stay tied.
    twin = copy.deepcopy(model, memo).eval()
    vars(twin).pop("peft_config", None)
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if (fused := fused_activation(child)) is not child:
                setattr(module, name, fused)
    return twin


_CAST_BUFFERS: WeakKeyDictionary[nn.Module, dict[torch.dtype, set[str]]] = WeakKeyDictionary()


def _cast_buffers(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """Return the names of float32 buffers that transformers makes in ``dtype`` for a model of that dtype.

    None that is saved with the weights is among them: these stay float32.
    """
    known = _CAST_BUFFERS.setdefault(model, {})
    if dtype not in known:
        found = {name for name, buffer in model.named_buffers() if buffer.dtype == torch.float32}
        found.difference_update(model.state_dict())
        if dtype != torch.float32 and found:
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                skeleton = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
            found &= {name for name, buffer in skeleton.named_buffers() if buffer.dtype == dtype}
        known[dtype] = found
    return known[dtype]


def fused_activation(activation: nn.Module) -> nn.Module:
    """Return the same function; transformers' GPT-2 writes the tanh form of GELU as eight operations, torch has one."""
    return nn.GELU(approximate="tanh") if is_transformers_class(activation, "NewGELUActivation") else activation
