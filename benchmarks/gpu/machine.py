"""Record the device, the versions of libraries, and the rates that other figures are compared with."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import Any

import torch
from measure import measured

LIBRARIES = ("torch", "triton", "transformers", "accelerate", "peft", "trl", "liger-kernel", "bitsandbytes")


def rows(context: Any) -> Iterator[dict[str, Any]]:
    device = context.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    yield {"group": "device", "name": name, "cuda": torch.version.cuda}
    for library in LIBRARIES:
        try:
            yield {"group": "libraries", "library": library, "version": importlib.metadata.version(library)}
        except importlib.metadata.PackageNotFoundError:
            yield {"group": "libraries", "skipped": f"{library} is not installed"}
    size = 256 if context.tiny else 8192
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    found = measured(lambda: a @ b, device)
    yield {
        "group": "rates",
        "name": f"bf16 product, {size}³",
        "rate": 2 * size**3 / found["ms"] / 1e9,
        "unit": "TFLOP/s",
    }
    data = torch.empty(1 << (16 if context.tiny else 31), dtype=torch.uint8, device=device)
    copy = torch.empty_like(data)
    found = measured(lambda: copy.copy_(data), device)
    rate = 2 * data.numel() / found["ms"] / 1e6
    yield {"group": "rates", "name": "copy on the device, read and written", "rate": rate, "unit": "GB/s"}
