"""Recompute activations in the backward pass, and keep the rest in host memory until then."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from distillm_cli.models.backbone import Backbone

_LARGE = 1 << 16  # bytes; a smaller tensor is not worth a transfer


def checkpoint_activations(backbone: Backbone, *, offload: bool) -> None:
    """Recompute the activations of every layer in the backward pass. offload: keep the layers' inputs in host memory."""
    model = backbone.model
    # transformers 5.2x; earlier versions use the other name
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    if offload:
        offload_activations(backbone.trunk or model)


def offload_activations(trunk: nn.Module) -> None:
    """Keep the tensors that the trunk saves for its backward pass in host memory, from its forward pass to that."""
    active: list[AbstractContextManager[Any]] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        if torch.is_grad_enabled():
            active.append(saved_in_host_memory())
            active[-1].__enter__()

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        if active:
            active.pop().__exit__(None, None, None)

    trunk.register_forward_pre_hook(enter)
    trunk.register_forward_hook(leave, always_call=True)


def saved_in_host_memory() -> saved_tensors_hooks:
    """Return a context like ``torch.autograd.graph.save_on_cpu`` that leaves parameters and small tensors where they are."""

    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if isinstance(tensor, nn.Parameter) or tensor.nbytes < _LARGE or tensor.device.type == "cpu":
            return tensor
        is_pinned = tensor.device.type == "cuda"
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned)
        host.copy_(tensor)
        return tensor.device, host

    def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=host.is_pinned())

    return saved_tensors_hooks(pack, unpack)
