"""Define the divergences of single papers.

They are KL and reverse KL mixed by the location of the gap (``akl``), the family between KL and its reverse (``ab``), a
divergence to an assistant between teacher and student (``amid``), KL to a target that moves to the teacher (``taid``),
and KL with the supervised token separated (``atkd``). ``Tempered`` softens the distributions of any divergence. Value and
h = ∂D/∂log q are defined as in ``divergences``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field

from distillm_cli import plugins
from distillm_cli.config.fields import Beta, DivergenceConfig, Exponent, Probability, UsedWhen
from distillm_cli.losses.divergences import (
    KL,
    Divergence,
    TokenDistributions,
    ValueAndGrad,
    drop_zeros,
    have_zeros,
    logit_grad,
    register_divergence,
    smallest,
)

if TYPE_CHECKING:
    from torch import Tensor

_FIRST_TOP_K = 32  # entries searched first for a head; most of a language model's mass is in fewer
_USES_AB = UsedWhen({"objective.amid_divergence": ("ab",)})
_SMALL_SPREAD = 0.05  # exponents closer together than this need float64


class AdaptiveKLConfig(DivergenceConfig):
    """Declare the parameter of ``akl``."""

    akl_mu: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="μ of akl. The teacher's head is the fewest tokens whose mass reaches μ."
    )


@register_divergence("akl", config=AdaptiveKLConfig)
@dataclass(frozen=True)
class AdaptiveKL(Divergence):
    """Compute adaptive KL, w KL(p‖q) + (1−w) KL(q‖p), w = g_head/(g_head + g_tail), g = Σ |p−q| over the teacher's head and
    over the rest (Wu et al., arXiv 2404.02657).

    The head is the fewest entries whose teacher mass reaches mu; the most likely one is always in it. w is a constant:
    it has no gradient.
    """

    mu: float = 0.5

    @classmethod
    def from_config(cls, config: AdaptiveKLConfig) -> Self:
        return cls(config.akl_mu)

    def between(self, p: TokenDistributions, q: TokenDistributions, with_grad: bool = True) -> ValueAndGrad:
        w_N1 = self._head_share(p.prob_NV, q.prob_NV)
        zeros = have_zeros(p, q)
        log_ratio_NV = q.log_NV - p.log_NV
        part_NV = drop_zeros(log_ratio_NV * q.prob_NV, q.prob_NV, zeros)
        w_N = w_N1.squeeze(-1)
        forward_NV = drop_zeros(log_ratio_NV.mul_(p.prob_NV), p.prob_NV, zeros)
        value_N = _times(1 - w_N, part_NV.sum(-1)) - _times(w_N, forward_NV.sum(-1))
        if not with_grad:
            return value_N, None
        return value_N, part_NV.add_(q.prob_NV).mul_(1 - w_N1).sub_(w_N1 * p.prob_NV)

    def _head_share(self, p_NV: Tensor, q_NV: Tensor) -> Tensor:
        """Return w [N, 1], the head's share of Σ |p−q|; 0 where there is no gap."""
        gap_NV = (p_NV - q_NV).abs_()
        total_N1 = gap_NV.sum(-1, keepdim=True)
        if self.mu >= 1:  # all entries; the sum of their masses may round to 1 before the last ones
            return (total_N1 > 0).to(p_NV.dtype)
        V = p_NV.shape[-1]
        k = min(_FIRST_TOP_K, V)
        while True:
            top_NK, ids_NK = p_NV.topk(k, dim=-1)
            mass_before_NK = (
                top_NK.cumsum(-1) - top_NK
            )  # mass of the more likely entries; below mu, this one is included
            if k == V or bool((mass_before_NK[:, -1] >= self.mu).all()):
                break
            k = min(8 * k, V)
        head_N1 = (gap_NV.gather(-1, ids_NK) * (mass_before_NK < self.mu)).sum(-1, keepdim=True)
        return (head_N1 / total_N1.clamp_min_(smallest(p_NV))).clamp_max_(1)


_AB_ALPHA = Field(0.2, description="α of ab, the teacher's exponent. (α, β) = (1, 0) is kl, (0, 1) rkl.")
_AB_BETA = Field(0.7, description="β of ab, the student's exponent.")


class AlphaBetaConfig(DivergenceConfig):
    """Declare the parameters of ``ab``."""

    ab_alpha: Exponent = _AB_ALPHA
    ab_beta: Exponent = _AB_BETA


@register_divergence("ab", config=AlphaBetaConfig)
@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """Compute −1/(αβ) Σ [p^α q^β − α/(α+β) p^{α+β} − β/(α+β) q^{α+β}], continued to where α, β or α+β is 0 (Cichocki, Cruces
    and Amari 2011; for distillation ABKD, arXiv 2505.04560).

    (1, 0) is KL and (0, 1) reverse KL; (0, 0) is ½ Σ (log p − log q)². One formula covers all of them: with s = α+β and
    G(t) = p^t q^{s−t}, an entry's value is the second divided difference of G at 0, α and s (never negative, since G is
    convex), and its h is minus the first one at 0 and α. Where two of these points coincide, a difference is a derivative.

    With α, β and α+β ≥ 0 every power is at most 1. Negative ones are for distributions that overlap: a power that would
    overflow is clamped to the square root of the largest number. An entry with probability 0 on one side is infinite
    unless the other side's power and α+β are positive.
    """

    alpha: float
    beta: float

    @classmethod
    def from_config(cls, config: AlphaBetaConfig) -> Self:
        return cls(config.ab_alpha, config.ab_beta)

    def mirror(self) -> Divergence:
        return AlphaBeta(self.beta, self.alpha)

    def between(self, p: TokenDistributions, q: TokenDistributions, with_grad: bool = True) -> ValueAndGrad:
        if not have_zeros(p, q):
            return self._of_logs(p.log_NV, q.log_NV, with_grad)
        import torch

        no_p_NV = p.log_NV.isneginf()
        no_q_NV = q.log_NV.isneginf()
        either_NV = no_p_NV | no_q_NV  # set to 0 on both sides, which adds 0
        value_N, h_NV = self._of_logs(p.log_NV.masked_fill(either_NV, 0), q.log_NV.masked_fill(either_NV, 0), with_grad)
        only_q_NV = no_p_NV & ~no_q_NV
        value_N += self._sum_one_sided(q.log_NV, only_q_NV, self.alpha)
        value_N += self._sum_one_sided(p.log_NV, no_q_NV & ~no_p_NV, self.beta)
        if h_NV is not None and self.alpha != 0:  # infinite at α = 0
            h_NV.add_(torch.where(only_q_NV, ((self.alpha + self.beta) * q.log_NV).exp_() / self.alpha, 0))
        return value_N, h_NV

    def _sum_one_sided(self, log_NV: Tensor, alone_NV: Tensor, power: float) -> Tensor:
        """Sum the entries where only this side is not 0. power: exponent of the other side in p^α q^β."""
        import torch

        s = self.alpha + self.beta
        if power <= 0 or s <= 0:
            return torch.where(alone_NV.any(-1), math.inf, 0.0).to(log_NV)
        return torch.where(alone_NV, (s * log_NV).exp_(), 0).sum(-1).div_(power * s)

    def _of_logs(self, u_NV: Tensor, w_NV: Tensor, with_grad: bool) -> ValueAndGrad:
        """Return value and h from finite log p and log q."""
        from distillm_cli.utils.exact import on_float64_device

        first, middle, last = sorted((0.0, self.alpha, self.alpha + self.beta))
        given_NV = w_NV
        gap_NV = u_NV - w_NV
        spread = last - first
        if spread == 0:
            value_N = gap_NV.square().sum(-1).mul_(0.5)
            return value_N, gap_NV.neg_() if with_grad else None
        if spread < _SMALL_SPREAD:
            u_NV, w_NV, gap_NV = (on_float64_device(x_NV).double() for x_NV in (u_NV, w_NV, gap_NV))
        pairs = ((first, middle), (middle, last))
        differences = {pair: self._difference(u_NV, w_NV, gap_NV, *pair) for pair in pairs}
        (below_NV, below), (above_NV, above) = (differences[pair] for pair in pairs)
        value_N = above_NV.add(below_NV, alpha=-above / below).sum(-1).div_(above * spread).to(given_NV)
        if not with_grad:
            return value_N, None
        interval = min(0.0, self.alpha), max(0.0, self.alpha)
        h_NV, width = differences.get(interval) or self._difference(u_NV, w_NV, gap_NV, *interval)
        return value_N, h_NV.mul_(-1 / width).to(given_NV)

    def _difference(self, u_NV: Tensor, w_NV: Tensor, gap_NV: Tensor, low: float, high: float) -> tuple[Tensor, float]:
        """Return G(high) − G(low), entry by entry, and high − low; their quotient is the divided difference.

        Return (G'(low), 1) if low and high are equal. The difference is computed from the larger term and
        e^−distance − 1, which avoids cancellation and overflow.
        """
        import torch

        s = self.alpha + self.beta
        power_NV = (w_NV * (s - high)).add_(u_NV, alpha=high)
        if high != low:
            torch.maximum(power_NV, (w_NV * (s - low)).add_(u_NV, alpha=low), out=power_NV)
        if min(self.alpha, self.beta, s) < 0:
            power_NV.clamp_max_(0.5 * math.log(torch.finfo(power_NV.dtype).max))
        power_NV.exp_()
        if high == low:
            return power_NV.mul_(gap_NV), 1.0
        return gap_NV.abs().mul_(low - high).expm1_().mul_(power_NV).copysign_(gap_NV), high - low


class AlphaMixtureConfig(DivergenceConfig):
    """Declare the parameters of ``amid``, with those of the divergence that it uses."""

    amid_a: Annotated[float, Field(ge=-100, le=100)] = Field(
        0.5,
        description="Shape of amid's assistant r. −1: the arithmetic mixture, 1: the geometric one. Larger values cover "
        "modes.",
    )
    amid_lambda: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="λ of amid, the teacher's share in the assistant."
    )
    amid_divergence: Literal["kl", "rkl", "ab"] = Field(
        "kl", description="D of amid, between one of the models and the assistant."
    )
    amid_from: Literal["teacher", "student"] = Field(
        "teacher", description="Model from which amid measures: D(p ‖ r) for the teacher, D(q ‖ r) for the student."
    )
    ab_alpha: Annotated[Exponent, _USES_AB] = _AB_ALPHA
    ab_beta: Annotated[Exponent, _USES_AB] = _AB_BETA


@register_divergence("amid", config=AlphaMixtureConfig)
@dataclass(frozen=True)
class AlphaMixture(Divergence):
    """Compute D(p ‖ r), or D(q ‖ r) with ``from_student``, with an assistant r between p and q (AMiD, arXiv 2510.15982).

    r ∝ (λ p^κ + (1−λ) q^κ)^{1/κ}, κ = (1−a)/2: the arithmetic mixture at a = −1 (with KL that is skew KL), the geometric
    p^λ q^{1−λ} at a = 1. The larger a is, the nearer r is to the smaller of the two probabilities. 0 < lam < 1.
    """

    a: float
    lam: float
    inner: Divergence
    from_student: bool = False

    @classmethod
    def from_config(cls, config: AlphaMixtureConfig) -> Self:
        inner = plugins.divergences[config.amid_divergence].build(config)
        return cls(config.amid_a, config.amid_lambda, inner, config.amid_from == "student")

    def between(self, p: TokenDistributions, q: TokenDistributions, with_grad: bool = True) -> ValueAndGrad:
        r, share = self._assistant(p.log_NV, q.log_NV, have_zeros(p, q))
        first = q if self.from_student else p
        value_N, h_NV = self.inner.between(first, r, with_grad)
        if h_NV is None:
            return value_N, None
        h_NV = logit_grad(h_NV, r.prob_NV).mul_(share)  # through r's normalizer, then through its mixture
        if self.from_student:
            _, mirror_h_NV = self.inner.mirror().between(r, q)
            assert mirror_h_NV is not None
            h_NV += mirror_h_NV
        return value_N, h_NV

    def _assistant(self, u_NV: Tensor, w_NV: Tensor, zeros: bool = True) -> tuple[TokenDistributions, Tensor | float]:
        """Return r, and ∂ log(unnormalized r)/∂ log q: the share of q's term in the sum."""
        import torch

        kappa = (1 - self.a) / 2
        lam = self.lam
        if kappa == 0:
            return TokenDistributions(_lerp(w_NV, u_NV, lam, zeros), has_zeros=zeros), 1 - lam
        both_NV = u_NV.isneginf() & w_NV.isneginf() if zeros else None
        if both_NV is not None:
            u_NV = u_NV.masked_fill(both_NV, 0)
            w_NV = w_NV.masked_fill(both_NV, 0)
        gap_NV = (u_NV - w_NV).mul_(kappa)
        p_leads_NV = gap_NV > 0  # p^κ > q^κ: the larger term is factored out of the sum
        weight_NV = torch.where(p_leads_NV, gap_NV.new_tensor(1 - lam), gap_NV.new_tensor(lam))
        log_NV = gap_NV.abs().neg_().expm1_().mul_(weight_NV).log1p_().div_(kappa)
        log_NV += torch.where(p_leads_NV, u_NV, w_NV)
        if both_NV is not None:
            log_NV.masked_fill_(both_NV, -math.inf)
        return TokenDistributions(log_NV, has_zeros=zeros), (-gap_NV - math.log(lam / (1 - lam))).sigmoid()


class InterpolatedConfig(DivergenceConfig):
    """Declare the parameters of ``taid``."""

    taid_start: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.4, description="t₀ of taid, the teacher's share in the target at the start. It ends at 1."
    )
    taid_rate: Probability = Field(
        5e-4, description="Maximum step of taid's t towards 1 in addition to the linear schedule."
    )
    taid_momentum: Beta = Field(
        0.99,
        description="Momentum of taid, for the running mean of the relative decrease of the loss.",
    )


@register_divergence("taid", config=InterpolatedConfig, objective="distillm_cli.losses.objectives:TAID")
@dataclass(frozen=True)
class Interpolated(Divergence):
    """Compute KL(p_t ‖ q) with p_t = softmax((1−t) z + t z_T), z the student's logits as constants, z_T the teacher's (TAID,
    arXiv 2501.16937).

    t = 1 is KL. The objective TAID moves t.
    """

    t: float

    @classmethod
    def from_config(cls, config: InterpolatedConfig) -> Self:
        return cls(config.taid_start)

    def between(self, p: TokenDistributions, q: TokenDistributions, with_grad: bool = True) -> ValueAndGrad:
        zeros = have_zeros(p, q)
        return KL().between(TokenDistributions(_lerp(q.z_NV, p.z_NV, self.t, zeros), has_zeros=zeros), q, with_grad)


def _lerp(from_NV: Tensor, to_NV: Tensor, t: float, zeros: bool) -> Tensor:
    """Interpolate logits; an entry that is −inf at either end is −inf between them."""
    if not zeros:
        return from_NV.lerp(to_NV, t)
    if t in (0, 1):
        return to_NV if t else from_NV
    return from_NV.lerp(to_NV, t).masked_fill_(from_NV.isneginf() | to_NV.isneginf(), -math.inf)


def _times(weight_N: Tensor | float, value_N: Tensor) -> Tensor:
    """Multiply values by weights, where 0 · ∞ is 0."""
    import torch

    if not isinstance(weight_N, torch.Tensor):
        return weight_N * value_N
    return torch.where(weight_N == 0, 0, weight_N * value_N)


class DecoupledConfig(DivergenceConfig):
    """Declare the parameter of ``atkd``."""

    atkd_easy: Probability = Field(
        0.2,
        description="α of atkd, the weight of tokens on which the teacher is most confident. The others have "
        "weight 1−α.",
    )


@register_divergence("atkd", config=DecoupledConfig, objective="distillm_cli.losses.objectives:ATKD")
@dataclass(frozen=True, eq=False)
class Decoupled(Divergence):
    """Compute c_T·TKD + c_D·DKD (ATKD, arXiv 2402.11890; the parts are those of decoupled distillation, arXiv 2203.08679).

    TKD is KL between (target, all others) of teacher and student, DKD is KL over the others, renormalized. weights_N2:
    (c_T, c_D) of every row; both are 1 if the objective gives none. With c_T = 1 and c_D = 1 − p(target) this is KL.
    """

    targets_N: Tensor | None = None
    weights_N2: Tensor | None = None

    @classmethod
    def from_config(cls, config: DecoupledConfig) -> Self:
        return cls()

    def for_tokens(self, targets_N: Tensor, divergence_args_N: Tensor | None) -> Decoupled:
        return Decoupled(targets_N, divergence_args_N)

    def between(self, p: TokenDistributions, q: TokenDistributions, with_grad: bool = True) -> ValueAndGrad:
        if self.targets_N is None:
            raise ValueError("this divergence separates the supervised token: call for_tokens(targets) first")
        targets_N1 = self.targets_N.unsqueeze(-1)
        c_target_N: Tensor | float = 1.0
        c_others_N: Tensor | float = 1.0
        if self.weights_N2 is not None:
            c_target_N, c_others_N = self.weights_N2.to(q.z_NV.dtype).unbind(-1)
        p_others, q_others = (self._without_targets(rows, targets_N1) for rows in (p, q))
        # log of the others' mass, from two normalizers: 1 − p would round to 0 where the model is certain of the target
        log_p_rest_N, log_q_rest_N = (
            (others.log_norm_N1 - rows.log_norm_N1).squeeze(-1) for others, rows in ((p_others, p), (q_others, q))
        )
        log_p_N = p.log_at(self.targets_N)
        log_q_N = q.log_at(self.targets_N)
        p_N = log_p_N.exp()
        p_rest_N = log_p_rest_N.exp()
        target_N = _times(p_N, log_p_N - log_q_N) + _times(p_rest_N, log_p_rest_N - log_q_rest_N)
        others_NV = (p_others.log_NV - q_others.log_NV).mul_(p_others.prob_NV)
        others_N = drop_zeros(others_NV, p_others.prob_NV, have_zeros(p, q)).sum(-1)
        value_N = _times(c_target_N, target_N) + _times(c_others_N, others_N)
        if not with_grad:
            return value_N, None
        share_N = c_others_N - c_target_N * p_rest_N
        h_NV = q_others.prob_NV * share_N.unsqueeze(-1)
        h_NV -= p_others.prob_NV * (c_others_N if isinstance(c_others_N, float) else c_others_N.unsqueeze(-1))
        return value_N, h_NV.scatter_(-1, targets_N1, (-c_target_N * p_N).unsqueeze(-1))

    @staticmethod
    def _without_targets(rows: TokenDistributions, targets_N1: Tensor) -> TokenDistributions:
        """Return the distribution over all entries but the target, whose logit is set to a very low value."""
        import torch

        lowest = -0.25 * torch.finfo(rows.z_NV.dtype).max
        return TokenDistributions(rows.z_NV.scatter(-1, targets_N1, lowest), has_zeros=rows.has_zeros)


@dataclass(frozen=True)
class Tempered(Divergence):
    """Compute D(p_T, q_T) between the distributions at logits / T (Hinton et al. 2015, arXiv 1503.02531).

    squared: multiply by T², which keeps the size of the gradient in the logits about independent of T.
    """

    inner: Divergence
    temperature: float
    squared: bool = True

    def for_tokens(self, targets_N: Tensor, divergence_args_N: Tensor | None) -> Tempered:
        return replace(self, inner=self.inner.for_tokens(targets_N, divergence_args_N))

    def mirror(self) -> Tempered:
        return replace(self, inner=self.inner.mirror())

    def between(self, p: TokenDistributions, q: TokenDistributions, with_grad: bool = True) -> ValueAndGrad:
        T = self.temperature
        factor = T**2 if self.squared else 1.0
        soft_p, soft_q = (TokenDistributions(rows.z_NV / T, has_zeros=rows.has_zeros) for rows in (p, q))
        value_N, h_NV = self.inner.between(soft_p, soft_q, with_grad)
        if h_NV is not None:
            # The gradient in q's logits, (h − q_T Σ h) / T, sums to 0 over the vocabulary, so that it is also an h for q.
            h_NV = logit_grad(h_NV, soft_q.prob_NV).mul_(factor / T)
        return value_N * factor, h_NV
