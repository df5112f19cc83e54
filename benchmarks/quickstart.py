"""Compare distillation with plain SFT of the quickstart's student: same rows, same steps, three seeds.

    python benchmarks/quickstart.py --work DIR [--seeds 10 11 12]

SFT also runs for the seconds of distillation. Its learning rate is chosen from one grid on the first seed's held-out
rows. Scored on the built-in test rows (1,000), greedy and sampled at T = 1. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml
from lab import mean_sd, run, sets

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "quickstart.yaml"
PASSES = {"greedy": ["--greedy"], "T=1": ["--temperature", "1", "--seeds", "10"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--grid", nargs="+", default=["1e-3", "2e-3", "4e-3", "8e-3"])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    recipe = yaml.safe_load(RECIPE.read_text())
    steps, first, common = recipe["train"]["steps"], args.seeds[0], sets(f"train.threads={args.threads}")

    def train(name: str, seed: int, lr: str, length: int) -> tuple[Path, dict]:
        place = args.work / f"{name.replace(' ', '-')}-{seed}-{lr}"
        options = [
            "--seed",
            str(seed),
            "--lr",
            lr,
            "--steps",
            str(length),
            "--output",
            str(place),
            "--overwrite",
            *common,
        ]
        if name == "distilled":
            return place, run(place, ["distill", "--recipe", "quickstart", *options], args.threads)
        # SFT with the same recipe: the same data, student and optimizer; only the tokenizer is the teacher's.
        plain = ["--set", f"student.tokenizer={BUILTIN}", "--set", "schedule.kind=off", "--set", "train.select=last"]
        return place, run(place, ["sft", "--recipe", str(sft_recipe), *plain, *options], args.threads)

    from distillm_cli.models.model_paths import BUILTIN_TEACHER as BUILTIN

    sft_recipe = args.work / "sft.yaml"
    sft_recipe.write_text(
        yaml.safe_dump(
            {k: v for k, v in recipe.items() if k not in ("method", "teacher", "objective", "schedule")}
            | {"method": "sft"}
        )
    )
    pool = ThreadPoolExecutor(args.jobs)

    def each(function, items: list[tuple]) -> list:
        return list(pool.map(lambda item: function(*item), items))

    best = {}
    for name in ("distilled", "sft"):
        tried = each(train, [(name, first, lr, steps) for lr in args.grid])
        found = [result["report"]["student_after"]["exact_match"] for _, result in tried]
        best[name] = max(zip(found, args.grid, strict=True))[1]
        print(
            f"grid: {name}: " + ", ".join(f"lr {lr} → {f:.1f}" for lr, f in zip(args.grid, found, strict=True)),
            flush=True,
        )

    requested = [(name, seed, best[name], steps) for seed in args.seeds for name in ("distilled", "sft")]
    results = dict(zip([(n, s) for n, s, _, _ in requested], each(train, requested), strict=True))
    for seed in args.seeds:
        ratio = results["distilled", seed][1]["train_s"] / results["sft", seed][1]["train_s"]
        results["sft same seconds", seed] = train("sft same seconds", seed, best["sft"], round(steps * ratio))

    def score(place: str, tag: str, mode: str) -> dict:
        target = args.work / f"{tag}.test-{mode}"
        argv = ["eval", place, "--suite", "builtin", "--limit", "1000", "--metric", "exact_match"]
        argv += [*PASSES[mode], *sets("data.template=plain", "eval.no_repeat_ngram_size=0", "eval.batch_size=250")]
        return run(target, [*argv, "--max-new-tokens", "24", "--dtype", "fp32", "--output", str(target)], args.threads)

    places = {("teacher", 0): str(BUILTIN)} | {key: str(place) for key, (place, _) in results.items()}
    score_keys = [(key, mode) for key in places for mode in PASSES]
    scores = each(score, [(places[key], f"{key[0].replace(' ', '-')}-{key[1]}", mode) for key, mode in score_keys])
    table = {
        score_key: next(iter(found["suites"].values())) for score_key, found in zip(score_keys, scores, strict=True)
    }

    print("\n| model | lr | seconds | sources (first seed) | " + " | ".join(f"EM {mode}" for mode in PASSES) + " |")
    print("|---" * (4 + len(PASSES)) + "|")
    for name in ("teacher", "distilled", "sft", "sft same seconds"):
        keys = [key for key in places if key[0] == name]
        trained = [results[key][1] for key in keys if key in results]
        took = mean_sd([r["train_s"] for r in trained]) if trained else "–"
        drawn = (
            f"{trained[0]['dataset_steps']} / {trained[0]['rollout_steps']} / {trained[0]['replay_steps']}"
            if trained
            else "–"
        )
        cells = [mean_sd([table[key, mode]["exact_match"]["mean"] for key in keys]) for mode in PASSES]
        print(f"| {name} | {best.get(name.split(' ')[0], '–')} | {took} | {drawn} | {' | '.join(cells)} |")
    print("\nTeacher by task, greedy: " + ", ".join(
        f"{task} {found['exact_match']['mean']:.1f}" for task, found in table[("teacher", 0), "greedy"]["tasks"].items()
    ))  # fmt: skip


if __name__ == "__main__":
    main()
