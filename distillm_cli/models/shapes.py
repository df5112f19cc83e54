"""Build models without weights on torch's meta device, where tensors take no memory, and count their sizes.

The requirements of a run can then be estimated without weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distillm_cli.config.student_spec import (
    ConfigFile,
    RandomModel,
    SharedLayers,
    TeacherLayers,
    TeacherWidth,
    parse_student,
)
from distillm_cli.errors import ModelError
from distillm_cli.models.backbone import Backbone, vocabulary_size
from distillm_cli.models.composite import text_parameters
from distillm_cli.models.layers import build_from_layers
from distillm_cli.models.loading import load_config
from distillm_cli.models.lora import parameter_of
from distillm_cli.models.model_families import ATTENTION_DROPOUT_FIELDS, context_of, decoder_depth, expert_counts
from distillm_cli.models.model_paths import locate_model
from distillm_cli.models.students import auto_class, build_random, check_has_teacher, tied_from_scratch
from distillm_cli.models.tokenizer_files import WEIGHT_FILES, has_tokenizer, load_tokenizer, quiet
from distillm_cli.models.trained_tokenizers import TrainingTexts, load_or_train_tokenizer


@dataclass(frozen=True)
class Shape:
    """Hold a model on the meta device. tokenizer: None if it is not available."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def vocab(self) -> int:
        """Return the number of token ids in the loss: the tokenizer's, else the rows of the model's own matrix."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        return rows if self.tokenizer is None else min(rows, vocabulary_size(self.tokenizer))

    @property
    def is_encoder_decoder(self) -> bool:
        """Return whether prompt and response are two texts, each with its own stack of layers."""
        return bool(self.model.config.is_encoder_decoder)


@dataclass(frozen=True)
class EncoderSizes:
    """Hold the counts of an encoder.

    layers, matmul: as in ``Sizes``. cross_attention: weights of the decoder that compute the keys and values of its
    cross-attention from prompt tokens.
    """

    layers: int
    matmul: int
    cross_attention: int


@dataclass(frozen=True)
class Sizes:
    """Hold the sizes that determine a model's memory and time, counted from its modules on any device.

    parameters: by part: embeddings (of positions too), trunk, head (0 if tied to the embeddings), outside (of a
    composite model, what is not its text model), total, trainable. matmul: weights of the trunk in the matrix products
    of one token; of a mixture of experts, those of the experts per token. head_in × vocab: the head's product.
    attention, kv: widths of all query heads, and of all key-value heads, in a layer. dropout_heads: query heads of a
    layer, if attention has dropout. repeated: of ``matmul``, the weights of layers that run again. adapted: weights of the
    layers that have a LoRA adapter, and rank: the adapter's. factored: numbers of Adafactor's moment of the trainable
    parameters, a row and a column for each matrix. encoder: of an encoder-decoder, whose layers and matmul are then the
    decoder's alone.
    """

    kind: str
    layers: int
    width: int
    context: int | None
    vocab: int
    head_in: int
    matmul: int
    attention: int
    kv: int
    dropout_heads: int = 0
    repeated: int = 0
    parameters: dict[str, int] = field(default_factory=dict)
    adapted: int = 0
    rank: int = 0
    factored: int = 0
    encoder: EncoderSizes | None = None

    @property
    def all_layers(self) -> int:
        """Return the layers of both stacks."""
        return self.layers + (0 if self.encoder is None else self.encoder.layers)

    @property
    def matrices(self) -> int:
        """Return the weights in matrix products, of both stacks."""
        return self.matmul + (0 if self.encoder is None else self.encoder.matmul)

    @property
    def merged(self) -> int:
        """Return the parameters of the model without its adapter, or with it merged in."""
        return self.parameters["total"] - (self.parameters["trainable"] if self.adapted else 0)

    @property
    def trainable_share(self) -> float:
        """Return the share of the parameters that train."""
        return self.parameters["trainable"] / max(1, self.parameters["total"])


class _WeightCounts(NamedTuple):
    """Hold numbers of weights: by part, and those that a token meets in matrix products.

    matmul: of a causal model or a decoder. encoder_matmul: of an encoder. repeated: of ``matmul``, in layers that share
    weights.
    """

    parts: dict[str, int]
    matmul: int
    encoder_matmul: int
    repeated: int


def _count_weights(model: PreTrainedModel, head: torch.Tensor | None) -> _WeightCounts:
    """Count the weights of a model, each once, and once for each pass in matrix products. head: the head's matrix."""
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    parts = dict.fromkeys(("embeddings", "trunk", "head", "outside"), 0)
    text = {id(p) for _, p in text_parameters(model)}
    encoder_ids = set()
    if model.config.is_encoder_decoder:
        encoder_ids = {id(p) for p in model.get_encoder().parameters()}
    matmul, encoder_matmul, repeated = 0, 0, 0
    chosen, experts = expert_counts(model.config.get_text_config())
    seen: set[int] = set()

    def in_products(parameter: nn.Parameter) -> int:
        """Return the weights of a matrix that a token meets, 0 for a vector."""
        n = parameter.numel()
        return n if parameter.dim() == 2 else n * chosen // experts if parameter.dim() == 3 and experts else 0

    for _, parameter in model.named_parameters(remove_duplicate=False):  # a shared layer has a product in each pass
        n = parameter.numel()
        if id(parameter) in seen:
            again = 0 if id(parameter) in tables or parameter is head else in_products(parameter)
            matmul += again
            repeated += again
            continue
        seen.add(id(parameter))
        if id(parameter) not in text:
            parts["outside"] += n
        elif id(parameter) in tables:
            parts["embeddings"] += n
        elif parameter is head:
            parts["head"] += n
        else:
            parts["trunk"] += n
            met = in_products(parameter)
            if id(parameter) in encoder_ids:
                encoder_matmul += met
            else:
                matmul += met
    return _WeightCounts(parts, matmul, encoder_matmul, repeated)


def sizes(model: PreTrainedModel, vocab: int | None = None) -> Sizes:
    """Count a model. vocab: number of token ids in the loss; None: the rows of the head."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    weight = None if head is None else head.weight
    counts = _count_weights(model, weight)
    every = list(model.parameters())
    layers = decoder_depth(config)
    width = getattr(config, "hidden_size", 1)
    heads = getattr(config, "num_attention_heads", None) or 1
    attention = heads * (getattr(config, "head_dim", None) or width // heads)
    encoder = None
    if model.config.is_encoder_decoder:
        encoder = EncoderSizes(
            layers=getattr(config, "num_hidden_layers", 1),
            matmul=counts.encoder_matmul,
            cross_attention=layers * 2 * width * attention,
        )
    adapters = [module for module in model.modules() if hasattr(module, "lora_A")]
    return Sizes(
        kind=config.model_type,
        layers=layers,
        width=width,
        context=context_of(config),
        vocab=vocab or (width if weight is None else weight.shape[0]),
        head_in=width if weight is None else weight.shape[1],
        matmul=counts.matmul,
        attention=attention,
        kv=(getattr(config, "num_key_value_heads", None) or heads) * (attention // heads),
        repeated=counts.repeated,
        dropout_heads=heads if any(getattr(config, name, None) for name in ATTENTION_DROPOUT_FIELDS) else 0,
        parameters={
            **counts.parts,
            "total": sum(p.numel() for p in every),
            "trainable": sum(p.numel() for p in every if p.requires_grad),
        },
        adapted=sum(getattr(m.get_base_layer(), parameter_of(m)).numel() for m in adapters),
        factored=sum(_factored(p) for p in every if p.requires_grad),
        rank=max((max(module.r.values()) for module in adapters), default=0),
        encoder=encoder,
    )


def _factored(parameter: nn.Parameter) -> int:
    """Return how many numbers Adafactor stores for the second moment of a parameter."""
    n = parameter.numel()
    return n if parameter.dim() < 2 else n // parameter.shape[-1] + n // parameter.shape[-2]


def has_weights(path: str) -> bool:
    """Return whether a model's weights are in a local directory. Raises ModelError for a path that does not exist."""
    if isinstance(parse_student(path), ConfigFile):
        return False
    name, local = locate_model(path)
    return local and any(next(Path(name).glob(pattern), None) for pattern in WEIGHT_FILES)


def weight_bytes(path: str) -> int:
    """Return the size of the weight files of a model directory."""
    return sum(f.stat().st_size for pattern in WEIGHT_FILES for f in Path(locate_model(path)[0]).glob(pattern))


def load_shape(
    path: str,
    *,
    revision: str | None = None,
    tokenizer: str | None = None,
    texts: TrainingTexts | None = None,
    teacher: Shape | None = None,
    max_length: int,
    stage_shapes: Mapping[str, Shape] | None = None,
) -> Shape:
    """Return the shape of a model: a directory, a hub name (only its config is downloaded), a config.json, or a spec.

    tokenizer: a directory, a name, or one to be trained on ``texts``. teacher: the model that a student is built from.
    stage_shapes: shapes of models that do not exist yet, by name (``stage:NAME``).

    Raises ModelError for anything but a causal or encoder-decoder model, UsageError for an impossible shape.
    """
    known = stage_shapes or {}
    if path in known:
        return known[path]
    own = known[tokenizer].tokenizer if tokenizer in known else load_or_train_tokenizer(tokenizer, texts)
    config = None if teacher is None else teacher.model.config
    spec = parse_student(path)
    check_has_teacher(path, spec, teacher)
    if isinstance(spec, TeacherLayers | SharedLayers):
        with torch.device("meta"), quiet():
            whole = Backbone(teacher.model, teacher.tokenizer, teacher.vocab)
            return Shape(build_from_layers(path, whole), own or teacher.tokenizer)
    if isinstance(spec, RandomModel | TeacherWidth):
        own = own or (None if teacher is None else teacher.tokenizer)
        stand_in = own or _UnreadTokenizer(path, teacher)
        with torch.device("meta"), quiet():
            return Shape(build_random(path, stand_in, teacher_config=config, max_length=max_length, seed=0), own)
    file = isinstance(spec, ConfigFile)
    if file and not Path(path).expanduser().is_file():
        raise ModelError("model.no_config", f"no model config at {path}: no such file", hint="check the path")
    config = load_config(str(Path(path).expanduser()) if file else path, revision=revision, file=file)
    with torch.device("meta"), quiet():
        try:
            model = auto_class(config).from_config(config, dtype=torch.float32, trust_remote_code=False)
        except Exception as error:  # every family checks its sizes in its own way
            raise ModelError(
                "model.invalid_shape", f"cannot build a {config.model_type} of this shape: {error}", where=path
            ) from error
    if not file and tied_from_scratch(model):  # a config.json is what a student is built from
        model.set_output_embeddings(copy.deepcopy(model.get_output_embeddings()))
    if own is None:
        own = _tokenizer_of(str(Path(path).expanduser().parent) if file else path, revision)
    return Shape(model.eval(), own or (teacher.tokenizer if teacher is not None else None))


class _UnreadTokenizer:
    """Replace a tokenizer that is not available, with as many ids as the teacher's matrix has rows."""

    bos_token_id = eos_token_id = pad_token_id = None

    def __init__(self, path: str, teacher: Shape | None):
        if teacher is None:
            raise ModelError(
                "model.no_tokenizer",
                f"{path} needs a tokenizer",
                hint="pass --tokenizer DIR; bpe:1000, chars or words need local data",
            )
        self._last = teacher.vocab - 1

    def get_vocab(self) -> dict[str, int]:
        return {"": self._last}


def _tokenizer_of(path: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    """Return a model's own tokenizer, None if it is not available."""
    name, local = locate_model(path)
    if local and not has_tokenizer(Path(name)):
        return None
    try:
        return load_tokenizer(path, revision=revision)
    except ModelError:
        if local:  # it exists and is broken
            raise
        return None
