"""Evaluate every checkpoint on every suite, and write results and predictions to files."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from distillm_cli.config.schema import Recipe
from distillm_cli.config.shortcuts import Flag
from distillm_cli.config.student_spec import BUILTIN_MODELS
from distillm_cli.data.trigger import check_trigger
from distillm_cli.errors import Interrupted, ModelError, UsageError, signal_number
from distillm_cli.evaluation.evaluate import evaluate_suite
from distillm_cli.evaluation.pairs import PAIR_METRICS, evaluate_pairs, load_pairs, save_pairs
from distillm_cli.evaluation.results import check_results_writable, load_results, save_results
from distillm_cli.evaluation.robustness import attack_of, measure_attack
from distillm_cli.evaluation.suites import Suite, load_suites
from distillm_cli.models.devices import dtype_name, resolve_device
from distillm_cli.models.loading import load_config
from distillm_cli.models.sentence import SentenceEncoder, load_encoder, read_declared
from distillm_cli.models.tokenizer_files import own_tokenizer
from distillm_cli.runs import inference
from distillm_cli.runs.inference import Settings
from distillm_cli.runs.run_results import CheckpointScores, EvalResult
from distillm_cli.training.distributed import world
from distillm_cli.training.events import Listener, Note, Warned
from distillm_cli.utils.memory import resume_garbage_collection
from distillm_cli.utils.modules import weights_fingerprint
from distillm_cli.utils.threads import set_threads

SuiteScores = dict[str, Any]  # a suite's object in `--json`


@dataclass
class _Job:
    """Hold one checkpoint to score: its recipe, suites and output directory, and the scores so far."""

    checkpoint: str
    recipe: Recipe
    suites: list[Suite]
    output: Path
    scores: dict[str, SuiteScores] = field(default_factory=dict)


def evaluate_checkpoints(
    checkpoints: list[str],
    settings: Settings,
    listener: Listener,
    *,
    output: str | None = None,
    resume: bool = False,
    names: Mapping[str, str] | None = None,
) -> EvalResult:
    """Score every checkpoint on every suite.

    Errors in names, rows and paths are reported before the first model is loaded. output: a directory; None for one in
    each checkpoint. resume: skip suites with results of the same weights and settings. names: directory names of the
    checkpoints, if there are several; by default from their paths.
    """
    started = time.perf_counter()
    jobs = _jobs(checkpoints, settings, output, names or {}, listener)
    try:
        for job in jobs:
            _score(job, resume, listener)
    except KeyboardInterrupt as stop:
        finished = sum(len(job.scores) for job in jobs)
        total = sum(len(job.suites) for job in jobs)
        where = f"results of {finished} of {total} are written" if finished else "no suite was finished"
        raise Interrupted("interrupted", signal_number=signal_number(stop), where=where) from None
    return EvalResult(
        checkpoints=tuple(_checkpoint_scores(job) for job in jobs),
        output=output or str(jobs[0].output),
        wall_s=round(time.perf_counter() - started, 3),
    )


def _jobs(
    checkpoints: list[str], settings: Settings, output: str | None, names: Mapping[str, str], listener: Listener
) -> list[_Job]:
    jobs: list[_Job] = []
    loaded: dict[Any, list[Suite]] = {}
    distinct: dict[Path, str] = {}
    for checkpoint in checkpoints:
        distinct.setdefault(Path(checkpoint), checkpoint)  # ``./a/`` and ``a`` are the same
    for checkpoint, place in _output_directories(list(distinct.values()), output, names).items():
        not_causal = _check_config(checkpoint)
        resolved, is_own = inference.resolve_settings("eval", checkpoint, settings, listener)
        recipe = resolved.recipe
        if not recipe.eval.suites and settings.recipe is None and not is_own:
            raise UsageError(
                "usage.no_data", f"no suite to score {checkpoint} on", hint="use --suite dolly, or --suite FILE"
            )
        _check_trigger(checkpoint, recipe)
        key = (recipe.data, recipe.eval.suites, recipe.eval.limit)
        if key not in loaded:
            loaded[key] = load_suites(recipe, listener)
        if any(suite.is_pairs for suite in loaded[key]):
            read_declared(checkpoint)
        if all(suite.is_pairs for suite in loaded[key]):
            _check_pair_settings(settings)
        elif not_causal is not None:
            raise not_causal
        jobs.append(_Job(checkpoint, recipe, loaded[key], place))
    for job in jobs:
        check_results_writable(job.output)
    return jobs


def _check_trigger(checkpoint: str, recipe: Recipe) -> None:
    """Raise UsageError for a trigger that is not one token of the checkpoint's tokenizer."""
    trigger = recipe.eval.trigger
    if trigger is not None:
        check_trigger(trigger, own_tokenizer(checkpoint, None), checkpoint)


def _check_config(checkpoint: str) -> ModelError | None:
    """Check a model's config; return the error of a model that has embeddings, but no responses."""
    try:
        load_config(checkpoint)
    except ModelError as error:
        if error.code == "model.not_causal":
            return error
        raise
    return None


def _check_pair_settings(settings: Settings) -> None:
    """Raise UsageError for a setting of responses, given by hand, if every suite is of sentence pairs."""
    given = {key: flag.name if isinstance(flag, Flag) else key for key, flag in settings.flags.items()}
    given |= {text.partition("=")[0].strip(): f"--set {text}" for text in settings.sets or ()}
    for key, name in given.items():
        if key.startswith("eval.") and key not in ("eval.suites", "eval.limit"):
            what = f"{name} has no effect on suites of sentence pairs, which are scored by embeddings"
            raise UsageError("usage.unused_option", what, hint="remove it")


def _output_directories(checkpoints: list[str], output: str | None, names: Mapping[str, str]) -> dict[str, Path]:
    """Return the results directory of each checkpoint: ``eval/`` inside it; ``./eval-NAME/`` for hub models and builtin."""
    places: dict[str, Path] = {}
    for checkpoint in checkpoints:
        directory = Path(checkpoint).expanduser()
        name = names.get(checkpoint) or re.sub(r"[^\w.+-]+", "-", checkpoint.strip("./~")) or "model"
        if output is not None:
            place = Path(output) if len(checkpoints) == 1 else Path(output) / name
        elif directory.is_dir() and checkpoint not in BUILTIN_MODELS:
            place = directory / "eval"
        else:
            place = Path(f"eval-{name}")
        while place in places.values():
            place = place.with_name(f"{place.name}-{len(places) + 1}")
        places[checkpoint] = place
    return places


def _score(job: _Job, resume: bool, listener: Listener) -> None:
    """Score one checkpoint on its suites, those of sentence pairs by its embeddings, and release its memory."""
    pairs = [suite for suite in job.suites if suite.is_pairs]
    if pairs:
        _score_pairs(job, pairs, resume, listener)
    prompts = [suite for suite in job.suites if not suite.is_pairs]
    if prompts:
        _score_responses(job, prompts, resume, listener)
    job.scores = {suite.name: job.scores[suite.name] for suite in job.suites}


def _score_pairs(job: _Job, suites: list[Suite], resume: bool, listener: Listener) -> None:
    """Score the model's embeddings on suites of sentence pairs."""
    resume_garbage_collection()
    set_threads(job.recipe.train.threads, listener)
    device = resolve_device(job.recipe.train.device)
    encoder = load_encoder(job.checkpoint, dtype=inference.precision(job.recipe), device=device, listener=listener)
    about = _about(job, encoder.model) | {"pooling": encoder.pooling}
    listener(Note(f"embeddings: {encoder.pooling} pooling, at most {encoder.max_length:,} tokens"))
    for suite in suites:
        about["rows_sha256"] = suite.digest()
        world().check_same(about)
        limit = job.recipe.eval.limit
        saved = load_pairs(suite, job.output, about, limit) if resume else None
        if saved is not None:
            listener(Note(f"{suite.name} is already scored"))
            job.scores[suite.name] = saved
            continue
        embed = partial(_embed, encoder, listener, f"embedding {suite.name}")
        result = world().broadcast(partial(evaluate_pairs, embed, suite))
        if None in result.scores.values():
            listener(Warned(f"{suite.name}: all scores or all cosines are equal, so that correlations are undefined"))
        save_pairs(result, job.output, about, limit)
        job.scores[suite.name] = result.as_json()


def _embed(encoder: SentenceEncoder, listener: Listener, task: str, texts: SequenceOf[str]) -> np.ndarray:
    return encoder.embed(encoder.sequences(texts), listener, task).numpy()


def _about(job: _Job, model: PreTrainedModel) -> dict[str, str]:
    """Return the first keys of the results: the model, its dtype and a fingerprint of its weights."""
    about = {"model": job.checkpoint, "dtype": str(model.dtype).removeprefix("torch.")}
    about["weights"] = weights_fingerprint(model.state_dict().items())
    return about


def _score_responses(job: _Job, suites: list[Suite], resume: bool, listener: Listener) -> None:
    """Score the model's responses on suites of prompts."""
    backbone, encoder = inference.load_model(job.checkpoint, job.recipe, listener)
    inference.check_model(backbone, encoder, suites[0].rows[0], listener)
    inference.report_template(encoder, [row for suite in suites for row in suite.rows], listener)
    attack = attack_of(job.recipe.eval)
    if attack is not None:
        backbone.check_embeddings()
    about = _about(job, backbone.model)
    for suite in suites:
        about["rows_sha256"] = suite.digest()
        world().check_same(about)
        saved = load_results(suite, job.output, job.recipe.eval, encoder.template, about) if resume else None
        if saved is not None:
            listener(Note(f"{suite.name} is already scored"))
            job.scores[suite.name] = saved
            continue
        skip_long = job.recipe.data.skip_bad_rows
        result = evaluate_suite(backbone, encoder, suite, job.recipe.eval, listener, skip_long=skip_long)
        for score in result.scores.values():
            if score.undefined is not None:
                listener(Warned(f"{suite.name}: {score.undefined}"))
        if attack is not None:
            measure = partial(measure_attack, backbone, encoder, suite, attack, context=backbone.context)
            measure = partial(measure, device=backbone.device, batch_size=job.recipe.eval.batch_size, listener=listener)
            found = world().broadcast(measure)
            result = replace(result, attack=found)
        save_results(result, job.output, about)
        job.scores[suite.name] = result.as_json()
    del backbone
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _metrics(job: _Job) -> tuple[str, ...]:
    """Return the names of the metrics of a checkpoint's suites."""
    has_pairs = any(suite.is_pairs for suite in job.suites)
    has_prompts = any(not suite.is_pairs for suite in job.suites)
    return (*(job.recipe.eval.metrics if has_prompts else ()), *(PAIR_METRICS if has_pairs else ()))


def _checkpoint_scores(job: _Job) -> CheckpointScores:
    return CheckpointScores(
        checkpoint=job.checkpoint,
        output=job.output,
        suites=job.scores,
        metrics=_metrics(job),
        dtype=dtype_name(inference.precision(job.recipe)),
    )
