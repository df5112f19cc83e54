"""What a step's tokens cost: the rule of a method, apart from models and vocabularies. Arithmetic and small state only.

A criterion names, for every source of sequences, the terms of a token's loss (``terms``). One that depends on more than the
token itself has two more seams: ``look_ahead`` is shown the whole step before its first gradient, all micro-batches
together, so that a median or a ratio does not depend on how the step was cut; and ``observe`` is told the loss after it.
Whatever it remembers from step to step is in ``state_dict``, and so in every checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distillm_cli.config.schema import ObjectiveConfig
from distillm_cli.losses import divergences
from distillm_cli.losses.divergences import KL
from distillm_cli.losses.families import Interpolated
from distillm_cli.losses.terms import LossWeights, TokenWeights
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.types import Sequence

CROSS_ENTROPY = LossWeights(kd=0.0, ce=1.0)
_TRUTH = (Source.DATASET, Source.TEACHER)  # whose tokens are to be learnt as they stand


@dataclass(frozen=True, eq=False)
class SourceBatch:
    """Sequences of one source: a part of a step, or one micro-batch of it."""

    source: Source
    sequences: list[Sequence]


@dataclass(frozen=True, eq=False)
class TokenLogProbs:
    """What the models say of a piece's own tokens before the step: log-probability [N] of each supervised token, nats,
    in the order of the collated batch; None where ``looks_at`` does not ask for it."""

    log_p_N: Tensor | None = None  # the teacher's
    log_q_N: Tensor | None = None  # the student's


class Objective:
    """(1 − kd_weight)·CE + kd_weight·D on data set rows and teacher samples; kd_weight·D on student outputs, whose tokens
    are no truth.

    config: the recipe's ``objective`` section, or None for SFT (cross-entropy alone).
    """

    looks_at: tuple[str, ...] = ()  # of "teacher", "student": whose reading of the step ``look_ahead`` needs
    rows_beside: bool = False  # whether a step on student outputs trains on its data set rows too

    def __init__(self, config: ObjectiveConfig | None):
        self.config = config
        self.divergence = None if config is None else divergences.build(config)

    def terms(self, source: Source, progress: float = 1.0) -> LossWeights:
        """What a token of this source costs once ``progress`` (0 to 1) of the run is done.

        During ``kd_warmup`` the divergence's weight climbs, and cross-entropy has the rest: a skewed divergence hardly
        pulls where the student gives the teacher's token no probability yet (its gradient there is bounded by q/α).
        """
        if self.config is None:
            return CROSS_ENTROPY
        kd = self.config.kd_weight
        if progress < self.config.kd_warmup:
            kd *= progress / self.config.kd_warmup
        return LossWeights(kd=kd, ce=1.0 - kd if source in _TRUTH else 0.0, divergence=self.divergence)

    @property
    def name(self) -> str:
        """Return the name of the training loss: "CE", "skl", "CE + skl"."""
        if self.config is None or self.config.kd_weight == 0:
            return "CE"
        mixes = self.config.kd_weight < 1 or self.config.kd_warmup > 0
        return f"CE + {self.divergence_name}" if mixes else self.divergence_name

    @property
    def divergence_name(self) -> str:
        return "CE" if self.config is None else self.config.divergence

    @property
    def held_out_name(self) -> str:
        """Return the name of the divergence on held-out rows."""
        if self.config is None:
            return "CE"
        return "kl" if isinstance(self.held_out.divergence, KL) else self.config.divergence

    @property
    def held_out(self) -> LossWeights:
        """The divergence alone, as it is measured on held-out rows."""
        return LossWeights(kd=1.0, ce=0.0, divergence=self.divergence)

    @property
    def per_sequence(self) -> bool:
        """Whether a token of a response of n tokens weighs 1/n, and sums are divided by sequences."""
        return self.config is not None and self.config.reduction == "sequence"

    def count(self, sequences: SequenceOf[Sequence]) -> int:
        """What the sum over a step's sequences is divided by: response tokens, or sequences."""
        return len(sequences) if self.per_sequence else sum(s.supervised for s in sequences)

    def look_ahead(
        self, pieces: SequenceOf[SourceBatch], readings: SequenceOf[TokenLogProbs], progress: float
    ) -> list[TokenWeights | None]:
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


class TAID(Objective):
    """TAID (arXiv 2501.16937): KL to a target that moves from near the student (t = taid_start) to the teacher (t = 1).

    After each step of loss L, with m the running mean of the loss's relative fall:
    m ← μ m + (1−μ) (L_before − L)/L_before and t ← min(1, max(linear, t + rate·σ(m)·(1−t))); the first loss only becomes
    L_before. linear: straight from taid_start to 1 over the run.
    """

    def __init__(self, config: ObjectiveConfig):
        super().__init__(config)
        self.t, self.fall, self.before = config.taid_start, 0.0, None

    def terms(self, source: Source, progress: float = 1.0) -> LossWeights:
        return replace(super().terms(source, progress), divergence=Interpolated(self.t))

    @property
    def held_out(self) -> LossWeights:
        """KL to the teacher: a figure that means the same whatever t is."""
        return LossWeights(kd=1.0, ce=0.0, divergence=KL())

    def observe(self, loss: float, progress: float) -> None:
        before, self.before = self.before, loss
        if before is None:
            return
        start, kept = self.config.taid_start, self.config.taid_momentum
        self.fall = kept * self.fall + (1 - kept) * (before - loss) / max(before, 1e-15)
        ahead = self.t + self.config.taid_rate * _sigmoid(self.fall) * (1 - self.t)
        self.t = min(1.0, max(start + (1 - start) * progress, ahead))

    def state_dict(self) -> dict[str, Any]:
        return {"t": self.t, "fall": self.fall, "before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.t, self.fall, self.before = state["t"], state["fall"], state["before"]


class ATKD(Objective):
    """ATKD (arXiv 2402.11890): tokens the teacher is sure of teach what else might stand there; the others teach all.

    A token is hard where the teacher's 1 − p(token) reaches the median of the whole step. The step's loss is
    α·mean over easy tokens of DKD + (1−α)·mean over hard tokens of (TKD + DKD), α = atkd_easy; see ``Decoupled``.
    """

    looks_at = ("teacher",)

    @property
    def held_out(self) -> LossWeights:
        """KL: held-out rows belong to no step whose median could split them."""
        return LossWeights(kd=1.0, ce=0.0, divergence=KL())

    def look_ahead(
        self, pieces: SequenceOf[SourceBatch], readings: SequenceOf[TokenLogProbs], progress: float
    ) -> list[TokenWeights | None]:
        told = [reading.log_p_N for reading in readings]
        log_p_N = torch.cat(told)
        N = len(log_p_N)
        if not N:
            return [None] * len(pieces)
        # 1 − p(token) ≥ its median, said of log p: as many tokens are as unsure, and none is lost to rounding 1 − p.
        is_hard_N = log_p_N <= -(-log_p_N).median()
        hard = int(is_hard_N.sum())
        easy = self.config.atkd_easy
        # The engine divides by all N: a mean over a part of them is a sum that weighs N/part.
        w_hard, w_easy = (1 - easy) * N / hard, easy * N / max(N - hard, 1)
        weights_N2 = torch.stack([torch.where(is_hard_N, w_hard, 0.0), torch.where(is_hard_N, w_hard, w_easy)], dim=-1)
        return [TokenWeights(divergence_args_N=part) for part in weights_N2.split([len(part) for part in told])]


def _sigmoid(x: float) -> float:
    return 0.5 * (1 + math.tanh(0.5 * x))
