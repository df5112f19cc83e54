"""Compare the quickstart with its baselines on its test rows, three seeds.

    python benchmarks/quickstart.py --work DIR [--seeds 10 11 12] [--rates 2e-3 8e-3] [--threads 2]

Each seed is one ``distill --recipe quickstart --compare``: the student by the recipe, and for the same seconds by plain SFT
and off-policy. The baselines have the best learning rate by held-out exact match, first seed, among --rates and that of the
recipe.
Scored on 1,000 test words, greedy and sampled at T = 1. Prints a Markdown table with a line per seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lab import mean_sd, run, sets

PASSES = {"T=1": ["--temperature", "1", "--seeds", "10"], "greedy": ["--greedy"]}
METRICS = ("error_rate", "exact_match")
MODELS = ("sft", "off-policy", "this run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--rates", nargs="+", default=["2e-3", "8e-3"])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    def train(seed: int, rate: str | None, *, compare: bool) -> tuple[Path, dict]:
        place = args.work / f"quickstart-{seed}-{rate or 'recipe'}"
        options = ["--seed", str(seed), *(["--lr", rate] if rate else []), "--output", str(place), "--overwrite"]
        options += ["--compare"] if compare else []
        return place, run(place, ["distill", "--recipe", "quickstart", *options], args.threads)

    def figures(result: dict, model: str) -> dict:
        if model == "this run":
            return result["report"]["student_after"] | {"steps": result["steps"], "train_s": result["train_s"]}
        (found,) = (baseline for baseline in result["baselines"] if baseline["name"] == model)
        return found["figures"] | {"steps": found["steps"], "train_s": found["train_s"]}

    def score(place: str | Path, name: str) -> list[float]:
        """Return each metric of each pass."""
        row = []
        for mode, decoding in PASSES.items():
            target = args.work / f"{name}.test-{mode}"
            argv = ["eval", str(place), "--suite", "pronounce", *decoding, "--max-new-tokens", "32", "--dtype", "fp32"]
            argv += [word for metric in METRICS for word in ("--metric", metric)]
            argv += sets("data.template=plain", "eval.no_repeat_ngram_size=0", "eval.batch_size=250")
            (suite,) = run(target, [*argv, "--output", str(target)], args.threads)["suites"].values()
            row += [suite[metric]["mean"] for metric in METRICS]
        return row

    rates: dict[str, str | None] = {"this run": None}
    for model in MODELS[:-1]:
        found = {
            rate: figures(train(args.seeds[0], rate, compare=True)[1], model)["exact_match"]
            for rate in (None, *args.rates)
        }
        rates[model] = max(found, key=lambda rate: found[rate])
        print(
            f"{model}: " + ", ".join(f"lr {rate or 'of the recipe'} → {value:.1f}" for rate, value in found.items()),
            flush=True,
        )

    baseline_rates = {rates[model] for model in MODELS[:-1]}
    columns = [f"{metric.replace('_', ' ')} {mode}" for mode in PASSES for metric in METRICS]
    print(f"\n| model | seed | lr | steps | seconds | {' | '.join(columns)} |")
    print("|---" * (5 + len(columns)) + "|")
    scores: dict[str, list[list[float]]] = {model: [] for model in MODELS}
    for seed in args.seeds:
        for model in MODELS:
            place, result = train(seed, rates[model], compare=rates[model] in baseline_rates)
            folder = place if model == "this run" else place / "compare" / model
            found = figures(result, model)
            row = score(folder, f"{model.replace(' ', '-')}-{seed}-{rates[model]}")
            scores[model].append(row)
            cells = [model, seed, rates[model] or "recipe", found["steps"], f"{found['train_s']:.0f}"]
            print("| " + " | ".join(map(str, [*cells, *(f"{value:.1f}" for value in row)])) + " |", flush=True)
    for model, rows in scores.items():
        cells = [mean_sd([row[i] for row in rows]) for i in range(len(columns))]
        print(f"| {model} | mean | {rates[model] or 'recipe'} | | | {' | '.join(cells)} |")
    teacher = score("builtin:pronounce", "teacher")
    print(f"| teacher | | | | | {' | '.join(f'{value:.1f}' for value in teacher)} |")


if __name__ == "__main__":
    main()
