"""Measure the loss of a share of the tokens (``objective.tokens``) beside that of all, at GPT-2's vocabulary.

    python benchmarks/selection.py [--tokens 1024] [--vocab 50257] [--width 768] [--rounds 3]

Prints, for each selection, the smallest seconds of forward and backward pass over the rounds, taken in turns, and the
ratio to all tokens. Two threads or what OMP_NUM_THREADS says.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

from distillm_cli.config.schema import ObjectiveConfig
from distillm_cli.losses import objectives
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.models.backbone import Head
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.types import Batch


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 1024), ("vocab", 50257), ("width", 768), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.manual_seed(0)
    N, rows = args.tokens, 8
    student = States(N, args.vocab, args.width)
    teacher_hidden_ND = torch.randn(N, args.width)
    teacher_head = Head(torch.randn(args.vocab, args.width) / args.width**0.5)
    rows_N = torch.arange(N) * rows // N
    batch = Batch(
        torch.zeros(rows, N // rows + 1, dtype=torch.int64), torch.arange(N), torch.zeros(N, dtype=torch.int64), rows_N
    )
    seconds: dict[str, list[float]] = {}
    for _ in range(args.rounds + 1):  # the first round is not counted
        for tokens in ("all", "entropy:0.5", "divergence:0.5", "entropy:0.2"):
            objective = objectives.build(ObjectiveConfig(divergence="skl", tokens=tokens))
            loss = StudentLoss(student, objective, teacher_head=teacher_head).train()
            started = time.perf_counter()
            loss([batch], teacher_hidden_ND, objective.weights(Source.ROLLOUT), None, 1 / N)[0].backward()
            seconds.setdefault(tokens, []).append(time.perf_counter() - started)
            student.zero_grad(set_to_none=True)
    best = {tokens: min(found[1:]) for tokens, found in seconds.items()}
    for tokens, found in best.items():
        print(f"{tokens:16} {found:.3f} s  {found / best['all']:.2f} x all")


if __name__ == "__main__":
    main()
