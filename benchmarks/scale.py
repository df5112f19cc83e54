"""Measure the growth of a step's cost with response, vocabulary and batch, and of the teacher cache with its rows.

    python benchmarks/scale.py [--axes response vocab batch rows] [--threads N] [--rounds N] [--json]

The first three time one training step with the teacher's states cached (``step.py``'s pair and path: student 4 × 384,
teacher 12 × 768, bf16), with one size changed and the others fixed: response 64, prompt 64, batch 8, V = 32,000.
``work`` is the increase of the maximum resident size by the step, without gradients (an earlier step has allocated
these). ``rows`` fills a cache on disk from a one-layer teacher (32 tokens a row, width 64), reads it back as a run does
and draws 200 random batches of 64: seconds to fill, to check and open, and for one batch. Its ``work`` consists of
mapped pages, which the system can reclaim.

Every case has its own process. ``growth`` is the exponent between two sizes, log(seconds'/seconds) / log(size'/size):
1 is linear. Goal: ≤ 1.1 from the first size to the last; the work of the loss flat in V·tokens is ``memory.py``'s.
Exits 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from memory import MB, resident

SIZES = {
    "response": [32, 64, 128, 256, 512],
    "vocab": [32_000, 64_000, 128_000, 256_000],
    "batch": [1, 4, 16, 64],
    "rows": [1_000, 10_000, 100_000],
}
SHAPE = {"response": 64, "prompt": 64, "batch": 8, "vocab": 32_000}
GROWTH = 1.1


def step_case(axis: str, size: int, rounds: int) -> dict:
    import torch
    from step import Ours

    shape = SimpleNamespace(**SHAPE | {axis: size})
    with tempfile.TemporaryDirectory() as directory:
        ours = Ours(shape, Path(directory))
    ours.update(ours.cached)  # the teacher's states are now cached, and the libraries are warm
    gradients = sum(p.numel() * p.element_size() for p in ours.objective.parameters())
    ours.objective.zero_grad(set_to_none=True)
    Path("/proc/self/clear_refs").write_text("5")
    before, best = resident("VmRSS"), math.inf
    for _ in range(rounds):
        began = time.perf_counter()
        ours.update(ours.cached)
        best = min(best, time.perf_counter() - began)
    work = resident("VmHWM") - before - gradients
    return {"seconds": best, "work": max(work, 0), "threads": torch.get_num_threads()}


def rows_case(rows: int) -> dict:
    import numpy as np
    import torch

    from distillm_cli.models.backbone import Backbone
    from distillm_cli.teachers import teacher_cache
    from distillm_cli.teachers.cached import CachedTeacher
    from distillm_cli.teachers.local import LocalTeacher
    from distillm_cli.types import Sequence, collate
    from tests import tiny

    random, tokenizer = np.random.default_rng(0), tiny.tokenizer()
    sequences = [
        Sequence(*random.integers(0, 16, (2, 32), dtype=np.int32), row=row)
        for row in range(rows)
    ]  # fmt: skip
    fields = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    teacher = LocalTeacher(Backbone(tiny.model("llama", len(tokenizer), **fields), tokenizer))
    with tempfile.TemporaryDirectory() as directory:
        key = teacher_cache.CacheKey("scale", str(rows))
        place = teacher_cache.cache_directory(Path(directory), key)
        began = time.perf_counter()
        teacher_cache.write_cache(place, key, teacher, sequences, torch.device("cpu"), lambda event: None, of={})
        filled = time.perf_counter()
        states = teacher_cache.read_cache(place, key, sequences, lambda event: None)
        opened = time.perf_counter()
        before = resident("VmRSS")
        reader = CachedTeacher(teacher.model, mode="disk", rows=states)
        batches = [[sequences[i] for i in random.integers(0, rows, 64)] for _ in range(200)]
        reading = time.perf_counter()
        for batch in batches:
            reader.hidden(collate(batch), batch)
        done = time.perf_counter()
        return {
            "seconds": filled - began,
            "open": opened - filled,
            "batch": (done - reading) / len(batches),
            "bytes": states.bytes,
            "work": max(resident("VmRSS") - before, 0),
        }


def measured(axis: str, size: int, args: argparse.Namespace) -> dict:
    """Measure one case in its own process."""
    arguments = ["--case", axis, str(size), "--rounds", str(args.rounds), "--threads", str(args.threads)]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{axis} {size}\n{done.stderr}")
    print(f"{axis} {size:,}: done", file=sys.stderr, flush=True)
    return {"size": size} | json.loads(done.stdout)


def growth(first: dict, last: dict) -> float:
    return math.log(last["seconds"] / first["seconds"]) / math.log(last["size"] / first["size"])


def print_table(axis: str, found: list[dict]) -> None:
    more = ["open", "batch"] if axis == "rows" else []
    print(f"\n| {axis} | seconds | growth | work MB |{''.join(f' {name} ms |' for name in more)}")
    print("|---" * (4 + len(more)) + "|")
    for before, case in zip([None, *found], found, strict=False):
        grown = "" if before is None else f"{growth(before, case):.2f}"
        cells = [f"{case['size']:,}", f"{case['seconds']:.3f}", grown, f"{case['work'] / MB:.0f}"]
        print("| " + " | ".join(cells + [f"{1000 * case[name]:.2f}" for name in more]) + " |")
    print(f"\nfirst to last: {growth(found[0], found[-1]):.2f} (goal ≤ {GROWTH})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        import torch

        torch.set_num_threads(args.threads)
        axis, size = args.case[0], int(args.case[1])
        print(json.dumps(rows_case(size) if axis == "rows" else step_case(axis, size, args.rounds)))
        return
    results = {axis: [measured(axis, size, args) for size in SIZES[axis]] for axis in args.axes}
    if args.json:
        print(json.dumps(results))
    else:
        for axis, found in results.items():
            print_table(axis, found)
    missed = [axis for axis, found in results.items() if growth(found[0], found[-1]) > GROWTH]
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
