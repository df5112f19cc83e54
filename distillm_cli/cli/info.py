"""Print versions for a bug report, or describe a field of a recipe: ``distillm env`` and ``distillm explain``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import distillm_cli
from distillm_cli.cli import options
from distillm_cli.cli.options import command
from distillm_cli.errors import UsageError
from distillm_cli.utils.stdout import write_json, write_stdout

FieldName = Annotated[
    str,
    typer.Argument(
        metavar="SECTION.KEY",
        help="Name of a recipe field, such as train.lr.",
        autocompletion=options.complete_field,
        show_default=False,
    ),
]


@command("env", panel=options.OTHER_COMMANDS, examples=("distillm env", "distillm env --json"))
def env(as_json: options.Json = False, debug: options.Debug = False) -> None:
    """Print versions and devices for a bug report."""
    from distillm_cli.runs.machine import environment

    found = {"distillm": distillm_cli.__version__, **environment()}
    if as_json:
        write_json({"command": "env", "status": "ok", **found})
        return
    width = max(map(len, found))
    write_stdout("".join(f"{name:<{width}}  {value}\n" for name, value in found.items()))


@command(
    "explain",
    panel=options.OTHER_COMMANDS,
    examples=("distillm explain train.lr", "distillm explain objective.alpha", "distillm explain batch_size"),
)
def explain_field(name: FieldName, as_json: options.Json = False, debug: options.Debug = False) -> None:
    """Describe a field of a recipe: its meaning, values, default, flags, and which runs use it."""
    found = _field(name)
    if as_json:
        write_json({"command": "explain", "status": "ok", **found})
        return
    lines = [found["key"], f"  {found['description']}", ""]
    for key in ("expected", "default", "flags", "used_by", "only_with", "set_it_with"):
        if found[key]:
            lines.append(f"  {key.replace('_', ' '):<12} {found[key]}")
    write_stdout("\n".join(lines) + "\n")


def _field(name: str) -> dict[str, Any]:
    """Return the description of a field. name: its dotted key, or the last part of it. Raises UsageError."""
    from distillm_cli.config.explain import condition, expected_values, format_value, leaves, nearest_key, section_keys
    from distillm_cli.config.field_usage import commands_using, describe_users
    from distillm_cli.config.shortcuts import FIELD_FLAGS

    key = name
    if key not in leaves():
        close = nearest_key(name)
        if close is None:
            raise UsageError(
                "usage.unknown_field", f"no field {name}", hint="`distillm distill --dry-run` prints every field"
            )
        if close not in leaves():
            raise UsageError(
                "usage.section_not_value",
                f"{close} is a section, not a field",
                hint=f"its fields: {', '.join(section_keys()[close])}",
            )
        if close.rpartition(".")[2] != name:
            raise UsageError("usage.unknown_field", f"no field {name}", hint=f"did you mean {close}?")
        key = close
    field = leaves()[key]
    flags = [f"{entry.flag} ({', '.join(entry.verbs)})" for entry in FIELD_FLAGS if key in entry.keys]
    return {
        "key": key,
        "description": field.description or "",
        "expected": expected_values(key),
        "default": format_value(field.default),
        "flags": ", ".join(flags),
        "used_by": commands_using(key),
        "only_with": "" if condition(key) is None else describe_users(key).replace(", and to ", "; "),
        "set_it_with": f"--set {key}=VALUE",
    }
