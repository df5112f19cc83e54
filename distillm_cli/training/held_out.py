"""The held-out rows of a run: means per token over them, batch by batch, in smaller ones where memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, nullcontext

import torch

from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.losses.terms import LossWeights
from distillm_cli.teachers.teacher import Model, Teacher
from distillm_cli.training.events import Listener, Warned
from distillm_cli.types import Sequence, collate
from distillm_cli.utils.exact import where_exact
from distillm_cli.utils.memory import retry_halved


class HeldOut:
    """batches: of the rows; none where nothing is held out. autocast: what the student computes under. teacher: for
    divergences."""

    def __init__(
        self,
        batches: SequenceOf[list[Sequence]],
        student: Model,
        teacher: Teacher | None,
        *,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        listener: Listener,
    ):
        self.batches, self.student, self.teacher = list(batches), student, teacher
        self.device, self.autocast, self.say = device, autocast, listener

    def mean(self, terms: LossWeights, objective: StudentLoss) -> float:
        """Of these terms' losses over all supervised tokens, nats. Another model than the student computes in its own dtype.

        Evaluation mode and gradients are the caller's affair.
        """
        return retry_halved(lambda: self._mean(terms, objective), self._halve)

    def _mean(self, terms: LossWeights, objective: StudentLoss) -> float:
        total = tokens = 0
        for sequences in self.batches:
            batch = collate(sequences).to(self.device)
            teacher_hidden_ND = self.teacher.hidden(batch, sequences) if terms.kd else None
            with self.autocast() if objective.student is self.student else nullcontext():
                part, count = objective([batch], teacher_hidden_ND, terms)
            total, tokens = total + where_exact(part).double(), tokens + where_exact(count)
        return (total / tokens).item()

    def _halve(self) -> bool:
        most = max(len(batch) for batch in self.batches)
        if most == 1:
            return False
        rows = most // 2
        self.batches = [batch[at : at + rows] for batch in self.batches for at in range(0, len(batch), rows)]
        self.say(Warned(f"out of memory with {most} held-out rows at once: going on with {rows}, to the same loss"))
        return True
