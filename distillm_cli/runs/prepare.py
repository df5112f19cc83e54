"""Prepare a run from a resolved recipe: rows, models and tokenized examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from distillm_cli.config.schema import DataConfig, Recipe, TrainConfig, chosen
from distillm_cli.data.batching import Examples, MixedOrder, Order, by_source, tokenize
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.prefetch import Prefetcher
from distillm_cli.data.rows import Row
from distillm_cli.data.sides import describe_sides, with_teacher_prompts
from distillm_cli.data.sources import Rows, named_parts, overlap
from distillm_cli.data.teacher_samples import encode_teacher_samples, read_teacher_samples
from distillm_cli.data.templates import Renderer, resolve_auto_template
from distillm_cli.data.token_ids import Affixes
from distillm_cli.data.token_store import open_tokens
from distillm_cli.errors import DataError, ModelError
from distillm_cli.models import router
from distillm_cli.models.chat_format import add_stop_tokens, generation_config
from distillm_cli.models.composite import copy_processor, is_composite
from distillm_cli.models.devices import check_offload, resolve_device, resolve_dtype
from distillm_cli.models.model_families import longrope_bound
from distillm_cli.models.shared import save_plain
from distillm_cli.models.tokenizer_files import TokenizerCache, quiet
from distillm_cli.runs.source_shares import source_figures, wanted_rows
from distillm_cli.runs.start import prefetch_rows, tokenizer_candidates
from distillm_cli.teachers.teacher_cache import cached_date
from distillm_cli.training.distributed import in_first_process
from distillm_cli.training.events import Listener, Note, Warned
from distillm_cli.types import Rollout, Sequence, collate, pass_overhead, rows_digest
from distillm_cli.utils.memory import resume_garbage_collection, return_freed_memory
from distillm_cli.utils.modules import weights_fingerprint
from distillm_cli.utils.optimizers import check_optimizer
from distillm_cli.utils.storage import cache_root
from distillm_cli.utils.text import counted, described_source
from distillm_cli.utils.threads import set_threads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distillm_cli.models.backbone import Backbone
    from distillm_cli.models.lora import Adapter
    from distillm_cli.models.pair import Pair

FROZEN = "frozen.txt"  # in a checkpoint: fingerprint of the weights below an adapter
_PROBE_TOKENS = 8  # for the check of the heads


def total_steps(train: TrainConfig, steps_per_epoch: int) -> int:
    """Return the optimizer steps of a whole run."""
    return train.steps or max(1, math.ceil(chosen(train.epochs) * steps_per_epoch))


def frozen_digest(adapter: Adapter) -> str:
    """Return a fingerprint of the frozen weights below an adapter."""
    return weights_fingerprint(adapter.frozen())


@dataclass(frozen=True)
class Prepared:
    """Hold the prepared inputs of a run: rows, compatible models, tokenized examples.

    initial_weights: returns the student's initial weights; None: load or build the student again. before: the run before
    the student was pre-trained (``student.ptp``), whose initial weights are its own. teacher_samples: by
    row, if the recipe names a file of them. model_fingerprints: of the loaded models, by role. resolved_values: values
    for fields that are not set in the recipe, with their origin. router_aux: weight of the auxiliary loss of the
    student's routers. stages: directories of finished stages before the run that its extras read, by name.
    teacher_encoder: of the prompts that the teacher sees; None if they are the same. overlap: number of held-out prompts
    that are trained on too.
    """

    recipe: Recipe
    listener: Listener
    device: torch.device
    dtype: torch.dtype
    train_rows: Rows
    valid_rows: Rows
    pair: Pair
    encoder: Encoder
    train: Examples
    valid: Examples
    initial_weights: Callable[[], Mapping[str, torch.Tensor]] | None = None
    before: Prepared | None = None
    teacher_samples: dict[int, list[Rollout]] | None = None
    model_fingerprints: Mapping[str, str] = field(default_factory=dict)
    resolved_values: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    router_aux: float = 0.0
    stages: Mapping[str, Path] = field(default_factory=dict)
    teacher_encoder: Encoder | None = None
    overlap: int = 0

    @property
    def student(self) -> Backbone:
        return self.pair.student

    @property
    def teacher(self) -> Backbone:
        """Return the teacher, which every run but fine-tuning has."""
        assert self.pair.teacher is not None
        return self.pair.teacher

    def encoder_of(self, model: Backbone) -> Encoder:
        """Return the encoder of the prompts that a model of the run sees."""
        return self.encoder if model is self.student or self.teacher_encoder is None else self.teacher_encoder

    @property
    def sft(self) -> bool:
        return self.recipe.method == "sft"

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Return fingerprints of the run's models and rows, by name. A resume compares them."""
        rows = {"training rows": self.train.sequences, "held-out rows": self.valid.sequences}
        if self.teacher_samples is not None:
            rows["teacher samples"] = [s for _, answers in sorted(self.teacher_samples.items()) for s in answers]
        return {**self.model_fingerprints, **{name: rows_digest(sequences) for name, sequences in rows.items()}}

    @cached_property
    def order(self) -> Order:
        return new_order(self.recipe, self.train)

    @property
    def pass_overhead(self) -> int:
        """Return the overhead of a pass, by which rows are split into length groups, also for the teacher cache."""
        return pass_overhead(self.device.type, self.student.model.config.get_text_config().hidden_size)

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps of the whole run."""
        return total_steps(self.recipe.train, self.order.steps_per_epoch)

    @property
    def answered(self) -> list[Sequence]:
        """Return the held-out rows that have a response."""
        pairs = zip(self.valid.sequences, self.valid.rows, strict=True)
        return [sequence for sequence, row in pairs if row.is_answered]

    def batch(self, step: int) -> list[Sequence]:
        """Return the data set rows of step ``step``."""
        return [self.train.sequences[i] for i in self.order.batch(step)]

    @contextmanager
    def with_start_weights(self) -> Iterator[None]:
        """Give the student its initial weights inside the block, and its current ones afterwards."""
        return_freed_memory()  # of gradients and activations, which need more than the copy
        weights = dict(self.start_weights())
        self.student.swap_state(weights)
        try:
            yield
        finally:
            self.student.swap_state(weights)

    def start_weights(self) -> Mapping[str, torch.Tensor]:
        """Return the initial values of the student's trained weights."""
        from distillm_cli.models.pair import rebuild_student

        if self.initial_weights is not None:
            return self.initial_weights()
        return rebuild_student(self.recipe, self.pair, torch.device("cpu")).state()

    def save_model(self, directory: Path) -> None:
        """Save the student for a checkpoint: model and tokenizer, as ``from_pretrained`` reads them.

        With an adapter, the adapter alone and a fingerprint of the frozen model.
        """
        with quiet():
            if self.student.adapter is None:
                save_plain(self.student.model, directory)
            else:
                self.student.adapter.save(directory)
                generation_config(self.student).save_pretrained(directory)
                (directory / FROZEN).write_text(frozen_digest(self.student.adapter), encoding="utf-8")
            self.pair.tokenizer.save_pretrained(directory)

    def export_model(self, directory: Path) -> None:
        """Save the student for the output directory: a whole model, or the adapter, in ``student.save_dtype``."""
        student = self.recipe.student
        dtype = resolve_dtype(student.save_dtype, self.device)
        with quiet():
            adapter = self.student.adapter
            if adapter is not None and student.lora_output == "adapter":
                adapter.save(directory, dtype)
                generation_config(self.student).save_pretrained(directory)
            elif adapter is None and dtype == torch.float32:
                save_plain(self.student.model, directory)
            else:
                save_plain(self.student.plain(torch.float32).to(dtype).model, directory)
            self.pair.tokenizer.save_pretrained(directory)
        if is_composite(self.student.model.config) and not student.is_built:
            copy_processor(student.required_path, student.revision, directory)


def prepare(recipe: Recipe, listener: Listener, prefetcher: Prefetcher | None = None) -> Prepared:
    """Read, load and check all inputs of a run. prefetcher: of its rows, if one is already running.

    Raises DataError, ModelError.
    """
    with prefetcher or prefetch_rows(recipe) as running:
        return _prepare(recipe, listener, running)


def _prepare(recipe: Recipe, listener: Listener, prefetcher: Prefetcher) -> Prepared:
    set_threads(recipe.train.threads, listener)
    torch.manual_seed(recipe.train.seed)
    device = resolve_device(recipe.train.device)
    check_optimizer(recipe.train.optimizer, device)
    check_offload(recipe, device)
    train_rows, valid_rows, shared_prompts = _read_rows(recipe, prefetcher, listener)
    sample_rows = None
    if recipe.data.teacher_samples is not None:
        sample_rows = read_teacher_samples(recipe.data, train_rows, listener)

    tokenizers = TokenizerCache()
    expected = _expected_tokenizer(recipe, tokenizers)
    prefetcher.expect(expected, named_parts("train", train_rows) | named_parts("valid", valid_rows))
    # Imported here because they are slow: the rows are tokenized meanwhile.
    from distillm_cli.models.activations import checkpoint_activations
    from distillm_cli.models.pair import load_pair

    resume_garbage_collection()
    texts = partial(texts_of, train_rows, recipe.data_of("student"))
    pair = load_pair(recipe, device=device, texts=texts, tokenizers=tokenizers, listener=listener)
    affixes = prefetcher.affixes(pair.tokenizer)
    data, encoder, resolved_values = _encoder(recipe, pair, train_rows, affixes, listener)
    recipe = recipe.model_copy(update={"data": data})
    teacher_encoder = _teacher_encoder(recipe, pair, encoder, listener) if recipe.has_two_sides else None
    context = min((model.context for model in pair.models.values() if model.context is not None), default=None)
    _check_heads(pair, context, listener)
    router_aux = router.set_router_loss(recipe.objective.router_aux, pair.student, listener)
    longest = chosen(data.max_length)
    _warn_of_longrope(pair, min(longest, context or longest), listener)

    train, valid = _tokenized(train_rows, valid_rows, prefetcher, encoder, context, listener)
    if teacher_encoder is not None:
        train = with_teacher_prompts(train, teacher_encoder, context, listener, str(train_rows))
        valid = with_teacher_prompts(valid, teacher_encoder, context, listener, str(valid_rows))
    if sources := source_figures(data, train, new_order(recipe, train)):
        rows_per_epoch = sum(source["rows_per_epoch"] for source in sources)
        described = ", ".join(map(described_source, sources))
        listener(Note(f"an epoch has {counted(rows_per_epoch, 'row')}: {described}"))
    for model in pair.models.values():
        add_stop_tokens(model, sorted(train.end_ids - encoder.end_ids), after=True)
    if recipe.train.gradient_checkpointing:
        checkpoint_activations(pair.student, offload=recipe.train.offload_activations)
        if recipe.ctcd.enabled and pair.teacher is not None:
            checkpoint_activations(pair.teacher, offload=recipe.train.offload_activations)
    return Prepared(
        recipe=recipe,
        listener=listener,
        device=device,
        dtype=resolve_dtype(recipe.student.dtype, device),
        train_rows=train_rows,
        valid_rows=valid_rows,
        pair=pair,
        encoder=encoder,
        teacher_encoder=teacher_encoder,
        overlap=shared_prompts,
        train=train,
        valid=valid,
        initial_weights=_initial_weights(pair.student),
        teacher_samples=None if sample_rows is None else encode_teacher_samples(sample_rows, train, encoder, context),
        model_fingerprints={role: model.fingerprint() for role, model in pair.models.items()},
        resolved_values=resolved_values,
        router_aux=router_aux,
    )


def _read_rows(recipe: Recipe, prefetcher: Prefetcher, listener: Listener) -> tuple[Rows, Rows, int]:
    """Return the training rows, the held-out rows, and the number of prompts that both have. Raises DataError."""
    train_rows = prefetcher.rows("train", listener)
    valid_rows = prefetcher.rows("valid", listener)
    shared = overlap(valid_rows, train_rows)
    if shared:
        have = "has" if shared == 1 else "have"
        rows = counted(len(valid_rows), "held-out row")
        listener(Note(f"{shared:,} of the {rows} {have} the prompt of a training row"))
    _check_held_out(recipe, valid_rows, listener)
    return train_rows, valid_rows, shared


def _tokenized(
    train_rows: Rows,
    valid_rows: Rows,
    prefetcher: Prefetcher,
    encoder: Encoder,
    context: int | None,
    listener: Listener,
) -> tuple[Examples, Examples]:
    """Return the training rows and the held-out rows as token ids: prefetched ones, or those of a store."""

    def tokenized(name: str, rows: SequenceOf[Row]) -> Examples:
        ids = partial(prefetcher.take, name, encoder.tokenizer)
        return tokenize(rows, encoder, encoder.data, listener, context, ids)

    def opened(name: str, rows: SequenceOf[Row]) -> Examples:
        if isinstance(rows, Rows) and rows.are_stored:
            return open_tokens(rows, encoder, listener, context)
        return tokenized(name, rows)

    train = by_source("train", train_rows, opened)
    valid = by_source("valid", valid_rows, tokenized)
    prefetcher.close()
    return train, valid


def _initial_weights(student: Backbone) -> Callable[[], Mapping[str, torch.Tensor]] | None:
    """Return a copy of an adapter's initial weights; None for a full student, which can be loaded or built again."""
    if student.adapter is None:
        return None
    initial = {name: weight.to("cpu", copy=True) for name, weight in student.state().items()}
    return initial.copy


def texts_of(rows: Iterable[Row], data: DataConfig, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """Yield prompts and responses in turn, for a tokenizer that is trained on them."""
    renderer = Renderer(data, tokenizer)
    for row in rows:
        text = renderer.text(row)
        if text is not None:
            yield from (text.text[: text.response_start], text.text[text.response_start : text.response_end])


def _encoder(
    recipe: Recipe, pair: Pair, rows: Rows, affixes: Affixes | None, listener: Listener
) -> tuple[DataConfig, Encoder, dict[str, tuple[str, str]]]:
    """Choose chat template, date and end tokens, and return an encoder with them.

    rows: the training rows. Also returns the data section with these values, and the values that were not set in the
    recipe, by key, with their origin.
    """
    from distillm_cli.models.chat_format import (
        default_end_token,
        set_chat_template,
        set_languages,
        set_stop_tokens,
        token_id,
    )

    stop_tokens = [token_id(pair, token, "student.stop_tokens") for token in recipe.student.stop_tokens]
    add_stop_tokens(pair.student, stop_tokens, after=True)

    set_chat_template(pair, recipe.data_of("student"), listener, is_shared=not recipe.has_two_sides)
    set_languages(pair.tokenizer, recipe.data, pair.models.values())
    chosen: dict[str, tuple[str, str]] = {}
    is_used = None in (recipe.student.template, recipe.teacher.template)  # not if each side has its own
    template = _chosen_template(recipe.data, pair, rows, listener) if is_used else None
    if template is not None:
        chosen["data.template"] = template
    if recipe.data.date is None:
        chosen["data.date"] = _chosen_date(recipe, rows.name)
    data = recipe.data.model_copy(update={key.partition(".")[2]: value for key, (value, _) in chosen.items()})
    own = recipe.model_copy(update={"data": data}).data_of("student")
    has_languages = data.source_language is not None or data.target_language is not None
    encoder = Encoder(
        pair.tokenizer,
        own,
        is_encoder_decoder=pair.student.is_encoder_decoder,
        affixes=None if has_languages else affixes,
        stops=pair.student.stop_ids | {*(pair.teacher_stops or ())},
        end_id=default_end_token(recipe.data, pair, listener),
        needs_responses=recipe.needs_responses,
    )
    chat = encoder.renderer.chat
    if "data.date" in chosen and not recipe.has_two_sides and (chat is None or not chat.uses_date):
        del chosen["data.date"]
        data = data.model_copy(update={"date": None})
    set_stop_tokens(pair, encoder, any(encoder.renderer.form(row) == "chat" for row in rows.kinds), listener)
    return data, encoder, chosen


def _teacher_encoder(recipe: Recipe, pair: Pair, encoder: Encoder, listener: Listener) -> Encoder:
    """Return the encoder of the prompts that the teacher sees. Both models also stop where its answers end."""
    from distillm_cli.models.chat_format import teacher_tokenizer

    data = recipe.data_of("teacher")
    found = Encoder(
        teacher_tokenizer(pair, data),
        data,
        is_encoder_decoder=encoder.is_encoder_decoder,
        affixes=encoder.affixes,
        stops=encoder.stops,
        end_id=encoder.end_id,
        needs_responses=encoder.needs_responses,
    )
    listener(Note(describe_sides(data, recipe.data_of("student"))))
    ends = sorted(end for end in found.end_ids - encoder.end_ids if end < pair.vocab)
    for model in pair.models.values() if ends and data.template in ("auto", "chat") else ():
        add_stop_tokens(model, ends, after=True)
    return found


def _chosen_template(data: DataConfig, pair: Pair, rows: Rows, listener: Listener) -> tuple[str, str] | None:
    """Return the template for rows and its origin if it is not set in the recipe; else None."""
    both_chat = all(template is not None for template in pair.templates.values())
    selected = resolve_auto_template(rows.kinds, both_chat) if data.template == "auto" else None
    if selected is None:
        return None
    template, why = selected
    other = {"chat": "alpaca", "alpaca": "chat"}.get(template)
    has_choice = other is not None and both_chat and any(row.messages is None for row in rows.kinds)
    choice = f"; --set data.template={other} selects the other one" if has_choice else ""
    listener(Note(f"template {template}: {why}{choice}"))
    return template, f"auto: {why}"


@in_first_process
def _chosen_date(recipe: Recipe, data: str) -> tuple[str, str]:
    """Return the date for chat templates and its origin, if it is not set in the recipe."""
    if recipe.method != "sft" and recipe.teacher.cache in ("disk", "auto"):
        cache_date = cached_date(cache_root("teacher", recipe.teacher.cache_dir), str(recipe.teacher.path), data)
        if cache_date is not None:
            return cache_date, "the teacher cache"
    return date.today().isoformat(), "start of the run"


def _check_held_out(recipe: Recipe, rows: Rows, listener: Listener) -> None:
    """Raise DataError if checkpoints are selected by held-out responses and there are none."""
    if recipe.needs_responses or any(row.is_answered for row in rows):
        return
    if recipe.train.select != "last":
        raise DataError(
            "data.no_held_out_rows",
            f"{rows.name}: no held-out row has a response, and train.select = {recipe.train.select} needs them",
            hint="set rows with responses with --set data.valid=FILE, or try --set train.select=last",
        )
    listener(Note(f"{rows.name}: no held-out row has a response: no validation"))


def _expected_tokenizer(recipe: Recipe, tokenizers: TokenizerCache) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that the run will most likely use, read before the models; None where it is not known yet."""
    for path, revision in tokenizer_candidates(recipe):
        try:
            return tokenizers.load(path, revision)
        except ModelError:  # reported when the model is loaded, after earlier errors
            continue
    return None


def new_order(recipe: Recipe, examples: Examples) -> Order:
    """Return the order in which the recipe trains on these examples."""
    train = recipe.train
    batch = train.batch_size * train.accumulate
    if not examples.part_sizes:
        return Order(examples.lengths, batch, train.seed, bucket=recipe.data.bucket)
    wanted = wanted_rows(recipe.data.sources, examples.part_sizes)
    return MixedOrder(examples.lengths, batch, train.seed, recipe.data.bucket, sizes=examples.part_sizes, wanted=wanted)


def _warn_of_longrope(pair: Pair, longest: int, listener: Listener) -> None:
    for name, model in pair.models.items():
        bound = longrope_bound(model.model.config)
        if bound is not None and longest > bound:
            what = f"rows may be longer than {bound:,} tokens, where the {name}'s rotary factors change (longrope)"
            effect = "its output for a row depends on the longest row of the batch"
            listener(Warned(f"{what}: {effect}; --max-length {bound} avoids that"))


def _check_heads(pair: Pair, context: int | None, listener: Listener) -> None:
    """Compare logits of each head with the model's own on a few tokens; if they differ, warn and use the model's own.

    A head treats all states alike, so a few arbitrary tokens suffice.
    """
    half = max(1, min(_PROBE_TOKENS, context or _PROBE_TOKENS) // 2)
    ids = np.arange(1, half + 1, dtype=np.int32) % pair.vocab
    # Two lengths, to check padding too.
    batch = collate([Sequence(ids, ids), Sequence(ids[: max(1, half - 1)], ids)])
    for name, model in pair.models.items():
        if not model.check_head(batch.to(model.device)):
            kind = model.model.config.model_type
            listener(
                Warned(
                    f"the {name}'s head ({kind}) is not a plain matrix product: using the model's own logits, which "
                    "is slower"
                )
            )
