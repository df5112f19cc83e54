"""The plan of a pipeline as data: its training stages as runs, and those in which models only answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from distillm_cli.config.load import Resolved
from distillm_cli.config.pipeline_recipe import PREFIX, Pipeline, Stage
from distillm_cli.config.schema import Recipe
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.sources import Row
from distillm_cli.evaluation.evaluate import passes
from distillm_cli.evaluation.suites import held_out, load_suite
from distillm_cli.models.model_families import context_of
from distillm_cli.models.shapes import Shape, Sizes, load_shape, sizes
from distillm_cli.runs import costs
from distillm_cli.runs.gpus import ASSUMED, GPUS, Part, fits
from distillm_cli.runs.plan import at_hand, gpu_itemsize, model_told, of_shapes
from distillm_cli.runs.prompt_source import PromptSource, prompts_of
from distillm_cli.training.events import Listener, Note, silent
from distillm_cli.utils.text import counted


def of_pipeline(pipeline: Pipeline, listener: Listener) -> dict[str, dict[str, Any]]:
    """The plan of every stage, by name. What an earlier stage makes stands there with its shape, and the rows it samples
    with those that it answers."""
    found: dict[str, dict[str, Any]] = {}
    made: dict[str, Shape] = {}
    sources: dict[str, Samples] = {}
    for stage in pipeline.stages:
        listener(Note(f"stage {stage.name}"))
        said = stage.resolved.recipe.data.source
        resolved = stage.resolved if said not in sources else _on_prompts_of(sources[said], stage.resolved)
        if stage.verb in ("sft", "distill"):
            told, made[PREFIX + stage.name] = of_shapes(resolved, silent, made)
        elif stage.verb == "generate":
            data = resolved.recipe.data
            sources[PREFIX + stage.name] = Samples(data.source, stage.own.limit or data.limit, stage.own.n)
            told = _of_generate(stage, resolved.recipe, made)
        else:
            told = _of_eval(stage, resolved.recipe, made, sources)
        found[stage.name] = {"verb": stage.verb} | told
        if said in sources:
            told["notes"].append(f"{said} is not there yet: {sources[said]} stand for it")
    return found


@dataclass(frozen=True)
class Samples:
    """What a generate stage will make: ``each`` answers to the first ``limit`` prompts of a source."""

    source: str
    limit: int | None
    each: int

    def __str__(self) -> str:
        first = "the rows" if self.limit is None else f"the first {counted(self.limit, 'row')}"
        return f"{first} of {self.source}{'' if self.each == 1 else f', once instead of {self.each} times,'}"


def _on_prompts_of(samples: Samples, resolved: Resolved) -> Resolved:
    """The same stage on the rows whose prompts are answered."""
    recipe = resolved.recipe
    limit = min(filter(None, (samples.limit, recipe.data.limit)), default=None)
    data = recipe.data.model_copy(update={"source": samples.source, "limit": limit})
    return replace(resolved, recipe=recipe.model_copy(update={"data": data}))


@dataclass(frozen=True)
class Asked:
    """Prompts that a model is to answer. rows: how many, None where they are not at hand. tokens: their mean length, and
    the longest. new: tokens of a response, at most. each: responses to a prompt."""

    rows: int | None
    tokens: float
    longest: int
    new: int
    each: int


def _of_generate(stage: Stage, recipe: Recipe, made: Mapping[str, Shape]) -> dict[str, Any]:
    own, source = stage.own, recipe.data.source
    wanted = PromptSource(data=source, split=own.split, limit=own.limit or recipe.data.limit, samples=own.n)
    rows, why = at_hand(lambda: prompts_of(wanted, recipe.data, silent), source)
    shape = load_shape(own.model, max_length=recipe.data.max_length, made=made)
    asked = _asked(rows, shape, recipe, recipe.rollout.max_new_tokens, own.n)
    return _told({own.model: (shape, [asked])}, recipe, _notes(why, shape))


def _of_eval(stage: Stage, recipe: Recipe, made: Mapping[str, Shape], sources: Mapping[str, Samples]) -> dict[str, Any]:
    suites = [sources[name].source if name in sources else name for name in recipe.eval.suites]
    found = [at_hand(lambda name=name: load_suite(name, recipe, silent).rows, name) for name in suites]
    if not found:
        found = [at_hand(lambda: held_out(recipe, silent).rows, recipe.data.valid or recipe.data.source)]
    each, notes = len(passes(recipe.eval)), [why for _, why in found if why]
    models = {}
    for name in stage.own.models:
        shape = load_shape(name, max_length=recipe.data.max_length, made=made)
        asked = [_asked(rows, shape, recipe, recipe.eval.max_new_tokens, each) for rows, _ in found]
        models[name] = (shape, asked)
        notes += _notes("", shape)
    return _told(models, recipe, list(dict.fromkeys(notes)))


def _notes(why: str, shape: Shape) -> list[str]:
    found = [why] if why else []
    if shape.tokenizer is None:
        found.append("a tokenizer is not at hand: every prompt is taken to be as long as data.max_prompt_length allows")
    return found


def _asked(rows: Sequence[Row] | None, shape: Shape, recipe: Recipe, new: int, each: int) -> Asked:
    """With the prompts measured, where rows and tokenizer are at hand; else as long as the recipe allows."""
    tokens, longest, count = recipe.data.max_prompt_length, recipe.data.max_prompt_length, None
    if rows is not None:
        count = len(rows)
    if rows and shape.tokenizer is not None:
        encoder = Encoder(shape.tokenizer, recipe.data, is_encoder_decoder=shape.is_encoder_decoder)
        lengths = [len(ids) for ids in encoder.prompts(list(rows))]
        tokens, longest = sum(lengths) / len(lengths), max(lengths)
    context = context_of(shape.model.config)
    room = new if context is None else min(new, int(context - tokens))
    return Asked(count, tokens, longest, max(1, room), each)


def _told(models: Mapping[str, tuple[Shape, list[Asked]]], recipe: Recipe, notes: list[str]) -> dict[str, Any]:
    """The numbers of a stage in which models answer prompts. A response's share of its batch is what it costs."""
    itemsize, batch = gpu_itemsize(recipe.student.dtype), recipe.eval.batch_size
    counted = {name: sizes(shape.model, shape.vocab) for name, (shape, _) in models.items()}
    jobs = [
        (asked, _response(counted[name], asked, batch, itemsize))
        for name, (_, every) in models.items()
        for asked in every
    ]
    responses = _total(asked.rows and asked.rows * asked.each for asked, _ in jobs)
    need = [_memory(counted[name], asked, batch, itemsize) for name, (_, every) in models.items() for asked in every]
    most = max(need, key=lambda parts: sum(parts.values()))
    most |= {"total": sum(most.values())}
    gpus = {}
    for gpu in GPUS:
        each = [part.seconds(gpu) for _, part in jobs]
        entry: dict[str, Any] = {"fits": fits(most["total"], gpu), "response_s": [min(each), max(each)]}
        if responses is not None:
            whole = sum(asked.rows * asked.each * s for (asked, _), s in zip(jobs, each, strict=True))
            entry["run_s"] = [whole, whole]
        gpus[gpu.name] = entry
    each_flops = [part.flops for _, part in jobs]
    dtype = str(torch.bfloat16 if itemsize == 2 else torch.float32).removeprefix("torch.")
    return {
        "models": {name: model_told(size, dtype) for name, size in counted.items()},
        "responses": responses,
        "prompt_tokens": [min(a.tokens for a, _ in jobs), max(a.tokens for a, _ in jobs)],
        "new_tokens": max(a.new for a, _ in jobs),
        "response_flops": [float(f"{f(each_flops):.4g}") for f in (min, max)],
        "memory": most,
        "gpus": gpus,
        "assumed": ASSUMED,
        "notes": notes,
    }


def _response(model: Sizes, asked: Asked, batch: int, itemsize: int) -> Part:
    """One response, of a batch that is decoded side by side."""
    rows = batch if asked.rows is None else max(1, min(batch, asked.rows))
    return costs.decoded(model, rows, asked.tokens, asked.new, model.vocab, itemsize).shared(rows)


def _memory(model: Sizes, asked: Asked, batch: int, itemsize: int) -> dict[str, int]:
    """Bytes while answering: weights, keys and values, and the logits of a step with the tables made of them (float32)."""
    rows = batch if asked.rows is None else max(1, min(batch, asked.rows))
    return {
        "weights": model.parameters["total"] * itemsize,
        "cache": costs.cache_bytes(model, rows * (asked.longest + asked.new), itemsize),
        "logits": 4 * rows * model.vocab * 4,
    }


def _total(counts: Any) -> int | None:
    every = list(counts)
    return None if None in every else sum(every)
