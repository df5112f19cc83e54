"""A resolved recipe → everything a run needs: rows, models, examples, engine. ``plan`` stops half way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from distillm_cli.config.schema import DataConfig, Recipe, TrainConfig
from distillm_cli.config.shaping import shaping
from distillm_cli.data.batching import Examples, Order, by_length, tokenize
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.prefetch import Prefetcher
from distillm_cli.data.rows import Row
from distillm_cli.data.sources import Rows, overlap
from distillm_cli.data.teacher_samples import encoded, read_beforehand
from distillm_cli.data.templates import Renderer, settled_template
from distillm_cli.data.token_ids import Affixes
from distillm_cli.errors import DataError, ModelError
from distillm_cli.losses import criteria
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.models import router
from distillm_cli.models.composite import copy_processor, is_composite
from distillm_cli.models.contexts import longrope_bound
from distillm_cli.models.conversation import add_stops, generation_config
from distillm_cli.models.devices import resolve_device, resolve_dtype
from distillm_cli.models.fingerprint import fingerprint
from distillm_cli.models.tokenizer_files import OwnTokenizers, quiet
from distillm_cli.rollouts.replay import ReplayBuffer, Round
from distillm_cli.rollouts.scheduler import Scheduler
from distillm_cli.runs import output_dir, samplers
from distillm_cli.runs.inputs import prefetcher_of, tokenizer_candidates
from distillm_cli.teachers.teacher import Teacher
from distillm_cli.teachers.teacher_cache import date_of, root_of, rows_digest
from distillm_cli.training.checkpoint import Checkpoints
from distillm_cli.training.engine import Engine
from distillm_cli.training.events import Listener, Note, Warned
from distillm_cli.types import Sequence, collate, pass_overhead
from distillm_cli.utils.memory import give_back_freed_memory, resume_garbage_collection
from distillm_cli.utils.text import counted
from distillm_cli.utils.threads import set_threads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distillm_cli.models.backbone import Backbone
    from distillm_cli.models.pair import Pair

FROZEN = "frozen.txt"  # in a checkpoint: of the weights below an adapter
_PROBED = 8  # tokens that the heads are checked on


def total_steps(train: TrainConfig, steps_per_epoch: int) -> int:
    """Return the optimizer steps of a whole run."""
    return train.steps or max(1, math.ceil(train.epochs * steps_per_epoch))


def frozen_digest(student: Backbone) -> str:
    """Tells one frozen model from another."""
    return fingerprint(student.adapter.frozen())


@dataclass(frozen=True)
class Prepared:
    """Rows read, models loaded and checked against each other, examples tokenized: all that comes before the loop.

    begins: the weights that the student starts with; unset, those that it was loaded or built with.
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
    begins: Callable[[], Mapping[str, torch.Tensor]] | None = None
    teacher_samples: dict[int, list[Sequence]] | None = None  # by row, where they were made beforehand
    models: Mapping[str, str] = field(default_factory=dict)  # fingerprints of what was loaded, by role
    settled: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # values that were open, with their origin
    router_aux: float = 0.0  # weight of the auxiliary loss of the student's routers

    @property
    def student(self) -> Backbone:
        return self.pair.student

    @property
    def sft(self) -> bool:
        return self.recipe.method == "sft"

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Tells what the run is made from, by what it holds and not by its name: for a resume."""
        rows = {"training rows": self.train.sequences, "held-out rows": self.valid.sequences}
        if self.teacher_samples is not None:
            rows["teacher samples"] = [s for _, answers in sorted(self.teacher_samples.items()) for s in answers]
        return {**self.models, **{name: rows_digest(sequences) for name, sequences in rows.items()}}

    @cached_property
    def order(self) -> Order:
        return new_order(self.recipe, self.train)

    @property
    def step_rows(self) -> int:
        """Data set rows of a step, and as many student outputs."""
        train = self.recipe.train
        return min(train.batch_size * train.accumulate, len(self.train))

    @property
    def pass_overhead(self) -> int:
        """By which a step's rows are cut into passes; the same for whoever computes their states."""
        return pass_overhead(self.device.type, self.student.model.config.get_text_config().hidden_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return total_steps(self.recipe.train, self.order.steps_per_epoch)

    @property
    def answered(self) -> list[Sequence]:
        """Return the held-out rows that have a response."""
        pairs = zip(self.valid.sequences, self.valid.rows, strict=True)
        return [sequence for sequence, row in pairs if row.is_answered]

    def batch(self, step: int) -> list[Sequence]:
        """The data set rows of step ``step``."""
        return [self.train.sequences[i] for i in self.order.batch(step)]

    @contextmanager
    def as_at_start(self) -> Iterator[None]:
        """The student has the weights it began with, inside the block; those it has reached again after it."""
        give_back_freed_memory()  # a step's gradients and activations: more than the copy that is made here
        held = dict(self.first_weights())
        self.student.swap_state(held)
        try:
            yield
        finally:
            self.student.swap_state(held)

    def first_weights(self) -> Mapping[str, torch.Tensor]:
        """What changes of the student, as it was before its first step."""
        from distillm_cli.models.pair import student_again

        return self.begins() if self.begins else student_again(self.recipe, self.pair, torch.device("cpu")).state()

    def save_model(self, directory: Path) -> None:
        """What a checkpoint keeps of the student: model and tokenizer, as ``from_pretrained`` wants them.

        Of one that trains under an adapter, the adapter, and what tells whether the frozen model is still the same.
        """
        with quiet():
            if self.student.adapter is None:
                self.student.model.save_pretrained(directory)
            else:
                self.student.adapter.save(directory)
                generation_config(self.student).save_pretrained(directory)
                (directory / FROZEN).write_text(frozen_digest(self.student), encoding="utf-8")
            self.pair.tokenizer.save_pretrained(directory)

    def export_model(self, directory: Path) -> None:
        """The student as the output directory has it: a whole model, or the adapter, in the dtype asked for."""
        student, dtype = self.recipe.student, resolve_dtype(self.recipe.student.save_dtype, self.device)
        with quiet():
            if student.lora_output == "adapter":
                self.student.adapter.save(directory, dtype)
                generation_config(self.student).save_pretrained(directory)
            elif self.student.adapter is None and dtype == torch.float32:
                self.student.model.save_pretrained(directory)
            else:
                self.student.plain(torch.float32).model.to(dtype).save_pretrained(directory)
            self.pair.tokenizer.save_pretrained(directory)
        if is_composite(self.student.model.config) and not student.is_built:
            copy_processor(student.path, student.revision, directory)


def prepare(recipe: Recipe, listener: Listener, prefetcher: Prefetcher | None = None) -> Prepared:
    """Reads, loads and checks everything a run needs. prefetcher: of its rows, where it is running already.

    Raises DataError, ModelError.
    """
    with prefetcher or prefetcher_of(recipe) as running:
        return _prepared(recipe, listener, running)


def _prepared(recipe: Recipe, listener: Listener, prefetcher: Prefetcher) -> Prepared:
    set_threads(recipe.train.threads, listener)
    torch.manual_seed(recipe.train.seed)
    device = resolve_device(recipe.train.device)
    train_rows = prefetcher.rows("train", listener)
    valid_rows = prefetcher.rows("valid", listener)
    if shared := overlap(valid_rows, train_rows):
        ask = "asks" if shared == 1 else "ask"
        rows = counted(len(valid_rows), "held-out row")
        listener(Note(f"{shared:,} of the {rows} {ask} what a training row asks too"))

    _check_held_out(recipe, valid_rows, listener)
    beforehand = None if recipe.data.teacher_samples is None else read_beforehand(recipe.data, train_rows, listener)

    texts = partial(texts_of, train_rows, recipe.data)
    tokenizers = OwnTokenizers()
    expected = _expected_tokenizer(recipe, tokenizers)
    prefetcher.expect(expected, {"train": train_rows, "valid": valid_rows})
    # Only here: it takes long to import, and the rows are tokenized meanwhile.
    from distillm_cli.models.pair import load_pair

    resume_garbage_collection()
    pair = load_pair(recipe, device=device, texts=texts, tokenizers=tokenizers, listener=listener)
    affixes = prefetcher.affixes(pair.tokenizer)
    recipe, encoder, settled = _conversing(recipe, pair, (train_rows, valid_rows), affixes, listener)
    contexts = [model.context for model in pair.models.values() if model.context is not None]
    context = min(contexts, default=None)
    _check_heads(pair, context, listener)
    router_aux = router.weight_of(recipe.objective.router_aux, pair.student, listener)
    _warn_of_longrope(pair, min(recipe.data.max_length, context or recipe.data.max_length), listener)
    train = tokenize(
        train_rows, encoder, recipe.data, listener, context, partial(prefetcher.take, "train", pair.tokenizer)
    )
    valid = tokenize(
        valid_rows, encoder, recipe.data, listener, context, partial(prefetcher.take, "valid", pair.tokenizer)
    )
    prefetcher.close()
    for model in pair.models.values():
        add_stops(model, sorted(train.ends - encoder.ends), after=True)
    if recipe.train.gradient_checkpointing:
        _checkpoint_activations(pair.student)
    dtype = resolve_dtype(recipe.student.dtype, device)
    begins = None
    if pair.student.adapter is not None:  # few weights: not worth loading the model under them again
        first = {name: weight.to("cpu", copy=True) for name, weight in pair.student.state().items()}
        begins = first.copy
    samples = None if beforehand is None else encoded(beforehand, train, encoder, context)
    # Rounded: on another device `auto` may load them in another type.
    models = {
        role: fingerprint(backbone.model.state_dict().items(), torch.bfloat16) for role, backbone in pair.models.items()
    }
    return Prepared(
        recipe=recipe,
        listener=listener,
        device=device,
        dtype=dtype,
        train_rows=train_rows,
        valid_rows=valid_rows,
        pair=pair,
        encoder=encoder,
        train=train,
        valid=valid,
        begins=begins,
        teacher_samples=samples,
        models=models,
        settled=settled,
        router_aux=router_aux,
    )


def texts_of(rows: Iterable[Row], data: DataConfig, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """Yield prompts and responses in turn, for a tokenizer that is trained on them."""
    renderer = Renderer(data, tokenizer)
    for row in rows:
        text = renderer.text(row)
        if text is not None:
            yield from (text.text[: text.cut], text.text[text.cut : text.end])


def _conversing(
    recipe: Recipe, pair: Pair, rows: tuple[Rows, ...], affixes: Affixes | None, listener: Listener
) -> tuple[Recipe, Encoder, dict[str, tuple[str, str]]]:
    """Settle how the models are asked and how they answer: template, date and end tokens.

    Returns the recipe with these values, the encoder, and the values that were open, by key, with their origin.
    """
    from distillm_cli.models.conversation import own_end, set_languages, settle_ends, settle_template

    settle_template(pair, recipe.data, listener)
    set_languages(pair.tokenizer, recipe.data, pair.models.values())
    settled: dict[str, tuple[str, str]] = {}
    both_chat = all(template is not None for template in pair.templates.values())
    if recipe.data.template == "auto" and (found := settled_template(rows[0], both_chat)) is not None:
        template, why = found
        settled["data.template"] = (template, f"auto: {why}")
        other = {"chat": "alpaca", "alpaca": "chat"}.get(template)
        has_choice = other is not None and both_chat and any(row.messages is None for row in rows[0])
        choice = f"; --set data.template={other} chooses the other form" if has_choice else ""
        listener(Note(f"template {template}: {why}{choice}"))
    if recipe.data.date is None:
        settled["data.date"] = _open_date(recipe, rows[0].name)
    data = recipe.data.model_copy(update={key.partition(".")[2]: value for key, (value, _) in settled.items()})
    common = {
        "is_encoder_decoder": pair.student.is_encoder_decoder,
        "affixes": affixes if recipe.data.source_language is None and recipe.data.target_language is None else None,
        "stops": pair.student.stop_ids | {*(pair.teacher_stops or ())},
        "end": own_end(recipe.data, pair, listener),
        "needs_responses": recipe.needs_responses,
    }
    encoder = Encoder(pair.tokenizer, data, **common)
    chat = encoder.renderer.chat
    if chat is None or not chat.uses_date:
        settled.pop("data.date", None)
    is_chat = any(encoder.renderer.form(row) == "chat" for row in rows[0])
    settle_ends(pair, encoder, is_chat, listener)
    data = recipe.data.model_copy(update={key.partition(".")[2]: value for key, (value, _) in settled.items()})
    return recipe.model_copy(update={"data": data}), encoder, settled


def _open_date(recipe: Recipe, data: str) -> tuple[str, str]:
    """Return the date that chat templates see where the recipe gives none, and where it is from."""
    if recipe.method != "sft" and recipe.teacher.cache in ("disk", "auto"):
        of_cache = date_of(root_of(recipe.teacher.cache_dir), str(recipe.teacher.path), data)
        if of_cache is not None:
            return of_cache, "the teacher cache"
    return date.today().isoformat(), "start of the run"


def _check_held_out(recipe: Recipe, rows: Rows, listener: Listener) -> None:
    """Raise DataError where checkpoints are selected by held-out responses and there are none."""
    if recipe.needs_responses or any(row.is_answered for row in rows):
        return
    if recipe.train.select != "last":
        raise DataError(
            f"{rows.name}: no held-out row has a response, and train.select = {recipe.train.select} needs them",
            hint="name rows with responses with --set data.valid=FILE, or try --set train.select=last",
        )
    listener(Note(f"{rows.name}: no held-out row has a response: no validation"))


def _expected_tokenizer(recipe: Recipe, tokenizers: OwnTokenizers) -> PreTrainedTokenizerBase | None:
    """The one that the run will most likely turn out to have, read before the models are; None where that is open."""
    for model in tokenizer_candidates(recipe):
        try:
            return tokenizers.of(model.path, model.revision)
        except ModelError:  # which is told when the model is loaded, after whatever else is wrong before that
            continue
    return None


def new_order(recipe: Recipe, examples: Examples) -> Order:
    """The order in which the recipe trains on these examples."""
    train = recipe.train
    return Order(examples.lengths, train.batch_size * train.accumulate, train.seed, bucket=recipe.data.bucket)


def new_scheduler(run: Prepared) -> Scheduler:
    """The run's schedule, at its beginning."""
    recipe = run.recipe
    return Scheduler(recipe.schedule, steps=run.steps, seed=recipe.train.seed, batches=recipe.rollout.bulk)


def new_replay(recipe: Recipe, step_rows: int) -> ReplayBuffer:
    """Where a run keeps student outputs, empty. step_rows: sequences of a step."""
    schedule, seed = recipe.schedule, recipe.train.seed
    if schedule.kind != "rounds":
        return ReplayBuffer(schedule.capacity, seed=seed)
    return Round(recipe.rollout.bulk, rows=step_rows, inner_epochs=schedule.inner_epochs, seed=seed)


def build_engine(run: Prepared, output: Path, listener: Listener, *, teacher: Teacher | None, score=None) -> Engine:
    """The engine of a prepared run, keeping its checkpoints under ``output``. teacher: None for SFT."""
    recipe = run.recipe
    rule = criteria.build(None if run.sft else recipe.objective, run.steps / run.order.steps_per_epoch)
    objective = StudentLoss(
        run.student,
        rule,
        teacher_head=None if teacher is None else teacher.head,
        matmul_dtype=None if run.dtype == torch.float32 else run.dtype,
        router_aux=run.router_aux,
    )
    scheduler = new_scheduler(run)
    return Engine(
        objective=objective,
        pass_overhead=run.pass_overhead,
        train=recipe.train,
        steps=run.steps,
        steps_per_epoch=run.order.steps_per_epoch,
        batches=run.batch,
        scheduler=scheduler,
        replay=new_replay(recipe, run.step_rows),
        rollouts=samplers.rollouts(run, rule, listener),
        bulk=recipe.rollout.bulk,
        fresh="direct" if recipe.schedule.kind == "rounds" else recipe.schedule.fresh,
        samples=samplers.samples(run, scheduler, listener),
        teacher=teacher,
        validation=by_length(run.answered, max(recipe.train.batch_size, 16)),
        score=score,
        as_at_start=run.as_at_start,
        checkpoints=Checkpoints(
            output / output_dir.CHECKPOINTS, run.save_model, keep=recipe.train.keep, listener=listener
        ),
        recipe=shaping(recipe),
        inputs=lambda: run.inputs,
        method=recipe.method,
        device=run.device,
        dtype=run.dtype,
        listener=listener,
    )


def _checkpoint_activations(student: Backbone) -> None:
    enable = getattr(student.model, "activation_checkpointing_enable", None)  # transformers 5.2x; the older name before
    (enable or student.model.gradient_checkpointing_enable)()


def _warn_of_longrope(pair: Pair, longest: int, listener: Listener) -> None:
    for name, model in pair.models.items():
        bound = longrope_bound(model.model.config)
        if bound is not None and longest > bound:
            what = f"rows may be longer than {bound:,} tokens, where the {name}'s rotary factors change (longrope)"
            how = "what it says of a row depends on the longest one beside it"
            listener(Warned(f"{what}: {how}; --max-length {bound} keeps them alike"))


def _check_heads(pair: Pair, context: int | None, listener: Listener) -> None:
    """A few tokens through both ways to logits; where they disagree, the model's own way is used, and said.

    Which tokens and how many tells nothing of a head: it does the same to every state.
    """
    half = max(1, min(_PROBED, context or _PROBED) // 2)
    ids = np.arange(1, half + 1, dtype=np.int32) % pair.vocab
    # Of two lengths, so that padding is among what is checked.
    batch = collate([Sequence(ids, ids), Sequence(ids[: max(1, half - 1)], ids)])
    for name, model in pair.models.items():
        if not model.check_head(batch.to(model.device)):
            kind = model.model.config.model_type
            listener(Warned(f"the {name}'s head ({kind}) is not a plain one: using the model's own logits, slower"))
