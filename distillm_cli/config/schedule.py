"""Define the recipe's ``schedule`` section: which sequences a step trains on (docs/methods.md#sequences).

One class per kind.

Class variables describe the sequences of a kind to the code that depends on them: fields of other sections, the model
that decodes, the content of the teacher cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from distillm_cli.config.fields import Positive, Probability, Section, TaggedUnion, UsedWhen

# Figures of a validation that φ may depend on, nats per token: the training loss on held-out rows, and that on fresh student
# outputs for their prompts.
HELD_OUT_LOSS = "held_out_loss"
OUTPUT_LOSS = "output_loss"

# Kinds whose steps on the student's own outputs, without corrections of the teacher, may replay them from the buffer.
OWN_BUFFERED_KINDS = ("on", "mixed", "annealed", "adaptive", "auto")

_REPLAYED = {"schedule.replay": ("decreasing", "constant", "increasing")}
_AUTO_REPLAY = {"schedule.replay": ("auto",)}
_FROM_BUFFER = {"schedule.fresh": ("buffer",)}
_CAPACITY: int = Field(1000, description="Size of the replay buffer, in sequences. The oldest are removed first.")
_WARM_UP: Literal["fill", "none"] = Field(
    "fill",
    description="Draws of student outputs until the buffer is full. fill: all are fresh (official code). none: no "
    "such phase (paper).",
)
_BY_LOSS = UsedWhen({"schedule.trigger": ("loss",)})
_BY_GAIN = UsedWhen({"schedule.trigger": ("gain",)})
_OWN_REPLAYED = UsedWhen(
    {**_REPLAYED, "schedule.kind": OWN_BUFFERED_KINDS},
    {**_AUTO_REPLAY, "schedule.kind": ("adaptive", "auto")},
)
_ROLLOUT_COST: float = Field(2.0, gt=0, description="Cost of a step on student outputs, in steps on data set rows.")
_IN_LEVELS = UsedWhen({"schedule.trigger": ("loss", "gain")})
_CURVED = UsedWhen({"schedule.anneal": ("exponential", "sigmoid")})


class ScheduleConfig(Section):
    """Select the sequences that a step trains on (docs/methods.md#sequences).

    ``ScheduleConfig(kind="mixed", mix=0.3)`` returns the member of that kind. trains_on: description of the sequences.
    uses_rows: they include data set rows with their own responses. uses_student_outputs, uses_teacher_samples: they
    include sequences that the models generate. drafts: the student drafts and the teacher corrects. has_phi: student outputs
    are used with probability φ, which changes during the run.
    """

    trains_on: ClassVar[str]
    uses_rows: ClassVar[bool] = False
    uses_student_outputs: ClassVar[bool] = False
    uses_teacher_samples: ClassVar[bool] = False
    drafts: ClassVar[bool] = False
    has_phi: ClassVar[bool] = False

    kind: str = Field(
        "adaptive",
        description="Sequences of each step. off: data set rows. on: rollouts. mixed: GKD. annealed: ImitKD. adaptive: "
        "DistiLLM. auto: student outputs once the rows are fitted (ours). teacher: teacher samples. pairs: a sample of both "
        "models for each prompt. interleaved: rollouts that the teacher corrects (speculative KD). rounds: rollout.bulk "
        "batches of rollouts, trained on inner_epochs times, then the next (MiniLLM).",
    )

    def __new__(cls, **values: Any) -> ScheduleConfig:
        """Create the member of the kind that the values name."""
        return super().__new__(SCHEDULE.member(values.get("kind")) if cls is ScheduleConfig else cls)

    @property
    def may_replay(self) -> bool:
        """Return whether a student output may be trained on more than once."""
        return False

    @property
    def weights_replay(self) -> bool:
        """Return whether a replayed output is weighted by how likely it still is under the student."""
        return False

    @property
    def buffer_capacity(self) -> int:
        """Return the largest number of student outputs that are stored for later steps."""
        return 0

    @property
    def trains_from_buffer(self) -> bool:
        """Return whether a step with a fresh rollout trains on a draw from the buffer in place of the rollout."""
        return False

    @property
    def redraws(self) -> bool:
        """Return whether samples that belong to a row are drawn again in each epoch."""
        return False

    @property
    def measures(self) -> frozenset[str]:
        """Return the figures of a validation that φ depends on, besides the validation loss."""
        return frozenset()


class OffConfig(ScheduleConfig):
    """Train every step on data set rows."""

    trains_on = "data set rows"
    uses_rows = True

    kind: Literal["off"] = "off"


class BufferedConfig(ScheduleConfig):
    """Configure a schedule with student outputs that may be replayed from a buffer."""

    uses_student_outputs = True
    auto_replay: ClassVar[str] = "none"

    replay: Literal["auto", "none", "decreasing", "constant", "increasing"] = Field(
        "auto",
        description="ρ(t), the share of student outputs that are fresh: 1−t/T, ½ or t/T. none: all are fresh. auto: "
        "decreasing for adaptive, constant for auto, else none.",
    )
    capacity: Annotated[Positive, UsedWhen(_REPLAYED, _FROM_BUFFER)] = _CAPACITY
    warm_up: Annotated[Literal["fill", "none"], UsedWhen(_REPLAYED)] = _WARM_UP
    fresh: Literal["direct", "buffer"] = Field(
        "direct",
        description="Sequences after a rollout. direct: train on the rollout (official code). buffer: train on a draw "
        "from the buffer that it was added to (paper).",
    )

    freshness: Annotated[bool, _OWN_REPLAYED] = Field(
        False,
        description="Weight a replayed output by min(1, exp(mean(log q_now − log q_then))), with q the student's "
        "probability of its tokens now and when it was sampled (in the spirit of f-OPD, arXiv 2605.17862). Costs a forward "
        "pass.",
    )

    @property
    def replay_course(self) -> str:
        """Return the course of the share of fresh rollouts: ``replay``, with auto replaced by the kind's default."""
        return self.auto_replay if self.replay == "auto" else self.replay

    @property
    def may_replay(self) -> bool:
        return self.fresh == "buffer" or self.replay_course != "none"

    @property
    def weights_replay(self) -> bool:
        return self.freshness

    @property
    def buffer_capacity(self) -> int:
        return self.capacity

    @property
    def trains_from_buffer(self) -> bool:
        return self.fresh == "buffer"


class OnConfig(BufferedConfig):
    """Train every step on student outputs."""

    trains_on = "rollouts"

    kind: Literal["on"] = "on"


class MixedConfig(BufferedConfig):
    """Train a step on student outputs with a fixed probability (GKD)."""

    trains_on = "data set rows or rollouts"
    uses_rows = True

    kind: Literal["mixed"] = "mixed"
    mix: Probability = Field(0.5, description="λ of mixed: probability of a rollout.")


class AnnealedConfig(BufferedConfig):
    """Increase the share of steps on student outputs from 0 to 1 (ImitKD)."""

    trains_on = "data set rows, then rollouts"
    uses_rows = True

    kind: Literal["annealed"] = "annealed"
    anneal: Literal["linear", "exponential", "sigmoid"] = Field(
        "linear", description="Curve by which the share of data set rows falls."
    )
    anneal_rate: Annotated[float, Field(gt=0), _CURVED] = Field(
        5.0, description="Rate r of exponential, e^(−r·t/T), or steepness of sigmoid around the middle."
    )


class _ReplayingConfig(BufferedConfig):
    """Configure a schedule that adapts φ, the share of steps on student outputs, at validations, and replays by default."""

    trains_on = "data set rows, rollouts, replay"
    uses_rows = True
    has_phi = True

    capacity: Annotated[Positive, UsedWhen(_REPLAYED, _AUTO_REPLAY, _FROM_BUFFER)] = _CAPACITY
    warm_up: Annotated[Literal["fill", "none"], UsedWhen(_REPLAYED, _AUTO_REPLAY)] = _WARM_UP


class AdaptiveConfig(_ReplayingConfig):
    """Adapt the share φ of steps on student outputs at each validation (DistiLLM)."""

    auto_replay = "decreasing"

    kind: Literal["adaptive"] = "adaptive"
    phi: Probability = Field(0.0, description="Initial φ of adaptive.")
    trigger: Literal["loss", "gap", "gain"] = Field(
        "loss",
        description="What φ of adaptive follows. loss: it rises when the validation loss has risen (DistiLLM). gap: the "
        "loss on student outputs against that on held-out rows. gain: the fall of the held-out loss per cost of a step, "
        "with more and with fewer student outputs in turn.",
    )
    epsilon: Annotated[float, _BY_LOSS] = Field(
        0.1, description="ε of adaptive, nats per token. φ rises when the validation loss reaches its reference + ε."
    )
    levels: Annotated[Positive, _IN_LEVELS] = Field(10, description="N of adaptive. φ rises, or falls, by 1/N.")
    reference: Annotated[Literal["last_rise", "previous"], _BY_LOSS] = Field(
        "last_rise",
        description="Loss that ε is added to: the loss at the last rise of φ (official code), or the previous one "
        "(paper).",
    )
    rollout_cost: Annotated[float, _BY_GAIN] = _ROLLOUT_COST

    @property
    def measures(self) -> frozenset[str]:
        return {
            "loss": frozenset[str](),
            "gap": frozenset({HELD_OUT_LOSS, OUTPUT_LOSS}),
            "gain": frozenset({HELD_OUT_LOSS}),
        }[self.trigger]


class AutoConfig(_ReplayingConfig):
    """Use student outputs once another step on the rows teaches less than they cost. Not from the paper."""

    auto_replay = "constant"

    kind: Literal["auto"] = "auto"
    rollout_cost: float = _ROLLOUT_COST

    @property
    def measures(self) -> frozenset[str]:
        return frozenset({HELD_OUT_LOSS})


class _RowSampleConfig(ScheduleConfig):
    """Configure a schedule with one sample for each data set row."""

    uses_teacher_samples = True

    redraw: Literal["never", "epoch"] = Field(
        "never",
        description="When samples are redrawn. epoch: in each epoch, those of the teacher and, in pairs, those of "
        "the student. never: teacher samples are drawn once, student samples at every step.",
    )

    @property
    def redraws(self) -> bool:
        return self.redraw == "epoch"


class TeacherSamplesConfig(_RowSampleConfig):
    """Train every step on samples of the teacher (SeqKD)."""

    trains_on = "teacher samples"

    kind: Literal["teacher"] = "teacher"


class PairsConfig(_RowSampleConfig):
    """Train every step on a sample of the teacher and one of the student for each prompt (DistiLLM-2)."""

    trains_on = "teacher and student samples, in pairs"
    uses_student_outputs = True

    kind: Literal["pairs"] = "pairs"


class InterleavedConfig(BufferedConfig):
    """Train every step on drafts of the student that the teacher corrects (speculative KD)."""

    trains_on = "student drafts, corrected by the teacher"
    drafts = True

    kind: Literal["interleaved"] = "interleaved"


class RoundsConfig(ScheduleConfig):
    """Sample rollouts in rounds and train on each round several times (MiniLLM)."""

    trains_on = "rounds of rollouts, each trained on several times"
    uses_student_outputs = True

    kind: Literal["rounds"] = "rounds"
    inner_epochs: Positive = Field(4, description="Number of times that the rollouts of a round are trained on.")

    @property
    def may_replay(self) -> bool:
        return self.inner_epochs > 1


_KINDS = (
    OffConfig, OnConfig, MixedConfig, AnnealedConfig, AdaptiveConfig, AutoConfig,
    TeacherSamplesConfig, PairsConfig, InterleavedConfig, RoundsConfig,
)  # fmt: skip
SCHEDULE = TaggedUnion(
    tag="kind",
    default=ScheduleConfig.model_fields["kind"].default,
    base=ScheduleConfig,
    members={kind.model_fields["kind"].default: kind for kind in _KINDS},
)


def kinds_with(test: Callable[[type[ScheduleConfig]], bool]) -> tuple[str, ...]:
    """Return the kinds of schedules whose class passes a test."""
    return tuple(kind for kind, config in SCHEDULE.members.items() if test(config))


def trains_on_own_outputs(config: type[ScheduleConfig]) -> bool:
    """Return whether student outputs, without the teacher's corrections, are the only generated sequences."""
    return config.uses_student_outputs and not (config.uses_teacher_samples or config.drafts)
