"""Define the recipe's ``objective`` section: the loss of a token (docs/methods.md#divergences).

It is a union: the fields of ``ObjectiveConfig``, which every objective has, and the parameters of one divergence, which
are declared and registered together with the divergence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import Field, create_model, model_validator

from distillm_cli import plugins
from distillm_cli.config.fields import Condition, DivergenceConfig, Probability, TaggedUnion, UsedWhen
from distillm_cli.config.schedule import kinds_with

if TYPE_CHECKING:
    from distillm_cli.losses.divergences import DivergenceEntry

DEFAULT = "skl"
TokenShare = Annotated[str, Field(pattern=r"^(entropy|divergence):0?\.[0-9]*[1-9][0-9]*$", examples=["entropy:0.5"])]

_ABOVE_ZERO = Condition("above 0", 1.0, lambda n: isinstance(n, int | float) and n > 0)
_WEIGHTED = ({"objective.kd_weight": _ABOVE_ZERO}, {"objective.policy_gradient": (True,)})
_DIVERGENCE = UsedWhen(*_WEIGHTED, {"train.select": ("valid_divergence",)}, of_method=False)

_NOT_ONE = Condition("other than 1", 2.0, lambda n: isinstance(n, int | float) and n != 1)
_TRAINED = UsedWhen(*_WEIGHTED, of_method=False)
_SOFTENED = UsedWhen({"objective.temperature": _NOT_ONE}, of_method=False)

# Divergences on which by_source has no effect for some sources, since their half is the divergence itself.
_UNCHANGED_ON_ROWS = tuple(name for name, entry in plugins.divergences.items() if entry.is_own_half(0))
_SPLIT = tuple(name for name in _UNCHANGED_ON_ROWS if not plugins.divergences[name].is_own_half(1))
_BY_SOURCE = UsedWhen(
    {"schedule.kind": kinds_with(lambda kind: kind.uses_student_outputs and kind.uses_teacher_samples)},
    {
        "schedule.kind": kinds_with(lambda kind: kind.uses_student_outputs and not kind.uses_teacher_samples),
        "objective.divergence": _SPLIT,
    },
    {"objective.divergence": tuple(name for name in plugins.divergences if name not in _UNCHANGED_ON_ROWS)},
    {"objective.curriculum": ("on",)},
    of_method=False,
)


class ObjectiveConfig(DivergenceConfig):
    """Configure the divergence between next-token distributions, per supervised token (docs/methods.md#divergences).

    ``ObjectiveConfig(divergence="skl", alpha=0.3)`` returns the member with that divergence's parameters.
    """

    divergence: Annotated[str, _DIVERGENCE] = Field(DEFAULT, description="Divergence between teacher p and student q.")
    kd_weight: Probability = Field(
        1.0, description="Weight of the divergence D: (1 − kd_weight)·CE + kd_weight·D. Student outputs have no CE."
    )
    kd_warmup: Annotated[Probability, UsedWhen(*_WEIGHTED, of_method=False)] = Field(
        0.0, description="Fraction of the steps over which the weight of D rises from 0 to kd_weight."
    )
    temperature: Annotated[float, Field(gt=0), _TRAINED] = Field(
        1.0,
        description="T of the divergence in training, between the distributions at logits / T. Validation has T = 1.",
    )
    temperature_scale: Annotated[Literal["squared", "none"], _SOFTENED] = Field(
        "squared",
        description="Factor of the divergence at a temperature. squared: T², so that its gradient has about the size that "
        "it has at T = 1 (Hinton et al.). none: 1.",
    )
    tokens: Annotated[Literal["all"] | TokenShare, _TRAINED] = Field(
        "all",
        description="The tokens of each response that enter the loss in training. entropy:0.5 is the half where the "
        "student's entropy is highest, divergence:0.5 the half with the largest divergence (TIP, arXiv 2604.14084).",
    )
    by_source: Annotated[bool, _BY_SOURCE] = Field(
        False,
        description="Use the forward half of the divergence on data set rows and teacher samples, the reverse half on "
        "student outputs: skl and srkl (DistiLLM-2), the halves of jsd (f-distill). A divergence without "
        "halves is the same on both.",
    )
    curriculum: Literal["off", "on"] = Field(
        "off",
        description="Curriculum of DistiLLM-2, with by_source. on: alpha is chosen per batch, at most as given, and the "
        "weight of the student's half rises from ½ to 1. off: alpha as given, equal weights (the authors' "
        "release).",
    )
    reduction: Literal["token", "sequence"] = Field(
        "token", description="Mean over the response tokens of the step, or per sequence first."
    )
    policy_gradient: bool = Field(
        False,
        description="MiniLLM: train student outputs on D with importance weights and on the policy gradient of later "
        "tokens. kd_weight then applies to the data set rows of row_weight, whose D is kl.",
    )
    ratio_clip: Annotated[float, Field(gt=0, lt=1), UsedWhen({"objective.policy_gradient": (True,)})] = Field(
        0.2, description="ε of policy_gradient. The ratio of student to sampler is clipped to 1 ± ε (PPO)."
    )
    row_weight: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Weight of the data set rows that policy_gradient adds to student outputs, (1 − kd_weight)·CE + "
        "kd_weight·KL(p‖q) per token (MiniLLM's term on plain text). 0: none.",
    )
    input_gradient: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Weight of the distance between the gradients of the cross-entropy of student and teacher by their "
        "inputs (KDIGA, section kdiga). 0: off.",
    )
    hidden: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Weight of the distance between blocks of student and teacher (section hidden). 0: off.",
    )
    router_aux: Literal["auto"] | Annotated[float, Field(ge=0)] = Field(
        "auto",
        description="Weight of the auxiliary loss of the routers of a mixture of experts, for sft too. auto: the "
        "student's router_aux_loss_coef if its config sets output_router_logits, else 0.",
    )

    def __new__(cls, **values: Any) -> ObjectiveConfig:
        """Create the member of the divergence that the values name."""
        return super().__new__(OBJECTIVE.member(values.get("divergence")) if cls is ObjectiveConfig else cls)

    @model_validator(mode="after")
    def _row_weight_needs_policy_gradient(self) -> ObjectiveConfig:
        if self.row_weight and not self.policy_gradient:
            raise ValueError(
                "objective.row_weight needs objective.policy_gradient; try --set objective.policy_gradient=true"
            )
        return self

    @model_validator(mode="after")
    def _policy_gradient_has_no_temperature(self) -> ObjectiveConfig:
        if self.policy_gradient and self.temperature != 1:
            raise ValueError(
                "objective.temperature does not apply to objective.policy_gradient, whose rewards are those of sampling; "
                "try --set objective.temperature=1"
            )
        return self

    @model_validator(mode="after")
    def _selection_needs_a_loss_of_single_tokens(self) -> ObjectiveConfig:
        if self.tokens == "all":
            return self
        entry = plugins.divergences[self.divergence]
        what = f"objective.tokens {self.tokens}"
        if self.policy_gradient:
            raise ValueError(f"{what}: objective.policy_gradient needs all tokens; try --set objective.tokens=all")
        if entry.depends_on_targets:
            raise ValueError(
                f"{what}: objective.divergence {self.divergence} weights easy and hard tokens itself; try "
                "--set objective.tokens=all"
            )
        if self.tokens.startswith("divergence") and self.kd_weight == 0:
            raise ValueError(
                f"{what}: objective.kd_weight is 0, so there is no divergence; try --set objective.tokens=all"
            )
        return self

    @model_validator(mode="after")
    def _curriculum_needs_skewed_halves(self) -> ObjectiveConfig:
        entry = plugins.divergences[self.divergence]
        if self.curriculum == "on" and not (self.by_source and entry.build(self).has_curriculum):
            raise ValueError(
                "objective.curriculum needs skl, by_source and alpha above 0; try --set objective.curriculum=off"
            )
        return self

    @model_validator(mode="after")
    def _one_objective_only(self) -> ObjectiveConfig:
        switches = {"by_source": self.by_source, "policy_gradient": self.policy_gradient}
        chosen = [name for name, is_on in switches.items() if is_on]
        if chosen and plugins.divergences[self.divergence].has_own_objective:
            raise ValueError(
                f"objective.{chosen[0]} cannot be combined with objective.divergence {self.divergence}; "
                f"try --set objective.{chosen[0]}=false"
            )
        if len(chosen) > 1:
            raise ValueError(
                "objective.by_source and objective.policy_gradient are mutually exclusive; "
                "try --set objective.by_source=false"
            )
        return self


def _member(name: str, entry: DivergenceEntry) -> type[ObjectiveConfig]:
    """Create the objective section of one divergence, from the common fields and the divergence's own."""
    own = set() if entry.config is None else set(entry.config.model_fields) - set(DivergenceConfig.model_fields)
    if taken := own & set(ObjectiveConfig.model_fields):
        raise TypeError(f"its parameter {min(taken)} is a key of every objective; give it another name")
    bases = (ObjectiveConfig,) if entry.config is None else (ObjectiveConfig, entry.config)
    tag: Any = Literal[name]
    member = create_model(
        f"{entry.divergence.__name__}Objective",
        __base__=bases,
        __module__=__name__,
        __doc__=entry.divergence.__doc__,
        divergence=(tag, name),
    )
    globals()[member.__name__] = member  # where pickle searches for it
    return cast("type[ObjectiveConfig]", member)


def _members() -> dict[str, type[ObjectiveConfig]]:
    """Create the sections of all divergences. A plug-in's divergence that fails is rejected with a warning."""
    found = {}
    for name, entry in list(plugins.divergences.items()):
        try:
            found[name] = _member(name, entry)
        except Exception as error:
            plugins.divergences.reject(name, error)
    return found


OBJECTIVE = TaggedUnion(tag="divergence", default=DEFAULT, base=ObjectiveConfig, members=_members())
plugins.divergences.close("the schema of recipes")
