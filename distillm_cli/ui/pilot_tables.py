"""Render the result of a pilot: a table of the arms, and its sentences."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from distillm_cli import plugins
from distillm_cli.config.fields import is_lower_better
from distillm_cli.runs.run_results import PilotArm, PilotResult
from distillm_cli.training.events import Note
from distillm_cli.ui.display import BAD, GOOD
from distillm_cli.ui.summary import commands_to_type, table
from distillm_cli.utils.text import format_duration, signed


def pilot_tables(result: PilotResult) -> Iterator[RenderableType | Note]:
    """Yield the table of a pilot, its sentences, and what did not fit."""
    label = plugins.metrics[result.metric].label
    score = "score ↓" if is_lower_better(result.metric) else "score ↑"
    columns = ["", "lr", "steps", "time", score, "gain over the best"]
    yield table(f"Pilot: {label} on {result.rows:,} held-out rows", columns, [_line(arm) for arm in result.arms])
    notes = "Greedy answers. Gains have 95 % intervals over rows, after the same share of the steps."
    if any("×" in arm.name for arm in result.arms):
        notes += " × N: N times the steps."
    yield Text(notes, "dim")
    yield from map(Text, result.answers)
    yield from map(Note, result.notes)


def pilot_next_steps(result: PilotResult) -> RenderableType:
    """Return the next commands."""
    return commands_to_type([f"distillm distill --recipe {shlex.quote(result.recipe)}"])


def _line(arm: PilotArm) -> list[object]:
    name = Text(arm.name, "bold") if arm.is_best else Text(arm.name)
    steps = f"{arm.steps:,}" if arm.steps == arm.of_steps else f"{arm.steps:,}/{arm.of_steps:,}"
    gain: object = Text("best", "bold")
    if arm.difference is not None:
        mean, low, high = arm.difference
        style = GOOD if low > 0 else BAD if high < 0 else "dim"
        gain = Text(f"{signed(mean, 2)} [{signed(low, 2)}, {signed(high, 2)}]", style)
    return [name, f"{arm.lr:g}", steps, format_duration(arm.train_s), f"{arm.figure:.2f}", gain]
