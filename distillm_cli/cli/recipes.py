"""List, show, copy and check recipes, and print their JSON Schema: ``distillm recipes`` and ``distillm schema``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from distillm_cli.cli import options
from distillm_cli.cli.options import command
from distillm_cli.cli.streams import print_error
from distillm_cli.errors import RecipeError, UsageError
from distillm_cli.utils.stdout import write_json, write_stdout

recipes_app = typer.Typer(
    cls=options.PlainGroup,
    no_args_is_help=True,
    epilog=options.epilog(
        "distillm recipes ls",
        "distillm recipes show dolly-gpt2",
        "distillm recipes cp quickstart my.yaml",
        "distillm recipes validate my.yaml",
    ),
)

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="NAME|FILE",
        help="Recipe: a shipped name or a file.",
        autocompletion=options.complete_recipes,
        show_default=False,
    ),
]


@recipes_app.command("ls", cls=options.PlainCommand)
def list_recipes(as_json: options.Json = False, debug: options.Debug = False) -> None:
    """List the shipped recipes."""
    from distillm_cli.config.load import shipped

    rows = [{"name": name, **_about(path)} for name, path in shipped().items()]
    if as_json:
        write_json({"command": "recipes ls", "status": "ok", "recipes": rows})
    elif sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table("name", "description and command", box=None, pad_edge=False, header_style="bold")
        for row in rows:
            table.add_row(f"[cyan]{row['name']}[/]", f"{row['summary']}\n[dim]{row['run']}[/]")
        Console().print(table)
    else:
        write_stdout("".join(f"{row['name']}\t{row['summary']}\t{row['run']}\n" for row in rows))


@recipes_app.command("show", cls=options.PlainCommand)
def show_recipe(name: RecipeName, debug: options.Debug = False) -> None:
    """Print the text of a recipe."""
    from distillm_cli.config.load import locate

    content = locate(name).read_bytes()
    if sys.stdout.isatty():
        write_stdout(content.decode("utf-8", "backslashreplace"))
    else:
        sys.stdout.buffer.write(content)


@recipes_app.command("cp", cls=options.PlainCommand)
def copy_recipe(
    name: RecipeName,
    dest: Annotated[
        str | None,
        typer.Argument(
            metavar="DEST", help=r"Target file or directory. [dim]\[default: NAME.yaml][/]", show_default=False
        ),
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Copy a recipe to a new file. Existing files are not overwritten.

    For completion and checks in an editor, run distillm schema > schema.json in the same directory.
    """
    from distillm_cli.config.load import locate

    source = locate(name)
    target = Path(dest).expanduser() if dest else Path(source.name)
    target = target / source.name if target.is_dir() or (dest and dest.endswith("/")) else target
    try:
        with target.open("xb") as file:
            file.write(source.read_bytes())
    except FileExistsError:
        raise UsageError(
            "usage.output_exists", f"{target} exists", hint="give another DEST, or remove it first"
        ) from None
    except FileNotFoundError:
        raise UsageError("usage.no_directory", f"no directory {target.parent}", hint="create it first") from None
    write_stdout(f"{target}\n")


@recipes_app.command("validate", cls=options.PlainCommand)
def validate_recipes(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME|FILE",
            help=r"Recipes to check. [dim]\[default: the shipped ones][/]",
            autocompletion=options.complete_recipes,
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Check recipes, by default all shipped ones. The exit code is 2 if one is invalid."""
    from distillm_cli.config.load import shipped

    rows = [_checked(path) for path in paths or shipped()]
    wrong = [row for row in rows if row["status"] == "error"]
    if as_json:
        first = {key: wrong[0][key] for key in ("error", "message")} if wrong else {}
        code = {"code": RecipeError.exit_code, **first} if wrong else {}
        status = "error" if wrong else "ok"
        write_json({"command": "recipes validate", "status": status, **code, "recipes": rows})
    else:
        for row in rows:
            if row["status"] == "ok":
                write_stdout(f"{row['recipe']}\tok\n")
    for row in wrong:
        for problem in row["problems"]:
            print_error(problem)
    if wrong:
        raise typer.Exit(RecipeError.exit_code)


@command(
    "schema",
    panel=options.OTHER_COMMANDS,
    examples=("distillm schema > schema.json", "distillm schema | jq '.\"$defs\".train.properties | keys'"),
)
def schema(debug: options.Debug = False) -> None:
    """Print the JSON Schema of recipes, for editors and other programs.

    An editor with a YAML language server completes and checks a recipe that names the file in a comment: [cyan]#
    yaml-language-server: $schema=schema.json[/]. Divergences, methods, metrics and data sets of installed plug-ins are
    included.
    """
    from distillm_cli.config.json_schema import recipe_schema

    write_stdout(json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n")


def _checked(recipe: str) -> dict[str, Any]:
    from distillm_cli.config.load import resolve
    from distillm_cli.config.pipeline_recipe import is_pipeline, load_pipeline

    try:
        if is_pipeline(recipe):
            load_pipeline(recipe)
        else:
            resolve(command="", recipe=recipe)
    except RecipeError as error:
        problems = [str(problem) for problem in error.problems]
        return {"recipe": recipe, "status": "error", "error": error.code, "message": str(error), "problems": problems}
    return {"recipe": recipe, "status": "ok"}


def _about(path: Path) -> dict[str, str]:
    """Return the command that runs a recipe and what it does, from the comment that opens it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {"run": lines[0].removeprefix("# "), "summary": lines[1].removeprefix("# ")}
