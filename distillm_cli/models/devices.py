"""Where models run and in what precision."""

from __future__ import annotations

import torch

from distillm_cli.config import schema
from distillm_cli.errors import UsageError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """auto, cpu, cuda, cuda:N or mps → a device that is there. Raises UsageError when it is not.

    cuda:N becomes the current one, which torch means where it asks a GPU without saying which: what it can (bf16), how much
    of its memory is in use; and on which kernels are started whose authors thought of one GPU (Triton's).
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}", hint="use auto, cpu, cuda, cuda:N or mps") from error
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if device.type not in counts:
        raise UsageError(f"unknown device {name!r}", hint="use auto, cpu, cuda, cuda:N or mps")
    if (device.index or 0) >= counts[device.type]:
        raise UsageError(f"no device {name} on this machine", hint="try --device auto or --device cpu")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 products run in hardware: Ampere and later, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        known = capabilities()
        return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe is not None)


def resolve_dtype(name: schema.Dtype, device: torch.device) -> torch.dtype:
    """fp32, bf16, fp16; auto is bf16 where the machine is fast at it, else fp32."""
    if name == "auto":
        return torch.bfloat16 if bf16_is_fast(device) else torch.float32
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """What a recipe calls it."""
    return next(name for name, known in _DTYPES.items() if known == dtype)
