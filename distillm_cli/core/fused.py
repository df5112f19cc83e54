"""Last hidden states → loss, through both vocabularies, without ever holding [tokens × vocabulary].

One ``autograd.Function`` walks the supervised tokens in chunks. For each chunk: the student's logits (and the teacher's),
float32 log-softmax, the divergence and its closed-form gradient, and the two matmuls that carry it back to the hidden
states and the head. Each head runs once, in the forward pass; backward only scales. Peak memory is a few chunk × vocabulary
tables, whatever the batch.

Cross-entropy goes the same way (its gradient in the logits is q − onehot), so that SFT, validation and a mixed objective
share this one path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from distillm_cli.core.divergences import Divergence, logit_grad

CHUNK_BYTES = 64 * 2**20
_TABLES = 6  # [chunk × V] float32 tables alive at once: log_p, log_q, q, h and two temporaries


class HeadLike(Protocol):
    """logits = softcap(scale · (hidden @ weightᵀ + bias)); without a weight the hidden states are the logits."""

    weight_VD: Tensor | None
    bias_V: Tensor | None
    scale: float
    softcap: float | None


@dataclass(frozen=True)
class Terms:
    """What a token costs: ``kd`` · divergence + ``ce`` · cross-entropy."""

    kd: float
    ce: float


@dataclass(frozen=True)
class _Side:
    """One model's way from hidden states to logits, with its tensors detached and its head cast once."""

    hidden_ND: Tensor
    weight_VD: Tensor | None
    bias_V: Tensor | None
    scale: float
    softcap: float | None

    @staticmethod
    def of(hidden_ND: Tensor, weight_VD: Tensor | None, bias_V: Tensor | None, head: HeadLike, dtype) -> _Side:
        if weight_VD is not None:
            hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        return _Side(hidden_ND, weight_VD, bias_V, head.scale, head.softcap)

    def logits(self, rows: slice, dtype: torch.dtype) -> Tensor:
        hidden_CD = self.hidden_ND[rows]
        z_CV = hidden_CD.to(dtype) if self.weight_VD is None else (hidden_CD @ self.weight_VD.T).to(dtype)
        if self.bias_V is not None:
            z_CV = z_CV + self.bias_V.to(dtype)
        if self.scale != 1:
            z_CV = z_CV * self.scale
        if self.softcap is not None:
            z_CV = torch.tanh(z_CV / self.softcap) * self.softcap
        return z_CV

    def through_cap(self, dz_CV: Tensor, z_CV: Tensor) -> Tensor:
        """A gradient in the final logits → in the bare matmul's output."""
        if self.softcap is not None:
            dz_CV = dz_CV * (1 - (z_CV / self.softcap) ** 2)
        return dz_CV if self.scale == 1 else dz_CV * self.scale


@dataclass(frozen=True)
class _Plan:
    student_head: HeadLike
    teacher_hidden_ND: Tensor | None
    teacher_head: HeadLike | None
    targets_N: Tensor
    weights_N: Tensor | None
    divergence: Divergence | None
    terms: Terms
    matmul_dtype: torch.dtype | None
    chunk: int
    with_grad: bool


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, plan: _Plan):
        exact = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        side = _Side.of(hidden_ND, weight_VD, bias_V, plan.student_head, plan.matmul_dtype or hidden_ND.dtype)
        teacher = None
        if plan.terms.kd:
            head = plan.teacher_head
            dtype = plan.teacher_hidden_ND.dtype if head.weight_VD is None else head.weight_VD.dtype
            teacher = _Side.of(plan.teacher_hidden_ND, head.weight_VD, head.bias_V, head, dtype)

        wants_hidden, wants_weight, wants_bias = (plan.with_grad and need for need in ctx.needs_input_grad[:3])
        needs_grad = wants_hidden or wants_weight or wants_bias
        d_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=exact) if wants_weight else None
        d_bias_V = torch.zeros_like(bias_V, dtype=exact) if wants_bias else None
        total = hidden_ND.new_zeros((), dtype=exact)

        for start in range(0, hidden_ND.shape[0], plan.chunk):
            rows = slice(start, start + plan.chunk)
            z_CV = side.logits(rows, exact)
            value_C, dz_CV = _token_losses(z_CV, teacher, rows, plan, exact, needs_grad)
            weights_C = None if plan.weights_N is None else plan.weights_N[rows].to(exact)
            total += value_C.sum() if weights_C is None else (value_C * weights_C).sum()
            if not needs_grad:
                continue
            if weights_C is not None:
                dz_CV = dz_CV * weights_C.unsqueeze(-1)
            dz_CV = side.through_cap(dz_CV, z_CV)
            if wants_bias:
                d_bias_V += dz_CV.sum(0)
            if side.weight_VD is None:
                d_hidden_ND[rows] = dz_CV.to(d_hidden_ND.dtype)
                continue
            dz_CV = dz_CV.to(side.weight_VD.dtype)
            if wants_hidden:
                d_hidden_ND[rows] = (dz_CV @ side.weight_VD).to(d_hidden_ND.dtype)
            if wants_weight:
                d_weight_VD += dz_CV.T @ side.hidden_ND[rows]

        ctx.grads = (
            d_hidden_ND,
            None if d_weight_VD is None else d_weight_VD.to(weight_VD.dtype),
            None if d_bias_V is None else d_bias_V.to(bias_V.dtype),
        )
        return total

    @staticmethod
    def backward(ctx, d_total):
        return (*(None if g is None else g * d_total.to(g.dtype) for g in ctx.grads), None)


def _token_losses(
    z_CV: Tensor, teacher: _Side | None, rows: slice, plan: _Plan, exact: torch.dtype, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss per token [C] and, when asked for, its gradient in the student's logits [C, V]."""
    log_q_CV = F.log_softmax(z_CV, -1)
    q_CV = log_q_CV.exp() if needs_grad else None
    value_C, dz_CV = torch.zeros_like(log_q_CV[:, 0]), None
    if teacher is not None:
        log_p_CV = F.log_softmax(teacher.logits(rows, exact), -1)
        value_C, h_CV = plan.divergence.evaluate(log_p_CV, log_q_CV, needs_grad)
        value_C = plan.terms.kd * value_C
        if needs_grad:
            dz_CV = logit_grad(h_CV, q_CV).mul_(plan.terms.kd)
    if plan.terms.ce:
        targets_C1 = plan.targets_N[rows].unsqueeze(-1)
        value_C = value_C - plan.terms.ce * log_q_CV.gather(-1, targets_C1).squeeze(-1)
        if needs_grad:
            d_ce_CV = q_CV.mul_(plan.terms.ce).scatter_add_(
                -1, targets_C1, torch.full_like(targets_C1, -plan.terms.ce, dtype=q_CV.dtype)
            )
            dz_CV = d_ce_CV if dz_CV is None else dz_CV.add_(d_ce_CV)
    return value_C, dz_CV if dz_CV is not None or not needs_grad else torch.zeros_like(z_CV)


def fused_loss(
    hidden_ND: Tensor,
    head: HeadLike,
    targets_N: Tensor,
    *,
    terms: Terms,
    divergence: Divergence | None = None,
    teacher_hidden_ND: Tensor | None = None,
    teacher_head: HeadLike | None = None,
    weights_N: Tensor | None = None,
    matmul_dtype: torch.dtype | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Σ over N tokens of weight · (kd · D(p, q) + ce · −log q(target)), nats; a scalar with a graph.

    hidden_ND: the student's last hidden states at the positions that predict ``targets_N``. teacher_hidden_ND: the
    teacher's at the same positions, [N, D_teacher]; widths may differ, vocabularies must not. weights_N: per token, 1
    when absent. matmul_dtype: of the student's head matmuls (autocast's, when it is on); softmax and divergence are
    float32, or float64 when the hidden states are. chunk: tokens at once; by default as many as CHUNK_BYTES allows.
    Gradients reach hidden states, head weight and head bias, and only those that require one are computed.
    """
    if terms.kd and (teacher_hidden_ND is None or teacher_head is None or divergence is None):
        raise ValueError("a divergence needs the teacher's hidden states and head")
    if chunk is None:
        V = hidden_ND.shape[-1] if head.weight_VD is None else head.weight_VD.shape[0]
        chunk = max(1, CHUNK_BYTES // (4 * V * _TABLES))
    with_grad = torch.is_grad_enabled()
    plan = _Plan(
        head, teacher_hidden_ND, teacher_head, targets_N, weights_N, divergence, terms, matmul_dtype, chunk, with_grad
    )
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return _FusedLoss.apply(hidden_ND, head.weight_VD, head.bias_V, plan)
