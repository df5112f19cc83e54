"""What is learned and from which sequences: the sections ``objective`` and ``schedule`` (METHODS A and B)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distillm_cli.config.fields import (
    Beta,
    Condition,
    DivergenceName,
    Exponent,
    Positive,
    Probability,
    ScheduleKind,
    Section,
    UsedWhen,
    of,
    under,
)

_AB = UsedWhen(
    {"objective.divergence": ("ab",)}, {"objective.divergence": ("amid",), "objective.amid_divergence": ("ab",)}
)
_CURVED = UsedWhen({"schedule.kind": ("annealed",), "schedule.anneal": ("exponential", "sigmoid")})
# Schedules with fresh outputs of the student or, at will, earlier ones.
DRAWING = ("on", "mixed", "annealed", "adaptive", "interleaved")
_BUFFERED = under(*DRAWING)
_REPLAYED = (
    {"schedule.replay": ("decreasing", "constant", "increasing")},
    {"schedule.kind": ("adaptive",), "schedule.replay": ("auto",)},
)
_ABOVE_ZERO = Condition("above 0", 1.0, lambda n: isinstance(n, int | float) and n > 0)
_WEIGHED = ({"objective.kd_weight": _ABOVE_ZERO}, {"objective.policy_gradient": (True,)})
_LEARNT = UsedWhen(*_WEIGHED, {"train.select": ("valid_divergence",)}, of_method=False)
_HALVED = UsedWhen(  # one half alone is of no account where it is the divergence as it stands
    {"schedule.kind": ("pairs",)},
    {"schedule.kind": (*DRAWING, "rounds"), "objective.divergence": ("kl", "skl")},
    {"objective.divergence": ("rkl", "srkl", "jsd", "jeffreys")},
    {"objective.curriculum": ("on",)},
    of_method=False,
)


class ObjectiveConfig(Section):
    """The divergence between next-token distributions, per supervised token (METHODS A)."""

    divergence: Annotated[DivergenceName, _LEARNT] = Field("skl", description="p teacher, q student")
    alpha: Annotated[float, Field(ge=0, lt=1), of("skl", "srkl")] = Field(
        0.1, description="skew of skl and srkl: the share of the other distribution mixed in. 0 is kl, rkl"
    )
    beta: Annotated[Probability, of("jsd")] = Field(0.5, description="of jsd: m = βp + (1−β)q")
    jeffreys_weight: Annotated[Probability, of("jeffreys")] = Field(
        0.5, description="λ of jeffreys: 2λ KL(p‖q) + 2(1−λ) KL(q‖p)"
    )
    akl_mu: Annotated[float, Field(gt=0, le=1), of("akl")] = Field(
        0.5, description="μ of akl: the teacher's head is the fewest tokens whose mass reaches it"
    )
    ab_alpha: Annotated[Exponent, _AB] = Field(
        0.2, description="α of ab, the teacher's exponent; (α, β) = (1, 0) is kl, (0, 1) rkl"
    )
    ab_beta: Annotated[Exponent, _AB] = Field(0.7, description="β of ab, the student's exponent")
    amid_a: Annotated[float, Field(ge=-100, le=100), of("amid")] = Field(
        0.5, description="shape of amid's assistant r: −1 the arithmetic mixture, 1 the geometric; larger covers modes"
    )
    amid_lambda: Annotated[float, Field(gt=0, lt=1), of("amid")] = Field(
        0.1, description="λ of amid: the teacher's share in the assistant"
    )
    amid_divergence: Annotated[Literal["kl", "rkl", "ab"], of("amid")] = Field(
        "kl", description="D of amid, between one of the two and the assistant"
    )
    amid_from: Annotated[Literal["teacher", "student"], of("amid")] = Field(
        "teacher", description="amid measures D(p ‖ r) from the teacher, or D(q ‖ r) from the student"
    )
    taid_start: Annotated[float, Field(ge=0, lt=1), of("taid")] = Field(
        0.4, description="t₀ of taid: the teacher's share in the target at the start; it ends at 1"
    )
    taid_rate: Annotated[Probability, of("taid")] = Field(
        5e-4, description="of taid: how far a step may carry t towards 1 beyond the linear course"
    )
    taid_momentum: Annotated[Beta, of("taid")] = Field(
        0.99, description="of taid: how much of the loss's mean relative fall is kept from step to step"
    )
    atkd_easy: Annotated[Probability, of("atkd")] = Field(
        0.2, description="α of atkd: weight of the tokens the teacher is surest of; the others weigh 1−α"
    )
    kd_weight: Probability = Field(1.0, description="(1 − kd_weight)·CE + kd_weight·D; CE never on student outputs")
    kd_warmup: Annotated[Probability, UsedWhen(*_WEIGHED, of_method=False)] = Field(
        0.0, description="share of the steps over which D's weight climbs from 0 to kd_weight: cross-entropy first"
    )
    by_source: Annotated[bool, _HALVED] = Field(
        False,
        description="the forward half of the divergence on data set rows and teacher samples, the reverse half on student "
        "outputs: skl and srkl (DistiLLM-2), the halves of jsd (f-distill); the same on both where it has no halves",
    )
    curriculum: Literal["off", "on"] = Field(
        "off",
        description="DistiLLM-2, with by_source: alpha is per batch, at most as given; the student's half weighs ½ at "
        "first, 1 at the end. off: alpha as given, equal weights (the authors' release)",
    )
    reduction: Literal["token", "sequence"] = Field(
        "token", description="mean over the step's response tokens, or per sequence first"
    )
    policy_gradient: bool = Field(
        False,
        description="MiniLLM: on student outputs D, weighted back to the student's own sampling, and beside it the policy "
        "gradient of what follows a token; kd_weight is then of the rows beside them (row_weight), D of the rows is kl",
    )
    ratio_clip: Annotated[float, Field(gt=0, lt=1), UsedWhen({"objective.policy_gradient": (True,)})] = Field(
        0.2, description="ε of policy_gradient: the ratio of student to sampler counts within 1 ± ε (PPO)"
    )
    row_weight: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="of policy_gradient: weight of the step's data set rows beside the student outputs, "
        "(1 − kd_weight)·CE + kd_weight·KL(p‖q) per token (MiniLLM's term on plain text); 0: none",
    )

    router_aux: Literal["auto"] | Annotated[float, Field(ge=0)] = Field(
        "auto",
        description="weight of the auxiliary loss of the routers of a mixture of experts, for sft too. auto: the student's "
        "router_aux_loss_coef where its config says output_router_logits, else 0",
    )

    @model_validator(mode="after")
    def _rows_stand_beside_the_policy_gradient(self) -> ObjectiveConfig:
        if self.row_weight and not self.policy_gradient:
            raise ValueError(
                "objective.row_weight belongs to objective.policy_gradient; try --set objective.policy_gradient=true"
            )
        return self

    @model_validator(mode="after")
    def _curriculum_is_of_skewed_halves(self) -> ObjectiveConfig:
        if self.curriculum == "on" and not (self.by_source and self.divergence in ("skl", "srkl") and self.alpha > 0):
            raise ValueError(
                "objective.curriculum is of skl by_source, with alpha above 0; try --set objective.curriculum=off"
            )
        whole = {"by_source": self.by_source, "policy_gradient": self.policy_gradient}
        if self.divergence in ("taid", "atkd") and (name := next((n for n, is_on in whole.items() if is_on), None)):
            raise ValueError(
                f"objective.{name} with objective.divergence {self.divergence}, which looks at a step as a whole; "
                f"try --set objective.{name}=false"
            )
        if all(whole.values()):
            raise ValueError(
                "objective.by_source and objective.policy_gradient exclude each other; "
                "try --set objective.by_source=false"
            )
        return self


class ScheduleConfig(Section):
    """Which sequences a step trains on (METHODS B)."""

    kind: ScheduleKind = Field(
        "adaptive",
        description="off: data set rows; on: rollouts; mixed: GKD; annealed: ImitKD; adaptive: DistiLLM; teacher: samples "
        "of the teacher; pairs: of both for each prompt; interleaved: rollouts that the teacher mends (speculative KD); "
        "rounds: rollout.bulk batches of rollouts, trained on inner_epochs times, then the next (MiniLLM)",
    )
    redraw: Annotated[Literal["never", "epoch"], under("teacher", "pairs")] = Field(
        "never",
        description="epoch: the teacher's samples are drawn anew in each epoch, and the student's of a pair at its "
        "beginning; never: the teacher's once, the student's of a pair at every step",
    )
    replay: Annotated[Literal["auto", "none", "decreasing", "constant", "increasing"], _BUFFERED] = Field(
        "auto",
        description="ρ(t), the share of student draws that are fresh: 1−t/T, ½, t/T; none: always fresh. "
        "auto: decreasing for adaptive, else none",
    )
    inner_epochs: Annotated[Positive, under("rounds")] = Field(
        4, description="of rounds: how often a round's rollouts are trained on"
    )
    capacity: Annotated[Positive, UsedWhen(*_REPLAYED, {"schedule.fresh": ("buffer",)})] = Field(
        1000, description="replay buffer, sequences; the oldest leave first"
    )
    epsilon: Annotated[float, under("adaptive")] = Field(
        0.1, description="φ rises when the validation loss reaches its reference + ε, nats per token"
    )
    levels: Annotated[Positive, under("adaptive")] = Field(10, description="N: φ rises by 1/N")
    phi: Annotated[Probability, under("adaptive")] = Field(0.0, description="φ at the start")
    reference: Annotated[Literal["last_rise", "previous"], under("adaptive")] = Field(
        "last_rise",
        description="the loss ε is added to: at the last rise of φ (official code), or the previous one (paper)",
    )
    warm_up: Annotated[Literal["fill", "none"], UsedWhen(*_REPLAYED)] = Field(
        "fill",
        description="fill: until the buffer is full every student draw is fresh (official code); none: the paper",
    )
    fresh: Annotated[Literal["direct", "buffer"], _BUFFERED] = Field(
        "direct",
        description="after a rollout train on it (official code), or on a draw from the buffer it went into (paper)",
    )
    mix: Annotated[Probability, under("mixed")] = Field(0.5, description="λ of mixed: the probability of a rollout")
    anneal: Annotated[Literal["linear", "exponential", "sigmoid"], under("annealed")] = Field(
        "linear", description="how the data set's share falls"
    )
    anneal_rate: Annotated[float, Field(gt=0), _CURVED] = Field(
        5.0, description="exponential: e^(−r·t/T); sigmoid: steepness around the middle"
    )
