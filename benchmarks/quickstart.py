"""Compare the quickstart with its baselines on the built-in test rows, three seeds.

    python benchmarks/quickstart.py --work DIR [--seeds 10 11 12] [--rates 2e-3 3e-3 4e-3] [--threads 2]

Each seed is one ``distill --recipe quickstart --compare``: the student by the recipe, and for the same seconds by plain
SFT and off-policy, with the best learning rate of --rates by held-out exact match, first seed. The recipe has its own.
Scored on 1,000 test rows of the recipe's kinds, greedy and sampled at T = 1. Prints a Markdown table with a line per seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml
from lab import mean_sd, run, sets

PASSES = {"T=1": ["--temperature", "1", "--seeds", "10"], "greedy": ["--greedy"]}
RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "quickstart.yaml"
KINDS = yaml.safe_load(RECIPE.read_text())["data"]["tasks"]
MODELS = ("sft", "off-policy", "this run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--rates", nargs="+", default=["2e-3", "3e-3", "4e-3"])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    def train(seed: int, rate: str | None) -> tuple[Path, dict]:
        place = args.work / f"quickstart-{seed}-{rate or 'recipe'}"
        options = ["--seed", str(seed), *(["--lr", rate] if rate else []), "--output", str(place), "--overwrite"]
        return place, run(place, ["distill", "--recipe", "quickstart", "--compare", *options], args.threads)

    def figures(result: dict, model: str) -> dict:
        if model == "this run":
            return result["report"]["student_after"] | {"steps": result["steps"], "train_s": result["train_s"]}
        (found,) = (baseline for baseline in result["baselines"] if baseline["name"] == model)
        return found["figures"] | {"steps": found["steps"], "train_s": found["train_s"]}

    def score(place: Path, name: str, mode: str) -> float:
        target = args.work / f"{name}.test-{mode}"
        argv = ["eval", str(place), "--suite", "builtin", "--limit", "1000", "--metric", "exact_match", *PASSES[mode]]
        argv += sets(f"data.tasks={KINDS}", "data.template=plain", "eval.no_repeat_ngram_size=0", "eval.batch_size=250")
        found = run(target, [*argv, "--max-new-tokens", "24", "--dtype", "fp32", "--output", str(target)], args.threads)
        return next(iter(found["suites"].values()))["exact_match"]["mean"]

    rates: dict[str, str | None] = {"this run": None}
    for model in MODELS[:-1]:
        found = {rate: figures(train(args.seeds[0], rate)[1], model)["exact_match"] for rate in args.rates}
        rates[model] = max(found, key=lambda rate: found[rate])
        print(f"{model}: " + ", ".join(f"lr {rate} → {value:.1f}" for rate, value in found.items()), flush=True)

    print("\n| model | seed | lr | steps | seconds | " + " | ".join(f"EM {mode}" for mode in PASSES) + " |")
    print("|---" * (5 + len(PASSES)) + "|")
    scores: dict[str, list[list[float]]] = {model: [] for model in MODELS}
    for seed in args.seeds:
        for model in MODELS:
            place, result = train(seed, rates[model])
            folder = place if model == "this run" else place / "compare" / model
            found = figures(result, model)
            row = [score(folder, f"{model.replace(' ', '-')}-{seed}-{rates[model]}", mode) for mode in PASSES]
            scores[model].append(row)
            cells = [model, seed, rates[model] or "recipe", found["steps"], f"{found['train_s']:.0f}"]
            print("| " + " | ".join(map(str, [*cells, *(f"{value:.1f}" for value in row)])) + " |", flush=True)
    for model, rows in scores.items():
        cells = [mean_sd([row[i] for row in rows]) for i in range(len(PASSES))]
        print(f"| {model} | mean | {rates[model] or 'recipe'} | | | {' | '.join(cells)} |")
    teacher = [score(Path("builtin"), "teacher", mode) for mode in PASSES]
    print(f"| teacher | | | | | {' | '.join(f'{value:.1f}' for value in teacher)} |")


if __name__ == "__main__":
    main()
