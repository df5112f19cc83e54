"""Compare tokens per second of the sampler and of transformers' ``model.generate`` in one process.

    python benchmarks/rollout.py [--threads 2] [--repeat 5] [--json]

The student is GPT-2-shaped (4 layers × 384, V = 50,257, random weights), in bf16; prompts of 128 tokens, or of 32 to
128 (ragged), 64 new tokens at T = 1, without stop tokens, so both generate the same number of tokens. Ours starts from
float32 weights under autocast, as in training, and casts them each time; the peer's weights are bf16. The peer runs
with its dynamic and its static cache, and the better result counts. Runs alternate, best of ``--repeat``; the ratio is
the result.

Goals: ≥ 3 at equal batch, ≥ 5 with eight batches of 8 in one draw (``rollout.bulk: 8``) against batch 8.
``--clock process`` counts this process's CPU seconds: for one thread on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from distillm_cli.models.backbone import Backbone
from distillm_cli.rollouts.next_token import Sampling
from distillm_cli.rollouts.sampler import sample

GOALS = {"equal batch": 3.0, "bulk 8": 5.0}


def student(args: argparse.Namespace) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape = {"n_layer": args.layers, "n_embd": args.width, "n_head": args.width // 64}
    config = GPT2Config(vocab_size=args.vocab, bos_token_id=None, eos_token_id=None, **shape)
    return GPT2LMHeadModel(config).eval().to(args.device)


def prompts(args: argparse.Namespace, rows: int, ragged: bool) -> list[np.ndarray]:
    random = np.random.default_rng(rows)
    lengths = random.integers(args.prompt // 4, args.prompt + 1, rows) if ragged else [args.prompt] * rows
    return [random.integers(0, args.vocab, length) for length in lengths]


def ours(backbone: Backbone, given: list[np.ndarray], args: argparse.Namespace) -> Callable[[], int]:
    sampling, seeds = Sampling(max_new_tokens=args.new), [(0, row) for row in range(len(given))]

    def run() -> int:
        with torch.autocast(args.device, torch.bfloat16):
            return sum(len(out.tokens) for out in sample(backbone, given, sampling, seeds))

    return run


def peer(model: GPT2LMHeadModel, given: list[np.ndarray], args: argparse.Namespace, cache: str) -> Callable[[], int]:
    longest = max(len(prompt) for prompt in given)
    ids = torch.tensor(np.stack([np.pad(p, (longest - len(p), 0)) for p in given]), device=args.device)
    mask = torch.tensor(np.stack([np.pad(np.ones_like(p), (longest - len(p), 0)) for p in given]), device=args.device)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "use_cache": True, "pad_token_id": 0}

    @torch.inference_mode()
    def run() -> int:
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=args.new, cache_implementation=cache, **options
        )  # fmt: skip
        return out[:, longest:].numel()

    return run


def best_of(runs: dict[str, Callable[[], int]], args: argparse.Namespace) -> dict[str, float]:
    """Return tokens per second of each, with alternating runs. The first round is a warm-up."""
    clock = time.process_time if args.clock == "process" else time.perf_counter
    best: dict[str, float] = {}
    for turn in range(args.repeat + 1):
        for name, run in runs.items():
            start = clock()
            tokens = run()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if turn:
                best[name] = max(best.get(name, 0.0), tokens / (clock() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("prompt", 128), ("new", 64), ("layers", 4), ("width", 384), ("vocab", 50257)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=("wall", "process"), default="wall")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")

    nothing_ends = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    backbone = Backbone(student(args), nothing_ends, args.vocab)
    model = student(args).to(torch.bfloat16)
    result: dict[str, dict[str, float]] = {}
    for ragged in (False, True):
        for rows in args.batches:
            given = prompts(args, rows, ragged)
            runs = {"ours": ours(backbone, given, args)}
            runs |= {f"generate, {c}": peer(model, given, args, c) for c in ("dynamic", "static")}
            found = best_of(runs, args)
            found["ratio"] = found["ours"] / max(found["generate, dynamic"], found["generate, static"])
            name = f"batch {rows}{', ragged' if ragged else ''}"
            result[name] = {key: round(value, 2) for key, value in found.items()}
            if not args.json:
                print(f"{name:18s} " + "  ".join(f"{k} {v:,.2f}" for k, v in result[name].items()), flush=True)
    for ragged in ("", ", ragged"):
        few, many = (result.get(f"batch {rows}{ragged}") for rows in (8, 64))
        if few and many:
            peers = max(few["generate, dynamic"], few["generate, static"])
            result[f"bulk 8{ragged}"] = {"ratio": round(many["ours"] / peers, 2)}
    if args.json:
        print(json.dumps({"unit": "tokens/s", "goals": GOALS, **result}))
        return
    for name, found in result.items():
        goal = GOALS["bulk 8" if name.startswith("bulk") else "equal batch"]
        print(f"{name:18s} {found['ratio']:5.2f} ×   goal {goal:g}")


if __name__ == "__main__":
    main()
