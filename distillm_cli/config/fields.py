"""What fields are made of: the types that sections share, and the word on when a field is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from distillm_cli import plugins

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
LIMIT = 2**63  # of whole numbers: torch, numpy and pyarrow have no larger ones
Seed = Annotated[int, Field(ge=0, lt=LIMIT)]  # what torch's generators take
Probability = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Exponent = Annotated[float, Field(ge=-2, le=2)]
Name = Annotated[str, Field(min_length=1)]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]
DivergenceName = Literal["kl", "rkl", "skl", "srkl", "jsd", "tvd", "jeffreys", "akl", "ab", "amid", "taid", "atkd"]
ScheduleKind = Literal["off", "on", "mixed", "annealed", "adaptive", "teacher", "pairs", "interleaved", "rounds"]
# Figures by which a checkpoint is selected: on held-out rows without generation, or a metric of generated answers.
HeldOutFigure = Literal["valid_loss", "valid_divergence"]


def is_lower_better(figure: str) -> bool:
    """Return whether a figure of a model is better when it is lower."""
    metric = plugins.metrics.get(figure)
    return figure in get_args(HeldOutFigure) or (metric is not None and not metric.higher_is_better)


class Condition:
    """Values of which there are too many to list: what tells them, what they are called, and one of them to try."""

    def __init__(self, said: str, example: Any, test: Callable[[Any], bool]):
        self.said, self.example, self.test = said, example, test

    def __contains__(self, value: Any) -> bool:
        return self.test(value)

    def __iter__(self) -> Iterator[Any]:
        yield self.example


Values = tuple[Any, ...] | Condition


class UsedWhen:
    """Beside a field that not every run reads: the fields that decide it, by dotted key, and the values they must have.

    Several mappings are several ways: any of them will do. One that is not read itself decides nothing. A value given by
    hand that no way leads to is an error. of_method: whether it is one of the parameters that a method is listed with.
    """

    def __init__(self, *ways: dict[str, Values], of_method: bool = True):
        self.ways, self.of_method = ways, of_method


def of(*divergences: DivergenceName) -> UsedWhen:
    return UsedWhen({"objective.divergence": divergences})


def under(*kinds: ScheduleKind) -> UsedWhen:
    return UsedWhen({"schedule.kind": kinds})


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_truth_value_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic takes True for 1 and True for 1.0; nobody who wrote ``epochs: true`` meant one epoch."""
        items = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, bool) for item in items):
            annotation = cls.model_fields[info.field_name].annotation
            union = get_origin(annotation) in (Union, UnionType)
            if bool not in (get_args(annotation) if union else (annotation,)):
                raise ValueError("true and false are no numbers")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _whole_numbers_fit_64_bits(cls, value: Any) -> Any:
        items = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, int) and abs(item) >= LIMIT for item in items):
            raise ValueError("too large a whole number")
        return value
