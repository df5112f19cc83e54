"""Compare methods on G2P (letters → phonemes) through the command line, with every model from scratch.

    python benchmarks/g2p.py --data DIR --work DIR [--seeds 10 11 12] [--jobs 2]

1. a teacher (``recipes/g2p-teacher.yaml``), unless WORK/teacher exists; per seed one epoch of SFT as every method's start
2. per method one run per learning rate of one grid, on the first seed; the rate with the lowest greedy phoneme error rate
   on validation rows is used (the longer SFT uses SFT's rate, since a second choice would favor it)
3. the other seeds at that rate; plain SFT has the same grid, the same steps and, in another run, the same seconds as
   adaptive
4. every model on the test rows: greedy, sampled at T = 1 and at T = 0.5

The teacher's states for all training rows are computed once and read by every run (``teacher.cache=disk``); the seconds
are those of the training loop with cached states. Runs are resumable by their result files: a second start runs only
missing parts. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lab import mean_sd, run, sets

METHODS = {
    "sft": [],
    "kl": ["--method", "kd"],
    "skl": ["--method", "kd", "--divergence", "skl", "--alpha", "0.1"],
    "skl adaptive": ["--method", "distillm"],
    "jsd mixed (GKD)": ["--method", "gkd"],
}
SFT, LONG, ADAPTIVE = "sft", "sft, same seconds", "skl adaptive"
SAMPLED = ["--seeds", "10", "--temperature"]
PASSES = {"greedy": ["--greedy"], "T=1": [*SAMPLED, "1"], "T=0.5": [*SAMPLED, "0.5"]}


class Lab:
    """Hold one working directory, its teacher and its runs. passes: decoding settings, as flags of ``eval``."""

    passes = PASSES

    def __init__(self, args: argparse.Namespace):
        self.args, self.work, self.data = args, args.work.resolve(), str(args.data.resolve())
        self.pool = ThreadPoolExecutor(args.jobs)
        fields = [
            f"train.threads={args.threads}", "data.template=plain", "train.warmup=0.05",
            "rollout.max_new_tokens=32", "train.select=last", "train.eval_steps=250", "train.save_steps=100000",
            "eval.max_new_tokens=32", "eval.no_repeat_ngram_size=0", "eval.metrics=[error_rate, exact_match]",
            "eval.report_rows=1000", "eval.greedy=true", "eval.batch_size=250",
        ]  # fmt: skip
        self.common = ["--data", self.data, "--batch-size", "64", "--max-length", "64", "--dtype", "fp32"]
        self.common += ["--device", "cpu", *sets(*fields)]

    def run(self, place: Path, argv: list[str]) -> dict:
        return run(place, argv, self.args.threads)

    def teacher(self) -> Path:
        place = self.work / "teacher"
        if not (place / "model.safetensors").exists():
            self.run(place, ["sft", "--recipe", "g2p-teacher", "--data", self.data, "--output", str(place)])
        return place

    def start(self, seed: int) -> Path:
        place = self.work / f"start-{seed}"
        epoch = ["--steps", "468", "--lr", "4e-3", "--seed", str(seed), "--overwrite"]
        student = ["--model", "random:2x96", "--tokenizer", str(self.teacher())]
        self.run(place, ["sft", *student, "--output", str(place), *epoch, *self.common])
        return place

    def train(self, method: str, seed: int, lr: str, steps: int) -> tuple[Path, dict]:
        name = f"{method}-{seed}-{lr}".replace(" ", "_").replace(",", "").replace("(", "").replace(")", "")
        place, start = self.work / name, str(self.start(seed))
        pair = ["--model", start] if method in (SFT, LONG) else ["--teacher", str(self.teacher()), "--student", start]
        cache = sets("teacher.cache=disk", f"teacher.cache_dir={self.work / 'cache'}")
        verb = ["sft"] if method in (SFT, LONG) else ["distill", *METHODS[method], *cache]
        options = ["--steps", str(steps), "--lr", lr, "--seed", str(seed), "--overwrite"]
        return place, self.run(place, [*verb, *pair, "--output", str(place), *options, *self.common])

    def score(self, place: Path, name: str) -> dict:
        """Return the test figures of one model with one decoding setting."""
        return self.scores(place, name, "test")["test"]

    def scores(self, place: Path, name: str, *splits: str) -> dict[str, dict]:
        """Return the figures of one model on these splits, with one decoding setting."""
        found = place.with_name(f"{place.name}.{'-'.join(splits)}-{name}")
        suites = [word for split in splits for word in ("--suite", str(Path(self.data) / f"{split}.jsonl"))]
        suites += ["--batch-size", "250", "--max-new-tokens", "32"]
        metrics = ["--metric", "error_rate", "--metric", "exact_match", *sets("eval.no_repeat_ngram_size=0")]
        more = ["--dtype", "fp32", *sets("data.template=plain"), "--output", str(found)]
        result = self.run(found, ["eval", str(place), *suites, *metrics, *self.passes[name], *more])
        return dict(zip(splits, result["suites"].values(), strict=True))

    def map(self, function, items: list) -> list:
        return list(self.pool.map(lambda item: function(*item), items))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="train.jsonl, valid.jsonl, test.jsonl")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--grid", nargs="+", default=["1e-3", "2e-3", "4e-3"])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=2, help="parallel runs")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per run")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    lab, first = Lab(args), args.seeds[0]
    lab.teacher()
    lab.map(lambda seed: lab.start(seed), [(seed,) for seed in args.seeds])

    tried = [(method, first, lr, args.steps) for lr in args.grid for method in METHODS]
    outcomes = lab.map(lab.train, tried)
    best: dict[str, tuple[float, str]] = {}
    for (method, _, lr, _), (_, result) in zip(tried, outcomes, strict=True):
        error = result["report"]["student_after"]["error_rate"]
        best[method] = min(best.get(method, (float("inf"), "")), (error, lr))
        print(f"grid: {method:18s} lr {lr}  valid PER {error:6.2f}  {result['train_s']:6.1f} s", flush=True)

    runs = [(method, seed, best[method][1], args.steps) for seed in args.seeds for method in METHODS]
    results = dict(zip([(m, s) for m, s, _, _ in runs], lab.map(lab.train, runs), strict=True))
    seconds = {m: [results[m, s][1]["train_s"] for s in args.seeds] for m in METHODS}
    ratio = statistics.median(seconds[ADAPTIVE]) / statistics.median(seconds[SFT])
    longer = [(LONG, seed, best[SFT][1], round(args.steps * ratio)) for seed in args.seeds]
    results |= dict(zip([(m, s) for m, s, _, _ in longer], lab.map(lab.train, longer), strict=True))

    names = [*METHODS, LONG]
    pair = ["--teacher", str(lab.teacher()), "--student", str(lab.start(first)), "--output", str(lab.work / "live")]
    options = [
        "--steps",
        "100",
        "--lr",
        best["skl"][1],
        "--overwrite",
        *lab.common,
        *sets("eval.report_rows=0", "teacher.cache=off"),
    ]
    live = lab.run(lab.work / "live", ["distill", *METHODS["skl"], *pair, *options])
    print(f"\nteacher live, not cached: {live['train_s'] * args.steps / 100:.0f} s for {args.steps:,} steps (from 100)")
    models = {("teacher", 0): lab.teacher()} | {("start", s): lab.start(s) for s in args.seeds}
    models |= {(m, s): results[m, s][0] for m in names for s in args.seeds}
    keys = [(place, name) for place in models.values() for name in PASSES]
    scores = dict(zip(keys, lab.map(lab.score, keys), strict=True))

    print(
        "\n| model | lr | seconds | rollout / replay steps | "
        + " | ".join(f"PER {p} | EM {p}" for p in PASSES)
        + " | entropy T=1 |"
    )
    print("|---" * (5 + 2 * len(PASSES)) + "|")
    for name in ("teacher", "start", *names):
        seeds = [s for m, s in models if m == name]
        cells = []
        for mode in PASSES:
            found = [scores[models[name, s], mode] for s in seeds]
            cells += [mean_sd([f[metric]["mean"] for f in found]) for metric in ("error_rate", "exact_match")]
        entropy = mean_sd([scores[models[name, s], "T=1"]["entropy"] for s in seeds])
        trained = [results[name, s][1] for s in seeds if (name, s) in results]
        lr = best.get(SFT if name == LONG else name, (0, "–"))[1]
        took = mean_sd([r["train_s"] for r in trained]) if trained else "–"
        drawn = " ".join(f"{r['rollout_steps']}/{r['replay_steps']}" for r in trained) or "–"
        print(f"| {name} | {lr} | {took} | {drawn} | {' | '.join(cells)} | {entropy} |")


if __name__ == "__main__":
    main()
