"""When to train on which sequences: φ, the replay ratio ρ, and one draw a step. No torch.

Every schedule is one rule. At step t of T draw u ~ U(0, 1); P(t) is the probability of training on student outputs:

    u < P(t)·ρ(t)  a fresh rollout
    u < P(t)       a batch from the replay buffer
    else           a batch of the data set

P is 0 (``off``), 1 (``on``, ``interleaved``), λ (``mixed``, GKD), 1 − the data set's falling share (``annealed``, ImitKD)
or φ (``adaptive``, DistiLLM's Algorithm 1). u is a pure function of (seed, step): every rank draws the same, and a resumed
run draws what the uninterrupted one would have.

Three kinds draw nothing: every step is on the teacher's samples (``teacher``), or on a sample of each of the two for each
prompt (``pairs``), or on rollouts and replay by turns (``rounds``, MiniLLM, as in PPO): some batches of rollouts, the same
ones again from the buffer until each was trained on ``inner_epochs`` times, and the next round.
"""

from __future__ import annotations

import math
import random
from enum import StrEnum

from distillm_cli.config.schema import ScheduleConfig


class Source(StrEnum):
    DATASET = "dataset"
    TEACHER = "teacher"
    ROLLOUT = "rollout"
    REPLAY = "replay"
    PAIR = "teacher+rollout"  # of a step, which then has a part of each


class Scheduler:
    """Draws a source for each step, and moves φ when told a validation loss.

    config: the recipe's ``schedule`` section. steps: T. seed: of the draws. batches: of a round.
    """

    def __init__(self, config: ScheduleConfig, *, steps: int, seed: int, batches: int = 1):
        self.config, self.steps, self.seed, self.batches = config, steps, seed, batches
        self.rises = 0
        self.reference: float | None = None

    @property
    def has_phi(self) -> bool:
        return self.config.kind == "adaptive"

    @property
    def phi(self) -> float:
        """φ, the probability of a student-output batch under ``adaptive``; 0 and meaningless under the others."""
        if not self.has_phi:
            return 0.0
        return min(self.config.phi + self.rises / self.config.levels, 1.0)

    @property
    def trigger(self) -> float | None:
        """Return the validation loss at which φ rises, nats; None before the first one and where φ cannot rise."""
        return None if self.reference is None or self.phi == 1 else self.reference + self.config.epsilon

    @property
    def may_use_student_outputs(self) -> bool:
        return self.config.kind not in ("off", "teacher")

    @property
    def may_use_teacher_samples(self) -> bool:
        return self.config.kind in ("teacher", "pairs")

    @property
    def samples_come_back(self) -> bool:
        """Whether the epochs train on the same samples of the teacher."""
        return self.may_use_teacher_samples and self.config.redraw == "never"

    @property
    def draws_student_ahead(self) -> bool:
        """Whether the student answers the whole epoch's prompts at its beginning."""
        return self.config.kind == "pairs" and self.config.redraw == "epoch"

    @property
    def may_use_rows(self) -> bool:
        """Whether steps are on data set rows' own responses, drawn as such."""
        return self.config.kind in ("off", "mixed", "annealed", "adaptive")

    @property
    def may_replay(self) -> bool:
        """Whether a student output may be trained on more than once."""
        if self.config.kind == "rounds":
            return self.config.inner_epochs > 1
        may = self.may_use_student_outputs and self.config.kind != "pairs"
        return may and (self.config.fresh == "buffer" or self._replay != "none")

    def student_probability(self, step: int) -> float:
        """P(t) for 0 ≤ t < T."""
        progress = step / self.steps
        match self.config.kind:
            case "off" | "teacher":
                return 0.0
            case "on" | "pairs" | "interleaved" | "rounds":
                return 1.0
            case "mixed":
                return self.config.mix
            case "adaptive":
                return self.phi
            case "annealed":
                return 1.0 - self._dataset_share(progress)
        raise AssertionError(self.config.kind)

    def _dataset_share(self, progress: float) -> float:
        rate = self.config.anneal_rate
        match self.config.anneal:
            case "linear":
                return 1.0 - progress
            case "exponential":
                return math.exp(-rate * progress)
            case "sigmoid":  # twice the rate: e^−rate away from 1 and 0 at the ends, as the exponential is at its end
                return 1.0 / (1.0 + math.exp(2 * rate * (progress - 0.5)))
        raise AssertionError(self.config.anneal)

    def fresh_share(self, step: int) -> float:
        """ρ(t): of the student-output batches, the share that is sampled anew."""
        progress = step / self.steps
        return {"none": 1.0, "decreasing": 1.0 - progress, "constant": 0.5, "increasing": progress}[self._replay]

    @property
    def _replay(self) -> str:
        if self.config.replay != "auto":
            return self.config.replay
        return "decreasing" if self.config.kind == "adaptive" else "none"

    def draw(self, step: int, buffered: int) -> Source:
        """The source of step ``step`` (from 0), with ``buffered`` sequences in the replay buffer.

        Replay asked of a buffer that cannot serve it becomes a rollout: one that is not yet full (``warm_up: fill``, the
        official code), or that is empty (``none``, the paper's text).
        """
        if self.may_use_teacher_samples:
            return Source.PAIR if self.config.kind == "pairs" else Source.TEACHER
        if self.config.kind == "rounds":
            is_first_epoch = step % (self.batches * self.config.inner_epochs) < self.batches
            return Source.ROLLOUT if is_first_epoch else Source.REPLAY
        u = random.Random(f"schedule/{self.seed}/{step}").random()
        p_student = self.student_probability(step)
        if u >= p_student:
            return Source.DATASET
        needed = self.config.capacity if self.config.warm_up == "fill" else 1
        if u < p_student * self.fresh_share(step) or buffered < needed:
            return Source.ROLLOUT
        return Source.REPLAY

    def rollout_steps(self, step: int, buffered: int, *, adds: int, count: int) -> list[int]:
        """This step and the next ones, ``count`` in all, that will ask for a rollout if φ stays where it is.

        buffered: sequences in the replay buffer before this step. adds: how many a rollout puts there.
        """
        found = []
        for later in range(step, self.steps):
            if later == step or self.draw(later, buffered) in (Source.ROLLOUT, Source.PAIR):
                found.append(later)
                buffered = min(buffered + adds, self.config.buffer_capacity)
                if len(found) == count:
                    break
        return found

    def observe(self, valid_loss: float) -> bool:
        """Takes a validation loss (nats per token); returns whether φ rose.

        The first one, before training, sets the reference. After that φ rises by 1/levels when
        loss ≥ reference + ε; the reference is the loss at the last rise, or simply the previous one.
        """
        if not self.has_phi:
            return False
        if self.reference is None:
            self.reference = valid_loss
            return False
        due = valid_loss >= self.reference + self.config.epsilon
        if due or self.config.reference == "previous":
            self.reference = valid_loss
        before = self.phi
        self.rises += due
        return self.phi > before

    def state_dict(self) -> dict:
        return {"rises": self.rises, "reference": self.reference}

    def load_state_dict(self, state: dict) -> None:
        self.rises, self.reference = state["rises"], state["reference"]
