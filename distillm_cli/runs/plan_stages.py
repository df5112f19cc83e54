"""Plan a pipeline: training stages as runs, the others as models that respond to prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from distillm_cli.config.load import Resolved
from distillm_cli.config.pipeline_recipe import PREFIX, GenerateStageConfig, Pipeline, RespondingStageConfig
from distillm_cli.config.schema import Recipe, SourceConfig, chosen
from distillm_cli.config.suite_file import LM_EVAL
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.sources import Row
from distillm_cli.errors import RecipeError
from distillm_cli.evaluation.evaluate import passes
from distillm_cli.evaluation.suites import held_out, load_suite
from distillm_cli.models.model_families import context_of
from distillm_cli.models.shapes import Shape, Sizes, load_shape, sizes
from distillm_cli.runs import costs
from distillm_cli.runs.gpus import ASSUMED, GPUS, Gpu, Part, fits_in_memory
from distillm_cli.runs.plan import gpu_itemsize, model_figures, plan_from_configs, read_if_available
from distillm_cli.runs.prompt_source import PromptSource, read_prompts
from distillm_cli.runs.run_results import PipelinePlan
from distillm_cli.training.events import Listener, Note, silent
from distillm_cli.utils.text import counted


def plan_pipeline(pipeline: Pipeline, listener: Listener, processes: int = 1) -> PipelinePlan:
    """Plan every stage, the training ones in ``processes``.

    Models of earlier stages are represented by their shapes, sampled rows by their prompts.
    """
    plans: dict[str, dict[str, Any]] = {}
    shapes: dict[str, Shape] = {}
    samples: dict[str, PlannedSamples] = {}
    for stage in pipeline.stages:
        listener(Note(f"stage {stage.name}"))
        sources = [name for name in stage.resolved.recipe.data.names if name in samples]
        resolved = _on_sampled_prompts(samples, stage.resolved) if sources else stage.resolved
        if resolved.recipe.disco.enabled:
            what = f"stage {stage.name} trains sentence embeddings, and the plan of a pipeline does not estimate them"
            raise RecipeError(
                "recipe.invalid_stage", what, hint="plan its recipe alone: distillm plan --method disco …"
            )
        if isinstance(stage.config, GenerateStageConfig):
            data = resolved.recipe.data
            limit = stage.config.limit or data.limit
            samples[PREFIX + stage.name] = PlannedSamples(data.source, limit, stage.config.n)
        if isinstance(stage.config, RespondingStageConfig) and stage.config.server is not None:
            listener(Note(f"stage {stage.name}: a server responds; its memory and time are not estimated"))
            continue
        if stage.verb in ("sft", "distill"):
            figures, shapes[PREFIX + stage.name] = plan_from_configs(resolved, silent, shapes, processes=processes)
        elif isinstance(stage.config, GenerateStageConfig):
            figures = _plan_generate(stage.config, resolved.recipe, shapes)
        else:
            figures = _plan_eval(stage.config.model_names, resolved.recipe, shapes, samples)
        plans[stage.name] = {"verb": stage.verb} | figures
        figures["notes"] += [f"{source} does not exist yet: planned with {samples[source]}" for source in sources]
    if not plans:
        raise RecipeError("recipe.invalid_stage", "servers respond in all stages: there is nothing to estimate")
    return PipelinePlan(pipeline.name, plans)


@dataclass(frozen=True)
class PlannedSamples:
    """Describe the output of a generate stage: ``each`` responses to the first ``limit`` prompts of a source."""

    source: str
    limit: int | None
    each: int

    def __str__(self) -> str:
        first = "the rows" if self.limit is None else f"the first {counted(self.limit, 'row')}"
        return f"{first} of {self.source}{'' if self.each == 1 else f', once instead of {self.each} times'}"


def _on_sampled_prompts(samples: Mapping[str, PlannedSamples], resolved: Resolved) -> Resolved:
    """Return a stage's recipe with the sources of the prompts as its data."""
    recipe = resolved.recipe
    own = recipe.data.sources or (SourceConfig(source=recipe.data.source),)
    sources = []
    for source in own:
        planned = samples.get(source.source)
        if planned is not None:
            limits = [limit for limit in (planned.limit, source.limit, recipe.data.limit) if limit]
            source = source.model_copy(update={"source": planned.source, "limit": min(limits, default=None)})
        sources.append(source)
    if recipe.data.sources:
        data = recipe.data.model_copy(update={"sources": tuple(sources)})
    else:
        data = recipe.data.of(sources[0].source, limit=sources[0].limit)
    return replace(resolved, recipe=recipe.model_copy(update={"data": data}))


@dataclass(frozen=True)
class _Prompts:
    """Describe the prompts that a model responds to.

    rows: number of prompts, None if unknown. tokens, longest: mean and largest length. new_tokens: maximum number of
    tokens of a response. each: responses per prompt.
    """

    rows: int | None
    tokens: float
    longest: int
    new_tokens: int
    each: int

    @property
    def responses(self) -> int | None:
        """Return the number of responses to all prompts, None if unknown."""
        return None if self.rows is None else self.rows * self.each


def _plan_generate(own: GenerateStageConfig, recipe: Recipe, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    name = recipe.data.source
    source = PromptSource(data=name, split=own.split, limit=own.limit or recipe.data.limit, samples=own.n)
    rows, why = read_if_available(lambda: read_prompts(source, recipe.data, silent), name)
    shape = load_shape(own.model, max_length=chosen(recipe.data.max_length), stage_shapes=shapes)
    prompts = _prompts(rows, shape, recipe, recipe.rollout.max_new_tokens, own.n)
    return _figures({own.model: (shape, [prompts])}, recipe, _notes(why, shape))


def _plan_eval(
    names: Sequence[str], recipe: Recipe, shapes: Mapping[str, Shape], samples: Mapping[str, PlannedSamples]
) -> dict[str, Any]:
    names_of_rows = [name for name in recipe.eval.suites if not name.startswith(LM_EVAL)]
    suites = [samples[name].source if name in samples else name for name in names_of_rows]
    read = [read_if_available(partial(load_suite, name, recipe, silent), name) for name in suites]
    if not recipe.eval.suites:
        sources = recipe.data.names if recipe.data.valid is None else (recipe.data.valid,)
        read = [read_if_available(partial(held_out, recipe, silent), *sources)]
    # The embeddings of a suite of sentence pairs cost next to nothing beside responses.
    all_rows = [None if suite is None else suite.rows for suite, _ in read if suite is None or not suite.is_pairs]
    each = len(passes(recipe.eval))
    notes = [why for _, why in read if why]
    notes += [
        f"{suite.name}: embeddings of sentence pairs, not estimated" for suite, _ in read if suite and suite.is_pairs
    ]
    models = {}
    for name in names:
        shape = load_shape(name, max_length=chosen(recipe.data.max_length), stage_shapes=shapes)
        prompts = [_prompts(rows, shape, recipe, recipe.eval.max_new_tokens, each) for rows in all_rows]
        models[name] = (shape, prompts)
        notes += _notes("", shape)
    return _figures(models, recipe, list(dict.fromkeys(notes)))


def _notes(why: str, shape: Shape) -> list[str]:
    notes = [why] if why else []
    if shape.tokenizer is None:
        notes.append("a tokenizer is not available: every prompt is assumed to have the length data.max_prompt_length")
    return notes


def _prompts(rows: Sequence[Row] | None, shape: Shape, recipe: Recipe, max_new_tokens: int, each: int) -> _Prompts:
    """Measure the prompts if rows and tokenizer are available; else assume the maximum length."""
    longest = chosen(recipe.data.max_prompt_length)
    tokens: float = longest
    if rows and shape.tokenizer is not None:
        encoder = Encoder(shape.tokenizer, recipe.data, is_encoder_decoder=shape.is_encoder_decoder)
        lengths = [len(ids) for ids in encoder.prompts(list(rows))]
        tokens = sum(lengths) / len(lengths)
        longest = max(lengths)
    context = context_of(shape.model.config)
    new_tokens = max_new_tokens if context is None else min(max_new_tokens, int(context - tokens))
    return _Prompts(None if rows is None else len(rows), tokens, longest, max(1, new_tokens), each)


def _figures(models: Mapping[str, tuple[Shape, list[_Prompts]]], recipe: Recipe, notes: list[str]) -> dict[str, Any]:
    """Return the figures of a stage in which models respond to prompts. A response costs its share of its batch."""
    itemsize = gpu_itemsize(recipe.student.dtype)
    batch = recipe.eval.batch_size
    model_sizes = {name: sizes(shape.model, shape.vocab) for name, (shape, _) in models.items()}
    jobs = [(model_sizes[name], prompts) for name, (_, suites) in models.items() for prompts in suites]
    work = [_response_work(model, prompts, batch, itemsize) for model, prompts in jobs]
    counts = [prompts.responses for _, prompts in jobs]
    known = [count for count in counts if count is not None]
    memory = max((_memory(model, prompts, batch, itemsize) for model, prompts in jobs), key=lambda m: sum(m.values()))
    flops = [part.flops for part in work]
    dtype = str(torch.bfloat16 if itemsize == 2 else torch.float32).removeprefix("torch.")
    total = sum(memory.values())
    return {
        "models": {name: model_figures(size, dtype) for name, size in model_sizes.items()},
        "responses": sum(known) if len(known) == len(counts) else None,
        "prompt_tokens": [min(prompts.tokens for _, prompts in jobs), max(prompts.tokens for _, prompts in jobs)],
        "new_tokens": max(prompts.new_tokens for _, prompts in jobs),
        "response_flops": [float(f"{f(flops):.4g}") for f in (min, max)],
        "memory": memory | {"total": total},
        "gpus": {gpu.name: _on_gpu(gpu, total, work, counts) for gpu in GPUS},
        "assumed": ASSUMED,
        "notes": notes,
    }


def _on_gpu(gpu: Gpu, memory: int, work: list[Part], counts: list[int | None]) -> dict[str, Any]:
    """Return whether the memory fits a GPU, and the seconds of a response and, if the counts are known, of all."""
    seconds = [part.seconds(gpu) for part in work]
    entry: dict[str, Any] = {"fits": fits_in_memory(memory, gpu), "response_s": [min(seconds), max(seconds)]}
    known = [count for count in counts if count is not None]
    if len(known) == len(counts):
        total = sum(count * s for count, s in zip(known, seconds, strict=True))
        entry["run_s"] = [total, total]
    return entry


def _batch_rows(prompts: _Prompts, batch: int) -> int:
    return batch if prompts.rows is None else max(1, min(batch, prompts.rows))


def _response_work(model: Sizes, prompts: _Prompts, batch: int, itemsize: int) -> Part:
    """Return the work of one response of a batch that is decoded together."""
    rows = _batch_rows(prompts, batch)
    batch_work = costs.decoding_work(model, rows, prompts.tokens, prompts.new_tokens, model.vocab, itemsize)
    return batch_work.divided(rows)


def _memory(model: Sizes, prompts: _Prompts, batch: int, itemsize: int) -> dict[str, int]:
    """Return the bytes while decoding: weights, keys and values, and a step's logits with their tables (float32)."""
    rows = _batch_rows(prompts, batch)
    return {
        "weights": model.parameters["total"] * itemsize,
        "cache": costs.kv_cache_bytes(model, rows * (prompts.longest + prompts.new_tokens), itemsize),
        "logits": 4 * rows * model.vocab * 4,
    }
