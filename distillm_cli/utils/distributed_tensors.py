"""Gather tensors that are distributed over the processes (torch's ``DTensor``), and distribute whole ones like them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_distributed(tensor: Any) -> bool:
    """Return whether a tensor is distributed over the processes."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a distributed tensor; other tensors unchanged. Every process calls it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def like(value: Tensor, tensor: Any) -> Tensor:
    """Return a whole tensor distributed like another one; unchanged if the other one is not distributed.

    Only the part of this process is read and moved. On the CPU it is a view of the whole tensor.
    """
    if not is_distributed(tensor) or is_distributed(value) or value.ndim == 0:
        return value
    from torch.distributed.tensor import DTensor, Shard

    mesh = tensor.device_mesh
    part = value
    for dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            each = -(-part.shape[placement.dim] // mesh.size(dim))  # the last processes may have fewer, or none
            start = min(mesh.get_local_rank(dim) * each, part.shape[placement.dim])
            part = part.narrow(placement.dim, start, min(each, part.shape[placement.dim] - start))
    stride = torch.empty(value.shape, device="meta").stride()
    part = part.contiguous().to(mesh.device_type)
    return DTensor.from_local(part, mesh, tensor.placements, run_check=False, shape=value.shape, stride=stride)
