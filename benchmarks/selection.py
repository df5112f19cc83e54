"""Measure the loss of a share of the tokens (``objective.tokens``) beside that of all, at GPT-2's vocabulary.

    python benchmarks/selection.py [--tokens 1024] [--vocab 50257] [--width 768] [--rounds 3]

Prints, for each selection, the smallest seconds of forward and backward pass over the rounds, taken in turns, the ratio to
all tokens, and the memory that one pass adds, the head's gradient without (its highest resident size, in a process of its
own). Two threads or what OMP_NUM_THREADS says.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path

import torch
from memory import MB, resident
from torch import nn

from distillm_cli.config.schema import ObjectiveConfig
from distillm_cli.losses import objectives
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.models.backbone import Head
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.types import Batch

SELECTIONS = ("all", "entropy:0.5", "divergence:0.5", "entropy:0.2")
ROWS = 8


class States(nn.Module):
    """Stand in for a student whose hidden states are given, so that only the loss is measured."""

    def __init__(self, tokens: int, vocab: int, width: int):
        super().__init__()
        self.hidden_ND = nn.Parameter(torch.randn(tokens, width))
        self.weight_VD = nn.Parameter(torch.randn(vocab, width) / width**0.5)

    def hidden(self, batch: Batch, *, for_backward: bool = False) -> torch.Tensor:
        return self.hidden_ND * 1.0

    def head(self) -> Head:
        return Head(self.weight_VD)


class Step:
    """Hold states and heads of both models for a loss over a number of tokens."""

    def __init__(self, tokens: int, vocab: int, width: int):
        torch.manual_seed(0)
        self.student = States(tokens, vocab, width)
        self.teacher_hidden_ND = torch.randn(tokens, width)
        self.teacher_head = Head(torch.randn(vocab, width) / width**0.5)
        ids = torch.zeros(ROWS, tokens // ROWS + 1, dtype=torch.int64)
        self.batch = Batch(
            ids, torch.arange(tokens), torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens) * ROWS // tokens
        )

    def __call__(self, selection: str) -> float:
        """Make a forward and a backward pass; return the seconds."""
        objective = objectives.build(ObjectiveConfig(divergence="skl", tokens=selection))
        loss = StudentLoss(self.student, objective, teacher_head=self.teacher_head).train()
        weights = objective.weights(Source.ROLLOUT)
        started = time.perf_counter()
        loss([self.batch], self.teacher_hidden_ND, weights, None, 1 / len(self.teacher_hidden_ND))[0].backward()
        seconds = time.perf_counter() - started
        self.student.zero_grad(set_to_none=True)
        return seconds


def added_memory(selection: str, tokens: int, vocab: int, width: int) -> int:
    """Return the bytes that a pass adds to the process, the head's gradient [vocab, width] without."""
    Step(64, 2000, width)(selection)  # memory that libraries allocate at their first call does not count
    step = Step(tokens, vocab, width)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step(selection)
    return resident("VmHWM") - before - 4 * vocab * width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 1024), ("vocab", 50257), ("width", 768), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    shape = (args.tokens, args.vocab, args.width)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = {name: pool.apply(added_memory, (name, *shape)) for name in SELECTIONS}
    step = Step(*shape)
    seconds: dict[str, list[float]] = {name: [] for name in SELECTIONS}
    for _ in range(args.rounds + 1):  # the first round is not counted
        for name in SELECTIONS:
            seconds[name].append(step(name))
    best = {name: min(found[1:]) for name, found in seconds.items()}
    for name, found in best.items():
        print(f"{name:16} {found:.3f} s  {found / best['all']:.2f} x all  {memory[name] / MB:.0f} MB")


if __name__ == "__main__":
    main()
