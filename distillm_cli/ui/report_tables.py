"""Render the runs of a report: a table for the terminal, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from distillm_cli import plugins
from distillm_cli.runs.run_results import GroupScore, ReportResult, RunGroup
from distillm_cli.training.events import Note
from distillm_cli.ui.display import GOOD, VALID_LOSS
from distillm_cli.ui.summary import NOT_AVAILABLE, table
from distillm_cli.utils.text import counted, format_percent, printable

_MAX_SETTINGS = 6  # columns of settings on a terminal
_BEST = "*"


def report_tables(result: ReportResult) -> Iterator[RenderableType | Note]:
    """Yield the table of runs and what its columns mean."""
    settings = result.settings[:_MAX_SETTINGS]
    has_costs = [any(getattr(group, name) is not None for group in result.groups) for name in _COSTS]
    costs = [name for name, has in zip(_COSTS, has_costs, strict=True) if has]
    columns = ["run", *settings, *map(metric_title, result.metrics), *(_COSTS[name] for name in costs)]
    rows = []
    for i, group in enumerate(result.groups):
        cells: list[object] = [_title(group), *(plain_value(group.settings[name]) for name in settings)]
        cells += [_score_cell(group.scores.get(name), i in result.best[name]) for name in result.metrics]
        cells += [_cost(name, getattr(group, name)) for name in costs]
        rows.append(cells)
    yield table(counted(sum(len(group.names) for group in result.groups), "run"), columns, rows)
    yield _legend(result)


def _legend(result: ReportResult) -> Text:
    parts = []
    if any(result.best.values()):
        parts.append(f"{_BEST} best")
    if any(score.sd is not None for group in result.groups for score in group.scores.values()):
        parts.append("± standard deviation over runs that differ in their seed")
    lower = [metric_title(name) for name in result.metrics if name in result.lower_is_better]
    if lower:
        parts.append(f"lower is better: {', '.join(lower)}")
    if (hidden := len(result.settings) - _MAX_SETTINGS) > 0:
        parts.append(f"{counted(hidden, 'other setting')} differ{'s' if hidden == 1 else ''} (--csv, --json)")
    return Text("; ".join(parts), "dim")


_COSTS = {"seconds": "seconds", "tokens_per_s": "tokens/s", "rollouts": "rollouts"}


def _title(group: RunGroup) -> str:
    return group.title + (f" ({group.unfinished} unfinished)" if group.unfinished else "")


def metric_title(name: str) -> str:
    """Return the heading of a metric, after its suite if it has one."""
    place, _, metric = name.rpartition(" ")
    known = plugins.metrics.get(metric)
    label = VALID_LOSS if metric == "valid_loss" else metric.replace("_", " ") if known is None else known.label
    return f"{place} {label}".strip()


def score_text(name: str, score: GroupScore | None) -> str:
    """Format a mean with its standard deviation; a loss has three decimals."""
    if score is None:
        return NOT_AVAILABLE
    digits = 3 if name.endswith("loss") else 2
    return f"{score.mean:.{digits}f}" + (f" ± {score.sd:.{digits}f}" if score.sd is not None else "")


def _score_cell(score: GroupScore | None, is_best: bool) -> Text | str | None:
    if score is None:
        return None
    digits = 2 if abs(score.mean) >= 10 else 3
    text = f"{score.mean:.{digits}f}" + (f" ± {score.sd:.{digits}f}" if score.sd is not None else "")
    return Text(f"{text} {_BEST}", f"bold {GOOD}") if is_best else text


def _cost(name: str, value: float | None) -> str | None:
    if value is None:
        return None
    return format_percent(value) if name == "rollouts" else f"{value:,.0f}"


def plain_value(value: object) -> str:
    """Return a setting as it is written in a command: lists with commas, booleans in lower case."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(plain_value, value))
    return f"{value:g}" if isinstance(value, float) else printable(str(value))


def report_csv(result: ReportResult) -> str:
    """Return the groups as CSV: every setting that differs, mean, sd and number of runs of each metric, and costs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = [head for name in result.metrics for head in (name, f"{name} sd", f"{name} runs")]
    writer.writerow(["run", "runs", "unfinished", *result.settings, *heads, *_COSTS])
    for group in result.groups:
        cells: list[object] = [group.names[0], len(group.names), group.unfinished]
        cells += [plain_value(group.settings[name]) for name in result.settings]
        for name in result.metrics:
            score = group.scores.get(name)
            cells += ["", "", 0] if score is None else [score.mean, "" if score.sd is None else score.sd, score.runs]
        cells += ["" if (value := getattr(group, name)) is None else value for name in _COSTS]
        writer.writerow([_safe_cell(cell) for cell in cells])
    return out.getvalue()


def _safe_cell(cell: object) -> object:
    """Return a cell that a spreadsheet does not run as a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@")) else cell


def report_markdown(result: ReportResult) -> str:
    """Return the groups as a Markdown table, with the best figures in bold."""
    heads = ["run", *result.settings, *map(metric_title, result.metrics), *_COSTS.values()]
    figures = 1 + len(result.settings)
    lines = [_markdown_row(heads), _markdown_row(["---" if i < figures else "---:" for i in range(len(heads))])]
    for i, group in enumerate(result.groups):
        cells = [_title(group), *(plain_value(group.settings[name]) for name in result.settings)]
        for name in result.metrics:
            text = score_text(name, group.scores.get(name))
            cells.append(f"**{text}**" if i in result.best[name] else text)
        cells += [_cost(name, getattr(group, name)) or NOT_AVAILABLE for name in _COSTS]
        lines.append(_markdown_row(cells))
    return "\n".join(lines) + "\n"


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"
