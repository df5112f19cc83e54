"""Put torch modules into evaluation mode for a while, and tell their weights apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn


def eval_mode(module: nn.Module) -> AbstractContextManager[None]:
    """Turn dropout off inside the block. Each submodule's own mode is restored after it, also after an exception."""
    return eval_mode_of(module.modules())


@contextmanager
def eval_mode_of(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Do the same for modules that were listed beforehand: to walk a model's tree for every token takes too long."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def weights_fingerprint(tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype = torch.float32) -> str:
    """Return a digest of a few numbers of each named tensor; to read all of them would take a while.

    dtype: numbers are rounded to it first, so that the same model loaded in another type may count as the same.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        few = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)][:64]
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + few.to(dtype).float().cpu().numpy().tobytes())
    return digest.hexdigest()
