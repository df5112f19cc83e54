"""Plot the comparison of methods as SVG. Needs matplotlib (``pip install -e '.[benchmarks]'``)."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from regimes import SFT, Arm, cost, gains, half_width, is_on_rows, metrics, reference

from distillm_cli import plugins

COLORS = {"T=1": "#d1495b", "T=0.5": "#edae49", "greedy": "#00798c"}
INK, GRID = "#333333", "#dddddd"

Figures = dict[str, tuple[Any, dict, dict]]  # part → its bench, its runs, their test figures
Regimes = dict[int, dict[str, list[dict]]]  # number of rows → arm → its runs by seed


def draw(figures: Figures, place: Path) -> None:
    """Plot each part that has results."""
    pyplot, keep = _svg(place)
    for part in ("g2p", "seconds", "builtin", "dolly"):
        if part in figures and (scores := _by_method(*figures[part])):
            keep(_dots(pyplot, figures[part][0].task, scores), part)
    if "g2p" in figures and (scores := _by_method(*figures["g2p"])):
        costs = figures["g2p"][0].costs()
        if scores.keys() <= costs.keys():
            keep(_cost(pyplot, figures["g2p"][0].task, scores, costs), "cost")
    if "ablations" in figures and (lines := _skews(*figures["ablations"])):
        keep(_alpha(pyplot, lines), "alpha")


def _svg(place: Path):
    """Return pyplot, set up for SVG, and a function that saves a figure under a name in ``place``."""
    import matplotlib

    matplotlib.use("svg")
    # Text is stored as text, and the same figures give the same bytes.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "distillm", "font.size": 9, "axes.edgecolor": INK}
    place.mkdir(parents=True, exist_ok=True)
    from matplotlib import pyplot

    def keep(figure, name: str) -> None:
        figure.savefig(place / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)

    return pyplot, keep


def _by_method(bench, runs: dict, scores: dict) -> dict[str, dict[str, list[dict]]]:
    """Return method → pass → test figures over the seeds."""
    found: dict[str, dict[str, list[dict]]] = {}
    for (name, _), done in runs.items():
        for mode in bench.task.passes:
            if (done.place, mode) in scores:
                found.setdefault(name, {}).setdefault(mode, []).append(scores[done.place, mode])
    return {name: by_mode for name, by_mode in found.items() if set(by_mode) == set(bench.task.passes)}


def _spread(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _bare(axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def _dots(pyplot, task, scores: dict):
    """Plot a line per method with a dot per decoding setting and the seeds' standard deviation.

    The best method at T = 1 is on top. If the task has a reference method, differences to it are plotted, seed by seed.
    """
    metric = task.metrics[0]

    def values(name: str, mode: str) -> list[float]:
        mine = [f[metric]["mean"] for f in scores[name][mode]]
        if task.reference not in scores:
            return mine
        return [value - f[metric]["mean"] for value, f in zip(mine, scores[task.reference][mode], strict=False)]

    mean = lambda name, mode: statistics.mean(values(name, mode))  # noqa: E731
    names = sorted(scores, key=lambda name: mean(name, "T=1"), reverse=task.lower)
    figure, axes = pyplot.subplots(figsize=(7, 0.8 + 0.28 * len(names)))
    for mode in task.passes:
        spread = [_spread(values(name, mode)) for name in names]
        axes.errorbar([m for m, _ in spread], range(len(names)), xerr=[s for _, s in spread], fmt="o", markersize=5,
                      color=COLORS[mode], ecolor=COLORS[mode], elinewidth=1.2, label=mode)  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    title = f"{plugins.metrics[metric].label}, % ({'left' if task.lower else 'right'} is better)"
    axes.set_xlabel(title + (f", difference to {task.reference}, same seed" if task.reference in scores else ""))
    axes.legend(frameon=False, ncols=len(task.passes), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _bare(axes)
    return figure


def _cost(pyplot, task, scores: dict, costs: dict[str, float]):
    """Plot seconds of the training loop against the error at T = 1, for equal steps."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    metric = task.metrics[0]
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    points = []
    for name, by_mode in scores.items():
        points.append((costs[name] * task.steps, statistics.mean(f[metric]["mean"] for f in by_mode["T=1"]), name))
    axes.scatter([x for x, _, _ in points], [y for _, y, _ in points], color=COLORS["T=1"], s=24)
    low, high = min(y for _, y, _ in points), max(y for _, y, _ in points)
    taken: list[tuple[float, float]] = []
    for x, y, name in sorted(points, key=lambda point: point[1]):
        # Labels of close points: the next one is moved up until it is free, and one that would cover a point on its
        # right is moved to the left.
        up, near = y, (high - low) * 0.035
        while any(abs(x / other - 1) < 0.35 and abs(up - height) < near for other, height in taken):
            up += (high - low) * 0.01
        taken.append((x, up))
        left = any(1.02 < other / x < 1.35 and abs(up - height) < near / 2 for other, height, _ in points)
        placement = {"ha": "right", "xytext": (x / 1.03, up)} if left else {"ha": "left", "xytext": (x * 1.03, up)}
        axes.annotate(name, (x, y), fontsize=8, color=INK, va="center", **placement)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("seconds of the training loop, with cached teacher states of data set rows")
    axes.set_ylabel(f"{plugins.metrics[metric].label} at T = 1, %")
    axes.margins(x=0.15)
    _bare(axes)
    return figure


def _skews(bench, runs: dict, scores: dict) -> dict[str, dict[float, list[tuple[dict, dict]]]]:
    """Return divergence → α → (at T = 1, greedy) of each seed."""
    lines: dict[str, dict[float, list]] = {}
    for (group, what, _), done in runs.items():
        if group.startswith("α of") and all((done.place, mode) in scores for mode in ("T=1", "greedy")):
            divergence, alpha = what.split(" α=")
            pair = scores[done.place, "T=1"], scores[done.place, "greedy"]
            lines.setdefault(divergence, {}).setdefault(float(alpha), []).append(pair)
    return lines


def _alpha(pyplot, lines: dict):
    """Plot α against error at T = 1, greedy error and entropy, for both skewed divergences."""
    figure, panels = pyplot.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    read = {
        "PER at T = 1, %": lambda pair: pair[0]["error_rate"]["mean"],
        "PER greedy, %": lambda pair: pair[1]["error_rate"]["mean"],
        "entropy at T = 1, nats": lambda pair: pair[0]["entropy"],
    }
    for axes, (title, value) in zip(panels, read.items(), strict=True):
        for divergence, color in (("skl", "#d1495b"), ("srkl", "#00798c")):
            found = sorted(lines.get(divergence, {}).items())
            spread = [_spread([value(pair) for pair in pairs]) for _, pairs in found]
            axes.errorbar(range(len(found)), [m for m, _ in spread], yerr=[s for _, s in spread], color=color,
                          marker="o", markersize=4, elinewidth=1, label=divergence)  # fmt: skip
            axes.set_xticks(range(len(found)), [f"{alpha:g}" for alpha, _ in found])
        axes.set_xlabel("α")
        axes.set_title(title, fontsize=9)
        _bare(axes)
    panels[0].legend(frameon=False)
    return figure


def draw_regimes(task: str, regimes: Regimes, place: Path) -> None:
    """Plot where student outputs pay, from the runs of ``regimes.py`` by number of rows and arm.

    With several numbers of rows: the gain over the best arm on rows of at least the same cost against the number of rows,
    with 95 % intervals, of the arms that are measured with more than one of them. A panel per number of rows with the first
    metric against the cost, where a line connects an arm's numbers of steps. Where three divergences are measured: all
    divergences and schedules.
    """
    pyplot, keep = _svg(place)
    shared = regimes
    if len(regimes) > 1:
        counts = Counter(name for arms in regimes.values() for name in {_short(arm) for arm in arms})
        shared = {
            rows: {arm: runs for arm, runs in arms.items() if counts[_short(arm)] > 1} for rows, arms in regimes.items()
        }
    names = list(dict.fromkeys(_short(arm) for arms in shared.values() for arm in arms))
    colors = dict(zip(names, pyplot.cm.tab10.colors, strict=False))  # the same in both plots
    if len(regimes) > 1:
        keep(_gain_by_rows(pyplot, shared, colors), f"regimes-{task}-gain")
    keep(_quality_by_cost(pyplot, shared, colors), f"regimes-{task}-cost")
    for rows, arms in regimes.items():
        if len({Arm.parse(arm).divergence for arm in arms} - {SFT}) >= 3:
            keep(_divergences(pyplot, arms), f"regimes-{task}-{rows}-divergences")


def _gain_by_rows(pyplot, regimes: Regimes, colors: dict[str, Any]):
    """Return the plot of the gain over the best arm on rows, with a panel per decoding setting."""
    every = [runs for arms in regimes.values() for runs in arms.values()]
    metric, passes = metrics(every[0])[0], list(every[0][0]["test"])
    arms = [arm for arm in dict.fromkeys(a for by_arm in regimes.values() for a in by_arm) if not is_on_rows(arm)]
    figure, axes = pyplot.subplots(1, len(passes), figsize=(8, 3.2), sharey=True)
    for panel, name in zip(axes, passes, strict=True):
        for arm in arms:
            found = {}
            for rows, by_arm in regimes.items():
                against = reference(by_arm, arm, passes[-1]) if arm in by_arm else None
                if against:
                    found[rows] = gains(by_arm, arm, against, name)
            means = [statistics.mean(values) for values in found.values()]
            panel.errorbar(
                list(found), means, [half_width(values) for values in found.values()],
                fmt="o-", label=_short(arm), color=colors[_short(arm)], markersize=4, linewidth=1.2, capsize=2,
            )  # fmt: skip
        panel.axhline(0, color=INK, linewidth=0.8)
        panel.set_xscale("log")
        panel.set_xticks(sorted(regimes), [f"{rows:,}" for rows in sorted(regimes)], rotation=45)
        panel.minorticks_off()
        panel.set_title(name)
        panel.set_xlabel("rows")
        _bare(panel)
    axes[0].set_ylabel(f"gain in {metric.replace('_', ' ')}, points")
    axes[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _quality_by_cost(pyplot, regimes: Regimes, colors: dict[str, Any]):
    """Return the plot of the first metric against the cost, with a panel per number of rows."""
    metric = metrics(next(runs for arms in regimes.values() for runs in arms.values()))[0]
    across = min(len(regimes), 3)
    down = -(-len(regimes) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(3 * across, 2.6 * down), squeeze=False)
    figure.subplots_adjust(wspace=0.3, hspace=0.5)
    for panel in axes.flat[len(regimes) :]:
        panel.set_visible(False)
    for panel, (rows, by_arm) in zip(axes.flat, sorted(regimes.items()), strict=False):
        for name, color in colors.items():
            of_name = sorted((cost(runs), runs) for arm, runs in by_arm.items() if _short(arm) == name)
            values = [statistics.mean(run["test"]["greedy"][metric] for run in runs) for _, runs in of_name]
            panel.plot([spent for spent, _ in of_name], values, "o-", color=color, markersize=5, label=name)
        panel.margins(x=0.15, y=0.15)
        panel.set_title(f"{rows:,} rows")
        _bare(panel)
    for panel in axes[-1]:
        panel.set_xlabel("cost, steps on rows")
    for panel in axes[:, 0]:
        panel.set_ylabel(f"{metric.replace('_', ' ')}, greedy")
    axes[0][-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _divergences(pyplot, arms: dict[str, list[dict]]):
    """Return the plot of all divergences and schedules with one number of rows: colors and marks."""
    plain = {arm: runs for arm, runs in arms.items() if not Arm.parse(arm).settings}
    divergences = list(dict.fromkeys(Arm.parse(arm).divergence for arm in plain))
    schedules = list(dict.fromkeys(Arm.parse(arm).schedule for arm in plain))
    colors = dict(zip(divergences, pyplot.cm.tab10.colors, strict=False))
    marks = dict(zip(schedules, "osD^vP*X<>", strict=False))
    metric = metrics(next(iter(plain.values())))[0]
    passes = [name for name in next(iter(plain.values()))[0]["test"] if name != "T=0.5"]
    figure, axes = pyplot.subplots(1, len(passes), figsize=(8, 3.4))
    for panel, name in zip(axes, passes, strict=True):
        for arm, runs in plain.items():
            parts = Arm.parse(arm)
            value = statistics.mean(run["test"][name][metric] for run in runs)
            panel.plot(
                cost(runs), value, marks[parts.schedule], color=colors[parts.divergence], markersize=6, alpha=0.85
            )
        panel.set_title(name)
        panel.set_xlabel("cost, steps on rows")
        _bare(panel)
    axes[0].set_ylabel(metric.replace("_", " "))
    named = [axes[-1].plot([], [], "o", color=color, label=name)[0] for name, color in colors.items()]
    named += [axes[-1].plot([], [], mark, color=INK, label=name)[0] for name, mark in marks.items()]
    axes[-1].legend(handles=named, frameon=False, loc="upper left", bbox_to_anchor=(1, 1.05))
    return figure


def _short(arm: str) -> str:
    """Return an arm's name without its number of steps and the sections of its settings."""
    return arm.partition(" x")[0].replace("objective.", "")
