"""Batch + student + teacher → (sum of losses, what to divide it by).

The student lives inside the objective and everything goes through ``forward``, so that a wrapper around this module
(data parallel, sharded) sees every parameter it must gather or reduce.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor, nn

from distillm_cli.config.schema import Objective as Config
from distillm_cli.core import divergences
from distillm_cli.core.events import Listener, Note, silent
from distillm_cli.core.fused import HeadLike, Terms, fused_loss
from distillm_cli.core.scheduler import Source
from distillm_cli.core.teacher import Model
from distillm_cli.sequences import Batch, Sequence

CROSS_ENTROPY = Terms(kd=0.0, ce=1.0)
DIVERGENCE = Terms(kd=1.0, ce=0.0)


class Objective(nn.Module):
    """(1 − kd_weight)·CE + kd_weight·D on data set rows; kd_weight·D on student outputs, whose tokens are no truth.

    student: an ``nn.Module`` with the face of ``Model``. config: the recipe's ``objective`` section, or None for SFT
    (cross-entropy alone). teacher_head: needed for any divergence. matmul_dtype: of the student's head.
    """

    def __init__(
        self,
        student: Model,
        config: Config | None,
        *,
        teacher_head: HeadLike | None = None,
        matmul_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.student = student
        self.config, self.matmul_dtype = config, matmul_dtype
        self.say: Listener = silent
        self.chunk: int | None = None  # most tokens that the loss takes at once; unset until memory runs out
        # Behind a function: a teacher's head that happens to be a Module must not become ours to train or save.
        self._teacher_head = lambda: teacher_head
        self.divergence = None
        if config is not None:
            self.divergence = divergences.build(
                config.divergence, alpha=config.alpha, beta=config.beta, jeffreys_weight=config.jeffreys_weight
            )

    def terms(self, source: Source) -> Terms:
        """What a token of this source costs."""
        if self.config is None:
            return CROSS_ENTROPY
        kd = self.config.kd_weight
        return Terms(kd=kd, ce=1.0 - kd if source is Source.DATASET else 0.0)

    def count(self, sequences: SequenceOf[Sequence]) -> int:
        """What the sum over these sequences is divided by: response tokens, or sequences."""
        if self._per_sequence:
            return len(sequences)
        return sum(len(s.response) for s in sequences)

    @property
    def _per_sequence(self) -> bool:
        return self.config is not None and self.config.reduction == "sequence"

    def forward(self, batch: Batch, teacher_hidden_ND: Tensor | None, terms: Terms) -> tuple[Tensor, Tensor]:
        """(Σ of token losses with its graph, the number of tokens), both scalars.

        With ``reduction: sequence`` a token of a response of n tokens weighs 1/n while training.
        """
        weights_N = None
        if self._per_sequence and self.training:
            lengths_B = torch.bincount(batch.rows_N, minlength=batch.size)
            weights_N = 1.0 / lengths_B[batch.rows_N]
        total = fused_loss(
            self.student.hidden(batch),
            self.student.head(),
            batch.targets_N,
            terms=terms,
            divergence=self.divergence,
            teacher_hidden_ND=teacher_hidden_ND if terms.kd else None,
            teacher_head=self._teacher_head() if terms.kd else None,
            weights_N=weights_N,
            matmul_dtype=self.matmul_dtype,
            chunk=self.chunk,
            on_halved=self._go_on_with,
        )
        return total, torch.tensor(batch.tokens, device=total.device)

    def _go_on_with(self, tokens: int) -> None:
        self.chunk = tokens
        self.say(
            Note(f"out of memory in the loss: going on with {tokens} tokens at once, slower and with the same result")
        )
