"""Weights in 8 or 4 bits, by bitsandbytes, for teachers too large for the device otherwise."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from distillm_cli.errors import ModelError


def check_quantize(quantize: str, device: torch.device) -> None:
    """Raises ModelError where a model cannot be held in 8 or 4 bits: without CUDA, or without bitsandbytes."""
    if quantize == "none":
        return
    if device.type != "cuda":
        why = "there is none here" if not torch.cuda.is_available() else f"train.device is {device.type}"
        raise ModelError(
            f"teacher.quantize {quantize} needs CUDA, and {why}",
            hint="drop it; --set teacher.dtype=bf16 halves the memory of fp32 anywhere",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"teacher.quantize {quantize} needs bitsandbytes, which is not installed",
            hint="pip install 'distillm[quant]'",
        )


def in_few_bits(quantize: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The head is left as it is, by transformers' own rule, so that the loss reads a plain weight."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else it tells of its rounding at every product
    if quantize == "8bit":
        bits = BitsAndBytesConfig(load_in_8bit=True)
    else:
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": bits, "device_map": {"": device}}
