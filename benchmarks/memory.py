"""Compare the peak memory that the loss adds with that of a loss over whole logits.

    python benchmarks/memory.py [--vocab 50257 256000] [--tokens 512 2048 8192] [--json]

One process per case. Hidden states and both heads exist before. ``added`` is the highest resident size during loss and
backward, less the resident size before (the kernel's high-water mark, reset just before: ``/proc/self/clear_refs``).
Student of width 384 with a trainable float32 head, teacher of width 768 with a bf16 head, bf16 products, skew KL.

    added      everything, including two parts that every loss with a trainable head needs:
    gradient   the head's, [V, D] float32, the result
    cast       the head's bf16 copy, which autocast would also make
    work       added − gradient − cast: the memory of the loss itself. Goal: ≤ 128 MB at V ≤ 64k, ≤ 512 MB at V ≤ 256k,
               whatever the number of tokens

The textbook loss has both models' logits only at the N supervised positions (at all positions it would need more),
float32 softmaxes and autograd. It is skipped, with its estimated memory, if that is more than half of the free memory.
Exits 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

MB = 10**6
GOALS = {64_000: 128 * MB, 256_000: 512 * MB}  # vocabulary up to → maximum work in bytes
FUSED, TEXTBOOK = "fused", "textbook"
_TABLES = 9  # float32 [N, V] tables of the textbook loss, saved for backward or computed in it, for the estimate


def resident(field: str) -> int:
    """Return ``VmRSS`` or ``VmHWM`` (its maximum since the last reset), bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark reads /proc/self/status: Linux only")


def case(name: str, vocab: int, tokens: int, width: int, teacher_width: int) -> dict:
    """Measure one case, in its own process."""
    import torch
    import torch.nn.functional as F

    from distillm_cli.losses.divergences import SkewKL
    from distillm_cli.losses.fused import fused_loss
    from distillm_cli.losses.weights import LossWeights
    from distillm_cli.models.backbone import Head

    torch.manual_seed(0)

    def fused(hidden, weight, teacher_hidden, teacher_weight):
        return fused_loss(
            hidden, Head(weight), torch.zeros(len(hidden), dtype=torch.long), weights=LossWeights(1.0, 0.0, SkewKL(0.1)),
            teacher_hidden_ND=teacher_hidden, teacher_head=Head(teacher_weight),
            matmul_dtype=torch.bfloat16,
        )  # fmt: skip

    def textbook(hidden, weight, teacher_hidden, teacher_weight):
        with torch.autocast("cpu", torch.bfloat16):
            z, teacher_z = hidden @ weight.T, teacher_hidden @ teacher_weight.T
        p, q = F.softmax(teacher_z, -1, dtype=torch.float32), F.softmax(z, -1, dtype=torch.float32)
        return (p * (p.clamp_min(1e-30) / (0.1 * p + 0.9 * q)).log()).sum()

    def inputs(N, V):
        hidden, weight = torch.randn(N, width).requires_grad_(), (torch.randn(V, width) / width**0.5).requires_grad_()
        return hidden, weight, torch.randn(N, teacher_width).bfloat16(), torch.randn(V, teacher_width).bfloat16()

    loss = {FUSED: fused, TEXTBOOK: textbook}[name]
    (loss(*inputs(64, 2000)) / 64).backward()  # memory that libraries allocate at their first call does not count
    this = inputs(tokens, vocab)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    total = loss(*this) / tokens
    total.backward()
    added = resident("VmHWM") - before
    gradient, cast = 4 * vocab * width, 2 * vocab * width
    return {"loss": total.item(), "added": added, "gradient": gradient, "cast": cast, "work": added - gradient - cast}


def in_a_process(args: argparse.Namespace, name: str, vocab: int, tokens: int) -> dict:
    spec = {"name": name, "vocab": vocab, "tokens": tokens, "width": args.width, "teacher_width": args.teacher_width}
    needs = _TABLES * 4 * vocab * tokens
    if name == TEXTBOOK and needs > available() / 2:
        return spec | {"skipped": f"would need about {needs / 1e9:.1f} GB"}
    done = subprocess.run([sys.executable, __file__, "--case", json.dumps(spec)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{spec}\n{done.stderr}")
    return spec | json.loads(done.stdout)


def available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 0


def goal(vocab: int) -> int | None:
    return next((limit for size, limit in GOALS.items() if vocab <= size), None)


def print_table(results: list[dict]) -> None:
    print(
        "| V | tokens | loss | added MB | gradient | cast | work | goal | textbook / fused |\n|---" + "|---" * 8 + "|"
    )
    fused = {(r["vocab"], r["tokens"]): r for r in results if r["name"] == FUSED}
    for r in results:
        head = f"| {r['vocab']:,} | {r['tokens']:,} | {r['name']} "
        if "skipped" in r:
            print(f"{head}| {r['skipped']} | | | | | |")
            continue
        cells = [f"{r[part] / MB:.0f}" for part in ("added", "gradient", "cast", "work")]
        ratio, limit = r["added"] / fused[r["vocab"], r["tokens"]]["added"], goal(r["vocab"])
        cells.append(f"≤ {limit / MB:.0f}" if limit and r["name"] == FUSED else "")
        print(f"{head}| {' | '.join(cells)} | {'' if r['name'] == FUSED else f'{ratio:.1f}'} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[50257, 256_000])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--teacher-width", type=int, default=768)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(case(**json.loads(args.case))))
        return
    results = []
    for vocab in args.vocab:
        for tokens in args.tokens:
            for name in (FUSED, TEXTBOOK):
                results.append(in_a_process(args, name, vocab, tokens))
                print(f"V {vocab:,}, {tokens:,} tokens, {name}: done", file=sys.stderr, flush=True)
    print(json.dumps(results)) if args.json else print_table(results)
    missed = [r for r in results if r["name"] == FUSED and goal(r["vocab"]) and r["work"] > goal(r["vocab"])]
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
