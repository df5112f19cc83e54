"""Measure where student outputs pay: number of rows × schedule × objective, every model through the command line.

    python benchmarks/regimes.py g2p sums --work DIR --data DIR [--rows 500 2000] [--seeds 10 11 12] [--report]
        [--arms sft "kl off" "kl off x2" "kl auto" …] [--grid 4e-3]

Tasks: letters → phonemes (``g2p``), running sums with long answers (``sums``), intents (``banking77``), the built-in
kinds of questions (``questions``), and instructions with free answers (``dolly``). Per task and number of rows: one
teacher, trained on all rows (``questions``: the one in the package); per seed a student from scratch, fine-tuned for
ten epochs on the chosen rows; then SFT and every objective with every schedule from that start, for the same number of
optimizer steps. An arm with ``xN`` has N times the steps, for comparisons at equal seconds; one with ``key=value`` has
that setting, as in ``"skl off objective.temperature=2"`` or ``"kl off objective.tokens=entropy:0.5 x1.2"``. The
learning rate of each objective is the best of the grid on validation rows, first seed, without student outputs; with a
single rate in ``--grid`` there is no choice.

Results are cached per run, and the report prints what exists. Seeds come first, so that an interrupted map is complete for
fewer seeds. Times are those of the training loop, teacher states cached; compare them within one run of this script alone.
The columns ``cost`` (steps, with FRESH_COST for one on fresh student outputs) and ``sampled tokens`` (of the student, in
training) do not depend on other programs. --plots DIR draws the gain over the best arm on rows against the number of rows,
and the error against the cost.
"""

from __future__ import annotations

import argparse
import random
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import running_sums
import tasks
from lab import mean_sd
from tasks import Task

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
    return replace(tasks.builtin(work / "questions", threads, steps=3000), name="questions")


def dolly(data: Path, work: Path, threads: int) -> Task:
    """Return Dolly with all 11,435 rows: teacher of 3.7 M parameters, student of 0.65 M, answers of up to 64 tokens."""
    rows = work / "dolly-rows"
    if not (rows / "train.jsonl").exists():
        rows.mkdir(parents=True, exist_ok=True)
        for name, split in (("dev", "valid"), ("valid", "test"), ("train", "train")):  # MiniLLM's names of the files
            (rows / f"{split}.jsonl").write_bytes((data / "dolly" / f"{name}.jsonl").read_bytes())
    base = tasks.dolly(work / "dolly", threads, steps=1240)
    return replace(base, common=_with_data(base.common, rows), teacher_argv=_with_data(base.teacher_argv, rows))


TASKS = {"g2p": g2p, "sums": sums, "banking77": banking77, "questions": questions, "dolly": dolly}


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
        """Return the arguments of an arm: ``sft`` or ``DIVERGENCE SCHEDULE [key=value …]``, with an optional ``xN``."""
        divergence, *words = _factor(arm)[0].split()
        if divergence == SFT:
            return ("sft",)
        schedule, *settings = words
        method = ["--method", "kd", "--divergence", divergence, *DIVERGENCES[divergence]]
        return ("distill", *method, *SCHEDULES[schedule], *tasks.sets(*settings))

    def rate(self, arm: str, seed: int) -> str:
        """Return the learning rate of the arm's objective: the best of the grid without student outputs."""
        if len(self.task.grid) == 1:
            return self.task.grid[0]
        objective = arm.split()[0]
        reference = SFT if objective == SFT else f"{objective} off"
        scores = {}
        for lr in self.task.grid:
            _, result = self.task.train(self.argv(reference), seed, lr, self.task.steps)
            scores[lr] = self.task.valid_score(result)
        return min(scores, key=lambda lr: (scores[lr], float(lr)))

    def train(self, arm: str, seed: int, first_seed: int) -> tuple[Path, dict]:
        """Run an arm; return its directory and its ``--json`` object."""
        steps = round(self.task.steps * _factor(arm)[1])
        return self.task.train(self.argv(arm), seed, self.rate(arm, first_seed), steps)

    def score(self, place: Path, name: str) -> dict:
        return self.task.score(place, place.name, name)


def _factor(arm: str) -> tuple[str, float]:
    """Return an arm without its ``xN``, and N."""
    name, _, factor = arm.partition(" x")
    return name, float(factor or 1)


def _with_data(words: list[str], place: Path) -> list[str]:
    """Return arguments with the value of ``--data`` replaced."""
    return [str(place) if before == "--data" else word for before, word in zip(["", *words], words, strict=False)]


def measure(regime: Regime, arms: list[str], seed: int, first_seed: int) -> None:
    """Train and score the arms with one seed."""
    for arm in arms:
        place, _ = regime.train(arm, seed, first_seed)
        for name in regime.task.passes:
            regime.score(place, name)


def report(regime: Regime, arms: list[str], seeds: list[int]) -> None:
    """Print the table of one regime, from existing results."""
    task = regime.task
    columns = " | ".join([*(f"{metric} {name}" for name in task.passes for metric in task.metrics), "entropy T=1"])
    print(f"\n{task.name}, {regime.rows:,} rows, {task.steps * task.batch / regime.rows:.1f} epochs\n")
    print(f"| arm | seeds | cost | seconds | steps: rows / rollouts / replay | sampled tokens | {columns} |")
    print("|---" * (7 + len(task.passes) * len(task.metrics)) + "|")
    for arm in arms:
        done = finished(regime, arm, seeds)
        if not done:
            continue
        cells = [
            mean_sd([scores[name][metric]["mean"] for _, scores in done])
            for name in task.passes
            for metric in task.metrics
        ]
        cells.append(mean_sd([scores["T=1"]["entropy"] for _, scores in done]))
        sources = [statistics.mean(r[f"{kind}_steps"] for r, _ in done) for kind in ("dataset", "rollout", "replay")]
        facts = [f"{len(done)}", f"{cost(done):,.0f}", mean_sd([r["train_s"] for r, _ in done])]
        facts.append(" / ".join(f"{n:,.0f}" for n in sources))
        facts.append(f"{statistics.mean(r['sampled_tokens'] for r, _ in done):,.0f}")
        print(f"| {arm} | {' | '.join([*facts, *cells])} |")


def finished(regime: Regime, arm: str, seeds: list[int]) -> list[tuple[dict, dict]]:
    """Return the stored results and test figures of an arm, one per seed that has them."""
    done = []
    for seed in seeds:
        try:
            place, result = regime.train(arm, seed, seeds[0])
            done.append((result, {name: regime.score(place, name) for name in regime.task.passes}))
        except LookupError:
            continue
    return done


def cost(done: list[tuple[dict, dict]]) -> float:
    """Return the mean cost of runs, in steps on rows."""
    return statistics.mean(r["dataset_steps"] + r["replay_steps"] + FRESH_COST * r["rollout_steps"] for r, _ in done)


def plot(regimes: list[Regime], arms: list[str], seeds: list[int], place: Path) -> None:
    """Draw the two plots of a task's existing results."""
    from plots import draw_regimes

    points = {
        regime.rows: {arm: (cost(done), done) for arm in arms if (done := finished(regime, arm, seeds))}
        for regime in regimes
    }
    draw_regimes(regimes[0].task, points, place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument(
        "--arms", nargs="+", default=[SFT, *(f"{d} {s}" for d in DIVERGENCES if d != "rkl" for s in SCHEDULES)]
    )
    parser.add_argument("--grid", nargs="+", help="learning rates [default: those of the task]")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plots", type=Path, help="with --report: directory of the plots")
    parser.add_argument("--report", action="store_true", help="print tables of existing results, without new runs")
    args = parser.parse_args()
    sources = {"g2p": args.data / "g2p", "banking77": args.data / "banking77", "questions": None}
    sources |= {name: args.work.resolve() / f"{name}-rows" for name in ("sums", "dolly")}
    for name in args.tasks:
        whole = TASKS[name](args.data.resolve(), args.work.resolve(), args.threads)
        whole = replace(whole, grid=tuple(args.grid)) if args.grid else whole
        whole.work.mkdir(parents=True, exist_ok=True)
        regimes = [Regime(whole, sources[name], rows) for rows in args.rows]
        if args.report:
            for regime in regimes:
                regime.task.run = _existing
                report(regime, args.arms, args.seeds)
            if args.plots:
                plot(regimes, args.arms, args.seeds, args.plots)
            continue
        jobs = [(regime, seed) for seed in args.seeds for regime in regimes]
        with ThreadPoolExecutor(args.jobs) as pool:
            for future in [pool.submit(measure, regime, args.arms, seed, args.seeds[0]) for regime, seed in jobs]:
                future.result()


def _existing(place: Path, argv: list[str]) -> dict:
    """Return an existing result. Raises LookupError."""
    import json

    found = place.with_name(place.name + ".json")
    if not found.exists():
        raise LookupError(place.name)
    return json.loads(found.read_text())


if __name__ == "__main__":
    main()
