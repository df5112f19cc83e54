"""Load the config and the model of a name or a directory.

Local directories need no network, and code in a checkpoint is never run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distillm_cli.config.schema import AdapterConfig
from distillm_cli.errors import ModelError, out_of_memory
from distillm_cli.models import lora
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.composite import is_composite
from distillm_cli.models.devices import check_quantize, quantization_arguments
from distillm_cli.models.model_families import context_of
from distillm_cli.models.model_paths import (
    ModelLocation,
    adapter_chain,
    base_not_loaded,
    locate_model,
    model_file,
    portable_name,
)
from distillm_cli.models.stored_weights import load_stored
from distillm_cli.models.students import adopt_special_tokens, auto_class, heads_are_tied, set_dropout
from distillm_cli.models.tokenizer_files import WEIGHT_FILES, TokenizerCache, load_error, quiet
from distillm_cli.training.events import Listener, Progress, Warned, silent
from distillm_cli.utils import manifest
from distillm_cli.utils.modules import eval_mode
from distillm_cli.utils.text import counted

MIN_CONTEXT = 24  # tokens; decoding is tested on prompts nearly as long


def load_config(path: str, *, revision: str | None = None, file: bool = False) -> PretrainedConfig:
    """Load the config of a causal or an encoder-decoder model: of a directory, a hub name, or (``file``) a JSON file.

    For an adapter, that of its base model.
    """
    if not file:
        adapters, base, base_revision = adapter_chain(path, revision)
        if adapters:
            try:
                return load_config(base, revision=base_revision)
            except ModelError as error:
                raise base_not_loaded(adapters[-1], base, error) from error
    config = read_config(path, revision=revision, file=file)
    try:
        depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    except ValueError as error:  # several text models
        raise _not_causal(path, config) from error
    if isinstance(depth, int) and depth < 1:
        raise ModelError(
            "model.invalid_config",
            f"{path}: num_hidden_layers is {depth}",
            hint="its config.json must have at least one layer",
        )
    context = context_of(config)
    if context is not None and context < MIN_CONTEXT:
        what = f"{path}: a context of {counted(context, 'token')} is too short for a prompt and a response"
        raise ModelError(
            "model.context_too_short",
            what,
            hint=f"use a model with {MIN_CONTEXT} or more (max_position_embeddings in config.json)",
        )
    if is_encoder(config):
        raise _not_causal(path, config)
    architectures = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in architectures and not is_composite(config):
        raise _not_causal(path, config)
    return config


def read_config(path: str, *, revision: str | None = None, file: bool = False) -> PretrainedConfig:
    """Read the config of a model of any kind: of a directory, a hub name, or (``file``) a JSON file."""
    name, local = (path, True) if file else locate_model(path)
    if local and not file:
        manifest.check_files(Path(name), weights=False)
        if not (Path(name) / "config.json").is_file():
            hint = "pass a model directory: config.json, model.safetensors"
            raise ModelError("model.no_config", f"{path} has no config.json", hint=hint)
    with quiet():
        try:
            config = AutoConfig.from_pretrained(
                name, revision=revision, local_files_only=local, trust_remote_code=False
            )
        except Exception as error:  # a dozen types, by version; each of them means that the config is not usable
            raise load_error("config", path, local, error) from error
    return config


def load_backbone(
    path: str,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokenizers: TokenizerCache | None = None,
    dropout: float | None = None,
    quantize: str = "none",
    dispatch: Mapping[str, Any] | None = None,
    train: AdapterConfig | None = None,
    listener: Listener = silent,
) -> Backbone:
    """Load a model with its trained weights, in eval mode.

    path: of a model, or of a LoRA adapter, which is merged into its base model. train: the adapter is not merged, to
    continue its training. dtype: of the weights; None: float32, but without a copy of stored ones (``load_stored``), for a
    student that is distributed. tokenizer: replaces the model's own. tokenizers: cache from which the model's own is read.
    dropout: value of every dropout. quantize: 8bit or 4bit; an adapter is not merged into such weights. dispatch: arguments
    with which transformers spreads the weights over devices, in place of moving them to ``device``. Raises ModelError, with
    the cause, for anything but a complete checkpoint of such a model.
    """
    check_quantize(quantize, device, "teacher.quantize" if train is None else "student.quantize")
    task = f"loading {path}"
    listener(Progress(task, 0, 1))
    config = load_config(path, revision=revision)
    adapters, base, base_revision = adapter_chain(path, revision)
    for location in adapters:
        if location.local:
            manifest.check_files(Path(location.name), weights=True)
            _warn_of_edits(Path(location.name), listener)
    own = tokenizer is None
    tokenizer = (tokenizers or TokenizerCache()).load(path, revision) if tokenizer is None else tokenizer
    if dropout is not None:
        set_dropout(config, dropout, where=path)
    quantization = {} if quantize == "none" else quantization_arguments(quantize, dtype or torch.float32, device)
    if dispatch and adapters:
        what = f"{path} is an adapter, and cannot be merged into weights on several devices"
        raise ModelError("model.cannot_place", what, hint="merge it first, or try --set teacher.device_map=cpu")
    placed = quantization or dispatch
    load = partial(_load_weights, base, config, revision=base_revision, **quantization, **(dispatch or {}))
    is_mapped = dtype is None and not adapters
    model = load_stored(load, base, base_revision) if is_mapped else load(dtype or torch.float32)
    directory = Path(locate_model(base)[0])
    if directory.is_dir():
        _warn_of_edits(directory, listener)
    model, adapter = _with_adapters(model if placed else model.to(device), adapters, base, base_revision, train)
    read_generation_config([*adapters, ModelLocation(base, False, base_revision)], model)
    model.eval()
    if not quantization:  # 8-bit rounding depends on the other tokens, which would look like non-causal attention
        check_causal(path, model)
    if own:
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = tokenizer.pad_token_id
    else:
        adopt_special_tokens(model, tokenizer)
    backbone = Backbone(model, tokenizer)
    backbone.adapter = adapter
    listener(Progress(task, 1, 1))
    return backbone


def _warn_of_edits(directory: Path, listener: Listener) -> None:
    for path in manifest.edited_files(directory):
        listener(Warned(f"{path} has changed since the run wrote it: using the changed file"))


def _with_adapters(
    model: PreTrainedModel,
    adapters: list[ModelLocation],
    base: str,
    base_revision: str | None,
    train: AdapterConfig | None,
) -> tuple[PreTrainedModel, lora.Adapter | None]:
    """Return the model with these adapters, and the adapter that trains."""
    for i, location in reversed(list(enumerate(adapters))):
        source: dict[str, Any] = {"local": location.local, "revision": location.revision}
        if train is not None and i == 0:
            if len(adapters) > 1:
                what = f"{location.name} is an adapter of an adapter, and its training cannot be continued"
                raise ModelError(
                    "model.invalid_adapter", what, hint="without --lora both are merged, and all weights are trained"
                )
            adapter = lora.continue_adapter(
                model, location.name, train, base=portable_name(base), base_revision=base_revision, **source
            )
            return model, adapter
        with quiet():
            apply = lora.attach_frozen if getattr(model, "is_quantized", False) else lora.merge
            model = apply(model, location.name, **source)
    return model, None


def read_generation_config(locations: SequenceOf[ModelLocation], model: PreTrainedModel) -> None:
    """Set the model's generation config (the end tokens of responses) from the outermost location with one.

    locations: of adapters and, last, of their model. An adapter that was trained with a chat template ends responses
    with other tokens than its model. Raises ModelError for a damaged file, which transformers ignores silently.
    """
    for location in locations:
        file = model_file(location.name, "generation_config.json", location.revision)
        if file is None:
            continue
        try:
            config = GenerationConfig.from_pretrained(file.parent, local_files_only=True)
        except Exception as error:  # the type depends on the damage
            raise load_error("generation config", location.name, True, error) from error
        if location is not locations[-1]:
            model.generation_config = config
        return


def load_pretrained(
    auto: type, path: str, config: PretrainedConfig, dtype: torch.dtype, revision: str | None, **more: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model with its weights by a class of transformers, and return it with transformers' report of the weights.

    Weights of another shape than in the config are in the report; the caller refuses them by name. Raises ModelError.
    """
    name, local = locate_model(path)
    if local and not any(next(Path(name).glob(pattern), None) for pattern in WEIGHT_FILES):
        raise ModelError(
            "model.no_weights",
            f"{path} has a config.json but no weights (model.safetensors)",
            hint=f"to start from scratch, pass {Path(path) / 'config.json'}",
        )
    if local:
        manifest.check_files(Path(name), weights=True)
    # Otherwise a thread requests a conversion from the hub for repositories without safetensors.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    with quiet():
        try:
            return auto.from_pretrained(  # type: ignore[attr-defined]
                name,
                config=config,
                dtype=dtype,
                revision=revision,
                local_files_only=local,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **more,
            )
        except Exception as error:  # the type depends on the damage
            raise load_error("weights", path, local, error) from error


def _load_weights(
    path: str, config: PretrainedConfig, dtype: torch.dtype, *, revision: str | None, **more: Any
) -> PreTrainedModel:
    model, report = load_pretrained(auto_class(config), path, config, dtype, revision, **more)
    for kind, what in (("mismatched_keys", "with another shape than in its config"), ("missing_keys", "absent")):
        if keys := sorted(str(key[0] if isinstance(key, tuple) else key) for key in report[kind]):
            others = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
            hint = f"the files are not a checkpoint of a {type(model).__name__}"
            if kind == "missing_keys" and keys == _head_names(model):
                hint = "if its head is its embedding matrix, set tie_word_embeddings to true in its config.json"
            raise ModelError(
                "model.weights_mismatch", f"{path}: weights {what}: {', '.join(keys[:2])}{others}", hint=hint
            )
    if not config.is_encoder_decoder and not heads_are_tied(model):
        # transformers loads a head that differs from the embeddings without changing the config. A model built or saved
        # from that config would lose the head.
        for part in (model.config, model.config.get_text_config()):
            part.tie_word_embeddings = False
    return model


def _head_names(model: PreTrainedModel) -> list[str]:
    head = model.get_output_embeddings()
    return [name for name, weight in model.named_parameters() if head is not None and weight is head.weight]


@torch.no_grad()
def check_causal(path: str, model: PreTrainedModel) -> None:
    """Check on a few tokens that a model predicts each token from earlier ones only.

    Raises ModelError for BERT and similar models, which also load as causal models, and for a composite model that does
    not run without images. In an encoder-decoder, the decoder must be causal.
    """
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), "cpu")  # meta: in other memory
    ids_BT = torch.arange(1, 9, device=device).repeat(2, 1) % model.get_input_embeddings().weight.shape[0]
    ids_BT[1, -1] = 0
    inputs = {"input_ids": ids_BT}
    if model.config.is_encoder_decoder:
        inputs = {"input_ids": ids_BT[:1].expand(2, -1), "decoder_input_ids": ids_BT}
    with eval_mode(model), quiet():
        try:
            first_TV, second_TV = model(**inputs, use_cache=False).logits[:, :-1].float()
        except Exception as error:
            if out_of_memory(error) or not is_composite(model.config):
                raise
            why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise ModelError(
                "model.not_causal",
                f"cannot run {path} on text alone: {why}",
                where=f"a {model.config.model_type} model",
                hint="only the text part of a model is trained: choose a model that runs without images",
            ) from error
    known_TV = first_TV.isfinite() | second_TV.isfinite()  # not tokens that the model suppresses with −inf
    first_TV, second_TV = first_TV[known_TV], second_TV[known_TV]
    if not known_TV.any():  # diverged weights, which `check_head` names
        return
    if (first_TV - second_TV).abs().max() > 16 * torch.finfo(model.dtype).eps * first_TV.abs().max():
        raise _not_causal(path, model.config)


def is_encoder(config: PretrainedConfig) -> bool:
    """Return whether a config is of an encoder, such as BERT, whose states depend on the tokens on both sides."""
    is_masked = (
        type(config) in MODEL_FOR_MASKED_LM_MAPPING and type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    )
    return is_masked and not getattr(config, "is_decoder", False)


def _not_causal(path: str, config: PretrainedConfig) -> ModelError:
    architecture = (config.architectures or [config.model_type])[0]
    if is_encoder(config):
        return ModelError(
            "model.not_causal",
            f"{path} is not a causal language model, but an encoder ({architecture})",
            hint="encoders train by DisCo only (--method disco), and are scored on sentence pairs (eval --suite stsb)",
        )
    return ModelError(
        "model.not_causal",
        f"{path} is not a causal language model ({architecture})",
        hint="choose a model that predicts the next token: GPT-2, OPT, Llama, Qwen, Gemma, … or T5, mT5",
    )
