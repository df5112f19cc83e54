"""Load, run and save models that turn a sentence into an embedding: encoders, causal models, encoder-decoders.

An embedding is the pooled last hidden states of the model (of the encoder of an encoder-decoder), and a Dense module on top
if the directory has one. A directory may be one of sentence-transformers: its small files declare pooling, maximum length
and prompt, and ``SentenceEncoder.save`` writes them.

    modules.json                        the modules in order
    sentence_bert_config.json           maximum length
    config_sentence_transformers.json   version, prompts, similarity
    1_Pooling/config.json               pooling
    2_Dense/                            a linear layer, if there is one
    2_Normalize/, 3_Normalize/          division by the norm

Shape letters: B sentences, T time, D width of the embedding.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from distillm_cli.errors import ModelError, out_of_memory
from distillm_cli.models.loading import is_encoder, load_pretrained, read_config
from distillm_cli.models.model_families import context_of
from distillm_cli.models.model_paths import ADAPTER_CONFIG, model_file
from distillm_cli.models.students import set_dropout
from distillm_cli.models.tokenizer_files import load_error, quiet, read_tokenizer
from distillm_cli.training.events import Listener, Progress, silent
from distillm_cli.types import Batch, Sequence, collate
from distillm_cli.utils.memory import retry_halved
from distillm_cli.utils.modules import eval_mode

Pooling = Literal["cls", "mean", "last"]

_POOLING_NAMES: dict[str, Pooling] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}  # of sentence-transformers
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_MODULES = "modules.json"
_TYPES = "sentence_transformers.models."
_ACTIVATIONS = {"Identity": nn.Identity, "Tanh": nn.Tanh}
_T5 = ("t5", "mt5", "umt5")
_VERSION = "3.0.0"  # the oldest version of sentence-transformers with these files
_BATCH = 64  # sentences of a forward pass without gradient


def sentence(ids: SequenceOf[int], row: int = -1) -> Sequence:
    """Return a sentence as a sequence with every token supervised: the states of all tokens are used.

    The response is the sentence without its first token, and one more token, which no model reads.
    """
    tokens = np.asarray(ids, dtype=np.int32)
    return Sequence(tokens[:1], np.concatenate([tokens[1:], tokens[-1:]]), row)


@dataclass(frozen=True)
class Declared:
    """Hold what a directory of sentence-transformers declares. Without one: nothing.

    pooling: None if it is not declared. dense: directory of a Dense module. max_length: in tokens. prompt: put before
    every sentence. has_modules: whether it is such a directory.
    """

    pooling: Pooling | None = None
    dense: Path | None = None
    max_length: int | None = None
    prompt: str = ""
    lower_case: bool = False
    has_modules: bool = False


def read_declared(path: str, revision: str | None = None, *, pooling: str = "auto") -> Declared:
    """Read the small files of sentence-transformers, if the model has them.

    pooling: other than auto, it replaces the declared one. Raises ModelError if the pooling is needed and not declared or
    not supported, and for modules that are not supported.
    """
    file = model_file(path, _MODULES, revision)
    modules = [] if file is None else _modules(path, file, revision)
    chosen = None if pooling == "auto" else _POOLING_NAMES.get(pooling, pooling)
    if chosen is None:
        chosen = _read_pooling(path, modules, revision)
    settings = _read(model_file(path, "sentence_bert_config.json", revision))
    prompts = _read(model_file(path, "config_sentence_transformers.json", revision))
    name = prompts.get("default_prompt_name")
    dense = next((place for kind, place in modules if kind == "Dense"), None)
    dense_config = None if dense is None else model_file(path, f"{dense}/config.json", revision)
    return Declared(
        pooling=chosen,  # type: ignore[arg-type]
        dense=None if dense_config is None else dense_config.parent,
        max_length=settings.get("max_seq_length"),
        prompt=prompts.get("prompts", {}).get(name, "") if name else "",
        lower_case=bool(settings.get("do_lower_case")),
        has_modules=bool(modules),
    )


def _modules(path: str, file: Path, revision: str | None) -> list[tuple[str, str]]:
    """Return kind and directory of each module. Raises ModelError for an unknown kind."""
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
        modules = [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            "model.unreadable", f"cannot read {file}: {error}", hint="copy or download the file again"
        ) from error
    unknown = [kind for kind, _ in modules if kind not in ("Transformer", "Pooling", "Dense", "Normalize")]
    if unknown:
        raise ModelError(
            "model.unsupported_module",
            f"{path}: a {unknown[0]} module is not supported",
            where=str(file),
            hint="use a model of Transformer, Pooling, Dense and Normalize modules",
        )
    return modules


def _read_pooling(path: str, modules: list[tuple[str, str]], revision: str | None) -> Pooling | None:
    place = next((place for kind, place in modules if kind == "Pooling"), "1_Pooling")
    file = model_file(path, f"{place}/config.json", revision)
    if file is None and not modules:
        return None
    config = _read(file)
    names = config.get("pooling_mode") or [name for flag, name in _POOLING_FLAGS.items() if config.get(flag)]
    names = [names] if isinstance(names, str) else list(names)
    if len(names) == 1 and names[0] in _POOLING_NAMES:
        return _POOLING_NAMES[names[0]]
    what = f"pooling {'+'.join(names)} is not supported" if names else "a sentence model without its pooling"
    raise ModelError(
        "model.no_pooling", f"{path}: {what}", where=f"{place}/config.json", hint="try --set disco.pooling=mean"
    )


def _read(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            "model.unreadable", f"cannot read {file}: {error}", hint="copy or download the file again"
        ) from error
    return found if isinstance(found, dict) else {}


class SentenceEncoder(nn.Module):
    """Compute the embeddings of sentences, not normalized.

    max_length: of a sentence in tokens; longer ones are cut. dense: applied to the pooled states. prompt: put before every
    sentence. Only the part of the model that embeddings depend on is trained.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pooling: Pooling,
        *,
        max_length: int,
        dense: nn.Module | None = None,
        prompt: str = "",
        lower_case: bool = False,
    ):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.max_length = max_length
        self.dense = dense
        self.prompt = prompt
        self.lower_case = lower_case
        self.training = model.training
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.trunk.parameters():
            parameter.requires_grad_(True)
        if (pooler := getattr(model, "pooler", None)) is not None:  # BERT's, of its next-sentence head
            pooler.requires_grad_(False)

    @property
    def trunk(self) -> nn.Module:
        """Return the part whose last hidden states are pooled."""
        return self.model.get_encoder() if self.model.config.is_encoder_decoder else self.model

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(self.model.parameters()).device

    @property
    def width(self) -> int:
        """Return the width of the embeddings."""
        if self.dense is not None:
            return next(layer.out_features for layer in self.dense if isinstance(layer, nn.Linear))
        return self.model.config.get_text_config().hidden_size

    @property
    def loads_in_sentence_transformers(self) -> bool:
        """Return whether sentence-transformers computes the same embeddings from the saved directory.

        Of encoder-decoders it runs only the encoders of the T5 family alone.
        """
        config = self.model.config
        return not config.is_encoder_decoder or config.model_type in _T5

    def sequences(self, texts: SequenceOf[str]) -> list[Sequence]:
        """Tokenize sentences, each with its index as ``row``. Raises ModelError for one without tokens."""
        if self.lower_case:
            texts = [text.lower() for text in texts]
        with quiet():
            encoded = self.tokenizer(
                [self.prompt + text for text in texts], truncation=True, max_length=self.max_length
            )["input_ids"]
        for text, ids in zip(texts, encoded, strict=True):
            if not ids:
                raise ModelError(
                    "model.no_tokens", f"the tokenizer has no tokens for the sentence {text[:60]!r}", hint="remove it"
                )
        return [sentence(ids, row) for row, ids in enumerate(encoded)]

    def forward(self, batch: Batch) -> Tensor:
        """Return the embeddings [B, D] of sentences as float32, not normalized. batch: collated from ``sentence``."""
        B, T = batch.ids_BT.shape
        mask_BT = torch.zeros(B * T, dtype=torch.int64, device=batch.ids_BT.device)
        mask_BT = mask_BT.index_fill(0, batch.positions_N, 1).view(B, T)
        more = {} if self.model.config.is_encoder_decoder else _cacheless(self.model.config)
        states_BTD = self.trunk(input_ids=batch.ids_BT, attention_mask=mask_BT, **more).last_hidden_state.float()
        pooled_BD = pool(states_BTD, mask_BT, self.pooling)
        with torch.autocast(pooled_BD.device.type, enabled=False):
            return pooled_BD if self.dense is None else self.dense(pooled_BD).float()

    @torch.no_grad()
    def embed(self, sequences: SequenceOf[Sequence], listener: Listener = silent, task: str = "") -> Tensor:
        """Return the embeddings [B, D] of sentences on the CPU, in evaluation mode, in smaller batches if memory runs out.

        task: what the progress is reported as; without one it is not reported.
        """
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
        rows = [_BATCH]

        def attempt() -> Tensor:
            embeddings = torch.empty(len(sequences), self.width)
            for start in range(0, len(order), rows[0]):
                picked = order[start : start + rows[0]]
                batch = collate([sequences[i] for i in picked]).to(self.device)
                embeddings[picked] = self(batch).cpu()
                if task:
                    listener(Progress(task, min(start + rows[0], len(order)), len(order), "sentences"))
            return embeddings

        def halve() -> bool:
            rows[0] //= 2
            return rows[0] > 0

        with eval_mode(self):
            return retry_halved(attempt, halve)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load the model's weights."""
        self.model.load_state_dict(weights)

    def save(self, directory: Path, dtype: torch.dtype = torch.float32, dense: Tensor | None = None) -> None:
        """Save model, tokenizer and the files of sentence-transformers. dense: weight of a Dense module to write."""
        with quiet():
            model = self.model if dtype == torch.float32 else copy.deepcopy(self.model).to(dtype)
            model.save_pretrained(directory)
            self.tokenizer.save_pretrained(directory)
        _save_modules(self, directory, dense)


def _cacheless(config: PretrainedConfig) -> dict[str, bool]:
    """Return the argument that turns off the cache of a model that could generate; an encoder does not take it."""
    return {"use_cache": False} if getattr(config, "use_cache", False) and not is_encoder(config) else {}


def pool(states_BTD: Tensor, mask_BT: Tensor, pooling: Pooling) -> Tensor:
    """Return the pooled states [B, D]. mask_BT: 1 for the tokens of a sentence, which are first."""
    if pooling == "cls":
        return states_BTD[:, 0]
    lengths_B = mask_BT.sum(1)
    if pooling == "last":
        return states_BTD[torch.arange(len(states_BTD), device=states_BTD.device), lengths_B - 1]
    return (states_BTD * mask_BT[:, :, None]).sum(1) / lengths_B[:, None]


def load_encoder(
    path: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    pooling: str = "auto",
    default_pooling: Pooling = "mean",
    max_length: int | None = None,
    dropout: float | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    listener: Listener = silent,
) -> SentenceEncoder:
    """Load a model for embeddings with its trained weights, in evaluation mode.

    pooling: as ``disco.pooling``; default_pooling: for auto, if the model declares none. max_length: of a sentence, at most
    what the model declares and its context. tokenizer: for a directory without one. Raises ModelError.
    """
    declared = read_declared(path, revision, pooling=pooling)
    task = f"loading {path}"
    listener(Progress(task, 0, 1))
    config = read_config(path, revision=revision)
    if model_file(path, ADAPTER_CONFIG, revision) is not None:
        raise ModelError(
            "model.unsupported_module", f"{path} is a LoRA adapter", hint="use its model with the adapter merged in"
        )
    if dropout is not None:
        set_dropout(config, dropout, where=path)
    model = _load_weights(path, config, dtype, revision).to(device).eval()
    encoder = SentenceEncoder(
        model,
        tokenizer or read_tokenizer(path, revision=revision),
        declared.pooling or default_pooling,
        max_length=shortest(max_length, declared.max_length, usable_context(config)),
        dense=None if declared.dense is None else _load_dense(declared.dense).to(device),
        prompt=declared.prompt,
        lower_case=declared.lower_case,
    )
    check_vocabulary(encoder, path)
    listener(Progress(task, 1, 1))
    return encoder


def shortest(*lengths: int | None) -> int:
    """Return the smallest of the limits that are given; 512 without any."""
    return min((length for length in lengths if length is not None), default=512)


def usable_context(config: PretrainedConfig) -> int | None:
    """Return the longest sentence in tokens. RoBERTa and its relatives use the first positions for padding."""
    context = context_of(config)
    is_offset = type(config).__name__ in ("RobertaConfig", "XLMRobertaConfig", "CamembertConfig", "MPNetConfig")
    return context if context is None or not is_offset else context - 2


def check_vocabulary(encoder: SentenceEncoder, where: str) -> None:
    """Raise ModelError if the tokenizer has ids without an embedding."""
    rows = encoder.model.get_input_embeddings().weight.shape[0]
    needed = max(encoder.tokenizer.get_vocab().values()) + 1
    if needed > rows:
        raise ModelError(
            "model.tokenizer_mismatch",
            f"the tokenizer has {needed:,} token ids and the model only {rows:,}",
            where=where,
            hint="use the tokenizer that belongs to this model",
        )


def _load_weights(path: str, config: PretrainedConfig, dtype: torch.dtype, revision: str | None) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):  # for weights that the file does not have
        model, report = load_pretrained(AutoModel, path, config, dtype, revision)
    absent = [str(key) for key in report["missing_keys"]]
    of_pooler = [key for key in absent if key.startswith("pooler.")]
    with torch.no_grad():
        for key in of_pooler:  # random and not used: the output must not depend on it
            model.get_parameter(key).zero_()
    mismatched = [str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"]]
    unusable = sorted({*absent, *mismatched} - {*of_pooler})
    if unusable:
        more = f" and {len(unusable) - 2} more" if len(unusable) > 2 else ""
        raise ModelError(
            "model.weights_mismatch",
            f"{path}: weights absent or of another shape than in its config: {', '.join(unusable[:2])}{more}",
            hint=f"the files are not a checkpoint of a {type(model).__name__}",
        )
    return model


def _load_dense(directory: Path) -> nn.Module:
    """Load a Dense module. Raises ModelError for an activation that is not supported."""
    config = _read(directory / "config.json")
    activation = str(config.get("activation_function", "torch.nn.modules.linear.Identity")).rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        raise ModelError(
            "model.unsupported_module",
            f"a Dense module with activation {activation} is not supported",
            where=str(directory),
            hint=f"supported: {', '.join(_ACTIVATIONS)}",
        )
    try:
        weights = load_file(directory / "model.safetensors")
        linear = nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
        linear.load_state_dict({name.removeprefix("linear."): weight for name, weight in weights.items()})
    except Exception as error:  # a missing file, a damaged one, or other shapes
        if out_of_memory(error):
            raise
        raise load_error("Dense module", str(directory), True, error) from error
    return nn.Sequential(linear, _ACTIVATIONS[activation]()).requires_grad_(False)


def _save_modules(encoder: SentenceEncoder, directory: Path, dense: Tensor | None) -> None:
    """Write the files of sentence-transformers."""
    kinds = ["Transformer", "Pooling", *(["Dense"] if dense is not None else []), "Normalize"]
    places = ["", *(f"{index}_{kind}" for index, kind in enumerate(kinds) if index)]
    modules = [
        {"idx": index, "name": str(index), "path": place, "type": f"{_TYPES}{kind}"}
        for index, (kind, place) in enumerate(zip(kinds, places, strict=True))
    ]
    width = encoder.model.config.get_text_config().hidden_size
    active = next(name for name, pooling in _POOLING_NAMES.items() if pooling == encoder.pooling)
    pooling = {flag: name == active for flag, name in _POOLING_FLAGS.items()}
    if encoder.loads_in_sentence_transformers:
        _write(directory / _MODULES, modules)
    limits = {"max_seq_length": encoder.max_length, "do_lower_case": encoder.lower_case}
    _write(directory / "sentence_bert_config.json", limits)
    versions = {"sentence_transformers": _VERSION}
    settings = {
        "__version__": versions,
        "prompts": {"default": encoder.prompt} if encoder.prompt else {},
        "default_prompt_name": "default" if encoder.prompt else None,
        "similarity_fn_name": "cosine",
    }
    _write(directory / "config_sentence_transformers.json", settings)
    _write(directory / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **pooling})
    _write(directory / places[-1] / "config.json", {})
    if dense is not None:
        out_features, in_features = dense.shape
        place = directory / "2_Dense"
        shape = {"in_features": in_features, "out_features": out_features, "bias": False}
        _write(place / "config.json", shape | {"activation_function": "torch.nn.modules.linear.Identity"})
        save_file({"linear.weight": dense.detach().float().cpu().contiguous()}, place / "model.safetensors")


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
