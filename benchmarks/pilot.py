"""Compare the choice of ``distillm pilot`` with the best of the long runs of ``regimes.py``, on test rows.

    python benchmarks/pilot.py g2p:2000 banking77:2000 g2p:30000 --work DIR --data DATA [--minutes 5] [--cpu]

DIR is that of ``regimes.py``, with the runs to compare with. Per task: a pilot from the same teacher, start and rows, then
one run of its recipe, scored greedily on the test rows. The pilot has not seen these rows, nor the long runs. The recipe's
run is compared with the best long run of at most its cost (``regimes.cost``: steps, with FRESH_COST for one on fresh student
outputs; LIKE allows for the schedule's chance), and with the best of all. --cpu counts the seconds of the process's CPU in
the pilot, for a machine that is shared. Prints a table, and the pilot's answers.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from lab import cached_json, run, sets
from regimes import TASKS, Regime, cost

_BY_CPU = (
    "import sys, time; time.perf_counter = time.process_time; from distillm_cli.cli.app import main; sys.exit(main())"
)
WITHIN = 1.0  # points
LIKE = 1.15  # times the cost of the recipe's run


def pilot(regime: Regime, seed: int, minutes: float, threads: int, *, by_cpu: bool) -> tuple[Path, dict]:
    """Run a pilot of the regime's pair and rows; return its directory and its ``--json`` object."""
    task = regime.task
    place = task.work / f"pilot-{seed}-{minutes:g}{'-cpu' if by_cpu else ''}"
    pair = ["--teacher", task.teacher(), "--student", str(task.start(seed)), *sets("teacher.dtype=bf16")]
    argv = ["pilot", *pair, *task.common, *sets(f"train.lr={task.grid[0]}"), "--steps", str(task.steps)]
    argv += ["--seed", str(seed), "--minutes", str(minutes), "--output", str(place), "--json", "--quiet"]
    program = ["-c", _BY_CPU] if by_cpu else ["-m", "distillm_cli"]
    return place, cached_json(place, [sys.executable, *program, *argv], threads)


def best_known(regime: Regime, seed: int, most: float = float("inf")) -> tuple[str, float, float]:
    """Return the best run of ``regimes.py`` with this seed and at most this cost: name, figure on test rows, and cost."""
    task = regime.task
    metric = task.metrics[0]
    found = {}
    for file in task.work.glob(f"*_{seed}_*.test-greedy.json"):
        name = file.name.removesuffix(".test-greedy.json")
        (suite,) = json.loads(file.read_text())["suites"].values()
        spent = _cost(task.work / name)
        if spent <= most:
            found[name] = suite[metric]["mean"], spent
    if not found:
        raise SystemExit(f"no runs with seed {seed} in {task.work}: run regimes.py first")
    name = (min if task.lower else max)(found, key=lambda name: found[name])
    return name, *found[name]


def _cost(place: Path) -> float:
    """Return the cost of the run of a directory."""
    return cost([json.loads(place.with_name(place.name + ".json").read_text())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", metavar="TASK:ROWS")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu", action="store_true", help="count the seconds of the process's CPU in the pilot")
    args = parser.parse_args()
    lines, answers = [], []
    for text in args.tasks:
        name, _, rows = text.partition(":")
        whole = TASKS[name](args.data.resolve(), args.work.resolve(), args.threads)
        whole.work.mkdir(parents=True, exist_ok=True)
        source = {"questions": None, "sums": args.work / "sums-rows", "dolly": args.work / "dolly-rows"}
        regime = Regime(replace(whole, passes=("greedy",)), source.get(name, args.data / name), int(rows))
        place, found = pilot(regime, args.seed, args.minutes, args.threads, by_cpu=args.cpu)
        student = place.with_name(place.name + "-run")
        run(student, ["distill", "--recipe", found["recipe"], "--output", str(student), "--overwrite"], args.threads)
        metric = regime.task.metrics[0]
        figure = regime.task.score(student, student.name, "greedy")[metric]["mean"]
        chosen = {key: value for key, value in found["best"].items() if key != "share"} | {"steps": found["steps"]}
        cells = [text, f"{found['wall_s']:.0f}", ", ".join(f"{key} {value}" for key, value in chosen.items())]
        cells.append(f"{figure:.2f}")
        spent = _cost(student)
        for most in (LIKE * spent, float("inf")):
            known, best, its_cost = best_known(regime, args.seed, most)
            behind = figure - best if regime.task.lower else best - figure
            cells += [f"{known}: {best:.2f} for {its_cost / spent:.1f} × the cost"]
            cells += [f"{behind:+.2f}: {'yes' if behind <= WITHIN else 'no'}"]
        lines.append(cells)
        answers += [f"- {text}: {answer}" for answer in (*found["answers"], *found["notes"])]
    print(
        "| task | seconds | choice | test figure | best for its cost | within one point | best of all | within one point |"
    )
    print("|---" * 8 + "|")
    for cells in lines:
        print(f"| {' | '.join(cells)} |")
    print()
    print("\n".join(answers))


if __name__ == "__main__":
    main()
