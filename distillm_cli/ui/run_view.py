"""Draw the state of a run that ``runs.watch`` has read: the display of a training, and what else its directory has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from distillm_cli.runs.output_dir import STAGES
from distillm_cli.runs.run_results import Outcome
from distillm_cli.runs.watch import FINISHED, RUNNING, STARTING, RunView
from distillm_cli.training.events import Stepped, Validated
from distillm_cli.ui.display import BAD, GOOD, RunState, render_display
from distillm_cli.ui.summary import outcome_table
from distillm_cli.utils.text import counted, format_duration

_STYLES = {RUNNING: "bold cyan", STARTING: "bold cyan", FINISHED: f"bold {GOOD}"}
_HEIGHT = 100  # the panel is drawn whole, also on a low terminal
_SHOWN_CHECKPOINTS = 4
_SHOWN_ALARMS = 3


class Figure(NamedTuple):
    """Describe a figure of a run's health: its key in ``metrics.jsonl``, its label and its format."""

    key: str
    label: str
    form: str


# Figures of the same subject are on one line.
HEALTH: dict[str, tuple[Figure, ...]] = {
    "rollouts": (
        Figure("rollout_length", "length", "{:.0f}"),
        Figure("rollout_length_p90", "90th percentile", "{:.0f}"),
        Figure("rollout_cut", "cut", "{:.0%}"),
        Figure("rollout_distinct2", "distinct-2", "{:.2f}"),
        Figure("replay_age", "replay age", "{:.0f} steps"),
    ),
    "agreement": (
        Figure("top16_overlap", "top-16 overlap", "{:.0%}"),
        Figure("top16_mass", "mass", "{:.0%}"),
        Figure("acceptance", "acceptance", "{:.0%}"),
    ),
    "entropy": (
        Figure("student_entropy", "student", "{:.2f}"),
        Figure("teacher_entropy", "teacher", "{:.2f}"),
    ),
    "held out": (
        Figure("kl_teacher_student", "KL(teacher ‖ student)", "{:.3f}"),
        Figure("kl_student_teacher", "KL(student ‖ teacher)", "{:.3f}"),
    ),
    "tokens/s": (
        Figure("train_tokens_per_second", "training", "{:,.0f}"),
        Figure("sampling_tokens_per_second", "sampling", "{:,.0f}"),
    ),
}
_HEALTH_KEYS = {figure.key for group in HEALTH.values() for figure in group}


class RunPicture:
    """Draw successive states of a run. Events are added to the display once."""

    def __init__(self) -> None:
        self._run: RunState | None = None
        self._reading: tuple[int, int, int] | None = None
        self._drawn = 0
        self._seconds = 0.0  # of all steps so far, if those that are not logged take as long as the logged ones
        self._health: dict[str, float] = {}

    def draw(self, view: RunView, *, width: int, now: float) -> RenderableType:
        """Return the picture of a state. now: seconds since the epoch."""
        run = self._updated(view)
        run.has_ended = not view.is_alive
        idle = now - view.updated if view.is_alive and view.updated is not None else 0.0
        parts: list[RenderableType] = [_headline(view, now)]
        if view.events:
            parts.append(render_display(run, {}, now=self._seconds + max(idle, 0.0), width=width, height=_HEIGHT))
        parts.append(Padding(_facts(view, self._health, now), (0, 2)))
        parts += _alarms(view)
        if view.state == FINISHED and (table := _outcome(view.result or {})) is not None:
            parts.append(table)
        elif not view.is_alive:
            parts.append(_advice(view))
        return Group(*parts)

    def _updated(self, view: RunView) -> RunState:
        reading = (view.reading, view.started.steps, view.log_steps)
        if self._run is None or reading != self._reading:
            self._run = RunState(view.started, 0.0, view.log_steps)
            self._reading = reading
            self._drawn = 0
            self._seconds = 0.0
            self._health = {}
        for event in view.events[self._drawn :]:
            if isinstance(event, Stepped):
                self._health |= {k: v for k, v in event.figures.items() if k in _HEALTH_KEYS}
                figures = {k: v for k, v in event.figures.items() if k not in _HEALTH_KEYS}
                self._seconds += event.seconds * max(event.step - self._run.step, 1)
                self._run.stepped(replace(event, figures=figures), self._seconds)
            elif isinstance(event, Validated):
                self._health |= {k: v for k, v in event.scores.items() if k in _HEALTH_KEYS and v is not None}
                self._run.validated(event)
        self._drawn = len(view.events)
        return self._run


def _headline(view: RunView, now: float) -> Text:
    line = Text.assemble((str(view.directory), "bold"), " · ", (view.state, _STYLES.get(view.state, f"bold {BAD}")))
    if view.stage:
        line.append(f" · stage {view.stage}")
    line.append(f" · step {view.step:,}" + (f" of {view.started.steps:,}" if view.started.steps else ""))
    if view.updated is not None:
        line.append(f" · last figures {_ago(now - view.updated)}", "dim")
    return line


def _ago(seconds: float) -> str:
    return f"{format_duration(max(seconds, 0.0))} ago"


def _facts(view: RunView, health: Mapping[str, float], now: float) -> Table:
    """Return labels and values: inputs, checkpoints, figures of the run's health."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True, width=11)
    grid.add_column(overflow="fold")
    recipe = view.recipe
    student, teacher, source = (
        _value(recipe, *key) for key in (("student", "path"), ("teacher", "path"), ("data", "source"))
    )
    models = " → ".join(str(name) for name in (teacher, student) if name)
    if models:
        grid.add_row("models", Text(models))
    if source:
        grid.add_row("data", Text(str(source)))
    if view.checkpoints:
        shown = view.checkpoints[-_SHOWN_CHECKPOINTS:]
        steps = ", ".join(f"{saved.step:,}" for saved in shown)
        more = len(view.checkpoints) - len(shown)
        line = f"step {steps}{f' and {more} earlier' if more else ''}, newest {_ago(now - shown[-1].written)}"
        grid.add_row("checkpoints", Text(line))
    for label, group in HEALTH.items():
        known = [f"{figure.label} {figure.form.format(health[figure.key])}" for figure in group if figure.key in health]
        if known:
            grid.add_row(label, Text(" · ".join(known)))
    return grid


def _value(recipe: Mapping[str, Any], section: str, key: str) -> object:
    found = recipe.get(section)
    return found.get(key) if isinstance(found, dict) else None


def _alarms(view: RunView) -> Iterator[RenderableType]:
    """Yield the newest alarms, each with its cure."""
    shown = view.alarms[-_SHOWN_ALARMS:]
    if len(view.alarms) > len(shown):
        yield Text(f"{counted(len(view.alarms), 'alarm')}, the last {len(shown)}:", BAD)
    for alarm in shown:
        line = Text.assemble((f"alarm at step {alarm.step:,}: ", f"bold {BAD}"), alarm.message or alarm.name)
        yield line.append(f"; {alarm.cure}", "dim") if alarm.cure else line


def _advice(view: RunView) -> Text:
    """Return how to continue a run whose process ended before its result."""
    if view.stage and view.stage not in STAGES:
        return Text("Run the command of the pipeline again to continue.")
    if not view.checkpoints:
        return Text("No checkpoint was saved: run the command again, with --overwrite.")
    verb = "sft" if view.started.method == "sft" and not view.stage else "distill"
    return Text(f"Continue with: distillm {verb} --resume --output {view.directory}")


def _outcome(result: Mapping[str, Any]) -> RenderableType | None:
    """Return the table of a finished run's models; None if nothing was measured."""
    report = result.get("report")
    if not isinstance(report, dict):
        return None
    order = ["student_before", "student_after_sft", "student_after_ptp", "student_after", "teacher_before"]
    names = [name for name in order if name in report] + [name for name in report if name not in order]
    rows = []
    for name in names:
        figures = report[name] if isinstance(report[name], dict) else {}
        scores = {k: v for k, v in figures.items() if k != "valid_loss"}
        rows.append(Outcome(name.replace("_", " "), figures.get("valid_loss"), scores))
    return outcome_table(rows) if rows else None
