"""Compare whole runs, from the command line, with TRL's trainers on the same saved models and rows.

Teacher GPT-2 124M, student 4 layers × 384, random weights, 50,257 tokens, rows of random words. Ours trains on its own
outputs only (``--schedule on``), as TRL's DistillationTrainer does, and with the adaptive schedule.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import error_line
from models import gpt2
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent


def save_models(directory: Path, tiny: bool) -> PreTrainedTokenizerFast:
    """Save teacher and student with a tokenizer of generated words; return the tokenizer."""
    vocab = 1031 if tiny else 50257
    words = {f"w{i}": i for i in range(vocab - 1)} | {"<end>": vocab - 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    shapes = (
        {"teacher": (2, 64, 4), "student": (1, 32, 2)} if tiny else {"teacher": (12, 768, 12), "student": (4, 384, 6)}
    )
    for name, shape in shapes.items():
        config = gpt2(*shape, vocab, eos_token_id=vocab - 1, bos_token_id=vocab - 1)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return tokenizer


def save_rows(directory: Path, tokenizer: PreTrainedTokenizerFast, count: int, prompt: int, response: int) -> None:
    """Write the same rows for both programs: ``rows.jsonl`` for ours, ``ids.jsonl`` for TRL's trainers."""
    random = np.random.default_rng(0)
    ours, theirs = [], []
    for _ in range(count):
        ids = random.integers(0, len(tokenizer) - 1, prompt + response).tolist()
        text, answer = (" ".join(f"w{i}" for i in part) for part in (ids[:prompt], ids[prompt:]))
        ours.append({"prompt": text, "output": answer})
        theirs.append({"prompt": text, "prompt_ids": ids[:prompt], "response_ids": [*ids[prompt:], len(tokenizer) - 1]})
    for name, rows_ in (("rows", ours), ("ids", theirs)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_))


def last_json(command: list[str], seconds: float) -> dict[str, Any]:
    """Run a command; return the JSON object on its last line. Raises RuntimeError with its last words."""
    environment = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(1, seconds), env=environment)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise RuntimeError(lines[-1] if lines else f"exit code {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def rows(context: Any) -> Iterator[dict[str, Any]]:
    prompt, response, count, steps, batch = (4, 6, 16, 3, 4) if context.tiny else (64, 64, 512, 40, 32)
    dtype = "fp32" if context.tiny else "bf16"
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tokenizer = save_models(directory, context.tiny)
        save_rows(directory, tokenizer, count, prompt, response)
        pair = ["--teacher", str(directory / "teacher"), "--student", str(directory / "student")]
        fields = [
            f"rollout.max_new_tokens={response}", "eval.report_rows=0", "train.save_steps=100000", "data.template=plain",
            "train.eval_steps=100000", f"teacher.dtype={dtype}", "data.max_prompt_length=64", "data.valid_limit=8",
        ]  # fmt: skip
        command = [sys.executable, "-m", "distillm_cli", "distill", *pair, "--data", str(directory / "rows.jsonl")]
        command += ["--steps", str(steps), "--batch-size", str(batch), "--lr", "1e-4", "--dtype", dtype, "--quiet"]
        command += ["--max-length", "160", "--json", *(word for f in fields for word in ("--set", f))]
        runs = {
            "ours, own outputs": [*command, "--schedule", "on", "--output", str(directory / "on")],
            "ours, adaptive, φ = 0.3": [
                *command, "--schedule", "adaptive", "--set", "schedule.phi=0.3", "--output", str(directory / "ad"),
            ],
        }  # fmt: skip
        for trainer in ("distillation", "gkd"):
            runs[f"TRL, {trainer}"] = [
                sys.executable, str(HERE.parent / "peers_trl.py"), "--trainer", trainer, *pair, "--rows",
                str(directory / "ids.jsonl"), "--output", str(directory / trainer), "--steps", str(steps), "--lr", "1e-4",
                "--batch", str(batch), "--max-new-tokens", str(response), "--dtype", dtype,
            ]  # fmt: skip
        for label, run in runs.items():
            if label.startswith("TRL") and importlib.util.find_spec("trl") is None:
                yield {"skipped": f"{label}: trl is not installed"}
                continue
            if context.remaining < 5:
                yield {"skipped": f"{label}: out of time"}
                continue
            try:
                found = last_json(run, context.remaining)
            except (RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
                yield {"skipped": f"{label}: {error_line(error)}"}
                continue
            yield {
                "run": label, "steps": steps, "training s": found["train_s"],
                "s per step": found["train_s"] / steps, "median step s": found.get("step_s"),
            }  # fmt: skip
