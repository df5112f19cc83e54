"""Predict the size of the teacher cache, and choose its location. A run and ``distillm plan`` both use this module.

The cache contains the teacher's hidden states: `CacheWorkload.bytes_per_token` for every response token of

- training rows, if they are trained on more than once or a cache is requested by name (exact);
- rollouts, while they may be replayed (an upper bound: responses of maximum length);
- teacher samples, if every epoch trains on the same ones (exact for samples from a file, else an upper bound);
- validation rows, if a divergence on them selects checkpoints or sets φ (exact).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from distillm_cli.config.schema import Recipe
from distillm_cli.losses import objectives
from distillm_cli.rollouts.scheduler import Scheduler, build_scheduler
from distillm_cli.utils.text import counted, format_count

MEMORY_SHARE = 0.25  # maximum share of the free memory that teacher.cache auto uses


@dataclass(frozen=True)
class CacheSize:
    """Hold the bytes in the cache, by source of the states."""

    rows: int = 0
    rollouts: int = 0
    samples: int = 0
    validation: int = 0

    @property
    def total(self) -> int:
        """Return the bytes of all parts."""
        return self.rows + self.rollouts + self.samples + self.validation

    def in_memory(self, mode: str) -> dict[str, int]:
        """Return the bytes in memory, by part of a plan. States of rows on disk are memory-mapped and not counted."""
        if mode == "off":
            return {}
        rows = 0 if mode == "disk" else self.rows
        return {
            "teacher_states": rows + self.validation,
            "rollout_states": self.rollouts,
            "teacher_sample_states": self.samples,
        }

    def described(self, row_count: int) -> str:
        """Describe the parts: "1.2 MB for 10 rows and at most 3 MB for replayed rollouts"."""
        parts = [f"{format_count(self.rows)}B for {counted(row_count, 'row')}"] if self.rows else []
        if self.rollouts:
            parts.append(f"at most {format_count(self.rollouts)}B for replayed rollouts")
        if self.samples:
            parts.append(f"at most {format_count(self.samples)}B for teacher samples")
        return " and ".join(parts)


@dataclass(frozen=True)
class CacheWorkload:
    """Hold the properties that determine the size of a run's teacher cache.

    bytes_per_token: of one hidden state. rows: training rows, None if they are not known, and row_tokens: their
    response tokens. steps, steps_per_epoch: of the run, None if they are not known. validation_tokens: response
    tokens of all validation rows. sample_tokens: response tokens of existing teacher samples; None: they are sampled
    during the run.
    """

    recipe: Recipe
    bytes_per_token: int
    rows: int | None
    row_tokens: float
    steps: int | None
    steps_per_epoch: int | None
    validation_tokens: int = 0
    sample_tokens: int | None = None

    @property
    def rows_repeat(self) -> bool:
        """Return whether rows' own responses are trained on more than once."""
        return uses_rows(self.recipe) and self._has_second_epoch

    @property
    def rollouts_repeat(self) -> bool:
        """Return whether a rollout may be trained on more than once."""
        return self.recipe.schedule.may_replay

    @property
    def samples_repeat(self) -> bool:
        """Return whether the teacher's states of its own samples are needed more than once."""
        repeats = self._schedule.reuses_teacher_samples and self._has_second_epoch
        return repeats and self.recipe.objective.kd_weight > 0

    @property
    def anything_repeats(self) -> bool:
        """Return whether a cache saves any work."""
        return self.rows_repeat or self.rollouts_repeat or self.samples_repeat

    def size(self, mode: str) -> CacheSize:
        """Return the size of the cache. mode: ``teacher.cache``; auto is memory, for rows that repeat."""
        if mode == "off" or (mode == "auto" and not self.anything_repeats):
            return CacheSize()
        has_rows = self.rows_repeat if mode == "auto" else uses_rows(self.recipe)
        is_measured = self.recipe.train.select == "valid_divergence" or bool(self.recipe.schedule.measures)
        return CacheSize(
            rows=self._bytes(self.row_tokens) if has_rows else 0,
            rollouts=self._bytes(self._rollout_tokens) if self.rollouts_repeat else 0,
            samples=self._bytes(self._sample_tokens) if self.samples_repeat else 0,
            validation=self._bytes(self.validation_tokens) if is_measured else 0,
        )

    def choose(self, free_memory: int | None) -> tuple[str, str]:
        """Return the mode that ``teacher.cache: auto`` chooses without a cache on disk, and the reason for off.

        free_memory: bytes, None if they are not known.
        """
        if not self.anything_repeats:
            return "off", f"not cached: this run {self._reason_to_compute_once()}"
        need = self.size("auto").total
        if free_memory is not None and need > MEMORY_SHARE * free_memory:
            sizes = f"{format_count(need)}B is more than a quarter of the {format_count(free_memory)}B of free memory"
            return "off", f"not cached: {sizes}"
        return "memory", ""

    def _reason_to_compute_once(self) -> str:
        if self.recipe.schedule.uses_teacher_samples and not self.recipe.objective.kd_weight:
            return "needs the teacher only for samples"
        return "trains on every row once" if uses_rows(self.recipe) else "trains on every sample once"

    @property
    def _schedule(self) -> Scheduler:
        return build_scheduler(self.recipe.schedule, steps=1, seed=0, batches=self.recipe.rollout.bulk)

    @property
    def _has_second_epoch(self) -> bool:
        if self.steps is None or self.steps_per_epoch is None:
            return False
        return self.steps > self.steps_per_epoch

    @property
    def _rollout_tokens(self) -> float:
        """Return the response tokens of a full replay buffer, or of all rollouts of the run if they are fewer."""
        train = self.recipe.train
        step_rows = train.batch_size * train.accumulate
        if train.tokens_per_step is not None and self.rows and self.steps_per_epoch:
            step_rows = math.ceil(self.rows / self.steps_per_epoch)
        if self.rows:
            step_rows = min(step_rows, self.rows)
        capacity = self._schedule.capacity(step_rows)
        return min(capacity, (self.steps or math.inf) * step_rows) * self.recipe.rollout.most_new_tokens(1.0)

    @property
    def _sample_tokens(self) -> int:
        if self.sample_tokens is not None:
            return self.sample_tokens
        return (self.rows or 0) * self.recipe.rollout.max_new_tokens

    def _bytes(self, tokens: float) -> int:
        return round(tokens * self.bytes_per_token)


def uses_rows(recipe: Recipe) -> bool:
    """Return whether rows' own responses are trained on, in steps of their own or together with rollouts."""
    return recipe.schedule.uses_rows or objectives.build(recipe.objective).rows_beside
