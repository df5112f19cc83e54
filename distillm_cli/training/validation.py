"""Measure the student on validation rows."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, nullcontext

import torch

from distillm_cli.config.fields import is_lower_better
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.losses.weights import CROSS_ENTROPY, LossWeights
from distillm_cli.teachers.local import LocalTeacher
from distillm_cli.training.events import Listener, Warned
from distillm_cli.training.state import RunInfo
from distillm_cli.types import Sequence, collate
from distillm_cli.utils.exact import on_float64_device
from distillm_cli.utils.memory import retry_halved
from distillm_cli.utils.modules import eval_mode


class Validator:
    """Compute means per token over the validation rows, batch by batch, in smaller batches where memory runs out.

    batches: of the rows; none where there are none. select: the quantity that selects checkpoints. teacher: for a
    divergence. score: returns further figures by name, computed at each validation. at_start: a context in which the
    student has the weights it began with; the loss before training is then measured at the first validation, so that the
    first step does not wait for it.
    """

    def __init__(
        self,
        batches: SequenceOf[list[Sequence]],
        run: RunInfo,
        *,
        select: str = "last",
        teacher: LocalTeacher | None = None,
        score: Callable[[], dict[str, float]] | None = None,
        at_start: Callable[[], AbstractContextManager[None]] | None = None,
        listener: Listener,
    ):
        self.batches = list(batches)
        self.run = run
        self.select = select
        self.teacher = teacher
        self.score = score
        self.at_start = at_start
        self.emit = listener

    def measure(self, student_loss: StudentLoss) -> tuple[float, dict[str, float]]:
        """Return the mean cross-entropy per token, nats, and the further figures by name."""
        with eval_mode(student_loss), torch.no_grad():
            valid_loss = self.mean(CROSS_ENTROPY, student_loss)
            scores = self.score() if self.score else {}
            if self.select == "valid_divergence":
                scores["valid_divergence"] = self.mean(student_loss.criterion.held_out, student_loss)
        return valid_loss, scores

    def is_better(self, value: float, best: float | None) -> bool:
        """Return whether ``value`` of the selecting quantity is better than the best one so far."""
        if best is None:
            return True
        return value < best if is_lower_better(self.select) else value > best

    def mean(self, weights: LossWeights, student_loss: StudentLoss, *, autocast: bool = True) -> float:
        """Return the mean loss over all supervised tokens, nats. The caller sets evaluation mode and ``no_grad``.

        autocast: compute as the student does in training; False computes in the model's own dtype.
        """
        return retry_halved(lambda: self._mean(weights, student_loss, autocast), self._halve)

    def _mean(self, weights: LossWeights, student_loss: StudentLoss, autocast: bool) -> float:
        total = tokens = 0
        for sequences in self.batches:
            batch = collate(sequences).to(self.run.device)
            teacher_hidden_ND = self.teacher.hidden(batch, sequences) if weights.kd else None
            with self.run.autocast() if autocast else nullcontext():
                part, count = student_loss([batch], teacher_hidden_ND, weights)
            total = total + on_float64_device(part).double()
            tokens = tokens + on_float64_device(count)
        return (total / tokens).item()

    def _halve(self) -> bool:
        most = max(len(batch) for batch in self.batches)
        if most == 1:
            return False
        rows = most // 2
        self.batches = [batch[at : at + rows] for batch in self.batches for at in range(0, len(batch), rows)]
        self.emit(Warned(f"out of memory with {most} held-out rows at once: going on with {rows}, to the same loss"))
        return True
