"""YAML, flags and ``--set`` → one resolved recipe that knows where each value came from.

Precedence, weakest first: schema < method preset < recipe < flags < ``--set``. A method named by hand, over a recipe that
was written for another, brings its preset along: it is stronger than what that recipe says of objective and sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distillm_cli.config import merging, ownership, yaml_io
from distillm_cli.config.explain import leaves, shown, union_of
from distillm_cli.config.fields import Section, TaggedUnion
from distillm_cli.config.merging import Given, Problems, Rank, bad
from distillm_cli.config.methods import METHODS
from distillm_cli.config.ownership import has, value_of
from distillm_cli.config.schema import Recipe
from distillm_cli.config.shortcuts import FIELD_FLAGS
from distillm_cli.errors import RecipeError, UsageError
from distillm_cli.utils.text import HIDDEN, redact


@dataclass(frozen=True)
class Resolved:
    """A recipe with every value filled in.

    origin: dotted key → "default", "method distillm", "quickstart.yaml:12", "--alpha" or "--set". former: dotted key →
    (value, origin) that the recipe or the method gave and something stronger replaced. notes: sentences about what of
    the recipe is left out. name: of the recipe, None without one.
    """

    recipe: Recipe
    origin: dict[str, str]
    former: dict[str, tuple[Any, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    name: str | None = None


def shipped() -> dict[str, Path]:
    """Return the shipped recipes: name → file. In a wheel they are inside the package, in a checkout beside it."""
    package = Path(__file__).resolve().parent.parent
    inside, beside = package / "_recipes", package.parent / "recipes"
    if inside.is_dir():
        return _by_name(inside)
    if (package.parent / "pyproject.toml").is_file():  # any other "recipes" in site-packages is not ours
        return _by_name(beside)
    return {}


def _by_name(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def locate(recipe: str | Path) -> Path:
    """Return the file of a shipped name (as text) or a path. Raise RecipeError when there is none, with the nearest name."""
    text, known = str(recipe), shipped()
    if isinstance(recipe, str) and text in known:
        return known[text]
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    if path.is_dir() and (path / "recipe.yaml").is_file():
        raise RecipeError(f"{text} is a directory", hint=f"try --recipe {path / 'recipe.yaml'}")
    if isinstance(recipe, Path) or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise RecipeError(f"no recipe file {text}", hint="`distillm recipes ls` lists the shipped ones")
    close = get_close_matches(text, known, n=1, cutoff=0.5)
    raise RecipeError(
        f"no recipe named {shown(text)}",
        where=f"shipped: {', '.join(known)}",
        hint=f"try --recipe {close[0]}" if close else "or give the path of a file",
    )


def resolve(
    *,
    command: str,
    recipe: str | Path | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Iterable[str] | None = None,
) -> Resolved:
    """Resolve a recipe file, flags and ``--set`` into the recipe of a run.

    command: the verb; it decides the default method, and refuses methods of the other verb. recipe: a shipped name
    (str) or a path. flags: dotted key → Flag(name, value) or a bare value; None is "not given". sets:
    "section.key=value" texts, read by YAML's rules.

    A value given by hand that the run does not use (``--alpha`` with ``--method kd``) is an error. `generate` and `eval`
    do not train and take any recipe. What a recipe sets for its own method, where a flag has chosen another one, is left
    out, and a note reports it.

    Raise RecipeError for the first problem, in file order, with the number of further ones; UsageError for contradicting
    flags and for a method of the other verb.
    """
    problems = Problems()
    path = locate(recipe) if recipe is not None else None
    label = path.name if path and recipe == path.stem else str(recipe)
    from_recipe = merging.from_recipe(path, label, problems, str(recipe)) if path else {}
    from_flags = merging.from_flags(flags or {})
    from_sets = merging.from_sets(sets or (), problems)

    resolved = settle(command, (from_recipe, from_flags, from_sets), problems, path.stem if path else None, label)
    if resolved is None or problems:
        raise problems.first()
    return resolved


def settle(
    command: str,
    weakest_first: Sequence[Mapping[str, Given]],
    problems: Problems,
    name: str | None = None,
    label: str | None = None,
) -> Resolved | None:
    """Resolve layers of values over the preset of their method; None where there are problems, which are in ``problems``.

    label: what notes call the recipe. What is shared by several stages is offered: one that does not read it goes without.
    """
    of_recipe = [{k: e for k, e in layer.items() if e.rank.layer <= merging.RECIPE} for layer in weakest_first]
    from_recipe = {key: entry for layer in of_recipe for key, entry in layer.items()}
    method = _method(command, *weakest_first)
    preset, over = {"method": method}, {}
    if _is_method(method.value):
        _check_verb(method, command)
        preset |= _preset(method.value, merging.METHOD)
        own = from_recipe.get("method", method)  # a recipe that names no method speaks for any
        if method.rank.layer > merging.RECIPE and method.value != own.value:
            # How long and how fast a recipe trains is its pair's affair, whatever the method.
            over = {k: v for k, v in _preset(method.value, merging.FLAG).items() if not k.startswith("train.")}
    else:
        problems.add(method.rank, bad(method, "method", command))

    by_hand = [{k: e for k, e in layer.items() if e.rank.layer > merging.RECIPE} for layer in weakest_first]
    typed = {key: entry for layer in by_hand for key, entry in layer.items()}
    problems.exclude(typed.get("train.epochs"), typed.get("train.steps"))
    given, former = _stacked(preset, from_recipe, over, *by_hand)
    made = _validated(given, command, problems)
    if made is None:
        return None
    notes: tuple[str, ...] = ()
    value, held = partial(value_of, made), {**preset, **over}
    if not ownership.trains(command):
        for key, entry in given.items():
            if entry.rank.layer > merging.STAGE and (key == "method" or entry is not held.get(key)):
                reads = partial(ownership.is_read_without_training, given=entry, value=value, command=command)
                if not _is_read(key, entry, reads):
                    problems.add(entry.rank, ownership.misplaced(key, entry, value, command))
        if problems:
            return None
    else:
        unread = _unread(made, given, held)
        unasked = {k for k, entry in unread.items() if entry.rank.layer in (merging.SHARED, merging.SHARED_SET)}
        left_out = _left_out(unread, command, from_recipe) | unasked
        for key in unread.keys() - left_out:
            problems.add(given[key].rank, ownership.misplaced(key, given[key], value, command))
        if problems:
            return None
        if left_out:
            former |= {key: (given[key].value, given[key].origin) for key in left_out}
            given = {key: entry for key, entry in given.items() if key not in left_out}
            made = _validated(given, command, problems)
        if noted := left_out - unasked:
            keys = ", ".join(key for key in leaves() if key in noted)
            run = f"method {made.method}, objective {made.objective.divergence}, schedule {made.schedule.kind}"
            run += f", data {made.data.source}" if any(key.startswith("data.") for key in noted) else ""
            notes = (f"{label or name}: left out, since nothing reads them here ({run}): {keys}",)
    origin = {key: given[key].origin if key in given else "default" for key in leaves() if has(made, key)}
    return Resolved(made, origin, former, notes, name)


def settled(resolved: Resolved, values: Mapping[str, tuple[Any, str]]) -> Resolved:
    """Return the recipe with values that were open until the run started. values: dotted key → (value, origin)."""
    recipe = resolved.recipe
    for key, (value, _) in values.items():
        section, _, name = key.rpartition(".")
        part = getattr(recipe, section).model_copy(update={name: value})
        recipe = recipe.model_copy(update={section: part})
    origin = resolved.origin | {key: origin for key, (_, origin) in values.items()}
    return replace(resolved, recipe=recipe, origin=origin)


def load_resolved(path: str | Path) -> Recipe:
    """Return the recipe in a file, such as the ``recipe.yaml`` of an output directory. Raise RecipeError."""
    return resolve(command="eval", recipe=Path(path)).recipe


def to_yaml(resolved: Resolved, with_origin: bool = True) -> str:
    """Return the whole recipe as YAML that reads back the same; with_origin: each line ends with where its value came from.

    Credentials in addresses are left out, and a note reports it.

    A value that replaced another says so: ``lr: 0.0001  # --lr (dolly-gpt2.yaml:14: 0.0005)``.
    """
    rows = [*_rows(resolved.recipe, "", resolved)]
    if not with_origin:
        return "".join(f"{line}\n" for line, _ in rows)
    column = min(max(len(line) for line, comment in rows if comment), 56)
    notes = "".join(f"# note: {redact(note)}\n" for note in resolved.notes)
    notes += (
        f"# note: {HIDDEN} stands for credentials, which are not written down: give those values again\n"
        * _holds_credentials(resolved.recipe)
    )
    return notes + "".join(f"{line:<{column}}  # {comment}\n" if comment else f"{line}\n" for line, comment in rows)


def _rows(section: Section, prefix: str, resolved: Resolved) -> Iterable[tuple[str, str]]:
    """Yield (line of YAML, comment) for each field, sections indented under their names."""
    indent = "  " * prefix.count(".")
    for name in type(section).model_fields:
        value, key = getattr(section, name), prefix + name
        if isinstance(value, Section):
            yield f"{indent}{name}:", ""
            yield from _rows(value, f"{key}.", resolved)
            continue
        comment = resolved.origin[key]
        if key in resolved.former:
            before, where = resolved.former[key]
            comment += f" ({where}: {yaml_io.text_of(before)})"
        yield f"{indent}{name}: {yaml_io.text_of(_without_credentials(value))}", redact(" ".join(comment.split()))


def _without_credentials(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_without_credentials, value))
    return redact(value) if isinstance(value, str) else value


def _holds_credentials(section: Section) -> bool:
    values = [getattr(section, name) for name in type(section).model_fields]
    return any(
        _holds_credentials(value) if isinstance(value, Section) else _without_credentials(value) != value
        for value in values
    )


def _method(command: str, *weakest_first: Mapping[str, Given]) -> Given:
    for layer in reversed(weakest_first):
        if "method" in layer:
            return layer["method"]
    if command == "sft":
        return Given("sft", "verb sft", "method", Rank(merging.DEFAULT))
    return Given(Recipe.model_fields["method"].default, "default", "method", Rank(merging.DEFAULT))


def _is_method(value: Any) -> bool:
    return isinstance(value, str) and value in METHODS


def _check_verb(method: Given, command: str) -> None:
    verb = METHODS[method.value].verb
    if command in ("sft", "distill") and verb != command:
        of_command = ", ".join(name for name, m in METHODS.items() if m.verb == command)
        raise UsageError(
            f"{method.place} = {method.value}",
            where=f"expected a method of `distillm {command}` ({of_command})",
            hint=f"try verb: {verb}" if method.at else f"try `distillm {verb}`",
        )


def _stacked(*weakest_first: Mapping[str, Given]) -> tuple[dict[str, Given], dict[str, tuple[Any, str]]]:
    """Return the strongest value of each key, and the value of the next weaker layer."""
    given: dict[str, Given] = {}
    former: dict[str, tuple[Any, str]] = {}
    for layer in weakest_first:
        for key, entry in layer.items():
            before = given.get(key)
            if before and merging.DEFAULT < before.rank.layer < entry.rank.layer and before.value != entry.value:
                former[key] = (before.value, before.origin)
            given[key] = entry
    # In one layer steps win over epochs; a recipe's steps do not outlive a flag that asks for epochs.
    epochs, steps = given.get("train.epochs"), given.get("train.steps")
    if epochs and steps and steps.value is not None and epochs.rank.layer > steps.rank.layer:
        given["train.steps"] = epochs._replace(value=None)
        former["train.steps"] = (steps.value, steps.origin)
    return given, former


def _validated(given: Mapping[str, Given], command: str, problems: Problems) -> Recipe | None:
    """Return the recipe, without the keys that its divergence or its schedule does not have."""
    used: dict[str, Any] = {}
    for key, entry in given.items():
        union, member = _union_at(key, given)
        name = key.rpartition(".")[2]
        if union is None or name in member.model_fields:
            used[key] = entry.value
        elif not union.takes(name, entry.value):
            problems.add(entry.rank, bad(entry, key, command))
    try:
        made = Recipe.model_validate(nested(used))
    except ValidationError as error:
        for detail in error.errors():
            problems.add(*_translated(detail, given, command))
        return None
    return None if problems else made


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into nested sections."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        *parents, name = key.split(".")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    return found


def _union_at(key: str, given: Mapping[str, Given]) -> tuple[TaggedUnion | None, type[Section] | None]:
    """Return the union that a key is of and the member that the given tag chooses; (None, None) outside unions."""
    section = key.rpartition(".")[0]
    union = union_of(Recipe.model_fields[section]) if section in Recipe.model_fields else None
    if union is None:
        return None, None
    tag = given.get(f"{section}.{union.tag}")
    return union, union.member(union.default if tag is None else tag.value)


def _translated(detail: Mapping[str, Any], given: Mapping[str, Given], command: str) -> tuple[Rank, RecipeError]:
    """Put a pydantic complaint in the words of the schema, and say where it belongs."""
    key = _key_of(detail)
    if key is not None:
        return given[key].rank, bad(given[key], key, command)
    # A rule over several fields: its message names them, and the first one that was given is the place to look.
    what, _, hint = str(detail["ctx"]["error"]).partition("; ")
    words = (word.strip(",;:") for word in what.split())
    entry = next((given[word] for word in words if word in given), None)
    if entry is None:
        return Rank(merging.SET), RecipeError(what, hint=hint or None)
    hint = hint.replace("--set ", f"--set {entry.at}")
    return entry.rank, RecipeError(f"{entry.place} = {shown(entry.value)}", where=what, hint=hint or None)


def _key_of(detail: Mapping[str, Any]) -> str | None:
    """Return the dotted key that a pydantic complaint is about; None for a rule over several fields."""
    section, *inner = [str(part) for part in detail["loc"]] or [""]
    union = union_of(Recipe.model_fields[section]) if section in Recipe.model_fields else None
    if union is not None and detail["type"].startswith("union_tag"):
        return f"{section}.{union.tag}"
    if union is not None:
        inner = inner[1:]  # without the tag, which pydantic puts there
    key = section
    for part in [*inner, None]:
        if key in leaves():
            return key
        key = f"{key}.{part}"
    return None


def _preset(method: str, layer: int) -> dict[str, Given]:
    """Return the values that a method stands for, as strong as the given layer."""
    unknown = [key for key in METHODS[method].preset if key not in leaves()]
    if unknown:  # only a method of another package can have one
        raise RecipeError(f"method {method} sets {unknown[0]}: no such key", hint="fix the package that registers it")
    return {key: Given(value, f"method {method}", key, Rank(layer)) for key, value in METHODS[method].preset.items()}


def _unread(recipe: Recipe, given: Mapping[str, Given], held: Mapping[str, Given]) -> dict[str, Given]:
    """Return what was given by hand and this run never uses. A recipe that repeats what holds anyway asks for nothing.

    held: of presets.
    """
    value = partial(value_of, recipe)
    found = {}
    for key, entry in given.items():
        if entry is held.get(key) or _is_read(key, entry, partial(ownership.is_read, value=value)):
            continue
        holds_anyway = held[key].value if key in held else leaves()[key].default
        is_typed = entry.rank.layer > merging.STAGE
        wanted = value(key) if has(recipe, key) else entry.value
        if is_typed or not (wanted == holds_anyway or ownership.is_general(key, value)):
            found[key] = entry
    return found


def _is_read(key: str, entry: Given, reads: Callable[[str], bool]) -> bool:
    """Return whether the run uses the field, or another one that the same flag sets (--dtype)."""
    shared = [f.keys for f in FIELD_FLAGS if f.flag == entry.origin and key in f.keys]
    flags = shared if entry.rank.layer == merging.FLAG else []
    return any(map(reads, (key, *chain(*flags))))


def _left_out(unread: Mapping[str, Given], command: str, from_recipe: Mapping[str, Given]) -> set[str]:
    """Return what the recipe by itself would use and the run does not, since a flag or --set has changed that."""
    own = _method(command, from_recipe)
    preset = _preset(own.value, merging.METHOD) if _is_method(own.value) else {}
    alone, _ = _stacked({"method": own}, preset, from_recipe)

    def value(key: str) -> Any:
        return alone[key].value if key in alone else leaves()[key].default

    return {
        key for key, entry in unread.items() if entry.rank.layer == merging.RECIPE and ownership.is_read(key, value)
    }
