"""Define the objectives: what the loss of each token is, under the names of their papers.

    CrossEntropy  fine-tuning without a teacher
    KD            cross-entropy and a divergence, weighted
    FDistill      one half of the divergence on the teacher's sequences, the other on the student's
    DistiLLM2     FDistill with a skew that follows the difficulty of a batch
    TAID          KL to a target that moves from the student to the teacher
    ATKD          easy and hard tokens weighted separately

(MiniLLM has a file of its own, ``minillm``.) An objective knows neither models nor vocabularies. Its state from step
to step is in ``state_dict``, and so in every checkpoint.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distillm_cli import plugins
from distillm_cli.losses.divergences import KL, Divergence, SkewKL, SkewReverseKL, build_divergence
from distillm_cli.losses.families import Interpolated
from distillm_cli.losses.weights import CROSS_ENTROPY, LossWeights, TokenWeights
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.types import Sequence
from distillm_cli.utils.exact import on_float64_device

if TYPE_CHECKING:
    from distillm_cli.config.schema import ObjectiveConfig

STUDENT_OUTPUTS = (Source.ROLLOUT, Source.REPLAY)
FORWARD, REVERSE = "forward", "reverse"
LEAST_ALPHA = 0.01


@dataclass(frozen=True, eq=False)
class SourceBatch:
    """Sequences of one source: a part of a step, or one micro-batch of it."""

    source: Source
    sequences: list[Sequence]


@dataclass(frozen=True, eq=False)
class TokenLogProbs:
    """Hold the log-probability [N] of each supervised token of a part of a step, before the step, nats.

    They are in the order of the collated batch, and None where ``needs_log_probs_of`` does not name the model.
    """

    log_p_N: Tensor | None = None  # the teacher's
    log_q_N: Tensor | None = None  # the student's


class Objective:
    """Define the loss of a step's tokens. This base class has a loss without a teacher, or leaves it to its subclasses.

    ``weights`` gives the loss of a token by the source of its sequence. An objective that depends on more than the token
    itself has two more methods. ``begin_step`` gets the whole step before its first gradient, all micro-batches together,
    so that a median or a ratio does not depend on how the step was cut. ``observe`` gets the loss after the step.
    """

    # Of "teacher" and "student": whose log-probabilities ``begin_step`` needs.
    needs_log_probs_of: tuple[str, ...] = ()
    # Whether a step on student outputs trains on its data set rows too.
    rows_beside: bool = False
    # Whether a token of a response of n tokens weighs 1/n, and sums are divided by sequences.
    per_sequence: bool = False

    def weights(self, source: Source, progress: float = 1.0) -> LossWeights:
        """Return the loss of a token of this source once ``progress`` (0 to 1) of the run is done."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Return the name of the training loss: "CE", "skl", "CE + skl"."""
        raise NotImplementedError

    @property
    def held_out(self) -> LossWeights:
        """Return the loss that is measured on held-out rows: the divergence alone."""
        raise NotImplementedError

    @property
    def held_out_name(self) -> str:
        """Return the name of that loss."""
        raise NotImplementedError

    def count(self, sequences: SequenceOf[Sequence]) -> int:
        """Return what the sum over a step's sequences is divided by: response tokens, or sequences."""
        return len(sequences) if self.per_sequence else sum(s.supervised for s in sequences)

    def begin_step(
        self, parts: SequenceOf[SourceBatch], log_probs: SequenceOf[TokenLogProbs], progress: float
    ) -> list[TokenWeights | None]:
        """Prepare for a step, before ``weights`` is called, and return the weights of its tokens, part by part."""
        return [None] * len(parts)

    def observe(self, loss: float, progress: float) -> None:
        """Take the step's loss, per unit of ``count``, after the optimizer's step."""

    def figures(self) -> dict[str, float]:
        """Return figures of the step beside its loss, by name, for the metrics."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what later steps depend on, as JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""


class CrossEntropy(Objective):
    """Cross-entropy alone: supervised fine-tuning."""

    name = "CE"
    held_out = CROSS_ENTROPY
    held_out_name = "CE"

    def weights(self, source: Source, progress: float = 1.0) -> LossWeights:
        return CROSS_ENTROPY


class KD(Objective):
    """(1 − kd_weight)·CE + kd_weight·D on data set rows and teacher samples, kd_weight·D on student outputs, whose tokens
    are not labels.

    config: the recipe's ``objective`` section.
    """

    def __init__(self, config: ObjectiveConfig):
        self.config = config
        self.divergence = build_divergence(config)
        self.per_sequence = config.reduction == "sequence"

    def weights(self, source: Source, progress: float = 1.0) -> LossWeights:
        """Return the loss of a token of this source.

        During ``kd_warmup`` the divergence's weight climbs, and cross-entropy has the rest: a skewed divergence hardly
        pulls where the student gives the teacher's token no probability yet (its gradient there is bounded by q/α).
        """
        kd = self.config.kd_weight
        if progress < self.config.kd_warmup:
            kd *= progress / self.config.kd_warmup
        ce = 0.0 if source in STUDENT_OUTPUTS else 1.0 - kd
        return LossWeights(kd=kd, ce=ce, divergence=self.divergence)

    @property
    def name(self) -> str:
        if self.config.kd_weight == 0:
            return "CE"
        mixes = self.config.kd_weight < 1 or self.config.kd_warmup > 0
        return f"CE + {self.divergence_name}" if mixes else self.divergence_name

    @property
    def divergence_name(self) -> str:
        """Return the divergence's name within ``name``."""
        return self.config.divergence

    @property
    def held_out(self) -> LossWeights:
        return LossWeights(kd=1.0, ce=0.0, divergence=self.divergence)

    @property
    def held_out_name(self) -> str:
        return "kl" if isinstance(self.held_out.divergence, KL) else self.config.divergence


class TAID(KD):
    """TAID (arXiv 2501.16937): KL to a target that moves from near the student (t = taid_start) to the teacher (t = 1).

    After each step of loss L, with m the running mean of the loss's relative fall:
    m ← μ m + (1−μ) (L_before − L)/L_before and t ← min(1, max(linear, t + rate·σ(m)·(1−t))); the first loss only becomes
    L_before. linear: straight from taid_start to 1 over the run.
    """

    def __init__(self, config: ObjectiveConfig):
        super().__init__(config)
        self.t = config.taid_start
        self.fall = 0.0
        self.before: float | None = None

    def weights(self, source: Source, progress: float = 1.0) -> LossWeights:
        return replace(super().weights(source, progress), divergence=Interpolated(self.t))

    @property
    def held_out(self) -> LossWeights:
        """Return KL to the teacher, which means the same whatever t is."""
        return LossWeights(kd=1.0, ce=0.0, divergence=KL())

    def observe(self, loss: float, progress: float) -> None:
        before = self.before
        self.before = loss
        if before is None:
            return
        start = self.config.taid_start
        momentum = self.config.taid_momentum
        self.fall = momentum * self.fall + (1 - momentum) * (before - loss) / max(before, 1e-15)
        ahead = self.t + self.config.taid_rate * _sigmoid(self.fall) * (1 - self.t)
        self.t = min(1.0, max(start + (1 - start) * progress, ahead))

    def state_dict(self) -> dict[str, Any]:
        return {"t": self.t, "fall": self.fall, "before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.t = state["t"]
        self.fall = state["fall"]
        self.before = state["before"]


class ATKD(KD):
    """ATKD (arXiv 2402.11890): tokens the teacher is sure of teach their alternatives; the others teach everything.

    A token is hard where the teacher's 1 − p(token) reaches the median of the whole step. The step's loss is
    α·mean over easy tokens of DKD + (1−α)·mean over hard tokens of (TKD + DKD), α = atkd_easy; see ``Decoupled``.
    """

    needs_log_probs_of = ("teacher",)

    @property
    def held_out(self) -> LossWeights:
        """Return KL: held-out rows belong to no step whose median could split them."""
        return LossWeights(kd=1.0, ce=0.0, divergence=KL())

    def begin_step(
        self, parts: SequenceOf[SourceBatch], log_probs: SequenceOf[TokenLogProbs], progress: float
    ) -> list[TokenWeights | None]:
        sizes = [len(known.log_p_N) for known in log_probs]
        log_p_N = torch.cat([known.log_p_N for known in log_probs])
        N = len(log_p_N)
        if not N:
            return [None] * len(parts)
        # 1 − p(token) ≥ its median, in terms of log p: as many tokens are as unsure, and none is lost to rounding 1 − p.
        is_hard_N = log_p_N <= -(-log_p_N).median()
        hard = int(is_hard_N.sum())
        easy = self.config.atkd_easy
        # The sum is divided by all N: a mean over a part of them is a sum that weighs N/part.
        w_hard = (1 - easy) * N / hard
        w_easy = easy * N / max(N - hard, 1)
        weights_N2 = torch.stack([torch.where(is_hard_N, w_hard, 0.0), torch.where(is_hard_N, w_hard, w_easy)], dim=-1)
        return [TokenWeights(divergence_args_N=args_N2) for args_N2 in weights_N2.split(sizes)]


class FDistill(KD):
    """f-distill (arXiv 2307.15190): the divergence by halves, each on the samples that its expectation is over.

    The expectation of a forward divergence is over the teacher's sequences, that of a reverse one over the student's. In a
    step that has both, each half is a mean of its own before they are added up: with w the weight of the student's half
    (½, in DistiLLM-2 rising to 1) the loss is (1−w)·mean over the teacher's part + w·mean over the student's, whichever of
    them has more tokens.
    """

    def __init__(self, config: ObjectiveConfig):
        super().__init__(config)
        self.halves = halves_of(self.divergence)
        self._shares: dict[str, float] = {}

    @property
    def divergence_name(self) -> str:
        """Return the names of both halves where the divergence is one of them: "skl + srkl"."""
        names = [_name_of(divergence) for _, divergence in self.divergence.halves()]
        is_half = self.config.divergence in names and names[0] != names[1]
        return " + ".join(names) if is_half else self.config.divergence

    def student_weight(self, progress: float) -> float:
        """Return the weight of the student's half in a step that has both."""
        return 0.5

    def weights(self, source: Source, progress: float = 1.0) -> LossWeights:
        half = half_of(source)
        weight, divergence = self.halves[half]
        share = self._shares.get(half, 1.0)
        plain = super().weights(source, progress)
        return replace(plain, kd=plain.kd * weight * share, ce=plain.ce * share, divergence=divergence)

    def begin_step(
        self, parts: SequenceOf[SourceBatch], log_probs: SequenceOf[TokenLogProbs], progress: float
    ) -> list[TokenWeights | None]:
        counts: dict[str, int] = defaultdict(int)
        for part in parts:
            counts[half_of(part.source)] += self.count(part.sequences)
        self._shares = {}
        if len(counts) == 2:
            w = self.student_weight(progress)
            total = sum(counts.values())
            # The sum is divided by the whole step's count: a mean over a part is a sum that weighs total/part.
            self._shares = {FORWARD: (1 - w) * total / counts[FORWARD], REVERSE: w * total / counts[REVERSE]}
        return [None] * len(parts)


class DistiLLM2(FDistill):
    """DistiLLM-2 (arXiv 2503.07067): skew KL and skew reverse KL, whose skew follows how far student and teacher are apart
    on a batch, and a growing student's half.

    The gap of a sequence is p̄ − q̄ where the teacher wrote it and q̄ − p̄ where the student did, with p̄ and q̄ the geometric
    means of its tokens' probabilities, as in the authors' code. A half's α is 1 − (1−α₀)·m/gap, with the batch's mean gap
    and m the mean over the epoch before, kept between LEAST_ALPHA and α₀; in the first epoch it is α₀. A batch without a
    gap, or with one of the wrong sign, is as easy as can be. The student's half weighs w = ½ + progress/2.

    epochs: of the whole run; they tell from the progress when one ends.
    """

    needs_log_probs_of = ("teacher", "student")

    def __init__(self, config: ObjectiveConfig, epochs: float = 1.0):
        super().__init__(config)
        self.epochs = epochs
        self.epoch = 0
        self.alphas = {FORWARD: config.alpha, REVERSE: config.alpha}
        self.before: dict[str, float] = {}  # mean gaps of the epoch before, by half
        self.sums: dict[str, list[float]] = {FORWARD: [0.0, 0.0], REVERSE: [0.0, 0.0]}  # of gaps, and how many

    def student_weight(self, progress: float) -> float:
        return 0.5 + 0.5 * progress

    def begin_step(
        self, parts: SequenceOf[SourceBatch], log_probs: SequenceOf[TokenLogProbs], progress: float
    ) -> list[TokenWeights | None]:
        self._begin_epoch(max(0, math.ceil(progress * self.epochs - 1e-6) - 1))
        gaps: dict[str, list[float]] = defaultdict(list)
        for part, known in zip(parts, log_probs, strict=True):
            gaps[half_of(part.source)] += _gaps(part, known)
        for half, found in gaps.items():
            self.alphas[half] = self._alpha(half, sum(found) / len(found))
            self.sums[half][0] += sum(found)
            self.sums[half][1] += len(found)
        skewed = {FORWARD: SkewKL(self.alphas[FORWARD]), REVERSE: SkewReverseKL(self.alphas[REVERSE])}
        self.halves = {half: (1.0, divergence) for half, divergence in skewed.items()}
        return super().begin_step(parts, log_probs, progress)

    def _begin_epoch(self, epoch: int) -> None:
        if epoch == self.epoch:
            return
        self.before = {half: total / n for half, (total, n) in self.sums.items() if n}
        self.sums = {half: [0.0, 0.0] for half in self.sums}
        self.epoch = epoch

    def _alpha(self, half: str, gap: float) -> float:
        most = self.config.alpha
        usual = self.before.get(half, 0.0)
        if usual <= 0:  # the first epoch; or the student has caught up, and nothing tells easy from hard
            return most
        if gap <= 0:
            return min(LEAST_ALPHA, most)
        return min(max(1 - (1 - most) * usual / gap, LEAST_ALPHA), most)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "alphas": self.alphas, "before": self.before, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.alphas = dict(state["alphas"])
        self.before = dict(state["before"])
        self.sums = {half: list(pair) for half, pair in state["sums"].items()}


def build(config: ObjectiveConfig | None, epochs: float = 1.0) -> Objective:
    """Build the objective of a recipe's ``objective`` section; None is fine-tuning. epochs: of the whole run."""
    from distillm_cli.losses.minillm import MiniLLM  # which stands on this file

    if config is None:
        return CrossEntropy()
    if config.by_source:
        return DistiLLM2(config, epochs) if config.curriculum == "on" else FDistill(config)
    if config.policy_gradient:
        return MiniLLM(config)
    own = plugins.divergences[config.divergence].objective_class or KD
    return own(config)


def half_of(source: Source) -> str:
    """Return which half of a divergence a source's tokens measure: rows count as the teacher's, replay as rollouts."""
    return REVERSE if source in STUDENT_OUTPUTS else FORWARD


def halves_of(divergence: Divergence) -> dict[str, tuple[float, Divergence]]:
    """Return (weight, divergence) by half."""
    return dict(zip((FORWARD, REVERSE), divergence.halves(), strict=True))


def _name_of(divergence: Divergence) -> str | None:
    """Return the name under which a divergence's class is registered."""
    entries = plugins.divergences.values()
    return next((entry.name for entry in entries if entry.divergence is type(divergence)), None)


def _gaps(part: SourceBatch, known: TokenLogProbs) -> list[float]:
    """Return the gap of each sequence of the part."""
    lengths = [s.supervised for s in part.sequences]
    p_B = _geometric_means(known.log_p_N, lengths)
    q_B = _geometric_means(known.log_q_N, lengths)
    return (q_B - p_B if half_of(part.source) == REVERSE else p_B - q_B).tolist()


def _geometric_means(log_N: Tensor, lengths: list[int]) -> Tensor:
    """Return each sequence's geometric mean of its tokens' probabilities, [B]."""
    return torch.stack([part.double().mean().exp() for part in on_float64_device(log_N).split(lengths)])


def _sigmoid(x: float) -> float:
    return 0.5 * (1 + math.tanh(0.5 * x))
