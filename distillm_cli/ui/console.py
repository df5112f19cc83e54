"""Events → a person. A live display where stderr is a terminal, plain lines where it is not; stdout carries data only.

with console(json_mode=json, quiet=quiet) as ui:
    train(..., listener=ui)
    ui.show(outcome_table(...))
    ui.result({"command": "distill", ...})
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from distillm_cli.training.events import (
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
from distillm_cli.ui.display import BAD, GOOD, VALID, Memory, Task, Watch, amount, draw, duration, parameters, percent
from distillm_cli.utils.storage import storage_error
from distillm_cli.utils.text import counted, printable, redact, signed

REFRESHES = 4  # per second: numbers one can read
YOUNG = 0.2  # seconds; work that is over sooner never flashes up
WORTH_A_LINE = 1.0  # seconds that loading or tokenizing took
PERIOD = 10.0  # seconds between plain lines


class Terminal(RichConsole):
    """Print like a Rich console, with no control characters but its own, whatever texts it is given."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def console(
    json_mode: bool = False,
    quiet: bool = False,
    stderr: RichConsole | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    memory: Callable[[], Memory] | None = None,
) -> Console:
    """The listener of a command. ``stderr``: a Rich console to talk to in place of the process's own stderr."""
    if stderr is None:
        # FORCE_COLOR and its like must not put a live display into a log file.
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
        stderr = Terminal(stderr=True, force_terminal=None if is_terminal else False)
    return Console(stderr, json_mode=json_mode, quiet=quiet, clock=clock, memory=memory or memory_in_use)


class Console:
    """Listens to events and shows them. A context manager: leaving it, in whatever way, restores the terminal.

    json_mode: ``result`` prints its object on stdout; what goes to stderr is the same. quiet: warnings only.
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
        self.json_mode, self.quiet = json_mode, quiet
        self._terminal, self._clock, self._memory = terminal, clock, memory
        self._is_live = terminal.is_interactive and not quiet
        self._live: Live | None = None
        # Rich's refresh thread draws what the training thread changes. Never held while printing: Rich has a lock too.
        self._lock = threading.RLock()
        self._watch = Watch(RunStarted(0, 0, 0, "", 0, "", ""), clock())  # until a run says more
        self._running = False
        self._tasks: dict[str, Task] = {}
        self._staged: Staged | None = None
        self._said_at = self._memory_at = -math.inf

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
            return self._say(Text.assemble(("warning: ", f"bold {BAD}"), event.text))
        if self.quiet:
            return None
        with self._lock:
            lines = self._take(event, self._clock())
        if self._is_live and (self._running or self._tasks or self._staged):
            self._start()
        else:
            self._stop()
        for line in lines:
            self._say(line)
        return None

    def show(self, *renderables: RenderableType) -> None:
        """Tables, panels and sentences (strings, taken literally), on stderr; nothing when quiet."""
        if not self.quiet:
            for renderable in renderables:
                self._terminal.print(Text(renderable) if isinstance(renderable, str) else renderable, highlight=False)

    def result(self, obj: Mapping[str, object]) -> None:
        """The command's answer: one JSON object on stdout, in ``json_mode`` only."""
        if self.json_mode:
            print_json(obj)

    @property
    def in_pipeline(self) -> bool:
        """Whether what is being done is a stage of something larger, which will say itself what comes next."""
        return self._staged is not None

    def frame(self) -> RenderableType:
        """The live display as it stands now."""
        with self._lock:
            return draw(
                self._watch if self._running else None,
                self._tasks,
                now=self._clock(),
                width=self._terminal.width,
                height=self._terminal.height,
                young=YOUNG,
                staged=self._staged,
            )

    def _take(self, event: Event, now: float) -> list[Text]:
        """Note what happened; return the lines worth keeping."""
        match event:
            case Note():
                return [Text(event.text)]
            case Progress():
                return self._progressed(event, now)
            case Staged():
                self._staged = event if "now" in event.states else None
                return []
            case RunStarted():
                self._watch, self._running, self._said_at = Watch(event, now), True, -math.inf
                return [_started(event)]
            case RunEnded():
                line = _ended(event, self._watch)
                self._running = False
                self._tasks.clear()
                return [line]
            case Stepped():
                self._watch.stepped(event, now)
                if now - self._memory_at >= 1:  # here, not when drawing: the current GPU is the training thread's
                    self._watch.memory, self._memory_at = self._memory(), now
                due = now - self._said_at >= PERIOD or event.step == self._watch.started.steps
                if self._is_live or not due:
                    return []
                self._said_at = now
                return [_stepped(self._watch, now)]
            case Validated():
                phi, late = self._watch.phi, self._watch.late
                self._watch.validated(event)
                if self._watch.late:  # the loss before training, measured now: the next line compares with it
                    return []
                return [_validated(event, self._watch, phi, late)]
            case Saved():
                step = _step(event.step, self._watch)
                return [Text.assemble(f"{step} · ", (f"saved {event.path}", "dim"))]
        return []

    def _progressed(self, event: Progress, now: float) -> list[Text]:
        task = self._tasks.setdefault(event.task, Task(event, now))
        task.event = event
        took = now - task.since
        if event.done >= event.total:
            del self._tasks[event.task]
            # Within a run the same work comes back again and again; there its bar is enough.
            return [_finished(event, took)] if took > WORTH_A_LINE and not self._running else []
        if self._is_live or now - max(self._said_at, task.since) < PERIOD:
            return []
        self._said_at = now
        return [Text(f"{event.task} · {event.done:,}/{event.total:,} {event.unit}".rstrip())]

    def _say(self, line: Text) -> None:
        # One event is one line, also where a path or the name of a column holds a newline.
        if (text := redact(" ".join(line.plain.split("\n")))) != line.plain:
            line = Text(text)
        # A log's lines are as long as what they say; only a terminal wraps.
        self._terminal.print(line, soft_wrap=not self._is_live, highlight=False)

    def _start(self) -> None:
        if self._live is None:
            self._live = Live(
                get_renderable=self.frame,
                console=self._terminal,
                refresh_per_second=REFRESHES,
                transient=True,
                redirect_stdout=False,  # stdout is data
            )
            self._live.start()

    def _stop(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()


def print_json(obj: Mapping[str, object]) -> None:
    """One object as one line on stdout, flushed. ASCII, so that no locale can break it; not-a-number becomes null."""
    try:
        sys.stdout.write(json.dumps(plain(obj), allow_nan=False) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        hint = "free some space there; the files that the command wrote are complete"
        raise storage_error(error, "cannot write the result to standard output", hint) from error


def plain(value: object) -> object:
    """A value as JSON has it: keys and paths as texts, what is no finite number as null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def memory_in_use() -> Memory:
    """What this process holds. The GPU is asked only where torch is loaded and has woken it already."""
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


def _step(step: int, watch: Watch) -> str:
    """``step   20``, as wide as the last step's number, so that lines stand under each other."""
    return f"step {step:>{len(str(watch.started.steps))}}"


def _started(event: RunStarted) -> Text:
    epochs = event.steps / max(event.steps_per_epoch, 1)
    line = Text.assemble((event.method, "bold"), f" · {counted(event.steps, 'step')}, {epochs:.1f} epochs")
    line.append(f" · {parameters(event.parameters)} · {event.device} · {event.dtype}")
    return line.append(f" · going on after step {event.first_step:,}") if event.first_step else line


def _stepped(watch: Watch, now: float) -> Text:
    left, rate = watch.seconds_left(now), watch.tokens_per_second
    parts = [_step(watch.step, watch), f"epoch {watch.epoch:.1f}", f"{watch.started.loss} {watch.loss:.3f}"]
    parts += [f"{name} {figure:.3f}" for name, figure in watch.figures.items()]
    if watch.shows_phi:
        parts.append(f"φ {watch.phi:.2f}")
    if watch.student_takes_part:
        parts.append(" ".join(f"{name} {percent(share)}" for name, share in watch.shares()))
    parts.append(f"lr {watch.lr:.1e}")
    if rate is not None:
        parts.append(f"{amount(rate)} tokens/s")
    if watch.memory.process is not None:
        parts.append(f"{amount(watch.memory.process)}B")
    if left is not None:
        parts.append(f"{duration(left)} left")
    return Text(" · ".join(parts))


def _validated(event: Validated, watch: Watch, phi: float, late: tuple[float, int] | None) -> Text:
    """Return the line of a validation. late: the validation before it and its step, where that had no line of its own."""
    value = Text.assemble(f"{VALID} ", (f"{event.valid_loss:.3f}", "bold"))
    if watch.before is not None:
        change = event.valid_loss - watch.before
        since = f" from {late[0]:.3f} at step {late[1]:,}" if late else ""
        value.append(" ").append_text(Text.assemble("(", (signed(change, 3), GOOD if change < 0 else BAD), f"{since})"))
    parts = [Text(_step(event.step, watch)), value]
    if watch.started.steps_per_epoch:
        parts.insert(1, Text(f"epoch {event.step / watch.started.steps_per_epoch:.1f}"))
    names = {"valid_divergence": f"valid {watch.started.divergence}"}
    parts += [Text(f"{names.get(name, name.replace('_', ' '))} {figure:.3f}") for name, figure in event.scores.items()]
    if event.rose:
        parts.append(Text(f"φ {phi:.2f} → {event.phi:.2f}", "magenta"))
    elif watch.shows_phi:
        parts.append(Text(f"φ {event.phi:.2f}"))
    if event.best and watch.before is not None:
        parts.append(Text("selected", GOOD))  # of the weights trained so far; before training they may have been better
    return Text(" · ").join(parts)


def _ended(event: RunEnded, watch: Watch) -> Text:
    line = Text.assemble((event.reason, "bold"), f" · step {event.step:,} of {watch.started.steps:,}")
    line.append(f" · {duration(event.seconds)}")
    if watch.valid is not None:
        first, step = watch.first_valid
        last_step = "" if watch.valid_step == event.step else f" at step {watch.valid_step:,}"
        if watch.before is None:
            line.append(f" · {VALID} {first:.3f}{last_step}")
        else:
            line.append(f" · {VALID} {first:.3f}{f' at step {step:,}' if step else ''} → {watch.valid:.3f}{last_step}")
    return line


def _finished(event: Progress, took: float) -> Text:
    count = f" · {event.total:,} {event.unit}".rstrip() if event.total > 1 else ""
    seconds = f"{took:.1f} s" if took < 60 else duration(took)
    return Text(f"{event.task}{count} · {seconds}", "dim")
