"""Pipelines: a recipe of stages, each a verb's own recipe, with defaults that all share.

    defaults:                                   # sections of a recipe, for every stage
      data: {source: dolly}
    stages:                                     # run in this order
      teacher: {verb: sft, student: {path: gpt2-xl}, train: {lr: 5e-5}}
      distill: {verb: distill, recipe: dolly-gpt2, teacher: {path: stage:teacher}, student: {path: gpt2}}
      eval: {verb: eval, models: [stage:distill]}

``stage:NAME`` stands for what an earlier stage makes: a model directory (sft, distill) or rows (generate). Precedence,
weakest first: schema < method preset < the stage's ``recipe`` < defaults < the stage itself; ``--set defaults.…`` and
``--set stages.NAME.…`` are each just above what they change.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from distillm_cli.config import merging, yaml_io
from distillm_cli.config.explain import choices, described, leaves, shown, takes_texts_only
from distillm_cli.config.fields import Name, Positive, Section
from distillm_cli.config.load import Resolved, locate, settle, shipped
from distillm_cli.config.merging import Given, Problems, Rank
from distillm_cli.config.ownership import has, value_of
from distillm_cli.config.schema import Recipe
from distillm_cli.config.student_spec import STAGE_PREFIX
from distillm_cli.errors import RecipeError, UsageError

Verb = Literal["sft", "generate", "distill", "eval"]
PREFIX = STAGE_PREFIX
MODEL, ROWS = "a model", "rows"
MAKES: dict[str, str | None] = {"sft": MODEL, "generate": ROWS, "distill": MODEL, "eval": None}

# The sections of a recipe in which each verb finds its inputs.
_READS = {
    "sft": ("teacher", "student", "data"),
    "generate": ("data",),
    "distill": ("teacher", "student", "data"),
    "eval": ("data", "eval"),
}
# Texts that name no input: they are names of other things, or places that are written to.
_NO_INPUTS = (
    "method", "teacher.cache_dir", "teacher.revision", "student.revision", "train.device", "data.tasks",
    "data.columns.prompt", "data.columns.input", "data.columns.response",
)  # fmt: skip


class Training(Section):
    """Keys of an sft or distill stage beside the sections of a recipe."""

    verb: Verb
    recipe: Name | None = Field(None, description="Recipe that the stage starts from, shipped or a file.")


class Generating(Training):
    """Keys of a generate stage: the prompts are those of its ``data``."""

    model: Name
    split: Literal["train", "valid", "test"] = "train"
    limit: Positive | None = Field(None, description="Use the first prompts only. Unset: data.limit.")
    n: Positive = Field(1, description="Responses per prompt.")


class Scoring(Training):
    """Keys of an eval stage."""

    models: tuple[Name, ...] = Field(min_length=1, description="Models to score.")


STAGE_KEYS: dict[str, type[Training]] = {"sft": Training, "generate": Generating, "distill": Training, "eval": Scoring}


@dataclass(frozen=True)
class Stage:
    """One stage. own: its keys beside a recipe's. resolved: its recipe; ``stage:NAME`` still stands where it was written.

    origins: of ``own``, as ``Resolved.origin``. reads: the stages whose outputs it takes, in order.
    """

    name: str
    own: Training
    resolved: Resolved
    origins: Mapping[str, str]
    reads: tuple[str, ...]

    @property
    def verb(self) -> str:
        return self.own.verb


@dataclass(frozen=True)
class Pipeline:
    """A pipeline of which everything that can be checked without its inputs has been."""

    name: str
    stages: tuple[Stage, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(stage.name for stage in self.stages)

    def __getitem__(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)


def is_pipeline(recipe: str | Path) -> bool:
    """Whether a shipped name or a path is a recipe of stages. Raises RecipeError where there is no such file."""
    path = locate(recipe)
    return merging.has_stages(merging.document(path, str(recipe)))


def load_pipeline(recipe: str | Path, sets: Iterable[str] = ()) -> Pipeline:
    """A shipped name or a path, and ``--set`` texts → the pipeline. Raises RecipeError, UsageError."""
    path = locate(recipe)
    label = path.name if recipe == path.stem else str(recipe)
    return _Reader(path, label, str(recipe)).read(list(sets))


class _Reader:
    """One reading of a pipeline file."""

    def __init__(self, path: Path, label: str, typed: str):
        self.path, self.label, self.typed, self.problems = path, label, typed, Problems()

    def read(self, sets: list[str]) -> Pipeline:
        node = merging.document(self.path, self.label)
        parts = {name: (key, value) for name, key, value in yaml_io.pairs(node, self.label)}
        if "stages" not in parts:
            verb = "sft" if "sft" in parts.get("method", (None, yaml.ScalarNode("", "")))[1].value else "distill"
            raise RecipeError(f"{self.label}: has no stages", hint=f"try `distillm {verb} --recipe {self.typed}`")
        for name, (key, _) in parts.items():
            if name not in ("defaults", "stages"):
                where = f"{yaml_io.at(self.label, yaml_io.line_of(key))}: {name}"
                hint = f"did you mean defaults.{name}?" if name in Recipe.model_fields else None
                raise RecipeError(f"{where}: no such key", where="a pipeline has defaults and stages", hint=hint)
        stages = self._mapping(*parts["stages"], "stages", "one mapping for each stage")
        typed_shared, typed = _sorted_sets(sets, list(stages))
        shared: dict[str, Given] = {}
        if "defaults" in parts:
            whole = self._mapping(*parts["defaults"], "defaults", "sections of a recipe", raw=True)
            shared = merging.from_mapping(whole, self.path, self.label, self.problems, merging.SHARED, at="defaults.")
        typed_values = merging.from_sets(typed_shared, self.problems, "defaults.", merging.SHARED_SET)
        for given in (shared, typed_values):
            if "method" in given:
                what = f"{given['method'].place}: a method is of one stage"
                raise RecipeError(what, hint="set it in the stages that it is for")
        made = [self._stage(name, *stages[name], [shared, typed_values], typed[name]) for name in stages]
        if self.problems:
            raise self.problems.first()
        found = [stage for stage in made if stage is not None]
        return Pipeline(self.path.stem, tuple(self._linked(found)))

    def _mapping(self, key: yaml.Node, value: yaml.Node, what: str, expected: str, *, raw: bool = False) -> Any:
        place = f"{yaml_io.at(self.label, yaml_io.line_of(key))}: {what}"
        if not isinstance(value, yaml.MappingNode) or not value.value:
            if raw and getattr(value, "value", None) in ("", []):
                return yaml.MappingNode("", [])
            raise RecipeError(f"{place}: no mapping", where=f"expected {expected}")
        if raw:
            return value
        found = {}
        for name, key_node, node in yaml_io.pairs(value, self.label, "stages."):
            line = yaml_io.at(self.label, yaml_io.line_of(key_node))
            if not re.fullmatch(r"[A-Za-z][\w-]*", name):
                raise RecipeError(
                    f"{line}: stages.{name}: not a stage's name",
                    where="expected a letter, then letters, digits, - and _",
                )
            if not isinstance(node, yaml.MappingNode):
                raise RecipeError(f"{line}: stages.{name}: no mapping", where="expected verb: sft and its sections")
            found[name] = (key_node, node)
        return found

    def _stage(
        self, name: str, key: yaml.Node, node: yaml.MappingNode, shared: list[dict[str, Given]], sets: list[str]
    ) -> Stage | None:
        at, line = f"stages.{name}.", yaml_io.line_of(key)
        own, sections = self._split(node, at)
        typed = [text for text in sets if text.partition("=")[0].strip() not in _OWN_KEYS]
        for text in sets:
            field, equals, value = text.partition("=")
            if equals and field.strip() in _OWN_KEYS:
                label = f"--set {at}{field.strip()}"
                read = yaml_io.node_value(yaml_io.compose(value, label), label)
                own[field.strip()] = Given(read, "--set", label, Rank(merging.SET), at)
        head = self._own(own, at, line)
        if head is None:
            return None
        weakest_first = []
        if head.recipe is not None:
            weakest_first.append(self._base(head.recipe, own["recipe"]))
        own_values = merging.from_mapping(sections, self.path, self.label, self.problems, merging.STAGE, at)
        if head.verb != "distill":  # a shared teacher is not one that those stages read, least of all the teacher's own
            shared = [{k: v for k, v in given.items() if not k.startswith("teacher.")} for given in shared]
        weakest_first += [*shared, own_values, merging.from_sets(typed, self.problems, at)]
        resolved = settle(head.verb, weakest_first, self.problems, name)
        if resolved is None:
            return None
        self._complete(resolved.recipe, head, at, line)
        origins = {field: own[field].origin if field in own else "default" for field in type(head).model_fields}
        return Stage(name, head, resolved, origins, ())

    def _split(self, node: yaml.MappingNode, at: str) -> tuple[dict[str, Given], yaml.MappingNode]:
        """A stage's keys beside a recipe's, and the mapping without them."""
        own, rest = {}, []
        for name, key_node, value in yaml_io.pairs(node, self.label, at):
            line = yaml_io.line_of(key_node)
            if name in _OWN_KEYS:
                place = f"{yaml_io.at(self.label, line)}: {at}{name}"
                read = yaml_io.node_value(value, self.label)
                own[name] = Given(read, f"{self.path.name}:{line}", place, Rank(merging.STAGE, line), at)
            else:
                rest.append((key_node, value))
        return own, yaml.MappingNode(node.tag, rest, node.start_mark, node.end_mark)

    def _own(self, own: dict[str, Given], at: str, line: int) -> Training | None:
        """The stage's own keys, typed; None where they are wrong, which ``problems`` then say."""
        place = f"{yaml_io.at(self.label, line)}: {at[:-1]}"
        if "verb" not in own:
            self.problems.add(
                Rank(merging.STAGE, line),
                RecipeError(f"{place}: no verb", where=f"expected verb: {', '.join(STAGE_KEYS)}"),
            )
            return None
        verb = own["verb"]
        kind = STAGE_KEYS.get(verb.value) if isinstance(verb.value, str) else None
        if kind is None:
            close = get_close_matches(str(verb.value), STAGE_KEYS, n=1, cutoff=0.4)
            what = RecipeError(
                f"{verb.place} = {shown(verb.value)}",
                where=f"expected one of {', '.join(STAGE_KEYS)}",
                hint=f"try verb: {close[0]}" if close else None,
            )
            self.problems.add(verb.rank, what)
            return None
        values = {
            name: [v.value] if name == "models" and isinstance(v.value, str) else v.value for name, v in own.items()
        }
        try:
            return kind.model_validate(values)
        except ValidationError as error:
            for detail in error.errors():
                self.problems.add(*_own_problem(detail, kind, own, at, place, line))
        return None

    def _base(self, recipe: str, given: Given) -> dict[str, Given]:
        """The single recipe that a stage starts from: a shipped name, or a path seen from the pipeline's directory."""
        beside = self.path.parent / recipe
        found = recipe if recipe in shipped() or not beside.is_file() else beside
        try:
            path = locate(found)
            return merging.from_recipe(path, path.name, self.problems)
        except RecipeError as error:
            self.problems.add(given.rank, RecipeError(f"{given.place} = {recipe}", where=str(error)))
        return {}

    def _complete(self, recipe: Recipe, head: Training, at: str, line: int) -> None:
        """Whether a training stage names what it trains, and learns from."""
        place, missing = f"{yaml_io.at(self.label, line)}: {at[:-1]}", None
        if head.verb in ("sft", "distill") and recipe.student.path is None:
            missing = ("no model to train", "student.path")
        elif head.verb == "distill" and recipe.teacher.path is None:
            missing = ("no teacher to learn from", "teacher.path")
        if missing:
            what, field = missing
            hint = f"set {field} there, to a path, a hub name or stage:NAME"
            self.problems.add(Rank(merging.STAGE, line), RecipeError(f"{place}: {what}", hint=hint))

    def _linked(self, stages: list[Stage]) -> Iterator[Stage]:
        """The stages with what they read, checked: it exists, comes before, and makes what the field takes."""
        for position, stage in enumerate(stages):
            reads: dict[str, None] = {}
            for key, value in inputs(stage.own, stage.resolved.recipe):
                if not value.startswith(PREFIX):
                    continue
                place, wanted = f"{self.label}: stages.{stage.name}.{key} = {value}", value.removeprefix(PREFIX)
                names = [earlier.name for earlier in stages[:position]]
                if wanted not in names:
                    raise RecipeError(place, where=_why_not(wanted, stages, stage), hint=_nearest(wanted, names))
                maker = next(earlier for earlier in stages if earlier.name == wanted)
                takes = ROWS if key.startswith(("data.", "eval.")) else MODEL
                if MAKES[maker.verb] != takes:
                    makes = MAKES[maker.verb] or "nothing that can be read"
                    raise RecipeError(place, where=f"stage {wanted} ({maker.verb}) makes {makes}, this takes {takes}")
                reads[wanted] = None
            yield Stage(stage.name, stage.own, stage.resolved, stage.origins, tuple(reads))


_OWN_KEYS = {name for kind in STAGE_KEYS.values() for name in kind.model_fields}


def _sorted_sets(sets: list[str], names: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """``--set`` texts by what they change, without that prefix: the defaults, and each stage."""
    shared: list[str] = []
    typed: dict[str, list[str]] = {name: [] for name in names}
    for text in sets:
        key, equals, _ = text.partition("=")
        key = key.strip()
        if not equals:
            expected = "expected stages.NAME.section.key=value or defaults.section.key=value"
            raise UsageError(f"--set {shown(text)}", where=expected)
        first, _, rest = key.partition(".")
        if first == "defaults" and rest:
            shared.append(text.strip().removeprefix("defaults."))
            continue
        name, _, field = rest.partition(".")
        if first == "stages" and field:
            if name not in typed:
                raise UsageError(f"--set {key}: no stage {name}", hint=_nearest(name, names, "stages."))
            typed[name].append(text.strip().removeprefix(f"stages.{name}."))
            continue
        inner = key.partition(".")[2] if first in names else key
        stage = first if first in names else names[0]
        meant = f"stages.{stage}.{inner}" if first in names else f"defaults.{key}"
        raise UsageError(
            f"--set {shown(text)}",
            where="expected defaults.section.key=value or stages.NAME.section.key=value",
            hint=f"did you mean {meant}?" if inner in leaves() or inner in _OWN_KEYS else None,
        )
    return shared, typed


def _own_problem(
    detail: Mapping[str, Any], kind: type[Training], own: Mapping[str, Given], at: str, place: str, line: int
) -> tuple[Rank, RecipeError]:
    name = str(detail["loc"][0])
    if detail["type"] == "missing":
        hint = f"set {name}: stage:NAME, a path or a hub name"
        return Rank(merging.STAGE, line), RecipeError(f"{place}: no {name}", hint=hint)
    given = own[name]
    if name not in kind.model_fields:
        owners = " and ".join(verb for verb, other in STAGE_KEYS.items() if name in other.model_fields)
        return given.rank, RecipeError(f"{given.place}: no such key of {own['verb'].value}", where=f"{owners} has it")
    field = kind.model_fields[name]
    expected = f"expected {described(field.annotation, field.metadata)}"
    return given.rank, RecipeError(f"{given.place} = {shown(given.value)}", where=expected)


def _why_not(wanted: str, stages: list[Stage], stage: Stage) -> str:
    if wanted == stage.name:
        return "a stage cannot read what it makes itself"
    if any(other.name == wanted for other in stages):
        return f"stage {wanted} comes after {stage.name}; stages run in the order in which they stand"
    return f"there is no stage {wanted}"


def _nearest(wanted: str, names: list[str], prefix: str = PREFIX) -> str | None:
    close = get_close_matches(wanted, names, n=1, cutoff=0.5)
    return f"did you mean {prefix}{close[0]}?" if close else None


def values(recipe: Recipe) -> dict[str, Any]:
    """Return every value of a recipe by its dotted key, lists as lists."""
    found = {key: value_of(recipe, key) for key in leaves() if has(recipe, key)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


def inputs(own: Training, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, text) for every text of a stage that may name an input: a path, a name, or ``stage:NAME``."""
    for name in ("model", "models"):
        named = getattr(own, name, None)
        for text in (named,) if isinstance(named, str) else named or ():
            yield name, text
    for key, value in values(recipe).items():
        named = key not in _NO_INPUTS and not choices(key) and takes_texts_only(key)
        if not named or key.partition(".")[0] not in _READS[own.verb]:
            continue
        for text in (value,) if isinstance(value, str) else value or ():
            yield key, text


def placed(stage: Stage, places: Mapping[str, str]) -> tuple[Training, Resolved]:
    """The stage with ``stage:NAME`` replaced by where that stage's output is. places: by stage name."""

    def put(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(PREFIX):
            return places.get(value.removeprefix(PREFIX), value)
        if isinstance(value, list | tuple):
            return type(value)(put(item) for item in value)
        if isinstance(value, dict):
            return {key: put(item) for key, item in value.items()}
        return value

    own, resolved = stage.own, stage.resolved
    recipe = Recipe.model_validate(put(resolved.recipe.model_dump()))
    return type(own).model_validate(put(own.model_dump())), replace(resolved, recipe=recipe)
