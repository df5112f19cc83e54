"""Train on prompts whose input embeddings are perturbed against the model, to make it robust.

Adds the cross-entropy of the responses after perturbed prompts (``losses.attacks``), with the weight of the plain
cross-entropy of fine-tuning. The perturbation is a constant of the step. It is searched without dropout.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any, cast

import torch
from torch import Tensor, nn

from distillm_cli.losses.attacks import Attack, find_perturbation, perturbed
from distillm_cli.losses.extra import Extra, MicroRows, StudentPass, step_sum
from distillm_cli.losses.fused import fused_loss
from distillm_cli.losses.objectives import STUDENT_OUTPUTS
from distillm_cli.losses.student_loss import concatenate, sequence_shares
from distillm_cli.losses.weights import CROSS_ENTROPY, TokenWeights
from distillm_cli.utils.modules import eval_mode


class Adversarial(Extra):
    """Add the cross-entropy under attack to a step. per_sequence: the objective's mean is per sequence first."""

    def __init__(self, attack: Attack, *, per_sequence: bool = False):
        super().__init__()
        self.attack = attack
        self.per_sequence = per_sequence
        self._losses: list[Tensor] = []

    def begin_step(self, rows: SequenceOf[MicroRows], step: int) -> list[Any]:
        self._losses = []
        return super().begin_step(rows, step)

    def loss(self, done: StudentPass) -> Tensor | None:
        if done.source in STUDENT_OUTPUTS:  # their tokens are not labels
            return None
        student = done.student
        hidden = []
        for batch in done.batches:
            embedded = student.embed(batch)
            with eval_mode(cast(nn.Module, student)):
                perturbation_BTD = find_perturbation(student, batch, embedded, self.attack)
            hidden.append(student.hidden_of(perturbed(embedded, perturbation_BTD)))
        weights_N = torch.cat([sequence_shares(batch) for batch in done.batches]) if self.per_sequence else None
        loss = fused_loss(
            concatenate(hidden),
            student.head(),
            done.targets_N,
            weights=CROSS_ENTROPY,
            token_weights=TokenWeights(weights_N=weights_N),
            scale=done.scale,
        )
        self._losses.append(loss.detach())
        return loss

    def figures(self) -> dict[str, float]:
        """Return the step's cross-entropy under attack, nats per token."""
        loss = step_sum(self._losses)
        return {} if loss is None else {"adversarial_loss": loss}
