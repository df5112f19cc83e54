"""Compare seconds per optimizer step of a whole adaptive run, including validation, with TRL's trainers.

    python benchmarks/end_to_end.py --data FILE.jsonl --tokenizer DIR --work DIR \\
        --peers PATH/trl_run.py --peers-python PATH/python [--rows 80] [--epochs 12] [--peer-steps 6] [--threads 2] [--json]

Teacher GPT-2 124M, student 4 layers × 384, random weights, V = 50,257, batch 8, at most 64 new tokens, rows of at most 400
tokens, bf16. All train on the same --rows rows.

Ours: skew KL α = 0.1 on the adaptive schedule, --epochs epochs over those rows. A run of the paper has 10 to 20 epochs,
and the savings start after the first: the teacher computes a row once and its states are cached in memory, and a
student output is scored once and replayed. A short run needs several epochs too, or it measures only a first epoch. So
the number of rows is small, and the rest is in proportion: a replay buffer of --capacity outputs, small enough to fill
early (1,000 of about 34,000 outputs in a run of 20 epochs on Dolly), and a validation at the start and after each
epoch, on a tenth of the number of training rows (Dolly: 1,000 and 11,435). φ is fixed at --phi, since it would not rise
in a short run; in the paper's runs it is between 0 and about 0.3. Seconds are measured by the training loop over all
steps, including the first: rollouts, replay, teacher, optimizer and validations are included.

Peers: TRL's GKDTrainer (λ = 1 and ½) and DistillationTrainer, --peer-steps steps on those rows, without their first
step and without validation. They run the teacher in every step without a cache, so a step costs the same in every
epoch. Rounds alternate, and the best of each is used. Goals: 6 × DistillationTrainer, 20 × GKD λ = 1, 14 × GKD λ = ½.
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
LONGEST = 400  # tokens of a row, before a template
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


def rows(args: argparse.Namespace, tokenizer: Path) -> tuple[Path, Path]:
    """Write the first rows of --data that are short enough to files of training and validation rows."""
    from transformers import AutoTokenizer

    count = AutoTokenizer.from_pretrained(tokenizer)
    chosen, needed = [], args.rows + max(1, args.rows // 10)
    with args.data.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            text = " ".join(str(row.get(key) or "") for key in ("prompt", "instruction", "input", "output"))
            if len(count(text).input_ids) <= LONGEST:
                chosen.append(line)
            if len(chosen) == needed:
                break
    if len(chosen) < needed:
        raise SystemExit(f"{args.data} has {len(chosen)} rows of at most {LONGEST} tokens, but {needed} are needed")
    places = args.work / "train.jsonl", args.work / "valid.jsonl"
    for place, lines in zip(places, (chosen[: args.rows], chosen[args.rows :]), strict=True):
        place.write_text("".join(lines), encoding="utf-8")
    return places


def ours(models: dict[str, str], train: Path, valid: Path, args: argparse.Namespace) -> dict:
    fields = [
        "teacher.dtype=bf16", "teacher.cache=memory", "rollout.max_new_tokens=64", "train.eval_steps=epoch",
        f"data.valid={valid}", "eval.report_rows=0", "train.select=last", f"schedule.phi={args.phi}",
        "schedule.epsilon=100", f"schedule.capacity={args.capacity}", "train.save_steps=100000",
        f"train.threads={args.threads}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "distillm_cli", "distill", "--teacher", models["teacher"]]
    command += ["--student", models["student"], "--data", str(train), "--output", str(args.work / "run")]
    command += ["--epochs", str(args.epochs), "--batch-size", "8", "--max-length", "512", "--lr", "1e-4"]
    command += ["--dtype", "bf16", "--seed", str(args.seed), "--overwrite", "--json", "--quiet", *sets(*fields)]
    return last_json(command, args.threads)


def peer(name: str, models: dict[str, str], train: Path, args: argparse.Namespace) -> float:
    command = [str(args.peers_python), str(args.peers), "--teacher", models["teacher"], "--student", models["student"]]
    command += ["--data", str(train), "--steps", str(args.peer_steps), "--batch", "8"]
    return last_json([*command, *PEERS[name][0]], args.threads)["seconds_per_step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="GPT-2's")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--peers-python", type=Path, required=True, help="an environment with trl")
    parser.add_argument("--rows", type=int, default=80)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--capacity", type=int, default=64, help="of the replay buffer")
    parser.add_argument("--peer-steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--phi", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    models = pair(args.work, args.tokenizer)
    train, valid = rows(args, args.tokenizer)

    best: dict[str, float] = {}
    drawn = {}
    for _ in range(args.rounds):
        result = ours(models, train, valid, args)
        drawn = {name: result[f"{name}_steps"] for name in ("dataset", "rollout", "replay")}
        taken = {"distillm adaptive": result["train_s"] / result["steps"]}
        taken |= {name: peer(name, models, train, args) for name in PEERS}
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
