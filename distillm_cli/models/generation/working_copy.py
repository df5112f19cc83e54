"""Make a copy of a model for decoding: in another dtype, with an adapter merged in."""

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
    """Copy a model in evaluation mode, with its float32 weights in ``dtype``. Config and most buffers are shared.

    Tensors that transformers loads in float32 for a model of this dtype stay float32, such as rotary frequencies. Tables of
    sinusoids are cast like in transformers, since they are added to states. Weights that need no cast are not copied.
    adapter: the adapter in the model's layers. It is merged into the copy, which is a plain model.
    """
    fp32_modules = [*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    if dtype == torch.float16:
        fp32_modules += [*(getattr(model, "_keep_in_fp32_modules", None) or ())]
    memo: dict[int, Any] = {id(model.config): model.config} | {id(buffer): buffer for buffer in model.buffers()}
    to_cast = _cast_buffers(model, dtype)
    memo |= {id(buffer): buffer.to(dtype) for name, buffer in model.named_buffers() if name in to_cast}

    def converted(name: str, weight: torch.Tensor) -> nn.Parameter:
        is_unchanged = weight.dtype != torch.float32 or any(part in name.split(".") for part in fp32_modules)
        return nn.Parameter(weight.detach() if is_unchanged else weight.detach().to(dtype), requires_grad=False)

    adapted = {} if adapter is None else adapter.merged_layers(converted)
    memo |= adapted
    adapted_weights = {
        id(weight) for module in model.modules() if id(module) in adapted for weight in module.parameters()
    }
    for name, weight in model.named_parameters():
        if id(weight) not in adapted_weights:
            memo[id(weight)] = converted(name, weight)
    # Objects in the memo are not copied, so the float32 weights are not in memory twice, and tied ones stay tied.
    copied = copy.deepcopy(model, memo).eval()
    vars(copied).pop("peft_config", None)
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if (fused := fused_activation(child)) is not child:
                setattr(module, name, fused)
    return copied


# A cache private to this file: the names depend only on the model's class and config, and finding them builds a model
# on the meta device. An entry is removed together with its model.
_CAST_BUFFERS: WeakKeyDictionary[nn.Module, dict[torch.dtype, set[str]]] = WeakKeyDictionary()


def _cast_buffers(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """Return the names of float32 buffers that transformers creates in ``dtype`` for a model of that dtype.

    Buffers that are saved with the weights are not among them; these stay float32.
    """
    names_by_dtype = _CAST_BUFFERS.setdefault(model, {})
    if dtype not in names_by_dtype:
        found = {name for name, buffer in model.named_buffers() if buffer.dtype == torch.float32}
        found.difference_update(model.state_dict())
        if dtype != torch.float32 and found:
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                skeleton = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
            found &= {name for name, buffer in skeleton.named_buffers() if buffer.dtype == dtype}
        names_by_dtype[dtype] = found
    return names_by_dtype[dtype]


def fused_activation(activation: nn.Module) -> nn.Module:
    """Return an equal function; transformers' GPT-2 computes the tanh form of GELU in eight operations, torch in one."""
    return nn.GELU(approximate="tanh") if is_transformers_class(activation, "NewGELUActivation") else activation
