"""Compute the loss from last hidden states, without storing the logits [tokens × vocabulary] of either model.

One ``autograd.Function`` processes the supervised tokens in chunks and parts. A chunk has as many tokens as the matrix
products need to run at full speed. Its logits, the student's and the teacher's, come from one product each, in the dtype of
the head. A part is a few rows of a chunk, so that its tables fit the processor's cache: float32 softmax, the divergence and
its closed-form gradient, which replaces the student's logits in place. Two more products compute a chunk's gradient in the
hidden states and in the head, the latter by slices of the vocabulary, summed in float32. Each head runs once, in the
forward pass; the backward pass only scales. The memory of the loss is bounded for every batch and length.

Cross-entropy is computed in the same way (its gradient in the logits is q − onehot), so SFT, validation and a mixed
objective share this code.

Shape letters: N supervised tokens, C tokens of a chunk, R rows of a part of it, V vocabulary, S a slice of the vocabulary,
D width of the last hidden state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distillm_cli.losses.divergences import Divergence, TokenDistributions
from distillm_cli.losses.weights import NO_WEIGHTS, LossWeights, TokenWeights
from distillm_cli.utils.memory import retry_halved

CHUNK_BYTES = (
    320 * 2**20
)  # upper bound for a chunk's logits of both models; with small vocabularies they are far smaller
_CHUNK_TOKENS = 256  # tokens for products at full speed; 128 tokens reach 90 %
_TABLE_BYTES = {"cpu": 2 * 2**20}  # size of one table of a part; several of them fit the last-level cache
_ACCELERATOR_TABLE_BYTES = 64 * 2**20  # on an accelerator kernel launches cost more than cache misses
_TOP_TOKENS = 16  # most likely tokens that are compared
_VOCAB_SLICE = 4096  # entries of the vocabulary in one slice of the head's gradient


Inputs = tuple[Tensor, Tensor | None, Tensor | None]  # hidden states, head weight, head bias; or their gradients
PartLosses = tuple[Tensor, Tensor | None]  # weighted loss per token, and its gradient in the student's product [R, V]
Kernel = Callable[["ChunkPart"], PartLosses | None]  # None: the kernel does not support the part


class HeadLike(Protocol):
    """Define logits = softcap(scale · (hidden @ weightᵀ + bias)). Without a weight the hidden states are the logits."""

    @property
    def weight_VD(self) -> Tensor | None: ...
    @property
    def bias_V(self) -> Tensor | None: ...
    @property
    def scale(self) -> float: ...
    @property
    def softcap(self) -> float | None: ...


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
    kernel: Kernel | None = None,
) -> Tensor:
    """Return the weighted loss summed over N tokens, nats, a scalar with a graph.

    The loss is scale · Σ weight · (kd · kd_weight · D(p, q) + ce · ce_weight · −log q(target) + surrogate(log q(target))).

    hidden_ND: the student's last hidden states at the positions that predict ``targets_N``. teacher_hidden_ND: the
    teacher's at the same positions, [N, D_teacher]; widths may differ, vocabularies must not. matmul_dtype: dtype of the
    student's head matmuls (autocast's, if it is on); softmax and divergence are float32, or float64 if the hidden states
    are. Gradients are computed for those of hidden states, head weight and head bias that require one, and under
    ``no_grad`` for none.

    chunk: largest number of tokens at once; None: as many as CHUNK_BYTES allows and as make the products fast. If memory
    runs out, the chunk is halved and the loss computed again, down to single tokens. ``on_halved`` then gets the chunk that
    fits.

    scale: the head's gradient is scaled when it is written, which costs less than scaling the result.

    kernel: computes the losses of a part in place of ``part_losses`` (see ``kernels.py``).
    """
    teacher = None
    if weights.kd:
        if teacher_hidden_ND is None or teacher_head is None or weights.divergence is None:
            raise ValueError("a divergence needs the teacher's hidden states and head")
        teacher = _TeacherArgs(teacher_head, teacher_hidden_ND)
    args = _LossArgs(
        student_head=head,
        teacher=teacher,
        targets_N=targets_N,
        token_weights=token_weights,
        weights=weights,
        matmul_dtype=matmul_dtype,
        chunk=chunk,
        on_halved=on_halved,
        with_grad=torch.is_grad_enabled(),
        scale=scale,
        kernel=kernel,
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

    Arguments and computation are those of ``fused_loss``.
    """
    args = _LossArgs(head, None, targets_N, NO_WEIGHTS, LossWeights(kd=0.0, ce=1.0), matmul_dtype, chunk, None, False)
    return _token_values(hidden_ND, args).neg_()


@torch.no_grad()
def token_entropies(
    hidden_ND: Tensor, head: HeadLike, *, matmul_dtype: torch.dtype | None = None, chunk: int | None = None
) -> Tensor:
    """Return the entropy [N] of the next-token distribution at each position, nats, without a graph.

    Arguments and computation are those of ``fused_loss``.
    """
    targets_N = torch.zeros(len(hidden_ND), dtype=torch.int64, device=hidden_ND.device)
    none = LossWeights(kd=0.0, ce=0.0)
    args = _LossArgs(head, None, targets_N, NO_WEIGHTS, none, matmul_dtype, chunk, None, False, losses=_entropies)
    return _token_values(hidden_ND, args)


AGREEMENT_FIGURES = ("student_entropy", "teacher_entropy", "top16_overlap", "top16_mass", "acceptance")


@torch.no_grad()
def token_agreement(
    hidden_ND: Tensor,
    head: HeadLike,
    teacher_hidden_ND: Tensor,
    teacher_head: HeadLike,
    *,
    matmul_dtype: torch.dtype | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the entropies of both models and their agreement at each position, [N, 5], without a graph.

    The columns are ``AGREEMENT_FIGURES``: both entropies, nats; the share of the student's 16 most likely tokens that
    are among the teacher's; the probability that the teacher gives to these shared tokens; and Σ min(p, q), which is 1
    minus the total variation distance and the rate at which the teacher accepts the student's drafts in speculative
    decoding.

    Arguments and computation are those of ``fused_loss``.
    """
    targets_N = torch.zeros(len(hidden_ND), dtype=torch.int64, device=hidden_ND.device)
    teacher = _TeacherArgs(teacher_head, teacher_hidden_ND)
    none = LossWeights(kd=0.0, ce=0.0)
    args = _LossArgs(
        head,
        teacher,
        targets_N,
        NO_WEIGHTS,
        none,
        matmul_dtype,
        chunk,
        None,
        False,
        losses=_agreement,
        columns=len(AGREEMENT_FIGURES),
    )
    return _token_values(hidden_ND, args)


@torch.no_grad()
def token_divergences(
    hidden_ND: Tensor,
    head: HeadLike,
    teacher_hidden_ND: Tensor,
    teacher_head: HeadLike,
    divergence: Divergence,
    *,
    matmul_dtype: torch.dtype | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the divergence [N] at each position, nats, without a graph. It must not depend on the target tokens.

    Arguments and computation are those of ``fused_loss``.
    """
    targets_N = torch.zeros(len(hidden_ND), dtype=torch.int64, device=hidden_ND.device)
    teacher = _TeacherArgs(teacher_head, teacher_hidden_ND)
    weights = LossWeights(kd=1.0, ce=0.0, divergence=divergence)
    args = _LossArgs(head, teacher, targets_N, NO_WEIGHTS, weights, matmul_dtype, chunk, None, False)
    return _token_values(hidden_ND, args)


def _token_values(hidden_ND: Tensor, args: _LossArgs) -> Tensor:
    """Return what the arguments ask for at each position, [N] or [N, columns], without gradients."""
    head = args.student_head
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return _values_and_grads((hidden_ND, head.weight_VD, head.bias_V), args, (False, False, False))[0]


@dataclass(frozen=True)
class _TeacherArgs:
    """Hold what a divergence needs of the teacher."""

    head: HeadLike
    hidden_ND: Tensor


@dataclass(frozen=True)
class _LossArgs:
    """Hold the arguments of a call, except the three tensors that autograd tracks.

    losses: what is computed of each part; None: ``part_losses``. columns: number of its values per token; None: one.
    """

    student_head: HeadLike
    teacher: _TeacherArgs | None
    targets_N: Tensor
    token_weights: TokenWeights
    weights: LossWeights
    matmul_dtype: torch.dtype | None
    chunk: int | None
    on_halved: Callable[[int], None] | None
    with_grad: bool
    scale: float = 1.0  # factor of the gradients, not of the token losses
    kernel: Kernel | None = None
    losses: Callable[[ChunkPart], PartLosses] | None = None
    columns: int | None = None


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor | None, bias_V: Tensor | None, args: _LossArgs
    ) -> Tensor:
        needed_grads = tuple(args.with_grad and need for need in ctx.needs_input_grad[:3])
        value_N, ctx.grads = _values_and_grads((hidden_ND, weight_VD, bias_V), args, needed_grads)
        if any(needed_grads):
            ctx.save_for_backward(hidden_ND, weight_VD, bias_V)
            ctx.args, ctx.needed_grads = args, needed_grads
        return value_N.sum() if args.scale == 1 else value_N.sum() * args.scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        # Gradients are scaled in place and released, since a second [V, D] table is expensive. A second backward pass
        # (retain_graph) computes them again.
        inputs = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            _, grads = _values_and_grads(inputs, ctx.args, ctx.needed_grads)
        # On another device .item() would synchronize.
        if d_total.device.type != "cpu" or d_total.item() != 1:
            grads = tuple(None if g is None else g.mul_(d_total) for g in grads)
        return (*grads, None)


def _values_and_grads(
    inputs: Inputs, args: _LossArgs, needed_grads: tuple[bool, ...]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return the weighted loss of each token [N], and the needed gradients of the sum in hidden states, weight and bias.

    If memory runs out, the computation is repeated in smaller chunks.
    """
    hidden_ND, weight_VD, bias_V = inputs
    exact = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    student = HeadInputs.from_head(
        hidden_ND, weight_VD, bias_V, args.student_head, args.matmul_dtype or hidden_ND.dtype
    )
    teacher = None
    if args.teacher is not None:
        head = args.teacher.head
        dtype = args.teacher.hidden_ND.dtype if head.weight_VD is None else head.weight_VD.dtype
        teacher = HeadInputs.from_head(args.teacher.hidden_ND, head.weight_VD, head.bias_V, head, dtype)

    N = hidden_ND.shape[0]
    limit = args.chunk or _chunk_size(student, teacher, exact)
    chunk = max(1, math.ceil(N / math.ceil(max(N, 1) / limit)))  # chunks of equal size: a small last one is slow
    fitting_chunk = chunk

    def attempt() -> tuple[_Computation, Tensor]:
        computation = _Computation(student, teacher, args, exact)
        return computation, computation.run(fitting_chunk, inputs, needed_grads)

    def halve() -> bool:
        nonlocal fitting_chunk
        if fitting_chunk == 1:
            return False
        fitting_chunk //= 2
        return True

    computation, value_N = retry_halved(attempt, halve)
    if fitting_chunk < chunk and args.on_halved is not None:
        args.on_halved(fitting_chunk)
    grads = (computation.d_hidden_ND, computation.d_weight_VD, computation.d_bias_V)
    pairs = zip(grads, inputs, strict=True)
    return value_N, tuple(None if g is None or x is None else g.to(x.dtype) for g, x in pairs)


def work_bytes(tokens: int, vocab: int, itemsize: int, device: str) -> int:
    """Estimate the memory of the loss while it runs, without the gradients.

    It is a chunk's logits of both models and the tables of a part (about eight, float32). itemsize: of the products.
    device: its type.
    """
    part = _TABLE_BYTES.get(device, _ACCELERATOR_TABLE_BYTES)
    chunk = min(tokens, max(_CHUNK_TOKENS, part // (4 * vocab)))
    return min(CHUNK_BYTES, 2 * chunk * vocab * itemsize) + 8 * max(min(part, 4 * tokens * vocab), 4 * vocab)


def _chunk_size(student: HeadInputs, teacher: HeadInputs | None, exact: torch.dtype) -> int:
    """Return the number of tokens of a chunk: enough for fast products and one part, at most what CHUNK_BYTES allows."""
    bytes_per_token = sum(side.V * side.hidden_ND.dtype.itemsize for side in (student, teacher) if side is not None)
    enough = max(_CHUNK_TOKENS, _part_rows(student, exact))
    return min(enough, max(1, CHUNK_BYTES // bytes_per_token))


def _part_rows(student: HeadInputs, exact: torch.dtype) -> int:
    """Return the number of rows whose softmax and divergence are computed at once."""
    table_bytes = _TABLE_BYTES.get(student.hidden_ND.device.type, _ACCELERATOR_TABLE_BYTES)
    return max(1, table_bytes // (exact.itemsize * student.V))


@dataclass(frozen=True)
class HeadInputs:
    """Compute one model's logits from its hidden states, in the dtype of the products. The head is cast once."""

    hidden_ND: Tensor
    weight_VD: Tensor | None
    bias_V: Tensor | None
    scale: float
    softcap: float | None
    has_zeros: bool  # whether logits may be −inf: if they are given, or if the bias suppresses tokens

    @staticmethod
    def from_head(
        hidden_ND: Tensor, weight_VD: Tensor | None, bias_V: Tensor | None, head: HeadLike, dtype: torch.dtype
    ) -> HeadInputs:
        if weight_VD is not None:
            hidden_ND = hidden_ND.to(dtype)
            weight_VD = weight_VD.to(dtype)
        if head.softcap is not None:
            has_zeros = False
        elif weight_VD is None:
            has_zeros = True
        else:
            has_zeros = bias_V is not None and bool(torch.isneginf(bias_V).any())
        return HeadInputs(hidden_ND, weight_VD, bias_V, head.scale, head.softcap, has_zeros)

    @property
    def V(self) -> int:
        return self.hidden_ND.shape[-1] if self.weight_VD is None else self.weight_VD.shape[0]

    def new_table(self, tokens: int) -> Tensor | None:
        """Allocate a chunk's products; None if the logits are given."""
        return None if self.weight_VD is None else self.hidden_ND.new_empty(tokens, self.V)

    def product(self, tokens: slice, table_CV: Tensor | None) -> Tensor:
        hidden_CD = self.hidden_ND[tokens]
        if self.weight_VD is None or table_CV is None:
            return hidden_CD
        return torch.mm(hidden_CD, self.weight_VD.T, out=table_CV[: hidden_CD.shape[0]])

    def logits(self, product_RV: Tensor, exact: torch.dtype) -> Tensor:
        """Return the logits of a product with the head's weight, in the exact dtype, without changing the product."""
        z_RV = product_RV.to(exact)
        if self.bias_V is not None:
            z_RV = z_RV + self.bias_V.to(exact)
        if self.scale != 1:
            z_RV = z_RV * self.scale
        if self.softcap is not None:
            z_RV = (z_RV / self.softcap).tanh_().mul_(self.softcap)
        return z_RV

    def backward_through_cap(self, dz_RV: Tensor, z_RV: Tensor) -> Tensor:
        """Convert a gradient in the final logits to one in the product, in place."""
        if self.softcap is not None:
            dz_RV.mul_((z_RV / self.softcap).square_().neg_().add_(1))
        return dz_RV if self.scale == 1 else dz_RV.mul_(self.scale)


@dataclass(frozen=True, eq=False)
class ChunkPart:
    """Hold the inputs of the losses of R tokens.

    student_RV, teacher_RV: products of hidden states and head, before bias, scale and cap; or given logits. exact: dtype of
    softmax and divergence.
    """

    student: HeadInputs
    student_RV: Tensor
    teacher: HeadInputs | None
    teacher_RV: Tensor | None
    targets_R: Tensor
    weights: LossWeights
    token_weights: TokenWeights
    exact: torch.dtype
    needs_grad: bool


def part_losses(part: ChunkPart, distributions: type[TokenDistributions] = TokenDistributions) -> PartLosses:
    """Compute the losses of a part with tensor operations. Every kernel is checked against this function."""
    weights = part.weights
    q = distributions(part.student.logits(part.student_RV, part.exact), has_zeros=part.student.has_zeros)
    value_R = torch.zeros_like(q.z_NV[:, 0])
    h_RV = None
    kd_weights_N = part.token_weights.kd_weights_N
    kd_R = weights.kd if kd_weights_N is None else weights.kd * kd_weights_N.to(part.exact)
    ce_R: float | Tensor = weights.ce  # one for all rows, unless there is a surrogate
    if part.teacher is not None and part.teacher_RV is not None and weights.divergence is not None:
        p = distributions(part.teacher.logits(part.teacher_RV, part.exact), has_zeros=part.teacher.has_zeros)
        divergence = weights.divergence.for_tokens(part.targets_R, part.token_weights.divergence_args_N)
        value_R, h_RV = divergence.between(p, q, part.needs_grad)
        value_R = value_R * kd_R
    if weights.ce:
        value_R = value_R - ce_R * q.log_at(part.targets_R)
    if part.token_weights.surrogate is not None:
        surrogate_R, slope_R = part.token_weights.surrogate(q.log_at(part.targets_R))
        value_R = value_R + surrogate_R
        ce_R = ce_R + slope_R  # −slope · log q has the same gradient
    weight_R = None if part.token_weights.weights_N is None else part.token_weights.weights_N.to(part.exact)
    if weight_R is not None:
        value_R = value_R * weight_R
    if not part.needs_grad:
        return value_R, None
    dz_RV = _logit_grad(h_RV, q.prob_NV, part.targets_R, kd_R, ce_R)
    if weight_R is not None:
        dz_RV.mul_(weight_R.unsqueeze(-1))
    return value_R, part.student.backward_through_cap(dz_RV, q.z_NV)


def _entropies(part: ChunkPart) -> PartLosses:
    """Return the entropy of the student's distributions in place of a loss, nats."""
    q = TokenDistributions(part.student.logits(part.student_RV, part.exact), has_zeros=part.student.has_zeros)
    return q.entropy(), None


def _agreement(part: ChunkPart) -> PartLosses:
    """Return the columns of ``token_agreement`` in place of a loss."""
    assert part.teacher is not None
    assert part.teacher_RV is not None
    q = TokenDistributions(part.student.logits(part.student_RV, part.exact), has_zeros=part.student.has_zeros)
    p = TokenDistributions(part.teacher.logits(part.teacher_RV, part.exact), has_zeros=part.teacher.has_zeros)
    top = min(_TOP_TOKENS, part.student.V)
    of_q_RK, of_p_RK = (side.z_NV.topk(top, sorted=False).indices for side in (q, p))
    is_shared_RK = (of_p_RK.unsqueeze(-1) == of_q_RK.unsqueeze(-2)).any(-1)
    mass_R = (p.prob_NV.gather(-1, of_p_RK) * is_shared_RK).sum(-1)
    accepted_R = torch.minimum(p.prob_NV, q.prob_NV).sum(-1)
    overlap_R = is_shared_RK.to(part.exact).mean(-1)
    return torch.stack([q.entropy(), p.entropy(), overlap_R, mass_R, accepted_R], dim=-1), None


class _Computation:
    """Compute the whole loss once. It owns all memory that it allocates, so that a failed attempt frees it."""

    def __init__(self, student: HeadInputs, teacher: HeadInputs | None, args: _LossArgs, exact: torch.dtype):
        self.student = student
        self.teacher = teacher
        self.args = args
        self.exact = exact
        self.part = _part_rows(student, exact)
        self.d_hidden_ND: Tensor | None = None
        self.d_weight_VD: Tensor | None = None
        self.d_bias_V: Tensor | None = None

    def run(self, chunk: int, inputs: Inputs, needed_grads: tuple[bool, ...]) -> Tensor:
        """Return the weighted token losses [N] and compute the needed gradients."""
        hidden_ND, weight_VD, bias_V = inputs
        N = hidden_ND.shape[0]
        self.d_hidden_ND = torch.empty_like(hidden_ND) if needed_grads[0] else None
        self.d_bias_V = torch.zeros_like(bias_V, dtype=self.exact) if bias_V is not None and needed_grads[2] else None
        if weight_VD is not None and needed_grads[1]:  # the first chunk overwrites it
            self.d_weight_VD = (torch.empty_like if N else torch.zeros_like)(weight_VD, dtype=self.exact)
        shape = (N,) if self.args.columns is None else (N, self.args.columns)
        value_N = torch.empty(shape, dtype=self.exact, device=hidden_ND.device)
        table_CV = self.student.new_table(chunk)
        teacher_table_CV = None if self.teacher is None else self.teacher.new_table(chunk)
        for tokens in _slices(N, chunk):
            dz_CV = self._chunk(tokens, value_N, table_CV, teacher_table_CV, needs_grad=any(needed_grads))
            if dz_CV is not None and self.student.weight_VD is not None:
                self._backward_through_head(dz_CV, self.student.weight_VD, tokens)
        for gradient in (self.d_hidden_ND, self.d_bias_V):  # the weight's gradient was scaled when it was written
            if gradient is not None and self.args.scale != 1:
                gradient.mul_(self.args.scale)
        return value_N

    def _chunk(
        self,
        tokens: slice,
        value_N: Tensor,
        table_CV: Tensor | None,
        teacher_table_CV: Tensor | None,
        *,
        needs_grad: bool,
    ) -> Tensor | None:
        """Write the chunk's losses and return its gradient.

        The gradient replaces the student's product, or is written to the gradient of the logits if these are given.
        """
        z_CV = self.student.product(tokens, table_CV)
        teacher_z_CV = None if self.teacher is None else self.teacher.product(tokens, teacher_table_CV)
        has_given_logits = self.student.weight_VD is None
        dz_CV: Tensor | None = z_CV
        if has_given_logits:
            dz_CV = None if self.d_hidden_ND is None else self.d_hidden_ND[tokens]

        def part(rows: slice) -> ChunkPart:
            token_rows = slice(tokens.start + rows.start, tokens.start + rows.stop)
            return ChunkPart(
                student=self.student,
                student_RV=z_CV[rows],
                teacher=self.teacher,
                teacher_RV=None if teacher_z_CV is None else teacher_z_CV[rows],
                targets_R=self.args.targets_N[token_rows],
                weights=self.args.weights,
                token_weights=self.args.token_weights[token_rows],
                exact=self.exact,
                needs_grad=needs_grad,
            )

        C = z_CV.shape[0]
        whole = part(slice(0, C))
        done = None if self.args.kernel is None else self.args.kernel(whole)  # it stores no tables: no parts are needed
        results: Iterable[tuple[slice, PartLosses]]
        if done is None:
            losses = self.args.losses or part_losses
            results = ((rows, losses(part(rows))) for rows in _slices(C, self.part))
        else:
            results = [(slice(0, C), done)]
        for rows, (value_R, dz_RV) in results:
            value_N[tokens.start + rows.start : tokens.start + rows.stop] = value_R
            if dz_RV is None:
                continue
            if self.d_bias_V is not None:
                self.d_bias_V += dz_RV.sum(0)
            if dz_CV is not None and dz_RV is not whole.student_RV:  # a kernel may have replaced the product
                dz_CV[rows] = dz_RV
        return dz_CV

    def _backward_through_head(self, dz_CV: Tensor, weight_VD: Tensor, tokens: slice) -> None:
        """Add the gradients in hidden states and head weight, from the gradient in the product."""
        if self.d_hidden_ND is not None:
            self.d_hidden_ND[tokens] = dz_CV[: tokens.stop - tokens.start] @ weight_VD
        if self.d_weight_VD is None:
            return
        hidden_CD = self.student.hidden_ND[tokens]
        # By slices: a product in bfloat16 is added to the float32 sum while it is still in the cache.
        for vocab in _slices(dz_CV.shape[1], _VOCAB_SLICE):
            part_SD = (dz_CV[:, vocab].T @ hidden_CD).to(self.exact)
            if tokens.start == 0:
                torch.mul(part_SD, self.args.scale, out=self.d_weight_VD[vocab])
            else:
                self.d_weight_VD[vocab].add_(part_SD, alpha=self.args.scale)


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


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
