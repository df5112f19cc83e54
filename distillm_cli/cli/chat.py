"""Talk to a model: ``distillm chat``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from distillm_cli.cli import options
from distillm_cli.cli.options import FieldFlags, command
from distillm_cli.cli.streams import print_error
from distillm_cli.cli.usage import check_sampling_inputs
from distillm_cli.config.shortcuts import MODELS_PANEL
from distillm_cli.errors import CtrlC, DataError, UsageError
from distillm_cli.utils.stdout import write_stdout

if TYPE_CHECKING:
    from distillm_cli.runs.chat_session import ChatSession

ChatModel = Annotated[
    str,
    typer.Argument(
        metavar="DIR",
        callback=options.check_named,
        help="Model: an output directory, a model directory, a hub name, or builtin.",
        show_default=False,
    ),
]
TeacherBeside = Annotated[
    str | None,
    options.named(
        "--teacher", "PATH|NAME", "Second model, whose answers are shown beside those of the first.", MODELS_PANEL
    ),
]
SystemMessage = Annotated[
    str | None,
    typer.Option(
        "--system",
        metavar="TEXT",
        help="System message. Without a chat template: the instruction to which messages are the input.",
        rich_help_panel=MODELS_PANEL,
    ),
]


@command(
    "chat",
    panel=options.OTHER_COMMANDS,
    examples=(
        "distillm chat runs/small",
        "distillm chat runs/small --teacher gpt2-xl --temperature 0",
        'distillm chat runs/quickstart --teacher builtin:pronounce --system "Pronounce the word."',
        "cat questions.txt | distillm chat runs/small",
    ),
)
def talk(
    model: ChatModel,
    fields: FieldFlags,
    teacher: TeacherBeside = None,
    system: SystemMessage = None,
    recipe: options.RecipeOption = None,
    sets: options.Set = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Talk to a model, or to a student and its teacher side by side.

    Each line is a message. Models with a chat template read the conversation so far, each with its own answers. Others
    read each message alone, in the recipe's template. Options that are not given come from the model's recipe. /help
    lists commands, such as /reset and /temperature. Ctrl-C stops an answer, and Ctrl-D leaves.
    """
    models = [model] if teacher is None else [model, teacher]
    check_sampling_inputs("generate", models, [], recipe, fields, sets)

    from distillm_cli.runs.chat_session import open_session, run_command
    from distillm_cli.runs.inference import Settings
    from distillm_cli.ui.console import console

    with console(quiet=quiet) as ui:
        session = open_session(model, teacher, Settings(recipe, fields, sets), ui, system)
    for line in _messages():
        try:
            if line.startswith("/"):
                reply = run_command(session, line)
                if reply is None:
                    return
                print(reply, file=sys.stderr)
            else:
                _answer(session, line.strip())
        except (DataError, UsageError) as error:  # of this message; the conversation continues
            print_error(str(error))


def _messages() -> Iterator[str]:
    """Yield the lines of stdin that are not blank, on a terminal with a prompt."""
    if not sys.stdin.isatty():
        for number, line in enumerate(sys.stdin.buffer, start=1):
            try:
                text = line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise DataError("data.not_utf8", f"line {number} of stdin: not UTF-8") from None
            if text.strip():
                yield text
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # lets input() edit lines and recall earlier ones
    while True:
        try:
            text = input("> ")
        except (EOFError, CtrlC):
            print()
            return
        if text.strip():
            yield text


def _answer(session: ChatSession, text: str) -> None:
    """Print the answers to a message; on a terminal while they are generated."""
    from rich.live import Live

    from distillm_cli.ui.answers_view import answer_lines, answers_side_by_side
    from distillm_cli.ui.console import Terminal

    terminal = Terminal(file=sys.stdout)
    answers: dict[str, str] = {}
    if not terminal.is_interactive:
        *_, answers = session.answer(text)
        write_stdout(answer_lines(answers))
        return
    # A live display is as high as the terminal at most, so the complete answers are printed after it.
    with suppress(CtrlC), Live(console=terminal, transient=True) as live:
        for answers in session.answer(text):
            live.update(answers_side_by_side(answers))
    terminal.print(answers_side_by_side(answers), highlight=False)
