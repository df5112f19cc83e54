"""Merge settings layer by layer: a recipe file, flags and ``--set`` → dotted keys with values and places."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from distillm_cli.config import yaml_io
from distillm_cli.config.explain import (
    expected,
    kinds,
    leaves,
    nearest_key,
    sections,
    shown,
    takes_list,
    takes_texts_only,
    what_to_try,
)
from distillm_cli.config.fields import LIMIT
from distillm_cli.config.shortcuts import Flag
from distillm_cli.errors import RecipeError, UsageError
from distillm_cli.utils.text import counted

# Weakest first. SHARED (in the file), SHARED_SET (typed) and STAGE are a pipeline's: its defaults, a stage's own values.
DEFAULT, METHOD, RECIPE, SHARED, SHARED_SET, STAGE, FLAG, SET = range(8)
_LARGEST = 1_000_000  # bytes; a resolved recipe has some thousands


class Rank(NamedTuple):
    """Order values: by layer, weakest first, and by position in the layer."""

    layer: int
    line: int = 0


class Given(NamedTuple):
    """Hold a given value. origin: for the resolved recipe. place: for messages, the key or flag included.

    at: what ``--set`` puts before the key, in a pipeline ("stages.teacher.").
    """

    value: Any
    origin: str
    place: str
    rank: Rank
    at: str = ""


class Problems:
    """Collect everything that is wrong with the given values, to report the first and how many follow."""

    def __init__(self) -> None:
        self._found: list[tuple[Rank, RecipeError]] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, rank: Rank, error: RecipeError) -> None:
        self._found.append((rank, error))

    def exclude(self, one: Given | None, other: Given | None) -> None:
        """Add a problem where two values for one purpose are given in one layer. (A stage's own goes over a shared one.)"""
        if one is None or other is None or None in (one.value, other.value):
            return
        layers = {one.rank.layer, other.rank.layer}
        if layers <= {FLAG, SET} or layers == {SHARED_SET}:
            self.add(one.rank, RecipeError(f"{one.place} and {other.place} both given", hint="keep one of them"))

    def first(self) -> RecipeError:
        """Return the first problem in the order of layers and lines; its hint ends with how many more there are."""
        ordered = sorted(self._found, key=lambda pair: pair[0])
        first, *rest = {error.what: error for _, error in ordered}.values()  # one flag may set, and miss, two fields
        if not rest:
            return first
        more = f"and {counted(len(rest), 'more problem')}"
        return RecipeError(first.what, where=first.where, hint="; ".join(part for part in (first.hint, more) if part))


Keep = Callable[[str, Any, int], None]


def is_too_large(value: Any) -> bool:
    """Return whether a value is, or holds, a number that no 64-bit integer can be."""
    items = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(item, int | float) and abs(item) >= LIMIT for item in items)


def bad(given: Given, key: str, command: str) -> RecipeError:
    """Return the error for a value that its field does not take: ``--alpha = 1.4; expected a number ≥ 0 and < 1; try …``."""
    flag = given.origin if given.rank.layer == FLAG else None
    takes = expected(key)
    if int in kinds(leaves()[key].annotation) and is_too_large(given.value) and "2^63" not in takes:
        takes += " (and below 2^63)"
    return RecipeError(
        f"{given.place} = {shown(given.value, by_flag=flag is not None)}",
        where=f"expected {takes}",
        hint=what_to_try(key, given.value, command, flag, given_at=given.at),
    )


def document(path: Path, label: str) -> yaml.MappingNode:
    """Return the mapping in a recipe file. Raise RecipeError for a file that is none."""
    try:
        if path.stat().st_size > _LARGEST:
            raise RecipeError(f"{label}: too large for a recipe ({path.stat().st_size:,} bytes)")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{label}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise RecipeError(f"{label}: {error.strerror or error}") from None
    node = yaml_io.compose(text, label)
    if not isinstance(node, yaml.MappingNode):
        found = "nothing" if node is None else f"a {node.id}"
        raise RecipeError(
            f"{label}: holds {found}",
            where="expected a mapping of sections",
            hint="see `distillm recipes show quickstart`",
        )
    return node


def has_stages(node: yaml.MappingNode) -> bool:
    """Return whether a document is a recipe of stages, for ``distillm run``."""
    return any(isinstance(key, yaml.ScalarNode) and key.value == "stages" for key, _ in node.value)


def from_recipe(path: Path, label: str, problems: Problems, typed: str | None = None) -> dict[str, Given]:
    """Return the values of a recipe file. Raise RecipeError for a file that is no mapping; the rest goes to ``problems``.

    typed: what the person called it, where that is not ``label``.
    """
    node = document(path, label)
    if has_stages(node):
        hint = f"try `distillm run {typed or label}`"
        raise RecipeError(f"{label}: a pipeline of stages, not one recipe", hint=hint)
    return from_mapping(node, path, label, problems, RECIPE)


def from_mapping(
    node: yaml.MappingNode, path: Path, label: str, problems: Problems, layer: int, at: str = ""
) -> dict[str, Given]:
    """Return the values of a mapping of sections, at the top of a file or (``at``: "stages.teacher.") further down."""
    given: dict[str, Given] = {}

    def keep(key: str, value: Any, line: int) -> None:
        given[key] = Given(value, f"{path.name}:{line}", f"{label}:{line}: {at}{key}", Rank(layer, line), at)

    _collect(node, label, keep, problems, layer, at)
    return given


def from_flags(flags: Mapping[str, Any]) -> dict[str, Given]:
    """Return the values of flags: dotted key → Flag or bare value; None is "not given"."""
    named = {key: value if isinstance(value, Flag) else Flag(key, value) for key, value in flags.items()}
    if unknown := set(named) - set(leaves()):
        raise KeyError(f"flags for fields that do not exist: {sorted(unknown)}")
    return {
        key: Given(flag.value, flag.name, flag.name, Rank(FLAG))
        for key, flag in named.items()
        if flag.value is not None
    }


def from_sets(sets: Iterable[str], problems: Problems, at: str = "", layer: int = SET) -> dict[str, Given]:
    """Return the values of ``--set section.key=value``, of a key the last one. Raise UsageError without "=".

    at: what was typed before each key and is not part of it here, in a pipeline; layer: how strong they are there.
    """
    given: dict[str, Given] = {}
    for position, text in enumerate(sets):
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"--set {shown(text)}", where="expected section.key=value", hint="try --set train.lr=5e-4")
        label, rank = f"--set {at}{key}", Rank(layer, position)
        try:
            if key not in leaves() and key not in sections():
                problems.add(rank, _unknown(key, label))
                continue
            node = yaml_io.compose(value, label)
            if key in leaves():
                given[key] = Given(_leaf(key, node, label), "--set", label, rank, at)
            else:
                problems.add(rank, _not_a_value(key, label))
        except RecipeError as error:
            problems.add(rank, error)
    return given


def _collect(
    node: yaml.MappingNode,
    label: str,
    keep: Keep,
    problems: Problems,
    layer: int,
    at: str,
    prefix: str = "",
) -> None:
    """Walk a mapping of the document; pass each value to ``keep`` with its dotted key."""
    for name, key_node, value_node in yaml_io.pairs(node, label, at + prefix):
        key, line = prefix + name, yaml_io.line_of(key_node)
        place = f"{label}:{line}: {at}{key}"
        if key in leaves():
            keep(key, _leaf(key, value_node, label), line)
        elif key not in sections():
            problems.add(Rank(layer, line), _unknown(key, place))
        elif isinstance(value_node, yaml.MappingNode):
            _collect(value_node, label, keep, problems, layer, at, f"{key}.")
        else:
            problems.add(Rank(layer, line), _not_a_value(key, place))


def _leaf(key: str, node: yaml.Node | None, label: str) -> Any:
    value = yaml_io.node_value(node, label, texts=takes_texts_only(key))
    # ``eval.suites=dolly`` can only mean the list of one.
    return [value] if takes_list(key) and isinstance(value, str | int | float) else value


def _unknown(key: str, place: str) -> RecipeError:
    close = nearest_key(key)
    hint = f"did you mean {close}?" if close else "`distillm distill --dry-run` prints every key"
    if key.rpartition(".")[2].isdecimal():  # what YAML makes of {alpha: 0,1}
        hint = "inside braces a comma ends a value: write 0.1 for 0,1 and 8000 for 8,000"
    return RecipeError(f"{place}: no such key", hint=hint)


def _not_a_value(key: str, place: str) -> RecipeError:
    names = ", ".join(sections()[key])
    return RecipeError(f"{place}: a section, not a value", where=f"its keys are {names}")
