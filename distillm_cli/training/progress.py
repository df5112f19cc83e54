"""Where a run is, and what it has seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from distillm_cli.rollouts.scheduler import Source
from distillm_cli.types import Sequence


@dataclass
class TrainerState:
    """Where a run is, and what it has seen. All of it is in a checkpoint, so all of it survives a resume."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_loss: float | None = None
    valid_loss: float | None = None
    first_valid_loss: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    sources: Counter = field(default_factory=Counter)
    sampled: int = 0
    sampled_tokens: int = 0
    teacher_sampled: int = 0
    teacher_sampled_tokens: int = 0
    phis: list[tuple[int, float]] = field(default_factory=list)
    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    reason: str = "done"

    def count(self, drawn: SequenceOf[Sequence], *, by_teacher: bool = False) -> None:
        """Adds sequences that were sampled, and their tokens."""
        tokens = sum(s.supervised for s in drawn)
        if by_teacher:
            self.teacher_sampled += len(drawn)
            self.teacher_sampled_tokens += tokens
        else:
            self.sampled += len(drawn)
            self.sampled_tokens += tokens

    def steps_with(self, source: Source) -> int:
        """Steps that trained on this source, alone or beside another."""
        return sum(count for name, count in self.sources.items() if source in name.split("+"))
