"""Compute the loss of batches from the student, the teacher's states and the objective's weights.

The student is part of the module and everything goes through ``forward``, so that a wrapper around this module (data
parallel, sharded) can gather or reduce every parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillm_cli.losses.extra import Extra, MicroRows, StudentPass, TeacherPass, TrainedTeacher
from distillm_cli.losses.fused import (
    HeadLike,
    Kernel,
    fused_loss,
    target_log_probs,
    token_agreement,
    token_divergences,
    token_entropies,
)
from distillm_cli.losses.objectives import Objective, TokenLogProbs
from distillm_cli.losses.selection import TokenSelection
from distillm_cli.losses.weights import NO_WEIGHTS, LossWeights, TokenWeights
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.teachers.local import LanguageModel
from distillm_cli.training.events import Listener, Note, silent
from distillm_cli.training.sharding import NOT_SHARDED, Sharding
from distillm_cli.types import Batch

# Of the tokens in a loss: the student's states, the targets, the teacher's states, the weights.
LossTokens = tuple[Tensor, Tensor, Tensor | None, TokenWeights]


class StudentLoss(nn.Module):
    """Combine the student and the objective of its training.

    student: an ``nn.Module`` that is a ``LanguageModel``. teacher_head: needed for any divergence. matmul_dtype: of the
    student's head. router_aux: weight of the auxiliary loss of a mixture of experts' routers, in training. extras: by name,
    what trains beside the objective; at most one of them trains the teacher.
    """

    def __init__(
        self,
        student: LanguageModel,
        criterion: Objective,
        *,
        teacher_head: HeadLike | None = None,
        matmul_dtype: torch.dtype | None = None,
        router_aux: float = 0.0,
        extras: Mapping[str, Extra] | None = None,
    ):
        super().__init__()
        self.student = student
        self.criterion = criterion
        self.matmul_dtype = matmul_dtype
        self.router_aux = router_aux
        self.emit: Listener = silent
        self.chunk: int | None = None  # tokens per chunk of the loss; None until memory runs out
        self.kernel: Kernel | None = None  # see ``kernels.choose_kernel``
        self.sharding: Sharding = NOT_SHARDED  # of the student
        # Gets the states of both models at the tokens of a pass in training. The teacher's are None without a divergence.
        self.observe: Callable[[Tensor, Tensor | None], None] | None = None
        # A function, so that a teacher head that is a Module does not become a submodule that is trained and saved.
        self._teacher_head = lambda: teacher_head
        self.extras: Mapping[str, Extra] = nn.ModuleDict(extras or {})  # type: ignore[assignment]  # it has Modules

    @property
    def teacher_pass(self) -> TeacherPass | None:
        """Return the extra by which ``forward`` computes the teacher's states in training; None if the caller does."""
        return next((extra for extra in self.extras.values() if isinstance(extra, TeacherPass)), None)

    @property
    def trained_teacher(self) -> TrainedTeacher | None:
        """Return the extra that trains the teacher; None if the teacher is frozen."""
        return next((extra for extra in self.extras.values() if isinstance(extra, TrainedTeacher)), None)

    def trained_parts(self) -> list[list[nn.Parameter]]:
        """Return the parameters of the student's side and, if there are any, those of the teacher's side.

        The gradient of each part is clipped by its own norm.
        """
        teachers = [extra for extra in self.extras.values() if extra.trains_teacher]
        on_teacher_side = {id(p): p for extra in teachers for p in extra.parameters() if p.requires_grad}
        students = [p for p in self.parameters() if p.requires_grad and id(p) not in on_teacher_side]
        return [students, list(on_teacher_side.values())] if on_teacher_side else [students]

    def begin_step(self, rows: SequenceOf[MicroRows], step: int) -> list[dict[str, Any]]:
        """Return the draws of the extras for each micro-batch of step ``step`` (from 0), by extra."""
        drawn: list[dict[str, Any]] = [{} for _ in rows]
        for name, extra in self.extras.items():
            for of_micro, value in zip(drawn, extra.begin_step(rows, step), strict=True):
                of_micro[name] = value
        return drawn

    def end_step(self) -> None:
        """Let the extras update their buffers, after the optimizer's step."""
        for extra in self.extras.values():
            extra.end_step()

    def release(self) -> None:
        """Let the extras undo what they have changed in the models."""
        for extra in self.extras.values():
            extra.release()

    def figures(self) -> dict[str, float]:
        """Return additional figures of the step, by name, for the metrics."""
        figures = self.criterion.figures()
        for extra in self.extras.values():
            figures |= extra.figures()
        return figures

    def save_extra_weights(self, directory: Path) -> None:
        """Write the weights of the extras that belong to the student's into a checkpoint's directory."""
        for extra in self.extras.values():
            extra.save_weights(directory)

    def load_extra_weights(self, directory: Path) -> None:
        """Restore what ``save_extra_weights`` wrote."""
        for extra in self.extras.values():
            extra.load_weights(directory)

    def export_extras(self, directory: Path) -> None:
        """Write what the output directory keeps of the extras."""
        for extra in self.extras.values():
            extra.export(directory)

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return the trained state of the extras for a checkpoint, as ``extras.NAME.TENSOR``."""
        return {
            f"extras.{name}.{key}": tensor
            for name, extra in self.extras.items()
            for key, tensor in extra.trained_state().items()
        }

    def load_extra_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what ``extra_tensors`` returned."""
        for name, extra in self.extras.items():
            prefix = f"extras.{name}."
            extra.load_trained_state({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})

    def forward(
        self,
        batches: SequenceOf[Batch],
        teacher_hidden_ND: Tensor | None,
        weights: LossWeights,
        token_weights: TokenWeights | None = None,
        scale: float = 1.0,
        source: Source = Source.DATASET,
        drawn: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (scale · Σ of token losses with its graph, the number of tokens), scalars, over the tokens of all batches.

        Each batch goes through the student's trunk separately, padded to its own length, and all of them go through the
        head together, so that the head's weight is read and its gradient written only once. teacher_hidden_ND,
        token_weights: for the tokens of all batches in order. source, drawn: of the micro-batch, for the extras, which
        add their losses in training.

        With ``reduction: sequence`` a token of a response of n tokens has weight 1/n in training.
        """
        token_weights = token_weights or NO_WEIGHTS
        shares_N = None
        if self.criterion.per_sequence and self.training:
            shares_N = torch.cat([sequence_shares(batch, self.criterion.selection) for batch in batches])
            weights_N = token_weights.weights_N
            token_weights = replace(token_weights, weights_N=shares_N if weights_N is None else shares_N * weights_N)
        extras = self.extras if self.training else {}
        for extra in extras.values():
            weights = extra.student_weights(weights, source)
        if self.training and self.teacher_pass is not None:
            teacher_hidden_ND = self.teacher_pass.hidden(batches)
        hidden_ND, balance = self._hidden(batches)
        if self.training and self.observe is not None:
            self.observe(hidden_ND.detach(), None if teacher_hidden_ND is None else teacher_hidden_ND.detach())
        done = StudentPass(
            student=self.student,
            source=source,
            batches=batches,
            hidden_ND=hidden_ND,
            targets_N=torch.cat([batch.targets_N for batch in batches]),
            teacher_hidden_ND=teacher_hidden_ND,
            weights=weights,
            scale=scale,
            shares_N=shares_N,
        )
        total = torch.zeros((), device=hidden_ND.device)
        if self.criterion.has_loss or not self.training:
            total = self._objective_loss(done, token_weights)
        if balance is not None:
            total = total + balance * (self.router_aux * scale)
        for name, extra in extras.items():
            own = extra.loss(replace(done, drawn=(drawn or {}).get(name)))
            if own is not None:
                # The teacher's loss has its gradient in the sum, but not its value, which is the student's.
                total = total + (own - own.detach() if extra.trains_teacher else own)
        return total, torch.tensor(len(done.targets_N), device=total.device)

    def _objective_loss(self, done: StudentPass, token_weights: TokenWeights) -> Tensor:
        """Return the objective's loss of a micro-batch with its graph, in training over the selected tokens."""
        weights = done.weights
        teacher_hidden_ND = None
        if weights.kd and done.teacher_hidden_ND is not None:
            teacher_hidden_ND = done.teacher_hidden_ND.detach()
        tokens = done.hidden_ND, done.targets_N, teacher_hidden_ND, token_weights
        if self.training and self.criterion.selection is not None:
            tokens = self._selected(self.criterion.selection, done.batches, tokens, weights)
        hidden_ND, targets_N, teacher_hidden_ND, token_weights = tokens
        return fused_loss(
            hidden_ND,
            self.student.head(),
            targets_N,
            weights=weights,
            teacher_hidden_ND=teacher_hidden_ND,
            teacher_head=self._teacher_head() if weights.kd else None,
            token_weights=token_weights,
            matmul_dtype=self.matmul_dtype,
            chunk=self.chunk,
            on_halved=self._remember_chunk,
            scale=done.scale,
            kernel=self.kernel,
        )

    def _hidden(self, batches: SequenceOf[Batch]) -> tuple[Tensor, Tensor | None]:
        """Return the student's states, and in training the routers' auxiliary loss if its weight is not 0.

        The auxiliary loss is a mean over a batch. It is multiplied by the batch's share of the step's count, so that over a
        step it is a mean again.
        """
        if not (self.router_aux and self.training):
            return concatenate([self.student.hidden(batch, for_backward=True) for batch in batches]), None
        found = [self.student.hidden_and_router_loss(batch) for batch in batches]
        counts = [batch.size if self.criterion.per_sequence else batch.tokens for batch in batches]
        losses = [loss * count for (_, loss), count in zip(found, counts, strict=True)]
        balance = sum(losses[1:], start=losses[0])
        return concatenate([hidden_ND for hidden_ND, _ in found]), balance

    def _selected(
        self, selection: TokenSelection, batches: SequenceOf[Batch], tokens: LossTokens, weights: LossWeights
    ) -> LossTokens:
        """Return what the loss needs of the selected tokens, from that of all tokens."""
        hidden_ND, targets_N, teacher_hidden_ND, token_weights = tokens
        head, teacher_head, dtype = self.student.head(), self._teacher_head(), self.matmul_dtype
        if selection.score == "divergence" and weights.kd:
            assert teacher_hidden_ND is not None
            assert teacher_head is not None
            assert weights.divergence is not None
            scores_N = token_divergences(
                hidden_ND,
                head,
                teacher_hidden_ND,
                teacher_head,
                weights.divergence,
                matmul_dtype=dtype,
                chunk=self.chunk,
            )
        else:  # also while the weight of the divergence is still 0
            scores_N = token_entropies(hidden_ND, head, matmul_dtype=dtype, chunk=self.chunk)
        starts = accumulate((batch.size for batch in batches), initial=0)
        rows_N = torch.cat([batch.rows_N + start for batch, start in zip(batches, starts, strict=False)])
        kept = selection.indices(scores_N, rows_N)
        teacher_hidden_KD = None if teacher_hidden_ND is None else teacher_hidden_ND[kept]
        return hidden_ND[kept], targets_N[kept], teacher_hidden_KD, token_weights[kept]

    def entropies(self, hidden_ND: Tensor) -> Tensor:
        """Return the entropy [N] of the student's distribution at each of its states, nats, without a graph."""
        return token_entropies(hidden_ND, self.student.head(), matmul_dtype=self.matmul_dtype, chunk=self.chunk)

    def agreement(self, hidden_ND: Tensor, teacher_hidden_ND: Tensor) -> Tensor:
        """Return the columns [N, 5] of ``token_agreement`` for states of both models."""
        teacher_head = self._teacher_head()
        assert teacher_head is not None
        return token_agreement(
            hidden_ND,
            self.student.head(),
            teacher_hidden_ND,
            teacher_head,
            matmul_dtype=self.matmul_dtype,
            chunk=self.chunk,
        )

    @torch.no_grad()
    def log_probs(
        self, batches: SequenceOf[Batch], teacher_hidden_ND: Tensor | None, models: SequenceOf[str]
    ) -> TokenLogProbs:
        """Return the log-probabilities of the batches' tokens under "teacher" and "student", those of ``models``.

        They have no graph.
        """
        log_p_N = None
        log_q_N = None
        targets_N = torch.cat([batch.targets_N for batch in batches])
        if "teacher" in models:
            teacher_head = self._teacher_head()
            if teacher_hidden_ND is None or teacher_head is None:
                raise ValueError("log-probabilities need the teacher's hidden states and head")
            log_p_N = target_log_probs(teacher_hidden_ND, teacher_head, targets_N, chunk=self.chunk)
        if "student" in models:
            log_q_N = target_log_probs(
                concatenate([self.student.hidden(batch) for batch in batches]),
                self.student.head(),
                targets_N,
                matmul_dtype=self.matmul_dtype,
                chunk=self.chunk,
            )
        return TokenLogProbs(log_p_N, log_q_N)

    def _remember_chunk(self, tokens: int) -> None:
        self.chunk = tokens
        self.emit(
            Note(f"out of memory in the loss: continuing with {tokens} tokens at once, slower and with the same result")
        )


def sequence_shares(batch: Batch, selection: TokenSelection | None = None) -> Tensor:
    """Return for each token 1/n, with n the tokens of its response that enter the loss."""
    lengths_B = torch.bincount(batch.rows_N, minlength=batch.size)
    if selection is not None:
        lengths_B = torch.tensor([selection.kept(n) for n in lengths_B.tolist()], device=lengths_B.device)
    return 1.0 / lengths_B[batch.rows_N]


def concatenate(parts: list[Tensor]) -> Tensor:
    """Concatenate tensors. A single one is not copied, since logits are large."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
