"""Compare the sampler with transformers' ``generate``, with its dynamic cache and with a static one.

On a GPU ``generate`` compiles its forward pass for a static cache and replays CUDA graphs; the warm-up includes that. The
student is GPT-2, 12 layers × 768, with random weights; no token ends a response.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measure import error_line, synchronize
from models import tokenizer_without_end

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rollout

from distillm_cli.models.backbone import Backbone


def rows(context: Any) -> Iterator[dict[str, Any]]:
    sizes = {"layers": 1, "width": 64, "vocab": 1031, "prompt": 8, "new": 8} if context.tiny else {
        "layers": 12, "width": 768, "vocab": 50257, "prompt": 128, "new": 128,
    }  # fmt: skip
    args = argparse.Namespace(**sizes, device=context.device.type)
    backbone = Backbone(rollout.student(args), tokenizer_without_end(), args.vocab)
    model = rollout.student(args).to(torch.bfloat16)
    for count in (2, 4) if context.tiny else (8, 64, 256):
        group = f"batch {count}, prompt {args.prompt}, {args.new} new tokens"
        given = rollout.prompts(args, count, ragged=False)
        runs = {
            "ours": lambda given=given: rollout.ours(backbone, given, args),
            "generate, dynamic cache": lambda given=given: rollout.peer(model, given, args, "dynamic"),
            "generate, static cache, CUDA graphs": lambda given=given: rollout.peer(model, given, args, "static"),
        }
        base = None
        for name, build in runs.items():
            if context.remaining < 8:
                yield {"group": group, "skipped": f"{name}: out of time"}
                continue
            try:
                run = build()
                start = time.perf_counter()
                run()
                first = time.perf_counter() - start
                best = min(_seconds(run, context) for _ in range(2))
            except Exception as error:
                yield {"group": group, "skipped": f"{name}: {error_line(error)}"}
                continue
            rate = count * args.new / best
            base = base or rate
            yield {
                "group": group, "sampler": name, "first call s": first, "tokens/s": round(rate), "ours ×": base / rate
            }  # fmt: skip


def _seconds(run: Any, context: Any) -> float:
    synchronize(context.device)
    start = time.perf_counter()
    run()
    synchronize(context.device)
    return time.perf_counter() - start
