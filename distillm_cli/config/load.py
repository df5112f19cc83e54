"""Resolve YAML, flags and ``--set`` into one recipe that records the origin of each value.

Precedence, weakest first: schema < method preset < recipe < flags < ``--set``. If a flag selects another method than the
recipe, the preset of that method overrides the recipe's objective and sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distillm_cli.config import field_usage, merging, yaml_io
from distillm_cli.config.explain import format_value, leaves, union_of
from distillm_cli.config.field_usage import has_field, value_of
from distillm_cli.config.fields import Section, TaggedUnion
from distillm_cli.config.merging import ErrorCollector, GivenValue, Priority, invalid_value_error
from distillm_cli.config.methods import METHODS
from distillm_cli.config.schema import Recipe
from distillm_cli.config.shortcuts import FIELD_FLAGS
from distillm_cli.errors import RecipeError, UsageError
from distillm_cli.utils.text import HIDDEN, redact


@dataclass(frozen=True)
class Resolved:
    """Hold a recipe with every value filled in.

    origin: dotted key → "default", "method distillm", "quickstart.yaml:12", "--alpha" or "--set". overridden: dotted key →
    (value, origin) of a recipe or method value that a stronger layer replaced. notes: sentences about recipe values that
    were dropped. name: the recipe's name, None without a recipe.
    """

    recipe: Recipe
    origin: dict[str, str]
    overridden: dict[str, tuple[Any, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    name: str | None = None


def shipped() -> dict[str, Path]:
    """Return the shipped recipes: name → file. In a wheel they are inside the package, in a checkout next to it."""
    package = Path(__file__).resolve().parent.parent
    inside, checkout = package / "_recipes", package.parent / "recipes"
    if inside.is_dir():
        return _by_name(inside)
    if (package.parent / "pyproject.toml").is_file():  # any other "recipes" in site-packages is not ours
        return _by_name(checkout)
    return {}


def _by_name(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def locate(recipe: str | Path) -> Path:
    """Return the file of a shipped name (a str) or a path. Raises RecipeError with the nearest name if there is none."""
    text, known = str(recipe), shipped()
    if isinstance(recipe, str) and text in known:
        return known[text]
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    if path.is_dir() and (path / "recipe.yaml").is_file():
        raise RecipeError("recipe.not_found", f"{text} is a directory", hint=f"try --recipe {path / 'recipe.yaml'}")
    if isinstance(recipe, Path) or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise RecipeError(
            "recipe.not_found", f"no recipe file {text}", hint="`distillm recipes ls` lists the shipped ones"
        )
    close = get_close_matches(text, known, n=1, cutoff=0.5)
    raise RecipeError(
        "recipe.not_found",
        f"no recipe named {format_value(text)}",
        where=f"shipped: {', '.join(known)}",
        hint=f"try --recipe {close[0]}" if close else "or give the path of a file",
    )


def resolve(
    *,
    command: str,
    recipe: str | Path | Resolved | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Iterable[str] | None = None,
) -> Resolved:
    """Resolve a recipe file, flags and ``--set`` into the recipe of a run.

    command: the verb; it decides the default method, and refuses methods of the other verb. recipe: a shipped name
    (str), a path, or a recipe that was resolved before. flags: dotted key → Flag(name, value) or a bare value; None is
    "not given". sets: "section.key=value" texts, read by YAML's rules.

    A value given by hand that the run does not use (``--alpha`` with ``--method kd``) is an error. `generate` and `eval`
    do not train and take any recipe. If a flag selects another method, the recipe's values for its own method are dropped
    and a note lists them.

    Raises RecipeError for the first problem, in file order, with the number of further ones; UsageError for contradicting
    flags and for a method of the other verb.
    """
    problems = ErrorCollector()
    if isinstance(recipe, Resolved):
        typed = (merging.from_flags(flags or {}), merging.from_sets(sets or (), problems))
        return _resolve_again(command, recipe, typed, problems)
    path = locate(recipe) if recipe is not None else None
    label = path.name if path and recipe == path.stem else str(recipe)
    from_recipe = merging.from_recipe(path, label, problems, str(recipe)) if path else {}
    from_flags = merging.from_flags(flags or {})
    from_sets = merging.from_sets(sets or (), problems)

    resolved = resolve_layers(
        command, (from_recipe, from_flags, from_sets), problems, path.stem if path else None, label
    )
    if resolved is None or problems:
        raise problems.first()
    return resolved


def _resolve_again(
    command: str, earlier: Resolved, typed: Sequence[Mapping[str, GivenValue]], problems: ErrorCollector
) -> Resolved:
    """Resolve layers over the values that were given for a resolved recipe, which keep their origins."""
    label = earlier.name or "recipe"
    chosen = ("default", "method ", "verb ", "auto: ")  # origins of values that were not given
    given = {
        key: GivenValue(value_of(earlier.recipe, key), origin, f"{label}: {key}", Priority(merging.RECIPE, position))
        for position, (key, origin) in enumerate(earlier.origin.items())
        if not origin.startswith(chosen)
    }
    resolved = resolve_layers(command, (given, *typed), problems, earlier.name, label)
    if resolved is None or problems:
        raise problems.first()
    same = {key for key, origin in resolved.origin.items() if earlier.origin.get(key) == origin}
    overridden = {key: value for key, value in earlier.overridden.items() if key in same}
    return replace(resolved, overridden=overridden | resolved.overridden, notes=earlier.notes + resolved.notes)


def resolve_layers(
    command: str,
    weakest_first: Sequence[Mapping[str, GivenValue]],
    problems: ErrorCollector,
    name: str | None = None,
    label: str | None = None,
) -> Resolved | None:
    """Resolve layers of values over the preset of their method. Return None if problems were added to ``problems``.

    label: the recipe's name in notes. Shared values of a pipeline that this stage does not use are dropped.
    """
    recipe_layers = [{k: e for k, e in layer.items() if e.priority.layer <= merging.RECIPE} for layer in weakest_first]
    from_recipe = {key: entry for layer in recipe_layers for key, entry in layer.items()}
    method = _chosen_method(command, *weakest_first)
    preset, method_override = {"method": method}, {}
    if _is_method(method.value):
        _check_verb(method, command)
        preset |= _preset_values(method.value, merging.METHOD)
        recipe_method = from_recipe.get("method", method)  # a recipe without a method is valid for any method
        if method.priority.layer > merging.RECIPE and method.value != recipe_method.value:
            # Number of epochs and learning rate depend on the models of the recipe, not on the method.
            method_override = {
                k: v for k, v in _preset_values(method.value, merging.FLAG).items() if not k.startswith("train.")
            }
    else:
        problems.add(method.priority, invalid_value_error(method, "method", command))

    typed_layers = [{k: e for k, e in layer.items() if e.priority.layer > merging.RECIPE} for layer in weakest_first]
    typed = {key: entry for layer in typed_layers for key, entry in layer.items()}
    problems.add_conflict(typed.get("train.epochs"), typed.get("train.steps"))
    given, overridden = _merge_layers(preset, from_recipe, method_override, *typed_layers)
    validated = _validate(given, command, problems)
    if validated is None:
        return None
    notes: tuple[str, ...] = ()
    value, preset_values = partial(value_of, validated), {**preset, **method_override}
    if not field_usage.trains(command):
        for key, entry in given.items():
            if entry.priority.layer > merging.STAGE and (key == "method" or entry is not preset_values.get(key)):
                is_used = partial(field_usage.is_used_without_training, given=entry, value=value, command=command)
                if not _is_used(key, entry, is_used):
                    problems.add(entry.priority, field_usage.unused_field_error(key, entry, value, command))
        if problems:
            return None
    else:
        unused = _unused_values(validated, given, preset_values)
        unused_shared = {
            k for k, entry in unused.items() if entry.priority.layer in (merging.SHARED, merging.SHARED_SET)
        }
        dropped = _dropped_from_recipe(unused, command, from_recipe) | unused_shared
        for key in unused.keys() - dropped:
            problems.add(given[key].priority, field_usage.unused_field_error(key, given[key], value, command))
        if problems:
            return None
        if dropped:
            overridden |= {key: (given[key].value, given[key].origin) for key in dropped}
            given = {key: entry for key, entry in given.items() if key not in dropped}
            validated = _validate(given, command, problems)
            if validated is None:
                return None
        if noted_keys := dropped - unused_shared:
            notes = (f"{label or name}: {_describe_ignored(validated, noted_keys)}",)
    origin = {key: given[key].origin if key in given else "default" for key in leaves() if has_field(validated, key)}
    return Resolved(validated, origin, overridden, notes, name)


def _describe_ignored(recipe: Recipe, ignored: Collection[str]) -> str:
    """Return which keys of a recipe this run ignores, and why."""
    run = f"method {recipe.method}, objective {recipe.objective.divergence}, schedule {recipe.schedule.kind}"
    run += f", data {recipe.data.title}" if any(key.startswith("data.") for key in ignored) else ""
    keys = ", ".join(key for key in leaves() if key in ignored)
    return f"ignored, since this run ({run}) does not use them: {keys}"


def with_resolved_values(resolved: Resolved, values: Mapping[str, tuple[Any, str]]) -> Resolved:
    """Return the recipe with values that were determined when the run started. values: dotted key → (value, origin)."""
    recipe = resolved.recipe
    for key, (value, _) in values.items():
        section, _, name = key.rpartition(".")
        part = getattr(recipe, section).model_copy(update={name: value})
        recipe = recipe.model_copy(update={section: part})
    origin = resolved.origin | {key: origin for key, (_, origin) in values.items()}
    return replace(resolved, recipe=recipe, origin=origin)


def load_resolved(path: str | Path) -> Recipe:
    """Return the recipe in a file, such as the ``recipe.yaml`` of an output directory. Raises RecipeError."""
    return resolve(command="eval", recipe=Path(path)).recipe


def to_yaml(resolved: Resolved, with_origin: bool = True) -> str:
    """Return the whole recipe as YAML that reads back the same. with_origin: each line ends with its value's origin.

    Credentials in addresses are removed, and a note reports it. A value that overrides another shows both:
    ``lr: 0.0001  # --lr (dolly-gpt2.yaml:14: 0.0005)``.
    """
    rows = [*_yaml_rows(resolved.recipe, "", resolved)]
    if not with_origin:
        return "".join(f"{line}\n" for line, _ in rows)
    column = min(max(len(line) for line, comment in rows if comment), 56)
    notes = "".join(f"# note: {redact(note)}\n" for note in resolved.notes)
    notes += (
        f"# note: {HIDDEN} replaces credentials, which are not saved: set these values again\n"
        * _holds_credentials(resolved.recipe)
    )
    return notes + "".join(f"{line:<{column}}  # {comment}\n" if comment else f"{line}\n" for line, comment in rows)


def _yaml_rows(section: Section, prefix: str, resolved: Resolved) -> Iterable[tuple[str, str]]:
    """Yield (YAML line, comment) for each field, with sections indented under their names."""
    indent = "  " * prefix.count(".")
    for name in type(section).model_fields:
        value, key = getattr(section, name), prefix + name
        if isinstance(value, Section):
            yield f"{indent}{name}:", ""
            yield from _yaml_rows(value, f"{key}.", resolved)
            continue
        comment = resolved.origin[key]
        if key in resolved.overridden:
            previous, where = resolved.overridden[key]
            comment += f" ({where}: {yaml_io.text_of(previous)})"
        yield f"{indent}{name}: {yaml_io.text_of(_without_credentials(value))}", redact(" ".join(comment.split()))


def _without_credentials(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_without_credentials, value))
    if isinstance(value, Section):  # of a list
        return value.model_copy(update={name: _without_credentials(part) for name, part in value})
    return redact(value) if isinstance(value, str) else value


def _holds_credentials(section: Section) -> bool:
    values = [getattr(section, name) for name in type(section).model_fields]
    return any(
        _holds_credentials(value) if isinstance(value, Section) else _without_credentials(value) != value
        for value in values
    )


def _chosen_method(command: str, *weakest_first: Mapping[str, GivenValue]) -> GivenValue:
    for layer in reversed(weakest_first):
        if "method" in layer:
            return layer["method"]
    if command == "sft":
        return GivenValue("sft", "verb sft", "method", Priority(merging.DEFAULT))
    return GivenValue(Recipe.model_fields["method"].default, "default", "method", Priority(merging.DEFAULT))


def _is_method(value: Any) -> bool:
    return isinstance(value, str) and value in METHODS


def _check_verb(method: GivenValue, command: str) -> None:
    verb = METHODS[method.value].verb
    if command in ("sft", "distill") and verb != command:
        of_command = ", ".join(name for name, m in METHODS.items() if m.verb == command)
        raise UsageError(
            "usage.unknown_method",
            f"{method.location} = {method.value}",
            where=f"expected a method of `distillm {command}` ({of_command})",
            hint=f"try verb: {verb}" if method.prefix else f"try `distillm {verb}`",
        )


def _merge_layers(*weakest_first: Mapping[str, GivenValue]) -> tuple[dict[str, GivenValue], dict[str, tuple[Any, str]]]:
    """Return the strongest value of each key, and the weaker values that were overridden."""
    given: dict[str, GivenValue] = {}
    overridden: dict[str, tuple[Any, str]] = {}
    for layer in weakest_first:
        for key, entry in layer.items():
            previous = given.get(key)
            if (
                previous
                and merging.DEFAULT < previous.priority.layer < entry.priority.layer
                and previous.value != entry.value
            ):
                overridden[key] = (previous.value, previous.origin)
            given[key] = entry
    # In one layer steps take precedence over epochs. Epochs from a stronger layer override steps.
    epochs, steps = given.get("train.epochs"), given.get("train.steps")
    if epochs and steps and steps.value is not None and epochs.priority.layer > steps.priority.layer:
        given["train.steps"] = epochs._replace(value=None)
        overridden["train.steps"] = (steps.value, steps.origin)
    return given, overridden


def _validate(given: Mapping[str, GivenValue], command: str, problems: ErrorCollector) -> Recipe | None:
    """Validate the values as a recipe, without the keys that its divergence or schedule does not have."""
    used: dict[str, Any] = {}
    for key, entry in given.items():
        selected = _selected_member(key, given)
        name = key.rpartition(".")[2]
        if selected is None or name in selected[1].model_fields:
            used[key] = entry.value
        elif not selected[0].takes(name, entry.value):
            problems.add(entry.priority, invalid_value_error(entry, key, command))
    try:
        validated = Recipe.model_validate(nested(used))
    except ValidationError as error:
        for detail in error.errors():
            problems.add(*_validation_problem(detail, given, command))
        return None
    return None if problems else validated


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


def _selected_member(key: str, given: Mapping[str, GivenValue]) -> tuple[TaggedUnion[Section], type[Section]] | None:
    """Return the union of a key and the member that the given tag selects; None outside unions."""
    section = key.rpartition(".")[0]
    union = union_of(Recipe.model_fields[section]) if section in Recipe.model_fields else None
    if union is None:
        return None
    tag = given.get(f"{section}.{union.tag}")
    return union, union.member(union.default if tag is None else tag.value)


def _validation_problem(
    detail: Mapping[str, Any], given: Mapping[str, GivenValue], command: str
) -> tuple[Priority, RecipeError]:
    """Translate a pydantic error into a RecipeError with its priority."""
    key = _field_of_error(detail)
    if key is not None:
        return given[key].priority, invalid_value_error(given[key], key, command)
    # A rule over several fields: its message names them, and the first one that was given is reported.
    what, _, hint = str(detail["ctx"]["error"]).partition("; ")
    words = (word.strip(",;:") for word in what.split())
    entry = next((given[word] for word in words if word in given), None)
    if entry is None:
        return Priority(merging.SET), RecipeError("recipe.fields_conflict", what, hint=hint or None)
    hint = hint.replace("--set ", f"--set {entry.prefix}")
    return entry.priority, RecipeError(
        "recipe.fields_conflict", f"{entry.location} = {format_value(entry.value)}", where=what, hint=hint or None
    )


def _field_of_error(detail: Mapping[str, Any]) -> str | None:
    """Return the dotted key of a pydantic error; None for a rule over several fields."""
    section, *inner = [str(part) for part in detail["loc"]] or [""]
    union = union_of(Recipe.model_fields[section]) if section in Recipe.model_fields else None
    if union is not None and detail["type"].startswith("union_tag"):
        return f"{section}.{union.tag}"
    if union is not None:
        inner = inner[1:]  # without the tag that pydantic inserts
    key = section
    for part in [*inner, None]:
        if key in leaves():
            return key
        key = f"{key}.{part}"
    return None


def _preset_values(method: str, layer: int) -> dict[str, GivenValue]:
    """Return the values of a method's preset with the priority of the given layer."""
    unknown = [key for key in METHODS[method].preset if key not in leaves()]
    if unknown:  # only a method of another package can have one
        raise RecipeError(
            "recipe.unknown_field",
            f"method {method} sets {unknown[0]}: no such key",
            hint="fix the package that registers it",
        )
    return {
        key: GivenValue(value, f"method {method}", key, Priority(layer))
        for key, value in METHODS[method].preset.items()
    }


def _unused_values(
    recipe: Recipe, given: Mapping[str, GivenValue], preset_values: Mapping[str, GivenValue]
) -> dict[str, GivenValue]:
    """Return the given values that this run does not use, without recipe values that equal the preset or the default."""
    value = partial(value_of, recipe)
    found = {}
    for key, entry in given.items():
        if entry is preset_values.get(key) or _is_used(key, entry, partial(field_usage.is_used, value=value)):
            continue
        value_without_it = preset_values[key].value if key in preset_values else leaves()[key].default
        is_typed = entry.priority.layer > merging.STAGE
        new_value = value(key) if has_field(recipe, key) else entry.value
        if is_typed or not (new_value == value_without_it or field_usage.is_general(key, value)):
            found[key] = entry
    return found


def _is_used(key: str, entry: GivenValue, is_used: Callable[[str], bool]) -> bool:
    """Return whether the run uses the field, or another field that the same flag sets (--dtype)."""
    shared = [f.keys for f in FIELD_FLAGS if f.flag == entry.origin and key in f.keys]
    flags = shared if entry.priority.layer == merging.FLAG else []
    return any(map(is_used, (key, *chain(*flags))))


def _dropped_from_recipe(
    unused: Mapping[str, GivenValue], command: str, from_recipe: Mapping[str, GivenValue]
) -> set[str]:
    """Return the keys that the recipe alone would use and the run does not, because a flag or --set changed that."""
    recipe_method = _chosen_method(command, from_recipe)
    preset = _preset_values(recipe_method.value, merging.METHOD) if _is_method(recipe_method.value) else {}
    recipe_values, _ = _merge_layers({"method": recipe_method}, preset, from_recipe)

    def value(key: str) -> Any:
        return recipe_values[key].value if key in recipe_values else leaves()[key].default

    return {
        key
        for key, entry in unused.items()
        if entry.priority.layer == merging.RECIPE and field_usage.is_used(key, value)
    }
