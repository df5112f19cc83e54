"""Group runs that differ in their seed alone, and compare the groups: settings, quality, cost."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from distillm_cli import plugins
from distillm_cli.config.fields import is_lower_better
from distillm_cli.errors import UsageError
from distillm_cli.runs.recorded_run import UNFINISHED, RecordedRun, finite_number
from distillm_cli.runs.run_results import GroupScore, RunGroup

_SEED = "train.seed"
_MAX_NAMED = 12  # columns in an error
COSTS = ("seconds", "tokens_per_s", "rollouts")


def group_runs(runs: Sequence[RecordedRun], sort: str | None = None) -> tuple[list[str], list[str], list[RunGroup]]:
    """Return the settings that differ, the metrics, and the groups. sort: a column. Raises UsageError for an unknown one."""
    settings = differing_settings(runs)
    metrics = list(dict.fromkeys(name for run in runs for name in run.scores))
    common = common_parent([run.path for run in runs])
    grouped: dict[str, list[RecordedRun]] = {}
    for run in runs:
        key = json.dumps([run.setting(name) for name in settings], default=str)
        grouped.setdefault(key, []).append(run)
    groups = [_group(members, settings, metrics, common) for members in grouped.values()]
    if sort is not None:
        groups = _sorted(groups, sort, settings, metrics)
    return settings, metrics, groups


def differing_settings(runs: Iterable[RecordedRun]) -> list[str]:
    """Return the settings, except the seed, that have more than one value in the runs, in the order of the recipe."""
    sections: dict[str, dict[int, RecordedRun]] = {}
    runs = list(runs)
    for run in runs:
        for name, settings in run.sections.items():  # equal sections are the same object: a run of each is enough
            sections.setdefault(name, {}).setdefault(id(settings), run)
    found = []
    for section, distinct in sections.items():
        lacking = next((run for run in runs if section not in run.sections), None)
        members = [*distinct.values(), *([] if lacking is None else [lacking])]
        for key in dict.fromkeys(key for run in distinct.values() for key in run.sections[section]):
            values = {json.dumps(run.setting(key), default=str) for run in members}
            if key != _SEED and len(values) > 1:
                found.append(key)
    return found


def common_parent(paths: Sequence[Path]) -> Path:
    """Return the directory that has all of the paths; for one path, its parent."""
    whole = [os.path.abspath(path) for path in paths]  # noqa: PTH100  # links stay as they are named
    if len(set(whole)) == 1:
        return Path(whole[0]).parent
    return Path(os.path.commonpath(whole))


def _group(runs: list[RecordedRun], settings: list[str], metrics: list[str], common: Path) -> RunGroup:
    names = tuple(os.path.relpath(run.path, common) for run in runs)
    return RunGroup(
        names=names,
        paths=tuple(str(run.path) for run in runs),
        seeds=tuple(run.setting(_SEED) for run in runs),
        settings={key: runs[0].setting(key) for key in settings},
        scores={name: score for name in metrics if (score := _score(runs, name)) is not None},
        seconds=_mean(run.number("train_s") for run in runs),
        tokens_per_s=_mean(run.number("tokens_per_s") for run in runs),
        rollouts=_mean(rollout_share(run) for run in runs),
        unfinished=sum(run.status == UNFINISHED for run in runs),
    )


def _score(runs: list[RecordedRun], name: str) -> GroupScore | None:
    """Return the mean of a metric over the runs that have it, with the standard deviation over their seeds."""
    means = [run.scores[name].mean for run in runs if name in run.scores]
    if not means:
        return None
    sd = statistics.stdev(means) if len(means) > 1 else None
    return GroupScore(statistics.fmean(means), sd, len(means))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def rollout_share(run: RecordedRun) -> float | None:
    """Return the share of steps on student outputs, fresh or replayed."""
    steps, fresh, replayed = (run.number(name) for name in ("steps", "rollout_steps", "replay_steps"))
    if not steps or fresh is None:
        return None
    return (fresh + (replayed or 0)) / steps


def metric_title(name: str) -> str:
    """Return the heading of a metric, after its suite if it has one."""
    place, _, metric = name.rpartition(" ")
    known = plugins.metrics.get(metric)
    label = "valid CE" if metric == "valid_loss" else metric.replace("_", " ") if known is None else known.label
    return f"{place} {label}".strip()


def lower_is_better(metric: str) -> bool:
    """Return whether less of a metric is better. metric: a name, after its suite if it has one."""
    return is_lower_better(metric.rpartition(" ")[2])


def best_groups(groups: Sequence[RunGroup], metric: str) -> set[int]:
    """Return the indices of the groups with the best mean of a metric. Empty if fewer than two groups have it."""
    means = {i: group.scores[metric].mean for i, group in enumerate(groups) if metric in group.scores}
    if len(means) < 2:
        return set()
    best = min(means.values()) if lower_is_better(metric) else max(means.values())
    return {i for i, mean in means.items() if mean == best}


def _sorted(groups: list[RunGroup], column: str, settings: list[str], metrics: list[str]) -> list[RunGroup]:
    """Return the groups with the best first; by a setting, in ascending order. Groups without a value come last."""
    if column not in (*settings, *metrics, *COSTS):
        known = [*metrics, *COSTS, *settings]
        more = f", and {len(known) - _MAX_NAMED} more" if len(known) > _MAX_NAMED else ""
        raise UsageError(
            "usage.unknown_column",
            f"--sort {column} is not a column",
            where=f"columns: {', '.join(known[:_MAX_NAMED])}{more}",
            hint="choose one of them",
        )

    def key(group: RunGroup) -> tuple[int, Any, str]:
        if column in settings:
            setting = group.settings[column]
            number = finite_number(setting)
            return (1, 0.0, str(setting)) if number is None else (0, number, "")
        score = group.scores.get(column)
        value = getattr(group, column) if column in COSTS else None if score is None else score.mean
        if value is None:
            return (1, 0.0, "")
        descends = column in ("tokens_per_s", "rollouts") or (column in metrics and not lower_is_better(column))
        return (0, -value if descends else value, "")

    return sorted(groups, key=key)
