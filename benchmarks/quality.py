"""Measure the seconds until our student matches the final student of TRL's trainers, on G2P (letters → phonemes).

    python benchmarks/quality.py --data DIR --work DIR --peers-python PYTHON [--seeds 10] [--steps 300] [--json]

All have the same teacher, the same start (one epoch of SFT, see ``g2p.py``), rows, batch of 64, tokens, sampling
temperature 1, AdamW, clipping, cosine after 5 % warm-up, threads, and a teacher without precomputed states. Peers
(``peers_trl.py``): GKDTrainer λ = 1 and ½, DistillationTrainer, all β = 0.1, for --steps. Ours: ``distill``, whole runs
of --budgets steps each with its own schedule: ``distillm`` (skew KL, adaptive), ``gkd`` (the peers' algorithm) and
``ab`` (α-β divergence on rows), every row once; and ``distillm``, also with skew reverse KL, ``ab`` and ``kd`` on a
quarter as many rows, each four times, with the teacher's states cached. In addition, since a step without a teacher
costs a quarter: plain ``sft``, and ``sft`` for seven eighths of the steps and ``ab`` for the last, at a quarter of the
rate.

1. autocast, fp32 or bf16: the faster one for 20 steps (best of three, in turns), for each trainer separately
2. learning rate, on the first seed, from one grid, after --steps (peers) or --probe steps (ours): the lowest phoneme error
   rate (PER) on validation rows, sampled and greedy averaged
3. per seed the peers' students and ours of each budget, in turns; 2,000 test rows, greedy and at T = 1 (mean of five passes)
4. per peer the smallest budget of ours from which on every budget's test PER, mean over the seeds, is at most the
   peer's; the minimum seconds of --rounds runs of both, in turns, and their ratio. Goal: 4.3

Seconds are those of the training loop on both sides: start-up (imports, models, tokenizing) is excluded, our two
validations are included. Runs are resumable by their result files. Use an idle machine or core (``taskset``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import ClassVar

from g2p import Lab
from lab import cached_json, mean_sd, sets

PEERS = {
    "TRL GKDTrainer λ=1": ["--trainer", "gkd", "--lmbda", "1.0"],
    "TRL GKDTrainer λ=0.5": ["--trainer", "gkd", "--lmbda", "0.5"],
    "TRL DistillationTrainer": ["--trainer", "distillation"],
}
METHODS = {name: ["--method", name] for name in ("distillm", "gkd", "ab", "kd")}
METHODS["srkl α=0.3"] = ["--method", "distillm", "--divergence", "srkl", "--alpha", "0.3"]
EPOCHS = 4
FEW = {f"{name}, each row {EPOCHS} times": METHODS[name] for name in ("distillm", "ab", "kd", "srkl α=0.3")}
SFT, THEN = "sft", "sft, then ab"
OURS = {name: METHODS[name] for name in ("distillm", "gkd", "ab")} | FEW | {SFT: [], THEN: METHODS["ab"]}
BATCH = 64
GOAL = 4.3
TRIALS, TRIAL_STEPS = 3, 20
MODES = ("T=1", "greedy")


@dataclass(frozen=True)
class Run:
    """Describe one training run. again: number of earlier repetitions, to measure seconds."""

    name: str
    seed: int
    lr: str
    steps: int
    dtype: str
    again: int = 0

    @property
    def file(self) -> str:
        letters = "".join(
            c if c.isalnum() or c == "." else "-" for c in self.name.replace("λ=", "l").replace("α=", "a")
        )
        again = f"-again{self.again}" if self.again else ""
        return f"{letters}-{self.seed}-{self.lr}-{self.steps}-{self.dtype}{again}"


class Quality(Lab):
    """Extend the ``Lab`` of ``g2p.py`` by peers and a teacher without precomputed states."""

    passes: ClassVar = {"T=1": ["--temperature", "1"], "greedy": ["--greedy"]}

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        self.rows = self.work / "rows.jsonl"

    def write_rows(self) -> None:
        """Write the training rows of our runs: the prompt's text and the ids of prompt and response."""
        if self.rows.exists():
            return
        from transformers import AutoTokenizer

        from distillm_cli.config.schema import DataConfig
        from distillm_cli.data.encoder import Encoder
        from distillm_cli.data.sources import load_rows

        data = DataConfig(source=self.data, template="plain", max_length=64, max_prompt_length=256)
        encoder = Encoder(AutoTokenizer.from_pretrained(self.teacher()), data)
        rows = load_rows(data, "train")
        lines = [
            {
                "prompt": encoder.renderer.prompt(row),
                "prompt_ids": sequence.prompt.tolist(),
                "response_ids": sequence.response.tolist(),
            }
            for row, sequence in zip(rows, encoder.sequences(rows), strict=True)
        ]
        self.rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def train_one(self, run: Run) -> dict:
        """Run the training and return its result. The student is in ``self.place(run)``."""
        if run.name in PEERS:
            return self._peer(run)
        if run.name != THEN:
            return self._ours(run, self.start(run.seed))
        first = replace(run, name=SFT, steps=run.steps - run.steps // 8)
        last = replace(run, steps=run.steps // 8, lr=f"{float(run.lr) / 4:g}")
        first_part, second_part = self.train_one(first), self._ours(last, self.place(first), self.place(run))
        return {"train_s": first_part["train_s"] + second_part["train_s"]}

    def _peer(self, run: Run) -> dict:
        place, argv = self.place(run), ["--teacher", str(self.teacher()), "--student", str(self.start(run.seed))]
        argv += ["--output", str(place), "--rows", str(self.rows), "--batch", str(BATCH), "--steps", str(run.steps)]
        argv += ["--lr", run.lr, "--seed", str(run.seed), "--dtype", run.dtype, "--threads", str(self.args.threads)]
        script = [self.args.peers_python, str(Path(__file__).with_name("peers_trl.py")), *PEERS[run.name]]
        return cached_json(place, [*script, *argv], self.args.threads)

    def _ours(self, run: Run, start: Path, place: Path | None = None) -> dict:
        """Train with this package. place: overrides the run's own directory."""
        place = place or self.place(run)
        options = ["--output", str(place), "--overwrite"]
        options += ["--steps", str(run.steps), "--lr", run.lr, "--seed", str(run.seed)]
        fields = ["eval.report_rows=0", f"student.dtype={run.dtype}"]
        if run.name == SFT:
            return self.run(place, ["sft", "--model", str(start), *options, *self.common, *sets(*fields)])
        fields.append(f"teacher.dtype={run.dtype}")
        if run.name in FEW:
            fields += ["teacher.cache=memory", f"data.limit={run.steps * BATCH // EPOCHS}"]
        else:
            fields.append("teacher.cache=off")
        pair = ["--teacher", str(self.teacher()), "--student", str(start)]
        return self.run(place, ["distill", *OURS[run.name], *pair, *options, *self.common, *sets(*fields)])

    def place(self, run: Run) -> Path:
        return self.work / run.file

    def error_rates(self, place: Path) -> dict[str, dict[str, float]]:
        """Return PER in percent by split and decoding setting."""
        found = {mode: self.scores(place, mode, "valid", "test") for mode in MODES}
        return {
            split: {mode: found[mode][split]["error_rate"]["mean"] for mode in MODES} for split in ("valid", "test")
        }

    def faster_dtype(self, name: str) -> str:
        """Return the autocast dtype with the fewest seconds for a few steps, over several runs in turns."""
        first, lr = self.args.seeds[0], self.args.grid[0]
        trials: dict[str, float] = {}
        for again in range(TRIALS):
            for dtype in ("fp32", "bf16"):
                seconds = self.train_one(Run(name, first, lr, TRIAL_STEPS, dtype, again))["train_s"]
                trials[dtype] = min(trials.get(dtype, seconds), seconds)
        say(
            f"{name}: {TRIAL_STEPS} steps, least of {TRIALS}: " + ", ".join(f"{d} {s:.2f} s" for d, s in trials.items())
        )
        return min(trials, key=trials.get)

    def best_rates(self, dtypes: dict[str, str]) -> dict[str, str]:
        """Return each trainer's learning rate."""
        errors: dict[str, dict[str, float]] = {name: {} for name in dtypes}
        for lr in self.args.grid:
            for name, dtype in dtypes.items():
                steps = self.args.steps if name in PEERS else self.args.probe
                run = Run(name, self.args.seeds[0], lr, steps, dtype)
                seconds = self.train_one(run)["train_s"]
                per = self.error_rates(self.place(run))["valid"]
                errors[name][lr] = statistics.mean(per.values())
                say(f"{name}, lr {lr}, {steps} steps: {seconds:.1f} s, valid PER {by_way(per)}")
        return {name: min(found, key=found.get) for name, found in errors.items()}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def by_way(per: dict[str, float]) -> str:
    return ", ".join(f"{mode} {value:.2f}" for mode, value in per.items())


def first_to_hold(curve: dict[int, dict[str, float]], target: dict[str, float], modes: tuple[str, ...]) -> int | None:
    """Return the smallest budget from which on all budgets have at most the target's errors in all of these settings."""
    found = None
    for budget in sorted(curve, reverse=True):
        if any(curve[budget][mode] > target[mode] for mode in modes):
            break
        found = budget
    return found


def measure(lab: Quality, args: argparse.Namespace) -> dict:
    names = [*PEERS, *OURS]
    dtypes = {name: lab.faster_dtype(name) for name in names}
    rates = lab.best_rates(dtypes)

    def run_of(name: str, seed: int, steps: int) -> Run:
        return Run(name, seed, rates[name], steps, dtypes[name])

    runs: dict[tuple[str, int], list[Run]] = {}  # (name, steps) → one per seed
    for seed in args.seeds:
        theirs = [run_of(name, seed, args.steps) for name in PEERS]
        ours = [run_of(name, seed, budget) for budget in args.budgets for name in OURS]
        share = -(-len(ours) // len(theirs))
        groups = [ours[start : start + share] for start in range(0, len(ours), share)]
        for run in chain.from_iterable([t, *g] for t, g in zip_longest(theirs, groups, fillvalue=())):
            result, per = lab.train_one(run), lab.error_rates(lab.place(run))
            say(
                f"{run.name}, seed {seed}, {run.steps} steps: {result['train_s']:.1f} s, test PER {by_way(per['test'])}"
            )
            runs.setdefault((run.name, run.steps), []).append(run)

    def mean_per(key: tuple[str, int]) -> dict[str, float]:
        tests = [lab.error_rates(lab.place(run))["test"] for run in runs[key]]
        return {mode: statistics.mean(test[mode] for test in tests) for mode in MODES}

    curves = {name: {budget: mean_per((name, budget)) for budget in args.budgets} for name in OURS}
    aims = {"T=1": ("T=1",), "greedy": ("greedy",), "both": MODES}
    reached = {
        peer: {name: {aim: first_to_hold(curves[name], mean_per((peer, args.steps)), modes) for aim, modes in aims.items()}
               for name in OURS}
        for peer in PEERS
    }  # fmt: skip

    selected = [(peer, args.steps) for peer in PEERS]
    selected += sorted(
        {(n, b) for by_name in reached.values() for n, by_aim in by_name.items() for b in by_aim.values() if b}
    )
    timed: dict[tuple[str, int], list[list[float]]] = {key: [[] for _ in args.seeds] for key in runs}
    for again in range(args.rounds):
        for key in runs if not again else selected:
            for seconds, run in zip(timed[key], runs[key], strict=True):
                seconds.append(lab.train_one(replace(run, again=again))["train_s"])
    taken = {key: [min(seconds) for seconds in by_seed] for key, by_seed in timed.items()}

    def described(key: tuple[str, int]) -> dict:
        name, steps = key
        tests = [lab.error_rates(lab.place(run))["test"] for run in runs[key]]
        return {
            "steps": steps, "lr": rates[name], "dtype": dtypes[name], "seconds": taken[key], "all_seconds": timed[key],
            "test_per": {mode: [test[mode] for test in tests] for mode in MODES},
        }  # fmt: skip

    start = [lab.error_rates(lab.start(seed))["test"] for seed in args.seeds]
    return {
        "seeds": args.seeds, "goal": GOAL, "teacher": lab.error_rates(lab.teacher())["test"],
        "start": {mode: [test[mode] for test in start] for mode in MODES},
        "peers": {peer: described((peer, args.steps)) for peer in PEERS},
        "ours": {name: [described((name, budget)) for budget in args.budgets] for name in OURS},
        "reached": {
            peer: {
                name: {aim: budget and {
                    "steps": budget, "seconds": statistics.mean(taken[name, budget]),
                    "ratio": statistics.mean(taken[peer, args.steps]) / statistics.mean(taken[name, budget]),
                } for aim, budget in by_aim.items()}
                for name, by_aim in by_name.items()
            }
            for peer, by_name in reached.items()
        },
        "runs": [asdict(run) for group in runs.values() for run in group],
    }  # fmt: skip


def show(found: dict) -> None:
    print(f"Seeds {found['seeds']}; test PER, teacher: {by_way(found['teacher'])}\n")
    print("| student | lr | autocast | steps | seconds | PER T=1 | PER greedy |\n|---|---|---|---|---|---|---|")
    print("| start | – | – | – | – | " + " | ".join(mean_sd(found["start"][mode]) for mode in MODES) + " |")
    lines = [*found["peers"].items(), *((name, one) for name, many in found["ours"].items() for one in many)]
    for name, one in lines:
        per = " | ".join(mean_sd(one["test_per"][mode]) for mode in MODES)
        print(f"| {name} | {one['lr']} | {one['dtype']} | {one['steps']} | {mean_sd(one['seconds'])} | {per} |")
    print(f"\nTimes faster to the same PER (our steps, seconds); goal {found['goal']}\n")
    print("| peer | by | T=1 | greedy | both |\n|---|---|---|---|---|")
    for peer, by_name in found["reached"].items():
        for name, by_aim in by_name.items():
            cells = [
                f"{r['ratio']:.2f} × ({r['steps']}, {r['seconds']:.1f} s)" if r else "not reached"
                for r in by_aim.values()
            ]
            print(f"| {peer} | {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="train.jsonl, valid.jsonl, test.jsonl")
    parser.add_argument("--work", type=Path, required=True, help="WORK/teacher is used if it exists")
    parser.add_argument("--peers-python", required=True, help="an environment with trl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10])
    parser.add_argument("--grid", nargs="+", default=["1e-3", "2e-3", "4e-3"])
    parser.add_argument("--steps", type=int, default=300, help="steps of the peers")
    parser.add_argument("--budgets", type=int, nargs="+", default=[50, 100, 150, 200, 250, 300, 400], help="our steps")
    parser.add_argument("--probe", type=int, default=150, help="our steps for choosing the learning rate")
    parser.add_argument("--rounds", type=int, default=2, help="runs, of which the fastest counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.jobs = 1
    args.work.mkdir(parents=True, exist_ok=True)
    lab = Quality(args)
    lab.teacher()
    lab.write_rows()
    found = measure(lab, args)
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        show(found)


if __name__ == "__main__":
    main()
