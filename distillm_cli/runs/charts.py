"""Describe charts of runs as Vega-Lite, and draw them as SVG or PNG with vl-convert (the extra ``report``).

An SVG needs no script and no font file, takes the text color of the page, and prints. Colors are those of Okabe and Ito
(2008), which people with any color vision can tell apart.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from distillm_cli.runs.recorded_run import finite_number

MISSING_EXTRA = "charts need the extra `report`: pip install 'distillm[report]'"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
_WIDTH, _HEIGHT = 380, 190
_BINS = 120  # points of a line
_MAX_POINTS = 250  # of a plot
_SOURCES = {"dataset": "rows", "rollout": "rollouts", "replay": "replay", "teacher": "teacher samples"}
_VALID_LOSSES = {"valid_loss": "cross-entropy", "held_out_loss": "objective", "valid_divergence": "objective"}
_NOT_SCORES = {"step", "phi", "epoch", "tokens", "seconds", *_VALID_LOSSES}
_VALID_PAIR = {"kl_teacher_student": "KL(teacher ‖ student)", "kl_student_teacher": "KL(student ‖ teacher)"}
_HEALTH: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Length of rollouts", "tokens", {"rollout_length": "mean", "rollout_length_p90": "90th percentile"}),
    ("Rollouts: cut and varied", "share", {"rollout_cut": "cut at the limit", "rollout_distinct2": "distinct 2-grams"}),
    ("Entropy", "nats per token", {"student_entropy": "student", "teacher_entropy": "teacher"}),
    ("Top 16 tokens of both models", "share", {"top16_overlap": "tokens in common", "top16_mass": "their probability"}),
    ("Acceptance as a draft model", "1 − total variation", {"acceptance": "acceptance"}),
    ("Age of replayed rollouts", "steps", {"replay_age": "age"}),
    (
        "Speed",
        "tokens per second",
        {"train_tokens_per_second": "training", "sampling_tokens_per_second": "sampling"},
    ),
)


@dataclass(frozen=True)
class Chart:
    """Hold a chart: a file name, a title, a sentence below it, and its Vega-Lite description."""

    name: str
    title: str
    caption: str
    spec: Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """Hold a group of runs in a plot. value, sd: of the metric. x: a setting or seconds. series: name of its color."""

    x: object
    value: float
    sd: float | None
    name: str
    series: str = ""


def run_charts(lines: Sequence[Mapping[str, Any]], train_s: float | None) -> list[Chart]:
    """Return the charts of a run: losses, sources and φ, quality against seconds. lines: of ``metrics.jsonl``."""
    steps = [line for line in lines if "loss" in line]
    validations = [line for line in lines if "valid_loss" in line]
    charts = []
    by_source = _binned(steps, lambda line: {_source(line): finite_number(line["loss"])})
    if by_source:
        charts.append(_lines("loss", "Training loss", "Mean of logged steps, by source.", by_source, "loss"))
    losses = _points(validations, _VALID_LOSSES)
    if losses:
        charts.append(
            _lines("validation", "Validation loss", "On held-out rows.", losses, "nats per token", points=True)
        )
    if steps:
        charts.append(_mix(steps))
    seconds = _seconds_at(steps, train_s)
    timed = [
        {"step": round(seconds(line["step"]), 2), "value": finite_number(line["valid_loss"]), "series": "valid CE"}
        for line in validations
    ]
    timed = [point for point in timed if point["value"] is not None]
    if len(timed) > 1:
        caption = "Validation loss over the seconds of training, without validation and loading."
        charts.append(
            _lines("quality-time", "Quality against time", caption, timed, "nats per token", x="seconds", points=True)
        )
    names = dict.fromkeys(name for line in validations for name in line if name not in (*_NOT_SCORES, *_VALID_PAIR))
    for name in names:
        found = _points(validations, {name: name})
        if found:
            title = name.replace("_", " ").capitalize()
            charts.append(_lines(f"validation-{name}", title, "On held-out rows.", found, name, points=True))
    return charts


def health_charts(lines: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return charts of the figures of rollouts and of both models that the run recorded."""
    charts = []
    for title, unit, names in _HEALTH:
        found = _binned(
            lines, lambda line, names=names: {text: finite_number(line.get(n)) for n, text in names.items()}
        )
        if found:
            charts.append(_lines(title.lower().replace(" ", "-"), title, "", found, unit))
    found = _points(lines, _VALID_PAIR)
    if found:
        charts.append(_lines("kl", "Divergence on held-out rows", "Both ways.", found, "nats per token", points=True))
    return charts


def _source(line: Mapping[str, Any]) -> str:
    name = str(line.get("source", "steps"))
    return _SOURCES.get(name, name)


def _in_order(names: Iterable[str]) -> list[str]:
    """Return the names with sources first, so that a source has the same color in every chart."""
    names = list(names)
    return [*(name for name in _SOURCES.values() if name in names), *(n for n in names if n not in _SOURCES.values())]


def _points(lines: Iterable[Mapping[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    found = [
        {"step": line["step"], "value": value, "series": text}
        for line in lines
        for name, text in names.items()
        if (value := finite_number(line.get(name))) is not None
    ]
    return _thinned(found)


def _binned(lines: Sequence[Mapping[str, Any]], values: Any) -> list[dict[str, Any]]:
    """Return points of at most ``_BINS`` bins of steps: the mean of each series. values: of a line, by series."""
    last = max((line["step"] for line in lines), default=0)
    bins: dict[tuple[str, int], list[tuple[int, float]]] = defaultdict(list)
    for line in lines:
        for series, value in values(line).items():
            if value is not None:
                bins[series, line["step"] * _BINS // (last + 1)].append((line["step"], value))
    return [
        {
            "step": round(statistics.fmean(step for step, _ in found), 1),
            "value": float(f"{statistics.fmean(value for _, value in found):.5g}"),
            "series": series,
        }
        for (series, _), found in sorted(bins.items())
    ]


def _mix(steps: Sequence[Mapping[str, Any]]) -> Chart:
    """Return the share of each source over steps, and φ."""
    last = max(line["step"] for line in steps)
    bins = min(40, max(4, len(steps) // 8))  # with at least eight logged steps each
    width = max(1, -(-(last + 1) // bins))
    counts: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for line in steps:
        counts[line["step"] // width][_source(line)] += 1
    names = _in_order({_source(line) for line in steps})
    shares = []
    for number, found in sorted(counts.items()):
        top = 0.0
        for name in names:
            share = found[name] / sum(found.values())
            if share:
                span = {"step": number * width, "end": min((number + 1) * width, last)}
                shares.append({**span, "low": round(top, 4), "value": round(top + share, 4), "series": name})
            top += share
    phi = _binned(steps, lambda line: {"φ": finite_number(line.get("phi"))})
    area = {
        "data": {"values": shares},
        "mark": {"type": "rect", "opacity": 0.75},
        "encoding": {
            "x": _axis("step", "step"),
            "x2": {"field": "end"},
            "y": {**_axis("low", "share of steps"), "scale": {"domain": [0, 1]}},
            "y2": {"field": "value"},
            "color": _color(names, symbol="square"),
        },
    }
    line = {
        "data": {"values": phi},
        "mark": {"type": "line", "color": "currentColor", "strokeWidth": 2.5},
        "encoding": {"x": _axis("step", "step"), "y": _axis("value", "share of steps")},
    }
    has_phi = any(point["value"] for point in phi)
    caption = "Share of the logged steps by source." + (
        " Line: φ, the probability of student outputs." if has_phi else ""
    )
    spec = {"layer": [area, line] if has_phi else [area]}
    return Chart("sources", "Sources of the steps", caption, _described(spec, "Sources of the steps"))


def _seconds_at(steps: Sequence[Mapping[str, Any]], train_s: float | None) -> Any:
    """Return a function from a step to the seconds of training until its end, from the seconds of logged steps."""
    ends: list[tuple[int, float]] = [(0, 0.0)]
    for line in sorted(steps, key=lambda line: line["step"]):
        took = finite_number(line.get("seconds")) or 0.0
        step, total = ends[-1]
        ends.append((line["step"], total + took * (line["step"] - step)))
    scale = train_s / ends[-1][1] if train_s and ends[-1][1] else 1.0

    def at(step: int) -> float:
        for (first, start), (last, end) in pairwise(ends):
            if step <= last:
                return scale * (start + (end - start) * (step - first) / max(last - first, 1))
        return scale * ends[-1][1]

    return at


def _lines(
    name: str,
    title: str,
    caption: str,
    values: list[dict[str, Any]],
    unit: str,
    *,
    x: str = "step",
    points: bool = False,
) -> Chart:
    series = _in_order({str(value["series"]): None for value in values})
    spec: dict[str, Any] = {
        "data": {"values": values},
        "mark": {"type": "line", "point": {"size": 22} if points and len(values) < 80 else False, "strokeWidth": 1.8},
        "encoding": {
            "x": _axis("step", x),
            "y": {**_axis("value", unit), "scale": {"zero": False}},
            "color": _color(series),
        },
    }
    return Chart(name, title, caption, _described(spec, title))


def sweep_chart(setting: str, metric: str, points: Sequence[Point]) -> Chart:
    """Return a metric against a setting: a point per group of runs, with its standard deviation."""
    is_number = all(isinstance(p.x, int | float) and not isinstance(p.x, bool) for p in points)
    is_log = is_number and all(p.x > 0 for p in points) and max(p.x for p in points) >= 50 * min(p.x for p in points)  # type: ignore[operator,type-var]
    x: dict[str, Any] = _axis("x", setting) | {"scale": {"zero": False, "padding": 12}}
    if not is_number:
        x["type"] = "nominal"
        del x["scale"]
        x["axis"] = {"labelAngle": -30, "labelLimit": 140}
    elif is_log:
        x["scale"] = {"type": "log", "padding": 12}
    spec = _scatter([_point(p, str(p.x) if not is_number else p.x) for p in points], x, metric)
    title = f"{metric} against {setting}"
    return Chart(_file_stem(f"{metric}-by-{setting}"), title, _caption(points), _described(spec, title))


def front_chart(metric: str, points: Sequence[Point], *, lower_is_better: bool) -> Chart:
    """Return a metric against seconds, with a line through the groups that no other beats in both."""
    front = []
    best: float | None = None
    for point in sorted(points, key=lambda p: (p.x, p.value if lower_is_better else -p.value)):
        if best is None or (point.value < best if lower_is_better else point.value > best):
            best = point.value
            front.append({"x": point.x, "value": point.value})
    x = _axis("x", "seconds of training") | {"scale": {"zero": False, "padding": 12}}
    spec = _scatter([_point(p, p.x) for p in points], x, metric)
    mark = {"type": "line", "color": "currentColor", "strokeDash": [4, 3], "opacity": 0.6, "interpolate": "step-after"}
    line = {
        "data": {"values": front},
        "mark": mark,
        "encoding": {"x": x, "y": {**_axis("value", metric), "scale": {"zero": False}}},
    }
    spec["layer"] = [line, *spec["layer"]]
    title = f"{metric} against time"
    caption = f"{'Lower' if lower_is_better else 'Higher'} is better. Dashed: the front of the best for their time."
    caption = f"{caption} {_caption(points)}".strip()
    return Chart(_file_stem(f"{metric}-by-seconds"), title, caption, _described(spec, title))


def curves_chart(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Chart:
    """Return the validation losses of several runs over steps, by the runs' names."""
    values = [{"step": s, "value": value, "series": name} for name, found in curves.items() for s, value in found]
    return _lines(
        "validation", "Validation loss", "On the held-out rows of each run.", values, "nats per token", points=True
    )


def _point(point: Point, x: object) -> dict[str, Any]:
    sd = point.sd or 0.0
    return {
        "x": x,
        "value": point.value,
        "low": point.value - sd,
        "high": point.value + sd,
        "series": point.series,
        "name": point.name,
    }


def _scatter(values: list[dict[str, Any]], x: dict[str, Any], metric: str) -> dict[str, Any]:
    values = _thinned(values)
    y = {**_axis("value", metric), "scale": {"zero": False, "nice": True}}
    names = list(dict.fromkeys(value["series"] for value in values))
    color = _color(names) if names != [""] else {"value": COLORS[0]}
    bars = {
        "data": {"values": [value for value in values if value["low"] < value["high"]]},
        "mark": {"type": "rule", "strokeWidth": 1.5},
        "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": color},
    }
    dots = {
        "mark": {"type": "point", "filled": True, "size": 60, "opacity": 0.95},
        "encoding": {"x": x, "y": y, "color": color, "shape": _shape(names) if names != [""] else {"value": "circle"}},
    }
    return {"data": {"values": values}, "layer": [bars, dots]}


def _thinned(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return at most ``_MAX_POINTS`` evenly spaced values."""
    return values[:: -(-len(values) // _MAX_POINTS)] if len(values) > _MAX_POINTS else values


def _caption(points: Sequence[Point]) -> str:
    parts = ["Bars: ± standard deviation over seeds."] if any(point.sd for point in points) else []
    if len(points) > _MAX_POINTS:
        parts.append(f"An even selection of {len(points):,} groups.")
    return " ".join(parts)


def _axis(field: str, title: str) -> dict[str, Any]:
    return {"field": field, "type": "quantitative", "title": title, "scale": {"nice": True}}


def _color(names: Sequence[str], symbol: str = "stroke") -> dict[str, Any]:
    colors = [COLORS[i % len(COLORS)] for i in range(len(names))]
    legend = {
        "title": None,
        "orient": "top",
        "labelLimit": 180,
        "columns": 3,
        "columnPadding": 14,
        "symbolType": symbol,
    }
    return {
        "field": "series",
        "type": "nominal",
        "scale": {"domain": list(names), "range": colors},
        "legend": legend if len(names) > 1 else None,
    }


def _shape(names: Sequence[str]) -> dict[str, Any]:
    shapes = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]
    found = [shapes[i % len(shapes)] for i in range(len(names))]
    return {"field": "series", "type": "nominal", "scale": {"domain": list(names), "range": found}, "legend": None}


def _file_stem(text: str) -> str:
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in text.lower()).strip("-")


def _described(spec: dict[str, Any], title: str) -> dict[str, Any]:
    ink = {"labelColor": "currentColor", "titleColor": "currentColor", "labelFontSize": 12, "titleFontSize": 12}
    axis = {**ink, "gridColor": "currentColor", "gridOpacity": 0.12, "domainColor": "currentColor", "tickCount": 5}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "description": title,
        "width": _WIDTH,
        "height": _HEIGHT,
        "background": None,
        "padding": 4,
        **spec,
        "config": {
            "font": "system-ui, sans-serif",
            "view": {"stroke": None},
            "axis": {
                **axis,
                "domainOpacity": 0.4,
                "tickColor": "currentColor",
                "tickOpacity": 0.4,
                "titleFontWeight": 500,
            },
            "legend": {**ink, "symbolStrokeWidth": 3},
        },
    }


def draw_svg(chart: Chart) -> str:
    """Return a chart as an SVG element. Raises ImportError without the extra ``report``."""
    import vl_convert

    return str(vl_convert.vegalite_to_svg(dict(chart.spec)))


def draw_files(chart: Chart) -> dict[str, bytes]:
    """Return a chart with its title as the files NAME.svg and NAME.png, dark on white. Raises ImportError."""
    import vl_convert

    spec = _without_current_color({**chart.spec, "title": chart.title, "background": "white"})
    svg = str(vl_convert.vegalite_to_svg(spec))
    return {f"{chart.name}.svg": svg.encode(), f"{chart.name}.png": vl_convert.vegalite_to_png(spec, scale=2.0)}


def _without_current_color(value: Any) -> Any:
    """Return a description in which ``currentColor``, which only a page has, is black."""
    if isinstance(value, dict):
        return {key: _without_current_color(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_current_color(item) for item in value]
    return "black" if value == "currentColor" else value
