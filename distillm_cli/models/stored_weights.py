"""Load a model without reading its weights: they stay mapped from safetensors files until they are used.

transformers maps tensors that it does not convert. A student is trained in float32, so one that is stored in bfloat16 is
loaded as it is, and each process converts the part that it trains (``models/sharded_student.py``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from distillm_cli.models.model_paths import model_file


def load_stored(
    load: Callable[[torch.dtype], PreTrainedModel], path: str, revision: str | None = None
) -> PreTrainedModel:
    """Return what ``load`` makes of a dtype: bfloat16 if all weights of ``path`` have it, else float32.

    The model is the float32 one, apart from its parameters. If bfloat16 would also round buffers, it is loaded in float32.
    """
    if _stored_dtypes(path, revision) == {"BF16"}:
        model = load(torch.bfloat16)
        if all(buffer.dtype == torch.float32 for buffer in model.buffers() if buffer.is_floating_point()):
            for config in {id(part): part for part in (model.config, model.config.get_text_config())}.values():
                config.dtype = torch.float32
            return model
    return load(torch.float32)


def _stored_dtypes(path: str, revision: str | None) -> set[str]:
    """Return the types of the numbers in a model's safetensors files, as these name them; none if there are no files."""
    config = model_file(path, "config.json", revision)
    found: set[str] = set()
    for file in [] if config is None else config.parent.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118  not a mapping
    return {dtype for dtype in found if "F" in dtype}
