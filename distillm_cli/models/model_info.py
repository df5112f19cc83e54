"""Read a model's family, size, chat template and context from its small files. No weights are loaded.

Neither torch nor transformers is imported, unless parameters must be counted without a safetensors file.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from distillm_cli.errors import ModelError
from distillm_cli.models.model_families import CONTEXT_FIELDS_ON_DISK, HUB_PARAMETERS, family_of_hub_name
from distillm_cli.models.model_paths import ADAPTER_CONFIG, locate_model, model_file, read_base_model

_LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors format


@dataclass(frozen=True)
class ModelInfo:
    """Describe a model by its small files. family: the config's model_type. is_built: the run builds it.

    count: returns the number of parameters, None if it is not known.
    """

    family: str
    has_template: bool = False
    context: int | None = None
    is_encoder_decoder: bool = False
    is_built: bool = False
    count: Callable[[], int | None] = lambda: None

    @cached_property
    def parameters(self) -> int | None:
        """Return the number of parameters, None if it is not known."""
        return self.count()


def read_model_info(path: str, revision: str | None = None) -> ModelInfo | None:
    """Describe a model directory or hub name. An adapter has the values of its base model and its own chat template.

    Returns None without a readable config. Loading the model reports the reason.
    """
    has_template = False
    try:
        for _ in range(4):  # adapters of adapters
            adapter = model_file(path, ADAPTER_CONFIG, revision)
            if adapter is None:
                break
            has_template = has_template or _has_template(path, revision)
            path, revision = read_base_model(adapter)
        file = model_file(path, "config.json", revision)
        if file is None:
            return _from_name(path)
        info = _from_config(_read(file), path, revision, file.parent)
        return replace(info, has_template=True) if has_template else info
    except (ModelError, OSError, ValueError):
        return None


def _from_config(config: dict[str, Any], path: str, revision: str | None, directory: Path) -> ModelInfo:
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    limits = [text.get(name) for name in CONTEXT_FIELDS_ON_DISK]
    return ModelInfo(
        family=str(config.get("model_type")),
        has_template=_has_template(path, revision),
        context=min((n for n in limits if isinstance(n, int) and n > 0), default=None),
        is_encoder_decoder=bool(config.get("is_encoder_decoder")),
        count=lambda: _count_in_headers(directory) or _count_by_shape(path, revision),
    )


def _read(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object")
    return content


def _has_template(path: str, revision: str | None) -> bool:
    file = model_file(path, "tokenizer_config.json", revision)
    if file is not None and _read(file).get("chat_template"):
        return True
    return any(model_file(path, name, revision) for name in ("chat_template.jinja", "chat_template.json"))


def _count_in_headers(directory: Path) -> int | None:
    """Count the parameters in the headers of the safetensors files; None if a file is absent or unreadable."""
    files = set(directory.glob("model*.safetensors"))
    index = directory / "model.safetensors.index.json"
    try:
        if index.is_file():
            files = {directory / name for name in _read(index)["weight_map"].values()}
        return sum(map(_count_in_header, files)) or None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None


def _count_in_header(path: Path) -> int:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _LARGEST_HEADER:
            raise ValueError(f"{path} is not a safetensors file")
        header = json.loads(file.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _count_by_shape(path: str, revision: str | None) -> int | None:
    """Count the parameters of a model that is built on torch's meta device, without weights."""
    import torch

    from distillm_cli.models.loading import load_config
    from distillm_cli.models.students import auto_class
    from distillm_cli.models.tokenizer_files import quiet

    try:
        config = load_config(path, revision=revision)
        with torch.device("meta"), quiet():
            model = auto_class(config).from_config(config, trust_remote_code=False)
    except Exception:  # the loader reports what is wrong with the model
        return None
    return sum(parameter.numel() for parameter in model.parameters())


def _from_name(path: str) -> ModelInfo | None:
    if locate_model(path)[1]:  # a directory without a config
        return None
    family = family_of_hub_name(path)
    if family is None:
        return None
    name = path.rpartition("/")[2].lower()
    size = re.search(r"(?<![a-z\d.])(\d+(?:\.\d+)?)([bm])(?![a-z])", name)
    parameters = HUB_PARAMETERS.get(name)
    if parameters is None and size is not None:
        parameters = float(size[1]) * {"m": 1e6, "b": 1e9}[size[2]]
    return ModelInfo(family.name, count=lambda: None if parameters is None else round(parameters))
