"""Measure the related systems (docs/related.md) on real rows, every model through the command line.

    python benchmarks/related.py okd ctcd mixkd peakd --work DIR --data DIR [--seeds 10 11 12] [--jobs 2] [--report]

Each trial trains its arms per seed and prints, per arm, the mean and standard deviation over the seeds, then for each
claim the difference by seed and whether it holds for the mean. Test rows are only scored: settings were chosen on
validation rows, or are the defaults. Results are cached per run, and --report prints what exists.

okd     kd, OKD and GKD (as many steps as take OKD's seconds), letters → phonemes and banking77, 2,000 rows
ctcd    large alone, small alone, one-way from the large one, CTCD; letters → phonemes, 4,000 rows
mixkd   2, 10 and 100 % of banking77 × kd, + TMKD, + SM + TMKD
peakd   2 layers of the teacher unshared, shared, shared and swapped, + pre-training, and 4 unshared; 2,000 words
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import regimes
from lab import mean_sd, sets
from regimes import Regime
from tasks import Task

KD = ("distill", "--method", "kd")
OKD = ("distill", "--method", "okd")
GKD = ("distill", "--method", "gkd")
CALIBRATION_STEPS = 150  # of a run that measures the seconds of a step


@dataclass(frozen=True)
class Claim:
    """State that an arm is better than another in a figure, by at least ``margin`` (in the figure's better direction)."""

    arm: str
    other: str
    figure: str
    margin: float = 0.0
    lower: bool = True

    def gains(self, of_seeds: list[dict[str, dict[str, float]]]) -> list[float]:
        """Return by seed by how much the arm is better."""
        sign = -1 if self.lower else 1
        pairs = [(arms[self.arm][self.figure], arms[self.other][self.figure]) for arms in of_seeds]
        return [sign * (ours - theirs) for ours, theirs in pairs]


@dataclass(frozen=True)
class Trial:
    """Describe a trial: ``measure`` returns figures by arm for a seed; the claims say what would count as success."""

    name: str
    measure: Callable[[int], dict[str, dict[str, float]]]
    claims: tuple[Claim, ...]


def few_words(data: Path, work: Path, rows: int, threads: int) -> Task:
    """Return letters → phonemes with few rows: teacher of 3.2 M parameters of all rows, student after ten epochs of SFT."""
    whole = replace(regimes.g2p(data, work, threads), grid=("4e-3",), passes=("T=1", "greedy"))
    whole.work.mkdir(parents=True, exist_ok=True)
    return Regime(whole, data / "g2p", rows).task


def few_questions(data: Path, work: Path, rows: int, threads: int) -> Task:
    """Return banking77 with few rows: questions → intents in words."""
    whole = replace(regimes.banking77(data, work, threads), grid=("2e-3",), passes=("T=1", "greedy"))
    whole.work.mkdir(parents=True, exist_ok=True)
    return Regime(whole, data / "banking77", rows).task


def figures(task: Task, place: Path, result: dict) -> dict[str, float]:
    """Return the test figures of a model in percent by decoding, its held-out loss and its seconds of training."""
    found = {"CE": result["report"]["student_after"]["valid_loss"], "seconds": result["train_s"]}
    for name in task.passes:
        suite = task.score(place, place.name, name)
        found |= {f"{metric} {name}": suite[metric]["mean"] for metric in task.metrics}
    return found


def train(task: Task, argv: tuple[str, ...], seed: int, steps: int | None = None, more: tuple[str, ...] = ()) -> dict:
    """Train an arm from the seed's start; return its figures."""
    place, result = task.train((*argv, *more), seed, task.grid[0], steps or task.steps)
    return figures(task, place, result) | {
        f"teacher {name}": value for name, value in result["report"].get("teacher", {}).items() if name == "valid_loss"
    }


def okd(task: Task) -> Callable[[int], dict[str, dict[str, float]]]:
    """Return the arms of OKD on a task."""

    def measure(seed: int) -> dict[str, dict[str, float]]:
        arms = {"kd": train(task, KD, seed), "OKD": train(task, OKD, seed)}
        _, short = task.train(GKD, seed, task.grid[0], CALIBRATION_STEPS)
        steps = round(arms["OKD"]["seconds"] / short["train_s"] * CALIBRATION_STEPS)
        arms["GKD, equal seconds"] = train(task, GKD, seed, steps)
        return arms

    return measure


def peakd(task: Task) -> Callable[[int], dict[str, dict[str, float]]]:
    """Return the arms of Pea-KD: students from the teacher's lower layers, all by kd."""
    students = {
        "2 layers": ("layers:2:first", ()),
        "2 × 2 shared": ("shared:2x2", ()),
        "2 × 2 shared, swapped": ("shared:2x2:swap", ()),
        "2 × 2 swapped, pre-trained": ("shared:2x2:swap", tuple(sets("student.ptp=1"))),
        "4 layers": ("layers:4:first", ()),
    }

    def measure(seed: int) -> dict[str, dict[str, float]]:
        arms = {}
        for arm, (student, more) in students.items():
            place, result = task.train((*KD, *more), seed, "1e-3", task.steps, start=student)
            arms[arm] = figures(task, place, result)
        return arms

    return measure


def report(trial: Trial, of_seeds: list[dict[str, dict[str, float]]]) -> None:
    """Print a trial's table and its claims."""
    names = list(dict.fromkeys(name for arms in of_seeds for found in arms.values() for name in found))
    print(f"\n**{trial.name}**, {len(of_seeds)} seeds\n")
    print(f"| arm | {' | '.join(names)} |")
    print("|---" * (1 + len(names)) + "|")
    for arm in of_seeds[0]:
        values = [[arms[arm][name] for arms in of_seeds if name in arms[arm]] for name in names]
        print(f"| {arm} | {' | '.join(mean_sd(found) if found else '–' for found in values)} |")
    print()
    for claim in trial.claims:
        gains = claim.gains(of_seeds)
        verdict = "holds" if statistics.mean(gains) >= claim.margin else "fails"
        by_seed = ", ".join(f"{gain:+.2f}" for gain in gains)
        wanted = f" by at least {claim.margin:g}" if claim.margin else ""
        print(f"- {claim.arm} better than {claim.other} in {claim.figure}{wanted}: **{verdict}** (by seed {by_seed})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="+")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    data, work = args.data.resolve(), args.work.resolve()
    words = few_words(data, work, 2000, args.threads)
    questions = few_questions(data, work, 2000, args.threads)
    per = "error_rate greedy"
    match = "exact_match greedy"
    trials = {
        "okd": [
            Trial("OKD, letters → phonemes", okd(words),
                  (Claim("OKD", "kd", per), Claim("OKD", "GKD, equal seconds", per))),
            Trial("OKD, banking77", okd(questions),
                  (Claim("OKD", "kd", match, lower=False), Claim("OKD", "GKD, equal seconds", match, lower=False))),
        ],
        "peakd": [
            Trial("Pea-KD, letters → phonemes", peakd(words),
                  (Claim("2 × 2 shared, swapped", "2 layers", per), Claim("2 × 2 shared, swapped", "2 × 2 shared", per))),
        ],
    }  # fmt: skip
    for name in args.trials:
        for trial in trials[name]:
            with ThreadPoolExecutor(args.jobs) as pool:
                report(trial, list(pool.map(trial.measure, args.seeds)))


if __name__ == "__main__":
    main()
