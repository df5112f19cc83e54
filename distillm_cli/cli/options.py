"""Define the options of the commands. Flags of recipe fields are generated from the schema.

    @command("distill", panel=VERBS, examples=("distillm distill --recipe quickstart",))
    def distill(fields: FieldFlags, recipe: RecipeOption = None, sets: Set = None, …) -> None:
        resolved = resolve(command="distill", recipe=recipe, flags=fields, sets=sets)

A parameter of type FieldFlags is replaced by all flags that the command has in ``config/shortcuts.py``. Their type,
choices, help and default are those of the field. A parameter whose type is a data class is replaced by one option for
each of its fields. None means "not given": the value of the recipe or the schema applies. Nothing slow may be imported
here, because ``--help`` imports this file.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, NamedTuple, get_type_hints

import annotated_types
import typer
from typer.core import TyperCommand, TyperGroup

from distillm_cli.config.explain import choices, format_value, leaves, plain_types, takes_list
from distillm_cli.config.methods import METHODS
from distillm_cli.config.shortcuts import FieldFlag, Flag, field_flags
from distillm_cli.config.suite_file import LM_EVAL
from distillm_cli.data.known import dataset_names
from distillm_cli.errors import UsageError

# Panels of the flags that set no field. Those of the others are in config/shortcuts.py.
RECIPE_PANEL = "Recipe"
OUTPUT_PANEL = "Output"

# Groups of commands in `distillm --help`.
VERBS = "Verbs"
OTHER_COMMANDS = "Other commands"

# Suggestions for fields that also take other values: names of data sets.
_KNOWN_NAMES = {"data.source": dataset_names, "eval.suites": dataset_names}


class FieldFlags(dict[str, Flag]):
    """Map dotted keys to the flags that were given for them."""


def collect_field_flags(verb: str, given: dict[str, Any]) -> FieldFlags:
    """Return the flags that were given, for ``config.load.resolve``. Parameters that are None are left out.

    A list may be given in several flags, or with commas. Raises KeyError for a name that is no flag.
    """
    table = {entry.name: entry for entry in field_flags(verb)}
    flags = FieldFlags()
    for name, value in given.items():
        entry = table[name]
        if value is None:
            continue
        if isinstance(value, list):
            value = [part for item in value for part in _list_items(item)]
        for key in entry.keys:
            flags[key] = Flag(entry.flag, value)
    return flags


def _list_items(text: str) -> Iterator[str]:
    """Yield the items of a list with commas. ``lm-eval:a,b`` are the tasks ``lm-eval:a`` and ``lm-eval:b``."""
    prefix = LM_EVAL if text.startswith(LM_EVAL) else ""
    for part in text.removeprefix(prefix).split(","):
        if part.strip():
            yield prefix + part.strip().removeprefix(prefix)


# Options from the schema


def option_words(entry: FieldFlag, verb: str) -> list[str]:
    """Return the words that a flag of a command takes: the choices of its fields, or known names."""
    key = entry.keys[0]
    if key == "method":
        return [name for name, method in METHODS.items() if verb in (method.verb, "plan")]
    if key in _KNOWN_NAMES:
        return _KNOWN_NAMES[key]()
    words = [word for word in choices(key) if all(word in choices(other) for other in entry.keys)]
    return words or list(leaves()[key].examples or ())


def option_help(entry: FieldFlag, verb: str) -> str:
    """Return the help of a flag: the first sentence of its field's description, range, choices and default."""
    key = entry.keys[0]
    field = leaves()[key]
    sentence = re.split(r"(?<=\.)\s", field.description or "")[0].rstrip(".")
    sentence = sentence[:1].upper() + sentence[1:]
    words = option_words(entry, verb)
    if words and not _is_number(key):
        sentence += f": {', '.join(words)}"
    sentence += _range(key, entry.metavar)
    default = "sampled" if entry.off == "--sampled" else format_value(field.default, by_flag=True)
    is_shown = field.default not in (None, ()) and (field.default is not False or entry.off is not None)
    return _escaped(f"{sentence}.") + (rf" [dim]\[default: {_escaped(default)}][/]" if is_shown else "")


def _is_number(key: str) -> bool:
    return bool(plain_types(leaves()[key].annotation) & {int, float}) and not takes_list(key)


def _range(key: str, metavar: str) -> str:
    """Return ``, 0 ≤ A < 1`` for a number with two bounds that are worth showing."""
    signs = {annotated_types.Ge: "≤", annotated_types.Gt: "<", annotated_types.Le: "≤", annotated_types.Lt: "<"}
    low = high = ""
    for bound in leaves()[key].metadata:
        if isinstance(bound, annotated_types.Ge | annotated_types.Gt):
            low = f"{getattr(bound, 'ge', getattr(bound, 'gt', 0)):g} {signs[type(bound)]}"
        if isinstance(bound, annotated_types.Le | annotated_types.Lt):
            value = getattr(bound, "le", getattr(bound, "lt", 0))
            high = f"{signs[type(bound)]} {value:g}" if value < 1000 else ""
    return f", {low} {metavar} {high}" if low and high else ""


def _option(entry: FieldFlag, verb: str) -> Any:
    """Return the annotation of a command's parameter for this flag."""
    key = entry.keys[0]
    words = option_words(entry, verb)
    numbers = plain_types(leaves()[key].annotation) & {int, float}
    keywords: dict[str, Any] = {}
    kind: Any = str
    if plain_types(leaves()[key].annotation) == {bool}:
        kind = bool
    elif takes_list(key):
        kind = list[str]
        keywords["callback"] = check_named
    elif numbers:
        kind = float if float in numbers else int
        if words:
            keywords["parser"] = _number_or_word(kind, words)
    if words and kind is not bool:
        keywords["autocompletion"] = _completion(key, words)
    declaration = entry.flag if entry.off is None else f"{entry.flag}/{entry.off}"
    option = typer.Option(
        declaration,
        metavar=entry.metavar,
        help=option_help(entry, verb),
        show_default=False,
        rich_help_panel=entry.panel,
        **keywords,
    )
    return Annotated[kind | None, option]


def _number_or_word(kind: type, words: list[str]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return text if text in words else kind(text)

    return parse


def _completion(key: str, words: list[str]) -> Callable[[str], list[Any]]:
    def complete(incomplete: str) -> list[Any]:
        if key == "method":
            return [(name, summary) for name, summary in complete_methods(incomplete) if name in words]
        return _completed(incomplete, words)

    return complete


def _escaped(text: str) -> str:
    """Return text with its brackets escaped, so that it is not read as markup."""
    return text.replace("[", r"\[")


# Commands


class PlainCommand(TyperCommand):
    """Define a command with plain metavars in its help."""

    def get_params(self, context: Any) -> list[Any]:
        return _with_plain_metavars(super().get_params(context))


class PlainGroup(TyperGroup):
    """Define a group of commands with plain metavars in its help."""

    def get_params(self, context: Any) -> list[Any]:
        return _with_plain_metavars(super().get_params(context))


def _with_plain_metavars(params: list[Any]) -> list[Any]:
    """Show parameters in the help by their metavars alone: no ``<bool>`` for flags, no ``<str>`` for arguments."""
    for param in params:
        if param.param_type_name == "argument":
            label = param.metavar if param.required else f"[{param.metavar}]"
            param.get_usage_pieces = lambda _, label=label: [label]
            param.display_type_rich = lambda ctx: ""
        elif param.metavar is None:
            param.metavar = ""
    return params


class Command(NamedTuple):
    """Hold a command of the program: its name, its function, its group in the help, and its examples."""

    name: str
    run: Callable[..., None]
    panel: str
    epilog: str


def command(name: str, *, panel: str, examples: tuple[str, ...]) -> Callable[[Callable[..., None]], Command]:
    """Turn a function into a command, with options in place of its parameters."""

    def decorate(function: Callable[..., None]) -> Command:
        return Command(name, expand(name, function), panel, epilog(*examples))

    return decorate


def expand(verb: str, function: Callable[..., None]) -> Callable[..., None]:
    """Return the function with its FieldFlags and data classes replaced by one parameter per option."""
    hints = get_type_hints(function, include_extras=True)
    groups = {
        parameter.name: list(_parameters(verb, parameter, hints[parameter.name]))
        for parameter in inspect.signature(function).parameters.values()
    }

    @wraps(function)
    def run(**values: Any) -> None:
        arguments = {}
        for name, group in groups.items():
            given = {parameter.name: values[parameter.name] for parameter in group}
            if hints[name] is FieldFlags:
                arguments[name] = collect_field_flags(verb, given)
            elif is_dataclass(hints[name]):
                arguments[name] = hints[name](**given)
            else:
                arguments[name] = given[name]
        function(**arguments)

    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    run.__doc__ = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)  # typer prints line breaks
    parameters = [parameter for group in groups.values() for parameter in group]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameters(verb: str, parameter: inspect.Parameter, hint: Any) -> Iterator[inspect.Parameter]:
    """Yield the command-line parameters that replace one parameter of a command."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    if hint is FieldFlags:
        for entry in field_flags(verb):
            yield inspect.Parameter(entry.name, keyword, default=None, annotation=_option(entry, verb))
    elif is_dataclass(hint):
        annotations = get_type_hints(hint, include_extras=True)
        for field in fields(hint):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            yield inspect.Parameter(field.name, keyword, default=default, annotation=annotations[field.name])
    else:
        yield parameter.replace(kind=keyword, annotation=hint)


def epilog(*lines: str) -> str:
    """Return worked examples as a command's epilog: one line each, as they are typed."""
    return "\n".join(["[bold]Examples[/]", *map(_escaped, lines)])


# Completion: names that begin with the typed text.


def complete_methods(incomplete: str) -> list[tuple[str, str]]:
    return [(method.name, method.summary) for method in METHODS.values() if method.name.startswith(incomplete)]


def complete_recipes(incomplete: str) -> list[str]:
    from distillm_cli.config.load import shipped

    return [name for name in shipped() if name.startswith(incomplete)]


def complete_pipelines(incomplete: str) -> list[str]:
    """Return the recipes for `distillm run`."""
    from distillm_cli.config.pipeline_recipe import is_pipeline

    return [name for name in complete_recipes(incomplete) if is_pipeline(name)]


def complete_data(incomplete: str) -> list[str]:
    return _completed(incomplete, dataset_names())


def complete_field(incomplete: str) -> list[str]:
    """Return keys of recipes."""
    return [key for key in leaves() if key.startswith(incomplete)]


def complete_set(incomplete: str) -> list[str]:
    """Return keys of recipes, and after ``=`` the choices of the key."""
    key, equals, word = incomplete.partition("=")
    if not equals:
        return [f"{name}=" for name in leaves() if name.startswith(key)]
    words = choices(key) if key in leaves() else []
    return [f"{key}={choice}" for choice in words if choice.startswith(word)]


def complete_pipeline_set(incomplete: str) -> list[str]:
    """Return keys of a pipeline's defaults. Its stages' names are not known here."""
    inner = incomplete.removeprefix("defaults.")
    return [f"defaults.{text}" for text in complete_set(inner)] if incomplete.startswith("defaults.") else ["defaults."]


def _completed(incomplete: str, words: list[str]) -> list[str]:
    """Return completions of the last word of a list with commas."""
    rest, comma, last = incomplete.rpartition(",")
    return [rest + comma + word for word in words if word.startswith(last)]


# Options that set no field


def switch(flag: str, help: str, panel: str) -> Any:
    """Return an option without a value."""
    return typer.Option(flag, metavar="", help=help, rich_help_panel=panel)


def named(flag: str, metavar: str, help: str, panel: str) -> Any:
    """Return an option whose value is a name, an address or a path, which must not be empty."""
    return typer.Option(flag, metavar=metavar, callback=check_named, help=help, rich_help_panel=panel)


def check_named(parameter: typer.CallbackParam, value: Any) -> Any:
    """Raise UsageError for an empty name, such as the value of an unset shell variable.

    Checks every item of a list; a comma alone is empty too.
    """
    items = [value] if isinstance(value, str) else value or []
    if any(not item.strip(" ,") for item in items):
        flag = next((opt for opt in parameter.opts if opt.startswith("-")), parameter.metavar)
        raise UsageError(
            "usage.invalid_value",
            f"{flag} = (empty)",
            where="expected a name",
            hint="drop it, or check the variable",
        )
    return value


RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="Recipe: a shipped name (see distillm recipes ls) or a file.",
        autocompletion=complete_recipes,
        rich_help_panel=RECIPE_PANEL,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Set any field of a recipe. May be repeated.",
        autocompletion=complete_set,
        rich_help_panel=RECIPE_PANEL,
    ),
]
DryRun = Annotated[
    bool,
    switch("--dry-run", "Print the resolved recipe with the origin of each value.", RECIPE_PANEL),
]
Output = Annotated[
    str | None,
    named("--output", "DIR", r"Output directory. [dim]\[default: runs/<name>][/]", OUTPUT_PANEL),
]
Resume = Annotated[
    bool,
    switch("--resume", "Resume from the newest checkpoint in --output.", OUTPUT_PANEL),
]
Overwrite = Annotated[
    bool,
    switch("--overwrite", "Replace the run in --output.", OUTPUT_PANEL),
]
Json = Annotated[
    bool,
    switch("--json", "Print the result as one JSON object on stdout.", OUTPUT_PANEL),
]
Quiet = Annotated[
    bool,
    switch("--quiet", "Print only the result, warnings and errors, no progress.", OUTPUT_PANEL),
]
Strict = Annotated[
    bool,
    switch(
        "--strict",
        "Stop before the first step if a check warns: ends, templates, teacher, rows, memory, disk.",
        OUTPUT_PANEL,
    ),
]
Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="NAME",
        callback=check_named,
        help="Also log to a tracker: wandb, trackio, tensorboard, mlflow.",
        autocompletion=lambda incomplete: _completed(incomplete, ["wandb", "trackio", "tensorboard", "mlflow"]),
        rich_help_panel=OUTPUT_PANEL,
    ),
]
Push = Annotated[
    str | None,
    named("--push", "NAME", "Upload the output directory to this repository of the hub.", OUTPUT_PANEL),
]
PushDryRun = Annotated[
    bool,
    switch("--push-dry-run", "With --push: only list the files to upload.", OUTPUT_PANEL),
]
Debug = Annotated[bool, switch("--debug", "Print tracebacks with errors.", OUTPUT_PANEL)]


@dataclass(frozen=True)
class ReportingOptions:
    """Hold the options for what a command prints."""

    json: Json = False
    quiet: Quiet = False
    debug: Debug = False
