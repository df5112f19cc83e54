"""Batch + student + teacher → (sum of losses, what to divide it by).

The student lives inside the objective and everything goes through ``forward``, so that a wrapper around this module
(data parallel, sharded) sees every parameter it must gather or reduce. What a token costs is the criterion's affair.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import torch
from torch import Tensor, nn

from distillm_cli.losses.fused import HeadLike, fused_loss, target_log_probs
from distillm_cli.losses.objectives import Objective, TokenLogProbs
from distillm_cli.losses.weights import NO_WEIGHTS, LossWeights, TokenWeights
from distillm_cli.teachers.local import LanguageModel
from distillm_cli.training.events import Listener, Note, silent
from distillm_cli.types import Batch


class StudentLoss(nn.Module):
    """Join the student and the criterion of its training.

    student: an ``nn.Module`` that is a ``LanguageModel``. teacher_head: needed for any divergence. matmul_dtype: of the
    student's head. router_aux: weight of the auxiliary loss of a mixture of experts' routers, in training.
    """

    def __init__(
        self,
        student: LanguageModel,
        criterion: Objective,
        *,
        teacher_head: HeadLike | None = None,
        matmul_dtype: torch.dtype | None = None,
        router_aux: float = 0.0,
    ):
        super().__init__()
        self.student = student
        self.criterion, self.matmul_dtype = criterion, matmul_dtype
        self.router_aux = router_aux
        self.say: Listener = silent
        self.chunk: int | None = None  # most tokens that the loss takes at once; unset until memory runs out
        # Behind a function: a teacher's head that happens to be a Module must not become ours to train or save.
        self._teacher_head = lambda: teacher_head

    def forward(
        self,
        batches: SequenceOf[Batch],
        teacher_hidden_ND: Tensor | None,
        terms: LossWeights,
        per_token: TokenWeights | None = None,
        scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """(scale · Σ of token losses with its graph, the number of tokens), both scalars, over the tokens of all batches.

        Each batch goes through the student's trunk by itself, as short as its own rows are, and all of them through the
        head together: a matrix of the vocabulary's height is read, and its gradient written, once for all.
        teacher_hidden_ND, per_token: of the batches' tokens, one batch after the other.

        With ``reduction: sequence`` a token of a response of n tokens weighs 1/n while training.
        """
        per_token = per_token or NO_WEIGHTS
        if self.criterion.per_sequence and self.training:
            weights_N = torch.cat([_shares_N(batch) for batch in batches])
            own_N = per_token.weights_N
            per_token = replace(per_token, weights_N=weights_N if own_N is None else weights_N * own_N)
        targets_N = torch.cat([batch.targets_N for batch in batches])
        hidden_ND, balance = self._hidden(batches)
        total = fused_loss(
            hidden_ND,
            self.student.head(),
            targets_N,
            terms=terms,
            teacher_hidden_ND=teacher_hidden_ND if terms.kd else None,
            teacher_head=self._teacher_head() if terms.kd else None,
            per_token=per_token,
            matmul_dtype=self.matmul_dtype,
            chunk=self.chunk,
            on_halved=self._go_on_with,
            scale=scale,
        )
        if balance is not None:
            total = total + balance * (self.router_aux * scale)
        return total, torch.tensor(targets_N.shape[0], device=total.device)

    def _hidden(self, batches: SequenceOf[Batch]) -> tuple[Tensor, Tensor | None]:
        """Return the student's states, and in training the routers' auxiliary loss where it counts.

        That is a mean over a batch; here it is weighed by what the batch adds to the step's count, so that over a step it is
        a mean again.
        """
        if not (self.router_aux and self.training):
            return joined([self.student.hidden(batch, for_backward=True) for batch in batches]), None
        found = [self.student.hidden_and_router_loss(batch) for batch in batches]
        weights = [batch.size if self.criterion.per_sequence else batch.tokens for batch in batches]
        balance = sum(loss * weight for (_, loss), weight in zip(found, weights, strict=True))
        return joined([hidden_ND for hidden_ND, _ in found]), balance

    @torch.no_grad()
    def read(self, batches: SequenceOf[Batch], teacher_hidden_ND: Tensor | None) -> TokenLogProbs:
        """What the models that the criterion looks at say of the batches' own tokens, without a graph."""
        log_p_N = log_q_N = None
        targets_N = torch.cat([batch.targets_N for batch in batches])
        if "teacher" in self.criterion.looks_at:
            log_p_N = target_log_probs(teacher_hidden_ND, self._teacher_head(), targets_N, chunk=self.chunk)
        if "student" in self.criterion.looks_at:
            log_q_N = target_log_probs(
                joined([self.student.hidden(batch) for batch in batches]),
                self.student.head(),
                targets_N,
                matmul_dtype=self.matmul_dtype,
                chunk=self.chunk,
            )
        return TokenLogProbs(log_p_N, log_q_N)

    def _go_on_with(self, tokens: int) -> None:
        self.chunk = tokens
        self.say(
            Note(f"out of memory in the loss: going on with {tokens} tokens at once, slower and with the same result")
        )


def _shares_N(batch: Batch) -> Tensor:
    """For each token 1/n, of the n tokens of its response."""
    lengths_B = torch.bincount(batch.rows_N, minlength=batch.size)
    return 1.0 / lengths_B[batch.rows_N]


def joined(parts: list[Tensor]) -> Tensor:
    """One after the other. A single one as it is: where a model gives logits of its own it is large."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
