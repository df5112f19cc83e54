"""float64 for sums that need it, on devices that have no such type."""

from __future__ import annotations

from torch import Tensor

WITHOUT_FLOAT64 = {"mps"}  # kinds of devices: Metal has no double


def on_float64_device(tensor: Tensor) -> Tensor:
    """The tensor where it can be made float64: as it is, or on the CPU where its device has no float64."""
    return tensor.cpu() if tensor.device.type in WITHOUT_FLOAT64 else tensor
