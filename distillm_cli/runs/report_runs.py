"""Compare finished and unfinished runs: ``distillm report``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from distillm_cli.errors import UsageError
from distillm_cli.runs.recorded_run import RecordedRun, Unreadable, find_runs
from distillm_cli.runs.run_groups import best_groups, group_runs, lower_is_better
from distillm_cli.runs.run_results import ReportResult
from distillm_cli.training.events import Listener, Warned
from distillm_cli.utils.text import counted

_MAX_WARNINGS = 10


def report_runs(paths: Sequence[Path], listener: Listener, *, sort: str | None = None) -> ReportResult:
    """Return the runs in the directories, grouped and compared. Raises UsageError if there is none.

    sort: a column. Paths that are not runs are reported and left out.
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
    _warn([f"{path}: {note}" for path, note in notes], "runs are incomplete", listener)
    settings, metrics, groups = group_runs(runs, sort)
    return ReportResult(
        settings=tuple(settings),
        metrics=tuple(metrics),
        groups=tuple(groups),
        best={name: frozenset(best_groups(groups, name)) for name in metrics},
        lower_is_better=frozenset(filter(lower_is_better, metrics)),
        skipped=tuple((str(item.path), item.reason) for item in skipped),
        notes=tuple(notes),
        written=(),
        wall_s=round(time.perf_counter() - started, 3),
    )


def _warn(texts: list[str], what: str, listener: Listener) -> None:
    for text in texts[:_MAX_WARNINGS]:
        listener(Warned(text))
    if (more := len(texts) - _MAX_WARNINGS) > 0:
        listener(Warned(f"{more:,} more {what}; --json lists all"))
