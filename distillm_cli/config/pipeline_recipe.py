"""Read a pipeline: a recipe of stages, each the recipe of one command, with defaults that all stages share.

    defaults:                                   # sections of a recipe, for every stage
      data: {source: dolly}
    stages:                                     # run in this order
      teacher: {verb: sft, student: {path: gpt2-xl}, train: {lr: 5e-5}}
      distill: {verb: distill, recipe: dolly-gpt2, teacher: {path: stage:teacher}, student: {path: gpt2}}
      eval: {verb: eval, models: [stage:distill]}

``stage:NAME`` refers to the output of an earlier stage: a model directory (sft, distill) or rows (generate).
Precedence, weakest first: schema < method preset < the stage's ``recipe`` < defaults < the stage itself. ``--set
defaults.…`` and ``--set stages.NAME.…`` override single values.
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
from distillm_cli.config.explain import choices, describe_type, format_value, leaves, takes_texts_only
from distillm_cli.config.field_usage import has_field, value_of
from distillm_cli.config.fields import Name, Positive, Section, ServerUrl
from distillm_cli.config.load import Resolved, locate, resolve_layers, shipped
from distillm_cli.config.merging import ErrorCollector, GivenValue, Priority
from distillm_cli.config.schema import Recipe
from distillm_cli.config.student_spec import STAGE_PREFIX
from distillm_cli.errors import RecipeError, UsageError

Verb = Literal["sft", "generate", "distill", "eval"]
PREFIX = STAGE_PREFIX
MODEL, ROWS = "a model", "rows"
OUTPUT_OF: dict[str, str | None] = {"sft": MODEL, "generate": ROWS, "distill": MODEL, "eval": None}

# Sections of a recipe that name the inputs of each command.
_INPUT_SECTIONS = {
    "sft": ("teacher", "student", "data"),
    "generate": ("data",),
    "distill": ("teacher", "student", "data"),
    "eval": ("data", "eval"),
}
# Text fields that name no input.
_NOT_INPUTS = (
    "method", "teacher.cache_dir", "teacher.server", "rollout.server", "rollout.server_dir",
    "teacher.revision", "student.revision", "train.device", "data.tasks",
    "data.columns.prompt", "data.columns.input", "data.columns.response",
)  # fmt: skip


class StageConfig(Section):
    """Hold the keys of an sft or distill stage that are not sections of a recipe."""

    verb: Verb
    recipe: Name | None = Field(None, description="Recipe that the stage starts from, shipped or a file.")

    @property
    def model_names(self) -> tuple[str, ...]:
        """Return the models that respond to prompts, none in training."""
        return ()


class RespondingStageConfig(StageConfig):
    """Hold the keys of a stage in which models respond to prompts."""

    server: ServerUrl | None = Field(
        None,
        description="Address of a server that generates, as --server of the command. The model is a directory with its "
        "tokenizer, or a name on the server.",
    )


class GenerateStageConfig(RespondingStageConfig):
    """Hold the keys of a generate stage. Its prompts are those of its ``data`` section."""

    model: Name
    split: Literal["train", "valid", "test"] = "train"
    limit: Positive | None = Field(None, description="Use only the first N prompts. Unset: data.limit.")
    n: Positive = Field(1, description="Number of responses per prompt.")

    @property
    def model_names(self) -> tuple[str, ...]:
        return (self.model,)


class EvalStageConfig(RespondingStageConfig):
    """Hold the keys of an eval stage."""

    models: tuple[Name, ...] = Field(min_length=1, description="Models to score.")

    @property
    def model_names(self) -> tuple[str, ...]:
        return self.models


STAGE_CONFIGS: dict[str, type[StageConfig]] = {
    "sft": StageConfig,
    "generate": GenerateStageConfig,
    "distill": StageConfig,
    "eval": EvalStageConfig,
}


@dataclass(frozen=True)
class Stage:
    """Describe one stage.

    config: its keys that are not sections of a recipe. resolved: its recipe, in which ``stage:NAME`` is not replaced yet.
    origins: for ``config``, like ``Resolved.origin``. depends_on: the stages whose outputs it uses, in order.
    """

    name: str
    config: StageConfig
    resolved: Resolved
    origins: Mapping[str, str]
    depends_on: tuple[str, ...]

    @property
    def verb(self) -> str:
        return self.config.verb


@dataclass(frozen=True)
class Pipeline:
    """Hold the stages of a pipeline. Everything that can be checked without its inputs has been checked."""

    name: str
    stages: tuple[Stage, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(stage.name for stage in self.stages)

    def __getitem__(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)


def is_pipeline(recipe: str | Path) -> bool:
    """Return whether a shipped name or a path is a recipe of stages. Raises RecipeError if there is no such file."""
    path = locate(recipe)
    return merging.has_stages(merging.read_document(path, str(recipe)))


def load_pipeline(recipe: str | Path, sets: Iterable[str] = ()) -> Pipeline:
    """Load a pipeline from a shipped name or a path, with ``--set`` texts. Raises RecipeError or UsageError."""
    path = locate(recipe)
    label = path.name if recipe == path.stem else str(recipe)
    return _PipelineParser(path, label, str(recipe)).read(list(sets))


class _PipelineParser:
    """Parse one pipeline file.

    label: the file's name in messages. argument: the recipe as it was given on the command line.
    """

    def __init__(self, path: Path, label: str, argument: str):
        self.path = path
        self.label = label
        self.argument = argument
        self.problems = ErrorCollector()

    def read(self, sets: list[str]) -> Pipeline:
        node = merging.read_document(self.path, self.label)
        parts = {name: (key, value) for name, key, value in yaml_io.pairs(node, self.label)}
        if "stages" not in parts:
            verb = "sft" if "sft" in parts.get("method", (None, yaml.ScalarNode("", "")))[1].value else "distill"
            raise RecipeError(
                "recipe.no_stages",
                f"{self.label}: has no stages",
                hint=f"try `distillm {verb} --recipe {self.argument}`",
            )
        for name, (key, _) in parts.items():
            if name not in ("defaults", "stages"):
                where = f"{yaml_io.location(self.label, yaml_io.line_of(key))}: {name}"
                hint = f"did you mean defaults.{name}?" if name in Recipe.model_fields else None
                raise RecipeError(
                    "recipe.unknown_field",
                    f"{where}: no such key",
                    where="a pipeline has defaults and stages",
                    hint=hint,
                )
        stages = self._stage_nodes(*parts["stages"])
        shared_sets, typed_sets = _split_sets(sets, list(stages))
        shared: dict[str, GivenValue] = {}
        if "defaults" in parts:
            whole = self._shared_sections(*parts["defaults"])
            shared = merging.from_mapping(
                whole, self.path, self.label, self.problems, merging.SHARED, prefix="defaults."
            )
        typed_values = merging.from_sets(shared_sets, self.problems, "defaults.", merging.SHARED_SET)
        for given in (shared, typed_values):
            if "method" in given:
                what = f"{given['method'].location}: defaults cannot set a method"
                raise RecipeError("recipe.invalid_stage", what, hint="set it in the stages")
        parsed = [self._stage(name, *stages[name], [shared, typed_values], typed_sets[name]) for name in stages]
        if self.problems:
            raise self.problems.first()
        found = [stage for stage in parsed if stage is not None]
        return Pipeline(self.path.stem, tuple(self._with_dependencies(found)))

    def _mapping(self, key: yaml.Node, value: yaml.Node, what: str, expected: str) -> yaml.MappingNode:
        if not isinstance(value, yaml.MappingNode) or not value.value:
            place = f"{yaml_io.location(self.label, yaml_io.line_of(key))}: {what}"
            raise RecipeError("recipe.not_a_mapping", f"{place}: not a mapping", where=f"expected {expected}")
        return value

    def _shared_sections(self, key: yaml.Node, value: yaml.Node) -> yaml.MappingNode:
        """Return the sections under ``defaults``, which may be empty."""
        if getattr(value, "value", None) in ("", []):
            return yaml.MappingNode("", [])
        return self._mapping(key, value, "defaults", "sections of a recipe")

    def _stage_nodes(self, key: yaml.Node, value: yaml.Node) -> dict[str, tuple[yaml.Node, yaml.MappingNode]]:
        """Return the key and the mapping of each stage, by name."""
        whole = self._mapping(key, value, "stages", "one mapping for each stage")
        parsed = {}
        for name, key_node, node in yaml_io.pairs(whole, self.label, "stages."):
            line = yaml_io.location(self.label, yaml_io.line_of(key_node))
            if not re.fullmatch(r"[A-Za-z][\w-]*", name):
                raise RecipeError(
                    "recipe.invalid_stage",
                    f"{line}: stages.{name}: invalid stage name",
                    where="expected a letter, then letters, digits, - and _",
                )
            if not isinstance(node, yaml.MappingNode):
                raise RecipeError(
                    "recipe.not_a_mapping",
                    f"{line}: stages.{name}: not a mapping",
                    where="expected verb: sft and its sections",
                )
            parsed[name] = (key_node, node)
        return parsed

    def _stage(
        self, name: str, key: yaml.Node, node: yaml.MappingNode, shared: list[dict[str, GivenValue]], sets: list[str]
    ) -> Stage | None:
        prefix = f"stages.{name}."
        line = yaml_io.line_of(key)
        stage_keys, recipe_sections = self._split_keys(node, prefix)
        typed_sets = [text for text in sets if text.partition("=")[0].strip() not in _STAGE_KEY_NAMES]
        for text in sets:
            field, equals, value = text.partition("=")
            if equals and field.strip() in _STAGE_KEY_NAMES:
                label = f"--set {prefix}{field.strip()}"
                read = yaml_io.node_value(yaml_io.compose(value, label), label)
                stage_keys[field.strip()] = GivenValue(read, "--set", label, Priority(merging.SET), prefix)
        config = self._stage_config(stage_keys, prefix, line)
        if config is None:
            return None
        weakest_first = []
        if config.recipe is not None:
            weakest_first.append(self._base_recipe(config.recipe, stage_keys["recipe"]))
        own_values = merging.from_mapping(recipe_sections, self.path, self.label, self.problems, merging.STAGE, prefix)
        if config.verb != "distill":  # other stages do not use a shared teacher
            shared = [{k: v for k, v in given.items() if not k.startswith("teacher.")} for given in shared]
        weakest_first += [*shared, own_values, merging.from_sets(typed_sets, self.problems, prefix)]
        resolved = resolve_layers(config.verb, weakest_first, self.problems, name)
        if resolved is None:
            return None
        self._check_models(resolved.recipe, config, prefix, line)
        origins = {
            field: stage_keys[field].origin if field in stage_keys else "default" for field in type(config).model_fields
        }
        return Stage(name, config, resolved, origins, ())

    def _split_keys(self, node: yaml.MappingNode, prefix: str) -> tuple[dict[str, GivenValue], yaml.MappingNode]:
        """Split a stage into its keys that are not sections of a recipe, and the mapping without them."""
        stage_keys, rest = {}, []
        for name, key_node, value in yaml_io.pairs(node, self.label, prefix):
            line = yaml_io.line_of(key_node)
            if name in _STAGE_KEY_NAMES:
                place = f"{yaml_io.location(self.label, line)}: {prefix}{name}"
                read = yaml_io.node_value(value, self.label)
                stage_keys[name] = GivenValue(
                    read, f"{self.path.name}:{line}", place, Priority(merging.STAGE, line), prefix
                )
            else:
                rest.append((key_node, value))
        return stage_keys, yaml.MappingNode(node.tag, rest, node.start_mark, node.end_mark)

    def _stage_config(self, stage_keys: dict[str, GivenValue], prefix: str, line: int) -> StageConfig | None:
        """Validate the stage's own keys. Return None if they are wrong and add the error to ``problems``."""
        place = f"{yaml_io.location(self.label, line)}: {prefix[:-1]}"
        if "verb" not in stage_keys:
            self.problems.add(
                Priority(merging.STAGE, line),
                RecipeError(
                    "recipe.missing_field", f"{place}: no verb", where=f"expected verb: {', '.join(STAGE_CONFIGS)}"
                ),
            )
            return None
        verb = stage_keys["verb"]
        kind = STAGE_CONFIGS.get(verb.value) if isinstance(verb.value, str) else None
        if kind is None:
            close = get_close_matches(str(verb.value), STAGE_CONFIGS, n=1, cutoff=0.4)
            what = RecipeError(
                "recipe.invalid_value",
                f"{verb.location} = {format_value(verb.value)}",
                where=f"expected one of {', '.join(STAGE_CONFIGS)}",
                hint=f"try verb: {close[0]}" if close else None,
            )
            self.problems.add(verb.priority, what)
            return None
        values = {
            name: [v.value] if name == "models" and isinstance(v.value, str) else v.value
            for name, v in stage_keys.items()
        }
        try:
            return kind.model_validate(values)
        except ValidationError as error:
            for detail in error.errors():
                self.problems.add(*_stage_key_problem(detail, kind, stage_keys, prefix, place, line))
        return None

    def _base_recipe(self, recipe: str, given: GivenValue) -> dict[str, GivenValue]:
        """Read the recipe that a stage starts from: a shipped name, or a path relative to the pipeline's directory."""
        relative = self.path.parent / recipe
        source = recipe if recipe in shipped() or not relative.is_file() else relative
        try:
            path = locate(source)
            return merging.from_recipe(path, path.name, self.problems)
        except RecipeError as error:
            self.problems.add(
                given.priority, RecipeError("recipe.invalid_stage", f"{given.location} = {recipe}", where=str(error))
            )
        return {}

    def _check_models(self, recipe: Recipe, config: StageConfig, prefix: str, line: int) -> None:
        """Add a problem if a training stage names no student or no teacher."""
        place = f"{yaml_io.location(self.label, line)}: {prefix[:-1]}"
        missing = None
        if config.verb in ("sft", "distill") and recipe.student.path is None:
            missing = ("no model to train", "student.path")
        elif config.verb == "distill" and recipe.teacher.path is None:
            missing = ("no teacher", "teacher.path")
        if isinstance(config, EvalStageConfig) and config.server is not None and len(config.models) > 1:
            what, hint = f"{place}: server with {len(config.models)} models", "make a stage for each model of a server"
            self.problems.add(Priority(merging.STAGE, line), RecipeError("recipe.invalid_stage", what, hint=hint))
        if missing:
            what, field = missing
            hint = f"set {field} there, to a path, a hub name or stage:NAME"
            self.problems.add(
                Priority(merging.STAGE, line), RecipeError("recipe.invalid_stage", f"{place}: {what}", hint=hint)
            )

    def _with_dependencies(self, stages: list[Stage]) -> Iterator[Stage]:
        """Yield the stages with their dependencies.

        Raises RecipeError if one does not exist, does not come earlier or has the wrong kind of output.
        """
        for position, stage in enumerate(stages):
            depends_on: dict[str, None] = {}
            for key, value in inputs(stage.config, stage.resolved.recipe):
                if not value.startswith(PREFIX):
                    continue
                place, stage_name = f"{self.label}: stages.{stage.name}.{key} = {value}", value.removeprefix(PREFIX)
                names = [other.name for other in stages[:position]]
                if stage_name not in names:
                    raise RecipeError(
                        "recipe.invalid_stage_input",
                        place,
                        where=_why_unavailable(stage_name, stages, stage),
                        hint=_nearest(stage_name, names),
                    )
                producer = next(other for other in stages if other.name == stage_name)
                needed = ROWS if key.startswith(("data.", "eval.")) else MODEL
                if OUTPUT_OF[producer.verb] != needed:
                    produced = OUTPUT_OF[producer.verb] or "no usable output"
                    raise RecipeError(
                        "recipe.invalid_stage_input",
                        place,
                        where=f"stage {stage_name} ({producer.verb}) produces {produced}, not {needed}",
                    )
                depends_on[stage_name] = None
            yield Stage(stage.name, stage.config, stage.resolved, stage.origins, tuple(depends_on))


_STAGE_KEY_NAMES = {name for kind in STAGE_CONFIGS.values() for name in kind.model_fields}


def _split_sets(sets: list[str], names: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Split ``--set`` texts into those for the defaults and those for each stage, without these prefixes."""
    shared: list[str] = []
    typed_sets: dict[str, list[str]] = {name: [] for name in names}
    for text in sets:
        key, equals, _ = text.partition("=")
        key = key.strip()
        if not equals:
            expected = "expected stages.NAME.section.key=value or defaults.section.key=value"
            raise UsageError("usage.invalid_set", f"--set {format_value(text)}", where=expected)
        first, _, rest = key.partition(".")
        if first == "defaults" and rest:
            shared.append(text.strip().removeprefix("defaults."))
            continue
        name, _, field = rest.partition(".")
        if first == "stages" and field:
            if name not in typed_sets:
                raise UsageError(
                    "usage.unknown_stage", f"--set {key}: no stage {name}", hint=_nearest(name, names, "stages.")
                )
            typed_sets[name].append(text.strip().removeprefix(f"stages.{name}."))
            continue
        inner = key.partition(".")[2] if first in names else key
        stage = first if first in names else names[0]
        meant = f"stages.{stage}.{inner}" if first in names else f"defaults.{key}"
        raise UsageError(
            "usage.invalid_set",
            f"--set {format_value(text)}",
            where="expected defaults.section.key=value or stages.NAME.section.key=value",
            hint=f"did you mean {meant}?" if inner in leaves() or inner in _STAGE_KEY_NAMES else None,
        )
    return shared, typed_sets


def _stage_key_problem(
    detail: Mapping[str, Any],
    kind: type[StageConfig],
    stage_keys: Mapping[str, GivenValue],
    prefix: str,
    place: str,
    line: int,
) -> tuple[Priority, RecipeError]:
    name = str(detail["loc"][0])
    if detail["type"] == "missing":
        hint = f"set {name}: stage:NAME, a path or a hub name"
        return Priority(merging.STAGE, line), RecipeError("recipe.missing_field", f"{place}: no {name}", hint=hint)
    given = stage_keys[name]
    if name not in kind.model_fields:
        owners = " and ".join(verb for verb, other in STAGE_CONFIGS.items() if name in other.model_fields)
        return given.priority, RecipeError(
            "recipe.unknown_field",
            f"{given.location}: not a key of {stage_keys['verb'].value}",
            where=f"it is a key of {owners}",
        )
    field = kind.model_fields[name]
    expected = f"expected {describe_type(field.annotation, field.metadata)}"
    return given.priority, RecipeError(
        "recipe.invalid_value", f"{given.location} = {format_value(given.value)}", where=expected
    )


def _why_unavailable(stage_name: str, stages: list[Stage], stage: Stage) -> str:
    if stage_name == stage.name:
        return "a stage cannot read its own output"
    if any(other.name == stage_name for other in stages):
        return f"stage {stage_name} comes after {stage.name}; stages run in the order of the file"
    return f"there is no stage {stage_name}"


def _nearest(stage_name: str, names: list[str], prefix: str = PREFIX) -> str | None:
    close = get_close_matches(stage_name, names, n=1, cutoff=0.5)
    return f"did you mean {prefix}{close[0]}?" if close else None


def values(recipe: Recipe) -> dict[str, Any]:
    """Return every value of a recipe by its dotted key, lists as lists."""
    parsed = {key: value_of(recipe, key) for key in leaves() if has_field(recipe, key)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in parsed.items()}


def inputs(config: StageConfig, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield (key, text) for every text of a stage that may name an input: a path, a name, or ``stage:NAME``."""
    for name in ("model", "models"):
        given = getattr(config, name, None)
        for text in (given,) if isinstance(given, str) else given or ():
            yield name, text
    for source in recipe.data.sources if "data" in _INPUT_SECTIONS[config.verb] else ():
        yield "data.sources", source.source
    for key, value in values(recipe).items():
        is_input = key not in _NOT_INPUTS and not choices(key) and takes_texts_only(key)
        if not is_input or key.partition(".")[0] not in _INPUT_SECTIONS[config.verb]:
            continue
        for text in (value,) if isinstance(value, str) else value or ():
            yield key, text


def with_stage_paths(stage: Stage, places: Mapping[str, str]) -> tuple[StageConfig, Resolved]:
    """Replace ``stage:NAME`` in a stage by the path of that stage's output. places: paths by stage name."""

    def replace_stages(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(PREFIX):
            return places.get(value.removeprefix(PREFIX), value)
        if isinstance(value, list | tuple):
            return type(value)(replace_stages(item) for item in value)
        if isinstance(value, dict):
            return {key: replace_stages(item) for key, item in value.items()}
        return value

    stage_keys, resolved = stage.config, stage.resolved
    recipe = Recipe.model_validate(replace_stages(resolved.recipe.model_dump()))
    return type(stage_keys).model_validate(replace_stages(stage_keys.model_dump())), replace(resolved, recipe=recipe)
