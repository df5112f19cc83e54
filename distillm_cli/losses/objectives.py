"""Define the objectives, under the names of their papers. An objective defines the loss of each token.

    CrossEntropy  fine-tuning without a teacher
    KD            cross-entropy and a divergence, weighted
    FDistill      one half of the divergence on the teacher's sequences, the other on the student's
    DistiLLM2     FDistill with a skew that follows the difficulty of a batch
    TAID          KL to a target that moves from the student to the teacher
    ATKD          easy and hard tokens weighted separately

(``MiniLLM`` is in ``minillm``.) An objective does not depend on models or vocabularies. Its state is in ``state_dict``, and
so in every checkpoint.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

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
    from distillm_cli.losses.divergences import SkewConfig
    from distillm_cli.losses.families import DecoupledConfig, InterpolatedConfig

    # The sections of single divergences. ``config.objective`` creates them when it is imported.
    class SkewSection(ObjectiveConfig, SkewConfig): ...

    class TAIDSection(ObjectiveConfig, InterpolatedConfig): ...

    class ATKDSection(ObjectiveConfig, DecoupledConfig): ...


STUDENT_OUTPUTS = (Source.ROLLOUT, Source.REPLAY)
FORWARD, REVERSE = "forward", "reverse"
MIN_ALPHA = 0.01


@dataclass(frozen=True, eq=False)
class SourceBatch:
    """Hold sequences of one source: a part of a step, or one micro-batch of it."""

    source: Source
    sequences: SequenceOf[Sequence]


@dataclass(frozen=True, eq=False)
class TokenLogProbs:
    """Hold the log-probability [N] of each supervised token of a part of a step, before the step, nats.

    They are in the order of the collated batch, and None for a model that is not in ``needs_log_probs_of``.
    """

    log_p_N: Tensor | None = None  # the teacher's
    log_q_N: Tensor | None = None  # the student's

    def cpu(self) -> TokenLogProbs:
        """Return a copy on the CPU."""
        parts = (None if log_N is None else log_N.cpu() for log_N in (self.log_p_N, self.log_q_N))
        return TokenLogProbs(*parts)


class Objective:
    """Define the loss of a step's tokens.

    ``weights`` returns the loss of a token by the source of its sequence. An objective that depends on more than the token
    itself implements two more methods. ``begin_step`` gets the whole step before its first gradient, all micro-batches
    together, so that a median or a ratio does not depend on the micro-batches. ``observe`` gets the loss after the step.
    """

    # Models ("teacher", "student") whose log-probabilities ``begin_step`` needs.
    needs_log_probs_of: tuple[str, ...] = ()
    # Whether a step on student outputs also trains on its data set rows.
    rows_beside: bool = False
    # Whether a token of a response of n tokens has weight 1/n, and sums are divided by the number of sequences.
    per_sequence: bool = False
    # Whether training has a loss of the student's head. Without it, extras have the whole loss.
    has_loss: bool = True
    # Name of the validation loss.
    valid_name: str = "CE"

    def weights(self, source: Source, progress: float = 1.0) -> LossWeights:
        """Return the loss of a token of this source once ``progress`` (0 to 1) of the run is done."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Return the name of the training loss: "CE", "skl", "CE + skl"."""
        raise NotImplementedError

    @property
    def held_out(self) -> LossWeights:
        """Return the loss for held-out rows: the divergence alone."""
        raise NotImplementedError

    @property
    def held_out_name(self) -> str:
        """Return the name of that loss."""
        raise NotImplementedError

    def count(self, sequences: SequenceOf[Sequence]) -> int:
        """Return the divisor of the sum over a step's sequences: the number of response tokens, or of sequences."""
        return len(sequences) if self.per_sequence else sum(s.supervised for s in sequences)

    def begin_step(
        self, parts: SequenceOf[SourceBatch], log_probs: SequenceOf[TokenLogProbs], progress: float
    ) -> list[TokenWeights | None]:
        """Prepare a step, before ``weights`` is called, and return the weights of its tokens for each part."""
        return [None] * len(parts)

    def observe(self, loss: float, progress: float) -> None:
        """Process the step's loss, per unit of ``count``, after the optimizer's step."""

    def figures(self) -> dict[str, float]:
        """Return additional figures of the step, by name, for the metrics."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that later steps depend on, as JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""


class CrossEntropy(Objective):
    """Train with cross-entropy alone: supervised fine-tuning."""

    name = "CE"
    held_out = CROSS_ENTROPY
    held_out_name = "CE"

    def weights(self, source: Source, progress: float = 1.0) -> LossWeights:
        return CROSS_ENTROPY


class KD(Objective):
    """Train with (1 − kd_weight)·CE + kd_weight·D on data set rows and teacher samples, kd_weight·D on student outputs.

    Student outputs have no cross-entropy because their tokens are not labels. config: the recipe's ``objective`` section.
    """

    def __init__(self, config: ObjectiveConfig):
        self.config = config
        self.divergence = build_divergence(config)
        self.per_sequence = config.reduction == "sequence"

    def weights(self, source: Source, progress: float = 1.0) -> LossWeights:
        """Return the loss of a token of this source.

        During ``kd_warmup`` the divergence's weight rises and cross-entropy has the rest. A skewed divergence has little
        gradient while the student gives the teacher's token no probability (it is bounded by q/α).
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
    """Train with TAID (arXiv 2501.16937): KL to a target that moves from the student (t₀) to the teacher (1).

    After each step of loss L, with m the running mean of the loss's relative fall:
    m ← μ m + (1−μ) (L_prev − L)/L_prev and t ← min(1, max(linear, t + rate·σ(m)·(1−t))); the first loss only sets
    L_prev. linear: a straight line from taid_start to 1 over the run.
    """

    config: TAIDSection

    def __init__(self, config: TAIDSection):
        super().__init__(config)
        self.t = config.taid_start
        self.fall = 0.0
        self.previous_loss: float | None = None

    def weights(self, source: Source, progress: float = 1.0) -> LossWeights:
        return replace(super().weights(source, progress), divergence=Interpolated(self.t))

    @property
    def held_out(self) -> LossWeights:
        """Return KL to the teacher, which does not depend on t."""
        return LossWeights(kd=1.0, ce=0.0, divergence=KL())

    def observe(self, loss: float, progress: float) -> None:
        previous = self.previous_loss
        self.previous_loss = loss
        if previous is None:
            return
        start = self.config.taid_start
        momentum = self.config.taid_momentum
        self.fall = momentum * self.fall + (1 - momentum) * (previous - loss) / max(previous, 1e-15)
        proposed = self.t + self.config.taid_rate * _sigmoid(self.fall) * (1 - self.t)
        self.t = min(1.0, max(start + (1 - start) * progress, proposed))

    def state_dict(self) -> dict[str, Any]:
        return {"t": self.t, "fall": self.fall, "before": self.previous_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.t = state["t"]
        self.fall = state["fall"]
        self.previous_loss = state["before"]


class ATKD(KD):
    """Train with ATKD (arXiv 2402.11890): easy tokens (a confident teacher) have only the non-target divergence.

    A token is hard where the teacher's 1 − p(token) reaches the median of the whole step. The step's loss is
    α·mean over easy tokens of DKD + (1−α)·mean over hard tokens of (TKD + DKD), α = atkd_easy; see ``Decoupled``.
    """

    config: ATKDSection
    needs_log_probs_of = ("teacher",)

    @property
    def held_out(self) -> LossWeights:
        """Return KL, since held-out rows have no step median to split them."""
        return LossWeights(kd=1.0, ce=0.0, divergence=KL())

    def begin_step(
        self, parts: SequenceOf[SourceBatch], log_probs: SequenceOf[TokenLogProbs], progress: float
    ) -> list[TokenWeights | None]:
        parts_log_p = [_needed(token_log_probs.log_p_N) for token_log_probs in log_probs]
        sizes = [len(part_log_p_N) for part_log_p_N in parts_log_p]
        log_p_N = torch.cat(parts_log_p)
        N = len(log_p_N)
        if not N:
            return [None] * len(parts)
        # 1 − p(token) ≥ its median, in terms of log p, which avoids rounding 1 − p.
        is_hard_N = log_p_N <= -(-log_p_N).median()
        hard = int(is_hard_N.sum())
        easy = self.config.atkd_easy
        # The sum is divided by N, so a mean over a part of the tokens has weight N/part.
        w_hard = (1 - easy) * N / hard
        w_easy = easy * N / max(N - hard, 1)
        weights_N2 = torch.stack([torch.where(is_hard_N, w_hard, 0.0), torch.where(is_hard_N, w_hard, w_easy)], dim=-1)
        return [TokenWeights(divergence_args_N=args_N2) for args_N2 in weights_N2.split(sizes)]


class FDistill(KD):
    """Train with f-distill (arXiv 2307.15190): each half of the divergence on the samples that its expectation is over.

    The expectation of a forward divergence is over the teacher's sequences, that of a reverse one over the student's. In a
    step with both, each half is averaged separately: with w the weight of the student's half (½, in DistiLLM-2 rising to 1)
    the loss is (1−w)·mean over the teacher's part + w·mean over the student's, independent of their numbers of tokens.
    """

    def __init__(self, config: ObjectiveConfig):
        super().__init__(config)
        self.halves = halves_of(self.divergence)
        self._shares: dict[str, float] = {}

    @property
    def divergence_name(self) -> str:
        """Return the names of both halves if the divergence is one of them: "skl + srkl"."""
        forward, reverse = (_name_of(divergence) for _, divergence in self.divergence.halves())
        is_half = self.config.divergence in (forward, reverse) and forward != reverse
        return f"{forward} + {reverse}" if is_half else self.config.divergence

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
            # The sum is divided by the whole step's count, so a mean over a part has weight total/part.
            self._shares = {FORWARD: (1 - w) * total / counts[FORWARD], REVERSE: w * total / counts[REVERSE]}
        return [None] * len(parts)


class DistiLLM2(FDistill):
    """Train with DistiLLM-2 (arXiv 2503.07067): skew KL and skew reverse KL with a skew that depends on the batch.

    The gap of a sequence is p̄ − q̄ for one from the teacher and q̄ − p̄ for one from the student, with p̄ and q̄ the geometric
    means of its tokens' probabilities, as in the authors' code. A half's α is 1 − (1−α₀)·m/gap, with the batch's mean gap
    and m the mean over the previous epoch, clamped between MIN_ALPHA and α₀; in the first epoch it is α₀. A batch whose gap
    is not positive has the smallest α. The student's half has weight w = ½ + progress/2.

    epochs: number of epochs of the run, to find the end of an epoch from the progress.
    """

    config: SkewSection
    needs_log_probs_of = ("teacher", "student")

    def __init__(self, config: SkewSection, epochs: float = 1.0):
        super().__init__(config)
        self.epochs = epochs
        self.epoch = 0
        self.alphas = {FORWARD: config.alpha, REVERSE: config.alpha}
        self.previous_gaps: dict[str, float] = {}  # mean gaps of the previous epoch, by half
        self.gap_sums: dict[str, list[float]] = {FORWARD: [0.0, 0.0], REVERSE: [0.0, 0.0]}  # sum and number of gaps

    def student_weight(self, progress: float) -> float:
        return 0.5 + 0.5 * progress

    def begin_step(
        self, parts: SequenceOf[SourceBatch], log_probs: SequenceOf[TokenLogProbs], progress: float
    ) -> list[TokenWeights | None]:
        self._begin_epoch(max(0, math.ceil(progress * self.epochs - 1e-6) - 1))
        gaps: dict[str, list[float]] = defaultdict(list)
        for part, token_log_probs in zip(parts, log_probs, strict=True):
            gaps[half_of(part.source)] += _gaps(part, token_log_probs)
        for half, found in gaps.items():
            self.alphas[half] = self._alpha(half, sum(found) / len(found))
            self.gap_sums[half][0] += sum(found)
            self.gap_sums[half][1] += len(found)
        skewed = {FORWARD: SkewKL(self.alphas[FORWARD]), REVERSE: SkewReverseKL(self.alphas[REVERSE])}
        self.halves = {half: (1.0, divergence) for half, divergence in skewed.items()}
        return super().begin_step(parts, log_probs, progress)

    def _begin_epoch(self, epoch: int) -> None:
        if epoch == self.epoch:
            return
        self.previous_gaps = {half: total / n for half, (total, n) in self.gap_sums.items() if n}
        self.gap_sums = {half: [0.0, 0.0] for half in self.gap_sums}
        self.epoch = epoch

    def _alpha(self, half: str, gap: float) -> float:
        max_alpha = self.config.alpha
        previous_gap = self.previous_gaps.get(half, 0.0)
        if previous_gap <= 0:  # first epoch, or no gap on average
            return max_alpha
        if gap <= 0:
            return min(MIN_ALPHA, max_alpha)
        return min(max(1 - (1 - max_alpha) * previous_gap / gap, MIN_ALPHA), max_alpha)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "alphas": self.alphas, "before": self.previous_gaps, "sums": self.gap_sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.alphas = dict(state["alphas"])
        self.previous_gaps = dict(state["before"])
        self.gap_sums = {half: list(pair) for half, pair in state["sums"].items()}


def build(config: ObjectiveConfig | None, epochs: float = 1.0) -> Objective:
    """Build the objective of a recipe's ``objective`` section; None is fine-tuning. epochs: of the whole run."""
    from distillm_cli.losses.minillm import MiniLLM  # imports this module

    if config is None:
        return CrossEntropy()
    if config.by_source:
        # Only a divergence with a skew passes the schema's check of ``curriculum``.
        return DistiLLM2(cast("SkewSection", config), epochs) if config.curriculum == "on" else FDistill(config)
    if config.policy_gradient:
        return MiniLLM(config)
    own = plugins.divergences[config.divergence].objective_class or KD
    return own(config)


def half_of(source: Source) -> str:
    """Return the half of a divergence for the tokens of a source."""
    return REVERSE if source in STUDENT_OUTPUTS else FORWARD


def halves_of(divergence: Divergence) -> dict[str, tuple[float, Divergence]]:
    """Return (weight, divergence) by half."""
    return dict(zip((FORWARD, REVERSE), divergence.halves(), strict=True))


def _name_of(divergence: Divergence) -> str | None:
    """Return the name under which a divergence's class is registered."""
    entries = plugins.divergences.values()
    return next((entry.name for entry in entries if entry.divergence is type(divergence)), None)


def _gaps(part: SourceBatch, token_log_probs: TokenLogProbs) -> list[float]:
    """Return the gap of each sequence of the part."""
    lengths = [s.supervised for s in part.sequences]
    p_B = _geometric_means(_needed(token_log_probs.log_p_N), lengths)
    q_B = _geometric_means(_needed(token_log_probs.log_q_N), lengths)
    return (q_B - p_B if half_of(part.source) == REVERSE else p_B - q_B).tolist()


def _needed(log_N: Tensor | None) -> Tensor:
    """Return log-probabilities that a step has because ``needs_log_probs_of`` names their model."""
    assert log_N is not None
    return log_N


def _geometric_means(log_N: Tensor, lengths: list[int]) -> Tensor:
    """Return each sequence's geometric mean of its tokens' probabilities, [B]."""
    return torch.stack([part.double().mean().exp() for part in on_float64_device(log_N).split(lengths)])


def _sigmoid(x: float) -> float:
    return 0.5 * (1 + math.tanh(0.5 * x))
