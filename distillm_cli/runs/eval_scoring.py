"""Score a model on its suites, and write results and predictions to files."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedModel

from distillm_cli.config.suite_file import LM_EVAL
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.sides import describe_sides
from distillm_cli.evaluation.evaluate import evaluate_suite
from distillm_cli.evaluation.likelihood import load_references, measure_references, save_references
from distillm_cli.evaluation.pairs import evaluate_pairs, load_pairs, save_pairs
from distillm_cli.evaluation.pass_store import PassStore
from distillm_cli.evaluation.results import (
    foreign_metrics,
    load_results,
    prompts_digest,
    results_directory,
    save_results,
)
from distillm_cli.evaluation.robustness import attack_of, measure_attack
from distillm_cli.evaluation.suites import Suite
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.devices import resolve_device
from distillm_cli.models.sentence import SentenceEncoder, load_encoder
from distillm_cli.runs import inference
from distillm_cli.runs.eval_jobs import EvalJob, SuiteScores
from distillm_cli.runs.eval_lm_eval import load_task, save_task, score_tasks
from distillm_cli.runs.eval_teacher import LoadedTeacher
from distillm_cli.training.distributed import world
from distillm_cli.training.events import Listener, Note, Warned
from distillm_cli.utils.memory import resume_garbage_collection
from distillm_cli.utils.modules import weights_checksum, weights_fingerprint
from distillm_cli.utils.threads import set_threads

if TYPE_CHECKING:
    from distillm_cli.runs.server_model import ServerModel


def score_checkpoint(job: EvalJob, teacher: LoadedTeacher, listener: Listener) -> None:
    """Score one checkpoint on its suites, those of sentence pairs by its embeddings, and release its memory."""
    pairs = [suite for suite in job.suites if suite.is_pairs]
    if pairs:
        _score_pairs(job, pairs, listener)
    prompts = [suite for suite in job.suites if not suite.is_pairs]
    if prompts or job.tasks:
        _score_responses(job, prompts, teacher, listener)
    tasks = [name for name in job.scores if name.startswith(LM_EVAL)]
    job.scores = {name: job.scores[name] for name in (*(suite.name for suite in job.suites), *tasks)}


def _score_pairs(job: EvalJob, suites: list[Suite], listener: Listener) -> None:
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
        saved = None if job.options.rescore else load_pairs(suite, job.output, about, limit)
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


def _about(job: EvalJob, model: PreTrainedModel) -> dict[str, str]:
    """Return the first keys of the results: the model, its dtype, and a fingerprint and a checksum of its weights."""
    about = {"model": job.checkpoint, "dtype": str(model.dtype).removeprefix("torch.")}
    about["weights"] = weights_fingerprint(model.state_dict().items())
    about["weights_checksum"] = weights_checksum(model.state_dict().items())
    return about


def _score_responses(job: EvalJob, suites: list[Suite], teacher: LoadedTeacher, listener: Listener) -> None:
    """Score the model's responses on suites of prompts."""
    decoder: Backbone | ServerModel
    if job.server is None:
        decoder, encoder = inference.load_model(job.checkpoint, job.recipe, listener)
        if suites:
            inference.check_model(decoder, encoder, suites[0].rows[0], listener)
        about = _about(job, decoder.model)
    else:
        from distillm_cli.runs.server_model import connect_model

        decoder, encoder = connect_model(job.checkpoint, job.server, job.recipe, listener)
        about = {"model": job.checkpoint, **decoder.identity}
    about["distillm"] = version("distillm")
    if attack_of(job.recipe.eval) is not None and isinstance(decoder, Backbone):
        decoder.check_embeddings()
    encoders: dict[str, Encoder] = {}
    for suite in suites:
        template = suite.template(encoder.template, job.by_hand)
        of_suite = encoder if template == encoder.template else encoder.with_settings(template=template)
        encoders[suite.name] = of_suite
        job.scores[suite.name] = _score_suite(job, suite, decoder, of_suite, about, listener)
    for suite in suites if job.options.measures_references else ():
        assert isinstance(decoder, Backbone)  # a server has no weights to measure
        measured = _measure_references(job, suite, decoder, encoders[suite.name], teacher, about, listener)
        job.scores[suite.name] = {**job.scores[suite.name], "references": measured}
    if job.tasks and isinstance(decoder, Backbone):
        _score_tasks(job, decoder, about, listener)
    del decoder
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _score_tasks(job: EvalJob, model: Backbone, about: Mapping[str, str], listener: Listener) -> None:
    """Score the tasks of lm-eval that have no results of the same model and limit."""
    limit = job.recipe.eval.limit
    identity = {**about, "lm_eval": version("lm-eval"), "limit": limit}
    missing = []
    for task in job.tasks:
        name = f"{LM_EVAL}{task}"
        saved = None if job.options.rescore else load_task(job.output, name, identity)
        if saved is None:
            missing.append(task)
        else:
            listener(Note(f"{name} is already scored"))
            job.scores[name] = saved
    if not missing:
        return
    score = partial(score_tasks, model, missing, limit=limit, batch_size=job.recipe.eval.batch_size, listener=listener)
    for name, scores in world().broadcast(score).items():
        save_task(job.output, name, identity, scores)
        job.scores[name] = scores


def _score_suite(
    job: EvalJob,
    suite: Suite,
    decoder: Backbone | ServerModel,
    encoder: Encoder,
    model: Mapping[str, str],
    listener: Listener,
) -> SuiteScores:
    """Return the scores of the model's responses on a suite, those of an earlier call if it had the same inputs.

    model: its identity, which the results have with digests of rows, prompts and metrics.
    """
    config = job.config(suite)
    inference.report_template(encoder, suite.rows, listener)
    digest = prompts_digest(encoder, suite)
    about = {**model, "rows_sha256": suite.digest(), "prompts_sha256": digest, **foreign_metrics(config.metrics)}
    world().check_same(about)
    directory = results_directory(suite, job.output, config, encoder.template)
    job.places[suite.name] = directory
    saved = None if job.options.rescore else load_results(suite, job.output, config, encoder.template, about)
    if saved is not None:
        listener(Note(f"{suite.name} is already scored"))
        return saved
    store = PassStore(directory, config, {**model, "prompts": digest}, reads=not job.options.rescore)
    skip_long = job.recipe.data.skip_bad_rows
    result = evaluate_suite(decoder, encoder, suite, config, listener, skip_long=skip_long, store=store)
    for score in result.scores.values():
        if score.undefined is not None:
            listener(Warned(f"{suite.name}: {score.undefined}"))
    attack = attack_of(config)
    if attack is not None and isinstance(decoder, Backbone):
        measure = partial(measure_attack, decoder, encoder, suite, attack, context=decoder.context)
        measure = partial(measure, device=decoder.device, batch_size=config.batch_size, listener=listener)
        found = world().broadcast(measure)
        result = replace(result, attack=found)
    save_results(result, job.output, about, store)
    return result.as_json()


def _measure_references(
    job: EvalJob,
    suite: Suite,
    model: Backbone,
    encoder: Encoder,
    teacher: LoadedTeacher,
    about: Mapping[str, str],
    listener: Listener,
) -> SuiteScores | None:
    """Return the figures of the references of a suite; None with a warning if it has none."""
    if not any(row.is_answered for row in suite.rows):
        return None
    about = {**about, "rows_sha256": suite.digest(), "prompts_sha256": prompts_digest(encoder, suite)}
    about |= teacher.identity(job.recipe, model, listener)
    template = suite.template(job.recipe.data_of("teacher").template, job.by_hand)
    compared = teacher.compared(job.recipe, encoder, template)
    if compared is not None and compared.encoder is not None:
        listener(Note(f"{suite.name}: {describe_sides(compared.encoder.data, encoder.data)}"))
        about["teacher_prompts_sha256"] = prompts_digest(compared.encoder, suite)
    world().check_same(about)
    saved = None if job.options.rescore else load_references(suite, job.output, about)
    if saved is not None:
        return saved
    contexts = [one.context for one in (model, teacher.model) if one is not None and one.context is not None]
    measure = partial(measure_references, model, encoder, suite, teacher=compared, context=min(contexts, default=None))
    measure = partial(measure, device=model.device, batch_size=job.recipe.eval.batch_size, listener=listener)
    result = world().broadcast(measure)
    save_references(result, job.output, about)
    return result.as_json()
