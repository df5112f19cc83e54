"""One half of a divergence on what the teacher wrote, the other on what the student wrote.

The expectation of a forward divergence is over the teacher's sequences, that of a reverse one over the student's; so each
half is measured on samples of its own. f-distill (arXiv 2307.15190) takes JSD apart like this, DistiLLM-2 (arXiv 2503.07067)
pairs skew KL with skew reverse KL and adds a curriculum: easy batches get less skew, and the student's half grows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any

import torch

from distillm_cli.config.schema import ObjectiveConfig
from distillm_cli.losses.criterion import Objective, SourceBatch, TokenLogProbs
from distillm_cli.losses.divergences import KL, Divergence, ReverseKL, SkewKL, SkewReverseKL, build
from distillm_cli.losses.terms import LossWeights, TokenWeights
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.utils.exact import where_exact

FORWARD, REVERSE = "forward", "reverse"
LEAST_ALPHA = 0.01


def half_of(source: Source) -> str:
    """Which half of a divergence a source's tokens measure: rows count as the teacher's, replayed rollouts as rollouts."""
    return REVERSE if source in (Source.ROLLOUT, Source.REPLAY) else FORWARD


def halves(config: ObjectiveConfig) -> dict[str, tuple[float, Divergence]]:
    """Half → (weight, divergence). Half the sum of both, each on its own samples, estimates the whole.

    Of kl and skl the reverse half is their mirror image, and the other way round; one without halves is the same on both.
    """
    a, b, w = config.alpha, config.beta, config.jeffreys_weight
    plain, skewed = ((1.0, KL()), (1.0, ReverseKL())), ((1.0, SkewKL(a)), (1.0, SkewReverseKL(a)))
    whole = (1.0, build(config))
    found = {
        "kl": plain,
        "rkl": plain,
        "skl": skewed,
        "srkl": skewed,
        "jsd": ((2 * b, SkewKL(b)), (2 * (1 - b), SkewReverseKL(1 - b))),
        "jeffreys": ((4 * w, KL()), (4 * (1 - w), ReverseKL())),
    }.get(config.divergence, (whole, whole))
    return dict(zip((FORWARD, REVERSE), found, strict=True))


class FDistill(Objective):
    """The divergence by halves; in a step that has both, each half is a mean of its own before they are added up.

    With w the weight of the student's half (½, under the curriculum rising to 1), such a step's loss is
    (1−w)·mean over the teacher's part + w·mean over the student's, whichever of them has more tokens.
    """

    def __init__(self, config: ObjectiveConfig, epochs: float = 1.0):
        super().__init__(config)
        self.halves = halves(config)
        self._shares: dict[str, float] = {}

    @property
    def divergence_name(self) -> str:
        """Return the names of both halves where they have names of their own: "skl + srkl"."""
        name = self.config.divergence.removeprefix("s").removeprefix("r")
        skew = "s" if self.config.divergence in ("skl", "srkl") else ""
        return f"{skew}kl + {skew}rkl" if name == "kl" else self.config.divergence

    def student_weight(self, progress: float) -> float:
        return 0.5

    def terms(self, source: Source, progress: float = 1.0) -> LossWeights:
        half = half_of(source)
        weight, divergence = self.halves[half]
        terms, share = super().terms(source, progress), self._shares.get(half, 1.0)
        return replace(terms, kd=terms.kd * weight * share, ce=terms.ce * share, divergence=divergence)

    def look_ahead(
        self, pieces: SequenceOf[SourceBatch], readings: SequenceOf[TokenLogProbs], progress: float
    ) -> list[TokenWeights | None]:
        counts: dict[str, int] = defaultdict(int)
        for piece in pieces:
            counts[half_of(piece.source)] += self.count(piece.sequences)
        self._shares = {}
        if len(counts) == 2:
            w, total = self.student_weight(progress), sum(counts.values())
            # The engine divides by the whole step's count: a mean over a part is a sum that weighs total/part.
            self._shares = {FORWARD: (1 - w) * total / counts[FORWARD], REVERSE: w * total / counts[REVERSE]}
        return [None] * len(pieces)


class DistiLLM2(FDistill):
    """DistiLLM-2's: the skew of a batch by how far student and teacher are apart on it, and a growing student's half.

    The gap of a sequence is p̄ − q̄ where the teacher wrote it and q̄ − p̄ where the student did, with p̄ and q̄ the geometric
    means of its tokens' probabilities, as in the authors' code. A half's α is 1 − (1−α₀)·m/gap, with the batch's mean gap
    and m the mean over the epoch before, kept between LEAST_ALPHA and α₀; in the first epoch it is α₀. A batch without a
    gap, or with one of the wrong sign, is as easy as can be. The student's half weighs w = ½ + progress/2.

    epochs: of the whole run; they tell from the progress when one ends.
    """

    looks_at = ("teacher", "student")

    def __init__(self, config: ObjectiveConfig, epochs: float = 1.0):
        super().__init__(config, epochs)
        self.epochs, self.epoch = epochs, 0
        self.alphas = {FORWARD: config.alpha, REVERSE: config.alpha}
        self.before: dict[str, float] = {}  # mean gaps of the epoch before, by half
        self.sums: dict[str, list[float]] = {FORWARD: [0.0, 0.0], REVERSE: [0.0, 0.0]}  # of gaps, and how many

    def student_weight(self, progress: float) -> float:
        return 0.5 + 0.5 * progress

    def look_ahead(
        self, pieces: SequenceOf[SourceBatch], readings: SequenceOf[TokenLogProbs], progress: float
    ) -> list[TokenWeights | None]:
        self._turn(max(0, math.ceil(progress * self.epochs - 1e-6) - 1))
        gaps: dict[str, list[float]] = defaultdict(list)
        for piece, reading in zip(pieces, readings, strict=True):
            gaps[half_of(piece.source)] += _gaps(piece, reading)
        for half, found in gaps.items():
            self.alphas[half] = self._alpha(half, sum(found) / len(found))
            self.sums[half][0] += sum(found)
            self.sums[half][1] += len(found)
        skewed = {FORWARD: SkewKL(self.alphas[FORWARD]), REVERSE: SkewReverseKL(self.alphas[REVERSE])}
        self.halves = {half: (1.0, divergence) for half, divergence in skewed.items()}
        return super().look_ahead(pieces, readings, progress)

    def _turn(self, epoch: int) -> None:
        if epoch == self.epoch:
            return
        self.before = {half: total / n for half, (total, n) in self.sums.items() if n}
        self.sums = {half: [0.0, 0.0] for half in self.sums}
        self.epoch = epoch

    def _alpha(self, half: str, gap: float) -> float:
        most, usual = self.config.alpha, self.before.get(half, 0.0)
        if usual <= 0:  # the first epoch; or the student has caught up, and nothing tells easy from hard
            return most
        if gap <= 0:
            return min(LEAST_ALPHA, most)
        return min(max(1 - (1 - most) * usual / gap, LEAST_ALPHA), most)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "alphas": self.alphas, "before": self.before, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.alphas, self.before = state["epoch"], dict(state["alphas"]), dict(state["before"])
        self.sums = {half: list(pair) for half, pair in state["sums"].items()}


def _gaps(piece: SourceBatch, reading: TokenLogProbs) -> list[float]:
    """Of each sequence of the piece."""
    lengths = [s.supervised for s in piece.sequences]
    p_B, q_B = (
        torch.stack([part.double().mean().exp() for part in log_N.split(lengths)])
        for log_N in map(where_exact, (reading.log_p_N, reading.log_q_N))
    )
    return (q_B - p_B if half_of(piece.source) == REVERSE else p_B - q_B).tolist()
