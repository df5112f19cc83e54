"""Logits of a few rows → their losses and their gradient: all that the fused loss does between its matrix products.

Elementwise work over tables of the vocabulary's width, and nothing else. Shape letters: R rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distillm_cli.core.divergences import Rows
from distillm_cli.core.terms import PerToken, Terms


class Way(NamedTuple):
    """From a head's bare products to its logits, in the exact dtype."""

    bias_V: Tensor | None
    scale: float
    softcap: float | None

    def logits(self, product_RV: Tensor, exact: torch.dtype) -> Tensor:
        """What the model makes of the bare product; the product itself is left as it is."""
        z_RV = product_RV.to(exact)
        if self.bias_V is not None:
            z_RV = z_RV + self.bias_V.to(exact)
        if self.scale != 1:
            z_RV = z_RV * self.scale
        if self.softcap is not None:
            z_RV = (z_RV / self.softcap).tanh_().mul_(self.softcap)
        return z_RV

    def through_cap(self, dz_RV: Tensor, z_RV: Tensor) -> Tensor:
        """A gradient in the final logits → in the bare product, in place."""
        if self.softcap is not None:
            dz_RV.mul_((z_RV / self.softcap).square_().neg_().add_(1))
        return dz_RV if self.scale == 1 else dz_RV.mul_(self.scale)


def part_loss(
    product_RV: Tensor,
    teacher_product_RV: Tensor | None,
    targets_R: Tensor,
    own: PerToken,
    ways: tuple[Way, Way | None],
    terms: Terms,
    exact: torch.dtype,
    into_RV: Tensor | None,
    sums_bias: bool,
) -> tuple[Tensor, Tensor | None]:
    """Weighted loss per token [R] of a few rows, from the bare products of both heads; and, where asked for, the gradient
    summed over them [V], for a bias.

    into_RV: takes the gradient in the student's product, which it may be itself; None where no gradient is wanted. ways:
    of student and teacher.
    """
    student, teacher = ways
    p = None if teacher_product_RV is None else Rows(teacher.logits(teacher_product_RV, exact))
    q = Rows(student.logits(product_RV, exact))
    value_R, dz_RV = _losses(p, q, targets_R, own, terms, exact, into_RV is not None)
    if dz_RV is None:
        return value_R, None
    dz_RV = student.through_cap(dz_RV, q.z_NV)
    into_RV.copy_(dz_RV)
    return value_R, dz_RV.sum(0) if sums_bias else None


def _losses(
    p: Rows | None, q: Rows, targets_R: Tensor, own: PerToken, terms: Terms, exact: torch.dtype, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Weighted loss per token [R] and, when asked for, its gradient in the student's logits [R, V]."""
    kd, ce = terms.kd, terms.ce
    value_R, h_RV = torch.zeros_like(q.z_NV[:, 0]), None
    kd_R = kd if own.kd_weights_N is None else kd * own.kd_weights_N.to(exact)
    ce_R = ce if own.ce_weights_N is None else ce * own.ce_weights_N.to(exact)
    if p is not None:
        value_R, h_RV = terms.divergence.at(targets_R, own.marks_N).between(p, q, needs_grad)
        value_R = value_R * kd_R
    if ce:
        value_R = value_R - ce_R * q.log_at(targets_R)
    if own.surrogate is not None:
        more_R, slope_R = own.surrogate(q.log_at(targets_R))
        value_R, ce_R = value_R + more_R, ce_R + slope_R  # −slope · log q has the same gradient
    weight_R = None if own.weights_N is None else own.weights_N.to(exact)
    if weight_R is not None:
        value_R = value_R * weight_R
    if not needs_grad:
        return value_R, None
    dz_RV = _logit_grad(h_RV, q.prob_NV, targets_R, kd_R, ce_R)
    return value_R, dz_RV if weight_R is None else dz_RV.mul_(weight_R.unsqueeze(-1))


def _logit_grad(h_RV: Tensor | None, q_RV: Tensor, targets_R: Tensor, kd: float | Tensor, ce: float | Tensor) -> Tensor:
    """kd · (h − q Σ h) + ce · (q − onehot), in few passes; both may be per row [R]. Takes over h, or q without it."""
    ce_R1 = ce.unsqueeze(-1) if isinstance(ce, Tensor) else q_RV.new_full((q_RV.shape[0], 1), ce)
    if h_RV is None:
        dz_RV = q_RV.mul_(ce_R1)
    else:
        if isinstance(kd, Tensor):
            h_RV.mul_(kd.unsqueeze(-1))
        elif kd != 1:
            h_RV.mul_(kd)
        dz_RV = h_RV.addcmul_(q_RV, h_RV.sum(-1, keepdim=True).sub_(ce_R1), value=-1)
    if isinstance(ce, Tensor) or ce:
        dz_RV.scatter_add_(-1, targets_R.unsqueeze(-1), -ce_R1)
    return dz_RV
