"""Measure the student on validation rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from distillm_cli.config.fields import is_lower_better
from distillm_cli.config.schedule import HELD_OUT_LOSS, OUTPUT_LOSS
from distillm_cli.losses.divergences import KL, ReverseKL
from distillm_cli.losses.objectives import CrossEntropy
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.losses.weights import CROSS_ENTROPY, LossWeights
from distillm_cli.rollouts.sampler import Sampler, sample_together
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.teachers.local import LanguageModel, LocalTeacher
from distillm_cli.training.distributed import world
from distillm_cli.training.events import Listener, Warned
from distillm_cli.training.state import RunInfo
from distillm_cli.types import Sequence, collate, length_groups
from distillm_cli.utils.exact import on_float64_device
from distillm_cli.utils.memory import retry_halved
from distillm_cli.utils.modules import eval_mode


def mean_loss(
    batches: SequenceOf[SequenceOf[Sequence]],
    weights: LossWeights,
    student_loss: StudentLoss,
    run: RunInfo,
    teacher: LocalTeacher | None,
    *,
    autocast: bool = True,
) -> float:
    """Return the mean loss over all supervised tokens, nats. The caller sets evaluation mode and ``no_grad``.

    Each process computes its share of the batches, and all return the same mean.

    autocast: compute in the student's training precision; False computes in the model's own dtype.
    """
    dist = world()

    def own_sums() -> tuple[float, int]:
        total = torch.zeros((), dtype=torch.float64)
        tokens = torch.zeros((), dtype=torch.int64)
        is_sharded = student_loss.sharding.is_on
        for i in dist.share([1 if is_sharded else sum(map(len, sequences)) for sequences in batches]):
            sequences = batches[i]
            batch = collate(sequences).to(run.device)
            teacher_hidden_ND = None
            if teacher is not None and weights.kd:
                teacher_hidden_ND = teacher.hidden(batch, sequences)
            with run.autocast() if autocast else nullcontext():
                part, count = student_loss([batch], teacher_hidden_ND, weights)
            total = total + on_float64_device(part).double()
            tokens = tokens + on_float64_device(count)
        for _ in range(dist.idle_turns(len(batches)) if is_sharded else 0):
            with run.autocast() if autocast else nullcontext():
                student_loss([collate(batches[0][:1]).to(run.device)], None, CROSS_ENTROPY)
        return total.item(), int(tokens.item())

    def together() -> tuple[float, int]:
        with student_loss.sharding.passes():
            return own_sums()

    sums = dist.gather(together)
    if teacher is not None:
        teacher.exchange((), run.device)
    mean = torch.tensor(sum(total for total, _ in sums), dtype=torch.float64) / sum(tokens for _, tokens in sums)
    return mean.item()


class RowProbe:
    """Measure means over a sample of the validation rows.

    rows: the sample. batch_rows: rows of a forward pass, fewer if memory runs out.
    """

    def __init__(self, rows: SequenceOf[Sequence], run: RunInfo, teacher: LocalTeacher, *, batch_rows: int):
        self.rows = rows
        self.run = run
        self.teacher = teacher
        self.batch_rows = batch_rows

    def mean(self, student_loss: StudentLoss, sequences: SequenceOf[Sequence], weights: LossWeights) -> float:
        """Return ``mean_loss`` of these sequences."""

        def attempt() -> float:
            batches = length_groups(sequences, self.batch_rows, self.run.pass_overhead)
            return mean_loss(batches, weights, student_loss, self.run, self.teacher)

        return retry_halved(attempt, self._halve)

    def _halve(self) -> bool:
        if self.batch_rows == 1:
            return False
        self.batch_rows //= 2
        return True


class DivergenceProbe(RowProbe):
    """Measure both KL divergences between teacher and student on a sample of the validation rows."""

    def measure(self, student_loss: StudentLoss) -> dict[str, float | None]:
        """Return the figures by name, means per token in nats; None for an infinite one (of suppressed tokens).

        The caller sets evaluation mode and ``no_grad``.
        """
        divergences = {"kl_teacher_student": KL(), "kl_student_teacher": ReverseKL()}
        means = {
            name: self.mean(student_loss, self.rows, LossWeights(1.0, 0.0, divergence))
            for name, divergence in divergences.items()
        }
        return {name: mean if math.isfinite(mean) else None for name, mean in means.items()}


class ScheduleProbe(RowProbe):
    """Measure, on a sample of the validation rows, the figures that the schedule needs.

    figures: ``ScheduleConfig.measures``. sampler: of student outputs; None if the loss on them is not needed. sampling: the
    context for sampling.
    """

    def __init__(
        self,
        rows: SequenceOf[Sequence],
        run: RunInfo,
        teacher: LocalTeacher,
        *,
        batch_rows: int,
        figures: frozenset[str],
        sampler: Sampler | None,
        sampling: Callable[[], AbstractContextManager[None]],
    ):
        super().__init__(rows, run, teacher, batch_rows=batch_rows)
        self.figures = figures
        self.sampler = sampler
        self.sampling = sampling

    def measure(self, student_loss: StudentLoss, step: int) -> dict[str, float | None]:
        """Return the figures by name, means per token in nats. The caller sets evaluation mode and ``no_grad``."""
        measured: dict[str, float | None] = {}
        progress = step / self.run.steps
        if HELD_OUT_LOSS in self.figures:
            weights = student_loss.criterion.weights(Source.DATASET, progress)
            measured[HELD_OUT_LOSS] = self.mean(student_loss, self.rows, weights)
        if self.sampler is not None:
            with self.sampling():
                outputs = sample_together(self.sampler, self.rows, step)
            weights = student_loss.criterion.weights(Source.ROLLOUT, progress)
            measured[OUTPUT_LOSS] = self.mean(student_loss, outputs, weights)
        return measured


def sample_rows(rows: SequenceOf[Sequence], *, least_rows: int, least_tokens: int) -> list[Sequence]:
    """Return evenly spaced rows, at least so many and with at least so many supervised tokens, if there are."""
    count = min(least_rows, len(rows))
    while True:
        chosen = [rows[i * len(rows) // count] for i in range(count)]
        if count == len(rows) or sum(s.supervised for s in chosen) >= least_tokens:
            return chosen
        count = min(2 * count, len(rows))


class Validator:
    """Compute means per token over the validation rows, batch by batch, in smaller batches if memory runs out.

    batches: validation rows, may be empty. select: the quantity that selects checkpoints. teacher: for a divergence.
    score: returns further figures by name, computed at each validation. at_start: a context in which the student has its
    initial weights; the loss before training is then measured at the first validation, not before the first step. probe:
    measures what the schedule needs. divergences: measures the divergences to the teacher.
    """

    def __init__(
        self,
        batches: SequenceOf[list[Sequence]],
        run: RunInfo,
        *,
        select: str = "last",
        teacher: LocalTeacher | None = None,
        score: Callable[[], dict[str, float | None]] | None = None,
        at_start: Callable[[], AbstractContextManager[None]] | None = None,
        probe: ScheduleProbe | None = None,
        divergences: DivergenceProbe | None = None,
        listener: Listener,
    ):
        self.batches = list(batches)
        self.run = run
        self.select = select
        self.teacher = teacher
        self.score = score
        self.at_start = at_start
        self.probe = probe
        self.divergences = divergences
        self.emit = listener

    def measure(self, student_loss: StudentLoss, step: int) -> tuple[float, dict[str, float | None]]:
        """Return the mean cross-entropy per token, nats, and the further figures by name, after ``step`` steps."""
        with eval_mode(student_loss), torch.no_grad():
            valid_loss = self.mean(CROSS_ENTROPY, student_loss)
            scores = self.score() if self.score else {}
            if self.select == "valid_divergence":
                scores["valid_divergence"] = self.mean(student_loss.criterion.held_out, student_loss)
            if (trained := student_loss.trained_teacher) is not None:
                scores["teacher_loss"] = self.cross_entropy(trained.teacher, student_loss)
            for extra in student_loss.extras.values():
                scores |= world().gather(partial(extra.measure, self.batches, self.run))[0]  # the same in all processes
            if self.divergences is not None:
                scores |= self.divergences.measure(student_loss)
            if self.probe is not None and step > 0:  # the schedule compares with steps taken
                scores |= self.probe.measure(student_loss, step)
        return valid_loss, scores

    def cross_entropy(self, model: LanguageModel, student_loss: StudentLoss) -> float:
        """Return the mean cross-entropy per token of one of a run's models, nats.

        The student computes in its training precision, as does a teacher of which all weights are trained. Another teacher
        computes in its own dtype, as in training.
        """
        trained = student_loss.trained_teacher
        is_trained = model is student_loss.student or (trained is not None and trained.in_training_precision)
        dtype = student_loss.matmul_dtype if is_trained else None
        of_model = StudentLoss(model, CrossEntropy(), matmul_dtype=dtype)
        if model is student_loss.student and student_loss.sharding.is_on:
            of_model = student_loss  # whose passes gather the weights
        of_teacher = model is not student_loss.student
        with eval_mode(of_model), torch.no_grad():
            return self.mean(CROSS_ENTROPY, of_model, autocast=is_trained, of_teacher=of_teacher)

    def is_better(self, value: float, best: float | None) -> bool:
        """Return whether ``value`` of the quantity that selects checkpoints is better than ``best``."""
        if best is None:
            return True
        return value < best if is_lower_better(self.select) else value > best

    def mean(
        self, weights: LossWeights, student_loss: StudentLoss, *, autocast: bool = True, of_teacher: bool = False
    ) -> float:
        """Return ``mean_loss`` over the validation rows, in smaller batches if memory runs out.

        of_teacher: the model is the teacher, which sees its own prompts.
        """

        def attempt() -> float:
            batches = self.batches
            if of_teacher:
                batches = [[s.for_teacher for s in batch] for batch in batches]
            return mean_loss(batches, weights, student_loss, self.run, self.teacher, autocast=autocast)

        return retry_halved(attempt, self._halve)

    def _halve(self) -> bool:
        """Split the batches into halves of the largest; return whether that was possible."""
        largest = max(len(batch) for batch in self.batches)
        if largest == 1:
            return False
        rows = largest // 2
        self.batches = [batch[i : i + rows] for batch in self.batches for i in range(0, len(batch), rows)]
        self.emit(Warned(f"out of memory with {largest} held-out rows per batch: continuing with {rows}, same loss"))
        return True
