"""Render the runs of a report: a table for the terminal, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from distillm_cli.runs.run_results import GroupScore, ReportResult, RunGroup
from distillm_cli.training.events import Note
from distillm_cli.ui.display import GOOD
from distillm_cli.ui.summary import NOT_AVAILABLE, facts, outcome_table, table
from distillm_cli.utils.text import counted, format_percent

_MAX_SETTINGS = 6  # columns of settings on a terminal
_BEST = "*"


def report_tables(result: ReportResult) -> Iterator[RenderableType | Note]:
    """Yield the table of runs and what its columns mean."""
    settings = result.settings[:_MAX_SETTINGS]
    has_costs = [any(getattr(group, name) is not None for group in result.groups) for name in _COSTS]
    costs = [name for name, has in zip(_COSTS, has_costs, strict=True) if has]
    columns = ["run", *settings, *(result.titles[name] for name in result.metrics), *(_COSTS[name] for name in costs)]
    rows = []
    for i, group in enumerate(result.groups):
        cells: list[object] = [_title(group), *(group.setting_text(name) for name in settings)]
        cells += [_score_cell(group.scores.get(name), i in result.best[name]) for name in result.metrics]
        cells += [_cost(name, getattr(group, name)) for name in costs]
        rows.append(cells)
    if result.outcomes:
        yield outcome_table(result.outcomes, title=result.groups[0].names[0])
        suites = [name for name in result.metrics if " " in name]
        if suites:
            scores = result.groups[0].scores
            yield facts("Evaluations", [(result.titles[name], scores[name].text) for name in suites])
        yield facts("Training", [(_COSTS[name], _cost(name, getattr(result.groups[0], name))) for name in costs])
        return
    yield table(counted(sum(len(group.names) for group in result.groups), "run"), columns, rows, turns=True)
    yield _legend(result)


def _legend(result: ReportResult) -> Text:
    parts = []
    if any(result.best.values()):
        parts.append(f"{_BEST} best")
    if any(score.sd is not None for group in result.groups for score in group.scores.values()):
        parts.append("± standard deviation over runs that differ in their seed")
    lower = [result.titles[name] for name in result.metrics if name in result.lower_is_better]
    if lower:
        parts.append(f"lower is better: {', '.join(lower)}")
    if (hidden := len(result.settings) - _MAX_SETTINGS) > 0:
        parts.append(f"{counted(hidden, 'other setting')} differ{'s' if hidden == 1 else ''} (--csv, --json)")
    return Text("; ".join(parts), "dim")


_COSTS = {"seconds": "seconds", "tokens_per_s": "tokens/s", "rollouts": "rollouts"}


def _title(group: RunGroup) -> str:
    return group.title + (f" ({group.unfinished} unfinished)" if group.unfinished else "")


def _score_cell(score: GroupScore | None, is_best: bool) -> Text | str | None:
    if score is None or not is_best:
        return None if score is None else score.text
    return Text(f"{_BEST} {score.text}", f"bold {GOOD}")


def _cost(name: str, value: float | None) -> str | None:
    if value is None:
        return None
    return format_percent(value) if name == "rollouts" else f"{value:,.0f}"


def report_csv(result: ReportResult) -> str:
    """Return the groups as CSV: every setting that differs, mean, sd and number of runs of each metric, and costs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = [head for name in result.metrics for head in (name, f"{name} sd", f"{name} runs")]
    writer.writerow(["run", "runs", "unfinished", *result.settings, *heads, *_COSTS])
    for group in result.groups:
        cells: list[object] = [group.names[0], len(group.names), group.unfinished]
        cells += [group.setting_text(name) for name in result.settings]
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
    heads = ["run", *result.settings, *(result.titles[name] for name in result.metrics), *_COSTS.values()]
    figures = 1 + len(result.settings)
    lines = [_markdown_row(heads), _markdown_row(["---" if i < figures else "---:" for i in range(len(heads))])]
    for i, group in enumerate(result.groups):
        cells = [_title(group), *(group.setting_text(name) for name in result.settings)]
        for name in result.metrics:
            score = group.scores.get(name)
            text = NOT_AVAILABLE if score is None else score.text
            cells.append(f"**{text}**" if i in result.best[name] else text)
        cells += [_cost(name, getattr(group, name)) or NOT_AVAILABLE for name in _COSTS]
        lines.append(_markdown_row(cells))
    return "\n".join(lines) + "\n"


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"
