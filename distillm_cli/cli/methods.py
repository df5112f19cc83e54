"""List the methods or show one of them: ``distillm methods``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distillm_cli.cli import options
from distillm_cli.errors import UsageError
from distillm_cli.utils.stdout import write_json, write_stdout

if TYPE_CHECKING:
    from distillm_cli.config.load import Resolved
    from distillm_cli.config.methods import Method

methods_app = typer.Typer(
    cls=options.PlainGroup,
    epilog=options.epilog(
        "distillm methods",
        "distillm methods show ab",
        "distillm distill --recipe quickstart --method ab --schedule adaptive",
    ),
)

MethodName = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Name of a method.",
        autocompletion=options.complete_methods,
        show_default=False,
    ),
]
COLUMNS = ("name", "paper", "objective", "sequences", "needs")


@methods_app.callback(invoke_without_command=True)
def list_methods(ctx: typer.Context, as_json: options.Json = False, debug: options.Debug = False) -> None:
    """List the methods with paper, objective, sequences and required inputs."""
    if ctx.invoked_subcommand is not None:
        return
    from distillm_cli.config.methods import METHODS

    rows = [_facts(method) for method in METHODS.values()]
    if as_json:
        write_json({"command": "methods", "status": "ok", "methods": rows})
    elif sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*COLUMNS, box=None, pad_edge=False, header_style="bold")
        for row in rows:
            name, *cells = _cells(row)
            table.add_row(f"[cyan]{name}[/]", *cells)
        Console().print(table)
    else:
        write_stdout("".join("\t".join(_cells(row)) + "\n" for row in rows))


@methods_app.command("show", cls=options.PlainCommand)
def show_method(name: MethodName, as_json: options.Json = False, debug: options.Debug = False) -> None:
    """Show one method: its settings, its parameters, and an example command."""
    from distillm_cli.config.methods import METHODS

    if name not in METHODS:
        from distillm_cli.config.explain import nearest_choice

        close = nearest_choice(name, list(METHODS))
        hint = f"did you mean {close}?" if close else "`distillm methods` lists them"
        raise UsageError(
            "usage.unknown_method", f"no method named {name}", where=f"methods: {', '.join(METHODS)}", hint=hint
        )
    method = METHODS[name]
    resolved = _resolved(method)
    parameters = {key: _parameter(key, resolved) for key in _keys(method, resolved)}
    facts = _facts(method) | {"summary": method.summary, "parameters": parameters, "example": _example(method)}
    if as_json:
        write_json({"command": "methods show", "status": "ok", "method": facts})
    else:
        write_stdout("".join(f"{line}\n" for line in _page(facts)))


def _facts(method: Method) -> dict[str, Any]:
    """Return a method as a row of the table, and as ``--json`` prints it."""
    from distillm_cli.config.field_usage import describe_objective

    recipe = _resolved(method).recipe
    return {
        "name": method.name,
        "verb": method.verb,
        "summary": method.summary,
        "paper": method.paper,
        "objective": method.objective or describe_objective(recipe.objective),
        "sequences": method.trains_on(recipe.schedule.kind),
        "needs": list(method.needs),
    }


def _resolved(method: Method) -> Resolved:
    from distillm_cli.config.load import resolve

    return resolve(command=method.verb, sets=[f"method={method.name}"])


def _keys(method: Method, resolved: Resolved) -> list[str]:
    """Return the fields that the method sets and the parameters that it uses, in the schema's order."""
    from functools import partial

    from distillm_cli.config.explain import leaves
    from distillm_cli.config.field_usage import parameters, value_of

    keys = {*method.preset, *parameters(partial(value_of, resolved.recipe))}
    return [key for key in leaves() if key in keys]


def _parameter(key: str, resolved: Resolved) -> dict[str, Any]:
    from distillm_cli.config.explain import expected_values, leaves
    from distillm_cli.config.field_usage import value_of

    return {
        "value": value_of(resolved.recipe, key),
        "from": resolved.origin[key],
        "expected": expected_values(key),
        "means": leaves()[key].description,
    }


def _page(facts: dict[str, Any]) -> Iterator[str]:
    from textwrap import wrap

    from distillm_cli.config.explain import format_value

    yield f"{facts['name']}: {facts['summary']}"
    yield ""
    for name in COLUMNS[1:]:
        yield f"{name + ':':<11}{_cell(facts[name])}"
    for title, is_preset in (("Preset values", True), ("Other parameters, with defaults", False)):
        parameters = {k: p for k, p in facts["parameters"].items() if (p["from"] != "default") == is_preset}
        if not parameters:
            continue
        yield ""
        yield title
        for key, parameter in parameters.items():
            yield f"  {key} = {format_value(parameter['value'])}    ({parameter['expected']})"
            yield from (f"      {line}" for line in wrap(parameter["means"], 100))
    yield ""
    yield "Example"
    yield f"  {facts['example']}"


def _example(method: Method) -> str:
    if method.verb == "sft":
        return "distillm sft --recipe quickstart-teacher"
    return f"distillm distill --recipe quickstart --method {method.name}"


def _cells(row: dict[str, Any]) -> list[str]:
    """Return a row of the table. It has the paper's short name and number. ``show`` has the full title."""
    reference, bracket, _ = row["paper"].partition(")")
    short = row | {"paper": reference + bracket}
    return [_cell(short[column]) for column in COLUMNS]


def _cell(value: str | list[str]) -> str:
    return value if isinstance(value, str) else ", ".join(value)
