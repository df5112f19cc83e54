"""Hold the fixed properties of a run, and the state that changes during training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from distillm_cli.rollouts.scheduler import Source
from distillm_cli.types import MIN_PASS_OVERHEAD

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class RunInfo:
    """Describe a run to its trainer.

    steps: optimizer steps of the run. pass_overhead: see ``length_groups``. dtype: of autocast; float32 turns it off.
    cuts_outputs: whether student outputs are cut on purpose. identity: returns the values that a resume must not change,
    which checkpoints contain.
    """

    steps: int
    steps_per_epoch: int
    method: str = ""
    device: torch.device = _CPU
    dtype: torch.dtype = torch.float32
    pass_overhead: int = MIN_PASS_OVERHEAD
    cuts_outputs: bool = False
    identity: Callable[[], dict[str, Any]] = dict

    def autocast(self) -> torch.autocast:
        """Return the autocast context of the student."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


@dataclass
class TrainerState:
    """Hold the state that changes from step to step. Checkpoints contain all of it.

    sources: steps by source. source_seconds: their seconds, without validations and checkpoints. stale: validations since
    the last improvement. alarm_step: that of the first alarm. validation_due: whether the step's validation is still to be
    made, after it failed. reason: "done" or "early stop".
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_loss: float | None = None
    valid_loss: float | None = None
    first_valid_loss: float | None = None
    scores: dict[str, float | None] = field(default_factory=dict)
    sources: Counter[str] = field(default_factory=Counter)
    source_seconds: dict[str, float] = field(default_factory=dict)
    phis: list[tuple[int, float]] = field(default_factory=list)
    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    alarm_step: int | None = None
    validation_due: bool = False
    reason: str = "done"

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TrainerState:
        """Return the state that a checkpoint records. A run that stopped early may be resumed."""
        restored = cls(**fields)
        restored.sources = Counter(restored.sources)
        if "source_seconds" not in fields:  # an older checkpoint: steps of all sources are taken as equally long
            restored.source_seconds = {
                name: restored.seconds * steps / restored.step for name, steps in restored.sources.items()
            }
        restored.phis = [(step, phi) for step, phi in restored.phis]
        restored.reason = "done"
        return restored

    def add_step(self, source: Source, loss: float, tokens: int, seconds: float) -> None:
        """Count a step. tokens: supervised tokens that it trained on."""
        self.step += 1
        self.tokens += tokens
        self.train_loss = loss
        self.sources[source.value] += 1
        self.source_seconds[source.value] = self.source_seconds.get(source.value, 0.0) + seconds

    def steps_with(self, source: Source) -> int:
        """Return the number of steps that trained on this source, alone or with another."""
        return sum(count for name, count in self.sources.items() if source in name.split("+"))
