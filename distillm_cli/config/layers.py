"""What a person said, layer by layer: a recipe file, flags and ``--set`` → dotted keys with values and places."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from distillm_cli.config import yaml_io
from distillm_cli.config.explain import (
    expected,
    leaves,
    nearest_key,
    section_of,
    shown,
    takes_list,
    takes_texts_only,
    what_to_try,
)
from distillm_cli.config.schema import Recipe, Section
from distillm_cli.config.shortcuts import Flag
from distillm_cli.errors import RecipeError, UsageError

DEFAULT, METHOD, RECIPE, OTHER_METHOD, FLAG, SET = range(6)
_LARGEST = 1_000_000  # bytes; a resolved recipe has some thousands


class Rank(NamedTuple):
    """How strong a value is, and where in its layer it stands."""

    layer: int
    line: int = 0


class Given(NamedTuple):
    """A value somebody gave. origin: for the resolved recipe. place: for messages, the key or flag included."""

    value: Any
    origin: str
    place: str
    rank: Rank


class Problems:
    """Everything wrong with what a person said, so that the first can be told, and how many follow."""

    def __init__(self) -> None:
        self._found: list[tuple[Rank, RecipeError]] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, rank: Rank, error: RecipeError) -> None:
        self._found.append((rank, error))

    def first(self) -> RecipeError:
        """The first in the order of layers and lines; its hint ends with how many more there are."""
        ordered = sorted(self._found, key=lambda pair: pair[0])
        first, *rest = {error.what: error for _, error in ordered}.values()  # one flag may set, and miss, two fields
        if not rest:
            return first
        more = f"and {len(rest)} more {'problem' if len(rest) == 1 else 'problems'}"
        return RecipeError(first.what, where=first.where, hint="; ".join(part for part in (first.hint, more) if part))


Keep = Callable[[str, Any, int], None]


def bad(given: Given, key: str, command: str) -> RecipeError:
    """The error for a value its field does not take: ``--alpha = 1.4; expected a number ≥ 0 and < 1; try …``."""
    return RecipeError(
        f"{given.place} = {shown(given.value)}",
        where=f"expected {expected(key)}",
        hint=what_to_try(key, given.value, command, given.origin if given.rank.layer == FLAG else None),
    )


def from_recipe(path: Path, label: str, problems: Problems) -> dict[str, Given]:
    """The values of a recipe file. Raises RecipeError for a file that is no mapping; the rest goes to ``problems``."""
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
    given: dict[str, Given] = {}

    def keep(key: str, value: Any, line: int) -> None:
        given[key] = Given(value, f"{path.name}:{line}", f"{label}:{line}: {key}", Rank(RECIPE, line))

    _collect(node, Recipe, "", label, keep, problems)
    return given


def from_flags(flags: Mapping[str, Any]) -> dict[str, Given]:
    """The values of flags: dotted key → Flag or bare value; None is "not given". Raises UsageError."""
    named = {key: value if isinstance(value, Flag) else Flag(key, value) for key, value in flags.items()}
    if unknown := set(named) - set(leaves()):
        raise KeyError(f"flags for fields that do not exist: {sorted(unknown)}")
    given = {
        key: Given(flag.value, flag.name, flag.name, Rank(FLAG))
        for key, flag in named.items()
        if flag.value is not None
    }
    if "train.epochs" in given and "train.steps" in given:
        raise UsageError("--epochs and --steps both given", hint="keep one of them")
    return given


def from_sets(sets: Iterable[str], problems: Problems) -> dict[str, Given]:
    """The values of ``--set section.key=value``, the last one of a key counting. Raises UsageError without "="."""
    given: dict[str, Given] = {}
    for position, text in enumerate(sets):
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"--set {shown(text)}", where="expected section.key=value", hint="try --set train.lr=5e-4")
        label, rank = f"--set {key}", Rank(SET, position)
        try:
            parent, name = _parent(key)
            if parent is None or name not in parent.model_fields:
                problems.add(rank, _unknown(key, label))
                continue
            node = yaml_io.compose(value, label)
            section = section_of(parent.model_fields[name])
            if section is None:
                given[key] = Given(_leaf(key, node, label), "--set", label, rank)
            else:
                problems.add(rank, _not_a_section(key, label, section))
        except RecipeError as error:
            problems.add(rank, error)
    return given


def _parent(key: str) -> tuple[type[Section] | None, str]:
    """The section that would hold a dotted key (None when there is no such section), and the key's last name."""
    *sections, name = key.split(".")
    model: type[Section] | None = Recipe
    for section in sections:
        model = section_of(model.model_fields[section]) if model and section in model.model_fields else None
    return model, name


def _collect(
    node: yaml.MappingNode, model: type[Section], prefix: str, label: str, keep: Keep, problems: Problems
) -> None:
    """Walk a mapping of the document beside the schema; hand each leaf to ``keep``."""
    for name, key_node, value_node in yaml_io.pairs(node, label, prefix):
        key, line = prefix + name, yaml_io.line_of(key_node)
        place = f"{label}:{line}: {key}"
        if name not in model.model_fields:
            problems.add(Rank(RECIPE, line), _unknown(key, place))
            continue
        section = section_of(model.model_fields[name])
        if section is None:
            keep(key, _leaf(key, value_node, label), line)
        elif isinstance(value_node, yaml.MappingNode):
            _collect(value_node, section, f"{key}.", label, keep, problems)
        else:
            problems.add(Rank(RECIPE, line), _not_a_section(key, place, section))


def _leaf(key: str, node: yaml.Node | None, label: str) -> Any:
    value = yaml_io.value_of(node, label, texts=takes_texts_only(key))
    # ``eval.suites=dolly`` can only mean the list of one.
    return [value] if takes_list(key) and isinstance(value, str | int | float) else value


def _unknown(key: str, place: str) -> RecipeError:
    close = nearest_key(key)
    return RecipeError(
        f"{place}: no such key",
        hint=f"did you mean {close}?" if close else "`distillm distill --dry-run` prints every key",
    )


def _not_a_section(key: str, place: str, section: type[Section]) -> RecipeError:
    names = ", ".join(section.model_fields)
    return RecipeError(f"{place}: a section, not a value", where=f"its keys are {names}")
