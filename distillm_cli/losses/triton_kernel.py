"""Compute the losses of a part in one Triton kernel: three passes over the logits in the dtype of the products.

The first pass finds maximum and sum of both softmaxes, the second the value and Σ h, the third writes the gradient over the
student's product. No table in float32 is stored. Supported are the divergences of ``_KINDS``, which are functions of p and q
at one entry of the vocabulary. Other parts are left to ``part_losses``.

Letters: R tokens of a part, V vocabulary; p teacher, q student; h = ∂D/∂log q.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distillm_cli.losses import divergences
from distillm_cli.losses.divergences import Divergence
from distillm_cli.losses.fused import ChunkPart, HeadInputs, PartLosses

# Divergence → number in the kernel and the name of its parameter. TAID, ATKD and the subclasses of these are not among them.
_KINDS: dict[type[Divergence], tuple[int, str | None]] = {
    divergences.KL: (0, None),
    divergences.ReverseKL: (1, None),
    divergences.SkewKL: (2, "alpha"),
    divergences.SkewReverseKL: (3, "alpha"),
    divergences.JSD: (4, "beta"),
    divergences.TotalVariation: (5, None),
    divergences.Jeffreys: (6, "weight"),
}
_BLOCK = 4096  # entries of the vocabulary at once


@triton.jit
def _logits(row_ptr, offsets, mask, scale, softcap, HAS_CAP: tl.constexpr):
    z = tl.load(row_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * scale
    if HAS_CAP:
        z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)
    return z


@triton.jit
def _log_norm(row_ptr, scale, softcap, V: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Return log Σ exp z of a row, with a running maximum."""
    top = -float("inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < V
        z = tl.where(mask, _logits(row_ptr, offsets, mask, scale, softcap, HAS_CAP), -float("inf"))
        new_top = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), axis=0)
        top = new_top
    return top + tl.log(total)


@triton.jit
def _ratio(x, y, a):
    """Return x/m and log x/m, with m = a·x + (1−a)·y, both clamped as in ``divergences``."""
    ratio = x / tl.maximum(a * x + (1 - a) * y, 1.1754943508222875e-38)
    return ratio, tl.log(tl.maximum(ratio, 1.1754943508222875e-38))


@triton.jit
def _entry(p, q, log_p, log_q, a, KIND: tl.constexpr):
    """Return value and h of one entry of the vocabulary, by the formulas of ``divergences``."""
    if KIND == 0:
        value = p * (log_p - log_q)
        h = -p
    elif KIND == 1:
        value = q * (log_q - log_p)
        h = value + q
    elif KIND == 2:
        ratio, log_ratio = _ratio(p, q, a)
        value = p * log_ratio
        h = (a - 1) * q * ratio
    elif KIND == 3:
        ratio, log_ratio = _ratio(q, p, a)
        value = q * log_ratio
        h = value + q * (1 - a * ratio)
    elif KIND == 4:
        _, log_p_ratio = _ratio(p, q, a)
        _, log_q_ratio = _ratio(q, p, 1 - a)
        h = (1 - a) * q * log_q_ratio
        value = a * p * log_p_ratio + h
    elif KIND == 5:
        gap = q - p
        value = 0.5 * tl.abs(gap)
        h = 0.5 * q * tl.where(gap > 0, 1.0, tl.where(gap < 0, -1.0, 0.0))
    else:
        reverse = q * (log_q - log_p)
        value = 2 * a * p * (log_p - log_q) + 2 * (1 - a) * reverse
        h = 2 * (1 - a) * (reverse + q) - 2 * a * p
    return value, h


@triton.jit
def _part_kernel(
    q_ptr,
    q_stride,
    p_ptr,
    p_stride,
    targets_ptr,
    kd_ptr,
    ce_ptr,
    value_ptr,
    a,
    q_scale,
    q_softcap,
    p_scale,
    p_softcap,
    V: tl.constexpr,
    KIND: tl.constexpr,
    Q_CAP: tl.constexpr,
    P_CAP: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the value of one token and, with NEEDS_GRAD, its gradient over the student's product."""
    row = tl.program_id(0).to(tl.int64)
    q_row = q_ptr + row * q_stride
    p_row = p_ptr + row * p_stride
    target = tl.load(targets_ptr + row)
    kd = tl.load(kd_ptr + row)
    ce = tl.load(ce_ptr + row)
    q_norm = _log_norm(q_row, q_scale, q_softcap, V, Q_CAP, BLOCK)
    p_norm = _log_norm(p_row, p_scale, p_softcap, V, P_CAP, BLOCK)
    value = 0.0
    h_sum = 0.0
    for start in range(0, V, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < V
        log_q = _logits(q_row, offsets, mask, q_scale, q_softcap, Q_CAP) - q_norm
        log_p = _logits(p_row, offsets, mask, p_scale, p_softcap, P_CAP) - p_norm
        part, h = _entry(tl.exp(log_p), tl.exp(log_q), log_p, log_q, a, KIND)
        value += tl.sum(tl.where(mask, part, 0.0), axis=0)
        h_sum += tl.sum(tl.where(mask, h, 0.0), axis=0)
    at_target = _logits(q_row, target, target < V, q_scale, q_softcap, Q_CAP) - q_norm
    tl.store(value_ptr + row, kd * value - ce * at_target)
    if NEEDS_GRAD:
        for start in range(0, V, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            mask = offsets < V
            z = _logits(q_row, offsets, mask, q_scale, q_softcap, Q_CAP)
            log_q = z - q_norm
            q = tl.exp(log_q)
            log_p = _logits(p_row, offsets, mask, p_scale, p_softcap, P_CAP) - p_norm
            _, h = _entry(tl.exp(log_p), q, log_p, log_q, a, KIND)
            dz = kd * (h - q * h_sum) + ce * (q - tl.where(offsets == target, 1.0, 0.0))
            if Q_CAP:
                dz = dz * (1 - (z / q_softcap) * (z / q_softcap))
            tl.store(q_row + offsets, (dz * q_scale).to(q_ptr.dtype.element_ty), mask=mask)


def supports(part: ChunkPart) -> bool:
    """Return whether the kernel computes this part."""
    sides = [side for side in (part.student, part.teacher) if side is not None]
    divergence = part.weights.divergence
    return (
        part.teacher_RV is not None
        and type(divergence) in _KINDS
        and part.exact == torch.float32
        and part.token_weights.surrogate is None
        and all(side.weight_VD is not None and side.bias_V is None and not side.has_zeros for side in sides)
        and _parameter(divergence) not in (0, 1)  # there the formula is another one
    )


def _parameter(divergence: Divergence | None) -> float:
    """Return the parameter of a divergence in ``_KINDS``; ½ if it has none."""
    name = _KINDS[type(divergence)][1] if divergence is not None else None
    return 0.5 if name is None else float(getattr(divergence, name))


def part_losses_triton(part: ChunkPart) -> PartLosses | None:
    """Compute the losses of a part as ``part_losses`` does; None if the kernel does not support the part.

    The gradient replaces the student's product.
    """
    if not supports(part):
        return None
    assert part.teacher is not None
    assert part.teacher_RV is not None
    assert part.weights.divergence is not None  # ``supports`` has checked all of these
    weights, token_weights, targets_R = part.weights, part.token_weights, part.targets_R
    factor_R = torch.ones(len(targets_R), device=targets_R.device)
    if token_weights.weights_N is not None:
        factor_R = factor_R * token_weights.weights_N.float()
    kd_R = weights.kd * factor_R
    if token_weights.kd_weights_N is not None:
        kd_R = kd_R * token_weights.kd_weights_N.float()
    value_R = torch.empty_like(factor_R)
    _part_kernel[(len(targets_R),)](
        part.student_RV,
        part.student_RV.stride(0),
        part.teacher_RV,
        part.teacher_RV.stride(0),
        targets_R,
        kd_R,
        weights.ce * factor_R,
        value_R,
        _parameter(weights.divergence),
        *_scale_and_cap(part.student),
        *_scale_and_cap(part.teacher),
        V=part.student_RV.shape[1],
        KIND=_KINDS[type(part.weights.divergence)][0],
        Q_CAP=part.student.softcap is not None,
        P_CAP=part.teacher.softcap is not None,
        NEEDS_GRAD=part.needs_grad,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return value_R, part.student_RV if part.needs_grad else None


def _scale_and_cap(side: HeadInputs) -> tuple[float, float]:
    return side.scale, side.softcap or 1.0
