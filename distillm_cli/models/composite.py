"""Handle models whose config has a text model and others (for images): Gemma 3, Mistral 3, Qwen-VL, SmolVLM.

The text model is trained, and everything else is unchanged. The whole model is saved, in the same
architecture, with the processor's files. `AutoModelForImageTextToText` loads such a directory, and `AutoModelForCausalLM`
does wherever transformers has a causal class for the family (Gemma 3, Qwen 3.5).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from distillm_cli.errors import ModelError
from distillm_cli.models.model_paths import adapter_chain, model_file

# Files of a processor that `save_pretrained` of the tokenizer does not write. Its older
# chat_template.json is not among them: transformers prefers it to the template that the tokenizer is saved with.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "image_processor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def is_composite(config: PretrainedConfig) -> bool:
    """Return whether a config has a text model's config and others that transformers loads together with it."""
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return False
    return config.get_text_config() is not config


def text_parameters(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the named parameters of the text model and its head, or all parameters of a model that is not composite."""
    if not is_composite(model.config):
        yield from model.named_parameters()
        return
    parts = (model.get_decoder(), model.get_output_embeddings())
    text = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in text:
            yield name, parameter


def check_causal_class(config: PretrainedConfig, where: str) -> None:
    """Raise ModelError if transformers has no causal model for the text config of a composite one (Qwen-VL)."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            "model.not_causal",
            f"transformers has no causal language model for the text part of this teacher ({config.model_type})",
            where=where,
            hint="build a student of another family, for example --student random:llama:4x256, or name a smaller model",
        )


def freeze_rest(model: PreTrainedModel) -> int:
    """Freeze the parts that are not the text model. Return the number of frozen weights, 0 for other models."""
    text = {id(parameter) for _, parameter in text_parameters(model)}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in text]
    for parameter in rest:
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in rest)


def copy_processor(path: str, revision: str | None, directory: Path) -> None:
    """Copy the processor's files of a model (a directory, a hub name, or an adapter on one) into ``directory``.

    Existing files in ``directory``, which the tokenizer wrote, are not replaced.
    """
    _, base, base_revision = adapter_chain(path, revision)
    for file in PROCESSOR_FILES:
        found = model_file(base, file, base_revision)
        if found is not None and not (directory / file).exists():
            shutil.copyfile(found, directory / file)
