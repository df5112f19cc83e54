"""Render the live display of a run.

``RunState`` collects figures from events; ``render_display`` turns it into a Rich renderable that fits a width and
height. Neither reads a clock nor prints.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from distillm_cli.training.events import Progress, RunStarted, Staged, Stepped, Validated
from distillm_cli.utils.text import format_count, format_duration, format_parameters, format_percent

CURVE_POINTS = 40  # points of the loss chart
WIDE = 80  # minimum width in columns for figures side by side
MAX_WIDTH = 100  # largest width of the panel in columns
SMOOTHING = 0.9  # decay of the smoothed loss per step
LABEL_WIDTH = 10
VALID_LOSS = "valid CE"  # held-out cross-entropy, nats per token

# Each source has its own shade, so that the bar is readable without colors.
SOURCES = {
    "dataset": ("█", "blue"),
    "teacher": ("█", "green"),
    "rollout": ("▓", "magenta"),
    "replay": ("▒", "cyan"),
    "teacher+rollout": ("▓", "green"),
}
OTHER = ("░", "white")
GOOD, BAD = "green", "yellow"


class Memory(NamedTuple):
    """Hold bytes in use: resident in the process, and allocated on the GPU. None if unknown."""

    process: float | None = None
    gpu: float | None = None


class RunState:
    """Collect the figures of a run from its events.

    now: seconds of any monotonic clock. log_steps: steps from one ``Stepped`` to the next.
    """

    def __init__(self, started: RunStarted, now: float, log_steps: int = 1):
        self.started = started
        self.has_ended = False
        self.started_at = now
        self.first_step = started.first_step  # steps before this process: 0, more after a resume
        self.step = started.first_step
        self.epoch = self.step / max(started.steps_per_epoch, 1)
        self.loss: float | None = None
        self.curve: deque[float] = deque(maxlen=CURVE_POINTS)
        self.valid_loss: float | None = None
        self.valid_step = 0
        self.previous_valid: float | None = None  # loss of the previous validation
        self.first_valid: tuple[float, int] | None = None  # loss and step
        # Loss and step of the last validation, if it was of a step before the current one and was not logged.
        self.unreported: tuple[float, int] | None = None
        self.best: tuple[float, int] | None = None
        self.has_named_checkpoint = False  # in a printed line
        self.phi = started.phi
        self.trigger = started.trigger
        self.sources: Counter[str] = Counter()
        self.lr = 0.0
        self.grad_norm = 0.0
        self.figures: dict[str, float] = {}
        self.health: dict[str, float] = {}  # the latest of each figure
        self.divergences: tuple[float, float] | None = None  # KL and reverse KL of the last validation
        self.memory = Memory()
        self._moment = 0.0
        self._weight = 0.0
        self._bucket: list[float] = []
        # Each point of the chart is the mean over this number of steps, so that the whole run has about CURVE_POINTS.
        self._bucket_size = max(1, math.ceil((started.steps - self.first_step) / log_steps / CURVE_POINTS))
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)
        self._first_step_at = now
        self._last_step_at = now

    @property
    def valid_label(self) -> str:
        """Return the name of the validation loss."""
        return f"valid {self.started.valid}"

    def stepped(self, event: Stepped, now: float) -> None:
        if not self.sources:
            self._first_step_at = now - event.seconds  # without the validation before training
        self.step = event.step
        self.epoch = event.epoch
        self._last_step_at = now
        self._moment = SMOOTHING * self._moment + (1 - SMOOTHING) * event.loss
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        self.loss = self._moment / self._weight
        self._bucket.append(event.loss)
        if len(self._bucket) == self._bucket_size:
            self.curve.append(math.fsum(self._bucket) / self._bucket_size)
            self._bucket.clear()
        self.phi = event.phi
        self.lr = event.lr
        self.grad_norm = event.grad_norm
        self.figures = event.figures
        self.health |= event.health
        self.sources[event.source] += 1
        self._recent.append((event.tokens, event.seconds))

    def validated(self, event: Validated) -> None:
        self.unreported = (event.valid_loss, event.step) if event.step < self.step else None
        self.step = max(self.step, event.step)
        self.valid_step = event.step
        self.previous_valid = self.valid_loss
        self.valid_loss = event.valid_loss
        self.phi = event.phi
        self.trigger = event.trigger
        forward, reverse = event.scores.get("kl_teacher_student"), event.scores.get("kl_student_teacher")
        self.divergences = None if forward is None or reverse is None else (forward, reverse)
        if self.first_valid is None:
            self.first_valid = (event.valid_loss, event.step)
        if self.best is None or event.valid_loss < self.best[0]:
            self.best = (event.valid_loss, event.step)

    @property
    def shows_sources(self) -> bool:
        """Return whether the shares of the sources are shown: not in SFT, and not while all steps used data set rows."""
        return self.started.method != "sft" and (self.phi > 0 or set(self.sources) - {"dataset"} != set())

    @property
    def shows_phi(self) -> bool:
        return self.shows_sources and self.started.has_phi

    @property
    def tokens_per_second(self) -> float | None:
        seconds = sum(s for _, s in self._recent)
        return sum(t for t, _ in self._recent) / seconds if seconds > 0 else None

    def shares(self) -> list[tuple[str, float]]:
        """Return each source with its share of the steps so far, known sources first."""
        known = [name for name in SOURCES if self.sources[name]]
        names = known + sorted(set(self.sources) - set(SOURCES))
        total = self.sources.total()
        return [(name, self.sources[name] / total) for name in names]

    def seconds_left(self, now: float) -> float | None:
        """Estimate the time left from the mean pace since the first step, validations included; None if it has ended."""
        done = self.step - self.first_step
        if done == 0 or self.has_ended:
            return None
        pace = (self._last_step_at - self._first_step_at) / done
        return max(pace * (self.started.steps - self.step) - (now - self._last_step_at), 0.0)


@dataclass
class RunningTask:
    """Hold the progress and the start of a task outside the training loop."""

    event: Progress
    started: float


def render_display(
    run: RunState | None,
    tasks: Mapping[str, RunningTask],
    *,
    now: float,
    width: int,
    height: int,
    min_seconds: float = 0.0,
    staged: Staged | None = None,
) -> RenderableType:
    """Return the live display, without tasks that have run for less than ``min_seconds``.

    During a run it is a panel with the current task in its lower border, so that the height does not change. If the height
    is too small for the panel and a few lines above it, only the progress line is shown. Outside a run it is a bar for each
    task. In a pipeline, a line with its stages is above that.
    """
    width = min(width, MAX_WIDTH)
    if staged is not None:
        inner = render_display(run, tasks, now=now, width=width, height=height - 1, min_seconds=min_seconds)
        return Group(Padding(render_stages(staged, width - 4), (0, 2)), inner)
    shown = [task for task in tasks.values() if now - task.started >= min_seconds]
    if run is None:
        return Padding(_tasks(shown, now), (0, 2)) if shown else Group()
    if height < (10 if width >= WIDE else 13) + len(_health(run.health)) + (run.divergences is not None) + 4:
        return Padding(_progress(run, now, width), (0, 2))
    return _panel(run, shown, now, width)


def trained_parameters(event: RunStarted) -> str:
    """Return the number of trained parameters: the student's, and the teacher's if it is trained."""
    student = format_parameters(event.parameters)
    return (
        f"{student} and {format_count(event.teacher_parameters)} of the teacher"
        if event.teacher_parameters
        else student
    )


def _panel(run: RunState, tasks: Sequence[RunningTask], now: float, width: int) -> Panel:
    s = run.started
    known = [trained_parameters(s) if s.parameters else "", s.device, s.dtype]
    title = Text.assemble((s.method, "bold"), *(f" · {fact}" for fact in known if fact))
    wide = width >= WIDE
    label = max(LABEL_WIDTH, len(s.loss))
    rows = _main_figures(run, width - 4 - label - 2 - (23 if wide else 0))
    side = _side_figures(run)
    parts: list[RenderableType] = [_progress(run, now, width), ""]
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    grid.add_column(style="dim", width=label, no_wrap=True)
    grid.add_column(ratio=1, no_wrap=True)
    if wide:
        grid.add_column(style="dim", width=9, no_wrap=True)
        grid.add_column(width=9, no_wrap=True, justify="right")
        blank = ("", Text())
        for i in range(max(len(rows), len(side))):
            grid.add_row(*(rows[i] if i < len(rows) else blank), *(side[i] if i < len(side) else blank))
    else:
        for row in rows:
            grid.add_row(*row)
    parts.append(grid)
    if run.shows_sources and run.sources:
        parts.append(Padding(legend(run.shares()), (0, 0, 0, label + 2)))
    if not wide:
        lines = [Text.assemble((f"{label} ", "dim"), value) for label, value in side]
        parts += ["", Text(" · ", style="dim").join(lines)]
    current = Text.assemble(tasks[-1].event.task, " ", _task_progress(tasks[-1], now)) if tasks else None
    return Panel(
        Group(*parts),
        title=title,
        title_align="left",
        subtitle=current,
        subtitle_align="left",
        border_style="dim",
        width=width,
    )


def _progress(run: RunState, now: float, width: int) -> RenderableType:
    steps, left = run.started.steps, run.seconds_left(now)
    figures = Text.assemble(
        (f"{run.step:,}/{steps:,}", "bold"),
        f"  epoch {run.epoch:.1f}  ",
        (f"{format_duration(now - run.started_at)} elapsed", "dim"),
        f"  {'–' if left is None else format_duration(left)} left",
    )
    line = Table.grid(padding=(0, 2, 0, 0), expand=True)
    line.add_column(ratio=1)
    bar = ProgressBar(total=steps, completed=run.step, complete_style="cyan", finished_style="green")
    if width >= WIDE:
        line.add_column(no_wrap=True)
        line.add_row(bar, figures)
        return line
    line.add_row(bar)
    return Group(line, figures)


def _main_figures(run: RunState, width: int) -> list[tuple[str, Text]]:
    """Return labels and values, the values at most ``width`` columns wide."""
    rows = [(run.started.loss, _loss(run, width)), (run.valid_label, _valid(run))]
    if run.divergences is not None:
        forward, reverse = run.divergences
        rows.append(("valid KL", Text(f"{forward:.3f} · reverse {reverse:.3f}")))
    rows += [(name, Text(f"{figure:.3f}")) for name, figure in run.figures.items()]
    rows += _health(run.health)
    if run.started.has_phi and run.started.method != "sft":
        filled = round(run.phi * 10)
        gauge = Text.assemble(f"{run.phi:.2f} ", ("▰" * filled, "magenta"), ("▱" * (10 - filled), "dim"))
        rows.append(("φ", gauge.append(_trigger(run), "dim")))
    if run.shows_sources:
        rows.append(("sources", stacked_bar(run.shares(), min(width, CURVE_POINTS + 7))))
    return rows


def _health(health: Mapping[str, float]) -> list[tuple[str, Text]]:
    """Return the lines of student outputs and of the agreement with the teacher, once they were measured."""
    rows = []
    if "rollout_length" in health:
        parts = [f"{health['rollout_length']:.0f} tokens, p90 {health['rollout_length_p90']:.0f}"]
        parts += [f"{format_percent(health['rollout_cut'])} cut"] if "rollout_cut" in health else []
        rows.append(("outputs", Text(" · ".join(parts))))
    if "acceptance" in health:
        top = f"top 16 {format_percent(health['top16_overlap'])}, mass {health['top16_mass']:.2f}"
        rows.append(("agreement", Text(f"acceptance {format_percent(health['acceptance'])} · {top}")))
    if "student_entropy" in health:
        teacher = f" · teacher {health['teacher_entropy']:.2f}" if "teacher_entropy" in health else ""
        rows.append(("entropy", Text(f"{health['student_entropy']:.2f}{teacher}")))
    return rows


def _trigger(run: RunState) -> str:
    """Return the validation loss at which φ rises, before the first validation relative to that one."""
    if run.trigger is not None:
        return f" rises at {VALID_LOSS} ≥ {run.trigger:.3f}"
    epsilon = run.started.epsilon
    if epsilon is None or run.valid_loss is not None:
        return ""
    return f" rises at {VALID_LOSS} {'−' if epsilon < 0 else '+'} {abs(epsilon):g}"


def _loss(run: RunState, width: int) -> Text:
    if run.loss is None:
        return Text("–")
    return Text.assemble(f"{run.loss:.3f}  ", (sparkline(list(run.curve)[-(width - 7) :]), "cyan"))


def _valid(run: RunState) -> Text:
    if run.valid_loss is None or run.best is None:
        return Text("–")
    line = Text(f"{run.valid_loss:.3f}")
    if run.previous_valid is not None:
        arrow, style = ("↓", GOOD) if run.valid_loss < run.previous_valid else ("↑", BAD)
        line.append(*((" =", "dim") if run.valid_loss == run.previous_valid else (f" {arrow}", style)))
        value, step = run.best
        line.append(f"  best {value:.3f} at {step:,}", "dim")
    return line


def _side_figures(run: RunState) -> list[tuple[str, Text]]:
    rate = run.tokens_per_second
    rows = [
        ("tokens/s", Text("–" if rate is None else format_count(rate))),
        ("lr", Text(f"{run.lr:.1e}" if run.sources else "–")),
        ("grad norm", Text(f"{run.grad_norm:.3g}" if run.sources else "–")),
    ]
    if (sampling := run.health.get("sampling_tokens_per_second")) is not None:
        rows.insert(1, ("sampled/s", Text(format_count(sampling))))
    if "rollout_distinct2" in run.health:
        rows.append(("distinct", Text(f"{run.health['rollout_distinct2']:.2f}")))
    if "replay_age" in run.health:
        rows.append(("age", Text(f"{run.health['replay_age']:.0f} steps")))
    sizes = (("memory", run.memory.process), ("GPU", run.memory.gpu))
    return rows + [(name, Text(f"{format_count(size)}B")) for name, size in sizes if size is not None]


def _tasks(tasks: Sequence[RunningTask], now: float) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, max_width=28)
    grid.add_column(width=20)
    grid.add_column(no_wrap=True)
    for task in tasks:
        e = task.event
        unknown = e.total <= 1
        bar = ProgressBar(total=None if unknown else e.total, completed=e.done, pulse=unknown, complete_style="cyan")
        bar.animation_time = now
        grid.add_row(Text(e.task, overflow="ellipsis"), bar, Text(_task_progress(task, now), style="dim"))
    return grid


def _task_progress(task: RunningTask, now: float) -> str:
    """Return the progress of a task, or its elapsed time if the total is unknown."""
    e = task.event
    return f"{e.done:,}/{e.total:,} {e.unit}".rstrip() if e.total > 1 else format_duration(now - task.started)


_STATES = {"done": ("✓", GOOD), "now": ("▶", "bold cyan"), "later": ("·", "dim"), "left out": ("–", "dim")}


def render_stages(staged: Staged, width: int) -> Text:
    """Return a pipeline's stages side by side. If they do not fit, return the current one and the number of stages."""
    whole = Text("   ").join(
        Text.assemble(
            (f"{_STATES[state][0]} ", _STATES[state][1]), (name, _STATES[state][1] if state != "done" else "")
        )
        for name, state in zip(staged.names, staged.states, strict=True)
    )
    if whole.cell_len <= width:
        return whole
    current = staged.states.index("now") if "now" in staged.states else len(staged.names) - 1
    short = Text.assemble(
        ("▶ ", "bold cyan"), (staged.names[current], "bold cyan"), f"  {current + 1} of {len(staged.names)}"
    )
    short.truncate(width, overflow="ellipsis")
    return short


def stacked_bar(shares: Sequence[tuple[str, float]], width: int) -> Text:
    """Return shares (they add up to 1) as one bar; every share above zero gets at least one cell."""
    bar, start, reached = Text(), 0, 0.0
    for i, (name, share) in enumerate(shares):
        glyph, style = SOURCES.get(name, OTHER)
        reached += share
        latest = width - (len(shares) - 1 - i)  # leave a cell for each of the next ones
        end = min(max(round(reached * width), start + 1), latest)
        bar.append(glyph * (end - start), style)
        start = end
    return bar


def legend(shares: Sequence[tuple[str, float]]) -> Text:
    """Return the names of a stacked bar's parts with their percentages."""
    parts = []
    for name, share in shares:
        glyph, style = SOURCES.get(name, OTHER)
        parts.append(Text.assemble((glyph, style), f" {name} {format_percent(share)}"))
    return Text("  ").join(parts)


def sparkline(values: Sequence[float]) -> str:
    """Return values as a row of blocks from the lowest to the highest, on a logarithmic scale if all are positive.

    Losses fall fast and then slowly; on a linear scale the slow part looks flat.
    """
    values = [v for v in values if math.isfinite(v)]
    if not values:
        return ""
    heights = [math.log(v) for v in values] if min(values) > 0 else list(values)
    low, span = min(heights), max(heights) - min(heights)
    blocks = "▁▂▃▄▅▆▇█"
    return "".join(blocks[round((h - low) / span * 7)] if span > 0 else blocks[3] for h in heights)
