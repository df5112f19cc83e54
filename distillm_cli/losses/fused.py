"""Last hidden states → loss, through both vocabularies, without ever holding [tokens × vocabulary].

One ``autograd.Function`` walks the supervised tokens in two strides. A chunk of tokens is as many as the matrix products
need to run at full speed: its logits, the student's and the teacher's, come from one product each, in the heads' own dtype.
Inside it, a few rows at a time, so that the tables stay in the processor's cache: float32 softmax, the divergence and its
closed-form gradient, which replaces the student's logits where they lie. Two more products carry a chunk's gradient back
to the hidden states and the head, the latter by pieces of the vocabulary, summed in float32. Each head runs once, in the
forward pass; backward only scales. What the loss adds to memory is bounded, whatever the batch and the length.

Cross-entropy goes the same way (its gradient in the logits is q − onehot), so that SFT, validation and a mixed objective
share this one path.

Shape letters: N supervised tokens, C tokens of a chunk, R rows of a part of it, V vocabulary, S a piece of the vocabulary,
D width of the last hidden state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distillm_cli.losses.divergences import Rows
from distillm_cli.losses.terms import NO_WEIGHTS, LossWeights, TokenWeights
from distillm_cli.utils.memory import retry_halved

CHUNK_BYTES = 320 * 2**20  # most bytes of a chunk's logits, both models'; with small vocabularies it is far less
_CHUNK_TOKENS = 256  # beyond it the products gain nothing: 128 tokens reach 90 % of their speed, 256 all of it
_TABLE_BYTES = {"cpu": 2 * 2**20}  # of one table of a part: several of them fit the last-level cache
_TABLE_BYTES_ELSEWHERE = 64 * 2**20  # on an accelerator launches cost more than cache misses
_PIECE = 4096  # entries of the vocabulary in one piece of the head's gradient


Inputs = tuple[Tensor, Tensor | None, Tensor | None]  # hidden states, head weight, head bias; or their gradients


class HeadLike(Protocol):
    """logits = softcap(scale · (hidden @ weightᵀ + bias)); without a weight the hidden states are the logits."""

    weight_VD: Tensor | None
    bias_V: Tensor | None
    scale: float
    softcap: float | None


def fused_loss(
    hidden_ND: Tensor,
    head: HeadLike,
    targets_N: Tensor,
    *,
    terms: LossWeights,
    teacher_hidden_ND: Tensor | None = None,
    teacher_head: HeadLike | None = None,
    per_token: TokenWeights = NO_WEIGHTS,
    matmul_dtype: torch.dtype | None = None,
    chunk: int | None = None,
    on_halved: Callable[[int], None] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """scale · Σ over N tokens of weight · (kd · kd_weight · D(p, q) + ce · ce_weight · −log q(target) + surrogate(log
    q(target))), nats; a scalar with a graph.

    hidden_ND: the student's last hidden states at the positions that predict ``targets_N``. teacher_hidden_ND: the
    teacher's at the same positions, [N, D_teacher]; widths may differ, vocabularies must not. matmul_dtype: of the
    student's head matmuls (autocast's, when it is on); softmax and divergence are float32, or float64 when the hidden
    states are. Gradients reach hidden states, head weight and head bias; only those that require one are computed, and
    under ``no_grad`` none.

    chunk: most tokens at once; unset, as many as pay and as CHUNK_BYTES allows. Where memory runs out the chunk is halved
    and the loss begun again, down to single tokens; ``on_halved`` is then told the chunk that fitted.

    scale: as well applied to the result, but here it costs nothing: the head's gradient is scaled where it is written.
    """
    if terms.kd and (teacher_hidden_ND is None or teacher_head is None or terms.divergence is None):
        raise ValueError("a divergence needs the teacher's hidden states and head")
    work = _Work(
        student_head=head,
        teacher_head=teacher_head if terms.kd else None,
        teacher_hidden_ND=teacher_hidden_ND if terms.kd else None,
        targets_N=targets_N,
        per_token=per_token,
        terms=terms,
        matmul_dtype=matmul_dtype,
        chunk=chunk,
        on_halved=on_halved,
        with_grad=torch.is_grad_enabled(),
        scale=scale,
    )
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return _FusedLoss.apply(hidden_ND, head.weight_VD, head.bias_V, work)


@torch.no_grad()
def target_log_probs(
    hidden_ND: Tensor,
    head: HeadLike,
    targets_N: Tensor,
    *,
    matmul_dtype: torch.dtype | None = None,
    chunk: int | None = None,
) -> Tensor:
    """log-probability [N] of each target, nats, float32 (float64 when the hidden states are), without a graph.

    Arguments as of ``fused_loss``; the same walk, so the same numbers.
    """
    work = _Work(head, None, None, targets_N, NO_WEIGHTS, LossWeights(kd=0.0, ce=1.0), matmul_dtype, chunk, None, False)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        value_N, _ = _values_and_grads((hidden_ND, head.weight_VD, head.bias_V), work, (False, False, False))
    return value_N.neg_()


@dataclass(frozen=True)
class _Work:
    """A call's arguments, apart from the three tensors that autograd must see."""

    student_head: HeadLike
    teacher_head: HeadLike | None
    teacher_hidden_ND: Tensor | None
    targets_N: Tensor
    per_token: TokenWeights
    terms: LossWeights
    matmul_dtype: torch.dtype | None
    chunk: int | None
    on_halved: Callable[[int], None] | None
    with_grad: bool
    scale: float = 1.0  # of the gradients; the values are left as they are


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, work: _Work):
        wanted = tuple(work.with_grad and need for need in ctx.needs_input_grad[:3])
        value_N, ctx.grads = _values_and_grads((hidden_ND, weight_VD, bias_V), work, wanted)
        if any(wanted):
            ctx.save_for_backward(hidden_ND, weight_VD, bias_V)
            ctx.work, ctx.wanted = work, wanted
        return value_N.sum() if work.scale == 1 else value_N.sum() * work.scale

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total):
        # Scaled where they lie, if at all, and given away: a second [V, D] table would cost more than the scaling. Whoever
        # asks again (retain_graph) has them computed again.
        inputs = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            _, grads = _values_and_grads(inputs, ctx.work, ctx.wanted)
        if d_total.device.type != "cpu" or d_total.item() != 1:  # to know it of another device would be to wait for it
            grads = tuple(None if g is None else g.mul_(d_total) for g in grads)
        return (*grads, None)


def _values_and_grads(inputs: Inputs, work: _Work, wanted: tuple[bool, ...]) -> tuple[Tensor, Inputs]:
    """The weighted loss of each token [N] and, where wanted, the gradients of their sum in hidden states, weight and bias;
    in smaller chunks if it must be."""
    hidden_ND, weight_VD, bias_V = inputs
    exact = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    student = _Side.of(hidden_ND, weight_VD, bias_V, work.student_head, work.matmul_dtype or hidden_ND.dtype)
    teacher = None
    if (head := work.teacher_head) is not None:
        dtype = work.teacher_hidden_ND.dtype if head.weight_VD is None else head.weight_VD.dtype
        teacher = _Side.of(work.teacher_hidden_ND, head.weight_VD, head.bias_V, head, dtype)

    N = hidden_ND.shape[0]
    most = work.chunk or _most_tokens(student, teacher, exact)
    fitting = chunk = max(1, math.ceil(N / math.ceil(max(N, 1) / most)))  # chunks of one size: a small last one is slow

    def attempt() -> tuple[_Walk, Tensor]:
        walk = _Walk(student, teacher, work, exact)
        return walk, walk.run(fitting, inputs, wanted)

    def halve() -> bool:
        nonlocal fitting
        if fitting == 1:
            return False
        fitting //= 2
        return True

    walk, value_N = retry_halved(attempt, halve)
    if fitting < chunk and work.on_halved is not None:
        work.on_halved(fitting)
    grads = (walk.d_hidden_ND, walk.d_weight_VD, walk.d_bias_V)
    return value_N, tuple(None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))


def work_bytes(tokens: int, vocab: int, itemsize: int, device: str) -> int:
    """About what the loss takes for itself while it runs, beside the gradients: a chunk's logits of both models, and the
    tables of a part (some eight of them, float32). itemsize: of the products; device: its type."""
    part = _TABLE_BYTES.get(device, _TABLE_BYTES_ELSEWHERE)
    chunk = min(tokens, max(_CHUNK_TOKENS, part // (4 * vocab)))
    return min(CHUNK_BYTES, 2 * chunk * vocab * itemsize) + 8 * max(min(part, 4 * tokens * vocab), 4 * vocab)


def _most_tokens(student: _Side, teacher: _Side | None, exact: torch.dtype) -> int:
    """Of a chunk: enough for the products' speed, and for one part at least, but no more than fit the budget."""
    bytes_per_token = sum(side.V * side.hidden_ND.dtype.itemsize for side in (student, teacher) if side is not None)
    enough = max(_CHUNK_TOKENS, _part_rows(student, exact))
    return min(enough, max(1, CHUNK_BYTES // bytes_per_token))


def _part_rows(student: _Side, exact: torch.dtype) -> int:
    """Rows whose softmax and divergence are computed at once."""
    table_bytes = _TABLE_BYTES.get(student.hidden_ND.device.type, _TABLE_BYTES_ELSEWHERE)
    return max(1, table_bytes // (exact.itemsize * student.V))


@dataclass(frozen=True)
class _Side:
    """One model's way from hidden states to logits, its tensors in the dtype of the products: the head is cast once."""

    hidden_ND: Tensor
    weight_VD: Tensor | None
    bias_V: Tensor | None
    scale: float
    softcap: float | None
    has_zeros: bool  # whether logits may be −inf: where they are given, or the bias suppresses tokens

    @staticmethod
    def of(hidden_ND: Tensor, weight_VD: Tensor | None, bias_V: Tensor | None, head: HeadLike, dtype) -> _Side:
        if weight_VD is not None:
            hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        if head.softcap is not None:
            has_zeros = False
        elif weight_VD is None:
            has_zeros = True
        else:
            has_zeros = bias_V is not None and bool(torch.isneginf(bias_V).any())
        return _Side(hidden_ND, weight_VD, bias_V, head.scale, head.softcap, has_zeros)

    @property
    def V(self) -> int:
        return self.hidden_ND.shape[-1] if self.weight_VD is None else self.weight_VD.shape[0]

    def new_table(self, tokens: int) -> Tensor | None:
        """Room for a chunk's products; None where the logits are given."""
        return None if self.weight_VD is None else self.hidden_ND.new_empty(tokens, self.V)

    def product(self, tokens: slice, table_CV: Tensor | None) -> Tensor:
        hidden_CD = self.hidden_ND[tokens]
        if self.weight_VD is None:
            return hidden_CD
        return torch.mm(hidden_CD, self.weight_VD.T, out=table_CV[: hidden_CD.shape[0]])

    def rows(self, product_RV: Tensor, exact: torch.dtype) -> Rows:
        return Rows(self.logits(product_RV, exact), has_zeros=self.has_zeros)

    def logits(self, product_RV: Tensor, exact: torch.dtype) -> Tensor:
        """What the model makes of the bare product, in the exact dtype; the product itself is left as it is."""
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


class _Walk:
    """One attempt at the whole loss. All that it adds to memory is its own, so that an attempt that fails leaves nothing."""

    def __init__(self, student: _Side, teacher: _Side | None, work: _Work, exact: torch.dtype):
        self.student, self.teacher, self.work, self.exact = student, teacher, work, exact
        self.part = _part_rows(student, exact)
        self.d_hidden_ND = self.d_weight_VD = self.d_bias_V = None

    def run(self, chunk: int, inputs: Inputs, wanted: tuple[bool, ...]) -> Tensor:
        """The weighted token losses [N]; fills the gradients that are wanted."""
        hidden_ND, weight_VD, bias_V = inputs
        N = hidden_ND.shape[0]
        self.d_hidden_ND = torch.empty_like(hidden_ND) if wanted[0] else None
        self.d_bias_V = torch.zeros_like(bias_V, dtype=self.exact) if wanted[2] else None
        if wanted[1]:  # the first chunk overwrites it
            self.d_weight_VD = (torch.empty_like if N else torch.zeros_like)(weight_VD, dtype=self.exact)
        value_N = torch.empty(N, dtype=self.exact, device=hidden_ND.device)
        tables = [None if side is None else side.new_table(chunk) for side in (self.student, self.teacher)]
        for tokens in _cuts(N, chunk):
            dz_CV = self._chunk(tokens, value_N, *tables, needs_grad=any(wanted))
            if weight_VD is not None:
                self._carry_back(dz_CV, tokens)
        for gradient in (self.d_hidden_ND, self.d_bias_V):  # the weight's has been, where it was written
            if gradient is not None and self.work.scale != 1:
                gradient.mul_(self.work.scale)
        return value_N

    def _chunk(self, tokens: slice, value_N: Tensor, table_CV, teacher_table_CV, needs_grad: bool) -> Tensor:
        """Fills in the chunk's losses and returns where its gradient lies: in place of the student's product, or, where
        logits were given instead, in the gradient of those."""
        z_CV = self.student.product(tokens, table_CV)
        teacher_z_CV = None if self.teacher is None else self.teacher.product(tokens, teacher_table_CV)
        given = self.student.weight_VD is None
        dz_CV = z_CV
        if given:
            dz_CV = None if self.d_hidden_ND is None else self.d_hidden_ND[tokens]
        for rows in _cuts(z_CV.shape[0], self.part):
            among_N = slice(tokens.start + rows.start, tokens.start + rows.stop)
            p = None if teacher_z_CV is None else self.teacher.rows(teacher_z_CV[rows], self.exact)
            q = self.student.rows(z_CV[rows], self.exact)
            value_N[among_N], dz_RV = self._losses(p, q, among_N, needs_grad)
            if dz_RV is None:
                continue
            dz_RV = self.student.through_cap(dz_RV, q.z_NV)
            if self.d_bias_V is not None:
                self.d_bias_V += dz_RV.sum(0)
            if dz_CV is not None:
                dz_CV[rows] = dz_RV
        return dz_CV

    def _losses(self, p: Rows | None, q: Rows, tokens: slice, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
        """Weighted loss per token [R] and, when asked for, its gradient in the student's logits [R, V]."""
        kd, ce = self.work.terms.kd, self.work.terms.ce
        targets_R, own = self.work.targets_N[tokens], self.work.per_token[tokens]
        value_R, h_RV = torch.zeros_like(q.z_NV[:, 0]), None
        kd_R = kd if own.kd_weights_N is None else kd * own.kd_weights_N.to(self.exact)
        ce_R = ce if own.ce_weights_N is None else ce * own.ce_weights_N.to(self.exact)
        if p is not None:
            value_R, h_RV = self.work.terms.divergence.at(targets_R, own.divergence_args_N).between(p, q, needs_grad)
            value_R = value_R * kd_R
        if ce:
            value_R = value_R - ce_R * q.log_at(targets_R)
        if own.surrogate is not None:
            more_R, slope_R = own.surrogate(q.log_at(targets_R))
            value_R, ce_R = value_R + more_R, ce_R + slope_R  # −slope · log q has the same gradient
        weight_R = None if own.weights_N is None else own.weights_N.to(self.exact)
        if weight_R is not None:
            value_R = value_R * weight_R
        if not needs_grad:
            return value_R, None
        dz_RV = _logit_grad(h_RV, q.prob_NV, targets_R, kd_R, ce_R)
        return value_R, dz_RV if weight_R is None else dz_RV.mul_(weight_R.unsqueeze(-1))

    def _carry_back(self, dz_CV: Tensor, tokens: slice) -> None:
        """From the bare product to hidden states and head."""
        if self.d_hidden_ND is not None:
            self.d_hidden_ND[tokens] = dz_CV[: tokens.stop - tokens.start] @ self.student.weight_VD
        if self.d_weight_VD is None:
            return
        hidden_CD = self.student.hidden_ND[tokens]
        # By pieces: a product in bfloat16 is added to the float32 sum while it is still in the cache.
        for piece in _cuts(dz_CV.shape[1], _PIECE):
            part_SD = (dz_CV[:, piece].T @ hidden_CD).to(self.exact)
            if tokens.start == 0:
                torch.mul(part_SD, self.work.scale, out=self.d_weight_VD[piece])
            else:
                self.d_weight_VD[piece].add_(part_SD, alpha=self.work.scale)


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


def _cuts(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
