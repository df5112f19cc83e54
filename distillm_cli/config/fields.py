"""Define the types that sections share, the base classes of sections, and the conditions under which a field is used."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from distillm_cli import plugins

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
LIMIT = 2**63  # of whole numbers: torch, numpy and pyarrow have no larger ones
Seed = Annotated[int, Field(ge=0, lt=LIMIT)]  # limit of torch's generators
Probability = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Exponent = Annotated[float, Field(ge=-2, le=2)]
Name = Annotated[str, Field(min_length=1)]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]
_URL = re.compile(r"https?://[^\s/?#@]+(/[^\s?#@]*)?")


def checked_url(url: str) -> str:
    """Return the address of a server without slashes at its end. Raises ValueError for anything else.

    It has no user and no parameters: a key is read from the environment, so that no file and no message has it.
    """
    if "@" in url or "?" in url:
        raise ValueError("expected an address without a user, password or parameters; set DISTILLM_SERVER_KEY to a key")
    if _URL.fullmatch(url) is None:
        raise ValueError("expected an address like http://127.0.0.1:8000")
    urlsplit(url).port  # noqa: B018  # raises ValueError for a number that is no port
    return url.rstrip("/")


ServerUrl = Annotated[str, AfterValidator(checked_url), Field(examples=["http://127.0.0.1:8000"])]

# Metrics that select a checkpoint: on held-out rows without generation, or of generated responses.
HeldOutMetric = Literal["valid_loss", "valid_divergence"]


def is_lower_better(figure: str) -> bool:
    """Return whether a figure of a model is better when it is lower."""
    metric = plugins.metrics.get(figure)
    return figure in get_args(HeldOutMetric) or (metric is not None and metric.higher_is_better is False)


class Condition:
    """Describe a set of values too large to list: by a test, a description for messages, and an example to try."""

    def __init__(self, description: str, example: Any, test: Callable[[Any], bool]):
        self.description = description
        self.example = example
        self.test = test

    def __contains__(self, value: Any) -> bool:
        return self.test(value)

    def __iter__(self) -> Iterator[Any]:
        yield self.example


Values = tuple[Any, ...] | Condition


class UsedWhen:
    """State when a run uses a field: the values that other fields must have, by dotted key.

    Several mappings are alternatives. A condition on a field that is itself unused is not met. A value given by hand for
    a field that the run does not use is an error. of_method: whether the field is listed among a method's parameters.
    """

    def __init__(self, *alternatives: Mapping[str, Values], of_method: bool = True):
        self.alternatives = alternatives
        self.of_method = of_method


class Section(BaseModel):
    """Base class of all sections of a recipe: frozen, without unknown keys, infinities and integers beyond 64 bits."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse ``epochs: true``, which pydantic would convert to 1."""
        items = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, bool) for item in items):
            assert info.field_name is not None
            annotation = cls.model_fields[info.field_name].annotation
            union = get_origin(annotation) in (Union, UnionType)
            if bool not in (get_args(annotation) if union else (annotation,)):
                raise ValueError("true and false are not numbers")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _refuse_numbers_over_64_bits(cls, value: Any) -> Any:
        items = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, int) and abs(item) >= LIMIT for item in items):
            raise ValueError("integer too large")
        return value


class DivergenceConfig(Section):
    """Declare the parameters of a divergence, which are keys of a recipe's ``objective`` section.

    A subclass declares them with default, bounds and description, and is registered together with its divergence.
    """

    divergence: str


_Member = TypeVar("_Member", bound=Section, covariant=True)


@dataclass(frozen=True)
class TaggedUnion(Generic[_Member]):
    """Describe a section with one of several sets of fields, selected by the value of its tag.

    tag: name of the selecting field. default: its value if it is not given. base: the fields that all members have,
    including the tag with its description. members: sections by value of the tag.
    """

    tag: str
    default: str
    base: type[_Member]
    members: Mapping[str, type[_Member]]

    def annotation(self) -> Any:
        """Return the type of a field that holds one of the members."""
        members = [Annotated[member, Tag(tag)] for tag, member in self.members.items()]
        return Annotated[Union[tuple(members)], Discriminator(self._tag_of), self]  # noqa: UP007

    def _tag_of(self, value: Any) -> str:
        """Return the tag of a mapping or of a section, or the default if it has none."""
        tag = value.get(self.tag, self.default) if isinstance(value, dict) else getattr(value, self.tag, self.default)
        return str(tag)

    def member(self, tag: Any) -> type[_Member]:
        """Return the section for a value of the tag, or the default section for an unknown value."""
        is_known = isinstance(tag, str) and tag in self.members
        return self.members[tag if is_known else self.default]

    def takes(self, name: str, value: Any) -> bool:
        """Return whether a field takes the value in any member that has it."""
        return any(self._takes(self.members[tag], name, value) for tag in self.fields(name))

    @staticmethod
    def _takes(member: type[Section], name: str, value: Any) -> bool:
        try:
            member.model_validate({name: value})
        except ValidationError as error:
            return all(detail["loc"][:1] != (name,) for detail in error.errors())
        return True

    def names(self) -> list[str]:
        """List the fields of all members: the tag, the fields of single members, the common fields."""
        own = [name for member in self.members.values() for name in member.model_fields]
        common = [name for name in self.base.model_fields if name != self.tag]
        return [self.tag, *dict.fromkeys(name for name in own if name not in self.base.model_fields), *common]

    def fields(self, name: str) -> dict[str, Any]:
        """Return a field's pydantic description in each member that has it, by value of the tag."""
        if name == self.tag:
            return dict.fromkeys(self.members, self.base.model_fields[name])
        return {tag: member.model_fields[name] for tag, member in self.members.items() if name in member.model_fields}
