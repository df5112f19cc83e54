"""Write reports as HTML pages: one of a run, one of several runs. A page is one file without scripts or requests.

Jinja escapes everything that comes from recipes, rows and models; only charts are inserted as they are drawn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import distillm_cli
from distillm_cli.runs import charts, output_dir
from distillm_cli.runs.charts import Chart, Point
from distillm_cli.runs.recorded_run import RecordedRun, finite_number, held_out_figures, read_metrics
from distillm_cli.runs.run_groups import differing_settings, lower_is_better, metric_title
from distillm_cli.runs.run_results import GroupScore, ReportResult, RunGroup, plain_value
from distillm_cli.utils.text import (
    counted,
    format_bytes,
    format_count,
    format_duration,
    format_percent,
    printable,
    redact,
)

if TYPE_CHECKING:
    from distillm_cli.runs.token_divergence import RowDistances, TokenDistance

_MAX_LINES = 200_000  # of metrics.jsonl that are read
_MAX_SAMPLES = 6
_MAX_TEXT = 1500  # characters of a prompt or a response
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n){2,}")
_MAX_ROWS = 500  # groups in the table of a page
_MAX_CURVES = 12  # runs whose validation losses are drawn
_MAX_SETTINGS, _MAX_METRICS = 4, 4  # settings and metrics that are plotted
_MAX_SERIES = 6  # values of a setting that get a color of their own
_MODELS = (
    "student_before",
    "student_after_sft",
    "student_after_ptp",
    "student_after",
    "teacher",
    "teacher_before",
    "teacher_after",
)
_SETTING = re.compile(r"((?:  )*)(\w+):(?: +(\S.*?))??(?:  # (.*))?")
_Cell = dict[str, Any]


def _render(template: str, title: str, **content: Any) -> str:
    environment = Environment(
        loader=PackageLoader("distillm_cli", "assets/report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = environment.get_template(template)
    return page.render(title=title, version=distillm_cli.__version__, written=written, **content)


def _drawn(found: Iterable[Chart]) -> tuple[list[dict[str, Any]], str]:
    """Return the charts with their SVG, and the reason if they cannot be drawn."""
    try:
        return [{"title": c.title, "caption": c.caption, "svg": Markup(charts.draw_svg(c))} for c in found], ""
    except ImportError:
        return [], f"{charts.MISSING_EXTRA[0].upper()}{charts.MISSING_EXTRA[1:]}."


def _column(title: str, is_number: bool = False) -> _Cell:
    return {"title": title, "is_number": is_number}


def _cell(text: object, mark: str = "", *, is_number: bool = False) -> _Cell:
    return {"text": str(text), "mark": mark, "is_number": is_number}


def _figure_text(value: float | None) -> str:
    return "–" if value is None else GroupScore(value, None, 1).text


# ---------------------------------------------------------------------------------------------------------- one run


def run_page(run: RecordedRun, distances: Sequence[RowDistances], distance_note: str) -> str:
    """Return the page of a run. distances: of ``row_distances``; if empty, distance_note says why."""
    lines = []
    for line in read_metrics(run.path / output_dir.METRICS):
        lines.append(line)
        if len(lines) >= _MAX_LINES:
            break
    drawn, note = _drawn(charts.run_charts(lines, run.number("train_s")))
    health, _ = _drawn(charts.health_charts(lines))
    recipe = redact((run.path / output_dir.RECIPE).read_text(encoding="utf-8"))
    return _render(
        "run.html.jinja",
        run.path.resolve().name,
        summary=_summary(run),
        command=run.command,
        tiles=_tiles(run),
        problems=_problems(run, lines),
        models=_model_table(run),
        suites=_suite_table(run),
        charts=drawn,
        chart_note=note,
        health=health,
        distances=[_shown_row(row) for row in distances],
        distance_note=distance_note,
        measured_rows=_measured_rows() if distances else 0,
        samples=_samples(run),
        costs=_costs(run),
        chosen=_chosen(recipe),
        recipe=recipe,
        machine=_machine(run),
    )


def _measured_rows() -> int:
    from distillm_cli.runs.token_divergence import MEASURED_ROWS  # imports torch

    return MEASURED_ROWS


def _summary(run: RecordedRun) -> str:
    student, teacher = run.setting("student.path"), run.setting("teacher.path")
    who = f"{student}, fine-tuned" if run.setting("method") == "sft" else f"{teacher} distilled into {student}"
    sources = run.setting("data.sources") or [run.setting("data.source")]
    data = " + ".join(str(source["source"] if isinstance(source, dict) else source) for source in sources)
    method = f"method {run.setting('method')}, data {data}, seed {run.setting('train.seed')}"
    return "; ".join([who, method, *([run.date] if run.date else []), *run.notes]) + "."


def _tiles(run: RecordedRun) -> list[dict[str, str]]:
    """Return the headline figures: quality after and before training, seconds, tokens."""
    figures = held_out_figures(run.result)
    after, before, teacher = (figures.get(name, {}) for name in ("student_after", "student_before", "teacher"))
    names = [*[name for name in after if name != "valid_loss"][:2], "valid_loss"]
    tiles = []
    for name in names:
        value, start, goal = after.get(name), before.get(name), teacher.get(name)
        if value is None:
            continue
        parts = [f"from {_figure_text(start)}"] if start is not None else []
        parts += [f"teacher {_figure_text(goal)}"] if goal is not None else []
        is_better = start is not None and (value < start) == lower_is_better(name) and value != start
        mark = "good" if is_better else ""
        tiles.append({"name": metric_title(name), "value": _figure_text(value), "note": ", ".join(parts), "mark": mark})
    if (seconds := run.number("train_s")) is not None:
        rate = run.number("tokens_per_s")
        note = "" if rate is None else f"{rate:,.0f} tokens/s"
        tiles.append({"name": "time of training", "value": format_duration(seconds), "note": note, "mark": ""})
    if (steps := run.number("steps")) is not None:
        sampled = (run.number("rollout_steps") or 0) + (run.number("replay_steps") or 0)
        note = f"{format_percent(sampled / steps)} on student outputs" if steps else ""
        tiles.append({"name": "steps", "value": f"{steps:,.0f}", "note": note, "mark": ""})
    return tiles


def _problems(run: RecordedRun, lines: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the findings of the checks before the first step, and the alarms."""
    found = []
    findings = run.result.get("findings")
    for finding in findings if isinstance(findings, list) else []:
        if isinstance(finding, dict):
            text = " – ".join(str(finding[key]) for key in ("what", "where", "cure") if finding.get(key))
            found.append({"name": f"{finding.get('severity', 'note')} {finding.get('code', '')}", "text": text})
    for line in lines:
        if "alarm" in line:
            text = " – ".join(str(line[key]) for key in ("message", "cure") if line.get(key))
            found.append({"name": f"alarm {line['alarm']}, step {line['step']:,}", "text": text})
    return found


def _model_table(run: RecordedRun) -> dict[str, Any]:
    figures = held_out_figures(run.result)
    names = [*(name for name in _MODELS if name in figures), *(name for name in figures if name not in _MODELS)]
    metrics = list(dict.fromkeys(metric for name in names for metric in figures[name]))
    rows = [(name.replace("_", " "), figures[name]) for name in names]
    baselines = run.result.get("baselines")
    for baseline in baselines if isinstance(baselines, list) else []:
        if isinstance(baseline, dict) and isinstance(baseline.get("figures"), dict):
            known = {metric: finite_number(value) for metric, value in baseline["figures"].items()}
            rows.append((f"{baseline.get('name')}, same time", known))
    cells = [
        [_cell(name), *(_cell(_figure_text(found.get(metric)), is_number=True) for metric in metrics)]
        for name, found in rows
    ]
    caption = run.result.get("measured_on")
    lower = [metric_title(metric) for metric in metrics if lower_is_better(metric)]
    parts = [f"{caption}."] if isinstance(caption, str) else []
    parts += [f"Lower is better: {', '.join(lower)}."] if lower else []
    columns = [_column("model"), *(_column(metric_title(metric), True) for metric in metrics)]
    return {"columns": columns, "rows": cells, "caption": " ".join(parts)}


def _suite_table(run: RecordedRun) -> dict[str, Any]:
    columns = [_column("suite / settings"), _column("metric"), _column("score", True), _column("passes", True)]
    rows = []
    for name, score in run.scores.items():
        place, _, metric = name.rpartition(" ")
        if place:
            text = GroupScore(score.mean, score.sd, score.seeds).text
            cells = [
                _cell(place),
                _cell(metric_title(metric)),
                _cell(text, is_number=True),
                _cell(score.seeds, is_number=True),
            ]
            rows.append(cells)
    return {"columns": columns, "rows": rows, "caption": "± standard deviation over the passes of generation."}


def _shown_row(row: RowDistances) -> dict[str, Any]:
    return {"prompt": _cropped(row.prompt), "mean": row.mean, "tokens": [_shown_token(token) for token in row.tokens]}


def _shown_token(token: TokenDistance) -> dict[str, Any]:
    tops = [
        (
            "" if own is None else f"{_visible(own[0])} {own[1]:.3f}",
            "" if other is None else f"{_visible(other[0])} {other[1]:.3f}",
        )
        for own, other in zip_longest(token.teacher_top, token.student_top)
    ]
    return {
        "shown": printable(token.text).replace("\n", "↵\n"),
        "named": _visible(token.text),
        "distance": token.distance,
        "p_text": f"{token.p:.3g}",
        "q_text": f"{token.q:.3g}",
        "tops": tops,
    }


def _visible(text: str) -> str:
    """Return the text of a token with its spaces and newlines visible."""
    return printable(text).replace("\n", "↵").replace(" ", "␣")


def _cropped(text: object) -> str:
    """Return text for the page: cut where it is long, blank lines counted (an untrained student may write nothing else)."""
    text = _BLANK_LINES.sub(lambda lines: f" ⏎ × {lines[0].count(chr(10))} ", printable(str(text)))
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"


def _samples(run: RecordedRun) -> list[dict[str, Any]]:
    """Return held-out prompts with the reference and the response of each model, evenly spaced."""
    saved = {}
    for name in _MODELS:
        content = _saved_responses(run.path / output_dir.EVAL / "report" / f"{name.replace('_', '-')}.json")
        if content is not None:
            saved[name.replace("_", " ")] = content
    count = min((len(content["answers"]) for content in saved.values()), default=0)
    if not count:
        return []
    first = next(iter(saved.values()))
    samples = []
    for i in sorted({k * count // _MAX_SAMPLES for k in range(_MAX_SAMPLES)}):
        references = [str(text) for text in first["references"][i]]
        more = f" (or {len(references) - 1} more)" if len(references) > 1 else ""
        answers = [("reference", _cropped(references[0]) + more, "")] if references else []
        for name, content in saved.items():
            text = str(content["answers"][i])
            is_right = text.strip() in {reference.strip() for reference in references}
            answers.append((name, _cropped(text) or "(nothing)", "good" if is_right else ""))
        samples.append({"prompt": _cropped(first["prompts"][i]), "answers": answers})
    return samples


def _saved_responses(path: Path) -> dict[str, Any] | None:
    """Return the responses of a model that the run saved; None if there are none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        lengths = {len(content[key]) for key in ("answers", "prompts", "references")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return content if len(lengths) == 1 and all(isinstance(texts, list) for texts in content["references"]) else None


def _costs(run: RecordedRun) -> list[tuple[str, str]]:
    """Return what the run cost, and what cache and replay saved."""
    result = run.number
    found = []
    if (wall := result("wall_s")) is not None:
        found.append(("whole command", format_duration(wall)))
    if (train := result("train_s")) is not None:
        found.append(("training steps", format_duration(train)))
    if (tokens := result("tokens")) is not None:
        found.append(("supervised tokens", f"{tokens:,.0f}"))
    if (flops := result("flops")) is not None:
        found.append(("arithmetic, estimated", f"{format_count(flops)}FLOP"))
    if (energy := result("energy_j")) is not None:
        found.append(("energy of the processors", f"{energy / 3600:,.2f} Wh"))
    elif train is not None:
        found.append(("energy", "the machine reports none"))
    fresh, sampled = result("rollout_steps"), result("sampled_sequences")
    if sampled:
        found.append(
            ("student outputs sampled", f"{sampled:,.0f} sequences, {result('sampled_tokens') or 0:,.0f} tokens")
        )
    replayed = result("replay_steps")
    if replayed and fresh:
        text = f"{replayed:,.0f} steps on replayed outputs, for {fresh:,.0f} on fresh ones: "
        found.append(("saved by replay", text + f"{format_percent(replayed / (replayed + fresh))} of the sampling"))
    computed = result("teacher_tokens")
    if computed and tokens and tokens > computed:
        share = format_percent(1 - computed / tokens)
        text = f"the teacher ran on {computed:,.0f} of {tokens:,.0f} tokens: {share} from the cache"
        found.append(("saved by the teacher cache", text))
    cache = run.result.get("teacher_cache")
    if isinstance(cache, dict) and (size := finite_number(cache.get("bytes"))):
        found.append(("teacher cache", f"{cache.get('mode')}, {format_bytes(size)}"))
    return found


def _machine(run: RecordedRun) -> list[tuple[str, str]]:
    found = [(name, value) for name, value in (("distillm", run.version), ("host", run.host)) if value]
    machine = run.result.get("machine")
    return found + [(str(name), str(value)) for name, value in (machine.items() if isinstance(machine, dict) else ())]


def chosen_settings(recipe: str) -> list[tuple[str, str, str]]:
    """Return the settings that are not defaults, as (key, value, origin), from the text of a ``recipe.yaml``."""
    names: list[str] = []
    found = []
    for line in recipe.splitlines():
        matched = None if line.startswith("#") else _SETTING.fullmatch(line)
        if matched is None:
            continue
        names = [*names[: len(matched[1]) // 2], matched[2]]
        if matched[3] is not None and matched[4] not in (None, "default"):
            found.append((".".join(names), matched[3].rstrip(), matched[4]))
    return found


def _chosen(recipe: str) -> dict[str, Any] | None:
    rows = [[_cell(text) for text in setting] for setting in chosen_settings(recipe)]
    return {"columns": [_column("setting"), _column("value"), _column("from")], "rows": rows} if rows else None


# ------------------------------------------------------------------------------------------------------ several runs


def runs_page(result: ReportResult, runs: Sequence[RecordedRun], title: str) -> str:
    """Return the page of several runs. title: the directory that has them."""
    drawn, note = _drawn(set_charts(result, runs))
    problems = [{"name": path, "text": text} for path, text in (*result.skipped, *result.notes)[:_MAX_ROWS]]
    differ = (
        f"They differ in {', '.join(result.settings[:8])}" if result.settings else "They differ in their seed at most"
    )
    summary = f"{counted(len(runs), 'run')} in {counted(len(result.groups), 'group')}. {differ}."
    return _render(
        "runs.html.jinja",
        title,
        summary=summary,
        runs=_group_table(result),
        charts=drawn,
        chart_note=note,
        common=_common(runs),
        problems=problems,
    )


def _group_table(result: ReportResult) -> dict[str, Any]:
    columns = [_column("run"), *(_column(name) for name in result.settings[:12])]
    columns += [_column(metric_title(name), True) for name in result.metrics]
    columns += [_column(name, True) for name in ("seconds", "tokens/s", "rollouts")]
    rows = []
    for i, group in enumerate(result.groups[:_MAX_ROWS]):
        row = [_cell(group.title + (f" ({group.unfinished} unfinished)" if group.unfinished else ""))]
        row += [_cell(group.setting_text(name)) for name in result.settings[:12]]
        for name in result.metrics:
            score = group.scores.get(name)
            is_best = i in result.best[name]
            row.append(_cell("–" if score is None else score.text, "best" if is_best else "", is_number=True))
        texts = [
            "–" if group.seconds is None else f"{group.seconds:,.0f}",
            "–" if group.tokens_per_s is None else f"{group.tokens_per_s:,.0f}",
            "–" if group.rollouts is None else format_percent(group.rollouts),
        ]
        rows.append([*row, *(_cell(text, is_number=True) for text in texts)])
    caption = ["Bold: best. ± standard deviation over runs that differ in their seed."]
    lower = [metric_title(name) for name in result.metrics if name in result.lower_is_better]
    caption += [f"Lower is better: {', '.join(lower)}."] if lower else []
    more = len(result.groups) - _MAX_ROWS
    caption += [f"{more:,} more groups are left out here; `distillm report --csv` has all."] if more > 0 else []
    return {"columns": columns, "rows": rows, "caption": " ".join(caption)}


def set_charts(result: ReportResult, runs: Sequence[RecordedRun]) -> list[Chart]:
    """Return the plots of several runs: metrics against settings and seconds, validation losses over steps."""
    metrics = sorted(result.metrics, key=lambda name: name == "valid_loss")[:_MAX_METRICS]
    settings = [name for name in result.settings if _is_plotted(name, result.groups)][:_MAX_SETTINGS]
    found = []
    for setting in settings:
        others = [name for name in settings if name != setting]
        for metric in metrics:
            points = list(_plot_points(result.groups, metric, lambda group, key=setting: group.settings[key], others))
            if len(points) > 1:
                found.append(charts.sweep_chart(setting, metric_title(metric), points))
    for metric in metrics:
        points = list(_plot_points(result.groups, metric, lambda group: group.seconds, settings))
        if len(points) > 1:
            is_lower = metric in result.lower_is_better
            found.append(charts.front_chart(metric_title(metric), points, lower_is_better=is_lower))
    curves = _curves(result, runs)
    return [*found, charts.curves_chart(curves)] if curves else found


def _is_plotted(name: str, groups: Sequence[RunGroup]) -> bool:
    values = {plain_value(group.settings[name]) for group in groups}
    is_number = all(isinstance(group.settings[name], int | float) for group in groups)
    return len(values) > 1 and (is_number or len(values) <= 12)


def _plot_points(groups: Iterable[RunGroup], metric: str, x: Any, others: Sequence[str]) -> Iterable[Point]:
    """Yield a point per group that has the metric and x. others: settings that may give points their colors."""
    groups = list(groups)
    color = next((key for key in others if len({plain_value(g.settings[key]) for g in groups}) <= _MAX_SERIES), None)
    for group in groups:
        score = group.scores.get(metric)
        place = x(group)
        if score is None or place is None:
            continue
        place = place if isinstance(place, int | float) else plain_value(place)
        series = "" if color is None else f"{color.rpartition('.')[2]} = {group.setting_text(color)}"
        yield Point(place, score.mean, score.sd, group.title, series)


def _curves(result: ReportResult, runs: Sequence[RecordedRun]) -> dict[str, list[tuple[int, float]]]:
    """Return the validation losses of the first run of each group over its steps; nothing if there are too many groups."""
    if not 1 < len(result.groups) <= _MAX_CURVES:
        return {}
    by_path = {str(run.path): run for run in runs}
    found = {}
    for group in result.groups:
        lines = read_metrics(by_path[group.paths[0]].path / output_dir.METRICS)
        points = [
            (line["step"], value) for line in lines if (value := finite_number(line.get("valid_loss"))) is not None
        ]
        if len(points) > 1:
            found[_curve_name(group, result.settings)] = points
    return found


def _curve_name(group: RunGroup, settings: Sequence[str]) -> str:
    values = [f"{name.rpartition('.')[2]} = {group.setting_text(name)}" for name in settings[:2]]
    return ", ".join(values) if 0 < len(settings) <= 2 else group.names[0]


def _common(runs: Sequence[RecordedRun]) -> dict[str, Any] | None:
    recipe = redact((runs[0].path / output_dir.RECIPE).read_text(encoding="utf-8"))
    differing = {*differing_settings(runs), "train.seed"}
    chosen = [setting[:2] for setting in chosen_settings(recipe) if setting[0] not in differing]
    rows = [[_cell(text) for text in setting] for setting in chosen]
    return {"columns": [_column("setting"), _column("value")], "rows": rows} if rows else None
