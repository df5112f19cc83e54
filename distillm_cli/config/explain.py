"""The schema in plain words: what a field expects, which name was meant, what to try instead."""

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
from distillm_cli.config.fields import Section, TaggedUnion, UsedWhen
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


def union_of(field: FieldInfo) -> TaggedUnion | None:
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


def _walk_union(union: TaggedUnion, prefix: str) -> Iterator[tuple[str, FieldInfo]]:
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

    Of a union these are the keys of all members. A key that several have is described as in the first.
    """
    return dict(_walk(Recipe, ""))


@cache
def sections() -> dict[str, list[str]]:
    """Return the names of the keys of every section, by the section's own dotted key; "" is the whole recipe."""
    found: dict[str, dict[str, None]] = {}
    for key in leaves():
        parts = key.split(".")
        for n, name in enumerate(parts):
            found.setdefault(".".join(parts[:n]), {})[name] = None
    return {section: list(names) for section, names in found.items()}


@cache
def condition(key: str) -> UsedWhen | None:
    """Return what decides whether a run uses the field; None where every run does.

    For a field of a union that is the value of the tag, together with the conditions of the members that have the field.
    """
    section, _, name = key.rpartition(".")
    union = union_of(Recipe.model_fields[section]) if section in Recipe.model_fields else None
    if union is None:
        return _used_when(leaves()[key])
    holders = union.fields(name)
    conditions = {tag: _used_when(field) for tag, field in holders.items()}
    ways_of = {tag: used_when.ways if used_when else ({},) for tag, used_when in conditions.items()}
    tags_of: dict[tuple, list[str]] = {}
    for tag in sorted(ways_of, key=lambda tag: -len(ways_of[tag])):  # the longest list sets the order
        for way in ways_of[tag]:
            tags_of.setdefault(tuple(way.items()), []).append(tag)
    ways = []
    for items, tags in tags_of.items():
        way = dict(items)
        if len(tags) == len(union.members) or _imply(way, tags, section, union):
            ways.append(way)
        else:
            ways.append({f"{section}.{union.tag}": tuple(tags), **way})
    of_method = all(used_when is None or used_when.of_method for used_when in conditions.values())
    return UsedWhen(*ways, of_method=of_method) if all(ways) else None


def _imply(way: Mapping[str, Any], tags: list[str], section: str, union: TaggedUnion) -> bool:
    """Return whether a way names a field that only these members, several, have: then it need not name them itself."""
    names = [key.removeprefix(f"{section}.") for key in way if key.startswith(f"{section}.")]
    return len(tags) > 1 and any(set(union.fields(name)) <= set(tags) for name in names if name != union.tag)


def _used_when(field: FieldInfo) -> UsedWhen | None:
    return next((part for part in field.metadata if isinstance(part, UsedWhen)), None)


def kinds(annotation: Any) -> set[Any]:
    """The plain types a field takes: {str}, {int, None}, …; the choices of a Literal count as their types."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return kinds(get_args(annotation)[0])
    if origin is Literal:
        return {type(choice) for choice in get_args(annotation)}
    if origin is dict:
        return {dict}
    if origin in (Union, types.UnionType, tuple):
        return set().union(*(kinds(part) for part in get_args(annotation) if part is not Ellipsis))
    return {annotation if annotation is not types.NoneType else None}


def takes_texts_only(key: str) -> bool:
    """Whether the field holds text and nothing that could be a number or a truth value."""
    return key in leaves() and kinds(leaves()[key].annotation) <= {str, None}


def takes_list(key: str) -> bool:
    """Whether the field holds a list."""
    annotation = leaves()[key].annotation
    parts = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return any(get_origin(part) is tuple for part in parts)


def choices(key: str) -> list[str]:
    """The words a field may be, if it is a choice (or holds one, or lists of one); else nothing."""
    if key == "method":
        return list(METHODS)
    return [word for word in _literals(leaves()[key].annotation) if isinstance(word, str)]


def _literals(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for part in get_args(annotation) for word in _literals(part)]


def expected(key: str) -> str:
    """What the field takes: "a number ≥ 0 and < 1", "one of off, on, mixed", "a whole number ≥ 1, or null"."""
    if key == "method":
        return f"one of {', '.join(METHODS)}"
    return described(leaves()[key].annotation, leaves()[key].metadata)


def described(annotation: Any, metadata: list[Any]) -> str:
    """What a pydantic field of this annotation takes, in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [m for extra in parts[1:] for m in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return described(parts[0], [*metadata, *inner])
    if origin in (Union, types.UnionType):
        return ", or ".join(described(part, metadata) for part in parts)
    if origin is Literal:
        return str(parts[0]) if len(parts) == 1 else f"one of {', '.join(map(str, parts))}"
    if origin is dict:
        return "a mapping"
    if origin is tuple:
        count = " that is not empty" if any(isinstance(m, annotated_types.MinLen) for m in metadata) else ""
        count = count if parts[-1] is Ellipsis else f" of {len(parts)}"
        return f"a list{count}, each {described(parts[0], [])}"
    noun = {bool: "true or false", int: "a whole number", float: "a number", types.NoneType: "null"}.get(annotation)
    if noun is None:
        return "a text that is not empty" if any(isinstance(m, annotated_types.MinLen) for m in metadata) else "a text"
    bounds = [
        f"{sign} {_bound(getattr(m, name))}" for m in metadata for cls, sign, name in _BOUNDS if isinstance(m, cls)
    ]
    return " ".join([noun, " and ".join(bounds)]).rstrip() if annotation in (int, float) else noun


def _bound(value: float) -> str:
    """0.5, 1, 2^63."""
    return f"2^{value.bit_length() - 1}" if isinstance(value, int) and value > 1 << 20 else f"{value:g}"


def shown(value: Any, *, by_flag: bool = False) -> str:
    """A value as a person would type it, on one line, not too long. Flags take lists without brackets: ``a,b``."""
    if isinstance(value, dict):
        return "a mapping"
    if by_flag and isinstance(value, list | tuple):
        text = ",".join(map(str, value)) or "(empty)"
    else:
        text = "(empty)" if value == "" else yaml_io.text_of(list(value) if isinstance(value, tuple) else value)
    text = redact(text)  # before it is cut: half an address may not be known as one
    return text if len(text) <= 80 else text[:77] + "…"


# What other tools call our keys.
_ELSEWHERE = {
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_schedule",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate",
    "max_grad_norm": "clip",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "save_total_limit": "keep",
    "dataset": "source",
    "model_name_or_path": "path",
    "max_seq_length": "max_length",
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
    """The valid dotted key that was probably meant: in the same section first, then anywhere by its last name."""
    section, _, name = key.rpartition(".")
    here = {k.rpartition(".")[2]: k for k in leaves() if k.rpartition(".")[0] == section}
    anywhere: dict[str, str] = {}
    for k in sorted(leaves(), key=lambda k: k.count(".")):  # objective.alpha before student.lora.alpha
        anywhere.setdefault(k.rpartition(".")[2], k)
    tops = {name: name for name in sections()[""] if name in sections()} if not section else {}
    name = name.replace("-", "_")
    name = _ELSEWHERE.get(name, name)
    if name in leaves():
        return name
    if name in here:
        return here[name]
    if name in anywhere:
        return anywhere[name]
    dotted = {k: k for k in leaves()}
    for names, wanted, cutoff in ((here | tops, name, 0.6), (dotted, key, 0.75), (anywhere, name, 0.7)):
        if close := get_close_matches(wanted, names, n=1, cutoff=cutoff):
            return names[close[0]]
    return None


def nearest_word(value: Any, words: list[str]) -> str | None:
    """The word that was probably meant, None when none is close."""
    close = get_close_matches(str(value).lower().replace("-", "_"), words, n=1, cutoff=0.5)
    return close[0] if close else None


def _parts(item: Any) -> list[Any]:
    """``a,b`` for ``[a, b]``: of a list that was typed without its brackets, the items."""
    parts = [part.strip() for part in item.split(",")] if isinstance(item, str) else [item]
    return [int(part) if isinstance(part, str) and re.fullmatch(r"-?[0-9]+", part) else part for part in parts]


def what_to_try(key: str, value: Any, verb: str, flag: str | None = None, *, given_at: str = "") -> str | None:
    """A cure for a bad value: the nearest choice, else the default, as something to type; else the field's own help.

    flag: the flag that the value came by, to be used again. given_at: what ``--set`` puts before the key, in a pipeline,
    which has no flags for fields.
    """
    field, words = leaves()[key], choices(key)
    if words == [AUTO]:
        return f"try --set {given_at}{key}={AUTO}"
    better = field.default
    if isinstance(value, list | tuple) and not takes_list(key):
        value = value[0] if len(value) == 1 else None  # a list where one value is expected
    if isinstance(value, list | tuple):
        meant = [part for item in value for part in _parts(item)]
        if words:
            meant = [v if v in words else nearest_word(v, words) for v in meant]
        if meant and None not in meant and (words or len(meant) > len(value)):
            better = meant
    elif value is not None and words and (word := nearest_word(value, words)):
        better = word
    if better is None or better == ():
        meaning = field.description or ""
        return f"it means: {meaning[:1].lower()}{meaning[1:]}" if meaning else None
    flag = flag or (None if given_at else flag_of(key, verb))
    if flag:
        return f"try {flag} {shlex.quote(shown(better, by_flag=True))}"
    return f"try --set {shlex.quote(f'{given_at}{key}={shown(better)}')}"
