"""Compute divergences between next-token distributions, per token, with exact gradients. Pure tensors.

p is the teacher, q the student. A divergence gives its value per token [N] and ``h_NV = ∂D/∂log q`` with the other entries
held fixed; the gradient in the student's logits is then ``h − q Σ_u h_u`` (``logit_grad``).

Mixtures are formed of probabilities, which costs a pass over the table where ``logaddexp`` costs ten, and loses nothing: a
ratio like p/m is bounded by 1/α, its logarithm is taken after the division, and an entry below the smallest normal number
(1e-38 in float32) adds nothing to a sum of probabilities. Unmixed log-probabilities stay logits minus their normaliser, so
that the divergences that are unbounded (KL, reverse KL) stay right where a probability underflows.

A logit of −inf (a suppressed token) is a probability of exactly 0, and 0 · log 0 = 0. A divergence that is infinite then
(KL where p > 0 = q, reverse KL where q > 0 = p) has the value +inf; its gradient is undefined. All other values and
gradients are finite.

Sources: skew KL and skew reverse KL, DistiLLM (arXiv 2402.03898); generalised JSD, GKD (arXiv 2306.13649); total variation,
f-distill (arXiv 2307.15190); the table in full is METHODS A of the project's design.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distillm_cli.config.schema import ObjectiveConfig


class Rows:
    """Hold N distributions over the vocabulary, from their logits z; each table is computed once, when first used.

    The tables belong to the owner of the Rows: a divergence reads them and changes none. has_zeros: whether logits may be
    −inf; False promises that none is, and saves the passes that look for them.
    """

    def __init__(self, z_NV: Tensor, *, has_zeros: bool = True):
        self.z_NV = z_NV
        self.has_zeros = has_zeros

    @classmethod
    def of_log(cls, log_NV: Tensor) -> Rows:
        """From log-probabilities, which are taken as they come: nothing is normalised again."""
        rows = cls(log_NV)
        rows.prob_NV, rows.log_norm_N1 = log_NV.exp(), torch.zeros_like(log_NV[:, :1])
        return rows

    @cached_property
    def prob_NV(self) -> Tensor:
        return torch.softmax(self.z_NV, -1)

    @cached_property
    def log_norm_N1(self) -> Tensor:
        """log Σ exp z. The largest probability is exp(max z) over that sum: two maxima instead of another exp and sum."""
        return self.z_NV.amax(-1, keepdim=True) - self.prob_NV.amax(-1, keepdim=True).log()

    @cached_property
    def log_NV(self) -> Tensor:
        return self.z_NV - self.log_norm_N1

    def log_at(self, ids_N: Tensor) -> Tensor:
        """log-probability [N] of one entry per row."""
        return (self.z_NV.gather(-1, ids_N.unsqueeze(-1)) - self.log_norm_N1).squeeze(-1)


class Divergence(ABC):
    """D(p, q) ≥ 0, and 0 at p = q, for every row of two [N, V] tables."""

    def at(self, targets_N: Tensor, divergence_args_N: Tensor | None) -> Divergence:
        """The divergence for these rows. One that treats the supervised token, or tokens marked by its criterion, apart
        returns a copy that knows them; the others are the same everywhere."""
        return self

    @abstractmethod
    def between(self, p: Rows, q: Rows, with_grad: bool = True) -> tuple[Tensor, Tensor | None]:
        """Value per token [N], nats, and h_NV = ∂D/∂log q (None unless asked for): new tables, the caller's to change."""

    def evaluate(self, log_p_NV: Tensor, log_q_NV: Tensor, with_grad: bool = True) -> tuple[Tensor, Tensor | None]:
        """The same from log-probabilities."""
        return self.between(Rows.of_log(log_p_NV), Rows.of_log(log_q_NV), with_grad)

    def value(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        return self.evaluate(log_p_NV, log_q_NV, with_grad=False)[0]

    def grad(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        return self.evaluate(log_p_NV, log_q_NV)[1]


def logit_grad(h_NV: Tensor, q_NV: Tensor) -> Tensor:
    """∂D/∂z for z the student's logits, from h = ∂D/∂log q: h − q Σ_u h_u."""
    return torch.addcmul(h_NV, q_NV, h_NV.sum(-1, keepdim=True), value=-1)


def _ratio(x_NV: Tensor, y_NV: Tensor, a: float) -> Tensor:
    """x/m with m = a·x + (1−a)·y and 0 < a < 1: between 0 and 1/a, and 0 where x and m underflow."""
    m_NV = torch.lerp(y_NV, x_NV, a)
    return x_NV / m_NV.clamp_min_(torch.finfo(m_NV.dtype).tiny)


def _safe_log(x_NV: Tensor) -> Tensor:
    """log x with a floor under x: where x is that small, so is the probability that the logarithm is multiplied by."""
    return x_NV.clamp_min(torch.finfo(x_NV.dtype).tiny).log_()


def have_zeros(*all_rows: Rows) -> bool:
    """Return whether a logit of any of these may be −inf."""
    return any(rows.has_zeros for rows in all_rows)


def drop_zeros(part_NV: Tensor, prob_NV: Tensor, zeros: bool) -> Tensor:
    """Apply 0 · log 0 = 0 to a table of probability · logarithm, in place; without ``zeros`` it is left as it is."""
    return part_NV.masked_fill_(prob_NV == 0, 0) if zeros else part_NV


@dataclass(frozen=True)
class KL(Divergence):
    """Forward KL, Σ p (log p − log q)."""

    def between(self, p, q, with_grad=True):
        part_NV = (p.log_NV - q.log_NV).mul_(p.prob_NV)
        value_N = drop_zeros(part_NV, p.prob_NV, have_zeros(p, q)).sum(-1)
        return value_N, -p.prob_NV if with_grad else None


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """Reverse KL, Σ q (log q − log p)."""

    def between(self, p, q, with_grad=True):
        part_NV = drop_zeros((q.log_NV - p.log_NV).mul_(q.prob_NV), q.prob_NV, have_zeros(p, q))
        value_N = part_NV.sum(-1)
        return value_N, part_NV.add_(q.prob_NV) if with_grad else None


@dataclass(frozen=True)
class SkewKL(Divergence):
    """KL(p ‖ αp + (1−α)q). Its gradient coefficient is bounded by (1−α)/α; α = 0 is KL."""

    alpha: float

    def between(self, p, q, with_grad=True):
        if self.alpha == 0:
            return KL().between(p, q, with_grad)
        ratio_NV = _ratio(p.prob_NV, q.prob_NV, self.alpha)
        value_N = _safe_log(ratio_NV).mul_(p.prob_NV).sum(-1)
        return value_N, ratio_NV.mul_(q.prob_NV).mul_(self.alpha - 1) if with_grad else None


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q ‖ (1−α)p + αq). α = 0 is reverse KL."""

    alpha: float

    def between(self, p, q, with_grad=True):
        if self.alpha == 0:
            return ReverseKL().between(p, q, with_grad)
        ratio_NV = _ratio(q.prob_NV, p.prob_NV, self.alpha)
        part_NV = _safe_log(ratio_NV).mul_(q.prob_NV)
        value_N = part_NV.sum(-1)
        if not with_grad:
            return value_N, None
        return value_N, part_NV.addcmul_(q.prob_NV, ratio_NV.mul_(-self.alpha).add_(1))


@dataclass(frozen=True)
class JSD(Divergence):
    """Generalised Jensen-Shannon, β KL(p‖m) + (1−β) KL(q‖m) with m = βp + (1−β)q. Exactly 0 at β = 0 and β = 1."""

    beta: float

    def between(self, p, q, with_grad=True):
        if self.beta in (0, 1):
            return torch.zeros_like(q.prob_NV[:, 0]), torch.zeros_like(q.prob_NV) if with_grad else None
        p_part_NV = _safe_log(_ratio(p.prob_NV, q.prob_NV, self.beta)).mul_(p.prob_NV)
        q_part_NV = _safe_log(_ratio(q.prob_NV, p.prob_NV, 1 - self.beta)).mul_(q.prob_NV)
        value_N = self.beta * p_part_NV.sum(-1) + (1 - self.beta) * q_part_NV.sum(-1)
        return value_N, q_part_NV.mul_(1 - self.beta) if with_grad else None


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """½ Σ |p − q|, between 0 and 1."""

    def between(self, p, q, with_grad=True):
        gap_NV = q.prob_NV - p.prob_NV
        value_N = 0.5 * gap_NV.abs().sum(-1)
        return value_N, gap_NV.sign_().mul_(q.prob_NV).mul_(0.5) if with_grad else None


@dataclass(frozen=True)
class Jeffreys(Divergence):
    """2λ KL(p‖q) + 2(1−λ) KL(q‖p); λ = ½ is their plain sum."""

    weight: float = 0.5

    def between(self, p, q, with_grad=True):
        a, b = 2 * self.weight, 2 * (1 - self.weight)
        if b == 0:  # a part without weight counts for nothing, even where it is infinite
            value_N, h_NV = KL().between(p, q, with_grad)
            return a * value_N, h_NV.mul_(a) if with_grad else None
        if a == 0:
            value_N, h_NV = ReverseKL().between(p, q, with_grad)
            return b * value_N, h_NV.mul_(b) if with_grad else None
        forward_N, forward_h_NV = KL().between(p, q, with_grad)
        reverse_N, reverse_h_NV = ReverseKL().between(p, q, with_grad)
        return a * forward_N + b * reverse_N, reverse_h_NV.mul_(b).add_(forward_h_NV, alpha=a) if with_grad else None


def build(config: ObjectiveConfig) -> Divergence:
    """The divergence of a recipe's ``objective`` section."""
    from distillm_cli.losses import families  # which stand on this file

    def alpha_beta() -> families.AlphaBeta:
        return families.AlphaBeta(config.ab_alpha, config.ab_beta)

    def alpha_mixture() -> families.AlphaMixture:
        inner = {"kl": KL, "rkl": ReverseKL, "ab": alpha_beta}[config.amid_divergence]()
        return families.AlphaMixture(config.amid_a, config.amid_lambda, inner, config.amid_from == "student")

    return {
        "kl": KL,
        "rkl": ReverseKL,
        "skl": lambda: SkewKL(config.alpha),
        "srkl": lambda: SkewReverseKL(config.alpha),
        "jsd": lambda: JSD(config.beta),
        "tvd": TotalVariation,
        "jeffreys": lambda: Jeffreys(config.jeffreys_weight),
        "akl": lambda: families.AdaptiveKL(config.akl_mu),
        "ab": alpha_beta,
        "amid": alpha_mixture,
        "taid": lambda: families.Interpolated(config.taid_start),
        "atkd": families.Decoupled,
    }[config.divergence]()
