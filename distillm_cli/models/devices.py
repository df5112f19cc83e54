"""Choose the device and precision of models: device, dtype, and 8-bit or 4-bit weights by bitsandbytes."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch

from distillm_cli.config import schema
from distillm_cli.errors import ModelError, UsageError
from distillm_cli.training.distributed import launched_processes, local_processes, local_rank
from distillm_cli.utils.text import counted

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """Return the device named auto, cpu, cuda, cuda:N or mps. Raises UsageError if it does not exist.

    Of several processes on a machine, each has a GPU of its own.

    cuda:N becomes torch's current device, since torch reads capabilities and free memory of that one, and Triton runs
    its kernels on it.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available() and launched_processes() > 1:
        return _own_gpu()
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        is_alone = launched_processes() == 1
        return torch.device("mps" if is_alone and torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            "usage.no_device", f"unknown device {name!r}", hint="use auto, cpu, cuda, cuda:N or mps"
        ) from error
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if device.type not in counts:
        raise UsageError("usage.no_device", f"unknown device {name!r}", hint="use auto, cpu, cuda, cuda:N or mps")
    if (device.index or 0) >= counts[device.type]:
        raise UsageError(
            "usage.no_device", f"no device {name} on this machine", hint="try --device auto or --device cpu"
        )
    if device.type != "cpu" and local_processes() > 1:
        what = f"train.device is {name}, but {local_processes()} processes run on this machine"
        raise UsageError("usage.no_device", what, hint="try --device auto, which gives each process a GPU")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def _own_gpu() -> torch.device:
    """Return the GPU of this process among those of its machine. Raises UsageError if there are fewer than processes."""
    gpus = torch.cuda.device_count()
    if local_processes() > gpus:
        what = f"{local_processes()} processes on a machine with {counted(gpus, 'GPU')}"
        raise UsageError("usage.no_device", what, hint=f"start {gpus}, or try --device cpu")
    device = torch.device("cuda", local_rank())
    torch.cuda.set_device(device)
    return device


def bf16_is_fast(device: torch.device) -> bool:
    """Return whether bfloat16 products run in hardware: Ampere and later, CPUs with AVX512-BF16 or AMX."""
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
    """Return the dtype of fp32, bf16 or fp16; auto is bf16 on hardware with fast bf16, else fp32."""
    if name == "auto":
        return torch.bfloat16 if bf16_is_fast(device) else torch.float32
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in recipes."""
    return next(name for name, known in _DTYPES.items() if known == dtype)


def check_quantize(quantize: str, device: torch.device) -> None:
    """Raise ModelError if weights cannot be quantized: without CUDA, or without bitsandbytes."""
    if quantize == "none":
        return
    if device.type != "cuda":
        why = "no CUDA device is available" if not torch.cuda.is_available() else f"train.device is {device.type}"
        raise ModelError(
            "model.cannot_quantize",
            f"teacher.quantize {quantize} needs CUDA, but {why}",
            hint="remove it; --set teacher.dtype=bf16 halves the memory of fp32 on any device",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "model.cannot_quantize",
            f"teacher.quantize {quantize} needs bitsandbytes, which is not installed",
            hint="pip install 'distillm[quant]'",
        )


def quantization_arguments(quantize: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that quantize a model's linear layers.

    transformers does not quantize the head, so the loss uses a plain weight.
    """
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else it warns of its rounding at every product
    if quantize == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": device}}
