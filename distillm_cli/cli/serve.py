"""Print or run the vLLM command for a recipe: ``distillm serve``."""

from __future__ import annotations

from typing import Annotated

import typer

from distillm_cli.cli import options
from distillm_cli.cli.options import command
from distillm_cli.config.shortcuts import MODELS_PANEL, Flag
from distillm_cli.utils.stdout import write_stdout

_ROLES = ("rollouts", "teacher")

ServerRole = Annotated[
    str,
    typer.Argument(
        metavar="rollouts|teacher",
        help="rollouts: the student, for rollout.server. teacher: its hidden states, for teacher.server.",
        autocompletion=lambda incomplete: [role for role in _ROLES if role.startswith(incomplete)],
        show_default=False,
    ),
]
MoreArguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="OPTION...", help="Options of `vllm serve`, after --.", show_default=False),
]
ModelToServe = Annotated[
    str | None,
    options.named("--model", "PATH|NAME|SPEC", "Model to serve, in place of the recipe's.", MODELS_PANEL),
]
StartServer = Annotated[
    bool,
    options.switch("--start", "Run the command instead of printing it.", options.OUTPUT_PANEL),
]


@command(
    "serve",
    panel=options.OTHER_COMMANDS,
    examples=(
        "distillm serve rollouts --recipe quickstart",
        "distillm serve teacher --model meta-llama/Llama-3.1-8B --set teacher.dtype=bf16",
        "distillm serve teacher --recipe my.yaml --start -- --tensor-parallel-size 4",
    ),
)
def serve(
    role: ServerRole,
    more: MoreArguments = None,
    model: ModelToServe = None,
    recipe: options.RecipeOption = None,
    sets: options.Set = None,
    start: StartServer = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Print the vLLM command that serves a recipe's student for rollouts, or its teacher.

    vLLM is installed in an environment of its own (docs/scale.md). The command has the dtype and the length of the run. A
    student that the run builds is saved first.
    """
    from distillm_cli.config.load import resolve
    from distillm_cli.errors import UsageError
    from distillm_cli.runs.serve import ROLES, serve_command
    from distillm_cli.ui.console import console

    if role not in ROLES:
        raise UsageError("usage.invalid_value", f"role = {role}", where=f"expected {' or '.join(ROLES)}")
    key = "teacher.path" if role == "teacher" else "student.path"
    flags = {} if model is None else {key: Flag("--model", model)}
    resolved = resolve(command="distill", recipe=recipe, flags=flags, sets=sets)
    with console(json_mode=json, quiet=quiet) as ui:
        found = serve_command(role, resolved, more or (), ui)
        if not start:
            if not json:
                write_stdout(f"{found.line}\n")
            ui.result(found.as_json())
    if start:
        found.start()
