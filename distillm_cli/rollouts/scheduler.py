"""Decide which sequences each step trains on: a class per kind of schedule. No torch.

A kind that draws takes u ~ U(0, 1) at step t of T; P(t) is the probability of training on student outputs:

    u < P(t)·ρ(t)  a fresh rollout
    u < P(t)       a batch from the replay buffer
    else           a batch of the data set

u is a pure function of (seed, step): every process draws the same, and a resumed run draws the same as an uninterrupted
one. ρ(t) is the share of fresh rollouts (``schedule.replay``).

To add a kind: write its fields and properties in ``config.schedule``, and a class with ``@register`` here.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, ClassVar, TypeVar

from distillm_cli.config.schedule import (
    HELD_OUT_LOSS,
    OUTPUT_LOSS,
    AdaptiveConfig,
    AnnealedConfig,
    AutoConfig,
    BufferedConfig,
    InterleavedConfig,
    MixedConfig,
    OffConfig,
    OnConfig,
    PairsConfig,
    RoundsConfig,
    ScheduleConfig,
    TeacherSamplesConfig,
)

_MAX_PHI = 0.95  # some steps on rows remain, by which φ is measured
# Of auto, from the map of regimes (LOG.md):
_ENOUGH_NEW = 0.25  # share of new outputs below which φ falls: 0.37 to 0.49 where they pay, 0.02 where they do not
_NEW_AFTER = 4  # batches of fresh outputs from which their share is known between validations too
_MIN_PHI = 0.25  # a smaller share of student outputs gained nothing for its cost
_MIN_EPOCHS = 1  # on rows, before φ rises: until then the loss falls for other reasons than fitted rows


class Source(StrEnum):
    DATASET = "dataset"
    TEACHER = "teacher"
    ROLLOUT = "rollout"
    REPLAY = "replay"
    PAIR = "teacher+rollout"  # a step with a batch of each


class Scheduler(ABC):
    """Draw the source of each step.

    config: the recipe's ``schedule`` section. steps: T. seed: of the draws. batches: rollout batches in a round.
    epoch_steps: steps of one pass over the rows.
    """

    in_rounds: ClassVar[bool] = False  # rollouts are replayed in whole rounds, each in a new order

    def __init__(self, config: ScheduleConfig, *, steps: int, seed: int, batches: int = 1, epoch_steps: int = 1):
        self.config = config
        self.steps = steps
        self.seed = seed
        self.batches = batches
        self.epoch_steps = epoch_steps

    @abstractmethod
    def draw(self, step: int, buffered: int) -> Source:
        """Return the source of step ``step`` (from 0), with ``buffered`` sequences in the replay buffer."""

    @property
    def has_phi(self) -> bool:
        """Return whether the probability of student outputs is φ, which changes during the run."""
        return self.config.has_phi

    @property
    def in_pairs(self) -> bool:
        """Return whether a step trains on samples of both models."""
        return self.config.uses_student_outputs and self.config.uses_teacher_samples

    @property
    def phi(self) -> float:
        """Return the probability of a student-output batch for a schedule with φ; 0 for the others."""
        return 0.0

    @property
    def trigger(self) -> float | None:
        """Return the validation loss at which φ rises, nats; None before the first validation and if φ cannot rise."""
        return None

    @property
    def reuses_teacher_samples(self) -> bool:
        """Return whether all epochs train on the same teacher samples."""
        return self.config.uses_teacher_samples and not self.config.redraws

    @property
    def samples_student_by_epoch(self) -> bool:
        """Return whether the student's outputs for a whole epoch are sampled at its beginning."""
        return self.in_pairs and self.config.redraws

    def capacity(self, step_rows: int) -> int:
        """Return how many sequences the replay buffer holds. step_rows: sequences of a step."""
        return self.config.buffer_capacity

    def rollout_steps(self, step: int, buffered: int, *, adds: int, count: int) -> list[int]:
        """Return this step and the next ones, ``count`` in all, that will need a rollout if φ does not change.

        buffered: number of sequences in the replay buffer before this step. adds: number that a rollout adds.
        """
        capacity = self.capacity(adds)
        steps = []
        for future_step in range(step, self.steps):
            if future_step == step or self.draw(future_step, buffered) in (Source.ROLLOUT, Source.PAIR):
                steps.append(future_step)
                buffered = min(buffered + adds, capacity)
                if len(steps) == count:
                    break
        return steps

    def record(self, source: Source, loss: float, repeats: float | None = None) -> None:  # noqa: B027  most ignore it
        """Process the loss of a step, per token, and its source.

        repeats: share of its fresh student outputs that equal their row's response; None without any.
        """

    def observe(self, valid_loss: float, figures: Mapping[str, float | None]) -> None:  # noqa: B027
        """Process a validation: the cross-entropy, nats per token, and further figures by name. φ may change.

        The figures include those in ``config.measures``.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state that later draws depend on, as JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned. Raises ValueError for the state of another kind."""
        if state:
            raise ValueError(f"the schedule has no state, and the checkpoint has {', '.join(state)}")


_KINDS: dict[tuple[type[ScheduleConfig], str | None], type[Scheduler]] = {}
_Kind = TypeVar("_Kind", bound=type[Scheduler])


def register(kind: type[ScheduleConfig], trigger: str | None = None) -> Callable[[_Kind], _Kind]:
    """Register a class as the schedule of a kind of ``schedule`` section, and of one trigger where it has several."""

    def add(cls: _Kind) -> _Kind:
        _KINDS[kind, trigger] = cls
        return cls

    return add


def build_scheduler(
    config: ScheduleConfig, *, steps: int, seed: int, batches: int = 1, epoch_steps: int = 1
) -> Scheduler:
    """Return the schedule of a recipe's ``schedule`` section. The arguments are those of ``Scheduler``."""
    trigger = config.trigger if isinstance(config, AdaptiveConfig) else None
    kind = _KINDS[type(config), trigger]
    return kind(config, steps=steps, seed=seed, batches=batches, epoch_steps=epoch_steps)


@register(OffConfig)
class OffScheduler(Scheduler):
    """Train on data set rows alone."""

    def draw(self, step: int, buffered: int) -> Source:
        return Source.DATASET


class DrawingScheduler(Scheduler):
    """Draw between data set rows, fresh rollouts and replayed ones."""

    config: BufferedConfig

    @abstractmethod
    def student_probability(self, step: int) -> float:
        """Return P(t) for 0 ≤ t < T."""

    def fresh_share(self, step: int) -> float:
        """Return ρ(t), the share of fresh rollouts among student-output batches."""
        progress = step / self.steps
        return {"none": 1.0, "decreasing": 1.0 - progress, "constant": 0.5, "increasing": progress}[
            self.config.replay_course
        ]

    def draw(self, step: int, buffered: int) -> Source:
        """Draw the source of a step.

        A replay becomes a rollout while the buffer is not full (``warm_up: fill``, the official code) or empty
        (``warm_up: none``, the paper's text).
        """
        u = random.Random(f"schedule/{self.seed}/{step}").random()
        p_student = self.student_probability(step)
        if u >= p_student:
            return Source.DATASET
        needed = self.config.capacity if self.config.warm_up == "fill" else 1
        if u < p_student * self.fresh_share(step) or buffered < needed:
            return Source.ROLLOUT
        return Source.REPLAY


@register(OnConfig)
class OnScheduler(DrawingScheduler):
    """Train on student outputs at every step."""

    def student_probability(self, step: int) -> float:
        return 1.0


@register(InterleavedConfig)
class InterleavedScheduler(OnScheduler):
    """Train at every step on student drafts that the teacher corrects (speculative KD, arXiv 2410.11325)."""


@register(MixedConfig)
class MixedScheduler(DrawingScheduler):
    """Train on student outputs with a constant probability λ (GKD, arXiv 2306.13649)."""

    config: MixedConfig

    def student_probability(self, step: int) -> float:
        return self.config.mix


@register(AnnealedConfig)
class AnnealedScheduler(DrawingScheduler):
    """Train on data set rows with a share that falls over the run (ImitKD, arXiv 2009.07253)."""

    config: AnnealedConfig

    def student_probability(self, step: int) -> float:
        return 1.0 - self._dataset_share(step / self.steps)

    def _dataset_share(self, progress: float) -> float:
        rate = self.config.anneal_rate
        match self.config.anneal:
            case "linear":
                return 1.0 - progress
            case "exponential":
                return math.exp(-rate * progress)
            case (
                "sigmoid"
            ):  # twice the rate: at the ends it differs from 1 and 0 by e^−rate, like the exponential at its end
                return 1.0 / (1.0 + math.exp(2 * rate * (progress - 0.5)))
        raise AssertionError(self.config.anneal)


class PhiScheduler(DrawingScheduler):
    """Train on student outputs with probability φ, which changes during the run."""

    config: AdaptiveConfig | AutoConfig

    def __init__(self, config: ScheduleConfig, **settings: int):
        super().__init__(config, **settings)
        self._phi = self.config.phi if isinstance(self.config, AdaptiveConfig) else 0.0

    @property
    def phi(self) -> float:
        return self._phi

    def student_probability(self, step: int) -> float:
        return self.phi

    def state_dict(self) -> dict[str, Any]:
        return {"phi": self._phi}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._phi = state["phi"]


@register(AdaptiveConfig, "loss")
class AdaptiveScheduler(PhiScheduler):
    """Raise φ with the validation loss (DistiLLM, arXiv 2402.03898, Algorithm 1)."""

    config: AdaptiveConfig

    def __init__(self, config: ScheduleConfig, **settings: int):
        super().__init__(config, **settings)
        self.rises = 0
        self.reference: float | None = None

    @property
    def phi(self) -> float:
        return min(self.config.phi + self.rises / self.config.levels, 1.0)

    @property
    def trigger(self) -> float | None:
        return None if self.reference is None or self.phi == 1 else self.reference + self.config.epsilon

    def observe(self, valid_loss: float, figures: Mapping[str, float | None]) -> None:
        """Set the reference to the first loss, before training. After that raise φ by 1/levels if loss ≥ reference + ε.

        The reference is the loss at the last rise, or with ``reference: previous`` the previous loss.
        """
        if self.reference is None:
            self.reference = valid_loss
            return
        is_due = valid_loss >= self.reference + self.config.epsilon
        if is_due or self.config.reference == "previous":
            self.reference = valid_loss
        self.rises += is_due

    def state_dict(self) -> dict[str, Any]:
        return {"rises": self.rises, "reference": self.reference}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rises = state["rises"]
        self.reference = state["reference"]


@register(AdaptiveConfig, "gap")
class GapScheduler(PhiScheduler):
    """Set φ to the exposure gap: the share of the loss on student outputs that the held-out rows do not have."""

    def observe(self, valid_loss: float, figures: Mapping[str, float | None]) -> None:
        held_out, outputs = figures.get(HELD_OUT_LOSS), figures.get(OUTPUT_LOSS)
        if held_out is not None and outputs:
            self._phi = min(max(1.0 - held_out / outputs, 0.0), _MAX_PHI)


@register(AutoConfig)
class AutoScheduler(PhiScheduler):
    """Set φ to 1 − c·r̄, with c the cost of a step on student outputs in steps on rows.

    r = L_rows / L_held-out, with L_rows the mean loss of the steps on data set rows since the last validation, each before
    its update. While rows are new to the student, r is 1. It falls as the student fits them, and with it what another step
    on them teaches. r̄ is its mean over the rest of the run if all steps used rows: r falls as e^(−k·steps), with k from the
    steps on rows so far. Student outputs are new sequences for the same prompts, so they are worth their cost if r̄ < 1/c.
    φ is 0 in the first ``_MIN_EPOCHS`` passes over the rows.

    An output that equals its row's response is not new. If fewer than ``_ENOUGH_NEW`` of them are new since the last
    validation with any, φ falls in proportion, at once: few possible answers, such as the names of classes, are soon all
    repeated. In the end, a φ below ``_MIN_PHI`` is 0.
    """

    config: AutoConfig

    def __init__(self, config: ScheduleConfig, **settings: int):
        super().__init__(config, **settings)
        self.steps_done = 0
        self.row_steps = 0
        self.recent_losses = 0.0  # sum and number since the last validation, of the steps on rows
        self.recent_steps = 0
        self.recent_repeats = 0.0  # the same of the shares of repeats, of the steps on fresh outputs
        self.recent_outputs = 0
        self.new_share = 1.0

    @property
    def phi(self) -> float:
        phi = self._phi * min(self.new_share / _ENOUGH_NEW, 1.0)
        return 0.0 if phi < _MIN_PHI else phi

    def record(self, source: Source, loss: float, repeats: float | None = None) -> None:
        self.steps_done += 1
        if source is Source.DATASET:
            self.row_steps += 1
            self.recent_steps += 1
            self.recent_losses += loss
        if repeats is not None:
            self.recent_outputs += 1
            self.recent_repeats += repeats
            if self.recent_outputs >= _NEW_AFTER:
                self.new_share = 1 - self.recent_repeats / self.recent_outputs

    def observe(self, valid_loss: float, figures: Mapping[str, float | None]) -> None:
        held_out = figures.get(HELD_OUT_LOSS)
        if not held_out or not self.recent_steps:
            return
        if self.recent_outputs:
            self.new_share = 1 - self.recent_repeats / self.recent_outputs
        ratio = self.recent_losses / self.recent_steps / held_out
        phi = min(1.0 - self.config.rollout_cost * self._mean_ratio(ratio), _MAX_PHI)
        is_early = self.row_steps < _MIN_EPOCHS * self.epoch_steps
        self._phi = 0.0 if is_early else max(phi, 0.0)
        self.recent_losses = 0.0
        self.recent_steps = 0
        self.recent_repeats = 0.0
        self.recent_outputs = 0

    def _mean_ratio(self, ratio: float) -> float:
        """Return the mean of r over the remaining steps, ∫ r·e^(−k·t) dt / T for t from 0 to T."""
        rate = -math.log(max(ratio, 1e-9)) / self.row_steps
        fall = rate * (self.steps - self.steps_done)
        return ratio * -math.expm1(-fall) / fall if fall > 0 else ratio

    def state_dict(self) -> dict[str, Any]:
        return {
            "phi": self._phi,
            "steps_done": self.steps_done,
            "row_steps": self.row_steps,
            "recent_losses": self.recent_losses,
            "recent_steps": self.recent_steps,
            "recent_repeats": self.recent_repeats,
            "recent_outputs": self.recent_outputs,
            "new_share": self.new_share,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._phi = state["phi"]
        self.steps_done = state["steps_done"]
        self.row_steps = state["row_steps"]
        self.recent_losses = state["recent_losses"]
        self.recent_steps = state["recent_steps"]
        self.recent_repeats = state["recent_repeats"]
        self.recent_outputs = state["recent_outputs"]
        self.new_share = state["new_share"]


@register(AdaptiveConfig, "gain")
class GainScheduler(PhiScheduler):
    """Move φ by 1/levels towards the share of student outputs with which the held-out loss falls faster per cost.

    Between validations φ is one level above and one below its center in turn, so that each source has a share of at least
    1/levels. Of two such periods, the one with the larger relative fall of the held-out loss per cost wins. A step on
    student outputs costs ``rollout_cost``, one on rows 1: measured seconds would make runs irreproducible.
    """

    config: AdaptiveConfig

    def __init__(self, config: ScheduleConfig, **settings: int):
        super().__init__(config, **settings)
        self.cost = 0.0
        self.previous: float | None = None  # held-out loss
        self.rate: float | None = None  # fall per cost of the period with fewer student outputs
        self.has_more = False  # student outputs, in this period

    @property
    def phi(self) -> float:
        level = 1 / self.config.levels
        return min(max(self._phi + (level if self.has_more else -level), 0.0), 1.0)

    def record(self, source: Source, loss: float, repeats: float | None = None) -> None:
        self.cost += 1.0 if source is Source.DATASET else self.config.rollout_cost

    def observe(self, valid_loss: float, figures: Mapping[str, float | None]) -> None:
        held_out = figures.get(HELD_OUT_LOSS)
        if held_out is None:
            return
        level = 1 / self.config.levels
        if self.previous and self.cost:
            rate = (1 - held_out / self.previous) / self.cost
            if self.has_more and self.rate is not None:
                step = level if rate > self.rate else -level
                self._phi = min(max(self._phi + step, level), 1.0 - level)
            self.rate = None if self.has_more else rate
            self.has_more = not self.has_more
        self.previous = held_out
        self.cost = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "phi": self._phi,
            "cost": self.cost,
            "previous": self.previous,
            "rate": self.rate,
            "has_more": self.has_more,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._phi = state["phi"]
        self.cost = state["cost"]
        self.previous = state["previous"]
        self.rate = state["rate"]
        self.has_more = state["has_more"]


@register(TeacherSamplesConfig)
class TeacherScheduler(Scheduler):
    """Train on teacher samples at every step (sequence-level KD, arXiv 1606.07947)."""

    def draw(self, step: int, buffered: int) -> Source:
        return Source.TEACHER


@register(PairsConfig)
class PairsScheduler(TeacherScheduler):
    """Train at every step on a teacher sample and a student sample for each prompt (DistiLLM-2, arXiv 2503.07067)."""

    def draw(self, step: int, buffered: int) -> Source:
        return Source.PAIR


@register(RoundsConfig)
class RoundsScheduler(Scheduler):
    """Alternate between rollouts and replay, as in PPO (MiniLLM, arXiv 2306.08543).

    A round is ``batches`` batches of rollouts, trained on ``inner_epochs`` times before the next round.
    """

    config: RoundsConfig
    in_rounds = True

    def capacity(self, step_rows: int) -> int:
        return self.batches * step_rows

    def draw(self, step: int, buffered: int) -> Source:
        is_first_epoch = step % (self.batches * self.config.inner_epochs) < self.batches
        return Source.ROLLOUT if is_first_epoch else Source.REPLAY
