"""Evaluate every checkpoint on every suite, and write results and predictions to files."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel

from distillm_cli.config.schema import EvalConfig, Recipe
from distillm_cli.config.shortcuts import Flag
from distillm_cli.config.student_spec import BUILTIN_MODELS
from distillm_cli.config.suite_file import LM_EVAL
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.trigger import check_trigger
from distillm_cli.errors import DataError, Interrupted, ModelError, UsageError, signal_number
from distillm_cli.evaluation.bootstrap import Difference
from distillm_cli.evaluation.evaluate import evaluate_suite
from distillm_cli.evaluation.likelihood import (
    load_references,
    measure_references,
    read_references,
    save_references,
)
from distillm_cli.evaluation.pairs import PAIR_METRICS, evaluate_pairs, load_pairs, save_pairs
from distillm_cli.evaluation.pass_store import PassStore
from distillm_cli.evaluation.predictions import Predictions, read_predictions
from distillm_cli.evaluation.results import (
    check_results_writable,
    foreign_metrics,
    load_results,
    prompts_digest,
    results_directory,
    save_results,
)
from distillm_cli.evaluation.robustness import attack_of, measure_attack
from distillm_cli.evaluation.suites import Suite, load_suites
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.devices import dtype_name, resolve_device
from distillm_cli.models.loading import load_config
from distillm_cli.models.sentence import SentenceEncoder, load_encoder, read_declared
from distillm_cli.models.tokenizer_files import own_tokenizer
from distillm_cli.runs import inference
from distillm_cli.runs.eval_analysis import (
    ScoredSuite,
    common_rows,
    compare_suite,
    comparison_sentence,
    leakage_of,
    training_data,
    without_leaked,
)
from distillm_cli.runs.eval_judge import Judgments, ratings_json
from distillm_cli.runs.eval_lm_eval import load_task, save_task, score_tasks, split_suites
from distillm_cli.runs.eval_options import NO_OPTIONS, EvalOptions, JudgeOptions
from distillm_cli.runs.eval_teacher import LoadedTeacher
from distillm_cli.runs.inference import Settings
from distillm_cli.runs.run_results import SERVER, CheckpointScores, EvalResult
from distillm_cli.training.distributed import world
from distillm_cli.training.events import Listener, Note, Warned
from distillm_cli.utils.memory import resume_garbage_collection
from distillm_cli.utils.modules import weights_checksum, weights_fingerprint
from distillm_cli.utils.threads import set_threads

if TYPE_CHECKING:
    from distillm_cli.runs.server_model import ServerModel

SuiteScores = dict[str, Any]  # a suite's object in `--json`


@dataclass
class _Job:
    """Hold one checkpoint to score: its recipe, suites and output directory, and the scores so far.

    by_hand: keys of the settings that were given for this call, which suite files do not change. has_recipe: whether the
    recipe is the checkpoint's own. tasks: of lm-eval. places: by suite, the directory of its results.
    """

    checkpoint: str
    recipe: Recipe
    suites: list[Suite]
    output: Path
    server: str | None = None
    by_hand: frozenset[str] = frozenset()
    options: EvalOptions = NO_OPTIONS
    has_recipe: bool = False
    tasks: tuple[str, ...] = ()
    places: dict[str, Path] = field(default_factory=dict)
    scores: dict[str, SuiteScores] = field(default_factory=dict)
    ratings: dict[str, dict[str, float]] = field(default_factory=dict)

    def add_ratings(self, ratings: dict[str, dict[str, float]]) -> None:
        """Add the ratings of a judge, by suite and row, to the scores."""
        self.ratings = ratings
        for name, of_rows in ratings.items():
            self.scores[name] = {**self.scores[name], "judge": ratings_json(of_rows, self.scores[name]["rows"])}

    def config(self, suite: Suite) -> EvalConfig:
        """Return the settings for a suite."""
        return suite.config(self.recipe.eval, self.by_hand)


def evaluate_checkpoints(
    checkpoints: list[str],
    settings: Settings,
    listener: Listener,
    *,
    output: str | None = None,
    names: Mapping[str, str] | None = None,
    server: str | None = None,
    options: EvalOptions = NO_OPTIONS,
) -> EvalResult:
    """Score every checkpoint on every suite.

    Errors in names, rows and paths are reported before the first model is loaded. output: a directory; None for one in
    each checkpoint. names: directory names of the checkpoints, if there are several; by default from their paths. server:
    address of a server that generates, for one checkpoint: a directory with a tokenizer, or the name of a model on the
    server. options: what is measured beside the scores.
    """
    started = time.perf_counter()
    if server is not None and len(checkpoints) > 1:
        what = f"--server with {len(checkpoints)} checkpoints"
        raise UsageError("usage.exclusive_options", what, hint="score one model of a server at a time")
    options.check(len(set(map(Path, checkpoints))), on_server=server is not None)
    jobs = _jobs(checkpoints, settings, output, names or {}, server, options, listener)
    teacher = LoadedTeacher(options.teacher)
    try:
        for job in jobs:
            _score(job, teacher, listener)
            if options.counts_leakage:
                _add_leakage(job, listener)
        judge = None if options.judge is None else world().broadcast(partial(_judge, jobs, options.judge, listener))
        for job, ratings in zip(jobs, () if judge is None else judge.ratings, strict=False):
            job.add_ratings(ratings)
        comparisons = tuple(_compare(jobs, listener)) if options.compare else ()
    except KeyboardInterrupt as stop:
        finished = sum(len(job.scores) for job in jobs)
        total = sum(len(job.suites) for job in jobs)
        where = f"results of {finished} of {total} are written" if finished else "no suite was finished"
        raise Interrupted("interrupted", signal_number=signal_number(stop), where=where) from None
    return EvalResult(
        checkpoints=tuple(_checkpoint_scores(job) for job in jobs),
        output=output or str(jobs[0].output),
        wall_s=round(time.perf_counter() - started, 3),
        comparisons=comparisons,
        judge=None if judge is None else judge.summary,
    )


@dataclass(frozen=True)
class _Judged:
    """Hold the ratings of each checkpoint by suite and row, and the object ``judge`` of ``--json``."""

    ratings: list[dict[str, dict[str, float]]]
    summary: Mapping[str, Any]


def _judge(jobs: list[_Job], options: JudgeOptions, listener: Listener) -> _Judged:
    """Ask the judge about the responses of all checkpoints, and with ``--compare`` about pairs of responses."""
    judgments = Judgments(options, listener)
    ratings = []
    for job in jobs:
        suites = [suite for suite in job.suites if suite.name in job.places]
        ratings.append({suite.name: judgments.rate(suite.name, _predictions(job, suite)) for suite in suites})
    pairs = []
    for job, suite in _common_suites(jobs) if jobs[0].options.compare else ():
        first, second = (_predictions(one, suite) for one in (jobs[0], job))
        rows = common_rows(first.where, second.where)
        sides = [(jobs[0].checkpoint, first.select(rows[0])), (job.checkpoint, second.select(rows[1]))]
        pairs.append(judgments.choose(suite.name, sides[0], sides[1]))
    return _Judged(ratings, {**judgments.summary(), "pairs": pairs})


def _predictions(job: _Job, suite: Suite) -> Predictions:
    return world().broadcast(lambda: read_predictions(job.places[suite.name], job.config(suite)))


def _add_leakage(job: _Job, listener: Listener) -> None:
    """Add counts of training rows to the scores of each suite of prompts, and the scores without these rows."""
    data = training_data(job.recipe.data, job.options.train_data, job.checkpoint, has_recipe=job.has_recipe)
    for suite in job.suites:
        if suite.is_pairs:
            continue
        predictions = _predictions(job, suite)
        left = set(predictions.where)
        scored = replace(suite, rows=[row for row in suite.rows if row.where in left])
        found = world().broadcast(partial(leakage_of, scored, data, listener))
        job.scores[suite.name] = {**job.scores[suite.name], "leakage": without_leaked(found, predictions)}


def _scored(job: _Job, suite: Suite) -> ScoredSuite:
    references = read_references(job.output / suite.name) if job.options.measures_references else []
    return ScoredSuite(job.checkpoint, _predictions(job, suite), references, job.ratings.get(suite.name, {}))


def _listed(make: Callable[[], Iterator[Difference]]) -> list[Difference]:
    return list(make())


def _common_suites(jobs: list[_Job]) -> Iterator[tuple[_Job, Suite]]:
    """Yield each checkpoint but the first with its suites of prompts that the first has too. Raises DataError for none."""
    first, *others = jobs
    for job in others:
        common = [suite for suite in job.suites if suite.name in first.places and suite.name in job.places]
        if not common:
            what = f"{first.checkpoint} and {job.checkpoint} have no suite in common"
            raise DataError("data.no_common_rows", what, hint="score both on the same rows: --suite NAME")
        for suite in common:
            yield job, suite


def _compare(jobs: list[_Job], listener: Listener) -> Iterator[Mapping[str, Any]]:
    """Yield the differences of each checkpoint and the first, by suite and metric."""
    for job, suite in _common_suites(jobs):
        compare = partial(compare_suite, suite.name, _scored(jobs[0], suite), _scored(job, suite), listener)
        for found in world().broadcast(partial(_listed, compare)):
            yield {**found.as_json(), "sentence": comparison_sentence(found)}


def _jobs(
    checkpoints: list[str],
    settings: Settings,
    output: str | None,
    names: Mapping[str, str],
    server: str | None,
    options: EvalOptions,
    listener: Listener,
) -> list[_Job]:
    jobs: list[_Job] = []
    loaded: dict[Any, list[Suite]] = {}
    distinct: dict[Path, str] = {}
    for checkpoint in checkpoints:
        distinct.setdefault(Path(checkpoint), checkpoint)  # ``./a/`` and ``a`` are the same
    for checkpoint, place in _output_directories(list(distinct.values()), output, names).items():
        not_causal = _check_config(checkpoint) if server is None else None
        resolved, is_own = inference.resolve_settings("eval", checkpoint, settings, listener)
        recipe = resolved.recipe
        if not recipe.eval.suites and settings.recipe is None and not is_own:
            raise UsageError(
                "usage.no_data", f"no suite to score {checkpoint} on", hint="use --suite dolly, or --suite FILE"
            )
        if server is None:
            _check_trigger(checkpoint, recipe)
        else:
            from distillm_cli.runs.server_model import check_eval_on_server  # imports an HTTP client

            check_eval_on_server(checkpoint, recipe.eval)
        own_suites, tasks = split_suites(recipe.eval.suites)
        if tasks:
            _check_tasks(checkpoint, server)
        own_recipe = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"suites": own_suites})})
        key = (recipe.data, own_suites, recipe.eval.limit, bool(tasks))
        if key not in loaded:
            loaded[key] = [] if tasks and not own_suites else load_suites(own_recipe, listener)
        if any(suite.is_pairs for suite in loaded[key]):
            if server is not None:
                what = "suites of sentence pairs need the model's embeddings"
                raise UsageError("usage.not_on_server", what, where="--server", hint="score the model without --server")
            read_declared(checkpoint)
        if loaded[key] and all(suite.is_pairs for suite in loaded[key]):
            _check_pair_settings(settings)
        elif not_causal is not None:
            raise not_causal
        job = _Job(checkpoint, recipe, loaded[key], place, server, _given(settings), options, is_own, tuple(tasks))
        if options.counts_leakage:
            training_data(recipe.data, options.train_data, checkpoint, has_recipe=is_own)
        jobs.append(job)
    for job in jobs:
        check_results_writable(job.output)
    return jobs


def _given(settings: Settings) -> frozenset[str]:
    """Return the keys of the settings that were given for this call."""
    return frozenset({*settings.flags, *(text.partition("=")[0].strip() for text in settings.sets or ())})


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


def _score(job: _Job, teacher: LoadedTeacher, listener: Listener) -> None:
    """Score one checkpoint on its suites, those of sentence pairs by its embeddings, and release its memory."""
    pairs = [suite for suite in job.suites if suite.is_pairs]
    if pairs:
        _score_pairs(job, pairs, listener)
    prompts = [suite for suite in job.suites if not suite.is_pairs]
    if prompts or job.tasks:
        _score_responses(job, prompts, teacher, listener)
    tasks = [name for name in job.scores if name.startswith(LM_EVAL)]
    job.scores = {name: job.scores[name] for name in (*(suite.name for suite in job.suites), *tasks)}


def _score_pairs(job: _Job, suites: list[Suite], listener: Listener) -> None:
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


def _about(job: _Job, model: PreTrainedModel) -> dict[str, str]:
    """Return the first keys of the results: the model, its dtype, and a fingerprint and a checksum of its weights."""
    about = {"model": job.checkpoint, "dtype": str(model.dtype).removeprefix("torch.")}
    about["weights"] = weights_fingerprint(model.state_dict().items())
    about["weights_checksum"] = weights_checksum(model.state_dict().items())
    return about


def _score_responses(job: _Job, suites: list[Suite], teacher: LoadedTeacher, listener: Listener) -> None:
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


def _score_tasks(job: _Job, model: Backbone, about: Mapping[str, str], listener: Listener) -> None:
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


def _check_tasks(checkpoint: str, server: str | None) -> None:
    """Raise UsageError for tasks of lm-eval on a server."""
    if server is not None:
        what = f"lm-eval: needs the weights of {checkpoint}"
        raise UsageError("usage.not_on_server", what, where="--server", hint="score the model without --server")


def _score_suite(
    job: _Job,
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
    job: _Job,
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
    world().check_same(about)
    saved = None if job.options.rescore else load_references(suite, job.output, about)
    if saved is not None:
        return saved
    measure = partial(measure_references, model, encoder, suite, teacher=teacher.model, context=model.context)
    measure = partial(measure, device=model.device, batch_size=job.recipe.eval.batch_size, listener=listener)
    result = world().broadcast(measure)
    save_references(result, job.output, about)
    return result.as_json()


def _metrics(job: _Job) -> tuple[str, ...]:
    """Return the names of the metrics of a checkpoint's suites."""
    of_prompts = [name for suite in job.suites if not suite.is_pairs for name in job.config(suite).metrics]
    has_pairs = any(suite.is_pairs for suite in job.suites)
    return (*dict.fromkeys(of_prompts), *(PAIR_METRICS if has_pairs else ()))


def _checkpoint_scores(job: _Job) -> CheckpointScores:
    return CheckpointScores(
        checkpoint=job.checkpoint,
        output=job.output,
        suites=job.scores,
        metrics=_metrics(job),
        dtype=dtype_name(inference.precision(job.recipe)) if job.server is None else SERVER,
    )
