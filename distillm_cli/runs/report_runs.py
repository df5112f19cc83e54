"""Compare finished and unfinished runs, as a table, pages and plots: ``distillm report``."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from distillm_cli.errors import UsageError
from distillm_cli.runs import output_dir
from distillm_cli.runs.charts import MISSING_EXTRA
from distillm_cli.runs.recorded_run import RecordedRun, Unreadable, find_runs, held_out_figures
from distillm_cli.runs.run_groups import best_groups, common_parent, group_runs, lower_is_better, metric_title
from distillm_cli.runs.run_results import Outcome, ReportResult
from distillm_cli.training.distributed import in_first_process, world
from distillm_cli.training.events import Listener, Note, Warned
from distillm_cli.utils import manifest
from distillm_cli.utils.storage import atomic_write, storing
from distillm_cli.utils.text import counted

if TYPE_CHECKING:
    from distillm_cli.runs.token_divergence import RowDistances

PLOTS = "plots"
_MAX_WARNINGS = 10


@dataclass(frozen=True)
class ReportOptions:
    """Hold what a report writes. output: directory of the page and the plots; None: the run's, or the common parent.

    rows: held-out rows that are shown token by token in the page of a run; 0: the models are not loaded.
    """

    sort: str | None = None
    html: bool = False
    plots: bool = False
    card: bool = False
    output: Path | None = None
    rows: int = 4


def report_runs(paths: Sequence[Path], options: ReportOptions, listener: Listener) -> ReportResult:
    """Return the runs in the directories, grouped and compared; write a page and plots if the options ask for them.

    Paths that are not runs are reported and left out. Raises UsageError if no path is a run, StorageError.
    """
    started = time.perf_counter()
    found = list(find_runs(paths))
    runs = [item for item in found if isinstance(item, RecordedRun)]
    skipped = [item for item in found if isinstance(item, Unreadable)]
    if not runs:
        first = skipped[0]
        others = f" (and {counted(len(skipped) - 1, 'other path')})" if len(skipped) > 1 else ""
        raise UsageError(
            "usage.no_runs",
            f"no run to report: {first.path} {first.reason}{others}",
            hint="name output directories of distill or sft, such as runs/*",
        )
    _warn([f"{item.path} {item.reason}" for item in skipped], "paths were left out", listener)
    notes = [(str(run.path), note) for run in runs for note in run.notes]
    _warn([f"{path}: {note}" for path, note in notes], "notes", listener)
    settings, metrics, groups = group_runs(runs, options.sort)
    result = ReportResult(
        settings=tuple(settings),
        metrics=tuple(metrics),
        groups=tuple(groups),
        titles={name: metric_title(name) for name in metrics},
        best={name: frozenset(best_groups(groups, name)) for name in metrics},
        lower_is_better=frozenset(filter(lower_is_better, metrics)),
        skipped=tuple((str(item.path), item.reason) for item in skipped),
        notes=tuple(notes),
        written=(),
        wall_s=0.0,
        outcomes=_outcomes(runs[0]) if len(runs) == 1 else (),
    )
    written = _update_cards(runs, options, listener)
    written += [*_write_page(result, runs, options, listener), *_write_plots(result, runs, options, listener)]
    return replace(result, written=tuple(written), wall_s=round(time.perf_counter() - started, 3))


def _warn(texts: list[str], what: str, listener: Listener) -> None:
    for text in texts[:_MAX_WARNINGS]:
        listener(Warned(text))
    if (more := len(texts) - _MAX_WARNINGS) > 0:
        listener(Warned(f"{more:,} more {what}; --json lists all"))


def _outcomes(run: RecordedRun) -> tuple[Outcome, ...]:
    """Return the figures of a run's models, the student before training first."""
    figures = held_out_figures(run.result)
    order = sorted(figures, key=lambda name: ("before" not in name, name.startswith("teacher"), "sft" not in name))
    return tuple(
        Outcome(
            name.replace("_", " "),
            figures[name].get("valid_loss"),
            {metric: value for metric, value in figures[name].items() if metric != "valid_loss"},
        )
        for name in order
    )


def write_run_page(output: Path, listener: Listener) -> None:
    """Write the page of a finished run into its directory, in the first process alone. Raises StorageError."""
    if importlib.util.find_spec("vl_convert") is None:
        listener(Note(f"{output_dir.REPORT} has no charts: {MISSING_EXTRA}"))
    world().broadcast(lambda: report_runs([output], ReportOptions(html=True), listener).written)


def _place(runs: Sequence[RecordedRun], options: ReportOptions) -> Path:
    if options.output is not None:
        return options.output
    return runs[0].path if len(runs) == 1 else common_parent([run.path for run in runs])


def _write_page(
    result: ReportResult, runs: Sequence[RecordedRun], options: ReportOptions, listener: Listener
) -> list[str]:
    if not options.html:
        return []
    from distillm_cli.runs.report_page import run_page, runs_page

    place = _place(runs, options)
    if len(runs) > 1:
        page = runs_page(result, runs, common_parent([run.path for run in runs]).name)
    else:
        distances, why = _distances(runs[0], options, listener)
        page = run_page(runs[0], distances, why)
    written = _write(place, output_dir.REPORT, page)
    listener(Note(f"wrote {written}"))
    return [written]


def _distances(run: RecordedRun, options: ReportOptions, listener: Listener) -> tuple[list[RowDistances], str]:
    """Return the rows that are shown token by token; if there are none, the reason."""
    if not options.rows:
        return [], "Left out: --rows 0."
    if run.setting("method") == "sft":
        return [], "A fine-tuning has no teacher."
    if not run.result:
        return [], "The run is not finished."
    from distillm_cli.runs.token_divergence import distances_of_run  # imports torch

    distances, why = distances_of_run(run.path, listener, options.rows)
    return distances, f"Left out: {why or 'no held-out row has a response'}."


def _update_cards(runs: Sequence[RecordedRun], options: ReportOptions, listener: Listener) -> list[str]:
    """Update the model card of each run. With several runs, a card that cannot be updated is reported."""
    if not options.card:
        return []
    from distillm_cli.runs.model_card import update_card

    written = []
    for run in runs:
        try:
            written.append(str(update_card(run)))
        except UsageError as error:
            if len(runs) == 1:
                raise
            listener(Warned(str(error)))
    listener(Note(f"wrote {counted(len(written), 'model card')}"))
    return written


def _write_plots(
    result: ReportResult, runs: Sequence[RecordedRun], options: ReportOptions, listener: Listener
) -> list[str]:
    if not options.plots:
        return []
    from distillm_cli.runs import charts
    from distillm_cli.runs.recorded_run import read_metrics
    from distillm_cli.runs.report_page import set_charts

    if len(runs) > 1:
        found = set_charts(result, runs)
    else:
        lines = list(read_metrics(runs[0].path / output_dir.METRICS))
        found = [*charts.run_charts(lines, runs[0].number("train_s")), *charts.health_charts(lines)]
    place = _place(runs, options)
    written = []
    for chart in found:
        try:
            files = charts.draw_files(chart)
        except ImportError as error:
            raise UsageError("usage.missing_package", MISSING_EXTRA, where="--plots") from error
        written += [_write(place / PLOTS, name, content) for name, content in files.items()]
    listener(Note(f"wrote {counted(len(written), 'file')} in {place / PLOTS}"))
    return written


@in_first_process
def _write(place: Path, name: str, content: str | bytes) -> str:
    """Write a file and return its path. In a run's directory it is listed, so that ``--overwrite`` removes it."""
    with storing(f"cannot write {place / name}", "choose another directory with --output"):
        place.mkdir(parents=True, exist_ok=True)
        if manifest.recorded(place):
            manifest.record(place, [name])
        atomic_write(place / name, content)
    return str(place / name)
