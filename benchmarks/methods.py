"""Every method beside every other, on one engine: benchmarks/METHODS.md and its plots.

    python benchmarks/methods.py g2p ablations seconds builtin dolly --work DIR --data DIR [--jobs 2] [--threads 1]
    python benchmarks/methods.py all --report --work DIR --data DIR    (tables and plots of what is there, nothing is run)

Parts (each grows from what is there; a stopped one goes on, finished runs are read back):

g2p        all methods from one SFT start, equal optimizer steps, three seeds; the learning rate of each from one small grid
           by its greedy score on validation rows, first seed
costs      seconds of a step of each method, on an otherwise quiet machine
seconds    the methods at their rates, equal wall time: steps of each = seconds ÷ its own cost of a step
ablations  of the paper, in small: α, replay, schedule, SFT start, buffer, bulk
builtin    as ``g2p``, on the built-in rows
dolly      as ``g2p``, on Dolly with small models, DISTILLM_DATA set

The teacher's states for data set rows are computed once and read by every run (``teacher.cache``), so the cost of methods
that train on rows holds no teacher; what is sampled in training is not known beforehand, and is paid for. Costs are of the
training loop, measured apart, one run at a time: the other runs go side by side, and their clocks say little. A file
WORK/pause holds new runs back until it is gone (for a quiet moment on the machine).
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import tasks
from lab import mean_sd
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
    """DistiLLM, half of the steps on student outputs from the start, so that what happens to them can be told apart."""
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
    "cross-entropy beside atkd": {
        "atkd alone": ALL["atkd"],
        "half and half": (*ALL["atkd"], "--set", "objective.kd_weight=0.5"),
    },
    "start (kl, adaptive skl)": {
        "SFT, then kl": ALL["kd"],
        "kl from nothing": ALL["kd"],
        "SFT, then adaptive skl": ALL["distillm"],
        "adaptive skl from nothing": ALL["distillm"],
    },
}


@dataclass(frozen=True)
class Done:
    """A finished run: where its model is, what ``--json`` said, its learning rate."""

    place: Path
    result: dict
    lr: str


class Bench:
    """Runs of one task, side by side, results kept."""

    def __init__(self, task: Task, seeds: list[int], jobs: int, reading: bool):
        self.task, self.seeds, self.reading = task, seeds, reading
        self.pool, self.failed = ThreadPoolExecutor(jobs), False
        task.work.mkdir(parents=True, exist_ok=True)
        kept, pause = task.run, task.work.parent / "pause"

        def careful(place: Path, argv: list[str]) -> dict:
            """What is there, else a run, unless this is a report or somebody wants quiet."""
            if not place.with_name(place.name + ".json").exists():
                if reading:
                    raise LookupError(place.name)
                while pause.exists():
                    time.sleep(2)
            return kept(place, argv)

        task.run = careful

    def each(self, function: Callable, items: list[tuple]) -> list:
        """``function(*item)`` of all, in order; None where a report finds nothing."""

        def one(item: tuple):
            try:
                return function(*item)
            except LookupError:
                return None
            except SystemExit as failed:  # one method's failure is not the others'; the exit code tells of it
                print(f"FAILED {failed}", file=sys.stderr, flush=True)
                self.failed = True
                return None

        return list(self.pool.map(one, items))

    def prepare(self) -> None:
        """Teacher, starts, the teacher's states on disk: each before the runs that share it."""
        self.task.teacher()
        self.each(self.task.start, [(seed,) for seed in self.seeds])
        self.task.warm(self.seeds[0])

    def rates(self) -> dict[str, dict[str, float]]:
        """method → learning rate → its score on validation rows, as the task reports it."""
        wanted = [(name, lr) for lr in self.task.grid for name in ALL]
        argv = [(ALL[name], self.seeds[0], lr, self.task.steps) for name, lr in wanted]
        found: dict[str, dict[str, float]] = {name: {} for name in ALL}
        for (name, lr), outcome in zip(wanted, self.each(self.task.train, argv), strict=True):
            if outcome is not None:
                found[name][lr] = self.task.valid_score(outcome[1])
        return found

    def best(self) -> dict[str, str]:
        """method → its learning rate, where the whole grid was tried."""
        whole = {n: scores for n, scores in self.rates().items() if len(scores) == len(self.task.grid)}
        return {name: min(scores, key=lambda lr: (scores[lr], float(lr))) for name, scores in whole.items()}

    def equal_steps(self) -> dict[tuple[str, int], Done]:
        """Every method at its rate, every seed. Seed by seed, so that a stopped table is whole for fewer seeds."""
        rates = self.best()
        wanted = [(name, seed) for seed in self.seeds for name in rates]
        argv = [(ALL[name], seed, rates[name], self.task.steps) for name, seed in wanted]
        return self._done(wanted, [rates[name] for name, _ in wanted], self.each(self.task.train, argv))

    def costs(self, *, measure: bool = False) -> dict[str, float]:
        """method → seconds per step: short runs, one at a time, all methods in turns, the better of two rounds.

        measure: run what is missing; else only what is there is told.
        """
        found: dict[str, list[float]] = {}
        for turn in range(2):
            for name, argv in ALL.items():
                # Any rate: cost does not depend on it. Nothing is scored.
                wanted = (argv, self.seeds[0], self.task.grid[0], COST_STEPS, None, f"cost{turn}", NO_REPORT)
                if not measure and not self.task.has(*wanted):
                    continue
                outcome = self.each(self.task.train, [wanted])[0]
                if outcome is not None:
                    found.setdefault(name, []).append(outcome[1]["train_s"] / COST_STEPS)
        return {name: min(seconds) for name, seconds in found.items()}

    def equal_seconds(self, seconds: float) -> dict[tuple[str, int], Done]:
        """Every method at its rate for the same wall time, by its own cost of a step."""
        # A round number: the same on the next day, when the last digits of a timing differ.
        steps = {name: max(round(seconds / cost, -1), 10) for name, cost in self.costs(measure=True).items()}
        rates = self.best()
        wanted = [(name, seed) for seed in self.seeds for name in steps if name in rates]
        argv = [(ALL[name], seed, rates[name], int(steps[name])) for name, seed in wanted]
        return self._done(wanted, [rates[name] for name, _ in wanted], self.each(self.task.train, argv))

    def ablations(self, groups: list[str]) -> dict[tuple[str, str, int], Done]:
        """(group, what, seed) → the run. Rates: kl's for α = 0, else what the grid gave distillm.

        groups: how the names begin of those that are wanted.
        """
        rates = self.best()
        if not {"kd", "distillm"} <= rates.keys():
            return {}
        members = {name: runs for name, runs in ABLATIONS.items() if name.startswith(tuple(groups))}
        wanted = [(group, what, seed) for seed in self.seeds for group, runs in members.items() for what in runs]
        lrs, asked = [], []
        for group, what, seed in wanted:
            argv = ABLATIONS[group][what]
            lr = rates["kd" if argv == ALL["kd"] or what.endswith("α=0") else "distillm"]
            scratch, steps = what.endswith("from nothing"), self.task.steps * (4 if what.endswith(LONGER) else 1)
            lrs.append(lr)
            asked.append((argv, seed, lr, steps + self.task.start_steps * scratch, SCRATCH if scratch else None))
        # The same run may stand in several groups: it runs once.
        unique = list(dict.fromkeys(asked))
        outcomes = dict(zip(unique, self.each(self.task.train, unique), strict=True))
        return self._done(wanted, lrs, [outcomes[key] for key in asked])

    def scored(self, runs: dict[tuple, Done]) -> dict[tuple[Path, str], dict]:
        """(model, pass) → test figures."""
        wanted = list(dict.fromkeys((done.place, name) for done in runs.values() for name in self.task.passes))
        found = self.each(lambda place, name: self.task.score(place, place.name, name), wanted)
        return {key: figures for key, figures in zip(wanted, found, strict=True) if figures is not None}

    def also(self) -> dict[tuple[str, int], Path | str]:
        """Teacher and starts, which stand above a table."""
        keys = [("teacher", 0), *(("start", seed) for seed in self.seeds)]
        make = lambda name, seed: self.task.teacher() if name == "teacher" else self.task.start(seed)  # noqa: E731
        return {key: place for key, place in zip(keys, self.each(make, keys), strict=True) if place is not None}

    def scored_also(self) -> dict[tuple[str, int, str], dict]:
        """(name, seed, pass) → test figures of ``also``."""
        places = self.also()
        wanted = [(key, name) for key in places for name in self.task.passes]
        tags = [(places[key], key[0] if key[0] == "teacher" else f"start-{key[1]}", name) for key, name in wanted]
        found = self.each(self.task.score, tags)
        return {(*key, name): f for (key, name), f in zip(wanted, found, strict=True) if f is not None}

    @staticmethod
    def _done(wanted: list[tuple], lrs: list[str], outcomes: list) -> dict:
        return {
            key: Done(*outcome, lr)
            for key, lr, outcome in zip(wanted, lrs, outcomes, strict=True)
            if outcome is not None
        }


def _thousands(values: list[float]) -> str:
    return f"{statistics.mean(values) / 1000:,.0f}" if any(values) else "–"


def _cells(task: Task, figures: list[list[dict]]) -> list[str]:
    """A row's test figures: per pass each metric over the seeds, at the end the entropy at T = 1."""
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
    """(name, its runs over the seeds, its figures by pass) of every name with at least one scored run."""
    for name in names:
        mine = [done for key, done in runs.items() if key[:-1] == (name if isinstance(name, tuple) else (name,))]
        figures = [[scores[d.place, p] for d in mine if (d.place, p) in scores] for p in bench.task.passes]
        if any(figures):
            yield name, mine, figures


def table(bench: Bench, runs: dict[tuple[str, int], Done], scores: dict, *, steps: bool = False) -> str:
    """Methods in the registry's order, teacher and start first."""
    task, also = bench.task, bench.scored_also()
    costs = {} if steps else bench.costs()
    second = ["steps"] if steps else ["s / 100 steps"] if costs else []
    columns = ["method", "lr", *second, "sampled, k tokens: student", "teacher"]
    gains = [f"{name}, to {task.beside}" for name in task.passes] if task.beside else []
    lines = _head(task, *columns)
    lines = [lines[0] + "".join(f" {gain} |" for gain in gains), lines[1] + "---|" * len(gains)]
    for name in ("teacher", "start"):
        figures = [[f for (n, _, p), f in also.items() if (n, p) == (name, way)] for way in task.passes]
        if any(figures):
            empty, cells = " – |" * (len(columns) - 1), " | ".join(_cells(task, figures))
            lines.append(f"| {name} |{empty} {cells} |" + " – |" * len(gains))
    for name, mine, figures in _rows(bench, runs, scores, list(ALL)):
        cost = f"{100 * costs[name]:.1f}" if name in costs else "–"
        sampled = [_thousands([d.result[k] for d in mine]) for k in ("sampled_tokens", "teacher_sampled_tokens")]
        ran = f"{mine[0].result['steps']:,}" if steps else cost
        cells = [name, mine[0].lr, *([ran] if second else []), *sampled, *_cells(task, figures)]
        if gains:
            cells += [_gain(bench, runs, scores, name, way) for way in task.passes]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _gain(bench: Bench, runs: dict[tuple[str, int], Done], scores: dict, name: str, way: str) -> str:
    """A method's first metric less that of the method it is set beside, of the same seed: mean ± deviation."""
    metric, other = bench.task.metrics[0], bench.task.beside

    def figure(of: str, seed: int) -> float | None:
        done = runs.get((of, seed))
        found = None if done is None else scores.get((done.place, way))
        return None if found is None else found[metric]["mean"]

    pairs = [(figure(name, seed), figure(other, seed)) for seed in bench.seeds]
    return mean_sd([mine - its for mine, its in pairs if mine is not None and its is not None], sign=True)


def rates_table(bench: Bench) -> str:
    """What each learning rate scored on the validation rows."""
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
    """Group by group."""
    lines = _head(bench.task, "what", "", "lr", "seeds", "rollout / replay steps")
    names = [(group, what) for group, members in ABLATIONS.items() for what in members]
    last = None
    for (group, what), mine, figures in _rows(bench, runs, scores, names):
        drawn = [statistics.mean(d.result[f"{source}_steps"] for d in mine) for source in ("rollout", "replay")]
        told = f"{drawn[0]:.0f} / {drawn[1]:.0f}" if any(drawn) else "–"
        cells = ["" if group == last else group, what, mine[0].lr, str(len(mine)), told, *_cells(bench.task, figures)]
        lines.append("| " + " | ".join(cells) + " |")
        last = group
    return "\n".join(lines)


def write(blocks: dict[str, str]) -> None:
    """Puts each block between its marks in METHODS.md; the prose around them is written by hand and stays."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        whole = f"{begin}\n{block}\n{end}"
        if begin in text:
            text = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: whole, text, flags=re.DOTALL)  # noqa: B023
        else:
            text += f"\n{whole}\n"
    PAGE.write_text(text, encoding="utf-8")


def compare(bench: Bench, blocks: dict[str, str]) -> tuple[dict, dict]:
    """The part of a task that all three have: rates, runs, scores, table."""
    name = bench.task.name
    runs = bench.equal_steps()
    scores = bench.scored(runs)
    blocks[f"{name}: learning rates"] = rates_table(bench)
    blocks[f"{name}: equal steps"] = table(bench, runs, scores)
    return runs, scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "all"], metavar="PART", help="all: every one")
    parser.add_argument("--report", action="store_true", help="write what is there, run nothing")
    parser.add_argument("--data", type=Path, help="of G2P: train.jsonl, valid.jsonl, test.jsonl")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--steps", type=int, default=1000, help="of a G2P run")
    parser.add_argument("--grid", nargs="+", metavar="LR", help="of learning rates, instead of the task's own")
    parser.add_argument("--groups", nargs="+", default=[""], metavar="WORD", help="of ablations: those that begin so")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a run in `seconds`")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
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
            parser.error("--data DIR holds the rows of G2P")
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
    write(blocks)
    from plots import draw

    draw(figures, PLOTS)
    raise SystemExit(any(bench.failed for bench, _, _ in figures.values()))


if __name__ == "__main__":
    main()
