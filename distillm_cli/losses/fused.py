"""Compute the loss from last hidden states, through both vocabularies, without ever holding [tokens × vocabulary].

One ``autograd.Function`` goes through the supervised tokens in chunks and parts. A chunk is as many tokens as the matrix
products need to run at full speed: its logits, the student's and the teacher's, come from one product each, in the heads'
own dtype. Inside it, a few rows at a time, so that the tables stay in the processor's cache: float32 softmax, the divergence
and its closed-form gradient, which replaces the student's logits in place. Two more products carry a chunk's gradient back
to the hidden states and the head, the latter by pieces of the vocabulary, summed in float32. Each head runs once, in the
forward pass; backward only scales. What the loss adds to memory is bounded, whatever the batch and the length.

Cross-entropy is computed in the same way (its gradient in the logits is q − onehot), so that SFT, validation and a mixed
objective share this code.

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

from distillm_cli.losses.divergences import TokenDistributions
from distillm_cli.losses.weights import NO_WEIGHTS, LossWeights, TokenWeights
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
    weights: LossWeights,
    teacher_hidden_ND: Tensor | None = None,
    teacher_head: HeadLike | None = None,
    token_weights: TokenWeights = NO_WEIGHTS,
    matmul_dtype: torch.dtype | None = None,
    chunk: int | None = None,
    on_halved: Callable[[int], None] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Return scale · Σ over N tokens of weight · (kd · kd_weight · D(p, q) + ce · ce_weight · −log q(target) + surrogate(log
    q(target))), nats; a scalar with a graph.

    hidden_ND: the student's last hidden states at the positions that predict ``targets_N``. teacher_hidden_ND: the
    teacher's at the same positions, [N, D_teacher]; widths may differ, vocabularies must not. matmul_dtype: of the
    student's head matmuls (autocast's, when it is on); softmax and divergence are float32, or float64 when the hidden
    states are. Gradients reach hidden states, head weight and head bias; only those that require one are computed, and
    under ``no_grad`` none.

    chunk: most tokens at once; None: as many as CHUNK_BYTES allows and make the products fast. Where memory runs out the
    chunk is halved and the loss computed again, down to single tokens; ``on_halved`` then gets the chunk that fits.

    scale: the caller could multiply the result, but here it costs nothing: the head's gradient is scaled when it is written.
    """
    if weights.kd and (teacher_hidden_ND is None or teacher_head is None or weights.divergence is None):
        raise ValueError("a divergence needs the teacher's hidden states and head")
    args = _LossArgs(
        student_head=head,
        teacher_head=teacher_head if weights.kd else None,
        teacher_hidden_ND=teacher_hidden_ND if weights.kd else None,
        targets_N=targets_N,
        token_weights=token_weights,
        weights=weights,
        matmul_dtype=matmul_dtype,
        chunk=chunk,
        on_halved=on_halved,
        with_grad=torch.is_grad_enabled(),
        scale=scale,
    )
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return _FusedLoss.apply(hidden_ND, head.weight_VD, head.bias_V, args)


@torch.no_grad()
def target_log_probs(
    hidden_ND: Tensor,
    head: HeadLike,
    targets_N: Tensor,
    *,
    matmul_dtype: torch.dtype | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the log-probability [N] of each target, nats, float32 (float64 when the hidden states are), without a graph.

    Arguments as of ``fused_loss``; the same computation, so the same numbers.
    """
    args = _LossArgs(
        head, None, None, targets_N, NO_WEIGHTS, LossWeights(kd=0.0, ce=1.0), matmul_dtype, chunk, None, False
    )
    with torch.autocast(hidden_ND.device.type, enabled=False):
        value_N, _ = _values_and_grads((hidden_ND, head.weight_VD, head.bias_V), args, (False, False, False))
    return value_N.neg_()


@dataclass(frozen=True)
class _LossArgs:
    """Hold the arguments of a call, apart from the three tensors that autograd must see."""

    student_head: HeadLike
    teacher_head: HeadLike | None
    teacher_hidden_ND: Tensor | None
    targets_N: Tensor
    token_weights: TokenWeights
    weights: LossWeights
    matmul_dtype: torch.dtype | None
    chunk: int | None
    on_halved: Callable[[int], None] | None
    with_grad: bool
    scale: float = 1.0  # of the gradients; the values are left as they are


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, args: _LossArgs):
        wanted = tuple(args.with_grad and need for need in ctx.needs_input_grad[:3])
        value_N, ctx.grads = _values_and_grads((hidden_ND, weight_VD, bias_V), args, wanted)
        if any(wanted):
            ctx.save_for_backward(hidden_ND, weight_VD, bias_V)
            ctx.args, ctx.wanted = args, wanted
        return value_N.sum() if args.scale == 1 else value_N.sum() * args.scale

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total):
        # Scaled in place, if at all, and released: a second [V, D] table would cost more than the scaling. A second backward
        # pass (retain_graph) computes them again.
        inputs = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            _, grads = _values_and_grads(inputs, ctx.args, ctx.wanted)
        if (
            d_total.device.type != "cpu" or d_total.item() != 1
        ):  # reading it from another device would wait for that device
            grads = tuple(None if g is None else g.mul_(d_total) for g in grads)
        return (*grads, None)


def _values_and_grads(inputs: Inputs, args: _LossArgs, wanted: tuple[bool, ...]) -> tuple[Tensor, Inputs]:
    """Return the weighted loss of each token [N] and, where wanted, the gradients of their sum in hidden states, weight and
    bias; in smaller chunks where memory runs out."""
    hidden_ND, weight_VD, bias_V = inputs
    exact = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    student = _HeadInputs.of(hidden_ND, weight_VD, bias_V, args.student_head, args.matmul_dtype or hidden_ND.dtype)
    teacher = None
    if (head := args.teacher_head) is not None:
        dtype = args.teacher_hidden_ND.dtype if head.weight_VD is None else head.weight_VD.dtype
        teacher = _HeadInputs.of(args.teacher_hidden_ND, head.weight_VD, head.bias_V, head, dtype)

    N = hidden_ND.shape[0]
    most = args.chunk or _most_tokens(student, teacher, exact)
    fitting = chunk = max(1, math.ceil(N / math.ceil(max(N, 1) / most)))  # chunks of one size: a small last one is slow

    def attempt() -> tuple[_Computation, Tensor]:
        computation = _Computation(student, teacher, args, exact)
        return computation, computation.run(fitting, inputs, wanted)

    def halve() -> bool:
        nonlocal fitting
        if fitting == 1:
            return False
        fitting //= 2
        return True

    computation, value_N = retry_halved(attempt, halve)
    if fitting < chunk and args.on_halved is not None:
        args.on_halved(fitting)
    grads = (computation.d_hidden_ND, computation.d_weight_VD, computation.d_bias_V)
    return value_N, tuple(None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))


def work_bytes(tokens: int, vocab: int, itemsize: int, device: str) -> int:
    """Estimate the memory of the loss while it runs, beside the gradients: a chunk's logits of both models, and the tables
    of a part (some eight of them, float32). itemsize: of the products; device: its type."""
    part = _TABLE_BYTES.get(device, _TABLE_BYTES_ELSEWHERE)
    chunk = min(tokens, max(_CHUNK_TOKENS, part // (4 * vocab)))
    return min(CHUNK_BYTES, 2 * chunk * vocab * itemsize) + 8 * max(min(part, 4 * tokens * vocab), 4 * vocab)


def _most_tokens(student: _HeadInputs, teacher: _HeadInputs | None, exact: torch.dtype) -> int:
    """Return the size of a chunk: enough for fast products and for one part, but no more than CHUNK_BYTES allows."""
    bytes_per_token = sum(side.V * side.hidden_ND.dtype.itemsize for side in (student, teacher) if side is not None)
    enough = max(_CHUNK_TOKENS, _part_rows(student, exact))
    return min(enough, max(1, CHUNK_BYTES // bytes_per_token))


def _part_rows(student: _HeadInputs, exact: torch.dtype) -> int:
    """Return how many rows have their softmax and divergence computed at once."""
    table_bytes = _TABLE_BYTES.get(student.hidden_ND.device.type, _TABLE_BYTES_ELSEWHERE)
    return max(1, table_bytes // (exact.itemsize * student.V))


@dataclass(frozen=True)
class _HeadInputs:
    """Compute one model's logits from its hidden states, in the dtype of the products: the head is cast once."""

    hidden_ND: Tensor
    weight_VD: Tensor | None
    bias_V: Tensor | None
    scale: float
    softcap: float | None
    has_zeros: bool  # whether logits may be −inf: where they are given, or the bias suppresses tokens

    @staticmethod
    def of(hidden_ND: Tensor, weight_VD: Tensor | None, bias_V: Tensor | None, head: HeadLike, dtype) -> _HeadInputs:
        if weight_VD is not None:
            hidden_ND = hidden_ND.to(dtype)
            weight_VD = weight_VD.to(dtype)
        if head.softcap is not None:
            has_zeros = False
        elif weight_VD is None:
            has_zeros = True
        else:
            has_zeros = bias_V is not None and bool(torch.isneginf(bias_V).any())
        return _HeadInputs(hidden_ND, weight_VD, bias_V, head.scale, head.softcap, has_zeros)

    @property
    def V(self) -> int:
        return self.hidden_ND.shape[-1] if self.weight_VD is None else self.weight_VD.shape[0]

    def new_table(self, tokens: int) -> Tensor | None:
        """Allocate a chunk's products; None where the logits are given."""
        return None if self.weight_VD is None else self.hidden_ND.new_empty(tokens, self.V)

    def product(self, tokens: slice, table_CV: Tensor | None) -> Tensor:
        hidden_CD = self.hidden_ND[tokens]
        if self.weight_VD is None:
            return hidden_CD
        return torch.mm(hidden_CD, self.weight_VD.T, out=table_CV[: hidden_CD.shape[0]])

    def rows(self, product_RV: Tensor, exact: torch.dtype) -> TokenDistributions:
        return TokenDistributions(self.logits(product_RV, exact), has_zeros=self.has_zeros)

    def logits(self, product_RV: Tensor, exact: torch.dtype) -> Tensor:
        """Return the logits of a product with the head's weight, in the exact dtype; the product itself stays unchanged."""
        z_RV = product_RV.to(exact)
        if self.bias_V is not None:
            z_RV = z_RV + self.bias_V.to(exact)
        if self.scale != 1:
            z_RV = z_RV * self.scale
        if self.softcap is not None:
            z_RV = (z_RV / self.softcap).tanh_().mul_(self.softcap)
        return z_RV

    def backward_through_cap(self, dz_RV: Tensor, z_RV: Tensor) -> Tensor:
        """Turn a gradient in the final logits into one in the product, in place."""
        if self.softcap is not None:
            dz_RV.mul_((z_RV / self.softcap).square_().neg_().add_(1))
        return dz_RV if self.scale == 1 else dz_RV.mul_(self.scale)


class _Computation:
    """Compute the whole loss once. It owns all memory that it adds, so that one that fails leaves nothing behind."""

    def __init__(self, student: _HeadInputs, teacher: _HeadInputs | None, args: _LossArgs, exact: torch.dtype):
        self.student = student
        self.teacher = teacher
        self.args = args
        self.exact = exact
        self.part = _part_rows(student, exact)
        self.d_hidden_ND: Tensor | None = None
        self.d_weight_VD: Tensor | None = None
        self.d_bias_V: Tensor | None = None

    def run(self, chunk: int, inputs: Inputs, wanted: tuple[bool, ...]) -> Tensor:
        """Return the weighted token losses [N] and compute the gradients that are wanted."""
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
                self._backward_through_head(dz_CV, tokens)
        for gradient in (self.d_hidden_ND, self.d_bias_V):  # the weight's has been, where it was written
            if gradient is not None and self.args.scale != 1:
                gradient.mul_(self.args.scale)
        return value_N

    def _chunk(self, tokens: slice, value_N: Tensor, table_CV, teacher_table_CV, needs_grad: bool) -> Tensor:
        """Write the chunk's losses and return its gradient: in place of the student's product, or, where logits were given
        instead, in the gradient of those."""
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
            dz_RV = self.student.backward_through_cap(dz_RV, q.z_NV)
            if self.d_bias_V is not None:
                self.d_bias_V += dz_RV.sum(0)
            if dz_CV is not None:
                dz_CV[rows] = dz_RV
        return dz_CV

    def _losses(
        self, p: TokenDistributions | None, q: TokenDistributions, tokens: slice, needs_grad: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the weighted loss per token [R] and, when asked for, its gradient in the student's logits [R, V]."""
        kd = self.args.weights.kd
        ce = self.args.weights.ce
        targets_R = self.args.targets_N[tokens]
        own = self.args.token_weights[tokens]
        value_R = torch.zeros_like(q.z_NV[:, 0])
        h_RV = None
        kd_R = kd if own.kd_weights_N is None else kd * own.kd_weights_N.to(self.exact)
        ce_R = ce if own.ce_weights_N is None else ce * own.ce_weights_N.to(self.exact)
        if p is not None:
            value_R, h_RV = self.args.weights.divergence.at(targets_R, own.divergence_args_N).between(p, q, needs_grad)
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

    def _backward_through_head(self, dz_CV: Tensor, tokens: slice) -> None:
        """Add the gradients in hidden states and head weight, from the gradient in the product."""
        if self.d_hidden_ND is not None:
            self.d_hidden_ND[tokens] = dz_CV[: tokens.stop - tokens.start] @ self.student.weight_VD
        if self.d_weight_VD is None:
            return
        hidden_CD = self.student.hidden_ND[tokens]
        # By pieces: a product in bfloat16 is added to the float32 sum while it is still in the cache.
        for piece in _cuts(dz_CV.shape[1], _PIECE):
            part_SD = (dz_CV[:, piece].T @ hidden_CD).to(self.exact)
            if tokens.start == 0:
                torch.mul(part_SD, self.args.scale, out=self.d_weight_VD[piece])
            else:
                self.d_weight_VD[piece].add_(part_SD, alpha=self.args.scale)


def _logit_grad(h_RV: Tensor | None, q_RV: Tensor, targets_R: Tensor, kd: float | Tensor, ce: float | Tensor) -> Tensor:
    """Return kd · (h − q Σ h) + ce · (q − onehot), in few passes; both may be per row [R]. Overwrites h, or q without it."""
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
