"""Load teacher and student, and check that they are compatible: architecture, vocabulary, tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distillm_cli.config import schema
from distillm_cli.config.student_spec import (
    ConfigFile,
    SharedLayers,
    TeacherLayers,
    parse_student,
)
from distillm_cli.errors import ModelError, UsageError
from distillm_cli.models import lora
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.chat_format import add_stop_tokens
from distillm_cli.models.composite import freeze_rest
from distillm_cli.models.devices import bf16_is_fast, resolve_device, resolve_dtype
from distillm_cli.models.layers import build_from_layers, check_can_copy
from distillm_cli.models.loading import check_causal, load_backbone, load_config
from distillm_cli.models.lora_targets import frozen_parts
from distillm_cli.models.model_paths import adapter_chain, locate_model, portable_name
from distillm_cli.models.placement import PlacedTeacher, dispatch_arguments
from distillm_cli.models.sharded_student import is_sharded
from distillm_cli.models.students import (
    adopt_special_tokens,
    build_from_config,
    build_random,
    check_has_teacher,
)
from distillm_cli.models.tokenizer_files import (
    TokenizerCache,
    check_reload,
    has_tokenizer,
    load_tokenizer,
    quiet,
    sentencepiece_difference,
)
from distillm_cli.models.trained_tokenizers import (
    TrainingTexts,
    append_eos,
    is_trained_spec,
    load_or_train_tokenizer,
    lost_features,
)
from distillm_cli.models.unloaded import UnloadedTeacher, find_record, load_unloaded
from distillm_cli.training.events import Listener, Note, Warned, silent
from distillm_cli.utils.storage import cache_root
from distillm_cli.utils.text import counted

if TYPE_CHECKING:
    from distillm_cli.models.shapes import Shape

__all__ = [
    "Pair",
    "bf16_is_fast",
    "check_vocabularies",
    "create_student",
    "load_backbone",
    "load_pair",
    "load_tokenizer",
    "rebuild_student",
    "reload_teacher",
    "resolve_device",
    "resolve_dtype",
]


@dataclass(frozen=True)
class Pair:
    """Hold a compatible teacher and student.

    vocab: number of shared token ids, over which the loss is computed. templates: by role, the original chat templates
    of the tokenizers. teacher_stops: ids at which the teacher's own configuration stops, its end-of-sequence first;
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
        """Return the models by role."""
        return {"student": self.student} if self.teacher is None else {"teacher": self.teacher, "student": self.student}


def load_pair(
    recipe: schema.Recipe,
    *,
    device: torch.device,
    texts: TrainingTexts | None = None,
    tokenizers: TokenizerCache | None = None,
    listener: Listener = silent,
) -> Pair:
    """Load the recipe's teacher (none for `sft`) and student, in eval mode, with a shared tokenizer.

    The teacher is frozen, unless all of its weights are trained.

    `sft` also builds a student from the teacher if the recipe does. texts: the training texts, for a tokenizer that is
    trained on them. tokenizers: cache from which the models' tokenizers are read. Raises ModelError or UsageError.
    """
    tokenizers = tokenizers or TokenizerCache()
    if recipe.student.path is not None:
        _check_student(recipe)  # before a large teacher is loaded
    teacher, is_sft = None, recipe.method == "sft"
    tokenizer = None
    if recipe.teacher.path is not None and not is_sft:
        if recipe.has_random_teacher:
            tokenizer = _student_tokenizer(recipe.student, texts, tokenizers)
            teacher = _build_teacher(recipe, tokenizer, device)
        else:
            teacher = _load_head(recipe, device, listener, tokenizers) or _load_teacher(
                recipe, device, listener, tokenizers
            )
    student = create_student(
        recipe.student,
        seed=recipe.train.seed,
        device=_student_device(recipe, device),
        teacher=_load_origin(recipe, listener) if is_sft else teacher,
        texts=texts,
        tokenizer=None if recipe.student.tokenizer is None else tokenizer,
        tokenizers=tokenizers,
        max_length=recipe.data.max_length,
        listener=listener,
    )
    if teacher is not None and recipe.has_random_teacher:
        teacher.tokenizer = student.tokenizer
    if teacher is not None:
        check_architectures(teacher, student)
    for path, revision, tokenizer in _loaded_tokenizers(recipe, teacher, student):
        if difference := sentencepiece_difference(path, revision, tokenizer):
            listener(Warned(difference))
    is_borrowed = _is_borrowed(recipe.student)
    text = next(texts(student.tokenizer), None) if texts and is_borrowed else None
    check_reload(student, is_borrowed=is_borrowed, text=text)
    templates, stops = {"student": student.tokenizer.chat_template}, None
    if teacher is not None:
        templates["teacher"] = teacher.tokenizer.chat_template
        eos = teacher.tokenizer.eos_token_id
        stops = (eos, *sorted(teacher.stop_ids - {eos}))
        own = student.tokenizer
        check_vocabularies(teacher.tokenizer, own)
        _share_tokens(teacher, student)
        if dropped := lost_features(own, student.tokenizer):
            listener(
                Warned(
                    f"the student uses the teacher's tokenizer, whose tokens both models have; its own {dropped} dropped"
                )
            )
    return Pair(teacher, student, student.tokenizer, student.vocab, templates, stops)


def _check_student(recipe: schema.Recipe) -> None:
    """Raise UsageError for a malformed specification, ModelError for layers that the teacher's config shows not to fit."""
    path = recipe.student.required_path
    spec = parse_student(path)
    if isinstance(spec, SharedLayers) and recipe.teacher.path is not None:
        check_can_copy(path, spec, load_config(recipe.teacher.path, revision=recipe.teacher.revision))


def _load_teacher(
    recipe: schema.Recipe,
    device: torch.device,
    listener: Listener = silent,
    tokenizers: TokenizerCache | None = None,
) -> Backbone:
    """Load the recipe's teacher: frozen, or in float32 and with the student's dropout if all of its weights are trained."""
    teacher = recipe.teacher
    if teacher.server is not None and recipe.method != "sft":  # fine-tuning may copy the teacher's layers
        from distillm_cli.models.served import load_served_teacher

        return load_served_teacher(
            teacher.path,
            teacher.server,
            dtype=resolve_dtype(recipe.teacher_dtype, device),
            device=device,
            revision=teacher.revision,
            tokenizers=tokenizers,
        )
    in_host_memory = teacher.offload or teacher.device_map == "cpu"
    model = load_backbone(
        teacher.path,
        dtype=_teacher_dtype(recipe, device),
        device=torch.device("cpu") if in_host_memory else device,
        revision=teacher.revision,
        dropout=recipe.student.dropout if recipe.ctcd.enabled else None,
        quantize=teacher.quantize,
        dispatch=dispatch_arguments(teacher, device),
        tokenizers=tokenizers,
        listener=listener,
    )
    if recipe.ctcd.enabled:
        freeze_rest(model.model)
    else:
        model.requires_grad_(False)
    if teacher.offload or teacher.device_map != "none":
        return PlacedTeacher(model, device, is_offloaded=teacher.offload)
    return model


def _teacher_dtype(recipe: schema.Recipe, device: torch.device) -> torch.dtype:
    """Return the dtype of the teacher's weights, for the device that it computes on."""
    return resolve_dtype(recipe.teacher_dtype, torch.device("cpu") if recipe.teacher.device_map == "cpu" else device)


def _load_head(
    recipe: schema.Recipe, device: torch.device, listener: Listener, tokenizers: TokenizerCache
) -> UnloadedTeacher | None:
    """Load the teacher's head alone, for a run that may read all states from a cache; None if it needs the model."""
    teacher = recipe.teacher
    if not recipe.may_read_all_states or teacher.revision is not None:
        return None
    dtype = _teacher_dtype(recipe, device)
    record = find_record(cache_root("teacher", teacher.cache_dir), teacher.path, dtype)
    if record is None:
        return None
    tokenizer = tokenizers.load(teacher.path, None)
    return load_unloaded(
        teacher.path, record, tokenizer, dtype, device, lambda: _load_teacher(recipe, device, listener, tokenizers)
    )


def _build_teacher(recipe: schema.Recipe, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Backbone:
    """Build the teacher ``random:[FAMILY:]LAYERSxWIDTH``, by default of the family of a student that is loaded.

    Its seed is the run's + 1, so that it does not start with the student's numbers.
    """
    student = recipe.student
    with quiet():
        model = build_random(
            recipe.teacher.path,
            tokenizer,
            teacher_config=None if student.is_built else load_config(student.path, revision=student.revision),
            max_length=recipe.data.max_length,
            seed=recipe.train.seed + 1,
            dropout=student.dropout,
        )
    return Backbone(model.to(device), tokenizer)


def rebuild_teacher(recipe: schema.Recipe, pair: Pair) -> Backbone:
    """Return the pair's trained teacher with its weights from before training, on the CPU."""
    if recipe.has_random_teacher:
        return _build_teacher(recipe, pair.tokenizer, torch.device("cpu"))
    return _load_teacher(recipe, torch.device("cpu"))


def _student_tokenizer(
    student: schema.StudentConfig, texts: TrainingTexts | None, tokenizers: TokenizerCache
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a run without a loaded teacher: the configured one, else the student's own."""
    tokenizer = _configured_tokenizer(student, texts)
    if tokenizer is None and not student.is_built:
        tokenizer = tokenizers.load(student.required_path, student.revision)
    if tokenizer is None:
        raise ModelError(
            "model.no_tokenizer",
            f"{student.path} needs a tokenizer, and the teacher has random weights",
            hint="pass --tokenizer DIR, or one trained on the data: bpe:1000, chars, words",
        )
    return tokenizer


def _load_origin(recipe: schema.Recipe, listener: Listener = silent) -> Backbone | None:
    """Load the model that a student is built from, if it is not the loaded teacher; None for a student that is loaded."""
    if recipe.teacher.path is None or not recipe.student.is_built:
        return None
    teacher = recipe.teacher.model_copy(update={"quantize": "none", "device_map": "none", "offload": False})
    return _load_teacher(recipe.model_copy(update={"teacher": teacher}), torch.device("cpu"), listener)


def _share_tokens(teacher: Backbone, student: Backbone) -> None:
    """Use the tokenizer with fewer ids for both models, so that every target is a token of both."""
    if teacher.vocab < student.vocab:
        student.tokenizer = teacher.tokenizer
        adopt_special_tokens(student.model, student.tokenizer)
    teacher.tokenizer = student.tokenizer
    teacher.vocab = student.vocab = min(teacher.vocab, student.vocab)


def share_vocabulary(teacher: Backbone, student: Backbone) -> None:
    """Cut both models to the token ids that both have, to compare them on the student's token sequences.

    Raises ModelError for models of different kinds or vocabularies.
    """
    check_architectures(teacher, student)
    check_vocabularies(teacher.tokenizer, student.tokenizer)
    teacher.vocab = student.vocab = min(teacher.vocab, student.vocab)


def reload_teacher(recipe: schema.Recipe, pair: Pair, device: torch.device) -> Backbone:
    """Load the pair's teacher again after its weights were released."""
    teacher = _load_teacher(recipe, device)
    _share_tokens(teacher, pair.student)
    add_stop_tokens(teacher, sorted(pair.teacher.stop_ids))
    teacher.own_logits = pair.teacher.own_logits
    return teacher


def rebuild_student(recipe: schema.Recipe, pair: Pair, device: torch.device) -> Backbone:
    """Return the pair's student with its initial weights, without changing the random state."""
    teacher = pair.teacher
    is_released = teacher is not None and teacher.device.type == "meta"
    is_changed = recipe.teacher_trainer is not None and not recipe.has_random_teacher  # its layers may be copied
    if teacher is None or ((is_released or is_changed) and recipe.student.is_built):
        teacher = _load_origin(recipe)
    with torch.random.fork_rng(devices=[]):
        student = create_student(
            recipe.student,
            seed=recipe.train.seed,
            device=_student_device(recipe, device),
            teacher=teacher,
            tokenizer=pair.tokenizer,
            max_length=recipe.data.max_length,
        )
    if pair.teacher is not None:
        _share_tokens(pair.teacher, student)
    return student


def _student_device(recipe: schema.Recipe, device: torch.device) -> torch.device | None:
    """Return the device on which the student is created: None if it will be distributed."""
    return None if is_sharded(recipe.train.shard) and recipe.student.quantize == "none" else device


def create_student(
    student: schema.StudentConfig,
    *,
    seed: int,
    device: torch.device | None,
    teacher: Backbone | None = None,
    texts: TrainingTexts | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokenizers: TokenizerCache | None = None,
    max_length: int,
    listener: Listener = silent,
) -> Backbone:
    """Load or build the model to train: float32 parameters, in eval mode, with a LoRA adapter if one is configured.

    device: None for a student that will be distributed. Its weights are on the CPU; those of a loaded one stay mapped from
    its files, if their dtype permits it (``stored_weights.load_stored``).

    Its tokenizer is the argument, else the configured one, else its own, else the teacher's. tokenizers: as in
    `load_pair`. max_length: tokens of the longest example, which sizes the context of a model built without a teacher.
    seed: of random weights.
    """
    path = student.path
    if path is None:
        raise UsageError(
            "usage.no_model",
            "no model to train",
            hint="pass --student PATH, or --student random:4x256 to start from scratch",
        )
    tokenizer = tokenizer or _configured_tokenizer(student, texts)
    check_has_teacher(path, parse_student(path), teacher)
    if student.is_built:
        backbone = _built_student(student, teacher, tokenizer, seed=seed, max_length=max_length)
        backbone.model.to(device or torch.device("cpu"))
    else:
        backbone = _loaded_student(student, device, teacher, tokenizer, tokenizers, listener)
    if frozen := freeze_rest(backbone.model):
        kind = backbone.model.config.model_type
        listener(Note(f"{kind}: the text model is trained; {frozen:,} other weights are frozen"))
    if device is None:
        backbone.is_to_be_sharded = True
        backbone.stop_cpu_forward()  # it copies weights, and a distributed student does not use it
    if student.lora.r is not None:
        if backbone.adapter is None:
            base = student.path if student.is_built else portable_name(student.path)
            backbone.adapter = lora.attach(
                backbone.model, student.lora, seed=seed, base=base, revision=student.revision
            )
        backbone.model.eval()
        _report_adapter(backbone, listener)
    return backbone


def _report_adapter(backbone: Backbone, listener: Listener) -> None:
    config, parameters = backbone.adapter.config, list(backbone.parameters())
    train = sum(p.numel() for p in parameters if p.requires_grad)
    every = sum(p.numel() for p in parameters)
    layers = counted(sum(1 for _ in backbone.adapter.layers()), "layer")
    listener(
        Note(
            f"LoRA adapter, r {config.r}, α {config.lora_alpha:g}, in {layers}: "
            f"{train:,} trainable weights ({train / every:.2%} of {every:,})"
        )
    )
    if backbone.adapter.config.target_parameters:
        frozen = ", ".join(frozen_parts(backbone.model)) or "none"
        listener(
            Note(
                "mixture of experts: the adapter has no dropout, which peft does not support for experts; frozen matrices "
                f"of its layers: {frozen}"
            )
        )


def _built_student(
    student: schema.StudentConfig,
    teacher: Backbone | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seed: int,
    max_length: int,
) -> Backbone:
    """Return a student with random weights or with layers of the teacher. tokenizer: None for the teacher's."""
    path = student.required_path
    spec = parse_student(path)
    if isinstance(spec, TeacherLayers | SharedLayers):
        with quiet():
            model = build_from_layers(path, teacher, dropout=student.dropout)
        return Backbone(model, tokenizer or teacher.tokenizer)
    if isinstance(spec, ConfigFile):
        file = Path(path).expanduser()
        if not file.is_file():
            raise ModelError("model.no_config", f"no model config at {file}: no such file", hint="check the path")
        config = load_config(str(file), file=True)
        if tokenizer is None and teacher is None and has_tokenizer(file.parent):
            tokenizer = load_tokenizer(str(file.parent))
        tokenizer = tokenizer or _teacher_tokenizer(teacher, path)
        with quiet():
            model = build_from_config(config, tokenizer, seed=seed, dropout=student.dropout, where=path)
        check_causal(path, model)
    else:
        config = None if teacher is None else teacher.model.config
        tokenizer = tokenizer or _teacher_tokenizer(teacher, path)
        with quiet():
            model = build_random(
                path, tokenizer, teacher_config=config, max_length=max_length, seed=seed, dropout=student.dropout
            )
    _append_eos_to_prompts(student, model, tokenizer)
    return Backbone(model, tokenizer)


def _loaded_student(
    student: schema.StudentConfig,
    device: torch.device | None,
    teacher: Backbone | None,
    tokenizer: PreTrainedTokenizerBase | None,
    tokenizers: TokenizerCache | None,
    listener: Listener,
) -> Backbone:
    """Load a student's weights, without a new adapter. A loaded adapter is kept if it is to be trained.

    device, tokenizers: as in ``create_student``. tokenizer: None for its own, or for the teacher's if it has none.
    """
    path = student.required_path
    is_mapped = device is None and student.lora.r is None  # peft rounds a new adapter to the dtype of the weights
    device = device or torch.device("cpu")
    if tokenizer is None and teacher is not None:
        adapters, base, _ = adapter_chain(path, student.revision)
        locations = [*((adapter.name, adapter.local) for adapter in adapters), locate_model(base)]
        has_none = all(local and not has_tokenizer(Path(name)) for name, local in locations)
        tokenizer = teacher.tokenizer if has_none else None
    if student.lora.r is None and adapter_chain(path, student.revision)[0]:
        listener(
            Note(
                f"the adapter {path} is merged into its model, and all weights are trained (--lora R trains only "
                "the adapter)"
            )
        )
    dtype = None if is_mapped else torch.float32
    return load_backbone(
        path,
        dtype=dtype if student.quantize == "none" else resolve_dtype(student.dtype, device),
        device=device,
        revision=student.revision,
        quantize=student.quantize,
        tokenizer=tokenizer,
        tokenizers=tokenizers,
        dropout=student.dropout,
        train=None if student.lora.r is None else student.lora,
        listener=listener,
    )


def check_architectures(teacher: Backbone | Shape, student: Backbone | Shape) -> None:
    """Raise ModelError if one is causal and the other an encoder-decoder: their predictions have different inputs."""
    if teacher.is_encoder_decoder == student.is_encoder_decoder:
        return
    kinds = {True: "an encoder-decoder model", False: "a causal model"}
    described = [f"{kinds[m.is_encoder_decoder]} ({m.model.config.model_type})" for m in (teacher, student)]
    raise ModelError(
        "model.different_kinds",
        f"the teacher is {described[0]} and the student {described[1]}",
        where="their predictions of a response token have different inputs",
        hint="choose a student of the same kind, or --student random:4x256, which has the teacher's family",
    )


def check_vocabularies(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Check that both map every shared id to the same token. One may have additional (special) tokens.

    Raises ModelError with the first difference.
    """
    if student is teacher:
        return
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    hint = "choose a student of the teacher's family, or --student random:4x256, which uses the teacher's tokenizer"
    ours_by_id, theirs_by_id = ({i: token for token, i in vocab.items()} for vocab in (ours, theirs))
    sizes = f"teacher {len(theirs):,} tokens, student {len(ours):,}"
    if differing := [i for i, token in theirs_by_id.items() if ours_by_id.get(i, token) != token]:
        i = min(differing)
        raise ModelError(
            "model.different_vocabularies",
            f"teacher and student have different vocabularies: token {i} is {theirs_by_id[i]!r} for the teacher, "
            f"{ours_by_id[i]!r} for the student",
            where=sizes,
            hint=hint,
        )
    for role, tokens, others, added in (
        ("teacher", theirs_by_id, ours_by_id, set(teacher.get_added_vocab().values())),
        ("student", ours_by_id, theirs_by_id, set(student.get_added_vocab().values())),
    ):
        if extra := [i for i in tokens if i not in others and i not in added]:
            i = min(extra)
            raise ModelError(
                "model.different_vocabularies",
                f"teacher and student have different vocabularies: token {i}, {tokens[i]!r}, exists only in the {role}",
                where=sizes,
                hint=hint,
            )


def _loaded_tokenizers(
    recipe: schema.Recipe, teacher: Backbone | None, student: Backbone
) -> Iterator[tuple[str, str | None, PreTrainedTokenizerBase]]:
    """Yield path, revision and tokenizer of the models with their own tokenizer; each tokenizer once."""
    if not _is_borrowed(recipe.student):
        yield recipe.student.path, recipe.student.revision, student.tokenizer
    if teacher is not None and teacher.tokenizer is not student.tokenizer:
        yield recipe.teacher.path, recipe.teacher.revision, teacher.tokenizer


def _is_borrowed(student: schema.StudentConfig) -> bool:
    """Return whether the tokenizer is not the student's original one."""
    return student.tokenizer is not None or student.is_built


def _configured_tokenizer(student: schema.StudentConfig, texts: TrainingTexts | None) -> PreTrainedTokenizerBase | None:
    tokenizer = load_or_train_tokenizer(student.tokenizer, texts)
    if tokenizer is None and student.tokenizer is not None:
        what = f"a {student.tokenizer} tokenizer is trained on data, but there is none"
        raise ModelError("model.no_tokenizer", what, hint="pass a tokenizer directory")
    return tokenizer


def _append_eos_to_prompts(
    student: schema.StudentConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Make a tokenizer that was trained for an encoder-decoder end every text, like T5's.

    After loading the output directory, the input is then the same as in training.
    """
    if model.config.is_encoder_decoder and student.tokenizer is not None and is_trained_spec(student.tokenizer):
        append_eos(tokenizer)


def _teacher_tokenizer(teacher: Backbone | None, path: str) -> PreTrainedTokenizerBase:
    if teacher is None:
        raise ModelError(
            "model.no_tokenizer",
            f"{path} needs a tokenizer",
            hint="pass --tokenizer DIR, or one trained on the data: bpe:1000, chars, words",
        )
    return teacher.tokenizer
