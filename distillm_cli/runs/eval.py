"""The work of ``distillm eval``: checkpoints × suites → tables, files, one JSON object."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distillm_cli.config.load import Resolved
from distillm_cli.config.schema import Recipe
from distillm_cli.errors import Interrupted, UsageError, signal_number
from distillm_cli.evaluation.evaluate import evaluate
from distillm_cli.evaluation.metrics import METRICS
from distillm_cli.evaluation.results import check_root, earlier, save
from distillm_cli.evaluation.suites import Suite, load_suites
from distillm_cli.models.devices import dtype_name
from distillm_cli.models.fingerprint import fingerprint
from distillm_cli.models.loading import load_config
from distillm_cli.runs import inference
from distillm_cli.training.events import Note, Warned
from distillm_cli.ui.console import Console
from distillm_cli.ui.summary import table

Told = dict[str, Any]  # a suite's object in `--json`


@dataclass(frozen=True)
class _Job:
    """One checkpoint: the recipe it is scored by, on what, and where the results go."""

    checkpoint: str
    recipe: Recipe
    suites: list[Suite]
    place: Path


def score(
    checkpoints: list[str],
    *,
    recipe: str | Resolved | None,
    flags: Mapping[str, Any],
    sets: list[str] | None,
    output: str | None,
    resume: bool = False,
    names: Mapping[str, str] | None = None,
    ui: Console,
) -> dict[str, Any]:
    """Scores every checkpoint on every suite and returns the result object of ``--json``.

    Everything that can be wrong with names, rows and places is found before the first model is loaded. resume: a suite
    that these weights have been scored on in the same way is not scored again. names: by checkpoint, what its directory is
    called where there are several; else that goes by its path.
    """
    began = time.perf_counter()
    jobs = _plan(checkpoints, recipe, flags, sets, output, names or {}, ui)
    done: dict[str, dict[str, Told]] = {job.checkpoint: {} for job in jobs}
    try:
        for job in jobs:
            _score(job, done[job.checkpoint], resume, ui)
    except KeyboardInterrupt as stop:
        finished, total = sum(map(len, done.values())), sum(len(job.suites) for job in jobs)
        where = f"results of {finished} of {total} are written" if finished else "no suite was finished"
        raise Interrupted("interrupted", signal_number=signal_number(stop), where=where) from None
    _show(jobs, done, ui)
    found = {
        job.checkpoint: {
            "output": str(job.place),
            "suites": done[job.checkpoint],
        }
        for job in jobs
    }
    first = found[jobs[0].checkpoint]
    result = {"command": "eval", "status": "ok", "output": output or first["output"]}
    result |= {"wall_s": round(time.perf_counter() - began, 3), "suites": first["suites"]}
    return result | ({"checkpoints": found} if len(jobs) > 1 else {})


def _plan(
    checkpoints: list[str],
    recipe: str | Resolved | None,
    flags: Mapping[str, Any],
    sets: list[str] | None,
    output: str | None,
    names: Mapping[str, str],
    ui: Console,
) -> list[_Job]:
    jobs: list[_Job] = []
    loaded: dict[Any, list[Suite]] = {}
    once: dict[Path, str] = {}
    for checkpoint in checkpoints:
        once.setdefault(Path(checkpoint), checkpoint)  # ``./a/`` is ``a``
    places = _places(list(once.values()), output, names)
    for checkpoint, place in places.items():
        load_config(checkpoint)
        resolved, own = inference.settings("eval", checkpoint, recipe=recipe, flags=flags, sets=sets, listener=ui)
        chosen = resolved.recipe
        if not chosen.eval.suites and recipe is None and not own:
            raise UsageError(f"nothing to score {checkpoint} on", hint="give --suite dolly, or --suite FILE")
        key = (chosen.data, chosen.eval.suites, chosen.eval.limit)
        if key not in loaded:
            loaded[key] = load_suites(chosen, ui)
        jobs.append(_Job(checkpoint, chosen, loaded[key], place))
    for job in jobs:
        check_root(job.place)
    return jobs


def _places(checkpoints: list[str], output: str | None, names: Mapping[str, str]) -> dict[str, Path]:
    """Where each checkpoint's results go: ``eval/`` inside it; for one of the hub or shipped here ``./eval-NAME/``."""
    places: dict[str, Path] = {}
    for checkpoint in checkpoints:
        directory = Path(checkpoint).expanduser()
        name = names.get(checkpoint) or re.sub(r"[^\w.+-]+", "-", checkpoint.strip("./~")) or "model"
        if output is not None:
            place = Path(output) if len(checkpoints) == 1 else Path(output) / name
        elif directory.is_dir() and checkpoint != "builtin":
            place = directory / "eval"
        else:
            place = Path(f"eval-{name}")
        while place in places.values():
            place = place.with_name(f"{place.name}-{len(places) + 1}")
        places[checkpoint] = place
    return places


def _score(job: _Job, done: dict[str, Told], resume: bool, ui: Console) -> None:
    backbone, encoder = inference.load(job.checkpoint, job.recipe, ui)
    inference.check_head(backbone, encoder, job.suites[0].rows[0], ui)
    inference.name_template(encoder, [row for suite in job.suites for row in suite.rows], ui)
    about = {"model": job.checkpoint, "dtype": str(backbone.model.dtype).removeprefix("torch.")}
    about["weights"] = fingerprint(backbone.model.state_dict().items())
    for suite in job.suites:
        about["rows_sha256"] = suite.digest()
        before = earlier(suite, job.place, job.recipe.eval, encoder.template, about) if resume else None
        if before is not None:
            ui(Note(f"{suite.name} is scored already"))
            done[suite.name] = before
            continue
        result = evaluate(backbone, encoder, suite, job.recipe.eval, ui, skip_long=job.recipe.data.skip_bad_rows)
        for told in result.scores.values():
            if told.undefined is not None:
                ui(Warned(f"{suite.name}: {told.undefined}"))
        save(result, job.place, about)
        done[suite.name] = result.as_json()
    del backbone
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _show(jobs: list[_Job], done: Mapping[str, Mapping[str, Told]], ui: Console) -> None:
    several = len(jobs) > 1
    metrics = list(dict.fromkeys(metric for job in jobs for metric in job.recipe.eval.metrics))
    columns = [*(["checkpoint"] if several else []), "suite", "rows", *map(_title, metrics), "entropy"]
    rows, tasks = [], []
    for job in jobs:
        for name, told in done[job.checkpoint].items():
            lead = [job.checkpoint] if several else []
            passes = max(len(told[metric]["seeds"]) for metric in job.recipe.eval.metrics)
            figures = [_figure(told.get(metric), passes) for metric in metrics]
            rows.append([*lead, name, f"{told['rows']:,}", *figures, f"{told['entropy']:.3f}"])
            for task, scores in told.get("tasks", {}).items():
                tasks.append([*lead, task, *(_figure(scores.get(metric), passes) for metric in metrics)])
    if tasks:
        ui.show(table("By kind of task", [*(["checkpoint"] if several else []), "task", *map(_title, metrics)], tasks))
    ui.show(table("Scores", columns, rows))
    for job in jobs:
        ui(Note(f"decoded in {dtype_name(inference.precision(job.recipe))}; results and predictions: {job.place}"))


def _title(metric: str) -> str:
    return METRICS[metric].label + ("" if METRICS[metric].higher_is_better else " ↓")


def _figure(score: Mapping[str, Any] | None, passes: int) -> str | None:
    if score is None:
        return None
    if score["mean"] is None:
        return "undefined"
    return f"{score['mean']:.2f} ± {score['sd']:.2f}" if passes > 1 else f"{score['mean']:.2f}"
