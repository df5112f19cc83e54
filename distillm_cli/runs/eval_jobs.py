"""Decide what an evaluation scores: checkpoints, suites and directories, checked before a model is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distillm_cli.config.schema import EvalConfig, Recipe
from distillm_cli.config.shortcuts import Flag
from distillm_cli.config.student_spec import BUILTIN_MODELS
from distillm_cli.data.trigger import check_trigger
from distillm_cli.errors import ModelError, UsageError
from distillm_cli.evaluation.pairs import PAIR_METRICS
from distillm_cli.evaluation.predictions import Predictions, read_predictions
from distillm_cli.evaluation.results import check_results_writable
from distillm_cli.evaluation.suites import Suite, load_suites
from distillm_cli.models.loading import load_config
from distillm_cli.models.sentence import read_declared
from distillm_cli.models.tokenizer_files import own_tokenizer
from distillm_cli.runs import inference
from distillm_cli.runs.eval_analysis import training_data
from distillm_cli.runs.eval_judge import ratings_json
from distillm_cli.runs.eval_lm_eval import split_suites
from distillm_cli.runs.eval_options import NO_OPTIONS, EvalOptions
from distillm_cli.runs.inference import Settings
from distillm_cli.training.distributed import world
from distillm_cli.training.events import Listener

SuiteScores = dict[str, Any]  # a suite's object in `--json`


@dataclass
class EvalJob:
    """Hold one checkpoint to score: its recipe, suites and output directory, and the scores so far.

    by_hand: keys of the settings that were given for this call, which suite files do not change. has_recipe: whether the
    recipe is the checkpoint's own. tasks: of lm-eval. places: by suite of prompts, the directory of its results.
    ratings: of a judge, by suite and row.
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

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the names of the metrics of the suites."""
        of_prompts = [name for suite in self.suites if not suite.is_pairs for name in self.config(suite).metrics]
        has_pairs = any(suite.is_pairs for suite in self.suites)
        return (*dict.fromkeys(of_prompts), *(PAIR_METRICS if has_pairs else ()))

    def predictions(self, suite: Suite) -> Predictions:
        """Read the responses to a suite that has been scored."""
        return world().broadcast(lambda: read_predictions(self.places[suite.name], self.config(suite)))

    def add_ratings(self, ratings: dict[str, dict[str, float]]) -> None:
        """Add the ratings of a judge, by suite and row, to the scores."""
        self.ratings = ratings
        for name, of_rows in ratings.items():
            self.scores[name] = {**self.scores[name], "judge": ratings_json(of_rows, self.scores[name]["rows"])}

    def config(self, suite: Suite) -> EvalConfig:
        """Return the settings for a suite."""
        return suite.config(self.recipe.eval, self.by_hand)


def eval_jobs(
    checkpoints: list[str],
    settings: Settings,
    listener: Listener,
    *,
    output: str | None,
    names: Mapping[str, str],
    server: str | None,
    options: EvalOptions,
) -> list[EvalJob]:
    """Return what to score of each checkpoint. The arguments are those of ``evaluate_checkpoints``."""
    distinct: dict[Path, str] = {}
    for checkpoint in checkpoints:
        distinct.setdefault(Path(checkpoint), checkpoint)  # ``./a/`` and ``a`` are the same
    places = _output_directories(list(distinct.values()), output, names)
    loaded: dict[Any, list[Suite]] = {}
    jobs = [_job(name, place, settings, server, options, loaded, listener) for name, place in places.items()]
    for job in jobs:
        check_results_writable(job.output)
    return jobs


def _job(
    checkpoint: str,
    place: Path,
    settings: Settings,
    server: str | None,
    options: EvalOptions,
    loaded: dict[Any, list[Suite]],
    listener: Listener,
) -> EvalJob:
    """Return what to score of one checkpoint. loaded: suites by their settings, for checkpoints that share them."""
    not_causal = _check_config(checkpoint) if server is None else None
    resolved, is_own = inference.resolve_settings("eval", checkpoint, settings, listener)
    recipe = resolved.recipe
    if not recipe.eval.suites and settings.recipe is None and not is_own:
        what = f"no suite to score {checkpoint} on"
        raise UsageError("usage.no_data", what, hint="use --suite dolly, or --suite FILE")
    if server is None:
        _check_trigger(checkpoint, recipe)
    else:
        from distillm_cli.runs.server_model import check_eval_on_server  # imports an HTTP client

        check_eval_on_server(checkpoint, recipe.eval)
    own_suites, tasks = split_suites(recipe.eval.suites)
    if tasks and server is not None:
        what = f"lm-eval: needs the weights of {checkpoint}"
        raise UsageError("usage.not_on_server", what, where="--server", hint="score the model without --server")
    key = (recipe.data, own_suites, recipe.eval.limit, bool(tasks))
    if key not in loaded:
        of_suites = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"suites": own_suites})})
        loaded[key] = [] if tasks and not own_suites else load_suites(of_suites, listener)
    suites = loaded[key]
    if any(suite.is_pairs for suite in suites):
        if server is not None:
            what = "suites of sentence pairs need the model's embeddings"
            raise UsageError("usage.not_on_server", what, where="--server", hint="score the model without --server")
        read_declared(checkpoint)
    if suites and all(suite.is_pairs for suite in suites):
        _check_pair_settings(settings)
    elif not_causal is not None:
        raise not_causal
    if options.counts_leakage:
        training_data(recipe.data, options.train_data, checkpoint, has_recipe=is_own)
    return EvalJob(checkpoint, recipe, suites, place, server, _given(settings), options, is_own, tuple(tasks))


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
