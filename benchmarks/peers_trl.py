"""Run a TRL trainer on local models, save the trained student, and print its seconds as one JSON line.

    PYTHON_WITH_TRL benchmarks/peers_trl.py --trainer gkd|distillation --teacher DIR --student DIR --rows FILE \\
        --output DIR --steps N --lr LR [--lmbda 1.0] [--beta 0.1] [--batch 64] [--dtype fp32|bf16] [--seed 10]

gkd: ``trl.experimental.gkd.GKDTrainer``. distillation: ``trl.DistillationTrainer``, always on the student's own outputs.
rows: jsonl of ``prompt`` (text), ``prompt_ids`` and ``response_ids`` (end-of-sequence included), as ``quality.py`` writes
them: both sides train on the same tokens, and GKD does not tokenize in its loop. Generation uses the key-value cache,
gradient checkpointing is off, the schedule is a cosine after 5 % warm-up.
train_s: from ``on_train_begin`` to ``on_train_end``, no validation, no checkpoint. step_s: the median step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


class Clock(TrainerCallback):
    """Measure wall and processor seconds of the training loop, and wall seconds of each step."""

    def __init__(self):
        self.steps: list[float] = []
        self.wall = self.cpu = 0.0

    def on_train_begin(self, *_, **__):
        self.began, self.began_cpu = time.perf_counter(), time.process_time()

    def on_step_begin(self, *_, **__):
        self.step_began = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.steps.append(time.perf_counter() - self.step_began)

    def on_train_end(self, *_, **__):
        self.wall, self.cpu = time.perf_counter() - self.began, time.process_time() - self.began_cpu


def build(args: argparse.Namespace, clock: Clock):
    """Return the trainer and its student's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32)
    rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
    if tokenizer([row["prompt"] for row in rows])["input_ids"] != [row["prompt_ids"] for row in rows]:
        raise SystemExit("the prompts' texts have other ids with this tokenizer")
    if {row["response_ids"][-1] for row in rows} != {tokenizer.eos_token_id}:
        raise SystemExit("a response does not end with end-of-sequence")
    common = {
        "output_dir": tempfile.mkdtemp(), "max_steps": args.steps, "per_device_train_batch_size": args.batch,
        "learning_rate": args.lr, "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "weight_decay": 0.01,
        "max_grad_norm": 1.0, "gradient_checkpointing": False, "bf16": args.dtype == "bf16", "seed": args.seed,
        "use_cpu": not torch.cuda.is_available(), "report_to": "none", "logging_steps": 10_000, "save_strategy": "no",
        "disable_tqdm": True, "beta": args.beta, "temperature": 1.0,
    }  # fmt: skip
    pair = {"model": student, "teacher_model": teacher, "processing_class": tokenizer, "callbacks": [clock]}
    if args.trainer == "gkd":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        dataset = Dataset.from_list(
            [
                {
                    "prompt": row["prompt"],
                    "input_ids": row["prompt_ids"] + row["response_ids"],
                    "completion_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["response_ids"]),
                }
                for row in rows
            ]
        )
        config = GKDConfig(lmbda=args.lmbda, max_new_tokens=args.max_new_tokens, **common)
        return GKDTrainer(args=config, train_dataset=dataset, **pair), tokenizer
    from trl import DistillationConfig, DistillationTrainer

    dataset = Dataset.from_list([{"prompt": row["prompt"]} for row in rows])
    config = DistillationConfig(max_completion_length=args.max_new_tokens, **common)
    return DistillationTrainer(args=config, train_dataset=dataset, **pair), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=["gkd", "distillation"], required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--lmbda", type=float, default=1.0, help="gkd: share of steps on the student's own outputs")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of autocast")
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = Clock()
    trainer, tokenizer = build(args, clock)
    trainer.train()
    trainer.model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(
        json.dumps(
            {
                "train_s": round(clock.wall, 3),
                "cpu_s": round(clock.cpu, 3),
                "step_s": round(statistics.median(clock.steps), 4),
                "steps": len(clock.steps),
                "trl": trl.__version__,
                "transformers": transformers.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
