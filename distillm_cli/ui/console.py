"""Show events on stderr, as a live display on a terminal or as plain lines, and print results on stdout.

with console(json_mode=json, quiet=quiet) as ui:
    result = start_training(..., listener=ui)
    ui.answer(*train_summary(result))
    ui.result(result.as_json())
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from pathlib import Path
from types import TracebackType

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from distillm_cli.runs.run_results import EvalResult, FineTuned, Result, StageFinished, TrainResult
from distillm_cli.training.events import (
    Alarmed,
    Event,
    Note,
    Progress,
    RunEnded,
    RunStarted,
    Saved,
    Staged,
    Stepped,
    Validated,
    Warned,
)
from distillm_cli.ui.display import (
    BAD,
    GOOD,
    Memory,
    RunningTask,
    RunState,
    render_display,
    trained_parameters,
)
from distillm_cli.utils.stdout import write_json, write_rendered
from distillm_cli.utils.text import (
    counted,
    format_count,
    format_duration,
    format_percent,
    printable,
    redact,
    signed,
)

REFRESHES_PER_SECOND = 4  # slow enough to read the numbers
MIN_SHOWN_SECONDS = 0.2  # duration after which a task is shown in the live display
MIN_LOGGED_SECONDS = 1.0  # duration of a task from which its end is logged
LOG_PERIOD = 10.0  # seconds between plain lines
UNLIMITED_WIDTH = 10_000  # columns of a file or a pipe: lines are not wrapped


class Terminal(RichConsole):
    """Print like a Rich console, and remove control characters from the text."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


class PlainText(Terminal):
    """Render for files and pipes: no colors, tables without borders, and their captions on one line."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        caption = None
        if isinstance(renderable, Table):
            renderable = copy(renderable)
            renderable.box = None
            renderable.pad_edge = False
            caption = renderable.caption
            renderable.caption = None
        yield from super().render(renderable, options)
        if caption is not None:
            yield from super().render(caption, options)


def console(
    json_mode: bool = False,
    quiet: bool = False,
    stderr: RichConsole | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    memory: Callable[[], Memory] | None = None,
) -> Console:
    """Return the listener of a command. stderr: a Rich console to use in place of the process's stderr."""
    if stderr is None:
        # FORCE_COLOR and similar variables must not write a live display to a log file.
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
        stderr = Terminal(stderr=True, force_terminal=None if is_terminal else False)
    return Console(stderr, json_mode=json_mode, quiet=quiet, clock=clock, memory=memory or memory_in_use)


class Console:
    """Show events when they occur. As a context manager it restores the terminal at exit.

    json_mode: ``result`` prints its object on stdout, and ``answer`` prints on stderr. quiet: stderr shows warnings only.
    """

    def __init__(
        self,
        terminal: RichConsole,
        *,
        json_mode: bool,
        quiet: bool,
        clock: Callable[[], float],
        memory: Callable[[], Memory],
    ):
        self.json_mode = json_mode
        self.quiet = quiet
        self._terminal = terminal
        self._clock = clock
        self._memory = memory
        self._is_live = terminal.is_interactive and not quiet
        self._live: Live | None = None
        # Rich's refresh thread reads the state that the training thread changes. Rich has its own lock, so this one is not
        # held while printing.
        self._lock = threading.RLock()
        self._run = RunState(RunStarted(0, 0, 0, "", 0, "", ""), clock())  # replaced when a run starts
        self._running = False
        self._tasks: dict[str, RunningTask] = {}
        self._staged: Staged | None = None
        self._logged_at = -math.inf
        self._memory_at = -math.inf

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._tasks.clear()
            self._staged = None
        self._stop()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Warned):
            return self._print_line(Text.assemble(("warning: ", f"bold {BAD}"), event.text))
        if isinstance(event, Alarmed):
            return self._print_line(Text.assemble(("alarm: ", f"bold {BAD}"), event.text))
        if self.quiet:
            return None
        if isinstance(event, FineTuned | StageFinished):
            return self.show(*_stage_summary(event))
        with self._lock:
            lines = self._update(event, self._clock())
        if self._is_live and (self._running or self._tasks or self._staged):
            self._start()
        else:
            self._stop()
        for line in lines:
            self._print_line(line)
        return None

    def show(self, *renderables: RenderableType | Note) -> None:
        """Print tables, panels, sentences (strings without markup) and notes on stderr; nothing if quiet."""
        if self.quiet:
            return
        for renderable in renderables:
            if isinstance(renderable, Note):
                self._print_line(Text(renderable.text))
            else:
                if isinstance(renderable, str):
                    renderable = Text(renderable)
                self._terminal.print(renderable, highlight=False, crop=False)  # a long command is not cut

    def answer(self, *renderables: RenderableType | Note) -> None:
        """Print the result of a command on stdout, also if quiet; notes, and everything in ``json_mode``, on stderr."""
        if self.json_mode:
            return self.show(*renderables)
        self._stop()
        write_rendered(_rendered([item for item in renderables if not isinstance(item, Note)]))
        return self.show(*(item for item in renderables if isinstance(item, Note)))

    def result(self, obj: Mapping[str, object]) -> None:
        """Print the result of the command as one JSON object on stdout, if ``json_mode`` is set."""
        if self.json_mode:
            write_json(obj)

    def frame(self) -> RenderableType:
        """Return the live display in its current state."""
        with self._lock:
            return render_display(
                self._run if self._running else None,
                self._tasks,
                now=self._clock(),
                width=self._terminal.width,
                height=self._terminal.height,
                min_seconds=MIN_SHOWN_SECONDS,
                staged=self._staged,
            )

    def _update(self, event: Event, now: float) -> list[Text]:
        """Update the state of the display; return the lines to print."""
        match event:
            case Note():
                return [Text(event.text)]
            case Progress():
                return self._update_task(event, now)
            case Staged():
                self._staged = event if "now" in event.states else None
                return []
            case RunStarted():
                self._run = RunState(event, now)
                self._running = True
                self._logged_at = -math.inf
                return [_started(event)]
            case RunEnded():
                line = _ended(event, self._run)
                self._running = False
                self._tasks.clear()
                return [line]
            case Stepped():
                self._run.stepped(event, now)
                if now - self._memory_at >= 1:  # not when drawing: the current GPU is set in the training thread
                    self._run.memory, self._memory_at = self._memory(), now
                due = now - self._logged_at >= LOG_PERIOD or event.step == self._run.started.steps
                if self._is_live or not due:
                    return []
                self._logged_at = now
                return [_stepped(self._run, now)]
            case Validated():
                phi, unreported = self._run.phi, self._run.unreported
                self._run.validated(event)
                if self._run.unreported:  # the loss before training: the next line compares with it
                    return []
                return [_validated(event, self._run, phi, unreported)]
            case Saved():
                # The first names the directory; a later one after a validation would be a second line for the same step.
                is_repeated = self._run.has_named_checkpoint and self._run.valid_step == event.step
                self._run.has_named_checkpoint = True
                if is_repeated:
                    return []
                step = _step(event.step, self._run)
                return [Text.assemble(f"{step} · ", (f"saved {event.path}", "dim"))]
        return []

    def _update_task(self, event: Progress, now: float) -> list[Text]:
        task = self._tasks.setdefault(event.task, RunningTask(event, now))
        task.event = event
        took = now - task.started
        if event.done >= event.total:
            del self._tasks[event.task]
            # Within a run the same task repeats many times, so its end is not logged.
            return [_finished(event, took)] if took > MIN_LOGGED_SECONDS and not self._running else []
        if self._is_live or now - max(self._logged_at, task.started) < LOG_PERIOD:
            return []
        self._logged_at = now
        return [Text(f"{event.task} · {event.done:,}/{event.total:,} {event.unit}".rstrip())]

    def _print_line(self, line: Text) -> None:
        # One event is one line, even if a path or a column name contains a newline.
        if (text := redact(" ".join(line.plain.split("\n")))) != line.plain:
            line = Text(text)
        # Only lines on a terminal are wrapped, not those of a log.
        self._terminal.print(line, soft_wrap=not self._is_live, highlight=False)

    def _start(self) -> None:
        if self._live is None:
            self._live = Live(
                get_renderable=lambda: Group(self.frame(), ""),  # the terminal prints ^C on the empty line
                console=self._terminal,
                refresh_per_second=REFRESHES_PER_SECOND,
                transient=True,
                redirect_stdout=False,  # stdout carries results only
            )
            self._live.start()

    def _stop(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()


def _rendered(renderables: Iterable[RenderableType]) -> str:
    """Return renderables as text for stdout: as on a terminal if it is one, else without colors and borders."""
    if sys.stdout.isatty():
        target = Terminal(file=sys.stdout)
    else:
        target = PlainText(file=sys.stdout, force_terminal=False, color_system=None, width=UNLIMITED_WIDTH)
    parts: list[str] = []
    is_previous_text = True
    for item in renderables:
        is_text = isinstance(item, str | Text)
        if isinstance(target, PlainText) and parts and not (is_text and is_previous_text):
            parts.append("\n")
        is_previous_text = is_text
        with target.capture() as captured:
            target.print(Text(item) if isinstance(item, str) else item, highlight=False)
        parts += [f"{line.rstrip()}\n" for line in redact(captured.get()).splitlines()]
    return "".join(parts)


def _stage_summary(event: FineTuned | StageFinished) -> Iterable[RenderableType | Note]:
    """Return the tables of a finished part of a larger run."""
    from distillm_cli.ui.summary import eval_summary, outcome_tables, train_summary

    result: Result = event.result
    if isinstance(event, FineTuned):
        return outcome_tables(event.result.summary, title=event.title)
    if isinstance(result, TrainResult):
        return train_summary(result)
    return eval_summary(result) if isinstance(result, EvalResult) else ()


def memory_in_use() -> Memory:
    """Return the memory that this process uses, on the GPU only if torch has initialized it."""
    gpu = None
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gpu = float(torch.cuda.memory_allocated())
    return Memory(_resident(), gpu)


def _resident() -> float | None:
    try:
        import resource  # absent on Windows
    except ImportError:
        return None
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return float(pages * resource.getpagesize())
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(peak if sys.platform == "darwin" else peak * 1024)


def _step(step: int, run: RunState) -> str:
    """Return "step   20", as wide as the last step's number, so that lines are aligned."""
    return f"step {step:>{len(str(run.started.steps))}}"


def _started(event: RunStarted) -> Text:
    epochs = event.steps / max(event.steps_per_epoch, 1)
    line = Text.assemble((event.method, "bold"), f" · {counted(event.steps, 'step')}, {epochs:.1f} epochs")
    line.append(f" · {trained_parameters(event)} · {event.device} · {event.dtype}")
    return line.append(f" · resumed after step {event.first_step:,}") if event.first_step else line


def _stepped(run: RunState, now: float) -> Text:
    left, rate = run.seconds_left(now), run.tokens_per_second
    parts = [_step(run.step, run), f"epoch {run.epoch:.1f}", f"{run.started.loss} {run.loss:.3f}"]
    parts += [f"{name} {figure:.3f}" for name, figure in run.figures.items()]
    if run.shows_phi:
        parts.append(f"φ {run.phi:.2f}")
    if run.shows_sources:
        parts.append(" ".join(f"{name} {format_percent(share)}" for name, share in run.shares()))
    if "acceptance" in run.health:
        parts.append(f"acceptance {format_percent(run.health['acceptance'])}")
    if "rollout_cut" in run.health:
        parts.append(f"cut {format_percent(run.health['rollout_cut'])}")
    parts.append(f"lr {run.lr:.1e}")
    if rate is not None:
        parts.append(f"{format_count(rate)} tokens/s")
    if run.memory.process is not None:
        parts.append(f"{format_count(run.memory.process)}B")
    if left is not None:
        parts.append(f"{format_duration(left)} left")
    return Text(" · ".join(parts))


def _validated(event: Validated, run: RunState, phi: float, unreported: tuple[float, int] | None) -> Text:
    """Return the line of a validation. unreported: the previous loss and its step, if it was not logged."""
    value = Text.assemble(f"{run.valid_label} ", (f"{event.valid_loss:.3f}", "bold"))
    if run.previous_valid is not None:
        change = event.valid_loss - run.previous_valid
        since = f" from {unreported[0]:.3f} at step {unreported[1]:,}" if unreported else ""
        value.append(" ").append_text(Text.assemble("(", (signed(change, 3), GOOD if change < 0 else BAD), f"{since})"))
    parts = [Text(_step(event.step, run)), value]
    if run.started.steps_per_epoch:
        parts.insert(1, Text(f"epoch {event.step / run.started.steps_per_epoch:.1f}"))
    names = {
        "valid_divergence": f"valid {run.started.divergence}",
        "kl_teacher_student": "KL",
        "kl_student_teacher": "reverse KL",
    }
    for name, figure in event.scores.items():
        title = names.get(name, name.replace("_", " "))
        parts.append(Text(f"{title} –" if figure is None else f"{title} {figure:.3f}"))
    if event.rose:
        parts.append(Text(f"φ {phi:.2f} → {event.phi:.2f}", "magenta"))
    elif run.shows_phi:
        parts.append(Text(f"φ {event.phi:.2f}"))
    if event.best and run.previous_valid is not None:
        parts.append(Text("selected", GOOD))  # the best of the trained weights, not always better than before training
    return Text(" · ").join(parts)


def _ended(event: RunEnded, run: RunState) -> Text:
    line = Text.assemble((event.reason, "bold"), f" · step {event.step:,} of {run.started.steps:,}")
    line.append(f" · {format_duration(event.seconds)}")
    if run.valid_loss is not None:
        first, step = run.first_valid
        last_step = "" if run.valid_step == event.step else f" at step {run.valid_step:,}"
        if run.previous_valid is None:
            line.append(f" · {run.valid_label} {first:.3f}{last_step}")
        else:
            line.append(
                f" · {run.valid_label} {first:.3f}{f' at step {step:,}' if step else ''} → {run.valid_loss:.3f}{last_step}"
            )
    return line


def _finished(event: Progress, took: float) -> Text:
    count = f" · {event.total:,} {event.unit}".rstrip() if event.total > 1 else ""
    seconds = f"{took:.1f} s" if took < 60 else format_duration(took)
    return Text(f"{event.task}{count} · {seconds}", "dim")
