"""Divergences beyond the textbook's: mixed by where the gap lies (``akl``), between KL and its reverse and further (``ab``),
through an assistant between teacher and student (``amid``), towards a target on its way to the teacher (``taid``), and with
the supervised token apart (``atkd``). Value and h = ∂D/∂log q as in ``divergences``.

Sources: adaptive KL, Wu et al. (arXiv 2404.02657); α-β divergence, Cichocki, Cruces and Amari 2011, brought to distillation
by ABKD (arXiv 2505.04560); α-mixture assistant, AMiD (arXiv 2510.15982); TAID (arXiv 2501.16937); ATKD (arXiv 2402.11890),
whose decomposition is decoupled distillation's (arXiv 2203.08679).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distillm_cli.losses.divergences import KL, Divergence, ReverseKL, Rows, drop_zeros, have_zeros, logit_grad
from distillm_cli.utils.exact import where_exact

_FEW = 32  # entries looked at first for a head; most of a language model's mass is in fewer
_NARROW = 0.05  # exponents closer together than this are told apart in float64


@dataclass(frozen=True)
class AdaptiveKL(Divergence):
    """w KL(p‖q) + (1−w) KL(q‖p), w = g_head/(g_head + g_tail), g = Σ |p−q| over the teacher's head and over the rest.

    The head is the fewest entries whose teacher mass reaches mu; the likeliest is always in it. w is taken as a number:
    no gradient goes through it.
    """

    mu: float = 0.5

    def between(self, p, q, with_grad=True):
        w_N1, zeros = self._head_share(p.prob_NV, q.prob_NV), have_zeros(p, q)
        log_ratio_NV = q.log_NV - p.log_NV
        part_NV = drop_zeros(log_ratio_NV * q.prob_NV, q.prob_NV, zeros)
        w_N = w_N1.squeeze(-1)
        forward_NV = drop_zeros(log_ratio_NV.mul_(p.prob_NV), p.prob_NV, zeros)
        value_N = _times(1 - w_N, part_NV.sum(-1)) - _times(w_N, forward_NV.sum(-1))
        if not with_grad:
            return value_N, None
        return value_N, part_NV.add_(q.prob_NV).mul_(1 - w_N1).sub_(w_N1 * p.prob_NV)

    def _head_share(self, p_NV: Tensor, q_NV: Tensor) -> Tensor:
        """w [N, 1]: the head's share of Σ |p−q|; 0 where there is no gap."""
        gap_NV = (p_NV - q_NV).abs_()
        total_N1 = gap_NV.sum(-1, keepdim=True)
        if self.mu >= 1:  # all entries; their masses added up may round to 1 before the last ones
            return (total_N1 > 0).to(p_NV.dtype)
        V, k = p_NV.shape[-1], min(_FEW, p_NV.shape[-1])
        while True:
            top_NK, ids_NK = p_NV.topk(k, dim=-1)
            before_NK = top_NK.cumsum(-1) - top_NK  # the mass of the likelier entries: below mu, this one belongs too
            if k == V or bool((before_NK[:, -1] >= self.mu).all()):
                break
            k = min(8 * k, V)
        head_N1 = (gap_NV.gather(-1, ids_NK) * (before_NK < self.mu)).sum(-1, keepdim=True)
        return (head_N1 / total_N1.clamp_min_(torch.finfo(p_NV.dtype).tiny)).clamp_max_(1)


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """Compute −1/(αβ) Σ [p^α q^β − α/(α+β) p^{α+β} − β/(α+β) q^{α+β}], continued to where α, β or α+β is 0.

    (1, 0) is KL and (0, 1) reverse KL; (0, 0) is ½ Σ (log p − log q)². One form serves them all: with s = α+β and
    G(t) = p^t q^{s−t}, an entry's value is the second divided difference of G at 0, α and s (never negative, since G is
    convex), and its h is minus the first one at 0 and α. Where two of these points meet, a difference is a derivative.

    α, β and α+β ≥ 0 keep every power below 1. Negative ones are for distributions that overlap: a power that would
    overflow is held at the square root of the largest number. An entry that only one side has is infinite unless the other
    side's power and α+β are positive.
    """

    alpha: float
    beta: float

    @property
    def mirrored(self) -> AlphaBeta:
        """D(q, p) of this D(p, q)."""
        return AlphaBeta(self.beta, self.alpha)

    def between(self, p, q, with_grad=True):
        if not have_zeros(p, q):
            return self._of_logs(p.log_NV, q.log_NV, with_grad)
        no_p_NV, no_q_NV = torch.isneginf(p.log_NV), torch.isneginf(q.log_NV)
        filled = (rows.log_NV.masked_fill(no_p_NV | no_q_NV, 0) for rows in (p, q))  # equal there: adds 0
        value_N, h_NV = self._of_logs(*filled, with_grad)
        only_q_NV = no_p_NV & ~no_q_NV
        value_N += self._alone(q.log_NV, only_q_NV, self.alpha)
        value_N += self._alone(p.log_NV, no_q_NV & ~no_p_NV, self.beta)
        if with_grad and self.alpha != 0:  # infinite at α = 0
            h_NV.add_(torch.where(only_q_NV, ((self.alpha + self.beta) * q.log_NV).exp_() / self.alpha, 0))
        return value_N, h_NV

    def _alone(self, log_NV: Tensor, alone_NV: Tensor, power: float) -> Tensor:
        """Sum the entries where only this side is not 0. power: of the other side in p^α q^β."""
        s = self.alpha + self.beta
        if power <= 0 or s <= 0:
            return torch.where(alone_NV.any(-1), math.inf, 0.0).to(log_NV)
        return torch.where(alone_NV, (s * log_NV).exp_(), 0).sum(-1).div_(power * s)

    def _of_logs(self, u_NV: Tensor, w_NV: Tensor, with_grad: bool) -> tuple[Tensor, Tensor | None]:
        """Return value and h from finite log p and log q."""
        first, middle, last = sorted((0.0, self.alpha, self.alpha + self.beta))
        given_NV = w_NV
        gap_NV = u_NV - w_NV
        spread = last - first
        if spread == 0:
            value_N = gap_NV.square().sum(-1).mul_(0.5)
            return value_N, gap_NV.neg_() if with_grad else None
        if spread < _NARROW:
            u_NV, w_NV, gap_NV = (where_exact(x_NV).double() for x_NV in (u_NV, w_NV, gap_NV))
        pairs = ((first, middle), (middle, last))
        rises = {pair: self._rise(u_NV, w_NV, gap_NV, *pair) for pair in pairs}
        (below_NV, below), (above_NV, above) = (rises[pair] for pair in pairs)
        value_N = torch.add(above_NV, below_NV, alpha=-above / below).sum(-1).div_(above * spread).to(given_NV)
        if not with_grad:
            return value_N, None
        wanted = min(0.0, self.alpha), max(0.0, self.alpha)
        h_NV, width = rises.get(wanted) or self._rise(u_NV, w_NV, gap_NV, *wanted)
        return value_N, h_NV.mul_(-1 / width).to(given_NV)

    def _rise(self, u_NV: Tensor, w_NV: Tensor, gap_NV: Tensor, low: float, high: float) -> tuple[Tensor, float]:
        """G(high) − G(low), entry by entry, and high − low; their quotient is the divided difference. (G'(low), 1) where
        they are equal.

        From the larger of the two and e^−distance − 1, so that neither cancellation nor overflow can come in.
        """
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


@dataclass(frozen=True)
class AlphaMixture(Divergence):
    """D(p ‖ r), or D(q ‖ r) when it is measured from the student, with an assistant r between p and q.

    r ∝ (λ p^κ + (1−λ) q^κ)^{1/κ}, κ = (1−a)/2: the arithmetic mixture at a = −1 (with KL that is skew KL), the geometric
    p^λ q^{1−λ} at a = 1. The larger a is, the nearer r is to the smaller of the two probabilities. 0 < lam < 1.
    """

    a: float
    lam: float
    inner: KL | ReverseKL | AlphaBeta
    from_student: bool = False

    def between(self, p, q, with_grad=True):
        r, share = self._assistant(p.log_NV, q.log_NV, have_zeros(p, q))
        first = q if self.from_student else p
        value_N, h_NV = self.inner.between(first, r, with_grad)
        if not with_grad:
            return value_N, None
        h_NV = logit_grad(h_NV, r.prob_NV).mul_(share)  # through r's own normaliser, then through its mixture
        if self.from_student:
            h_NV += _mirrored(self.inner).between(r, q)[1]
        return value_N, h_NV

    def _assistant(self, u_NV: Tensor, w_NV: Tensor, zeros: bool = True) -> tuple[Rows, Tensor | float]:
        """r, and ∂ log(unnormalised r)/∂ log q: the share of q's term in the sum."""
        kappa, lam = (1 - self.a) / 2, self.lam
        if kappa == 0:
            return Rows(_lerp(w_NV, u_NV, lam, zeros), has_zeros=zeros), 1 - lam
        both_NV = torch.isneginf(u_NV) & torch.isneginf(w_NV) if zeros else None
        if zeros:
            u_NV, w_NV = u_NV.masked_fill(both_NV, 0), w_NV.masked_fill(both_NV, 0)
        gap_NV = (u_NV - w_NV).mul_(kappa)
        p_leads_NV = gap_NV > 0  # p^κ > q^κ: the larger term is taken out of the sum
        weight_NV = torch.where(p_leads_NV, gap_NV.new_tensor(1 - lam), gap_NV.new_tensor(lam))
        log_NV = gap_NV.abs().neg_().expm1_().mul_(weight_NV).log1p_().div_(kappa)
        log_NV += torch.where(p_leads_NV, u_NV, w_NV)
        if zeros:
            log_NV.masked_fill_(both_NV, -math.inf)
        return Rows(log_NV, has_zeros=zeros), torch.sigmoid(-gap_NV - math.log(lam / (1 - lam)))


def _mirrored(divergence: KL | ReverseKL | AlphaBeta) -> Divergence:
    """D(q, p) of a D(p, q)."""
    match divergence:
        case KL():
            return ReverseKL()
        case ReverseKL():
            return KL()
        case AlphaBeta():
            return divergence.mirrored
    raise TypeError(f"no mirror image of {divergence}")


@dataclass(frozen=True)
class Interpolated(Divergence):
    """KL(p_t ‖ q) with p_t = softmax((1−t) z + t z_T), z the student's logits taken as numbers, z_T the teacher's.

    t = 1 is KL. How t moves is the criterion's affair (``core.criterion``).
    """

    t: float

    def between(self, p, q, with_grad=True):
        zeros = have_zeros(p, q)
        return KL().between(Rows(_lerp(q.z_NV, p.z_NV, self.t, zeros), has_zeros=zeros), q, with_grad)


def _lerp(from_NV: Tensor, to_NV: Tensor, t: float, zeros: bool) -> Tensor:
    """Interpolate logits; an entry that is −inf at either end is −inf between them."""
    if not zeros:
        return torch.lerp(from_NV, to_NV, t)
    if t in (0, 1):
        return to_NV if t else from_NV
    return torch.lerp(from_NV, to_NV, t).masked_fill_(torch.isneginf(from_NV) | torch.isneginf(to_NV), -math.inf)


def _times(weight_N: Tensor | float, value_N: Tensor) -> Tensor:
    """Weigh values; a weight of 0 leaves nothing, even of an infinite one."""
    if not isinstance(weight_N, Tensor):
        return weight_N * value_N
    return torch.where(weight_N == 0, 0, weight_N * value_N)


@dataclass(frozen=True, eq=False)
class Decoupled(Divergence):
    """c_T·TKD + c_D·DKD. TKD: KL between (target, all others) of teacher and student; DKD: KL over the others, renormalised.

    weights_N2: (c_T, c_D) of every row; both 1 where the criterion has given none. With c_T = 1 and c_D = 1 − p(target) this
    is KL.
    """

    targets_N: Tensor | None = None
    weights_N2: Tensor | None = None

    def at(self, targets_N, divergence_args_N):
        return Decoupled(targets_N, divergence_args_N)

    def between(self, p, q, with_grad=True):
        if self.targets_N is None:
            raise ValueError("this divergence treats the supervised token apart: ask it ``at`` targets")
        targets_N1 = self.targets_N.unsqueeze(-1)
        c_target_N, c_others_N = (1.0, 1.0)
        if self.weights_N2 is not None:
            c_target_N, c_others_N = self.weights_N2.to(q.z_NV.dtype).unbind(-1)
        p_others, q_others = (self._without_targets(rows, targets_N1) for rows in (p, q))
        # log of the others' mass, from two normalisers: 1 − p would lose it where the model is sure of the target
        log_p_rest_N, log_q_rest_N = (
            (others.log_norm_N1 - rows.log_norm_N1).squeeze(-1) for others, rows in ((p_others, p), (q_others, q))
        )
        log_p_N, log_q_N = p.log_at(self.targets_N), q.log_at(self.targets_N)
        p_N, p_rest_N = log_p_N.exp(), log_p_rest_N.exp()
        target_N = _times(p_N, log_p_N - log_q_N) + _times(p_rest_N, log_p_rest_N - log_q_rest_N)
        others_NV = (p_others.log_NV - q_others.log_NV).mul_(p_others.prob_NV)
        others_N = drop_zeros(others_NV, p_others.prob_NV, have_zeros(p, q)).sum(-1)
        value_N = _times(c_target_N, target_N) + _times(c_others_N, others_N)
        if not with_grad:
            return value_N, None
        share_N = c_others_N - c_target_N * p_rest_N
        h_NV = q_others.prob_NV * share_N.unsqueeze(-1)
        h_NV -= p_others.prob_NV * (c_others_N.unsqueeze(-1) if isinstance(c_others_N, Tensor) else c_others_N)
        return value_N, h_NV.scatter_(-1, targets_N1, (-c_target_N * p_N).unsqueeze(-1))

    @staticmethod
    def _without_targets(rows: Rows, targets_N1: Tensor) -> Rows:
        """The distribution over all entries but the target, whose logit is put far below everything."""
        lowest = -0.25 * torch.finfo(rows.z_NV.dtype).max
        return Rows(rows.z_NV.scatter(-1, targets_N1, lowest), has_zeros=rows.has_zeros)
