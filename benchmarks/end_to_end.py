"""Seconds per optimizer step of a whole adaptive run, validation and all, beside TRL's trainers on the same rows.

    python benchmarks/end_to_end.py --data FILE.jsonl --tokenizer DIR --work DIR \\
        --peers PATH/trl_run.py --peers-python PATH/python [--steps 20] [--rounds 2] [--threads 2] [--json]

Teacher GPT-2 124M, student 4 layers × 384, random weights, V = 50,257, batch 8, at most 64 new tokens, bf16. Ours: skew KL
α = 0.1, adaptive, with φ held at --phi (a short run would not see it rise; the paper's runs spend their time between 0 and
about 0.3), validation twice, from the training loop's own clock: rollouts, replay, teacher, optimizer and validation are in.
Peers: TRL's GKDTrainer (λ = 1 and ½) and DistillationTrainer, from the first step's end, without validation. Rounds
alternate; the best of each counts. Goals: 6 × DistillationTrainer, 20 × GKD λ = 1, 14 × GKD λ = ½.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from lab import last_json, sets

PEERS = {
    "TRL DistillationTrainer": (["--trainer", "distillation"], 6),
    "TRL GKDTrainer λ=1": (["--trainer", "gkd", "--lmbda", "1.0"], 20),
    "TRL GKDTrainer λ=0.5": (["--trainer", "gkd", "--lmbda", "0.5"], 14),
}
SHAPES = {"teacher": (12, 768, 12), "student": (4, 384, 6)}
MAKE = """
import sys, torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
tokenizer, out, layers, width, heads = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
torch.manual_seed(0)
config = GPT2Config(vocab_size=50257, n_layer=layers, n_embd=width, n_head=heads,
                    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
GPT2LMHeadModel(config).save_pretrained(out)
AutoTokenizer.from_pretrained(tokenizer).save_pretrained(out)
"""


def pair(work: Path, tokenizer: Path) -> dict[str, str]:
    places = {name: work / name for name in SHAPES}
    for name, place in places.items():
        if not (place / "tokenizer_config.json").exists():
            subprocess.run([sys.executable, "-c", MAKE, tokenizer, place, *map(str, SHAPES[name])], check=True)
    return {name: str(place) for name, place in places.items()}


def ours(models: dict[str, str], args: argparse.Namespace) -> dict:
    fields = [
        "teacher.dtype=bf16", "rollout.max_new_tokens=64", f"train.eval_steps={max(1, args.steps // 2)}",
        f"data.limit={args.steps * 16}", "data.valid_limit=64", "eval.report_rows=0", "train.select=last",
        f"schedule.phi={args.phi}", "schedule.epsilon=100", "train.save_steps=100000", f"train.threads={args.threads}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "distillm_cli", "distill", "--teacher", models["teacher"]]
    command += ["--student", models["student"], "--data", str(args.data), "--output", str(args.work / "run")]
    command += ["--steps", str(args.steps), "--batch-size", "8", "--max-length", "512", "--lr", "1e-4"]
    command += ["--dtype", "bf16", "--seed", str(args.seed), "--overwrite", "--json", "--quiet", *sets(*fields)]
    return last_json(command, args.threads)


def peer(name: str, models: dict[str, str], args: argparse.Namespace) -> float:
    command = [str(args.peers_python), str(args.peers), "--teacher", models["teacher"], "--student", models["student"]]
    command += ["--data", str(args.data), "--steps", str(args.peer_steps or args.steps), "--batch", "8"]
    return last_json([*command, *PEERS[name][0]], args.threads)["seconds_per_step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="GPT-2's")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--peers-python", type=Path, required=True, help="an environment with trl")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--peer-steps", type=int, help="where the peers' steps are too slow for as many")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--phi", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    models = pair(args.work, args.tokenizer)

    best: dict[str, float] = {}
    drawn = {}
    for _ in range(args.rounds):
        result = ours(models, args)
        drawn = {name: result[f"{name}_steps"] for name in ("dataset", "rollout", "replay")}
        taken = {"distillm adaptive": result["train_s"] / result["steps"]}
        taken |= {name: peer(name, models, args) for name in PEERS}
        best = {name: min(best.get(name, float("inf")), seconds) for name, seconds in taken.items()}
    mine = best.pop("distillm adaptive")
    ratios = {name: seconds / mine for name, seconds in best.items()}
    if args.json:
        print(json.dumps({"distillm": mine, "sources": drawn, "phi": args.phi, "peers": best, "ratios": ratios}))
        return
    print(f"distillm adaptive, φ = {args.phi}: {mine:.3f} s a step ({drawn})\n")
    print("| peer | s a step | ratio | goal |\n|---|---|---|---|")
    for name, seconds in best.items():
        print(f"| {name} | {seconds:.2f} | {ratios[name]:.1f} | {PEERS[name][1]} |")


if __name__ == "__main__":
    main()
