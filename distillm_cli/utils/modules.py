"""Put torch modules into evaluation mode temporarily, replace their weights, and compute fingerprints of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
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


def replace_parameters(module: nn.Module, value: Callable[[nn.Parameter], torch.Tensor]) -> None:
    """Replace every parameter of a module. Tied ones stay tied."""
    replaced: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                if id(weight) not in replaced:
                    replaced[id(weight)] = nn.Parameter(value(weight), requires_grad=weight.requires_grad)
                part._parameters[name] = replaced[id(weight)]


def assign_state(
    module: nn.Module, state: Mapping[str, torch.Tensor], *, strict: bool = True
) -> tuple[list[str], list[str]]:
    """Load a state as ``load_state_dict`` does, without a copy: its tensors become the parameters. Tied ones stay tied."""
    places = [(part, name) for part in module.modules() for name in part._parameters]
    first: dict[int, tuple[nn.Module, str]] = {}
    tied = [(part, name, *first.setdefault(id(part._parameters[name]), (part, name))) for part, name in places]
    absent, unknown = module.load_state_dict(state, strict=strict, assign=True)
    for part, name, other, name_there in tied:
        part._parameters[name] = other._parameters[name_there]
    return absent, unknown


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
