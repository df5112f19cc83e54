"""What a step's tokens cost: the rule of a method, apart from models and vocabularies. Arithmetic and small state only.

A criterion names, for every source of sequences, the terms of a token's loss (``terms``). One that depends on more than the
token itself has two more seams: ``look_ahead`` is shown the whole step before its first gradient, all micro-batches
together, so that a median or a ratio does not depend on how the step was cut; and ``observe`` is told the loss after it.
Whatever it remembers from step to step is in ``state_dict``, and so in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distillm_cli.config.schema import Objective as Config
from distillm_cli.core import divergences
from distillm_cli.core.fused import PerToken, Terms
from distillm_cli.core.scheduler import Source
from distillm_cli.sequences import Sequence

CROSS_ENTROPY = Terms(kd=0.0, ce=1.0)


@dataclass(frozen=True, eq=False)
class Piece:
    """Sequences of one source: a part of a step, or one micro-batch of it."""

    source: Source
    sequences: list[Sequence]


@dataclass(frozen=True, eq=False)
class Reading:
    """What the models say of a piece's own tokens before the step: log-probability [N] of each supervised token, nats,
    in the order of the collated batch; None where ``looks_at`` does not ask for it."""

    log_p_N: Tensor | None = None  # the teacher's
    log_q_N: Tensor | None = None  # the student's


class Criterion:
    """(1 − kd_weight)·CE + kd_weight·D on data set rows; kd_weight·D on student outputs, whose tokens are no truth.

    config: the recipe's ``objective`` section, or None for SFT (cross-entropy alone).
    """

    looks_at: tuple[str, ...] = ()  # of "teacher", "student": whose reading of the step ``look_ahead`` needs
    rows_beside: bool = False  # whether a step on student outputs trains on its data set rows too

    def __init__(self, config: Config | None):
        self.config = config
        self.divergence = None if config is None else divergences.build(config)

    def terms(self, source: Source, progress: float = 1.0) -> Terms:
        """What a token of this source costs once ``progress`` (0 to 1) of the run is done.

        During ``kd_warmup`` the divergence's weight climbs, and cross-entropy has the rest: a skewed divergence hardly
        pulls where the student gives the teacher's token no probability yet (its gradient there is bounded by q/α).
        """
        if self.config is None:
            return CROSS_ENTROPY
        kd = self.config.kd_weight
        if progress < self.config.kd_warmup:
            kd *= progress / self.config.kd_warmup
        return Terms(kd=kd, ce=1.0 - kd if source is Source.DATASET else 0.0, divergence=self.divergence)

    @property
    def held_out(self) -> Terms:
        """The divergence alone, as it is measured on held-out rows."""
        return Terms(kd=1.0, ce=0.0, divergence=self.divergence)

    @property
    def per_sequence(self) -> bool:
        """Whether a token of a response of n tokens weighs 1/n, and sums are divided by sequences."""
        return self.config is not None and self.config.reduction == "sequence"

    def count(self, sequences: SequenceOf[Sequence]) -> int:
        """What the sum over a step's sequences is divided by: response tokens, or sequences."""
        return len(sequences) if self.per_sequence else sum(len(s.response) for s in sequences)

    def look_ahead(
        self, pieces: SequenceOf[Piece], readings: SequenceOf[Reading], progress: float
    ) -> list[PerToken | None]:
        """Takes in the whole step before ``terms`` is asked; what its tokens get of their own, piece by piece."""
        return [None] * len(pieces)

    def observe(self, loss: float, progress: float) -> None:
        """Takes the step's loss, per unit of ``count``, after the optimizer's step."""

    def figures(self) -> dict[str, float]:
        """What is worth seeing of the step beside its loss, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What later steps depend on, as JSON knows it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to where ``state_dict`` was taken."""

    def pack(self, sequences: SequenceOf[Sequence], prefix: str) -> dict[str, Tensor]:
        """What is remembered of these student outputs, for a checkpoint."""
        return {}

    def unpack(self, tensors: dict[str, Tensor], prefix: str, sequences: SequenceOf[Sequence]) -> None:
        """Takes back what ``pack`` gave, for the same sequences in the same order."""


def build(config: Config | None) -> Criterion:
    """The criterion of a recipe's ``objective`` section; None is SFT."""
    if config is not None and config.policy_gradient:
        from distillm_cli.core.policy_gradient import PolicyGradient  # it builds on this file

        return PolicyGradient(config)
    return Criterion(config)
