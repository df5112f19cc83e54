"""Measure the health of a run's steps: student outputs, agreement of the two models, speed.

The figures come from what a step has anyway: the ids of its student outputs, and the last hidden states of both models that
the loss uses. Entropy and agreement need the heads again, so they are taken of a sample of the step's tokens, and only in
some steps (``train.health_every``). docs/training.md has the definitions.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from distillm_cli.losses.fused import AGREEMENT_FIGURES
from distillm_cli.losses.objectives import STUDENT_OUTPUTS, SourceBatch
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.rollouts.pool import SequencePool
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.training.distributed import world
from distillm_cli.training.recovery import MicroBatch
from distillm_cli.types import Rollout, Sequence
from distillm_cli.utils.exact import on_float64_device

SAMPLE_TOKENS = 128  # of a step, evenly spaced


class StepHealth:
    """Measure each step of a run.

    every: number of steps between two measurements of entropy and agreement, 0 for none. log_steps: steps between two lines
    of metrics.jsonl, so that each measurement is in one. stop_ids: tokens that end the student's outputs.
    """

    def __init__(
        self,
        student_loss: StudentLoss,
        pool: SequencePool,
        *,
        every: int = 0,
        log_steps: int = 1,
        stop_ids: frozenset[int] = frozenset(),
    ):
        self.student_loss = student_loss
        self.pool = pool
        self.every = log_steps * -(-every // log_steps)
        self.log_steps = log_steps
        self.stop_ids = stop_ids
        self._number = 0
        self._sampled_before = (0, 0.0)  # tokens and seconds, until the end of the last step
        self._tokens: dict[MicroBatch, Tensor] = {}
        self._student_sums: list[Tensor] = []
        self._agreement_sums: list[Tensor] = []
        self._counts = [0, 0]  # tokens in the sums

    def begin_attempt(self, number: int, micro_batches: SequenceOf[MicroBatch]) -> None:
        """Select the tokens of the step ``number`` (from 1) to measure.

        Micro-batches have the step's sequences in the same order, however it is split.
        """
        self._number = number
        self.student_loss.observe = None
        self._tokens = {}
        self._student_sums = []
        self._agreement_sums = []
        self._counts = [0, 0]
        if not self.every or not (self._number == self.log_steps or self._number % self.every == 0):
            return
        sizes = [sum(s.supervised for group in micro.groups for s in group) for micro in micro_batches]
        total = sum(sizes)
        chosen = torch.arange(min(SAMPLE_TOKENS, total)) * total // max(min(SAMPLE_TOKENS, total), 1)
        start = 0
        for micro, size in zip(micro_batches, sizes, strict=True):
            self._tokens[micro] = chosen[(chosen >= start) & (chosen < start + size)] - start
            start += size

    def observe(self, micro: MicroBatch) -> None:
        """Measure the selected tokens of this micro-batch in the next pass, which is that of its loss."""
        tokens = self._tokens.get(micro)
        self.student_loss.observe = partial(self._measure, tokens) if tokens is not None and len(tokens) else None

    def _measure(self, tokens: Tensor, hidden_ND: Tensor, teacher_hidden_ND: Tensor | None) -> None:
        self.student_loss.observe = None
        tokens = tokens.to(hidden_ND.device)
        if teacher_hidden_ND is None:
            entropies_N = on_float64_device(self.student_loss.entropies(hidden_ND[tokens]))
            self._student_sums.append(entropies_N.double().sum(0))
            self._counts[0] += len(tokens)
            return
        values_NK = self.student_loss.agreement(hidden_ND[tokens], teacher_hidden_ND[tokens])
        self._agreement_sums.append(on_float64_device(values_NK).double().sum(0))
        self._counts[1] += len(tokens)

    def figures(self, drawn: SequenceOf[SourceBatch], seconds: float) -> dict[str, float]:
        """Return the figures of the step, by name. Every process calls it. drawn: its sequences. seconds: that it took."""
        outputs = [s for batch in drawn if batch.source in STUDENT_OUTPUTS for s in batch.sequences]
        figures = output_figures(outputs, self.stop_ids) if outputs else {}
        ages = [
            self._number - 1 - s.sampled_at
            for batch in drawn
            if batch.source is Source.REPLAY
            for s in batch.sequences
            if isinstance(s, Rollout) and s.sampled_at is not None
        ]
        if ages:
            figures["replay_age"] = sum(ages) / len(ages)
        if self._tokens:
            figures |= self._agreement()
        return figures | self._speeds(sum(s.supervised for batch in drawn for s in batch.sequences), seconds)

    def _agreement(self) -> dict[str, float]:
        """Return the means over the sample of the whole step."""
        parts = world().gather(
            lambda: (
                [sum(column) for column in zip(*(t.tolist() for t in self._agreement_sums), strict=True)],
                sum(t.item() for t in self._student_sums),
                self._counts,
            )
        )
        students = sum(counts[0] for _, _, counts in parts)
        both = sum(counts[1] for _, _, counts in parts)
        figures = {}
        if both:
            sums = [sum(column) for column in zip(*(sums for sums, _, _ in parts if sums), strict=True)]
            figures = {name: value / both for name, value in zip(AGREEMENT_FIGURES, sums, strict=True)}
        if students:
            entropy = sum(part for _, part, _ in parts) + figures.get("student_entropy", 0.0) * both
            figures["student_entropy"] = entropy / (students + both)
        return figures

    def _speeds(self, tokens: int, seconds: float) -> dict[str, float]:
        """Return the tokens per second of training and, if the step sampled, of sampling."""
        tokens_before, seconds_before = self._sampled_before
        self._sampled_before = self.pool.sampled_tokens, self.pool.sampling_seconds
        sampled = self.pool.sampled_tokens - tokens_before
        sampling = self.pool.sampling_seconds - seconds_before
        speeds = {"train_tokens_per_second": tokens / max(seconds - sampling, 1e-9)}
        if sampled:
            speeds["sampling_tokens_per_second"] = sampled / max(sampling, 1e-9)
        return speeds


def output_figures(outputs: SequenceOf[Sequence], stop_ids: frozenset[int]) -> dict[str, float]:
    """Return the figures of a step's student outputs: length, share that the limit cut, and repetition.

    ``rollout_distinct2`` is the number of distinct pairs of adjacent tokens within each output, summed over the outputs and
    divided by the number of pairs: 1 without repetition, near 0 for outputs that loop.
    """
    responses = [s.response.tolist() for s in outputs]
    lengths = [len(ids) for ids in responses]
    figures = {
        "rollout_length": sum(lengths) / len(lengths),
        "rollout_length_p90": float(np.percentile(lengths, 90)),
    }
    if stop_ids:
        figures["rollout_cut"] = sum(not ids or ids[-1] not in stop_ids for ids in responses) / len(responses)
    pairs = sum(max(n - 1, 0) for n in lengths)
    if pairs:
        figures["rollout_distinct2"] = sum(len(set(pairwise(ids))) for ids in responses) / pairs
    return figures
