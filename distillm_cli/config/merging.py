"""Read the layers of settings, a recipe file, flags and ``--set``, as dotted keys with values and their locations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from distillm_cli.config import yaml_io
from distillm_cli.config.explain import (
    expected_values,
    format_value,
    leaves,
    nearest_key,
    plain_types,
    section_keys,
    suggest_fix,
    takes_list,
    takes_texts_only,
)
from distillm_cli.config.fields import LIMIT
from distillm_cli.config.shortcuts import Flag
from distillm_cli.errors import RecipeError, UsageError
from distillm_cli.utils.text import counted

# Weakest first. In a pipeline, SHARED are the defaults in the file, SHARED_SET those by ``--set``, STAGE those of a stage.
DEFAULT, METHOD, RECIPE, SHARED, SHARED_SET, STAGE, FLAG, SET = range(8)
_MAX_FILE_BYTES = 1_000_000  # a resolved recipe has a few thousand


class Priority(NamedTuple):
    """Order values: by layer, weakest first, and by position in the layer."""

    layer: int
    line: int = 0


class GivenValue(NamedTuple):
    """Hold a given value.

    origin: its source in the resolved recipe. location: its source in messages, with the key or flag. prefix: in a
    pipeline, the prefix that ``--set`` needs for the key ("stages.teacher.").
    """

    value: Any
    origin: str
    location: str
    priority: Priority
    prefix: str = ""


class ErrorCollector:
    """Collect the problems of the given values, to report the first one and the number of others."""

    def __init__(self) -> None:
        self._found: list[tuple[Priority, RecipeError]] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, priority: Priority, error: RecipeError) -> None:
        self._found.append((priority, error))

    def add_conflict(self, one: GivenValue | None, other: GivenValue | None) -> None:
        """Add a problem if two values for one purpose are given in the same layer."""
        if one is None or other is None or None in (one.value, other.value):
            return
        layers = {one.priority.layer, other.priority.layer}
        if layers <= {FLAG, SET} or layers == {SHARED_SET}:
            self.add(
                one.priority,
                RecipeError(
                    "recipe.given_twice", f"{one.location} and {other.location} both given", hint="keep one of them"
                ),
            )

    def first(self) -> RecipeError:
        """Return the first problem in the order of layers and lines; its hint ends with how many more there are.

        ``problems`` of the error holds all of them, for callers that show every one.
        """
        ordered = sorted(self._found, key=lambda pair: pair[0])
        first, *rest = {error.what: error for _, error in ordered}.values()  # one flag may set two fields
        if not rest:
            return first
        more = f"and {counted(len(rest), 'more problem')}"
        hint = "; ".join(part for part in (first.hint, more) if part)
        return RecipeError(first.code, first.what, where=first.where, hint=hint, problems=(first, *rest))


StoreValue = Callable[[str, Any, int], None]


def exceeds_64_bits(value: Any) -> bool:
    """Return whether a value is or contains a number beyond the range of 64-bit integers."""
    items = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(item, int | float) and abs(item) >= LIMIT for item in items)


def invalid_value_error(given: GivenValue, key: str, command: str) -> RecipeError:
    """Return the error for an invalid value: ``--alpha = 1.4; expected a number ≥ 0 and < 1; try …``."""
    flag = given.origin if given.priority.layer == FLAG else None
    takes = expected_values(key, by_flag=flag is not None)
    if int in plain_types(leaves()[key].annotation) and exceeds_64_bits(given.value) and "2^63" not in takes:
        takes += " (and below 2^63)"
    return RecipeError(
        "recipe.invalid_value",
        f"{given.location} = {format_value(given.value, by_flag=flag is not None)}",
        where=f"expected {takes}",
        hint=suggest_fix(key, given.value, command, flag, prefix=given.prefix),
    )


def read_document(path: Path, label: str) -> yaml.MappingNode:
    """Return the top-level mapping of a recipe file. Raises RecipeError if it cannot be read or has none."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise RecipeError("recipe.unreadable", f"{label}: too large for a recipe ({path.stat().st_size:,} bytes)")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError("recipe.unreadable", f"{label}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise RecipeError("recipe.unreadable", f"{label}: {error.strerror or error}") from None
    node = yaml_io.compose(text, label)
    if not isinstance(node, yaml.MappingNode):
        found = "nothing" if node is None else "a scalar" if isinstance(node, yaml.ScalarNode) else "a sequence"
        raise RecipeError(
            "recipe.not_a_mapping",
            f"{label}: holds {found}",
            where="expected a mapping of sections",
            hint="see `distillm recipes show quickstart`",
        )
    return node


def has_stages(node: yaml.MappingNode) -> bool:
    """Return whether a document is a recipe of stages, for ``distillm run``."""
    return any(isinstance(key, yaml.ScalarNode) and key.value == "stages" for key, _ in node.value)


def from_recipe(path: Path, label: str, problems: ErrorCollector, typed: str | None = None) -> dict[str, GivenValue]:
    """Return the values of a recipe file.

    Raises RecipeError if the file is not a mapping; other problems are added to ``problems``. typed: the recipe as given
    on the command line, if it differs from ``label``.
    """
    node = read_document(path, label)
    if has_stages(node):
        hint = f"try `distillm run {typed or label}`"
        raise RecipeError("recipe.is_pipeline", f"{label}: a pipeline of stages, not one recipe", hint=hint)
    return from_mapping(node, path, label, problems, RECIPE)


def from_mapping(
    node: yaml.MappingNode, path: Path, label: str, problems: ErrorCollector, layer: int, prefix: str = ""
) -> dict[str, GivenValue]:
    """Return the values of a mapping of sections. prefix: its location in the file, such as "stages.teacher."."""
    given: dict[str, GivenValue] = {}

    def store(key: str, value: Any, line: int) -> None:
        given[key] = GivenValue(
            value, f"{path.name}:{line}", f"{label}:{line}: {prefix}{key}", Priority(layer, line), prefix
        )

    _collect(node, label, store, problems, layer, prefix)
    return given


def from_flags(flags: Mapping[str, Any]) -> dict[str, GivenValue]:
    """Return the values of flags: dotted key → Flag or bare value; None is "not given"."""
    flags_by_key = {key: value if isinstance(value, Flag) else Flag(key, value) for key, value in flags.items()}
    if unknown := set(flags_by_key) - set(leaves()):
        raise KeyError(f"flags for fields that do not exist: {sorted(unknown)}")
    return {
        key: GivenValue(flag.value, flag.name, flag.name, Priority(FLAG))
        for key, flag in flags_by_key.items()
        if flag.value is not None
    }


def from_sets(
    sets: Iterable[str], problems: ErrorCollector, prefix: str = "", layer: int = SET
) -> dict[str, GivenValue]:
    """Return the values of ``--set section.key=value``; the last one counts. Raises UsageError without "=".

    prefix: in a pipeline, the part of the typed key that was removed. layer: the layer of the values.
    """
    given: dict[str, GivenValue] = {}
    for position, text in enumerate(sets):
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(
                "usage.invalid_set",
                f"--set {format_value(text)}",
                where="expected section.key=value",
                hint="try --set train.lr=5e-4",
            )
        label, priority = f"--set {prefix}{key}", Priority(layer, position)
        try:
            if key not in leaves() and key not in section_keys():
                problems.add(priority, _unknown_key_error(key, label))
                continue
            node = yaml_io.compose(value, label)
            if key in leaves():
                given[key] = GivenValue(_read_value(key, node, label), "--set", label, priority, prefix)
            else:
                problems.add(priority, _section_error(key, label))
        except RecipeError as error:
            problems.add(priority, error)
    return given


def _collect(
    node: yaml.MappingNode,
    label: str,
    store: StoreValue,
    problems: ErrorCollector,
    layer: int,
    prefix: str,
    section: str = "",
) -> None:
    """Walk a mapping of the document and pass each value to ``store`` with its dotted key."""
    for name, key_node, value_node in yaml_io.pairs(node, label, prefix + section):
        key = section + name
        line = yaml_io.line_of(key_node)
        place = f"{label}:{line}: {prefix}{key}"
        if key in leaves():
            store(key, _read_value(key, value_node, label), line)
        elif key not in section_keys():
            problems.add(Priority(layer, line), _unknown_key_error(key, place))
        elif isinstance(value_node, yaml.MappingNode):
            _collect(value_node, label, store, problems, layer, prefix, f"{key}.")
        else:
            problems.add(Priority(layer, line), _section_error(key, place))


def _read_value(key: str, node: yaml.Node | None, label: str) -> Any:
    value = yaml_io.node_value(node, label, texts=takes_texts_only(key))
    # ``eval.suites=dolly`` can only mean the list of one.
    return [value] if takes_list(key) and isinstance(value, str | int | float) else value


def _unknown_key_error(key: str, place: str) -> RecipeError:
    close = nearest_key(key)
    hint = f"did you mean {close}?" if close else "`distillm distill --dry-run` prints every key"
    if key.rpartition(".")[2].isdecimal():  # YAML's reading of {alpha: 0,1}
        hint = "inside braces a comma ends a value: write 0.1, not 0,1, and 8000, not 8,000"
    return RecipeError("recipe.unknown_field", f"{place}: no such key", hint=hint)


def _section_error(key: str, place: str) -> RecipeError:
    names = ", ".join(section_keys()[key])
    return RecipeError("recipe.section_not_value", f"{place}: a section, not a value", where=f"its keys are {names}")
