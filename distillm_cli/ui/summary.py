"""The end of a run in words and tables: what came out, what it sounds like, where it is, what to type next.

Pure functions from plain data to Rich renderables. Each looks at the width it is given when it is printed: what does
not fit side by side is stacked.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import PurePath

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from distillm_cli import plugins
from distillm_cli.config.fields import is_lower_better
from distillm_cli.ui.display import BAD, GOOD, VALID, WIDE, percent
from distillm_cli.utils.text import printable, signed

NONE = "–"
LINES, STACKED_LINES = 5, 3  # of a cell of the samples table, about; longer text is cropped
LONGEST_PROMPT = 80
FIGURE = re.compile(r"[−+-]?[\d.,]+%?( ± [\d.,]+)?")
SOURCE_WORDS = {
    "dataset": ("data set rows", "data set rows"),
    "teacher": ("teacher samples", "teacher samples"),
    "rollout": ("a fresh rollout", "fresh rollouts"),
    "replay": ("a replayed rollout", "replayed rollouts"),
    "teacher+rollout": ("pairs of a teacher sample and a rollout", "pairs of a teacher sample and a rollout"),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """A model's figures on held-out rows. valid_loss: nats per token; None where it was not measured."""

    name: str
    valid_loss: float | None = None
    scores: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt, its right answers (the first is shown), and what each model answered, by the model's name."""

    prompt: str
    references: Sequence[str]
    answers: Mapping[str, str] = field(default_factory=dict)


def _shown(references: Sequence[str], length: int) -> str:
    more = f" (or {len(references) - 1:,} more)" if len(references) > 1 else ""
    return crop(references[0], length) + more


class _Fitting:
    """``wide`` where it fits, else ``narrow``."""

    def __init__(self, wide: RenderableType, narrow: RenderableType):
        self.wide, self.narrow = wide, narrow

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbounded = options.update(width=10_000)
        fits = Measurement.get(console, unbounded, self.wide).maximum <= options.max_width
        yield self.wide if fits else self.narrow


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> RenderableType:
    """A table of text and figures; each row a block of its own where the columns do not fit.

    Floats get three decimals, None is –. Cells may be Rich texts; strings are taken literally, not as markup. A column
    of figures only (``25.39 ± 0.31`` is one) is aligned to the right.
    """
    numeric = [all(_is_figure(row[i]) for row in rows) for i in range(len(columns))]
    wide = _frame(title)
    for name, is_number in zip(columns, numeric, strict=True):
        wide.add_column(Text(name), justify="right" if is_number else "left")
    narrow = _frame(title, header=False)
    narrow.add_column(style="dim", no_wrap=True)
    narrow.add_column(overflow="fold")
    for row in rows:
        cells = [_cell(value) for value in row]
        wide.add_row(*cells)
        for name, cell in zip(columns, cells, strict=True):
            narrow.add_row(Text(name), cell, end_section=name == columns[-1])
    return _Fitting(wide, narrow)


def facts(title: str, rows: Sequence[tuple[str, object]]) -> RenderableType:
    """What is known by name, a line each; long values go on below themselves. Values as the cells of ``table``."""
    grid = _frame(title, header=False)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(Text(name), _cell(value))
    return grid


def outcome_table(
    rows: Sequence[Outcome],
    *,
    title: str = "Outcome",
    caption: str | None = None,
) -> RenderableType:
    """A row per model, the validation loss and every score a column; models become columns where that does not fit.

    The first row is the starting point (the student before): each figure of the others is followed by its difference
    to it, green where better and yellow where worse.
    caption: what the figures are of, below them.
    """
    figures = [{"valid_loss": row.valid_loss, **row.scores} for row in rows]
    names = list(dict.fromkeys(name for figure in figures for name in figure))
    names = [name for name in names if any(figure.get(name) is not None for figure in figures)]
    cells = []
    for i, figure in enumerate(figures):
        start = figures[0] if i else {}
        cells.append([_figure(figure.get(name), start.get(name), is_lower_better(name), name) for name in names])

    wide, narrow = _frame(title), _frame(title)
    wide.add_column("")
    for name in names:
        wide.add_column(_label(name), justify="right", no_wrap=True)
    for row, line in zip(rows, cells, strict=True):
        wide.add_row(Text(row.name), *line)
    for grid in (wide, narrow) if caption else ():
        grid.caption, grid.caption_justify = Text(caption, "dim"), "left"
    narrow.add_column("")
    for row in rows:
        narrow.add_column(Text(row.name), justify="right")
    for k, name in enumerate(names):
        narrow.add_row(_label(name), *(line[k] for line in cells))
    return _Fitting(wide, narrow)


def samples_table(samples: Sequence[Sample], *, title: str = "Samples") -> RenderableType:
    """Prompt, reference and every model's answer side by side, one row per sample; stacked under 80 columns.

    Long texts are cropped at word ends; an answer equal to any reference is marked ✓.
    """
    return _Samples(samples, title)


class _Samples:
    def __init__(self, samples: Sequence[Sample], title: str):
        self.samples, self.title = samples, title
        self.models = list(dict.fromkeys(name for sample in samples for name in sample.answers))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = ["prompt", "reference", *self.models]
        width = (options.max_width - 3 * len(columns) - 1) // len(columns)
        grid = _frame(self.title, header=options.max_width >= WIDE and width >= 12)
        if grid.show_header:
            for name in columns:
                grid.add_column(Text(name), overflow="fold")
            for sample in self.samples:
                grid.add_row(*(text for _, text in self._texts(sample, width * LINES)), end_section=True)
        else:
            label = max(map(len, columns))
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(overflow="fold")
            for sample in self.samples:
                texts = self._texts(sample, max(options.max_width - label - 7, 10) * STACKED_LINES)
                for i, (name, text) in enumerate(texts):
                    grid.add_row(Text(name), text, end_section=i == len(texts) - 1)
        yield grid

    def _texts(self, sample: Sample, length: int) -> list[tuple[str, Text]]:
        cells = [("prompt", Text(crop(sample.prompt, length))), ("reference", Text(_shown(sample.references, length)))]
        for name in self.models:
            answer = sample.answers.get(name)
            if answer is None:
                cells.append((name, Text(NONE, "dim")))
            elif answer.strip() in {reference.strip() for reference in sample.references}:
                cells.append((name, Text(f"✓ {crop(answer, length - 2)}", GOOD)))
            else:
                cells.append((name, Text(crop(answer, length)) if answer.strip() else Text("(nothing)", "dim")))
        return cells


def next_steps(
    output_dir: str | PurePath,
    *,
    suites: Sequence[str] = (),
    prompt: str | None = None,
    files: Mapping[str, str] | None = None,
    commands: Sequence[str] = (),
    scored: bool = True,
) -> RenderableType:
    """Where the files are and what to type next, whole, so that it can be copied.

    ``suites`` and ``prompt`` fill in the commands (a prompt that is blank or too long for a line is left to the reader);
    ``files``: what it is → its place within the directory; ``commands``: further lines; ``scored``: whether there are rows
    with responses to evaluate on.
    """
    files = files if files is not None else OUTPUT_FILES
    place = PurePath(output_dir)
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for what, name in files.items():
        grid.add_row(Text(what), Text(str(place / name) + ("/" if name.endswith("/") else "")))
    directory = shlex.quote(str(place))
    suite = f" --suite {' '.join(map(shlex.quote, suites))}" if suites else ""
    if not prompt or len(prompt) > LONGEST_PROMPT or not prompt.isprintable() or prompt.isspace():
        prompt = "YOUR PROMPT"
    evaluate = [f"distillm eval {directory}{suite}"] if scored else []
    lines = [*evaluate, f"distillm generate --model {directory} --prompt {shlex.quote(prompt)}", *commands]
    typed = Group(*(Text(line, style="cyan", overflow="fold") for line in lines))
    body = Group(grid, "", Text("What next", style="bold"), Padding(typed, (0, 0, 0, 2)))
    # Lines above and below only: a border at the sides would be copied along with a command.
    return Panel(body, title="[bold]Written[/bold]", title_align="left", box=box.HORIZONTALS, border_style="dim")


OUTPUT_FILES = {
    "model": ".",
    "recipe": "recipe.yaml",
    "figures": "metrics.jsonl",
    "checkpoints": "checkpoints/",
}


def sources_sentence(counts: Mapping[str, int], phi_history: Sequence[float], schedule: str) -> str:
    """How many steps each source had, how φ moved, and, for an adaptive schedule that never fired, that it did not.

    counts: steps by source (``dataset``, ``rollout``, ``replay``, …). phi_history: φ at the start and after each
    validation. schedule: its kind (METHODS B).
    """
    counts = {name: n for name, n in counts.items() if n}
    total = sum(counts.values())
    start, end = (phi_history[0], phi_history[-1]) if phi_history else (0.0, 0.0)
    rises = sum(b > a for a, b in pairwise(phi_history))
    if total == 0:
        return "No step was taken."
    only = next(iter(counts)) if len(counts) == 1 else None
    if schedule == "adaptive" and rises == 0:
        told = f"The schedule never fired: φ stayed {_phi(start)}"
        return f"{told}, every step used data set rows." if only == "dataset" else f"{told}. {_shares(counts, total)}"
    sentence = _shares(counts, total)
    if schedule == "adaptive":
        times = {1: "once", 2: "twice"}.get(rises, f"{rises} times")
        sentence += f" φ rose {times}, from {_phi(start)} to {_phi(end)}."
        if only == "dataset":
            sentence += " No draw fell on the student's own output."
    elif end != start:
        sentence += f" φ went from {_phi(start)} to {_phi(end)}."
    return sentence


def _shares(counts: Mapping[str, int], total: int) -> str:
    if len(counts) == 1:
        words = _words(next(iter(counts)), 2)
        return f"The one step used {words}." if total == 1 else f"Every step used {words} ({total:,} steps)."
    order = [*SOURCE_WORDS, *sorted(set(counts) - set(SOURCE_WORDS))]
    parts = [
        f"{counts[name]:,} ({percent(counts[name] / total)}) {'used ' if i == 0 else ''}{_words(name, counts[name])}"
        for i, name in enumerate(name for name in order if name in counts)
    ]
    return f"Of {total:,} steps {', '.join(parts[:-1])} and {parts[-1]}."


def _words(source: str, count: int) -> str:
    one, many = SOURCE_WORDS.get(source, (source, source))
    return one if count == 1 else many


def _phi(value: float) -> str:
    return f"{value:.2f}" if value else "0"


def crop(text: str, length: int) -> str:
    """One line of at most ``length`` characters, cut at a word's end, with … where something is missing.

    Control characters, which a model may well sample, become �: they must not reach the terminal.
    """
    text = " ".join(text.split())
    text = "".join(c if c.isprintable() else "�" for c in text)
    if len(text) <= length:
        return text
    head = text[: max(length - 1, 0)]
    if text[len(head)] != " " and " " in head:
        whole = head.rsplit(" ", 1)[0]
        head = whole if len(whole) >= length // 2 else head  # one endless word: cut within it
    return head.rstrip() + "…"


def _frame(title: str, *, header: bool = True) -> Table:
    return Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.ROUNDED,
        border_style="dim",
        show_header=header,
        header_style="dim",
    )


def _is_figure(value: object) -> bool:
    return isinstance(value, int | float | None) or FIGURE.fullmatch(str(value)) is not None


def _cell(value: object) -> Text:
    if isinstance(value, Text):
        return value
    if value is None:
        return Text(NONE, "dim")
    if isinstance(value, float):
        return Text(f"{value:.3f}")
    if isinstance(value, int) and not isinstance(value, bool):
        return Text(f"{value:,}")
    return Text(printable(str(value)))  # here already, so that columns are as wide as what is printed


def _label(name: str) -> Text:
    metric = plugins.metrics.get(name)
    label = name.replace("_", " ") if metric is None else metric.label
    return Text(VALID if name == "valid_loss" else label)


def _figure(value: float | None, start: float | None, lower_is_better: bool, name: str) -> Text:
    if value is None:
        return Text(NONE, "dim")
    digits = 3 if name == "valid_loss" else 2
    text = Text(f"{value:.{digits}f}")
    if start is None or not (math.isfinite(value) and math.isfinite(start)):
        return text
    change = round(value - start, digits)
    style = "dim" if change == 0 else GOOD if (change < 0) == lower_is_better else BAD
    return text.append(" ").append_text(Text(signed(change, digits), style))
