"""Measure what the figures of a run's health cost (docs/training.md), as a share of CPU time.

    python benchmarks/health.py run [--recipe quickstart] [--steps 100] [--set KEY=VALUE …]
    python benchmarks/health.py loss [--tokens 1024] [--vocab 50257] [--width 768] [--rounds 3]

``run`` trains with the recipe and prints the share of its steps that is spent on the figures, and that of its validations.
``loss`` compares a loss with measurement to one without, taken in turns, without the models' trunks: an upper bound for a
large vocabulary, since the trunk of a step costs as much again or more.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch
from selection import States

import distillm_cli as distillm
from distillm_cli.config.load import resolve
from distillm_cli.config.schema import ObjectiveConfig, ScheduleConfig
from distillm_cli.losses import objectives
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.models.backbone import Head
from distillm_cli.rollouts.pool import SequencePool
from distillm_cli.rollouts.scheduler import Source, build_scheduler
from distillm_cli.training.health import StepHealth
from distillm_cli.training.recovery import MicroBatch
from distillm_cli.training.trainer import Trainer
from distillm_cli.training.validation import DivergenceProbe, Validator
from distillm_cli.types import Batch, Sequence


def timed(owner: type, name: str, seconds: Counter[str]) -> None:
    """Add the CPU time of a method to ``seconds``, under its qualified name."""
    method: Callable[..., Any] = getattr(owner, name)

    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        try:
            return method(*args, **kwargs)
        finally:
            seconds[f"{owner.__name__}.{name}"] += time.process_time() - started

    setattr(owner, name, run)


def measure_run(recipe: str, steps: int, sets: list[str]) -> None:
    seconds: Counter[str] = Counter()
    for name in ("begin_attempt", "observe", "_measure", "figures"):
        timed(StepHealth, name, seconds)
    timed(Trainer, "train_step", seconds)
    timed(Validator, "measure", seconds)
    timed(DivergenceProbe, "measure", seconds)
    resolved = resolve(command="distill", recipe=recipe, sets=[f"train.steps={steps}", "eval.report_rows=0", *sets])
    with tempfile.TemporaryDirectory() as directory:
        distillm.distill(recipe=resolved, output=f"{directory}/run")
    steps_s = seconds["Trainer.train_step"]
    health_s = sum(value for name, value in seconds.items() if name.startswith("StepHealth."))
    print(f"steps: {steps_s:.2f} s, health {health_s:.3f} s, {health_s / steps_s:.2%}")
    both_s = steps_s + seconds["Validator.measure"]
    divergences_s = seconds["DivergenceProbe.measure"]
    print(f"divergences at validations: {divergences_s:.3f} s, {divergences_s / both_s:.2%} of steps and validations")


def measure_loss(tokens: int, vocab: int, width: int, rounds: int) -> None:
    torch.manual_seed(0)
    student = States(tokens, vocab, width)
    teacher_head = Head(torch.randn(vocab, width) / width**0.5)
    teacher_hidden_ND = torch.randn(tokens, width)
    batch = Batch(
        torch.zeros(1, tokens, dtype=torch.int64),
        torch.arange(tokens),
        torch.zeros(tokens, dtype=torch.int64),
        torch.zeros(tokens, dtype=torch.int64),
    )
    row = Sequence(np.zeros(1, dtype=np.int32), np.zeros(tokens, dtype=np.int32))
    micro = MicroBatch(Source.DATASET, [[row]])
    objective = objectives.build(ObjectiveConfig(divergence="skl"))
    loss = StudentLoss(student, objective, teacher_head=teacher_head).train()
    pool = SequencePool(lambda step: [row], build_scheduler(ScheduleConfig(kind="off"), steps=1, seed=0, batches=1))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds + 1):  # the first round is not counted
        for is_measured in seconds:
            health = StepHealth(loss, pool, every=int(is_measured))
            started = time.process_time()
            health.begin_attempt(1, [micro])
            health.observe(micro)
            loss([batch], teacher_hidden_ND, objective.weights(Source.DATASET), None, 1 / tokens)[0].backward()
            seconds[is_measured].append(time.process_time() - started)
            student.zero_grad(set_to_none=True)
    plain, measured = (min(seconds[key][1:]) for key in (False, True))
    print(f"loss {plain:.3f} s, with measurement {measured:.3f} s: {measured / plain - 1:.1%} in a measured step,")
    print(f"{(measured / plain - 1) / 10:.2%} of the loss if every tenth step is measured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "loss"))
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, such as student.sft_epochs=0")
    for name, value in (("tokens", 1024), ("vocab", 50257), ("width", 768), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    if args.what == "run":
        measure_run(args.recipe, args.steps, args.set)
    else:
        measure_loss(args.tokens, args.vocab, args.width, args.rounds)


if __name__ == "__main__":
    main()
