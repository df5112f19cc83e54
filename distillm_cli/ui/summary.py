"""Render the results of runs as tables and sentences.

The functions are pure: plain data to Rich renderables. Tables adapt to the width of the terminal: columns that do not fit
side by side are stacked.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import PurePath
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from distillm_cli import plugins
from distillm_cli.config.fields import is_lower_better
from distillm_cli.runs.run_results import (
    SERVER,
    CheckpointScores,
    EvalResult,
    Outcome,
    PipelineResult,
    Sample,
    StageResult,
    TrainResult,
    TrainSummary,
)
from distillm_cli.training.events import Note
from distillm_cli.ui.display import BAD, GOOD, VALID_LOSS, WIDE
from distillm_cli.utils.text import format_duration, format_percent, printable, signed

NOT_AVAILABLE = "–"
_TRAINING = ("sft", "distill")
CELL_LINES, STACKED_CELL_LINES = 5, 3  # approximate height of the samples table; longer text is cropped
MAX_CELL_WIDTH = 40  # columns that the length of a sample's text is computed from
MAX_PROMPT_LENGTH = 80  # maximum length of a prompt in a command
_NUMBER = re.compile(r"(\* )?[−+-]?[\d.,]+%?( ± [\d.,]+)?")
SOURCE_WORDS = {
    "dataset": ("data set rows", "data set rows"),
    "teacher": ("teacher samples", "teacher samples"),
    "rollout": ("a fresh rollout", "fresh rollouts"),
    "replay": ("a replayed rollout", "replayed rollouts"),
    "teacher+rollout": ("pairs of a teacher sample and a rollout", "pairs of a teacher sample and a rollout"),
}


def train_summary(result: TrainResult) -> Iterator[RenderableType]:
    """Yield the summary of a training, without the next commands."""
    summary = result.summary
    yield from outcome_tables(summary)
    if summary.gap is not None:
        yield summary.gap
    for alarm in result.alarms:
        yield f"Alarm at step {alarm['step']:,}: {alarm['message']}; {alarm['cure']}."
    if summary.samples:
        yield samples_table(summary.samples)
    if summary.schedule is None:
        return
    yield sources_sentence(summary.sources, summary.phi_history)
    if summary.row_weight:
        weight = f"{summary.row_weight:g}"
        yield f"Each step also used the same number of data set rows as student outputs, with weight {weight}."


def outcome_tables(summary: TrainSummary, title: str = "Outcome") -> Iterator[RenderableType]:
    """Yield the outcome table of a training; nothing if nothing was measured."""
    if any(outcome.valid_loss is not None or outcome.scores for outcome in summary.outcomes):
        yield outcome_table(summary.outcomes, title=title, caption=summary.measured_on)


def train_next_steps(result: TrainResult) -> RenderableType:
    """Return the output files of a training and the next commands."""
    summary = result.summary
    files = OUTPUT_FILES | ({"student after sft": "sft/"} if summary.has_sft_stage else {})
    files |= {"teacher": "teacher/"} if summary.has_teacher else {}
    if summary.stage is not None:
        place, what = summary.stage
        files |= {what: f"{place}/"}
    files = {what: name for what, name in files.items() if (result.output / name).exists()}  # --keep 0: no checkpoints
    return next_steps(
        result.output,
        suites=summary.suites,
        prompt=summary.prompt,
        files=files,
        scored=summary.has_answers,
        generates=summary.generates,
    )


def eval_summary(result: EvalResult) -> Iterator[RenderableType | Note]:
    """Yield the tables of scores and the location of each checkpoint's results."""
    several = len(result.checkpoints) > 1
    metrics = list(dict.fromkeys(name for scores in result.checkpoints for name in scores.metrics))
    titles = [_label(name) + (" ↓" if is_lower_better(name) else "") for name in metrics]
    entropies = [s["entropy"] for scores in result.checkpoints for s in scores.suites.values() if "entropy" in s]
    generated = bool(entropies)
    has_entropy = any(entropy is not None for entropy in entropies)  # a server gives none
    lead = ["checkpoint"] if several else []
    rows: list[list[object]] = []
    tasks: list[list[object]] = []
    for checkpoint in result.checkpoints:
        name = [checkpoint.checkpoint] if several else []
        rows += [[*name, *row] for row in _suite_rows(checkpoint, metrics, with_entropy=has_entropy)]
        tasks += [[*name, *row] for row in _task_rows(checkpoint, metrics)]
    if tasks:
        yield table("By kind of task", [*lead, "task", *titles], tasks)
    if rows:
        yield table("Scores", [*lead, "suite", "rows", *titles, *(["entropy"] if has_entropy else [])], rows)
    backdoors: list[list[object]] = []
    attacks: list[list[object]] = []
    for checkpoint in result.checkpoints:
        name = [checkpoint.checkpoint] if several else []
        backdoors += [[*name, *row] for row in _backdoor_rows(checkpoint)]
        attacks += [[*name, *row] for row in _attack_rows(checkpoint)]
    if backdoors:
        yield table("With the trigger", [*lead, "suite", "rows", "attack success, % ↓"], backdoors)
    if attacks:
        figures = [
            f"{name}{under}" for name in ("tokens right %", "rows right %", "CE") for under in ("", ", attacked")
        ]
        yield table("Under attack", [*lead, "suite", "attack", "rows", *figures], attacks)
    for checkpoint in result.checkpoints:
        how = f"{'decoded' if generated else 'computed'} in {checkpoint.dtype}"
        how = "decoded by a server" if checkpoint.dtype == SERVER else how
        yield Note(f"{how}; results and predictions: {checkpoint.output}")


def _suite_rows(checkpoint: CheckpointScores, metrics: Sequence[str], *, with_entropy: bool) -> Iterator[list[object]]:
    for name, suite in checkpoint.suites.items():
        if "lm_eval" in suite:
            continue  # has a table of its own
        figures = [_score(suite.get(metric), _passes(checkpoint, suite)) for metric in metrics]
        entropy = [None if suite.get("entropy") is None else f"{suite['entropy']:.3f}"] if with_entropy else []
        yield [name, f"{suite['rows']:,}", *figures, *entropy]


def _task_rows(checkpoint: CheckpointScores, metrics: Sequence[str]) -> Iterator[list[object]]:
    for suite in checkpoint.suites.values():
        for task, scores in suite.get("tasks", {}).items():
            yield [task, *(_score(scores.get(metric), _passes(checkpoint, suite)) for metric in metrics)]


def _backdoor_rows(checkpoint: CheckpointScores) -> Iterator[list[object]]:
    """Yield the attack success rate of a trigger, by suite."""
    for name, suite in checkpoint.suites.items():
        if (attack := suite.get("attack_success")) is not None:
            yield [name, f"{attack['rows']:,}", _score(attack, len(attack["seeds"]))]


def _attack_rows(checkpoint: CheckpointScores) -> Iterator[list[object]]:
    """Yield the figures of a checkpoint's responses, each plain and under attack, by suite."""
    for name, suite in checkpoint.suites.items():
        if (found := suite.get("attack")) is not None:
            steps = f", {found['steps']} steps" if "steps" in found else ""
            row: list[object] = [name, f"{found['kind']}, radius {found['radius']:g}{steps}", f"{found['rows']:,}"]
            for figure, digits in (("tokens_right", 2), ("rows_right", 2), ("loss", 3)):
                row += [f"{found[inputs][figure]:.{digits}f}" for inputs in ("plain", "attacked")]
            yield row


def _passes(checkpoint: CheckpointScores, suite: Mapping[str, Any]) -> int:
    """Return the number of sampled passes over a suite."""
    return max(len(suite[metric]["seeds"]) for metric in checkpoint.metrics if metric in suite)


def _score(score: Mapping[str, Any] | None, passes: int) -> str | None:
    """Format a mean, with its standard deviation if there are several passes."""
    if score is None:
        return None
    if score["mean"] is None:
        return "undefined"
    return f"{score['mean']:.2f} ± {score['sd']:.2f}" if passes > 1 else f"{score['mean']:.2f}"


def pipeline_summary(result: PipelineResult) -> Iterator[RenderableType]:
    """Yield the tables of a pipeline: its stages, and the figures of their models and evaluations, also of earlier runs."""
    yield stage_table(result)
    trained = {
        name: stage.result["report"]["student_after"]
        for name, stage in result.stages.items()
        if stage.verb in _TRAINING and "student_after" in stage.result.get("report", {})
    }
    names = list(dict.fromkeys(figure for figures in trained.values() for figure in figures))
    rows = [[stage, *(_rounded(name, figures.get(name)) for name in names)] for stage, figures in trained.items()]
    if rows and names:
        yield table("Trained models", ["", *map(_label, names)], rows)
    for stage in result.stages.values():
        if stage.verb == "eval":
            yield from (item for item in eval_summary(_eval_result(stage)) if not isinstance(item, Note))


def pipeline_next_steps(result: PipelineResult) -> RenderableType | None:
    """Return the next commands after a pipeline, for the model that it trained last; None if it trained none."""
    trained = [stage.output for stage in result.stages.values() if stage.verb in _TRAINING]
    if not trained:
        return None
    is_scored = any(stage.verb == "eval" for stage in result.stages.values())
    directory = shlex.quote(trained[-1])
    evaluate = [] if is_scored else [f"distillm eval {directory}"]
    return commands_to_type([*evaluate, f"distillm generate --model {directory} --prompt 'YOUR PROMPT'"])


def _eval_result(stage: StageResult) -> EvalResult:
    """Return the result of an evaluation from its object in ``--json``."""
    found = stage.result
    output = str(found["output"])
    checkpoints = found.get("checkpoints", {output: found})
    return EvalResult(
        checkpoints=tuple(
            CheckpointScores(name, PurePath(scores["output"]), scores["suites"], _metrics(scores["suites"]), dtype="")
            for name, scores in checkpoints.items()
        ),
        output=output,
        wall_s=found["wall_s"],
    )


def _metrics(suites: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the names of the metrics in the objects of suites."""
    found = [name for suite in suites.values() for name, value in suite.items() if "seeds" in _as_mapping(value)]
    found = [name for name in found if name != "attack_success"]  # not a metric: it is of other prompts
    return tuple(dict.fromkeys(found))


def _as_mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def stage_table(result: PipelineResult) -> RenderableType:
    """Return a table with each stage of a pipeline and its status."""
    rows = []
    for name, stage in result.stages.items():
        done = "already done" if stage.status == "skipped" else f"done in {format_duration(stage.result['wall_s'])}"
        rows.append([name, stage.verb, done, stage.output])
    return table("Stages", ["", "verb", "", "output"], rows)


def _reference_text(references: Sequence[str], length: int) -> str:
    more = f" (or {len(references) - 1:,} more)" if len(references) > 1 else ""
    return crop(references[0], length) + more


class _WideOrNarrow:
    """Render ``wide`` if it fits, else ``narrow``."""

    def __init__(self, wide: RenderableType, narrow: RenderableType):
        self.wide = wide
        self.narrow = narrow

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbounded = options.update(width=10_000)
        fits = Measurement.get(console, unbounded, self.wide).maximum <= options.max_width
        yield self.wide if fits else self.narrow


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, turns: bool = False
) -> RenderableType:
    """Return a table of text and figures. If the columns do not fit, each row becomes a column (``turns``) or a block.

    Floats have three decimals, None is –. Cells may be Rich texts; strings are not parsed as markup. A column that has only
    figures (such as ``25.39 ± 0.31``) is aligned to the right.
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
    if not turns:
        return _WideOrNarrow(wide, narrow)
    turned = _frame(title, header=False)
    turned.add_column(style="dim", no_wrap=True)
    for _ in rows:
        turned.add_column(justify="right")
    for i, name in enumerate(columns):
        turned.add_row(Text(name), *(_cell(row[i]) for row in rows))
    return _WideOrNarrow(wide, _WideOrNarrow(turned, narrow))


def facts(title: str, rows: Sequence[tuple[str, object]]) -> RenderableType:
    """Return a table of names and values, one per line. Values are formatted like the cells of ``table`` and wrapped."""
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
    """Return a table with a row per model and a column for the validation loss and each score.

    If that does not fit, models become columns. The first row is the student before training. Each figure of the others is
    followed by its difference from the first, green if better and yellow if worse. caption: text below the figures.
    """
    figures = [{"valid_loss": row.valid_loss, **row.scores} for row in rows]
    names = list(dict.fromkeys(name for figure in figures for name in figure))
    names = [name for name in names if any(figure.get(name) is not None for figure in figures)]
    cells = []
    for i, figure in enumerate(figures):
        start = figures[0] if i else {}
        cells.append([_figure(name, figure.get(name), start.get(name)) for name in names])

    wide, narrow = _frame(title), _frame(title)
    wide.add_column("")
    for name in names:
        wide.add_column(Text(_label(name)), justify="right", no_wrap=True)
    for row, line in zip(rows, cells, strict=True):
        wide.add_row(Text(row.name), *line)
    for grid in (wide, narrow) if caption else ():
        grid.caption, grid.caption_justify = Text(caption, "dim"), "left"
    narrow.add_column("")
    for row in rows:
        narrow.add_column(Text(row.name), justify="right")
    for k, name in enumerate(names):
        narrow.add_row(Text(_label(name)), *(line[k] for line in cells))
    return _WideOrNarrow(wide, narrow)


def samples_table(samples: Sequence[Sample], *, title: str = "Samples") -> RenderableType:
    """Return a table with prompt, reference and every model's response in columns; stacked below 80 columns.

    Long texts are cropped at word ends; a response equal to a reference is marked ✓.
    """
    return _Samples(samples, title)


class _Samples:
    def __init__(self, samples: Sequence[Sample], title: str):
        self.samples = samples
        self.title = title
        self.models = list(dict.fromkeys(name for sample in samples for name in sample.answers))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = ["prompt", "reference", *self.models]
        width = (options.max_width - 3 * len(columns) - 1) // len(columns)
        grid = _frame(self.title, header=options.max_width >= WIDE and width >= 12)
        if grid.show_header:
            for name in columns:
                grid.add_column(Text(name), overflow="fold")
            for sample in self.samples:
                grid.add_row(
                    *(text for _, text in self._texts(sample, min(width, MAX_CELL_WIDTH) * CELL_LINES)),
                    end_section=True,
                )
        else:
            label = max(map(len, columns))
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(overflow="fold")
            for sample in self.samples:
                texts = self._texts(sample, max(options.max_width - label - 7, 10) * STACKED_CELL_LINES)
                for i, (name, text) in enumerate(texts):
                    grid.add_row(Text(name), text, end_section=i == len(texts) - 1)
        yield grid

    def _texts(self, sample: Sample, length: int) -> list[tuple[str, Text]]:
        cells = [
            ("prompt", Text(crop(sample.prompt, length))),
            ("reference", Text(_reference_text(sample.references, length))),
        ]
        for name in self.models:
            answer = sample.answers.get(name)
            if answer is None:
                cells.append((name, Text(NOT_AVAILABLE, "dim")))
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
    generates: bool = True,
) -> RenderableType:
    """Return the location of the files and the next commands.

    suites, prompt: values for the commands; a placeholder replaces a prompt that is blank or too long. files: description
    → path within the directory. commands: additional lines. scored: whether there are rows to evaluate. generates: whether
    the model can respond.
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
    if not prompt or len(prompt) > MAX_PROMPT_LENGTH or not prompt.isprintable() or prompt.isspace():
        prompt = "YOUR PROMPT"
    evaluate = [f"distillm eval {directory}{suite}"] if scored else []
    generate = [f"distillm generate --model {directory} --prompt {shlex.quote(prompt)}"] if generates else []
    lines = [*evaluate, *generate, *commands]
    # Borders above and below only: borders at the sides would be copied together with a path.
    written = Panel(grid, title="[bold]Written[/bold]", title_align="left", box=box.HORIZONTALS, border_style="dim")
    return Group(written, commands_to_type(lines)) if lines else written


def commands_to_type(lines: Sequence[str]) -> RenderableType:
    """Return commands under the heading "What next". They are not wrapped, so that they can be copied."""
    typed = [Text(f"  {line}", style="cyan", no_wrap=True, overflow="ignore") for line in lines]
    return Group(Text("What next", style="bold"), *typed)


OUTPUT_FILES = {
    "model": ".",
    "recipe": "recipe.yaml",
    "figures": "metrics.jsonl",
    "result": "result.json",
    "checkpoints": "checkpoints/",
    "report": "report.html",
}


def sources_sentence(counts: Mapping[str, int], phi_history: Sequence[float] | None) -> str:
    """Describe the number of steps of each source and the course of φ.

    counts: steps by source (``dataset``, ``rollout``, ``replay``, …). phi_history: φ at the start and after each change;
    None for a schedule without φ.
    """
    counts = {name: n for name, n in counts.items() if n}
    total = sum(counts.values())
    if total == 0:
        return "No steps were run."
    if phi_history is None:
        return _shares(counts, total)
    start, end = (phi_history[0], phi_history[-1]) if phi_history else (0.0, 0.0)
    rises = sum(b > a for a, b in pairwise(phi_history))
    only = next(iter(counts)) if len(counts) == 1 else None
    if any(b < a for a, b in pairwise(phi_history)):
        between = f"between {_phi(min(phi_history))} and {_phi(max(phi_history))}"
        return f"{_shares(counts, total)} φ went from {_phi(start)} to {_phi(end)}, {between}."
    if rises == 0:
        head = f"φ never rose: it stayed {_phi(start)}"
        return f"{head}, every step used data set rows." if only == "dataset" else f"{head}. {_shares(counts, total)}"
    times = {1: "once", 2: "twice"}.get(rises, f"{rises} times")
    sentence = f"{_shares(counts, total)} φ rose {times}, from {_phi(start)} to {_phi(end)}."
    return f"{sentence} No student outputs were drawn." if only == "dataset" else sentence


def _shares(counts: Mapping[str, int], total: int) -> str:
    if len(counts) == 1:
        words = _words(next(iter(counts)), 2)
        return f"The one step used {words}." if total == 1 else f"Every step used {words} ({total:,} steps)."
    order = [*SOURCE_WORDS, *sorted(set(counts) - set(SOURCE_WORDS))]
    parts = [
        f"{counts[name]:,} ({format_percent(counts[name] / total)}) {'used ' if i == 0 else ''}{_words(name, counts[name])}"
        for i, name in enumerate(name for name in order if name in counts)
    ]
    return f"Of {total:,} steps {', '.join(parts[:-1])} and {parts[-1]}."


def _words(source: str, count: int) -> str:
    one, many = SOURCE_WORDS.get(source, (source, source))
    return one if count == 1 else many


def _phi(value: float) -> str:
    return f"{value:.2f}" if value else "0"


def crop(text: str, length: int) -> str:
    """Return one line of at most ``length`` characters, cut at the end of a word and marked with ….

    Control characters, which a model may sample, become �, since they must not reach the terminal.
    """
    text = " ".join(text.split())
    text = "".join(c if c.isprintable() else "�" for c in text)
    if len(text) <= length:
        return text
    head = text[: max(length - 1, 0)]
    if text[len(head)] != " " and " " in head:
        whole = head.rsplit(" ", 1)[0]
        head = whole if len(whole) >= length // 2 else head  # one long word: cut within it
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
    return isinstance(value, int | float | None) or _NUMBER.fullmatch(str(value)) is not None


def _cell(value: object) -> Text:
    if isinstance(value, Text):
        return value
    if value is None:
        return Text(NOT_AVAILABLE, "dim")
    if isinstance(value, float):
        return Text(f"{value:.3f}")
    if isinstance(value, int) and not isinstance(value, bool):
        return Text(f"{value:,}")
    return Text(printable(str(value)))  # before printing, so that columns have the right width


def _label(name: str) -> str:
    """Return the heading of a figure."""
    if name == "valid_loss":
        return VALID_LOSS
    metric = plugins.metrics.get(name)
    return name.replace("_", " ") if metric is None else metric.label


def _digits(name: str) -> int:
    return 3 if name in ("valid_loss", "drift") else 2


def _rounded(name: str, value: float | None) -> str | None:
    return None if value is None else f"{value:.{_digits(name)}f}"


def _figure(name: str, value: float | None, start: float | None) -> Text:
    if value is None:
        return Text(NOT_AVAILABLE, "dim")
    digits = _digits(name)
    text = Text(f"{value:.{digits}f}")
    if start is None or not (math.isfinite(value) and math.isfinite(start)):
        return text
    change = round(value - start, digits)
    style = "dim" if change == 0 else GOOD if (change < 0) == is_lower_better(name) else BAD
    return text.append(" ").append_text(Text(signed(change, digits), style))
