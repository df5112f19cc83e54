"""Teacher and student: where they run, in what precision, and whether they speak the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distillm_cli.config import schema
from distillm_cli.config.student_spec import ConfigFile, RandomModel, TeacherLayers, TeacherWidth, parse_student
from distillm_cli.errors import ModelError, UsageError
from distillm_cli.models import lora
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.composite import freeze_rest
from distillm_cli.models.conversation import add_stops
from distillm_cli.models.devices import bf16_is_fast, resolve_device, resolve_dtype
from distillm_cli.models.layers import build_from_layers
from distillm_cli.models.loading import check_causal, load_backbone, load_config
from distillm_cli.models.places import adapters_of, lasting, locate
from distillm_cli.models.round_trip import check_reload, differs_from_file
from distillm_cli.models.students import (
    adopt_special_tokens,
    build_from_config,
    build_random,
    check_has_teacher,
)
from distillm_cli.models.targets import frozen_parts
from distillm_cli.models.tokenizer_files import (
    OwnTokenizers,
    has_tokenizer,
    load_tokenizer,
    prepare_tokenizer,
    quiet,
)
from distillm_cli.models.tokenizers import is_trained_spec, lost_with, put_end, train_tokenizer
from distillm_cli.training.events import Listener, Note, Warned, silent
from distillm_cli.utils.text import counted

if TYPE_CHECKING:
    from distillm_cli.models.shapes import Shape

__all__ = [
    "Pair",
    "bf16_is_fast",
    "check_vocabularies",
    "load_backbone",
    "load_pair",
    "load_student",
    "load_tokenizer",
    "resolve_device",
    "resolve_dtype",
    "student_again",
    "teacher_again",
]

# Prompts and responses in turn; prompts as this tokenizer's chat template writes them (None: it is yet to be trained).
Texts = Callable[[PreTrainedTokenizerBase | None], Iterator[str]]


@dataclass(frozen=True)
class Pair:
    """Hold models that fit together.

    vocab: the token ids that both know, which is what meets the loss. templates: by role, the chat templates that the
    tokenizers came with. teacher_stops: ids at which the teacher's own configuration stops, its end-of-sequence first;
    None without a teacher.
    """

    teacher: Backbone | None
    student: Backbone
    tokenizer: PreTrainedTokenizerBase
    vocab: int
    templates: dict[str, str | dict[str, str] | None] = field(default_factory=dict)
    teacher_stops: tuple[int, ...] | None = None

    @property
    def models(self) -> dict[str, Backbone]:
        """By role, those that are there."""
        return {"student": self.student} if self.teacher is None else {"teacher": self.teacher, "student": self.student}


def load_pair(
    recipe: schema.Recipe,
    *,
    device: torch.device,
    texts: Texts | None = None,
    tokenizers: OwnTokenizers | None = None,
    listener: Listener = silent,
) -> Pair:
    """The recipe's teacher (frozen; none for `sft`) and student, both in eval mode, sharing tokenizer and vocabulary.

    A student that is built of the teacher is so for `sft` too. texts: the training texts, for a tokenizer that is trained
    on them. tokenizers: those of the models, as far as they have been read. Raises ModelError or UsageError.
    """
    tokenizers = tokenizers or OwnTokenizers()
    if recipe.student.path is not None:
        parse_student(recipe.student.path)  # a typing error is reported before a large teacher is loaded
    teacher, is_sft = None, recipe.method == "sft"
    if recipe.teacher.path is not None and not is_sft:
        teacher = _load_teacher(recipe.teacher, device, listener, tokenizers)
    student = load_student(
        recipe.student,
        seed=recipe.train.seed,
        device=device,
        teacher=_model_for(recipe, listener) if is_sft else teacher,
        texts=texts,
        tokenizers=tokenizers,
        max_length=recipe.data.max_length,
        listener=listener,
    )
    if teacher is not None:
        check_kinds(teacher, student)
    for path, revision, tokenizer in _tokenizers_read(recipe, teacher, student):
        if wrong := differs_from_file(path, revision, tokenizer):
            listener(Warned(wrong))
    borrowed = _is_borrowed(recipe.student)
    text = next(texts(student.tokenizer), None) if texts and borrowed else None
    check_reload(student, borrowed=borrowed, text=text)
    templates, stops = {"student": student.tokenizer.chat_template}, None
    if teacher is not None:
        templates["teacher"] = teacher.tokenizer.chat_template
        eos = teacher.tokenizer.eos_token_id
        stops = (eos, *sorted(teacher.stop_ids - {eos}))
        check_vocabularies(teacher.tokenizer, own := student.tokenizer)
        _share_tokens(teacher, student)
        if lost := lost_with(own, student.tokenizer):
            listener(Warned(f"the student gets the teacher's tokenizer, whose tokens both know; its own {lost} lost"))
    return Pair(teacher, student, student.tokenizer, student.vocab, templates, stops)


def _load_teacher(
    teacher: schema.TeacherConfig,
    device: torch.device,
    listener: Listener = silent,
    tokenizers: OwnTokenizers | None = None,
) -> Backbone:
    dtype = resolve_dtype(teacher.dtype, device)
    model = load_backbone(
        teacher.path,
        dtype=dtype,
        device=device,
        revision=teacher.revision,
        quantize=teacher.quantize,
        tokenizers=tokenizers,
        listener=listener,
    )
    model.requires_grad_(False)
    return model


def _model_for(recipe: schema.Recipe, listener: Listener = silent) -> Backbone | None:
    """What a student is built after where nobody teaches it, or its teacher has left; None for one that is loaded."""
    if recipe.teacher.path is None or not recipe.student.is_built:
        return None
    return _load_teacher(recipe.teacher.model_copy(update={"quantize": "none"}), torch.device("cpu"), listener)


def _share_tokens(teacher: Backbone, student: Backbone) -> None:
    """The one with fewer ids writes the batches, so that every target is a token both models know."""
    if teacher.vocab < student.vocab:
        student.tokenizer = teacher.tokenizer
        adopt_special_tokens(student.model, student.tokenizer)
    teacher.tokenizer = student.tokenizer
    teacher.vocab = student.vocab = min(teacher.vocab, student.vocab)


def teacher_again(recipe: schema.Recipe, pair: Pair, device: torch.device) -> Backbone:
    """The pair's teacher, whose weights have left memory, as it was."""
    teacher = _load_teacher(recipe.teacher, device)
    _share_tokens(teacher, pair.student)
    add_stops(teacher, sorted(pair.teacher.stop_ids))
    teacher.own_logits = pair.teacher.own_logits
    return teacher


def student_again(recipe: schema.Recipe, pair: Pair, device: torch.device) -> Backbone:
    """The pair's student as it was before its first step; no random state moves."""
    teacher = pair.teacher
    if teacher is None or (teacher.device.type == "meta" and recipe.student.is_built):
        teacher = _model_for(recipe)
    with torch.random.fork_rng(devices=[]):
        student = load_student(
            recipe.student,
            seed=recipe.train.seed,
            device=device,
            teacher=teacher,
            tokenizer=pair.tokenizer,
            max_length=recipe.data.max_length,
        )
    if pair.teacher is not None:
        _share_tokens(pair.teacher, student)
    return student


def load_student(
    student: schema.StudentConfig,
    *,
    seed: int,
    device: torch.device,
    teacher: Backbone | None = None,
    texts: Texts | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokenizers: OwnTokenizers | None = None,
    max_length: int,
    listener: Listener = silent,
) -> Backbone:
    """The model to train, float32 parameters, in eval mode: loaded or built, under a LoRA adapter where one is asked for.

    Its tokenizer is the one given, else the one asked for, else its own, else the teacher's. tokenizers: as of `load_pair`.
    max_length: tokens of the longest example, which sizes the context of a model built without a teacher. seed: of random
    weights.
    """
    backbone = _whole_student(student, seed, device, teacher, texts, tokenizer, tokenizers, max_length, listener)
    if frozen := freeze_rest(backbone.model):
        kind = backbone.model.config.model_type
        listener(Note(f"{kind}: the text model trains; {frozen:,} weights outside it stay as they are"))
    if student.lora.r is not None:
        if backbone.adapter is None:
            base = student.path if student.is_built else lasting(student.path)
            backbone.adapter = lora.attach(
                backbone.model, student.lora, seed=seed, base=base, revision=student.revision
            )
        backbone.model.eval()
        _tell_of(backbone, listener)
    return backbone


def _tell_of(backbone: Backbone, listener: Listener) -> None:
    config, parameters = backbone.adapter.config, list(backbone.parameters())
    train = sum(p.numel() for p in parameters if p.requires_grad)
    every = sum(p.numel() for p in parameters)
    layers = counted(sum(1 for _ in backbone.adapter.layers()), "layer")
    listener(
        Note(
            f"LoRA adapter, r {config.r}, α {config.lora_alpha:g}, in {layers}: "
            f"{train:,} weights train ({train / every:.2%} of {every:,})"
        )
    )
    if backbone.adapter.config.target_parameters:
        frozen = ", ".join(frozen_parts(backbone.model)) or "none"
        listener(
            Note(
                "mixture of experts: the adapter has no dropout, which peft cannot apply to experts; matrices of its "
                f"layers that stay frozen: {frozen}"
            )
        )


def _whole_student(
    student: schema.StudentConfig,
    seed: int,
    device: torch.device,
    teacher: Backbone | None,
    texts: Texts | None,
    tokenizer: PreTrainedTokenizerBase | None,
    tokenizers: OwnTokenizers | None,
    max_length: int,
    listener: Listener,
) -> Backbone:
    """The model without the adapter, unless it comes as one and goes on training it."""
    path = student.path
    if path is None:
        raise UsageError(
            "no model to train", hint="pass --student PATH, or --student random:4x256 to start from scratch"
        )
    tokenizer = tokenizer or _asked_tokenizer(student, texts)
    spec = parse_student(path)
    check_has_teacher(path, spec, teacher)
    if isinstance(spec, TeacherLayers):
        with quiet():
            model = build_from_layers(path, teacher, dropout=student.dropout)
        return Backbone(model.to(device), tokenizer or teacher.tokenizer)
    if isinstance(spec, RandomModel | TeacherWidth):
        config = None if teacher is None else teacher.model.config
        tokenizer = tokenizer or _teachers(teacher, path)
        with quiet():
            model = build_random(
                path, tokenizer, teacher_config=config, max_length=max_length, seed=seed, dropout=student.dropout
            )
        _end_prompts(student, model, tokenizer)
        return Backbone(model.to(device), tokenizer)
    if isinstance(spec, ConfigFile):
        file = Path(path).expanduser()
        if not file.is_file():
            raise ModelError(f"no model config at {file}: no such file", hint="check the path")
        config = load_config(str(file), file=True)
        if tokenizer is None and teacher is None and has_tokenizer(file.parent):
            tokenizer = load_tokenizer(str(file.parent))
        tokenizer = tokenizer or _teachers(teacher, path)
        with quiet():
            model = build_from_config(config, tokenizer, seed=seed, dropout=student.dropout, where=path)
        check_causal(path, model)
        _end_prompts(student, model, tokenizer)
        return Backbone(model.to(device), tokenizer)
    if tokenizer is None and teacher is not None:
        adapters, base, _ = adapters_of(path, student.revision)
        places = [*((place.name, place.local) for place in adapters), locate(base)]
        without = all(local and not has_tokenizer(Path(name)) for name, local in places)
        tokenizer = teacher.tokenizer if without else None
    if student.lora.r is None and adapters_of(path, student.revision)[0]:
        listener(
            Note(f"the adapter {path} is merged into its model, and every weight trains (--lora R trains it alone)")
        )
    return load_backbone(
        path,
        dtype=torch.float32,
        device=device,
        revision=student.revision,
        tokenizer=tokenizer,
        tokenizers=tokenizers,
        dropout=student.dropout,
        train=None if student.lora.r is None else student.lora,
        listener=listener,
    )


def check_kinds(teacher: Backbone | Shape, student: Backbone | Shape) -> None:
    """Raises ModelError where one is causal and the other an encoder-decoder: they do not predict from the same text."""
    if teacher.is_encoder_decoder == student.is_encoder_decoder:
        return
    kinds = {True: "an encoder-decoder model", False: "a causal model"}
    told = [f"{kinds[m.is_encoder_decoder]} ({m.model.config.model_type})" for m in (teacher, student)]
    raise ModelError(
        f"the teacher is {told[0]} and the student {told[1]}",
        where="their states at a response token say different things",
        hint="take a student of the teacher's kind, or --student random:4x256, which is of the teacher's family",
    )


def check_vocabularies(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Both must give every shared id the same token; one may have further added (special) tokens.

    Raises ModelError naming the first difference.
    """
    if student is teacher:
        return
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    hint = "take a student of the teacher's family, or --student random:4x256, which uses the teacher's tokenizer"
    ours_by_id, theirs_by_id = ({i: token for token, i in vocab.items()} for vocab in (ours, theirs))
    sizes = f"teacher {len(theirs):,} tokens, student {len(ours):,}"
    if differing := [i for i, token in theirs_by_id.items() if ours_by_id.get(i, token) != token]:
        i = min(differing)
        raise ModelError(
            f"teacher and student have different vocabularies: token {i} is {theirs_by_id[i]!r} for the teacher, "
            f"{ours_by_id[i]!r} for the student",
            where=sizes,
            hint=hint,
        )
    for whose, tokens, others, added in (
        ("teacher", theirs_by_id, ours_by_id, set(teacher.get_added_vocab().values())),
        ("student", ours_by_id, theirs_by_id, set(student.get_added_vocab().values())),
    ):
        if extra := [i for i in tokens if i not in others and i not in added]:
            i = min(extra)
            raise ModelError(
                f"teacher and student have different vocabularies: token {i}, {tokens[i]!r}, is the {whose}'s alone",
                where=sizes,
                hint=hint,
            )


def _tokenizers_read(
    recipe: schema.Recipe, teacher: Backbone | None, student: Backbone
) -> Iterator[tuple[str, str | None, PreTrainedTokenizerBase]]:
    """Yield where the models' own tokenizers were read, with its revision, and the tokenizers; each once."""
    if not _is_borrowed(recipe.student):
        yield recipe.student.path, recipe.student.revision, student.tokenizer
    if teacher is not None and teacher.tokenizer is not student.tokenizer:
        yield recipe.teacher.path, recipe.teacher.revision, teacher.tokenizer


def _is_borrowed(student: schema.StudentConfig) -> bool:
    """Whether the tokenizer is not the one that came with the student."""
    return student.tokenizer is not None or student.is_built


def _asked_tokenizer(student: schema.StudentConfig, texts: Texts | None) -> PreTrainedTokenizerBase | None:
    spec = student.tokenizer
    if spec is None:
        return None
    if not is_trained_spec(spec):
        return load_tokenizer(spec)
    if texts is None:
        raise ModelError(f"a {spec} tokenizer is trained on data, and there is none", hint="pass a tokenizer directory")
    return prepare_tokenizer(train_tokenizer(spec, texts(None)), spec)


def _end_prompts(student: schema.StudentConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokenizer trained for an encoder-decoder ends every text, as T5's does, so that whoever loads it feeds the model
    what it was trained on."""
    if model.config.is_encoder_decoder and student.tokenizer is not None and is_trained_spec(student.tokenizer):
        put_end(tokenizer)


def _teachers(teacher: Backbone | None, path: str) -> PreTrainedTokenizerBase:
    if teacher is None:
        raise ModelError(
            f"{path} needs a tokenizer", hint="pass --tokenizer DIR, or one trained on the data: bpe:1000, chars, words"
        )
    return teacher.tokenizer
