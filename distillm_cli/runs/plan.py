"""Plan a run from its rows and models, or from the models' configs if weights are not available."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from transformers import PreTrainedModel

from distillm_cli.config.derived import ptp_stage_recipe, sft_stage_recipe
from distillm_cli.config.load import Resolved
from distillm_cli.config.schema import AdapterConfig, DataConfig, Dtype, Recipe, chosen
from distillm_cli.config.student_spec import BuiltinModel, ConfigFile, SavedModel, parse_student
from distillm_cli.data.batching import Examples, by_source, steps_of_tokens, steps_per_epoch, tokenize
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.sources import Rows, is_path, load_rows, local_path
from distillm_cli.data.templates import resolve_auto_template
from distillm_cli.errors import DataError
from distillm_cli.extras import build_extras, check_extras
from distillm_cli.models import lora
from distillm_cli.models.composite import freeze_rest, is_composite
from distillm_cli.models.model_families import context_of
from distillm_cli.models.pair import check_architectures, check_vocabularies, resolve_device, resolve_dtype
from distillm_cli.models.shapes import Shape, Sizes, has_weights, load_shape, sizes, weight_bytes
from distillm_cli.runs import costs, gpus
from distillm_cli.runs.cache_planning import CachePlan, check_rows, disk_free, plan_cache
from distillm_cli.runs.cache_size import CacheWorkload, uses_rows
from distillm_cli.runs.preflight import check_strict, greedy_answers, preflight
from distillm_cli.runs.prepare import Prepared, new_order, prepare, texts_of
from distillm_cli.runs.report import check_can_generate, check_selection_metric
from distillm_cli.runs.run_results import DecodedSequence, PlanResult
from distillm_cli.runs.source_shares import source_figures
from distillm_cli.training.distributed import launched_processes
from distillm_cli.training.events import Listener, Note, silent
from distillm_cli.types import Sequence
from distillm_cli.utils.memory import available_memory, resume_garbage_collection
from distillm_cli.utils.text import format_bytes, redact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distillm_cli.models.trained_tokenizers import TrainingTexts

_T = TypeVar("_T")
_SHOWN_SEQUENCES = 3  # of the decoded batch
_HOST_PARTS = (  # in host memory
    "teacher_states", "rollout_states", "teacher_sample_states", "host_teacher_weights", "host_activations",
)  # fmt: skip


def weights_are_available(recipe: Recipe) -> bool:
    """Return whether the run's models can be loaded: they are built from scratch, or their weights fit the free memory.

    A teacher on a server is planned from its config.
    """
    if recipe.teacher.server is not None:
        return False
    is_needed = recipe.method != "sft" or recipe.student.is_built
    paths = [recipe.student.path, recipe.teacher.path if is_needed else None]
    loaded = [path for path in paths if path is not None and _is_on_disk_or_hub(path)]
    if not all(has_weights(path) for path in loaded):
        return False
    free = available_memory()
    return free is None or sum(weight_bytes(path) for path in loaded) <= free / 4  # loaded as float32, with a margin


def _is_on_disk_or_hub(path: str) -> bool:
    return isinstance(parse_student(path), SavedModel | BuiltinModel | ConfigFile)


def plan_run(resolved: Resolved, listener: Listener, processes: int = 1, *, strict: bool = False) -> PlanResult:
    """Plan one run in ``processes``, from its models if their weights are available, else from their configs.

    strict: a warning of the checks, which need the weights, is an error.
    """
    if resolved.recipe.disco.enabled:
        from distillm_cli.runs.embeddings import plan_embeddings

        return plan_embeddings(resolved, listener)
    resume_garbage_collection()
    if not weights_are_available(resolved.recipe):
        return PlanResult(plan_from_configs(resolved, listener, processes=processes)[0])
    check_selection_metric(resolved.recipe)
    run = prepare(resolved.recipe, listener)
    check_can_generate(run)
    check_extras(run.recipe, run.pair)
    cache_plan = plan_cache(run)
    findings = preflight(run, cache_plan)
    check_strict(findings, strict=strict)
    batch = _decoded_batch(run)
    figures = _plan_prepared(run, resolved, processes, cache_plan) | {
        "findings": [finding.as_json() for finding in findings],
        "answers": [asdict(answers) for answers in greedy_answers(run, listener)],
    }
    if run.teacher_encoder is not None:
        figures["sides"] = [sequence.as_json() for sequence in batch]
    return PlanResult(figures, batch)


def _decoded_batch(run: Prepared) -> tuple[DecodedSequence, ...]:
    """Return the first sequences of a batch as text, as both models see them."""
    decoded = []
    for sequence in run.batch(0)[:_SHOWN_SEQUENCES]:
        seen = () if sequence.teacher_prompt is None else _decoded(run, sequence.for_teacher)
        decoded.append(DecodedSequence(_decoded(run, sequence), seen))
    return tuple(decoded)


def _decoded(run: Prepared, sequence: Sequence) -> tuple[tuple[str, bool], ...]:
    """Return a sequence as text. Each supervised token is one piece, and so is the context before it."""
    turns = set() if sequence.turns is None else set(sequence.turns.tolist())
    pieces: list[tuple[str, bool]] = []
    context: list[int] = []
    for position, token in enumerate([*sequence.prompt.tolist(), *sequence.response.tolist()]):
        if position < len(sequence.prompt) and position not in turns:
            context.append(token)
            continue
        pieces.append((_text(run, context), False))
        pieces.append((_text(run, [token]), True))
        context = []
    return tuple(pieces)


def _text(run: Prepared, ids: list[int]) -> str:
    return cast(str, run.pair.tokenizer.decode(ids))  # a list only for several sequences


def _plan_prepared(run: Prepared, resolved: Resolved, processes: int, cache_plan: CachePlan | None) -> dict[str, Any]:
    """Return the plan of a run whose models and rows are loaded."""
    if run.recipe.okd.rank is not None:
        build_extras(run.recipe, run.pair, {})  # as in the run: an adapter in the teacher
    workload = _prepared_workload(run, processes, cache_plan)
    workload = _with_stages(workload, resolved)
    cache = {} if cache_plan is None else {"teacher_cache": _cache_figures(run, cache_plan)}
    teacher = run.pair.teacher
    dtypes = {"student": run.student.model.dtype, "teacher": None if teacher is None else teacher.model.dtype}
    return _run_figures(workload, str(run.device), run.dtype, dtypes) | {"data": _data_figures(run)} | cache


def memory_estimate(run: Prepared, cache_plan: CachePlan | None) -> int:
    """Return the estimated peak memory of a run, in bytes, in one of its processes."""
    workload = _prepared_workload(run, launched_processes(), cache_plan)
    return costs.peak_memory(costs.memory(workload), workload.device)


def step_flops(run: Prepared, cache_plan: CachePlan | None) -> dict[str, float]:
    """Return the estimated FLOPs of a step by source, of all processes together. cache_plan: of the opened teacher."""
    workload = _prepared_workload(run, 1, cache_plan)
    return {source: gpus.flops(work) for source, work in costs.step_work(workload).items()}


def training_flops(by_source: Mapping[str, float], steps: Mapping[str, int], steps_per_epoch: int) -> float:
    """Return the FLOPs of a run. steps: by source. The teacher runs on data set rows once if its states are cached."""
    total = 0.0
    for source, count in steps.items():
        cached = by_source.get(f"{source}_cached")
        fresh = count if cached is None else min(count, steps_per_epoch)
        total += fresh * by_source.get(source, 0.0) + (count - fresh) * (cached or 0.0)
    return total


def _prepared_workload(run: Prepared, processes: int, cache_plan: CachePlan | None) -> costs.Workload:
    """Return the work of a run without the stages before it. cache_plan: of the teacher's states."""
    teacher = None if run.pair.teacher is None else run.pair.teacher.model
    return costs.Workload(
        recipe=run.recipe,
        student=sizes(run.student.model, run.pair.vocab),
        teacher=None if teacher is None else sizes(teacher, run.pair.vocab),
        vocab=run.pair.vocab,
        lengths=_measured_lengths(run.recipe, run.train),
        itemsize=run.dtype.itemsize,
        teacher_itemsize=2 if teacher is None else teacher.dtype.itemsize,
        device=run.device.type,
        cached_bytes={} if cache_plan is None else cache_plan.size.in_memory(cache_plan.mode),
        caches_rows=cache_plan is not None and bool(cache_plan.size.rows),
        caches_samples=cache_plan is not None and cache_plan.mode != "off",
        has_head_only=run.pair.teacher is not None and not run.pair.teacher.is_whole,
        processes=processes,
    )


def _data_figures(run: Prepared) -> dict[str, Any]:
    lengths = run.train.lengths
    return _row_figures(run.recipe, run.train_rows, run.train) | {
        "valid_rows": len(run.valid),
        "response_tokens": run.train.tokens,
        "longest": int(lengths.max()),
        "mean_length": round(float(lengths.mean()), 1),
    }


def _load_shapes(
    recipe: Recipe, rows: Rows | None, stage_shapes: Mapping[str, Shape] | None
) -> tuple[Shape, Shape | None]:
    """Return the shapes of the student and of the teacher; None for SFT."""
    texts = None if rows is None else partial(texts_of, rows, recipe.data)
    max_length = chosen(recipe.data.max_length)
    origin = None  # the teacher; in `sft`, the model that a built student takes its layers from
    if recipe.teacher.path is not None and (recipe.method != "sft" or recipe.student.is_built):
        origin = _teacher_shape(recipe, texts, max_length, stage_shapes)
    student = load_shape(
        recipe.student.required_path,
        revision=recipe.student.revision,
        tokenizer=recipe.student.tokenizer,
        texts=texts,
        teacher=origin,
        max_length=max_length,
        stage_shapes=stage_shapes,
    )
    return student, origin if recipe.method != "sft" else None


def _tokenized(recipe: Recipe, rows: Rows, student: Shape, teacher: Shape | None) -> Examples | None:
    """Return the tokenized training rows; None if the student's tokenizer is not available."""
    tokenizer = student.tokenizer
    if tokenizer is None:
        return None
    encoder = Encoder(
        tokenizer,
        _data_with_template(recipe, rows, tokenizer, None if teacher is None else teacher.tokenizer),
        is_encoder_decoder=student.is_encoder_decoder,
        needs_responses=recipe.needs_responses,
    )
    context = _context(student, teacher)
    return by_source("train", rows, lambda _, part: tokenize(part, encoder, recipe.data, silent, context))


def plan_from_configs(
    resolved: Resolved,
    listener: Listener = silent,
    stage_shapes: Mapping[str, Shape] | None = None,
    *,
    processes: int = 1,
) -> tuple[dict[str, Any], Shape]:
    """Return the plan of a run from its models' configs, and the student's shape.

    Tokenizer and rows are used if they are available, else the recipe's limits. A GPU is assumed if the recipe has no
    device. stage_shapes: shapes of the models of earlier stages of a pipeline, by ``stage:NAME``.
    """
    recipe = resolved.recipe
    check_selection_metric(recipe)
    if recipe.method != "sft" and recipe.teacher.cache == "disk":
        check_rows(recipe)
    needed = recipe.needs_responses
    rows, why = read_if_available(lambda: load_rows(recipe.data, "train", require_output=needed), *recipe.data.names)
    student, teacher = _load_shapes(recipe, rows, stage_shapes)
    vocab = student.vocab if teacher is None else min(student.vocab, teacher.vocab)
    notes = ["weights are not available: planned from the models' configs"]
    if teacher is not None:
        check_architectures(teacher, student)
    if teacher is not None and teacher.tokenizer is not None and student.tokenizer is not None:
        check_vocabularies(teacher.tokenizer, student.tokenizer)
    elif teacher is not None:
        notes.append("a tokenizer is not available: the vocabularies are not checked")
    examples = None if rows is None else _tokenized(recipe, rows, student, teacher)
    if examples is not None:
        lengths = _measured_lengths(recipe, examples)
    else:
        lengths = _longest_lengths(recipe, rows, student, teacher)
        notes.append(f"{why or 'no tokenizer available'}: every row is assumed to have the length data.max_length")
    is_open = recipe.train.device == "auto"
    device = torch.device("cuda") if is_open else resolve_device(recipe.train.device)
    dtype = _dtype(recipe.student.dtype, device, is_open)
    teacher_dtype = _dtype(recipe.teacher_dtype, device, is_open)
    if is_open:
        notes.append("train.device is auto: planned for a GPU")
    teacher_sizes = None if teacher is None else _teacher_sizes(teacher, recipe, vocab)
    cache, cached_bytes = _predicted_cache(recipe, teacher_sizes, lengths, teacher_dtype.itemsize)
    workload = costs.Workload(
        recipe=recipe,
        student=sizes(_with_adapter(student, recipe), vocab),
        teacher=teacher_sizes,
        vocab=vocab,
        lengths=lengths,
        itemsize=dtype.itemsize,
        teacher_itemsize=teacher_dtype.itemsize,
        device=device.type,
        cached_bytes=cached_bytes,
        caches_rows=cache is not None and bool(cache["bytes"]),
        caches_samples=recipe.teacher.cache != "off" and recipe.uncached_because is None,
        processes=processes,
    )
    workload = _with_stages(workload, resolved)
    data: dict[str, Any] = {"source": redact(recipe.data.title), "rows": None if rows is None else len(rows)}
    if rows is not None and examples is not None:
        data |= _row_figures(recipe, rows, examples) | {"response_tokens": examples.tokens}
    data |= {"longest": lengths.longest, "mean_length": round(lengths.mean, 1)}
    for note in notes:
        listener(Note(note))
    dtypes = {"student": torch.float32, "teacher": teacher_dtype}
    figures = _run_figures(workload, "GPU" if is_open else str(device), dtype, dtypes)
    figures |= {"data": data, "notes": notes}
    if cache is not None:
        figures["teacher_cache"] = cache
    return figures, student


def _teacher_shape(
    recipe: Recipe, texts: TrainingTexts | None, max_length: int, stage_shapes: Mapping[str, Shape] | None
) -> Shape:
    """Return the teacher's shape. One with random weights has the tokenizer and, by default, the family of the student."""
    path = str(recipe.teacher.path)
    student = recipe.student
    if not recipe.has_random_teacher:
        return load_shape(path, revision=recipe.teacher.revision, max_length=max_length, stage_shapes=stage_shapes)
    like = None
    if not student.is_built:
        like = load_shape(
            student.required_path,
            revision=student.revision,
            tokenizer=student.tokenizer,
            texts=texts,
            max_length=max_length,
            stage_shapes=stage_shapes,
        )
    return load_shape(path, tokenizer=student.tokenizer, texts=texts, teacher=like, max_length=max_length)


def _data_with_template(
    recipe: Recipe, rows: Rows, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase | None
) -> DataConfig:
    """Return the student's data section with the template that a run would choose, from the models' tokenizers."""
    data = recipe.data_of("student")
    student_template = student.chat_template
    teacher_template = student_template if teacher is None else teacher.chat_template
    if student_template is None:
        student.chat_template = teacher_template
    if data.template != "auto":
        return data
    template = resolve_auto_template(rows, student_template is not None and teacher_template is not None)
    return data if template is None else data.model_copy(update={"template": template[0]})


def _with_stages(run: costs.Workload, resolved: Resolved) -> costs.Workload:
    """Return the run with the stages before it: the same rows, and no teacher in their steps.

    Pre-training has no product with the student's head, but with a layer for its four classes.
    """
    recipes = {"sft": sft_stage_recipe(resolved), "ptp": ptp_stage_recipe(resolved)}
    own: dict[str, dict[str, Any]] = {"ptp": {"vocab": 4, "labelling": costs.labelling_work(run)}}
    per_epoch = run.lengths.steps_per_epoch
    stages = {}
    for name, stage in recipes.items():
        if stage is not None:
            lengths = replace(run.lengths, steps=None if per_epoch is None else _steps(stage.recipe, per_epoch))
            alone = replace(run, teacher=None, lengths=lengths, cached_bytes=None, caches_rows=False)
            stages[name] = replace(alone, recipe=stage.recipe, **own.get(name, {}))
    return replace(run, stages=stages)


def _run_figures(
    run: costs.Workload, device: str, dtype: torch.dtype, dtypes: Mapping[str, torch.dtype | None]
) -> dict[str, Any]:
    """Return the figures that do not depend on whether the models were loaded."""
    models: dict[str, Any] = {}
    for name, model_sizes in (("student", run.student), ("teacher", run.teacher)):
        if model_sizes is not None:
            models[name] = model_figures(model_sizes, str(dtypes[name]).removeprefix("torch."))
    if run.teacher is not None:
        ratio = run.teacher.parameters["total"] / run.student.parameters["total"]
        models["ratio"] = round(ratio, 2)
    memory = costs.memory(run)
    gpu_run = _on_gpu(run)
    gpu_parts = {part: size for part, size in costs.memory(gpu_run).items() if part not in _HOST_PARTS}
    lengths = run.lengths
    stages = {name: _stage_figures(stage) for name, stage in run.stages.items()}
    config = run.recipe.robustkd
    masks = {"masks": {"share_of_rows": config.mask_rows, "epochs": config.mask_epochs}} if config.blocks else {}
    return {
        "method": run.recipe.method,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "models": models,
        "vocabulary": run.vocab,
        "steps": lengths.steps,
        "steps_per_epoch": lengths.steps_per_epoch,
        "sequences_per_step": run.step_sequences
        * (2 if run.recipe.objective.row_weight or run.schedule.in_pairs else 1),
        **({} if run.recipe.train.tokens_per_step is None else {"tokens_per_step": run.recipe.train.tokens_per_step}),
        "memory": memory | {"total": costs.peak_memory(memory, run.device)},
        "step_flops": _step_flops(run),
        **stages,
        **masks,
        **_process_figures(run),
        "gpus": costs.gpu_figures(gpu_run, costs.peak_memory(gpu_parts, gpu_run.device)),
        "assumed": gpus.ASSUMED,
    }


def _process_figures(run: costs.Workload) -> dict[str, Any]:
    """Return the figures of a run in several processes; the other figures are those of one of them."""
    if run.processes == 1:
        return {}
    sent = costs.network_bytes(run)
    return {
        "processes": {
            "number": run.processes,
            "sequences_each": run.sequences,
            "network_bytes": sent,
            "network_s": {link: float(f"{sent / rate:.2g}") for link, rate in gpus.LINKS.items()},
        }
    }


def _step_flops(run: costs.Workload) -> dict[str, float]:
    return {source: float(f"{gpus.flops(work):.4g}") for source, work in costs.step_work(run).items()}


def _stage_figures(run: costs.Workload) -> dict[str, Any]:
    return {"epochs": run.recipe.train.epochs, "steps": run.lengths.steps, "step_flops": _step_flops(run)}


def _on_gpu(run: costs.Workload) -> costs.Workload:
    """Return the same run on a current GPU, with the dtype that auto chooses there for the student."""
    itemsize = gpu_itemsize(run.recipe.student.dtype)
    stages = {name: _on_gpu(stage) for name, stage in run.stages.items()}
    return replace(run, device="cuda", itemsize=itemsize, stages=stages)


def model_figures(model_sizes: Sizes, dtype: str) -> dict[str, Any]:
    """Return a model's sizes. In an encoder-decoder, ``layers`` are the decoder's, and there are ``encoder_layers``."""
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
        "hit": cache_plan.exists,
        "disk_free": disk_free(cache_plan.place),
    }


def _with_adapter(student: Shape, recipe: Recipe) -> PreTrainedModel:
    """Return the student for training: a copy with its adapter, if it has one."""
    if recipe.student.lora.r is None and not is_composite(student.model.config):
        return student.model
    model = copy.deepcopy(student.model)
    freeze_rest(model)
    if recipe.student.lora.r is None:
        return model
    with torch.device("meta"):
        lora.attach(model, recipe.student.lora, seed=0, base=str(recipe.student.path), revision=None)
    return model


def _teacher_sizes(teacher: Shape, recipe: Recipe, vocab: int) -> Sizes:
    """Return the sizes of a teacher: without trainable parameters, unless it is trained."""
    if recipe.ctcd.enabled:
        return sizes(teacher.model, vocab)
    if recipe.okd.rank is None:
        model_sizes = sizes(teacher.model, vocab)
        return replace(model_sizes, parameters=model_sizes.parameters | {"trainable": 0})
    model = copy.deepcopy(teacher.model)
    with torch.device("meta"):
        lora.attach(model, AdapterConfig(r=recipe.okd.rank), seed=0, base=str(recipe.teacher.path), revision=None)
    return sizes(model, vocab)


def _predicted_cache(
    recipe: Recipe, teacher: Sizes | None, lengths: costs.Lengths, itemsize: int
) -> tuple[dict[str, Any] | None, dict[str, int]]:
    """Return the figures of the teacher cache, predicted from the models' shapes, and its bytes by part of the memory.

    Free memory is not checked: if weights are not available, the run takes place on another machine.
    """
    if teacher is None:
        return None, {}
    if recipe.uncached_because is not None:
        why = f"not cached, since {recipe.uncached_because}"
        sizes_of_none = {"rows": 0, "bytes": 0, "rollout_bytes": 0, "sample_bytes": 0, "bytes_per_token": 0}
        return {"mode": "off", **sizes_of_none, "why": why}, {}
    mode = recipe.teacher.cache
    rows = lengths.rows or 0
    workload = CacheWorkload(
        recipe=recipe,
        bytes_per_token=teacher.head_in * itemsize,
        rows=lengths.rows,
        row_tokens=rows * lengths.response,
        steps=lengths.steps,
        steps_per_epoch=lengths.steps_per_epoch,
    )
    size = workload.size(mode)
    places = {"off": "", "disk": "on disk", "memory": "in memory", "auto": "in memory, if enough is free"}
    parts = size.described(rows)
    why = f"{places[mode]}: {parts}"
    if not parts:
        why = "not cached" if mode == "off" else "not cached: no sequence repeats"
    if lengths.rows is None and uses_rows(recipe) and mode != "off":
        why = f"{format_bytes(workload.bytes_per_token)} for each response token of a row{f'; {why}' if parts else ''}"
    cache = {
        "mode": mode,
        "rows": lengths.rows if size.rows else 0,
        "bytes": size.rows,
        "rollout_bytes": size.rollouts,
        "sample_bytes": size.samples,
        "why": why,
        "bytes_per_token": workload.bytes_per_token,
    }
    return cache, size.in_memory(mode)


def read_if_available(read: Callable[[], _T], *sources: str) -> tuple[_T | None, str]:
    """Return the result of ``read``, or None with the reason if the rows are not available."""
    try:
        return read(), ""
    except DataError as error:
        if all(is_path(source) or local_path(source) is not None for source in sources):
            raise  # a local file: report its error instead of estimating
        return (
            None,
            f"no rows of {redact(' + '.join(sources))} available ({error.what.partition(' (')[0].split(': ', 1)[-1]})",
        )


def _row_figures(recipe: Recipe, rows: Rows, examples: Examples) -> dict[str, Any]:
    sources = source_figures(recipe.data, examples, new_order(recipe, examples))
    mixture = {"sources": sources} if sources else {}
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
        **mixture,
    }


def _measured_lengths(recipe: Recipe, examples: Examples) -> costs.Lengths:
    order = new_order(recipe, examples)
    lengths = examples.lengths
    return costs.Lengths(
        longest=int(lengths.max()),
        mean=float(lengths.mean()),
        response=examples.tokens / len(examples),
        rows=len(examples),
        steps=_steps(recipe, order.steps_per_epoch),
        steps_per_epoch=order.steps_per_epoch,
    )


def _longest_lengths(recipe: Recipe, rows: Rows | None, student: Shape, teacher: Shape | None) -> costs.Lengths:
    """Return the longest allowed lengths: prompts of ``max_prompt_length``, and responses that fill the rest."""
    context = _context(student, teacher)
    max_length = chosen(recipe.data.max_length)
    longest = max_length if context is None else min(max_length, context)
    prompt = chosen(recipe.data.max_prompt_length)
    response = max(1, longest - (prompt if prompt < longest else longest // 2))
    per_epoch = None
    if rows is not None:
        train = recipe.train
        if train.tokens_per_step is not None:
            per_epoch = steps_of_tokens(len(rows), float(len(rows) * longest), train.tokens_per_step)
        else:
            per_epoch = steps_per_epoch(len(rows), train.batch_size * train.accumulate)
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
    return recipe.train.steps or max(1, math.ceil(chosen(recipe.train.epochs) * per_epoch))


def _context(student: Shape, teacher: Shape | None) -> int | None:
    contexts = (context_of(shape.model.config) for shape in (student, teacher) if shape)
    return min((context for context in contexts if context is not None), default=None)


def _dtype(name: Dtype, device: torch.device, is_open: bool) -> torch.dtype:
    return torch.bfloat16 if is_open and name == "auto" else resolve_dtype(name, device)


def gpu_itemsize(name: str) -> int:
    """Return the bytes of a value in this compute dtype on a current GPU, where auto is bf16."""
    return 4 if name == "fp32" else 2
