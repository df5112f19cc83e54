"""Compare all methods on one engine, and write benchmarks/METHODS.md and its plots.

    python benchmarks/methods.py g2p ablations seconds builtin dolly --work DIR --data DIR [--jobs 2] [--threads 1]
    python benchmarks/methods.py all --report --work DIR --data DIR    (tables and plots, without new runs)

Parts (all are resumable, and finished runs are not repeated):

g2p        all methods from one SFT start, equal optimizer steps, three seeds; the learning rate of each from one small grid
           by its greedy score on validation rows, first seed
costs      seconds of a step of each method, on an otherwise quiet machine
seconds    the methods at their rates, equal wall time: steps of each = seconds ÷ its own cost of a step
ablations  of the paper, in small: α, replay, schedule, SFT start, buffer, bulk
builtin    as ``g2p``, on the built-in rows
dolly      as ``g2p``, on Dolly with small models, DISTILLM_DATA set

The teacher's states for data set rows are computed once and read by every run (``teacher.cache``), so the cost of
methods that train on rows excludes the teacher; sequences sampled in training are computed by the teacher. Costs are
those of the training loop, measured separately, one run at a time, since parallel runs disturb each other. A file
WORK/pause delays new runs until it is removed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import tasks
from lab import mean_sd, write_blocks
from tasks import Task

from distillm_cli import plugins
from distillm_cli.config.methods import METHODS

HERE = Path(__file__).resolve().parent
PAGE, PLOTS = HERE / "METHODS.md", HERE / "plots"
Argv = tuple[str, ...]
ALL: dict[str, Argv] = {n: ("sft",) if m.verb == "sft" else ("distill", "--method", n) for n, m in METHODS.items()}


def _off(divergence: str, alpha: str) -> Argv:
    return ("distill", "--method", "kd", "--divergence", divergence, "--alpha", alpha)


def _adaptive(*fields: str) -> Argv:
    """Return arguments of DistiLLM with half of the steps on student outputs from the start, to make differences visible."""
    return ("distill", "--method", "distillm", *tasks.sets("schedule.phi=0.5", *fields))


SCRATCH = "random:2x96"
PARTS = ["g2p", "costs", "seconds", "ablations", "builtin", "dolly"]
LONGER = ", four times the steps"
COST_STEPS, NO_REPORT = 100, tuple(tasks.sets("eval.report_rows=0"))
ABLATIONS: dict[str, dict[str, Argv]] = {
    "α of skl (data set)": {f"skl α={a}": _off("skl", a) for a in ("0", "0.01", "0.1", "0.3", "0.5")},
    "α of srkl (data set)": {f"srkl α={a}": _off("srkl", a) for a in ("0", "0.01", "0.1", "0.3", "0.5")},
    "schedule (skl α=0.1)": {
        "off": _off("skl", "0.1"),
        "on": (*_off("skl", "0.1"), "--set", "schedule.kind=on"),
        "mixed λ=0.5": (*_off("skl", "0.1"), "--set", "schedule.kind=mixed"),
        "adaptive, φ₀=0, ε=0.1": ALL["distillm"],
        "adaptive, φ₀=0, ε=0": (*ALL["distillm"], "--set", "schedule.epsilon=0"),
        "adaptive, φ₀=0.5": _adaptive(),
    },
    "replay (adaptive, φ₀=0.5)": {
        "decreasing": _adaptive(),
        "constant": _adaptive("schedule.replay=constant"),
        "increasing": _adaptive("schedule.replay=increasing"),
    },
    "buffer (adaptive, φ₀=0.5)": {
        "100": _adaptive("schedule.capacity=100"),
        "1,000": _adaptive(),
        "10,000": _adaptive("schedule.capacity=10000"),
    },
    "bulk (adaptive, φ₀=0.5)": {
        "1": _adaptive("rollout.bulk=1"),
        "4": _adaptive("rollout.bulk=4"),
        "8": _adaptive(),
        f"1{LONGER}": _adaptive("rollout.bulk=1"),
        f"8{LONGER}": _adaptive(),
    },
    "cross-entropy with atkd": {
        "atkd alone": ALL["atkd"],
        "equal weights": (*ALL["atkd"], "--set", "objective.kd_weight=0.5"),
    },
    "start (kl, adaptive skl)": {
        "SFT, then kl": ALL["kd"],
        "kl without SFT": ALL["kd"],
        "SFT, then adaptive skl": ALL["distillm"],
        "adaptive skl without SFT": ALL["distillm"],
    },
}


@dataclass(frozen=True)
class Done:
    """Hold a finished run: its directory, its ``--json`` object, its learning rate."""

    place: Path
    result: dict
    lr: str


class Bench:
    """Hold the runs of one task, which are executed in parallel with cached results."""

    def __init__(self, task: Task, seeds: list[int], jobs: int, reading: bool):
        self.task, self.seeds, self.reading = task, seeds, reading
        self.pool, self.failed = ThreadPoolExecutor(jobs), False
        task.work.mkdir(parents=True, exist_ok=True)
        cached_run, pause = task.run, task.work.parent / "pause"

        def careful(place: Path, argv: list[str]) -> dict:
            """Return an existing result, else run, unless this is a report or new runs are paused."""
            if not place.with_name(place.name + ".json").exists():
                if reading:
                    raise LookupError(place.name)
                while pause.exists():
                    time.sleep(2)
            return cached_run(place, argv)

        task.run = careful

    def each(self, function: Callable, items: list[tuple]) -> list:
        """Return ``function(*item)`` of all items, in order; None for results that a report does not find."""

        def one(item: tuple):
            try:
                return function(*item)
            except LookupError:
                return None
            except SystemExit as failed:  # the other methods continue; the exit code reports the failure
                print(f"FAILED {failed}", file=sys.stderr, flush=True)
                self.failed = True
                return None

        return list(self.pool.map(one, items))

    def prepare(self) -> None:
        """Create teacher, starts and the teacher cache on disk, before the runs that share them."""
        self.task.teacher()
        self.each(self.task.start, [(seed,) for seed in self.seeds])
        self.task.warm(self.seeds[0])

    def rates(self) -> dict[str, dict[str, float]]:
        """Return method → learning rate → score on validation rows."""
        requested = [(name, lr) for lr in self.task.grid for name in ALL]
        argv = [(ALL[name], self.seeds[0], lr, self.task.steps) for name, lr in requested]
        found: dict[str, dict[str, float]] = {name: {} for name in ALL}
        for (name, lr), outcome in zip(requested, self.each(self.task.train, argv), strict=True):
            if outcome is not None:
                found[name][lr] = self.task.valid_score(outcome[1])
        return found

    def best(self) -> dict[str, str]:
        """Return method → its best learning rate, if the whole grid was run."""
        whole = {n: scores for n, scores in self.rates().items() if len(scores) == len(self.task.grid)}
        return {name: min(scores, key=lambda lr: (scores[lr], float(lr))) for name, scores in whole.items()}

    def equal_steps(self) -> dict[tuple[str, int], Done]:
        """Run every method at its rate with every seed.

        Seed by seed, so that an interrupted table is complete for fewer seeds.
        """
        rates = self.best()
        requested = [(name, seed) for seed in self.seeds for name in rates]
        argv = [(ALL[name], seed, rates[name], self.task.steps) for name, seed in requested]
        return self._done(requested, [rates[name] for name, _ in requested], self.each(self.task.train, argv))

    def costs(self, *, measure: bool = False) -> dict[str, float]:
        """Return method → seconds per step: short runs, one at a time, all methods in turns, the better of two rounds.

        measure: run missing cases; else only existing results are returned.
        """
        found: dict[str, list[float]] = {}
        for turn in range(2):
            for name, argv in ALL.items():
                # Any rate: cost does not depend on it. Nothing is scored.
                requested = (argv, self.seeds[0], self.task.grid[0], COST_STEPS, None, f"cost{turn}", NO_REPORT)
                if not measure and not self.task.has(*requested):
                    continue
                outcome = self.each(self.task.train, [requested])[0]
                if outcome is not None:
                    found.setdefault(name, []).append(outcome[1]["train_s"] / COST_STEPS)
        return {name: min(seconds) for name, seconds in found.items()}

    def equal_seconds(self, seconds: float) -> dict[tuple[str, int], Done]:
        """Run every method at its rate for the same wall time, by its own cost of a step."""
        # A round number: the same on the next day, when the last digits of a timing differ.
        steps = {name: max(round(seconds / cost, -1), 10) for name, cost in self.costs(measure=True).items()}
        rates = self.best()
        requested = [(name, seed) for seed in self.seeds for name in steps if name in rates]
        argv = [(ALL[name], seed, rates[name], int(steps[name])) for name, seed in requested]
        return self._done(requested, [rates[name] for name, _ in requested], self.each(self.task.train, argv))

    def ablations(self, groups: list[str]) -> dict[tuple[str, str, int], Done]:
        """Return (group, what, seed) → run. Rates: that of kl for α = 0, else that of distillm.

        groups: prefixes of the names of groups to run.
        """
        rates = self.best()
        if not {"kd", "distillm"} <= rates.keys():
            return {}
        members = {name: runs for name, runs in ABLATIONS.items() if name.startswith(tuple(groups))}
        requested = [(group, what, seed) for seed in self.seeds for group, runs in members.items() for what in runs]
        lrs, arguments = [], []
        for group, what, seed in requested:
            argv = ABLATIONS[group][what]
            lr = rates["kd" if argv == ALL["kd"] or what.endswith("α=0") else "distillm"]
            scratch, steps = what.endswith("without SFT"), self.task.steps * (4 if what.endswith(LONGER) else 1)
            lrs.append(lr)
            arguments.append((argv, seed, lr, steps + self.task.start_steps * scratch, SCRATCH if scratch else None))
        # The same run may be in several groups: it runs once.
        unique = list(dict.fromkeys(arguments))
        outcomes = dict(zip(unique, self.each(self.task.train, unique), strict=True))
        return self._done(requested, lrs, [outcomes[key] for key in arguments])

    def scored(self, runs: dict[tuple, Done]) -> dict[tuple[Path, str], dict]:
        """Return (model, pass) → test figures."""
        requested = list(dict.fromkeys((done.place, name) for done in runs.values() for name in self.task.passes))
        found = self.each(lambda place, name: self.task.score(place, place.name, name), requested)
        return {key: figures for key, figures in zip(requested, found, strict=True) if figures is not None}

    def reference_models(self) -> dict[tuple[str, int], Path | str]:
        """Return teacher and starts, the first rows of a table."""
        keys = [("teacher", 0), *(("start", seed) for seed in self.seeds)]
        make = lambda name, seed: self.task.teacher() if name == "teacher" else self.task.start(seed)  # noqa: E731
        return {key: place for key, place in zip(keys, self.each(make, keys), strict=True) if place is not None}

    def scored_references(self) -> dict[tuple[str, int, str], dict]:
        """Return (name, seed, pass) → test figures of ``also``."""
        places = self.reference_models()
        requested = [(key, name) for key in places for name in self.task.passes]
        tags = [(places[key], key[0] if key[0] == "teacher" else f"start-{key[1]}", name) for key, name in requested]
        found = self.each(self.task.score, tags)
        return {(*key, name): f for (key, name), f in zip(requested, found, strict=True) if f is not None}

    @staticmethod
    def _done(requested: list[tuple], lrs: list[str], outcomes: list) -> dict:
        return {
            key: Done(*outcome, lr)
            for key, lr, outcome in zip(requested, lrs, outcomes, strict=True)
            if outcome is not None
        }


def _thousands(values: list[float]) -> str:
    return f"{statistics.mean(values) / 1000:,.0f}" if any(values) else "–"


def _cells(task: Task, figures: list[list[dict]]) -> list[str]:
    """Return a row's test figures: per pass each metric over the seeds, then the entropy at T = 1."""
    cells = []
    for found in figures:
        for metric in task.metrics:
            cells.append(mean_sd([f[metric]["mean"] for f in found]) if found else "–")
    first = figures[task.passes.index("T=1")]
    return [*cells, mean_sd([f["entropy"] for f in first]) if first else "–"]


def _head(task: Task, *columns: str) -> list[str]:
    names = [f"{plugins.metrics[metric].label} {name}" for name in task.passes for metric in task.metrics]
    titles = [*columns, *names, "entropy T=1"]
    return ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]


def _rows(bench: Bench, runs: dict[tuple, Done], scores: dict, names: list) -> Iterator[tuple]:
    """Yield (name, its runs over the seeds, its figures by pass) for every name with at least one scored run."""
    for name in names:
        mine = [done for key, done in runs.items() if key[:-1] == (name if isinstance(name, tuple) else (name,))]
        figures = [[scores[d.place, p] for d in mine if (d.place, p) in scores] for p in bench.task.passes]
        if any(figures):
            yield name, mine, figures


def table(bench: Bench, runs: dict[tuple[str, int], Done], scores: dict, *, steps: bool = False) -> str:
    """Return the table of methods in the registry's order, with teacher and start first."""
    task, reference_models = bench.task, bench.scored_references()
    costs = {} if steps else bench.costs()
    second = ["steps"] if steps else ["s / 100 steps"] if costs else []
    columns = ["method", "lr", *second, "sampled, k tokens: student", "teacher"]
    gains = [f"{name}, to {task.reference}" for name in task.passes] if task.reference else []
    lines = _head(task, *columns)
    lines = [lines[0] + "".join(f" {gain} |" for gain in gains), lines[1] + "---|" * len(gains)]
    for name in ("teacher", "start"):
        figures = [[f for (n, _, p), f in reference_models.items() if (n, p) == (name, mode)] for mode in task.passes]
        if any(figures):
            empty, cells = " – |" * (len(columns) - 1), " | ".join(_cells(task, figures))
            lines.append(f"| {name} |{empty} {cells} |" + " – |" * len(gains))
    for name, mine, figures in _rows(bench, runs, scores, list(ALL)):
        cost = f"{100 * costs[name]:.1f}" if name in costs else "–"
        sampled = [_thousands([d.result[k] for d in mine]) for k in ("sampled_tokens", "teacher_sampled_tokens")]
        ran = f"{mine[0].result['steps']:,}" if steps else cost
        cells = [name, mine[0].lr, *([ran] if second else []), *sampled, *_cells(task, figures)]
        if gains:
            cells += [_gain(bench, runs, scores, name, mode) for mode in task.passes]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _gain(bench: Bench, runs: dict[tuple[str, int], Done], scores: dict, name: str, mode: str) -> str:
    """Return the difference of a method's first metric to the reference method's with the same seed: mean ± deviation."""
    metric, other = bench.task.metrics[0], bench.task.reference

    def figure(of: str, seed: int) -> float | None:
        done = runs.get((of, seed))
        found = None if done is None else scores.get((done.place, mode))
        return None if found is None else found[metric]["mean"]

    pairs = [(figure(name, seed), figure(other, seed)) for seed in bench.seeds]
    return mean_sd([mine - its for mine, its in pairs if mine is not None and its is not None], sign=True)


def rates_table(bench: Bench) -> str:
    """Return the table of scores on validation rows by learning rate."""
    task, sign = bench.task, 1 if bench.task.lower else -1
    lines = [f"| method | {' | '.join(task.grid)} |", "|---" * (len(task.grid) + 1) + "|"]
    for name, scores in bench.rates().items():
        best = min(scores.values(), default=None)
        cells = [
            "–"
            if lr not in scores
            else f"**{sign * scores[lr]:.2f}**"
            if scores[lr] == best
            else f"{sign * scores[lr]:.2f}"
            for lr in task.grid
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ablations_table(bench: Bench, runs: dict, scores: dict) -> str:
    """Return the table of ablations, by group."""
    lines = _head(bench.task, "what", "", "lr", "seeds", "rollout / replay steps")
    names = [(group, what) for group, members in ABLATIONS.items() for what in members]
    last = None
    for (group, what), mine, figures in _rows(bench, runs, scores, names):
        drawn = [statistics.mean(d.result[f"{source}_steps"] for d in mine) for source in ("rollout", "replay")]
        step_counts = f"{drawn[0]:.0f} / {drawn[1]:.0f}" if any(drawn) else "–"
        cells = [
            "" if group == last else group,
            what,
            mine[0].lr,
            str(len(mine)),
            step_counts,
            *_cells(bench.task, figures),
        ]
        lines.append("| " + " | ".join(cells) + " |")
        last = group
    return "\n".join(lines)


def compare(bench: Bench, blocks: dict[str, str]) -> tuple[dict, dict]:
    """Run the common part of a task: rates, runs, scores, table."""
    name = bench.task.name
    runs = bench.equal_steps()
    scores = bench.scored(runs)
    blocks[f"{name}: learning rates"] = rates_table(bench)
    blocks[f"{name}: equal steps"] = table(bench, runs, scores)
    return runs, scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="+", choices=[*PARTS, "all"], metavar="PART", help="parts to run; all: every part"
    )
    parser.add_argument("--report", action="store_true", help="write existing results without new runs")
    parser.add_argument("--data", type=Path, help="G2P rows: train.jsonl, valid.jsonl, test.jsonl")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--steps", type=int, default=1000, help="steps of a G2P run")
    parser.add_argument("--grid", nargs="+", metavar="LR", help="learning rates, instead of the task's own")
    parser.add_argument("--groups", nargs="+", default=[""], metavar="WORD", help="groups of ablations, by prefix")
    parser.add_argument("--seconds", type=float, default=60.0, help="wall time of a run in `seconds`")
    parser.add_argument("--jobs", type=int, default=2, help="parallel runs")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per run")
    args = parser.parse_args()
    parts = PARTS if "all" in args.parts else args.parts
    blocks: dict[str, str] = {}
    figures: dict[str, tuple[Bench, dict, dict]] = {}

    def open_bench(task: Task, seeds: list[int]) -> Bench:
        task.grid = tuple(args.grid or task.grid)
        bench = Bench(task, seeds, args.jobs, args.report)
        if not args.report:
            bench.prepare()
        return bench

    if {"g2p", "costs", "seconds", "ablations"} & set(parts):
        if args.data is None:
            parser.error("--data DIR with the rows of G2P is required")
        bench = open_bench(tasks.g2p(args.data, args.work / "g2p", args.threads, args.steps), args.seeds)
        if "costs" in parts:
            bench.costs(measure=True)
        if "g2p" in parts:
            figures["g2p"] = (bench, *compare(bench, blocks))
        if "ablations" in parts:
            two = Bench(replace(bench.task, passes=("T=1", "greedy")), args.seeds, args.jobs, args.report)
            runs = two.ablations(args.groups)
            scores = two.scored(runs)
            blocks["g2p: ablations"] = ablations_table(two, runs, scores)
            figures["ablations"] = (two, runs, scores)
        if "seconds" in parts:
            runs = bench.equal_seconds(args.seconds)
            scores = bench.scored(runs)
            blocks["g2p: equal seconds"] = table(bench, runs, scores, steps=True)
            figures["seconds"] = (bench, runs, scores)
    if "builtin" in parts:
        bench = open_bench(tasks.builtin(args.work / "builtin", args.threads), args.seeds)
        figures["builtin"] = (bench, *compare(bench, blocks))
    if "dolly" in parts:
        bench = open_bench(tasks.dolly(args.work / "dolly", args.threads), args.seeds)
        figures["dolly"] = (bench, *compare(bench, blocks))
    write_blocks(PAGE, blocks)
    from plots import draw

    draw(figures, PLOTS)
    raise SystemExit(any(bench.failed for bench, _, _ in figures.values()))


if __name__ == "__main__":
    main()
