"""What "different" means: divergences between next-token distributions, per token, with exact gradients. Pure tensors.

p is the teacher, q the student; both come as log-probabilities [N, V]. A divergence gives its value per token [N] and
``h_NV = ∂D/∂log q`` with the other entries held fixed; the gradient in the student's logits is then ``h − q Σ_u h_u``
(``logit_grad``). Everything stays in log space: mixtures are ``logaddexp``, no probability is ever divided by.

Sources: skew KL and skew reverse KL, DistiLLM (arXiv 2402.03898); generalised JSD, GKD (arXiv 2306.13649); total variation,
f-distill (arXiv 2307.15190); the table in full is METHODS A of the project's design.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Divergence(ABC):
    """D(p, q) ≥ 0, and 0 at p = q, for every row of two [N, V] tables of log-probabilities."""

    @abstractmethod
    def evaluate(self, log_p_NV: Tensor, log_q_NV: Tensor, with_grad: bool = True) -> tuple[Tensor, Tensor | None]:
        """Value per token [N], nats, and h_NV = ∂D/∂log q (None unless asked for). One pass over shared terms."""

    def value(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        return self.evaluate(log_p_NV, log_q_NV, with_grad=False)[0]

    def grad(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        return self.evaluate(log_p_NV, log_q_NV)[1]


def logit_grad(h_NV: Tensor, q_NV: Tensor) -> Tensor:
    """∂D/∂z for z the student's logits, from h = ∂D/∂log q: h − q Σ_u h_u."""
    return h_NV - q_NV * h_NV.sum(-1, keepdim=True)


def _log_mix(a: float, log_x: Tensor, log_y: Tensor) -> Tensor:
    """log(a·x + (1−a)·y) for 0 < a < 1."""
    return torch.logaddexp(log_x + math.log(a), log_y + math.log1p(-a))


@dataclass(frozen=True)
class KL(Divergence):
    """Forward KL, Σ p (log p − log q)."""

    def evaluate(self, log_p_NV, log_q_NV, with_grad=True):
        p_NV = log_p_NV.exp()
        value_N = (p_NV * (log_p_NV - log_q_NV)).sum(-1)
        return value_N, -p_NV if with_grad else None


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """Reverse KL, Σ q (log q − log p)."""

    def evaluate(self, log_p_NV, log_q_NV, with_grad=True):
        q_NV, ratio_NV = log_q_NV.exp(), log_q_NV - log_p_NV
        value_N = (q_NV * ratio_NV).sum(-1)
        return value_N, q_NV * (ratio_NV + 1) if with_grad else None


@dataclass(frozen=True)
class SkewKL(Divergence):
    """KL(p ‖ αp + (1−α)q). Its gradient coefficient is bounded by (1−α)/α; α = 0 is KL."""

    alpha: float

    def evaluate(self, log_p_NV, log_q_NV, with_grad=True):
        if self.alpha == 0:
            return KL().evaluate(log_p_NV, log_q_NV, with_grad)
        log_m_NV = _log_mix(self.alpha, log_p_NV, log_q_NV)
        p_NV = log_p_NV.exp()
        value_N = (p_NV * (log_p_NV - log_m_NV)).sum(-1)
        if not with_grad:
            return value_N, None
        return value_N, (log_q_NV - log_m_NV).exp_().mul_(p_NV).mul_(self.alpha - 1)


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q ‖ (1−α)p + αq). α = 0 is reverse KL."""

    alpha: float

    def evaluate(self, log_p_NV, log_q_NV, with_grad=True):
        if self.alpha == 0:
            return ReverseKL().evaluate(log_p_NV, log_q_NV, with_grad)
        ratio_NV = log_q_NV - _log_mix(self.alpha, log_q_NV, log_p_NV)
        q_NV = log_q_NV.exp()
        value_N = (q_NV * ratio_NV).sum(-1)
        if not with_grad:
            return value_N, None
        return value_N, q_NV * (ratio_NV + 1 - self.alpha * ratio_NV.exp())


@dataclass(frozen=True)
class JSD(Divergence):
    """Generalised Jensen-Shannon, β KL(p‖m) + (1−β) KL(q‖m) with m = βp + (1−β)q. Exactly 0 at β = 0 and β = 1."""

    beta: float

    def evaluate(self, log_p_NV, log_q_NV, with_grad=True):
        if self.beta in (0, 1):
            return torch.zeros_like(log_q_NV[..., 0]), torch.zeros_like(log_q_NV) if with_grad else None
        log_m_NV = _log_mix(self.beta, log_p_NV, log_q_NV)
        q_NV, ratio_NV = log_q_NV.exp(), log_q_NV - log_m_NV
        q_part_NV = (1 - self.beta) * q_NV * ratio_NV
        value_N = self.beta * (log_p_NV.exp() * (log_p_NV - log_m_NV)).sum(-1) + q_part_NV.sum(-1)
        return value_N, q_part_NV if with_grad else None


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """½ Σ |p − q|, between 0 and 1."""

    def evaluate(self, log_p_NV, log_q_NV, with_grad=True):
        q_NV = log_q_NV.exp()
        gap_NV = q_NV - log_p_NV.exp()
        value_N = 0.5 * gap_NV.abs().sum(-1)
        return value_N, 0.5 * q_NV * gap_NV.sign() if with_grad else None


@dataclass(frozen=True)
class Jeffreys(Divergence):
    """2λ KL(p‖q) + 2(1−λ) KL(q‖p); λ = ½ is their plain sum."""

    weight: float = 0.5

    def evaluate(self, log_p_NV, log_q_NV, with_grad=True):
        forward_N, forward_h = KL().evaluate(log_p_NV, log_q_NV, with_grad)
        reverse_N, reverse_h = ReverseKL().evaluate(log_p_NV, log_q_NV, with_grad)
        a, b = 2 * self.weight, 2 * (1 - self.weight)
        return a * forward_N + b * reverse_N, a * forward_h + b * reverse_h if with_grad else None


def build(name: str, *, alpha: float, beta: float, jeffreys_weight: float) -> Divergence:
    """The divergence of a recipe's ``objective`` section, by its public name.

    alpha: skew of ``skl`` and ``srkl``, 0 ≤ α < 1. beta: of ``jsd``. jeffreys_weight: λ of ``jeffreys``.
    """
    return {
        "kl": KL,
        "rkl": ReverseKL,
        "skl": lambda: SkewKL(alpha),
        "srkl": lambda: SkewReverseKL(alpha),
        "jsd": lambda: JSD(beta),
        "tvd": TotalVariation,
        "jeffreys": lambda: Jeffreys(jeffreys_weight),
    }[name]()
