"""Measure where student outputs pay: number of rows × schedule × objective, every model through the command line.

    python benchmarks/regimes.py g2p sums --work DIR --data DIR [--rows 500 2000] [--seeds 10 11 12]
        [--arms sft "kl off" "kl off x2" "kl auto" …] [--grid 4e-3]
    python benchmarks/regimes.py g2p --report [--plots benchmarks/plots]

Tasks: letters → phonemes (``g2p``; ``g2p-small`` and ``g2p-large`` with another size of student), running sums with long
answers (``sums``), intents (``banking77``), the built-in kinds of questions (``questions``), and instructions with free
answers (``dolly``). Per task and number of rows: one
teacher, trained on all rows (``questions``: the one in the package); per seed a student from scratch, fine-tuned for
ten epochs on the chosen rows; then SFT and every objective with every schedule from that start, for the same number of
optimizer steps. An arm with ``xN`` has N times the steps, for comparisons at equal seconds; one with ``key=value`` has
that setting, as in ``"skl off objective.temperature=2"`` or ``"kl off objective.tokens=entropy:0.5 x1.2"``. The
learning rate of an arm is the best of the grid on validation rows, first seed, for its objective and settings without
student outputs; with a single rate in ``--grid`` there is no choice.

Every finished run is a line of ``results/regimes.jsonl``, which has no models: a run with a line is not repeated, and
the report needs nothing else. Seeds come first, so that an interrupted map is complete for fewer seeds. Times are those
of the training loop, teacher states cached; compare them within one run of this script alone. The columns ``cost``
(steps, with FRESH_COST for one on fresh student outputs) and ``sampled`` (tokens of the student, in training) do not
depend on other programs. A map can be continued on another machine, where the same commands train another teacher: each
line has its teacher's greedy test figure. --report writes two tables to METHODS.md: all arms, and each arm's gain over
the best arm on rows of at least its cost, in points by seed, with a 95 % interval. --plots DIR draws these gains against
the number of rows, and the error against the cost.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import running_sums
import tasks
from lab import mean_sd, write_blocks
from tasks import Task

from distillm_cli import plugins
from distillm_cli.config.fields import is_lower_better

HERE = Path(__file__).resolve().parent
PAGE, RESULTS = HERE / "METHODS.md", HERE / "results" / "regimes.jsonl"
DIVERGENCES = {"kl": [], "rkl": [], "skl": ["--alpha", "0.1"], "srkl": ["--alpha", "0.1"], "ab": []}
SCHEDULES = {
    "off": ["--schedule", "off"],
    "on": ["--schedule", "on"],
    "mixed": ["--schedule", "mixed"],
    "adaptive": ["--schedule", "adaptive"],
    "gap": ["--schedule", "adaptive", *tasks.sets("schedule.trigger=gap")],
    "gain": ["--schedule", "adaptive", *tasks.sets("schedule.trigger=gain", "schedule.phi=0.5")],
    "auto": ["--schedule", "auto"],
    "prefix": ["--schedule", "auto", *tasks.sets("rollout.prefix=8")],
    "fresh": ["--schedule", "auto", *tasks.sets("schedule.freshness=true")],
}
SFT = "sft"
FRESH_COST = 3.0  # of a step on fresh student outputs, in steps on rows or replayed outputs (LOG.md, 2026-11-30)
RUN_FIGURES = ("train_s", "dataset_steps", "rollout_steps", "replay_steps", "sampled_tokens")
_T_QUANTILE = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36}  # 97.5 % quantile by degrees of freedom
ROWS = (500, 1000, 2000, 4000, 8000, 30000)


def subset(source: Path, place: Path, rows: int) -> Path:
    """Return a directory with the first ``rows`` of the training rows, shuffled once, and the other splits."""
    if not (place / "train.jsonl").exists():
        place.mkdir(parents=True, exist_ok=True)
        lines = (source / "train.jsonl").read_text(encoding="utf-8").splitlines()
        chosen = random.Random(7).sample(lines, len(lines))[:rows]
        for name in ("valid", "test"):
            (place / f"{name}.jsonl").write_bytes((source / f"{name}.jsonl").read_bytes())
        (place / "train.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return place


def g2p(data: Path, work: Path, threads: int) -> Task:
    """Return letters → phonemes with all rows."""
    return replace(tasks.g2p(data / "g2p", work / "g2p", threads), steps=1240)


def g2p_small(data: Path, work: Path, threads: int) -> Task:
    """Return letters → phonemes with the same teacher and a student of 0.06 instead of 0.23 M parameters."""
    return replace(g2p(data, work, threads), name="g2p-small", student=["--model", "random:2x48"])


def g2p_large(data: Path, work: Path, threads: int) -> Task:
    """Return letters → phonemes with the same teacher and a student of 0.9 instead of 0.23 M parameters."""
    return replace(g2p(data, work, threads), name="g2p-large", student=["--model", "random:2x192"])


def sums(data: Path, work: Path, threads: int) -> Task:
    """Return running sums with all rows: teacher of 0.79 M parameters, student of 0.10 M, answers of about 200 tokens."""
    source = work / "sums-rows"
    if not (source / "train.jsonl").exists():
        running_sums.write(source, 30000)
    base = tasks.g2p(source, work / "sums", threads)
    lengths = {"--max-length": "320"}
    common = [lengths.get(before, word) for before, word in zip(["", *base.common], base.common, strict=False)]
    common += tasks.sets("rollout.max_new_tokens=240", "eval.max_new_tokens=240", "eval.report_rows=200")
    teacher = ["sft", "--model", "random:4x128", "--tokenizer", "chars", "--steps", "2000", "--lr", "2e-3", *common]
    scoring = ["--batch-size", "250", "--max-new-tokens", "240", "--dtype", "fp32"]
    scoring += tasks.sets("eval.no_repeat_ngram_size=0", "data.template=plain", f"train.threads={threads}")
    student = ["--model", "random:2x64"]
    return replace(base, name="sums", steps=1240, common=common, scoring=scoring, teacher_argv=teacher, student=student)


def banking77(data: Path, work: Path, threads: int) -> Task:
    """Return questions → intents, short answers in words: a control."""
    base = tasks.g2p(data / "banking77", work / "banking77", threads)
    lengths = {"--max-length": "160"}
    common = [lengths.get(before, word) for before, word in zip(["", *base.common], base.common, strict=False)]
    common += tasks.sets("eval.metrics=[exact_match]")
    scratch = ["--model", "random:4x256", "--tokenizer", "bpe:2000", "--steps", "1000", "--lr", "1e-3"]
    return replace(
        base, name="banking77", steps=1240, common=common, teacher_argv=["sft", *scratch, *common],
        metrics=("exact_match",),
    )  # fmt: skip


def questions(data: Path, work: Path, threads: int) -> Task:
    """Return the built-in kinds of questions, with their teacher of 0.79 M parameters and a student of 0.15 M."""
    return replace(tasks.builtin(work / "questions", threads, steps=3000), name="questions", passes=tuple(tasks.PASSES))


def dolly(data: Path, work: Path, threads: int) -> Task:
    """Return Dolly with all 11,435 rows: teacher of 3.7 M parameters, student of 0.65 M, answers of up to 64 tokens."""
    rows = work / "dolly-rows"
    if not (rows / "train.jsonl").exists():
        rows.mkdir(parents=True, exist_ok=True)
        for name, split in (("dev", "valid"), ("valid", "test"), ("train", "train")):  # MiniLLM's names of the files
            (rows / f"{split}.jsonl").write_bytes((data / "dolly" / f"{name}.jsonl").read_bytes())
    base = tasks.dolly(work / "dolly", threads, steps=1240)
    common, teacher = _with_data(base.common, rows), _with_data(base.teacher_argv, rows)
    return replace(base, common=common, teacher_argv=teacher, passes=tuple(tasks.PASSES))


TASKS = {
    "g2p": g2p,
    "g2p-small": g2p_small,
    "g2p-large": g2p_large,
    "sums": sums,
    "banking77": banking77,
    "questions": questions,
    "dolly": dolly,
}


class Results:
    """Hold the finished runs of a file, one JSON object per line. Several threads may use it."""

    def __init__(self, file: Path):
        self.file = file
        self.lines: list[dict] = []
        self._lock = threading.Lock()
        if file.exists():
            self.lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    def find(self, **key: object) -> dict | None:
        """Return the first line with these values."""
        return next((line for line in self.lines if all(line.get(k) == v for k, v in key.items())), None)

    def add(self, line: dict) -> dict:
        """Append a line to the file, and return it."""
        with self._lock:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.lines.append(line)
        return line

    def arms(self, task: str, rows: int, seeds: list[int]) -> dict[str, list[dict]]:
        """Return the runs of a regime by arm, ordered by seed."""
        chosen = [line for line in self.lines if (line["task"], line["rows"], line["kind"]) == (task, rows, "run")]
        chosen = sorted((line for line in chosen if line["seed"] in seeds), key=lambda line: line["seed"])
        names = sorted({line["arm"] for line in chosen}, key=lambda arm: (not is_on_rows(arm), arm))
        return {name: [line for line in chosen if line["arm"] == name] for name in names}


class Regime:
    """Hold the runs of one task with one number of rows. The teacher is that of all rows.

    source: directory of all rows; None for the built-in rows, of which any number can be generated.
    """

    def __init__(self, whole: Task, source: Path | None, rows: int):
        self.rows = rows
        self.whole = whole
        if source is None:
            common, suite = [*whole.common, *tasks.sets(f"data.size={rows}")], whole.suite
        else:
            place = subset(source, whole.work.parent / f"{whole.name}-{rows}-rows", rows)
            common, suite = _with_data(whole.common, place), str(place / "test.jsonl")
        self.task = replace(
            whole,
            work=whole.work.parent / f"{whole.name}-{rows}",
            common=common,
            teacher_path=whole.teacher(),
            start_steps=max(10 * rows // whole.batch, 100) if rows < 8000 else 10 * 8000 // whole.batch,
            suite=suite,
        )
        self.task.work.mkdir(parents=True, exist_ok=True)

    def argv(self, arm: str) -> tuple[str, ...]:
        """Return the arguments of an arm."""
        parts = Arm.parse(arm)
        if parts.divergence == SFT:
            return ("sft",)
        method = ["--method", "kd", "--divergence", parts.divergence, *DIVERGENCES[parts.divergence]]
        return ("distill", *method, *SCHEDULES[parts.schedule], *tasks.sets(*parts.settings))

    def rate(self, arm: str, seed: int, results: Results) -> str:
        """Return an arm's learning rate: the best of the grid for its objective and settings without student outputs."""
        if len(self.task.grid) == 1:
            return self.task.grid[0]
        parts = Arm.parse(arm)
        reference = SFT if parts.divergence == SFT else " ".join([parts.divergence, "off", *parts.settings])
        scores = {}
        for lr in self.task.grid:
            key = {"task": self.whole.name, "rows": self.rows, "arm": reference, "seed": seed, "lr": lr}
            tried = results.find(**key, kind="rate")
            if not tried:
                _, result = self.task.train(self.argv(reference), seed, lr, self.task.steps)
                tried = results.add(key | {"kind": "rate", "valid": self.task.valid_score(result)})
            scores[lr] = tried["valid"]
        return min(scores, key=lambda lr: (scores[lr], float(lr)))

    def measure(self, arm: str, seed: int, first_seed: int, results: Results) -> None:
        """Train and score an arm, unless it has a result."""
        key = {"task": self.whole.name, "rows": self.rows, "arm": arm, "seed": seed}
        if results.find(**key, kind="run"):
            return
        lr, steps = self.rate(arm, first_seed, results), round(self.task.steps * Arm.parse(arm).factor)
        place, result = self.task.train(self.argv(arm), seed, lr, steps)
        line = {**key, "kind": "run", "lr": lr, "steps": steps, "epochs": round(steps * self.task.batch / self.rows, 1)}
        line |= {name: result[name] for name in RUN_FIGURES}
        line["test"] = {name: self._scored(place, name) for name in self.task.passes}
        line["teacher"] = self.whole.score(self.whole.teacher(), "teacher", "greedy")[self.whole.metrics[0]]["mean"]
        results.add(line)

    def _scored(self, place: Path, name: str) -> dict[str, float]:
        """Return the test figures of a model with one decoding setting."""
        suite = self.task.score(place, place.name, name)
        found = {metric: suite[metric]["mean"] for metric in self.task.metrics}
        return found if name == "greedy" else found | {"entropy": suite["entropy"]}


@dataclass(frozen=True)
class Arm:
    """Hold the parts of an arm's name, ``sft`` or ``DIVERGENCE SCHEDULE [key=value …]`` with an optional ``xN``."""

    divergence: str
    schedule: str
    settings: tuple[str, ...]
    factor: float

    @classmethod
    def parse(cls, name: str) -> Arm:
        words, _, factor = name.partition(" x")
        divergence, *rest = words.split()
        schedule, *settings = rest or ["off"]  # of SFT
        return cls(divergence, schedule, tuple(settings), float(factor or 1))


def _with_data(words: list[str], place: Path) -> list[str]:
    """Return arguments with the value of ``--data`` replaced."""
    return [str(place) if before == "--data" else word for before, word in zip(["", *words], words, strict=False)]


def measure(regime: Regime, arms: list[str], seed: int, first_seed: int, results: Results) -> None:
    """Train and score the arms with one seed."""
    for arm in arms:
        regime.measure(arm, seed, first_seed, results)


def is_on_rows(arm: str) -> bool:
    """Return whether an arm has no student outputs."""
    return Arm.parse(arm).schedule == "off"


def cost(runs: list[dict]) -> float:
    """Return the mean cost of runs, in steps on rows."""
    return statistics.mean(r["dataset_steps"] + r["replay_steps"] + FRESH_COST * r["rollout_steps"] for r in runs)


def reference(arms: dict[str, list[dict]], arm: str, name: str) -> str | None:
    """Return the arm on rows with the best first metric of a decoding setting among those of at least 95 % of the cost.

    It has the arm's settings, such as a temperature, and every seed of the arm.
    """
    seeds = {run["seed"] for run in arms[arm]}
    settings = Arm.parse(arm).settings
    found = {
        other: _mean(runs, name)
        for other, runs in arms.items()
        if is_on_rows(other)
        and Arm.parse(other).divergence != SFT
        and Arm.parse(other).settings == settings
        and cost(runs) >= 0.95 * cost(arms[arm])
        and seeds <= {run["seed"] for run in runs}
    }
    if not found:
        return None
    metric = metrics(arms[arm])[0]
    return (min if is_lower_better(metric) else max)(found, key=lambda other: found[other])


def gains(arms: dict[str, list[dict]], arm: str, other: str, name: str) -> list[float]:
    """Return by seed how many points an arm is better than another one in the first metric of a decoding setting."""
    metric = metrics(arms[arm])[0]
    sign = -1 if is_lower_better(metric) else 1
    theirs = {run["seed"]: run["test"][name][metric] for run in arms[other]}
    return [sign * (run["test"][name][metric] - theirs[run["seed"]]) for run in arms[arm]]


def metrics(runs: list[dict]) -> list[str]:
    """Return the metrics of runs, the deciding one first."""
    return [name for name in next(iter(runs[0]["test"].values())) if name != "entropy"]


def half_width(values: list[float]) -> float:
    """Return half the width of the 95 % interval of a mean by Student's t; 0 of a single value."""
    if len(values) == 1:
        return 0.0
    return _T_QUANTILE[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5


def interval(values: list[float]) -> str:
    """Format a mean with the half width of its 95 % interval: ``+1.2 ± 0.4``."""
    mean = f"{statistics.mean(values):+.1f}"
    return f"{mean} ± {half_width(values):.1f}" if len(values) > 1 else mean


def _mean(runs: list[dict], name: str) -> float:
    return statistics.mean(run["test"][name][metrics(runs)[0]] for run in runs)


def table(regimes: dict[int, dict[str, list[dict]]]) -> str:
    """Return the table of a task's arms by number of rows."""
    first = next(iter(next(iter(regimes.values())).values()))
    columns = [(name, metric) for name in first[0]["test"] for metric in metrics(first)]
    head = ["rows", "arm", "seeds", "lr", "cost", "seconds", "steps: rows / rollouts / replay", "sampled"]
    head += [*(f"{plugins.metrics[metric].label} {name}" for name, metric in columns), "entropy T=1"]
    lines = [head, ["---"] * len(head)]
    for rows, arms in regimes.items():
        for arm, runs in arms.items():
            sources = [statistics.mean(r[f"{kind}_steps"] for r in runs) for kind in ("dataset", "rollout", "replay")]
            seconds = statistics.mean(run["train_s"] for run in runs)
            cells = [f"{rows:,}", arm, str(len(runs)), runs[0]["lr"], f"{cost(runs):,.0f}", f"{seconds:.0f}"]
            cells += [" / ".join(f"{n:,.0f}" for n in sources)]
            cells += [f"{statistics.mean(run['sampled_tokens'] for run in runs):,.0f}"]
            cells += [mean_sd([run["test"][name][metric] for run in runs]) for name, metric in columns]
            lines.append([*cells, mean_sd([run["test"]["T=1"]["entropy"] for run in runs])])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def gains_table(regimes: dict[int, dict[str, list[dict]]]) -> str:
    """Return the gain of each arm with student outputs over the best arm on rows of at least its cost."""
    passes = list(next(iter(next(iter(regimes.values())).values()))[0]["test"])
    lines = [["rows", "arm", "seeds", "against", *passes], ["---"] * (4 + len(passes))]
    for rows, arms in regimes.items():
        for arm in arms:
            against = None if is_on_rows(arm) else reference(arms, arm, passes[-1])
            if against:
                cells = [f"{rows:,}", arm, str(len(arms[arm])), against]
                lines.append([*cells, *(interval(gains(arms, arm, against, name)) for name in passes)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--work", type=Path, help="directory of the models, for new runs")
    parser.add_argument("--data", type=Path, help="directory of the data sets, for new runs")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="file of the finished runs [default: %(default)s]"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument(
        "--arms", nargs="+", default=[SFT, *(f"{d} {s}" for d in DIVERGENCES if d != "rkl" for s in SCHEDULES)]
    )
    parser.add_argument("--grid", nargs="+", help="learning rates [default: those of the task]")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plots", type=Path, help="with --report: directory of the plots")
    parser.add_argument("--report", action="store_true", help="write tables of the finished runs, without new ones")
    args = parser.parse_args()
    results = Results(args.results)
    for name in args.tasks:
        if args.report:
            write(name, results, args.rows, args.seeds, args.plots)
            continue
        if args.work is None or args.data is None:
            parser.error("new runs need --work and --data")
        run_arms(name, results, args)


def run_arms(name: str, results: Results, args: argparse.Namespace) -> None:
    """Measure what is missing of a task."""
    sources = {name: args.data / "g2p" for name in TASKS if name.startswith("g2p")}
    sources |= {"banking77": args.data / "banking77", "questions": None}
    sources |= {name: args.work.resolve() / f"{name}-rows" for name in ("sums", "dolly")}
    whole = TASKS[name](args.data.resolve(), args.work.resolve(), args.threads)
    whole = replace(whole, grid=tuple(args.grid)) if args.grid else whole
    whole.work.mkdir(parents=True, exist_ok=True)
    regimes = [Regime(whole, sources[name], rows) for rows in args.rows]
    jobs = [(regime, seed) for seed in args.seeds for regime in regimes]
    with ThreadPoolExecutor(args.jobs) as pool:
        for future in [pool.submit(measure, regime, args.arms, seed, args.seeds[0], results) for regime, seed in jobs]:
            future.result()


def write(name: str, results: Results, rows: list[int], seeds: list[int], plots: Path | None) -> None:
    """Write a task's tables to METHODS.md, and draw its plots."""
    regimes = {n: arms for n in rows if (arms := results.arms(name, n, seeds))}
    if not regimes:
        raise SystemExit(f"no runs of {name} with these rows and seeds in {results.file}")
    write_blocks(PAGE, {f"regimes: {name}, gains": gains_table(regimes), f"regimes: {name}": table(regimes)})
    if plots:
        from plots import draw_regimes

        draw_regimes(name, regimes, plots)


if __name__ == "__main__":
    main()
