"""Load a model without reading its weights: they stay mapped from safetensors files until they are used.

transformers maps tensors that it does not convert. A student is trained in float32, so one that is stored in bfloat16 is
loaded as it is, and each process converts the part that it trains (``models/sharded_student.py``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from transformers import PreTrainedModel

from distillm_cli.models.model_paths import model_file


def load_stored(
    load: Callable[[torch.dtype], PreTrainedModel], path: str, revision: str | None = None
) -> PreTrainedModel:
    """Return a model in float32. Its parameters stay bfloat16 if all weights of ``path`` are.

    load: loads the model in a dtype.
    """
    if _stored_dtypes(path, revision) != {"BF16"}:
        return load(torch.float32)
    model = load(torch.bfloat16)
    for config in (model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)):
        if config is not None:
            config.dtype = torch.float32
    _restore_buffers(model)
    return model


def _restore_buffers(model: PreTrainedModel) -> None:
    """Replace the buffers that bfloat16 has rounded, such as scales of embeddings. Saved ones are exact in both dtypes."""
    rounded = {name: buffer for name, buffer in model.named_buffers() if buffer.dtype == torch.bfloat16}
    if not rounded:
        return
    with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
        skeleton = type(model)._from_config(copy.deepcopy(model.config), dtype=torch.float32)
    computed = dict(skeleton.named_buffers())
    saved = model.state_dict()
    for name, buffer in rounded.items():
        path, _, key = name.rpartition(".")
        model.get_submodule(path)._buffers[key] = buffer.float() if name in saved else computed[name]


def _stored_dtypes(path: str, revision: str | None) -> set[str]:
    """Return the floating-point dtypes in a model's safetensors files, such as ``BF16``; none if there are no files."""
    config = model_file(path, "config.json", revision)
    found: set[str] = set()
    for file in [] if config is None else config.parent.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118  not a mapping
    return {dtype for dtype in found if "F" in dtype}
