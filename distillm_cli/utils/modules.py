"""Put torch modules into evaluation mode temporarily, and compute fingerprints of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn


def eval_mode(module: nn.Module) -> AbstractContextManager[None]:
    """Put a module into evaluation mode inside the block. Each submodule's mode is restored after it."""
    return eval_mode_of(module.modules())


@contextmanager
def eval_mode_of(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put listed modules into evaluation mode inside the block, without traversing a model for every token."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def weights_fingerprint(tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype = torch.float32) -> str:
    """Return a digest of up to 64 numbers of each named tensor, which is faster than reading all of them.

    dtype: numbers are rounded to it first, so that a model loaded in another type can have the same fingerprint.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        sample = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)][:64]
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.to(dtype).float().cpu().numpy().tobytes())
    return digest.hexdigest()


def weights_checksum(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return a checksum of every number of the tensors: sums of their bits as integers, which any device adds up alike."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        bits = tensor.detach().contiguous().flatten().view(_INTEGERS[tensor.element_size()])
        digest.update(f"{name} {int(bits.sum(dtype=torch.int64))}".encode())
    return digest.hexdigest()


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number
