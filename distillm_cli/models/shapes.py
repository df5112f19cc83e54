"""Models by their shape alone: built from a config on torch's meta device, where a tensor has a size and no memory.

What a run needs can so be told before any weights are there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from distillm_cli.config import schema
from distillm_cli.config.student_spec import ConfigFile, RandomModel, TeacherLayers, TeacherWidth, parse_student
from distillm_cli.errors import ModelError
from distillm_cli.models.backbone import Backbone, vocabulary_size
from distillm_cli.models.composite import text_parameters
from distillm_cli.models.contexts import context_of
from distillm_cli.models.layers import build_from_layers
from distillm_cli.models.loading import load_config
from distillm_cli.models.lora import parameter_of
from distillm_cli.models.places import locate
from distillm_cli.models.students import auto_class, build_random, check_has_teacher, tied_from_scratch
from distillm_cli.models.tokenizer_files import WEIGHTS, has_tokenizer, load_tokenizer, prepare_tokenizer, quiet
from distillm_cli.models.tokenizers import is_trained_spec, train_tokenizer

Texts = Callable[[], Iterator[str]]


_ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "dropout_rate")  # as families call it; the last is T5's


@dataclass(frozen=True)
class Shape:
    """A model on the meta device. tokenizer: None where none is at hand."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def vocab(self) -> int:
        """Token ids that meet the loss: the tokenizer's, else the rows of the model's own matrix."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        return rows if self.tokenizer is None else min(rows, vocabulary_size(self.tokenizer))

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether prompt and response are two texts, each with its own stack of layers."""
        return bool(self.model.config.is_encoder_decoder)


@dataclass(frozen=True)
class Reading:
    """The encoder of an encoder-decoder. layers, matmul: as of ``Sizes``. crossed: weights of the decoder that prompt
    tokens meet, making the keys and values of its cross-attention."""

    layers: int
    matmul: int
    crossed: int


@dataclass(frozen=True)
class Sizes:
    """Hold what of a model costs memory and time, counted on its modules (whatever device they are on).

    parameters: by part: embeddings (of positions too), trunk, head (0 where it is the embedding matrix), outside (of a
    composite model, what is not its text model), total, trainable.
    matmul: weights of the trunk that every token meets in a matrix product; of a mixture of experts, those of the experts
    that a token is sent to. head_in × vocab: the head's product. attention, kv: widths of all query heads, and of all
    key-value heads, in a layer. dropping: query heads of a layer, where attention has dropout. adapted: weights of the
    layers that have a LoRA adapter, and rank: the adapter's. encoder: of an encoder-decoder, whose layers and matmul are
    then the decoder's alone.
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
    dropping: int = 0
    parameters: dict[str, int] = field(default_factory=dict)
    adapted: int = 0
    rank: int = 0
    encoder: Reading | None = None

    @property
    def every_layer(self) -> int:
        """Layers of both stacks."""
        return self.layers + (0 if self.encoder is None else self.encoder.layers)

    @property
    def matrices(self) -> int:
        """Weights in matrix products, of both stacks."""
        return self.matmul + (0 if self.encoder is None else self.encoder.matmul)

    @property
    def plain(self) -> int:
        """Parameters of the model without its adapter, or with it merged in."""
        return self.parameters["total"] - (self.parameters["trainable"] if self.adapted else 0)

    @property
    def trainable_share(self) -> float:
        return self.parameters["trainable"] / max(1, self.parameters["total"])


def sizes(model: PreTrainedModel, vocab: int | None = None) -> Sizes:
    """Counts a model. vocab: the token ids that meet the loss; unset, the rows of the head."""
    config = model.config.get_text_config()
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
    weight = None if head is None else head.weight
    parts = dict.fromkeys(("embeddings", "trunk", "head", "outside"), 0)
    text = {id(p) for _, p in text_parameters(model)}
    read = set() if not model.config.is_encoder_decoder else {id(p) for p in model.get_encoder().parameters()}
    matmul, encoding, chosen, experts = 0, 0, *_experts(config)
    for parameter in model.parameters():
        n = parameter.numel()
        if id(parameter) not in text:
            parts["outside"] += n
        elif id(parameter) in tables:
            parts["embeddings"] += n
        elif parameter is weight:
            parts["head"] += n
        else:
            parts["trunk"] += n
            met = n if parameter.dim() == 2 else n * chosen // experts if parameter.dim() == 3 and experts else 0
            if id(parameter) in read:
                encoding += met
            else:
                matmul += met
    every = list(model.parameters())
    layers, width = getattr(config, "num_hidden_layers", 1), getattr(config, "hidden_size", 1)
    heads = getattr(config, "num_attention_heads", None) or 1
    attention = heads * (getattr(config, "head_dim", None) or width // heads)
    encoder = None
    if model.config.is_encoder_decoder:  # the plain name for the number of layers is then the encoder's
        names = ("num_decoder_layers", "decoder_layers")
        reads, layers = layers, next((n for name in names if (n := getattr(config, name, None))), layers)
        encoder = Reading(reads, encoding, crossed=layers * 2 * width * attention)
    adapters = [module for module in model.modules() if hasattr(module, "lora_A")]
    return Sizes(
        kind=config.model_type,
        layers=layers,
        width=width,
        context=context_of(config),
        vocab=vocab or (width if weight is None else weight.shape[0]),
        head_in=width if weight is None else weight.shape[1],
        matmul=matmul,
        attention=attention,
        kv=(getattr(config, "num_key_value_heads", None) or heads) * (attention // heads),
        dropping=heads if any(getattr(config, name, None) for name in _ATTENTION_DROPOUT) else 0,
        parameters={
            **parts,
            "total": sum(p.numel() for p in every),
            "trainable": sum(p.numel() for p in every if p.requires_grad),
        },
        adapted=sum(getattr(m.get_base_layer(), parameter_of(m)).numel() for m in adapters),
        rank=max((max(module.r.values()) for module in adapters), default=0),
        encoder=encoder,
    )


def has_weights(path: str) -> bool:
    """Whether a model's weights are in a directory here. Raises ModelError for a path at which nothing is."""
    if isinstance(parse_student(path), ConfigFile):
        return False
    name, local = locate(path)
    return local and any(next(Path(name).glob(pattern), None) for pattern in WEIGHTS)


def weight_bytes(path: str) -> int:
    """Size of the weight files of a model directory."""
    return sum(f.stat().st_size for pattern in WEIGHTS for f in Path(locate(path)[0]).glob(pattern))


def load_shape(
    path: str,
    *,
    revision: str | None = None,
    tokenizer: str | None = None,
    texts: Texts | None = None,
    teacher: Shape | None = None,
    max_length: int,
    made: Mapping[str, Shape] | None = None,
) -> Shape:
    """The shape that a model has: of a directory, a hub name (its config is fetched, no weights), a config.json, or one that
    is built: ``random:…``, ``layers:…`` or ``width:…``. tokenizer: a directory, a name, or one to be trained on ``texts``.
    teacher: what a student is built after. made: shapes by the names of models that are yet to be made (``stage:NAME``).

    Raises ModelError for what is no causal or encoder-decoder model, UsageError for a shape that cannot be.
    """
    known = made or {}
    if path in known:
        return known[path]
    own = _asked_tokenizer(tokenizer, texts, known)
    config = None if teacher is None else teacher.model.config
    spec = parse_student(path)
    check_has_teacher(path, spec, teacher)
    if isinstance(spec, TeacherLayers):
        with torch.device("meta"), quiet():
            whole = Backbone(teacher.model, teacher.tokenizer, teacher.vocab)
            return Shape(build_from_layers(path, whole), own or teacher.tokenizer)
    if isinstance(spec, RandomModel | TeacherWidth):
        own = own or (None if teacher is None else teacher.tokenizer)
        stand_in = own or _Unread(path, teacher)
        with torch.device("meta"), quiet():
            return Shape(build_random(path, stand_in, teacher_config=config, max_length=max_length, seed=0), own)
    file = isinstance(spec, ConfigFile)
    if file and not Path(path).expanduser().is_file():
        raise ModelError(f"no model config at {path}: no such file", hint="check the path")
    config = load_config(str(Path(path).expanduser()) if file else path, revision=revision, file=file)
    with torch.device("meta"), quiet():
        try:
            model = auto_class(config).from_config(config, dtype=torch.float32, trust_remote_code=False)
        except Exception as error:  # every family checks its sizes in its own way
            raise ModelError(f"cannot build a {config.model_type} of this shape: {error}", where=path) from error
    if not file and tied_from_scratch(model):  # a config.json is what a student is built from
        model.set_output_embeddings(copy.deepcopy(model.get_output_embeddings()))
    if own is None:
        own = _tokenizer_of(str(Path(path).expanduser().parent) if file else path, revision)
    return Shape(model.eval(), own or (teacher.tokenizer if teacher is not None else None))


class _Unread:
    """Stands for a tokenizer that is not at hand: as many ids as the teacher's matrix has rows."""

    bos_token_id = eos_token_id = pad_token_id = None

    def __init__(self, path: str, teacher: Shape | None):
        if teacher is None:
            raise ModelError(
                f"{path} needs a tokenizer", hint="pass --tokenizer DIR; bpe:1000, chars or words need the data at hand"
            )
        self._last = teacher.vocab - 1

    def get_vocab(self) -> dict[str, int]:
        return {"": self._last}


def _asked_tokenizer(
    spec: str | None, texts: Texts | None, known: Mapping[str, Shape]
) -> PreTrainedTokenizerBase | None:
    if spec is None:
        return None
    if spec in known:
        return known[spec].tokenizer
    if not is_trained_spec(spec):
        return load_tokenizer(spec)
    return None if texts is None else prepare_tokenizer(train_tokenizer(spec, texts(None)), spec)


def _tokenizer_of(path: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    """A model's own tokenizer, None where it is not at hand."""
    name, local = locate(path)
    if local and not has_tokenizer(Path(name)):
        return None
    try:
        return load_tokenizer(path, revision=revision)
    except ModelError:
        if local:  # it is there, and broken
            raise
        return None


def _experts(config: PretrainedConfig) -> tuple[int, int]:
    """(experts a token is sent to, experts in all); (0, 0) where there are none."""
    chosen = getattr(config, "num_experts_per_tok", None) or 0
    every: Any = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    return chosen, every


def student_spec(student: schema.StudentConfig) -> dict[str, Any]:
    """The student section as ``load_shape`` takes it."""
    return {"path": student.path, "revision": student.revision, "tokenizer": student.tokenizer}
