"""Compute in float64 for devices without float64."""

from __future__ import annotations

from torch import Tensor

WITHOUT_FLOAT64 = {"mps"}  # device types without float64


def on_float64_device(tensor: Tensor) -> Tensor:
    """Return the tensor on a device that supports float64: its own, or else the CPU."""
    return tensor.cpu() if tensor.device.type in WITHOUT_FLOAT64 else tensor
