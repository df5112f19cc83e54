"""Describe the schema for messages: the values of a field, the nearest valid name, a fix for an invalid value."""

from __future__ import annotations

import re
import shlex
import types
from collections.abc import Iterator, Mapping
from copy import copy
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from distillm_cli.config import yaml_io
from distillm_cli.config.fields import Section, TaggedUnion, UsedWhen, Values
from distillm_cli.config.methods import METHODS
from distillm_cli.config.schema import AUTO, Recipe
from distillm_cli.config.shortcuts import flag_of
from distillm_cli.utils.text import redact

_BOUNDS = (
    (annotated_types.Ge, "≥", "ge"),
    (annotated_types.Gt, ">", "gt"),
    (annotated_types.Le, "≤", "le"),
    (annotated_types.Lt, "<", "lt"),
)


def union_of(field: FieldInfo) -> TaggedUnion[Section] | None:
    """Return the union of sections that a field holds, None for one section and for a value."""
    return next((part for part in field.metadata if isinstance(part, TaggedUnion)), None)


def _walk(model: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        section = field.annotation
        if union := union_of(field):
            yield from _walk_union(union, f"{prefix}{name}.")
        elif isinstance(section, type) and issubclass(section, Section):
            yield from _walk(section, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _walk_union(union: TaggedUnion[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name in union.names():
        field = next(iter(union.fields(name).values()))
        if name == union.tag:
            field = copy(field)
            field.annotation = Literal[tuple(union.members)]
            field.default = union.default
        yield prefix + name, field


@cache
def leaves() -> dict[str, FieldInfo]:
    """Return every key that a recipe may have: dotted key → its pydantic field, in the schema's order.

    A union contributes the keys of all members. A key of several members has the description of the first.
    """
    return dict(_walk(Recipe, ""))


@cache
def section_keys() -> dict[str, list[str]]:
    """Return the key names of every section, by the section's dotted key; "" is the whole recipe."""
    found: dict[str, dict[str, None]] = {}
    for key in leaves():
        parts = key.split(".")
        for n, name in enumerate(parts):
            found.setdefault(".".join(parts[:n]), {})[name] = None
    return {section: list(names) for section, names in found.items()}


@cache
def condition(key: str) -> UsedWhen | None:
    """Return the condition under which a run uses the field; None if every run does.

    For a field of a union it combines the value of the tag with the conditions of the members that have the field.
    """
    section, _, name = key.rpartition(".")
    union = union_of(Recipe.model_fields[section]) if section in Recipe.model_fields else None
    if union is None:
        return _used_when(leaves()[key])
    holders = union.fields(name)
    conditions = {tag: _used_when(field) for tag, field in holders.items()}
    ways_of = {tag: used_when.alternatives if used_when else ({},) for tag, used_when in conditions.items()}
    tags_of: dict[tuple[tuple[str, Values], ...], list[str]] = {}
    for tag in sorted(ways_of, key=lambda tag: -len(ways_of[tag])):  # the longest list sets the order
        for alternative in ways_of[tag]:
            tags_of.setdefault(tuple(alternative.items()), []).append(tag)
    alternatives = []
    for items, tags in tags_of.items():
        alternative = dict(items)
        if len(tags) == len(union.members) or _imply(alternative, tags, section, union):
            alternatives.append(alternative)
        else:
            alternatives.append({f"{section}.{union.tag}": tuple(tags), **alternative})
    of_method = all(used_when is None or used_when.of_method for used_when in conditions.values())
    return UsedWhen(*alternatives, of_method=of_method) if all(alternatives) else None


def _imply(alternative: Mapping[str, Any], tags: list[str], section: str, union: TaggedUnion[Section]) -> bool:
    """Return whether an alternative names a field that only these members have, so that it implies the tag."""
    names = [key.removeprefix(f"{section}.") for key in alternative if key.startswith(f"{section}.")]
    return len(tags) > 1 and any(set(union.fields(name)) <= set(tags) for name in names if name != union.tag)


def _used_when(field: FieldInfo) -> UsedWhen | None:
    return next((part for part in field.metadata if isinstance(part, UsedWhen)), None)


def plain_types(annotation: Any) -> set[Any]:
    """Return the plain types that a field takes: {str}, {int, None}, …. The choices of a Literal count as their types."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return plain_types(get_args(annotation)[0])
    if origin is Literal:
        return {type(choice) for choice in get_args(annotation)}
    if origin is dict:
        return {dict}
    if origin in (Union, types.UnionType, tuple):
        return set().union(*(plain_types(part) for part in get_args(annotation) if part is not Ellipsis))
    return {annotation if annotation is not types.NoneType else None}


def takes_texts_only(key: str) -> bool:
    """Return whether the field holds only text, never a number or a boolean."""
    return key in leaves() and plain_types(leaves()[key].annotation) <= {str, None}


def takes_list(key: str) -> bool:
    """Return whether the field holds a list."""
    annotation = leaves()[key].annotation
    parts = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return any(get_origin(part) is tuple for part in parts)


def choices(key: str) -> list[str]:
    """Return the words that a field, or an item of it, may be. Empty if it has no fixed choices."""
    if key == "method":
        return list(METHODS)
    return [word for word in _literals(leaves()[key].annotation) if isinstance(word, str)]


def _literals(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for part in get_args(annotation) for word in _literals(part)]


def expected_values(key: str, *, by_flag: bool = False) -> str:
    """Describe the values of a field: "a number ≥ 0 and < 1", "one of off, on, mixed", "an integer ≥ 1, or null".

    by_flag: without null, which no flag takes.
    """
    if key == "method":
        return f"one of {', '.join(METHODS)}"
    text = describe_type(leaves()[key].annotation, leaves()[key].metadata)
    return text.removesuffix(", or null") if by_flag else text


def describe_type(annotation: Any, metadata: list[Any]) -> str:
    """Describe the values that a pydantic field of this annotation takes."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [m for extra in parts[1:] for m in (*(extra.metadata if isinstance(extra, FieldInfo) else ()), extra)]
        return describe_type(parts[0], [*metadata, *inner])
    if origin in (Union, types.UnionType):
        return ", or ".join(describe_type(part, metadata) for part in parts)
    if origin is Literal:
        return str(parts[0]) if len(parts) == 1 else f"one of {', '.join(map(str, parts))}"
    if origin is dict:
        return "a mapping"
    if origin is tuple:
        noun = "a non-empty list" if any(isinstance(m, annotated_types.MinLen) for m in metadata) else "a list"
        count = "" if parts[-1] is Ellipsis else f" of {len(parts)}"
        return f"{noun}{count}, each {describe_type(parts[0], [])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"a name or a mapping with the keys {', '.join(annotation.model_fields)}"
    names: dict[Any, str] = {bool: "true or false", int: "an integer", float: "a number", types.NoneType: "null"}
    examples = [m.examples[0] for m in metadata if isinstance(m, FieldInfo) and m.examples]
    if annotation not in names and examples:
        return f"a string like {examples[0]}"
    if annotation not in names:
        return "a non-empty string" if any(isinstance(m, annotated_types.MinLen) for m in metadata) else "a string"
    bounds = [
        f"{sign} {_format_bound(getattr(m, name))}"
        for m in metadata
        for cls, sign, name in _BOUNDS
        if isinstance(m, cls)
    ]
    noun = names[annotation]
    return " ".join([noun, " and ".join(bounds)]).rstrip() if annotation in (int, float) else noun


def _format_bound(value: float) -> str:
    """Format a bound: 0.5, 1, 2^63."""
    return f"2^{value.bit_length() - 1}" if isinstance(value, int) and value > 1 << 20 else f"{value:g}"


def format_value(value: Any, *, by_flag: bool = False) -> str:
    """Format a value as a user would type it, on one line of at most 80 characters. by_flag: lists as ``a,b``."""
    if isinstance(value, dict):
        return "a mapping"
    if by_flag and isinstance(value, list | tuple):
        text = ",".join(map(str, value)) or "(empty)"
    else:
        text = "(empty)" if value == "" else yaml_io.text_of(list(value) if isinstance(value, tuple) else value)
    text = redact(text)  # before truncation: part of an address may not be recognized
    return text if len(text) <= 80 else text[:77] + "…"


# Names of recipe keys in other tools.
ALIASES = {
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_schedule",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "gradient_accumulation": "accumulate",
    "train_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate",
    "max_grad_norm": "clip",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "save_total_limit": "keep",
    "dataset": "source",
    "model_name_or_path": "path",
    "max_seq_length": "max_length",
    "template": "data.template",
    "chat_template": "data.chat_template",
    "lmbda": "mix",
    "lora_r": "student.lora.r",
    "lora_rank": "student.lora.r",
    "lora_alpha": "student.lora.alpha",
    "lora_dropout": "student.lora.dropout",
    "lora_target_modules": "student.lora.targets",
    "target_modules": "targets",
    "load_in_8bit": "quantize",
    "load_in_4bit": "quantize",
}


def nearest_key(key: str) -> str | None:
    """Return the valid dotted key nearest to an unknown one: in the same section first, then anywhere by its last name."""
    section, _, name = key.rpartition(".")
    same_section = {k.rpartition(".")[2]: k for k in leaves() if k.rpartition(".")[0] == section}
    anywhere: dict[str, str] = {}
    for k in sorted(leaves(), key=lambda k: k.count(".")):  # objective.alpha before student.lora.alpha
        anywhere.setdefault(k.rpartition(".")[2], k)
    top_level = {name: name for name in section_keys()[""] if name in section_keys()} if not section else {}
    name = name.replace("-", "_")
    name = ALIASES.get(name, name)
    if name in leaves():
        return name
    if name in same_section:
        return same_section[name]
    if name in anywhere:
        return anywhere[name]
    dotted = {k: k for k in leaves()}
    for names, target, cutoff in ((same_section | top_level, name, 0.6), (dotted, key, 0.75), (anywhere, name, 0.7)):
        if close := get_close_matches(target, names, n=1, cutoff=cutoff):
            return names[close[0]]
    return None


def nearest_choice(value: Any, options: list[str]) -> str | None:
    """Return the choice nearest to a value, None if none is close."""
    close = get_close_matches(str(value).lower().replace("-", "_"), options, n=1, cutoff=0.5)
    return close[0] if close else None


def _split_items(item: Any) -> list[Any]:
    """Split the items of a list that was typed without its brackets, ``a,b`` for ``[a, b]``."""
    parts = [part.strip() for part in item.split(",")] if isinstance(item, str) else [item]
    return [int(part) if isinstance(part, str) and re.fullmatch(r"-?[0-9]+", part) else part for part in parts]


def suggest_fix(key: str, value: Any, verb: str, flag: str | None = None, *, prefix: str = "") -> str | None:
    """Suggest a fix for an invalid value: the nearest choice or the default as an option, else the field's help.

    flag: the flag that gave the value. prefix: the prefix of the key in ``--set``, in a pipeline, which has no flags for
    fields.
    """
    field, options = leaves()[key], choices(key)
    if options == [AUTO]:
        return f"try --set {prefix}{key}={AUTO}"
    suggestion = field.default
    if isinstance(value, list | tuple) and not takes_list(key):
        value = value[0] if len(value) == 1 else None  # a list where one value is expected
    if isinstance(value, list | tuple):
        corrected = [part for item in value for part in _split_items(item)]
        if options:
            corrected = [v if v in options else nearest_choice(v, options) for v in corrected]
        if corrected and None not in corrected and (options or len(corrected) > len(value)):
            suggestion = corrected
    elif value is not None and options and (word := nearest_choice(value, options)):
        suggestion = word
    if suggestion is None or suggestion == ():
        meaning = field.description or ""
        return f"it means: {meaning[:1].lower()}{meaning[1:]}" if meaning else None
    flag = flag or (None if prefix else flag_of(key, verb))
    if flag:
        return f"try {flag} {shlex.quote(format_value(suggestion, by_flag=True))}"
    return f"try --set {shlex.quote(f'{prefix}{key}={format_value(suggestion)}')}"
