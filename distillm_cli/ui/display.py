"""The picture of a run: what has been seen of it so far, and how that is drawn.

``Watch`` folds events into figures; ``draw`` turns it into a Rich renderable that fits the width and height given.
Neither reads a clock nor prints.
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

CURVE = 40  # values in the small chart of the loss
WIDE = 80  # columns from which figures stand side by side
WIDEST = 100  # a wider panel would only spread its figures apart
SMOOTHING = 0.9  # of the loss, per step
LABEL = 10
VALID = "valid CE"  # held-out cross-entropy, nats per token

# A shade of its own beside the colour: the bar stays readable without colours.
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
    """Bytes in use: resident in the process, and allocated on the GPU. None where it cannot be told."""

    process: float | None = None
    gpu: float | None = None


class Watch:
    """What has been seen of a run. ``now`` is any clock in seconds that runs evenly."""

    def __init__(self, started: RunStarted, now: float):
        self.started, self.began = started, now
        self.first = self.step = started.first_step  # steps taken already: 0, more after a resume
        self.epoch = self.step / max(started.steps_per_epoch, 1)
        self.loss: float | None = None
        self.curve: deque[float] = deque(maxlen=CURVE)
        self.valid: float | None = None
        self.valid_step = 0
        self.before: float | None = None  # the validation before that
        self.first_valid: tuple[float, int] | None = None  # and its step
        self.late: tuple[float, int] | None = (
            None  # the last validation, where it was of an earlier step than the run's
        )
        self.best: tuple[float, int] | None = None
        self.phi, self.trigger = started.phi, started.trigger
        self.sources: Counter[str] = Counter()
        self.lr = self.grad_norm = 0.0
        self.figures: dict[str, float] = {}
        self.memory = Memory()
        self._moment = self._weight = 0.0
        self._bucket: list[float] = []
        # Over the whole run the chart holds about CURVE values, each the mean over as many steps as that takes.
        self._bucket_size = max(1, math.ceil((started.steps - self.first) / CURVE))
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)
        self._stepping_since = self._last = now

    def stepped(self, event: Stepped, now: float) -> None:
        if not self.sources:
            self._stepping_since = now - event.seconds  # a validation before training is no part of a step's time
        self.step, self.epoch, self._last = event.step, event.epoch, now
        self._moment = SMOOTHING * self._moment + (1 - SMOOTHING) * event.loss
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        self.loss = self._moment / self._weight
        self._bucket.append(event.loss)
        if len(self._bucket) == self._bucket_size:
            self.curve.append(math.fsum(self._bucket) / self._bucket_size)
            self._bucket.clear()
        self.phi, self.lr, self.grad_norm = event.phi, event.lr, event.grad_norm
        self.figures = event.figures
        self.sources[event.source] += 1
        self._recent.append((event.tokens, event.seconds))

    def validated(self, event: Validated) -> None:
        self.late = (event.valid_loss, event.step) if event.step < self.step else None
        self.step, self.valid_step = max(self.step, event.step), event.step
        self.before, self.valid, self.phi = self.valid, event.valid_loss, event.phi
        self.trigger = event.trigger
        if self.first_valid is None:
            self.first_valid = (event.valid_loss, event.step)
        if self.best is None or event.valid_loss < self.best[0]:
            self.best = (event.valid_loss, event.step)

    @property
    def student_takes_part(self) -> bool:
        """Whether the shares of the sources say anything: not in sft, nor while only data set rows were seen."""
        return self.started.method != "sft" and (self.phi > 0 or set(self.sources) - {"dataset"} != set())

    @property
    def shows_phi(self) -> bool:
        return self.student_takes_part and self.started.has_phi

    @property
    def tokens_per_second(self) -> float | None:
        seconds = sum(s for _, s in self._recent)
        return sum(t for t, _ in self._recent) / seconds if seconds > 0 else None

    def shares(self) -> list[tuple[str, float]]:
        """(source, share of the steps so far), known sources first."""
        known = [name for name in SOURCES if self.sources[name]]
        names = known + sorted(set(self.sources) - set(SOURCES))
        total = self.sources.total()
        return [(name, self.sources[name] / total) for name in names]

    def seconds_left(self, now: float) -> float | None:
        """From the mean pace since the first step, validations included; runs down between steps."""
        done = self.step - self.first
        if done == 0:
            return None
        pace = (self._last - self._stepping_since) / done
        return max(pace * (self.started.steps - self.step) - (now - self._last), 0.0)


@dataclass
class Task:
    """Work outside the loop, as far as it has come."""

    event: Progress
    since: float


def draw(
    watch: Watch | None,
    tasks: Mapping[str, Task],
    *,
    now: float,
    width: int,
    height: int,
    young: float = 0.0,
    staged: Staged | None = None,
) -> RenderableType:
    """The live display. Tasks younger than ``young`` seconds are left out.

    During a run, its panel, with the work in hand in its lower border, so that the height stays; where the height does
    not hold the panel and a few lines of talk above it, its progress line alone. Outside a run, a bar for each task. In a
    pipeline, a line with its stages above that.
    """
    width = min(width, WIDEST)
    if staged is not None:
        inner = draw(watch, tasks, now=now, width=width, height=height - 1, young=young)
        return Group(Padding(stages(staged, width - 4), (0, 2)), inner)
    shown = [task for task in tasks.values() if now - task.since >= young]
    if watch is None:
        return Padding(_tasks(shown, now), (0, 2)) if shown else Group()
    if height < (10 if width >= WIDE else 13) + 4:
        return Padding(_progress(watch, now, width), (0, 2))
    return _panel(watch, shown, now, width)


def _panel(watch: Watch, tasks: Sequence[Task], now: float, width: int) -> Panel:
    s = watch.started
    title = Text.assemble((s.method, "bold"), f" · {parameters(s.parameters)} · {s.device} · {s.dtype}")
    wide = width >= WIDE
    label = max(LABEL, len(s.loss))
    rows = _main_figures(watch, width - 4 - label - 2 - (23 if wide else 0))
    side = _side_figures(watch)
    parts: list[RenderableType] = [_progress(watch, now, width), ""]
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
    if watch.student_takes_part and watch.sources:
        parts.append(Padding(legend(watch.shares()), (0, 0, 0, label + 2)))
    if not wide:
        talk = [Text.assemble((f"{label} ", "dim"), value) for label, value in side]
        parts += ["", Text(" · ", style="dim").join(talk)]
    work = Text.assemble(tasks[-1].event.task, " ", _come_so_far(tasks[-1], now)) if tasks else None
    return Panel(
        Group(*parts),
        title=title,
        title_align="left",
        subtitle=work,
        subtitle_align="left",
        border_style="dim",
        width=width,
    )


def _progress(watch: Watch, now: float, width: int) -> RenderableType:
    steps, left = watch.started.steps, watch.seconds_left(now)
    figures = Text.assemble(
        (f"{watch.step:,}/{steps:,}", "bold"),
        f"  epoch {watch.epoch:.1f}  ",
        (f"{duration(now - watch.began)} elapsed", "dim"),
        f"  {'–' if left is None else duration(left)} left",
    )
    line = Table.grid(padding=(0, 2, 0, 0), expand=True)
    line.add_column(ratio=1)
    bar = ProgressBar(total=steps, completed=watch.step, complete_style="cyan", finished_style="green")
    if width >= WIDE:
        line.add_column(no_wrap=True)
        line.add_row(bar, figures)
        return line
    line.add_row(bar)
    return Group(line, figures)


def _main_figures(watch: Watch, width: int) -> list[tuple[str, Text]]:
    """Label and value, the values at most ``width`` columns wide."""
    rows = [(watch.started.loss, _loss(watch, width)), (VALID, _valid(watch))]
    rows += [(name, Text(f"{figure:.3f}")) for name, figure in watch.figures.items()]
    if watch.started.has_phi and watch.started.method != "sft":
        filled = round(watch.phi * 10)
        gauge = Text.assemble(f"{watch.phi:.2f} ", ("▰" * filled, "magenta"), ("▱" * (10 - filled), "dim"))
        rows.append(("φ", gauge.append(_trigger(watch), "dim")))
    if watch.student_takes_part:
        rows.append(("sources", stacked_bar(watch.shares(), min(width, CURVE + 7))))
    return rows


def _trigger(watch: Watch) -> str:
    """Return the validation loss at which φ rises; before the first validation, how far above that one."""
    if watch.trigger is not None:
        return f" rises at {VALID} ≥ {watch.trigger:.3f}"
    epsilon = watch.started.epsilon
    if epsilon is None or watch.valid is not None:
        return ""
    return f" rises at {VALID} {'−' if epsilon < 0 else '+'} {abs(epsilon):g}"


def _loss(watch: Watch, width: int) -> Text:
    if watch.loss is None:
        return Text("–")
    return Text.assemble(f"{watch.loss:.3f}  ", (sparkline(list(watch.curve)[-(width - 7) :]), "cyan"))


def _valid(watch: Watch) -> Text:
    if watch.valid is None or watch.best is None:
        return Text("–")
    line = Text(f"{watch.valid:.3f}")
    if watch.before is not None:
        arrow, style = ("↓", GOOD) if watch.valid < watch.before else ("↑", BAD)
        line.append(*((" =", "dim") if watch.valid == watch.before else (f" {arrow}", style)))
        value, step = watch.best
        line.append(f"  best {value:.3f} at {step:,}", "dim")
    return line


def _side_figures(watch: Watch) -> list[tuple[str, Text]]:
    rate = watch.tokens_per_second
    rows = [
        ("tokens/s", Text("–" if rate is None else amount(rate))),
        ("lr", Text(f"{watch.lr:.1e}" if watch.sources else "–")),
        ("grad norm", Text(f"{watch.grad_norm:.3g}" if watch.sources else "–")),
    ]
    sizes = (("memory", watch.memory.process), ("GPU", watch.memory.gpu))
    return rows + [(name, Text(f"{amount(size)}B")) for name, size in sizes if size is not None]


def _tasks(tasks: Sequence[Task], now: float) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, max_width=28)
    grid.add_column(width=20)
    grid.add_column(no_wrap=True)
    for task in tasks:
        e = task.event
        unknown = e.total <= 1
        bar = ProgressBar(total=None if unknown else e.total, completed=e.done, pulse=unknown, complete_style="cyan")
        bar.animation_time = now
        grid.add_row(Text(e.task, overflow="ellipsis"), bar, Text(_come_so_far(task, now), style="dim"))
    return grid


def _come_so_far(task: Task, now: float) -> str:
    """Of one thing to wait for it cannot be told; then the time it has taken."""
    e = task.event
    return f"{e.done:,}/{e.total:,} {e.unit}".rstrip() if e.total > 1 else duration(now - task.since)


_STATES = {"done": ("✓", GOOD), "now": ("▶", "bold cyan"), "later": ("·", "dim"), "left out": ("–", "dim")}


def stages(staged: Staged, width: int) -> Text:
    """A pipeline's stages side by side; where the width does not hold them, the present one and how many there are."""
    whole = Text("   ").join(
        Text.assemble(
            (f"{_STATES[state][0]} ", _STATES[state][1]), (name, _STATES[state][1] if state != "done" else "")
        )
        for name, state in zip(staged.names, staged.states, strict=True)
    )
    if whole.cell_len <= width:
        return whole
    at = staged.states.index("now") if "now" in staged.states else len(staged.names) - 1
    short = Text.assemble(("▶ ", "bold cyan"), (staged.names[at], "bold cyan"), f"  {at + 1} of {len(staged.names)}")
    short.truncate(width, overflow="ellipsis")
    return short


def stacked_bar(shares: Sequence[tuple[str, float]], width: int) -> Text:
    """Shares (they add up to 1) as one bar; every share above zero gets at least one cell."""
    bar, start, reached = Text(), 0, 0.0
    for i, (name, share) in enumerate(shares):
        glyph, style = SOURCES.get(name, OTHER)
        reached += share
        latest = width - (len(shares) - 1 - i)  # leave a cell to each of those that follow
        end = min(max(round(reached * width), start + 1), latest)
        bar.append(glyph * (end - start), style)
        start = end
    return bar


def legend(shares: Sequence[tuple[str, float]]) -> Text:
    """The names of a stacked bar's parts with their percentages."""
    parts = []
    for name, share in shares:
        glyph, style = SOURCES.get(name, OTHER)
        parts.append(Text.assemble((glyph, style), f" {name} {percent(share)}"))
    return Text("  ").join(parts)


def sparkline(values: Sequence[float]) -> str:
    """Values as a row of blocks from the lowest to the highest; by their logarithm where all are above zero.

    Losses fall fast and then slowly: the logarithm keeps the slow part from looking flat.
    """
    values = [v for v in values if math.isfinite(v)]
    if not values:
        return ""
    heights = [math.log(v) for v in values] if min(values) > 0 else list(values)
    low, span = min(heights), max(heights) - min(heights)
    blocks = "▁▂▃▄▅▆▇█"
    return "".join(blocks[round((h - low) / span * 7)] if span > 0 else blocks[3] for h in heights)


def percent(share: float) -> str:
    """A share as whole percents; what is neither nothing nor all never reads 0% or 100%."""
    whole = round(share * 100)
    if 0 < share < 1:
        whole = min(max(whole, 1), 99)
    return f"{whole}%"


def duration(seconds: float) -> str:
    """1:05, 2:03:11, 3 days 4 h."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def amount(number: float) -> str:
    """Whole numbers up to 9,999 as they are, beyond that three digits and a unit: 226 k, 1.56 G."""
    size, units = abs(number), iter("kMGT")
    if size < 9999.5:
        return f"{number:,.0f}"
    unit = ""
    while size >= 999.5 and unit != "T":
        size, number, unit = size / 1000, number / 1000, next(units)
    digits = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{number:.{digits}f} {unit}"


def size(count: float) -> str:
    """3,200 B, 1.56 GB: bytes, as ``amount``."""
    said = amount(count)
    return f"{said}B" if said[-1].isalpha() else f"{said} B"


def parameters(count: int) -> str:
    """226 k parameters, 1.56 B parameters: of weights one says billions."""
    return f"{amount(count).replace('G', 'B')} parameters"
