"""Plan a run: from its rows and models, or from the models' configs where their weights are not available."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from distillm_cli.config.derived import sft_stage_recipe
from distillm_cli.config.load import Resolved
from distillm_cli.config.schema import DataConfig, Recipe
from distillm_cli.config.student_spec import BuiltinModel, ConfigFile, SavedModel, parse_student
from distillm_cli.data.batching import Examples, steps_per_epoch, tokenize
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.sources import Rows, is_path, load_rows, local_path
from distillm_cli.data.templates import resolve_auto_template
from distillm_cli.errors import DataError
from distillm_cli.models import lora
from distillm_cli.models.composite import freeze_rest, is_composite
from distillm_cli.models.model_families import context_of
from distillm_cli.models.pair import check_architectures, check_vocabularies, resolve_device, resolve_dtype
from distillm_cli.models.shapes import Shape, Sizes, has_weights, load_shape, sizes, weight_bytes
from distillm_cli.runs import costs, gpus
from distillm_cli.runs.cache_size import CacheWorkload, uses_rows
from distillm_cli.runs.prepare import Prepared, new_order, prepare, texts_of
from distillm_cli.runs.report import check_can_generate, check_selection_metric
from distillm_cli.runs.run_results import DecodedSequence, PlanResult
from distillm_cli.runs.teacher_states import CachePlan, check_rows, disk_free, plan_cache, workload_of
from distillm_cli.training.events import Listener, Note, silent
from distillm_cli.utils.memory import available_memory, resume_garbage_collection
from distillm_cli.utils.text import format_bytes, redact

_T = TypeVar("_T")
_SHOWN_SEQUENCES = 3  # of the decoded batch
_IN_HOST = (
    "teacher_states",
    "rollout_states",
    "teacher_sample_states",
)  # whatever the accelerator, they lie in the machine's own memory


def weights_are_available(recipe: Recipe) -> bool:
    """Return whether the run's models can be loaded here as they are: directories with weights that fit the free memory, or
    models from scratch."""
    is_needed = recipe.method != "sft" or recipe.student.is_built
    paths = [recipe.student.path, recipe.teacher.path if is_needed else None]
    loaded = [path for path in paths if path is not None and _is_on_disk_or_hub(path)]
    if not all(has_weights(path) for path in loaded):
        return False
    free = available_memory()
    return free is None or sum(weight_bytes(path) for path in loaded) <= free / 4  # read as float32, and some room


def _is_on_disk_or_hub(path: str) -> bool:
    return isinstance(parse_student(path), SavedModel | BuiltinModel | ConfigFile)


def plan_run(resolved: Resolved, listener: Listener) -> PlanResult:
    """Plan one run, from its models where their weights are here, else from their configs."""
    resume_garbage_collection()
    if not weights_are_available(resolved.recipe):
        return PlanResult(plan_from_configs(resolved, listener)[0])
    check_selection_metric(resolved.recipe)
    run = prepare(resolved.recipe, listener)
    check_can_generate(run)
    return PlanResult(plan_prepared(run, resolved), _decoded_batch(run))


def _decoded_batch(run: Prepared) -> tuple[DecodedSequence, ...]:
    """Return the first sequences of a batch as text; context in one piece, each supervised token in its own."""
    decoded = []
    for sequence in run.batch(0)[:_SHOWN_SEQUENCES]:
        turns = set() if sequence.turns is None else set(sequence.turns.tolist())
        pieces: list[tuple[str, bool]] = []
        context: list[int] = []
        for position, token in enumerate([*sequence.prompt.tolist(), *sequence.response.tolist()]):
            if position < len(sequence.prompt) and position not in turns:
                context.append(token)
                continue
            pieces.append((run.pair.tokenizer.decode(context), False))
            pieces.append((run.pair.tokenizer.decode([token]), True))
            context = []
        decoded.append(DecodedSequence(tuple(pieces)))
    return tuple(decoded)


def plan_prepared(run: Prepared, resolved: Resolved) -> dict[str, Any]:
    """Return the plan of a run whose models and rows are loaded."""
    teacher = None if run.pair.teacher is None else run.pair.teacher.model
    cache_plan = None if teacher is None else plan_cache(run, workload_of(run))
    states, cache = {}, {}
    if cache_plan is not None:
        states = cache_plan.size.in_memory(cache_plan.mode)
        cache = {"teacher_cache": _cache_figures(run, cache_plan)}
    sized = costs.Run(
        recipe=run.recipe,
        student=sizes(run.student.model, run.pair.vocab),
        teacher=None if teacher is None else sizes(teacher, run.pair.vocab),
        vocab=run.pair.vocab,
        lengths=_measured_lengths(run.recipe, run.train),
        itemsize=run.dtype.itemsize,
        teacher_itemsize=2 if teacher is None else teacher.dtype.itemsize,
        device=run.device.type,
        states=states,
        cached=cache_plan is not None and bool(cache_plan.size.rows),
        keeps=cache_plan is not None and cache_plan.mode != "off",
    )
    sized = _with_fine_tuning(sized, resolved)
    dtypes = {"student": run.student.model.dtype, "teacher": None if teacher is None else teacher.dtype}
    return _run_figures(sized, str(run.device), run.dtype, dtypes) | {"data": _data_figures(run)} | cache


def _data_figures(run: Prepared) -> dict[str, Any]:
    lengths = run.train.lengths
    return _row_figures(run.train_rows, run.train) | {
        "valid_rows": len(run.valid),
        "response_tokens": run.train.tokens,
        "longest": int(lengths.max()),
        "mean_length": round(float(lengths.mean()), 1),
    }


def plan_from_configs(
    resolved: Resolved, listener: Listener = silent, made: Mapping[str, Shape] | None = None
) -> tuple[dict[str, Any], Shape]:
    """Return the plan of a run whose weights are not here, and the student's shape. Tokenizer and rows are used where they
    are available, else the recipe's limits stand for them. A device that the recipe leaves open is taken to be a GPU.

    made: shapes of models that are yet to be made, by ``stage:NAME``.
    """
    recipe = resolved.recipe
    check_selection_metric(recipe)
    if recipe.method != "sft" and recipe.teacher.cache == "disk":
        check_rows(recipe)
    needed = recipe.needs_responses
    rows, why = read_if_available(lambda: load_rows(recipe.data, "train", require_output=needed), recipe.data.source)

    read = None if rows is None else partial(texts_of, rows, recipe.data)
    common = {"max_length": recipe.data.max_length, "made": made}
    origin = None  # of a student that is built after it, for `sft` too
    if recipe.teacher.path is not None and (recipe.method != "sft" or recipe.student.is_built):
        origin = load_shape(recipe.teacher.path, revision=recipe.teacher.revision, **common)
    own = {"revision": recipe.student.revision, "tokenizer": recipe.student.tokenizer}
    student = load_shape(recipe.student.path, **own, texts=read, teacher=origin, **common)
    teacher = origin if recipe.method != "sft" else None
    vocab = student.vocab if teacher is None else min(student.vocab, teacher.vocab)
    notes = ["weights are not at hand: models by their configs"]
    if teacher is not None:
        check_architectures(teacher, student)
    if teacher is not None and teacher.tokenizer is not None and student.tokenizer is not None:
        check_vocabularies(teacher.tokenizer, student.tokenizer)
    elif teacher is not None:
        notes.append("a tokenizer is not at hand: whether the vocabularies fit is not known")
    examples = None
    tokenizer = student.tokenizer
    if rows is not None and tokenizer is not None:
        how = {"is_encoder_decoder": student.is_encoder_decoder, "needs_responses": recipe.needs_responses}
        encoder = Encoder(tokenizer, _data_with_template(recipe, rows, student, teacher), **how)
        examples = tokenize(rows, encoder, recipe.data, silent, _context(student, teacher))
        lengths = _measured_lengths(recipe, examples)
    else:
        lengths = _longest_lengths(recipe, rows, student, teacher)
        notes.append(f"{why or 'no tokenizer at hand'}: every row is taken to be as long as data.max_length allows")
    is_open = recipe.train.device == "auto"
    device = torch.device("cuda") if is_open else resolve_device(recipe.train.device)
    dtype, teacher_dtype = (_dtype(name, device, is_open) for name in (recipe.student.dtype, recipe.teacher.dtype))
    if is_open:
        notes.append("train.device is auto: planned for a GPU")
    teacher_sizes = None if teacher is None else _frozen(sizes(teacher.model, vocab))
    cache, states = _predicted_cache(recipe, teacher_sizes, lengths, teacher_dtype.itemsize)
    sized = costs.Run(
        recipe=recipe,
        student=sizes(_with_adapter(student, recipe), vocab),
        teacher=teacher_sizes,
        vocab=vocab,
        lengths=lengths,
        itemsize=dtype.itemsize,
        teacher_itemsize=teacher_dtype.itemsize,
        device=device.type,
        states=states,
        cached=cache is not None and bool(cache["bytes"]),
        keeps=recipe.teacher.cache != "off",
    )
    sized = _with_fine_tuning(sized, resolved)
    data: dict[str, Any] = {"source": redact(recipe.data.source), "rows": None if rows is None else len(rows)}
    if rows is not None and examples is not None:
        data |= _row_figures(rows, examples) | {"response_tokens": examples.tokens}
    data |= {"longest": lengths.longest, "mean_length": round(lengths.mean, 1)}
    for note in notes:
        listener(Note(note))
    found = _run_figures(
        sized, "GPU" if is_open else str(device), dtype, {"student": torch.float32, "teacher": teacher_dtype}
    )
    return found | {"data": data, "notes": notes} | ({} if cache is None else {"teacher_cache": cache}), student


def _data_with_template(recipe: Recipe, rows: Rows, student: Shape, teacher: Shape | None) -> DataConfig:
    """Return the recipe's data section with the template that a run would settle on."""
    own = student.tokenizer.chat_template
    other = own if teacher is None or teacher.tokenizer is None else teacher.tokenizer.chat_template
    if own is None:
        student.tokenizer.chat_template = other
    if recipe.data.template != "auto":
        return recipe.data
    template = resolve_auto_template(rows, own is not None and other is not None)
    return recipe.data if template is None else recipe.data.model_copy(update={"template": template[0]})


def _with_fine_tuning(run: costs.Run, resolved: Resolved) -> costs.Run:
    """Return the run with the stage that ``student.sft_epochs`` asks for, on the same rows and without the teacher."""
    stage = sft_stage_recipe(resolved)
    if stage is None:
        return run
    per_epoch = run.lengths.steps_per_epoch
    lengths = replace(run.lengths, steps=None if per_epoch is None else _steps(stage.recipe, per_epoch))
    before = replace(run, recipe=stage.recipe, teacher=None, lengths=lengths, states=None, cached=False)
    return replace(run, before=before)


def _run_figures(
    run: costs.Run, device: str, dtype: torch.dtype, dtypes: Mapping[str, torch.dtype | None]
) -> dict[str, Any]:
    """Return the figures that both ways of planning share."""
    models: dict[str, Any] = {}
    for name, model_sizes in (("student", run.student), ("teacher", run.teacher)):
        if model_sizes is not None:
            models[name] = model_figures(model_sizes, str(dtypes[name]).removeprefix("torch."))
    if run.teacher is not None:
        ratio = run.teacher.parameters["total"] / run.student.parameters["total"]
        models["ratio"] = round(ratio, 2)
    need = costs.memory(run)
    on_gpu = _on_a_gpu(run)
    gpu_need = costs.at_once(
        {part: n for part, n in costs.memory(on_gpu).items() if part not in _IN_HOST}, on_gpu.device
    )
    lengths = run.lengths
    before = {} if run.before is None else {"sft": _fine_tuning_figures(run.before)}
    return {
        "method": run.recipe.method,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "models": models,
        "vocabulary": run.vocab,
        "steps": lengths.steps,
        "steps_per_epoch": lengths.steps_per_epoch,
        "sequences_per_step": run.sequences * (2 if run.recipe.objective.row_weight or run.schedule.in_pairs else 1),
        "memory": need | {"total": costs.at_once(need, run.device)},
        "step_flops": _step_flops(run),
        **before,
        "gpus": costs.on_gpus(on_gpu, gpu_need),
        "assumed": gpus.ASSUMED,
    }


def _step_flops(run: costs.Run) -> dict[str, float]:
    return {source: float(f"{gpus.flops(work):.4g}") for source, work in costs.steps(run).items()}


def _fine_tuning_figures(run: costs.Run) -> dict[str, Any]:
    return {"epochs": run.recipe.train.epochs, "steps": run.lengths.steps, "step_flops": _step_flops(run)}


def _on_a_gpu(run: costs.Run) -> costs.Run:
    """Return the same run on a current GPU, in the type that auto would choose there for the student."""
    itemsize = gpu_itemsize(run.recipe.student.dtype)
    before = None if run.before is None else _on_a_gpu(run.before)
    return replace(run, device="cuda", itemsize=itemsize, before=before)


def model_figures(model_sizes: Sizes, dtype: str) -> dict[str, Any]:
    """Return a model's sizes. encoder_layers: of an encoder-decoder, whose ``layers`` are the decoder's."""
    encoder = {} if model_sizes.encoder is None else {"encoder_layers": model_sizes.encoder.layers}
    return encoder | {
        "kind": model_sizes.kind,
        "parameters": model_sizes.parameters["total"],
        "parts": {part: model_sizes.parameters[part] for part in ("embeddings", "trunk", "head", "outside")},
        "trainable": model_sizes.parameters["trainable"],
        "layers": model_sizes.layers,
        "width": model_sizes.width,
        "context": model_sizes.context,
        "dtype": dtype,
    }


def _cache_figures(run: Prepared, cache_plan: CachePlan) -> dict[str, Any]:
    """Return the figures of the teacher cache: bytes of rows and, at most, of replayed rollouts."""
    figures = {
        "mode": cache_plan.mode,
        "rows": len(run.train) if cache_plan.size.rows else 0,
        "bytes": cache_plan.size.rows,
        "rollout_bytes": cache_plan.size.rollouts,
        "sample_bytes": cache_plan.size.samples,
        "why": cache_plan.why,
    }
    if cache_plan.place is None:
        return figures
    return figures | {
        "place": str(cache_plan.place),
        "hit": cache_plan.is_made,
        "disk_free": disk_free(cache_plan.place),
    }


def _with_adapter(student: Shape, recipe: Recipe) -> PreTrainedModel:
    """Return the student as it is trained: with its adapter on a copy, where it has one."""
    if recipe.student.lora.r is None and not is_composite(student.model.config):
        return student.model
    model = copy.deepcopy(student.model)
    freeze_rest(model)
    if recipe.student.lora.r is None:
        return model
    with torch.device("meta"):
        lora.attach(model, recipe.student.lora, seed=0, base=str(recipe.student.path), revision=None)
    return model


def _frozen(model_sizes: Sizes) -> Sizes:
    """Return the sizes of a teacher: nothing of it is trained."""
    return replace(model_sizes, parameters=model_sizes.parameters | {"trainable": 0})


def _predicted_cache(
    recipe: Recipe, teacher: Sizes | None, lengths: costs.Lengths, itemsize: int
) -> tuple[dict[str, Any] | None, dict[str, int]]:
    """Return the same for a run by its shapes, and the parts of the memory.

    Free memory is not compared: weights that are not at hand run on another machine.
    """
    if teacher is None:
        return None, {}
    mode, rows = recipe.teacher.cache, lengths.rows or 0
    workload = CacheWorkload(
        recipe=recipe,
        bytes_per_token=teacher.head_in * itemsize,
        rows=lengths.rows,
        row_tokens=rows * lengths.response,
        steps=lengths.steps,
        steps_per_epoch=lengths.steps_per_epoch,
    )
    found = workload.size(mode)
    places = {"off": "", "disk": "on disk", "memory": "in memory", "auto": "in memory, where enough is free"}
    parts = found.described(rows)
    why = f"{places[mode]}: {parts}"
    if not parts:
        why = "not cached" if mode == "off" else "not cached: nothing is seen twice"
    if lengths.rows is None and uses_rows(recipe) and mode != "off":
        why = f"{format_bytes(workload.bytes_per_token)} for each response token of a row{f'; {why}' if parts else ''}"
    cache = {
        "mode": mode,
        "rows": lengths.rows if found.rows else 0,
        "bytes": found.rows,
        "rollout_bytes": found.rollouts,
        "sample_bytes": found.samples,
        "why": why,
        "bytes_per_token": workload.bytes_per_token,
    }
    return cache, found.in_memory(mode)


def read_if_available(read: Callable[[], _T], source: str) -> tuple[_T | None, str]:
    """Return what is read of a source of rows; None where it is not available, and why."""
    try:
        return read(), ""
    except DataError as error:
        if is_path(source) or local_path(source) is not None:
            raise  # it is here, or should be: a fault in it is worth more than an estimate
        return None, f"no rows of {redact(source)} at hand ({error.what.partition(' (')[0].split(': ', 1)[-1]})"


def _row_figures(rows: Rows, examples: Examples) -> dict[str, Any]:
    return {
        "source": rows.name,
        "rows": len(rows),
        "format": rows.format_summary,
        "columns_not_read": {name: round(share, 4) for name, share in rows.unread_columns.items()},
        "kept": len(examples),
        "dropped": examples.dropped,
        "dropped_prompts": examples.dropped_prompts,
        "truncated": examples.truncated,
        "bad_rows_skipped": len(rows.skipped),
    }


def _measured_lengths(recipe: Recipe, examples: Examples) -> costs.Lengths:
    order, lengths = new_order(recipe, examples), examples.lengths
    return costs.Lengths(
        longest=int(lengths.max()),
        mean=float(lengths.mean()),
        response=examples.tokens / len(examples),
        rows=len(examples),
        steps=_steps(recipe, order.steps_per_epoch),
        steps_per_epoch=order.steps_per_epoch,
    )


def _longest_lengths(recipe: Recipe, rows: Rows | None, student: Shape, teacher: Shape | None) -> costs.Lengths:
    """Return the longest lengths allowed: prompts of ``max_prompt_length``, and responses that fill the rest."""
    context = _context(student, teacher)
    longest = recipe.data.max_length if context is None else min(recipe.data.max_length, context)
    prompt = recipe.data.max_prompt_length
    response = max(1, longest - (prompt if prompt < longest else longest // 2))
    per_epoch = None
    if rows is not None:
        per_epoch = steps_per_epoch(len(rows), recipe.train.batch_size * recipe.train.accumulate)
    steps = recipe.train.steps if per_epoch is None else _steps(recipe, per_epoch)
    return costs.Lengths(
        longest=longest,
        mean=longest,
        response=response,
        rows=None if rows is None else len(rows),
        steps=steps,
        steps_per_epoch=per_epoch,
    )


def _steps(recipe: Recipe, per_epoch: int) -> int:
    return recipe.train.steps or max(1, math.ceil(recipe.train.epochs * per_epoch))


def _context(student: Shape, teacher: Shape | None) -> int | None:
    found = (context_of(s.model.config) for s in (student, teacher) if s)
    return min((n for n in found if n is not None), default=None)


def _dtype(name: str, device: torch.device, is_open: bool) -> torch.dtype:
    return torch.bfloat16 if is_open and name == "auto" else resolve_dtype(name, device)


def gpu_itemsize(name: str) -> int:
    """Return the bytes of a value of this compute dtype on a current GPU, where auto is bf16."""
    return 4 if name == "fp32" else 2
