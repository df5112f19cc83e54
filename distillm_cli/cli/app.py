"""Assemble the commands of ``distillm`` and turn every failure into one line and an exit code.

Results go to stdout, logs to stderr. An error is one line on stderr, ``error: what; where; what to try``, and an exit
code (see ``distillm_cli.errors``); with ``--json`` also one JSON object on stdout. Command modules import only typer at
the top level and the engine inside their functions, so that ``--help`` is quick and loads no torch.
"""

from __future__ import annotations

import os
import select
import sys
import traceback
from contextlib import nullcontext, suppress
from typing import Annotated, Any

import typer
from typer.main import get_command

from distillm_cli import plugins
from distillm_cli.cli import options
from distillm_cli.cli.chat import talk
from distillm_cli.cli.eval import eval_checkpoints
from distillm_cli.cli.generate import generate
from distillm_cli.cli.info import env, explain_field
from distillm_cli.cli.methods import methods_app
from distillm_cli.cli.pilot import pilot
from distillm_cli.cli.plan import plan
from distillm_cli.cli.recipes import recipes_app, schema
from distillm_cli.cli.report import show_report
from distillm_cli.cli.run import run_stages
from distillm_cli.cli.serve import serve
from distillm_cli.cli.streams import muted, open_streams, print_error, report
from distillm_cli.cli.train import distill, sft
from distillm_cli.cli.usage import UsageProblem, explained
from distillm_cli.cli.watch import watch
from distillm_cli.errors import (
    DistillmError,
    Interrupted,
    ModelError,
    OutOfMemoryError,
    StorageError,
    UsageError,
    is_tokenizer_failure,
    out_of_memory,
    signal_number,
    typed_options,
)
from distillm_cli.training.distributed import is_exchanged, is_lone, joined, launched_rank
from distillm_cli.utils.signals import handle_signals, received_signal
from distillm_cli.utils.storage import discard_stdout, is_full, os_error_number, reason
from distillm_cli.utils.text import printable, redact

_COMPLETE = "_DISTILLM_COMPLETE"  # set in the shell's startup file by --install-completion
_BROKEN_PIPE = 141  # 128 + SIGPIPE, as for other programs

app = typer.Typer(
    name="distillm",
    cls=options.PlainGroup,
    help="Turn a large language model into a small one.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=options.epilog(
        "distillm distill --recipe quickstart",
        "distillm distill --teacher gpt2-xl --student gpt2 --alpha 0.1",
        "distillm eval ckpt/ --suite dolly",
        "for a in 0.0 0.1 0.3; do distillm distill --recipe quickstart --alpha $a --output runs/a$a --json; done",
    ),
)
for _command in (
    sft,
    generate,
    distill,
    eval_checkpoints,
    run_stages,
    plan,
    pilot,
    show_report,
    watch,
    talk,
    serve,
    schema,
    explain_field,
    env,
):
    app.command(_command.name, cls=options.PlainCommand, rich_help_panel=_command.panel, epilog=_command.epilog)(
        _command.run
    )
app.add_typer(
    methods_app, name="methods", help="List the methods or show one of them.", rich_help_panel=options.OTHER_COMMANDS
)
app.add_typer(
    recipes_app, name="recipes", help="List, show, copy and check recipes.", rich_help_panel=options.OTHER_COMMANDS
)


def _print_version(is_given: bool) -> None:
    if is_given:
        from distillm_cli import __version__

        print(f"distillm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


def main(argv: list[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    open_streams()
    set_environment()
    command = get_command(app)
    if _COMPLETE in os.environ:  # the shell requests completions: typer prints them and exits
        try:
            command.main(argv, prog_name="distillm")
        except SystemExit as done:
            return int(done.code or 0)
    try:
        code = _invoke(command, argv)
        sys.stdout.flush()
    except BaseException as error:
        if not (isinstance(error, Exception | KeyboardInterrupt) or is_tokenizer_failure(error)):
            raise
        if _is_broken_stdout(error):
            return _BROKEN_PIPE
        return _report_error(error, argv)
    return code


def _invoke(command: Any, argv: list[str]) -> int:
    """Run the command and return its exit code."""
    for failure in plugins.failures():
        print_error(str(failure), kind="warning")
    for word in argv:
        if not word.isascii() and word != word.encode("utf-8", "ignore").decode():
            spelled = word.encode("utf-8", "backslashreplace").decode()
            raise UsageError("usage.not_utf8", f"{spelled} is not UTF-8", hint="rename the file, or check the variable")
    silenced = muted() if launched_rank() else nullcontext()  # of several processes, the first one prints
    try:
        with handle_signals(), silenced, joined(), command.make_context("distillm", list(argv)) as context:
            command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    return 0


def set_environment() -> None:
    """Set environment variables that libraries read, unless the user has set them."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # send no usage data
    # Use huge pages for torch's large tensors on a CPU, where the kernel lets programs choose: a step is 10 % faster.
    # Torch reads the variable at its first allocation; 0 in the environment turns it off.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # OpenMP's threads spin for milliseconds while they wait for each other after every operation. If another program
    # uses a core, spinning threads occupy the others, and small models train a hundred times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # bf16 matrix products are compiled for each shape, and two caches hold a thousand each: over a gigabyte if lengths
    # differ from step to step. Only those of the last steps are used again.
    for capacity in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(capacity, "200")


def _report_error(error: BaseException, argv: list[str]) -> int:
    if isinstance(error, UsageProblem) and type(error).__name__ == "NoArgsIsHelpError":
        return 2  # the help is already printed
    if launched_rank() and is_exchanged(error):  # the first process reports it
        known = _as_distillm_error(error, argv)
        if is_lone(error):
            print_error(str(known))
        return known.exit_code
    if "--debug" in typed_options(argv):
        with suppress(OSError):
            print(printable(redact("".join(traceback.format_exception(error)))), end="", file=sys.stderr)
    return report(_as_distillm_error(error, argv), argv)


def _as_distillm_error(error: BaseException, argv: list[str]) -> DistillmError:
    """Return any exception as a DistillmError."""
    if not isinstance(error, Interrupted | KeyboardInterrupt):
        error = received_signal() or error
    if isinstance(error, DistillmError):
        return error
    if isinstance(error, UsageProblem):
        return explained(error, argv)
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted", signal_number=signal_number(error))
    if isinstance(error, typer.Abort):
        return Interrupted("aborted at a prompt", signal_number=2)
    if out_of_memory(error):
        hint = "lower --batch-size (and raise train.accumulate), or --max-length; `distillm plan` estimates the memory"
        return OutOfMemoryError("memory.exhausted", "out of memory", where=_first_line(error), hint=hint)
    if (number := os_error_number(error)) is not None:
        other = "choose another path, or check the disk and its permissions"
        hint = "free disk space, or choose another path" if is_full(number) else other
        pathless = isinstance(error, OSError) and error.filename is None
        return StorageError(
            "storage.failed", f"cannot read or write: {reason(error)}" if pathless else _first_line(error), hint=hint
        )
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # Path.resolve, before Python 3.13
        return StorageError("storage.failed", _first_line(error), hint="remove the link, or choose another path")
    if is_tokenizer_failure(error):
        hint = "its files are damaged or incomplete: copy or download them again (--debug shows where it failed)"
        return ModelError("model.tokenizer_failed", "the tokenizer failed", where=_first_line(error), hint=hint)
    return DistillmError(
        "unexpected",
        f"unexpected {type(error).__name__}",
        where=_first_line(error),
        hint=None if "--debug" in typed_options(argv) else "run again with --debug for a traceback",
    )


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def _is_broken_stdout(error: BaseException) -> bool:
    """Return whether stdout's reader has closed the pipe. If so, redirect stdout to /dev/null, so that the exit is quiet."""
    if not isinstance(error, BrokenPipeError):
        return False
    if hasattr(select, "poll"):  # check that the broken pipe is stdout
        watch = select.poll()
        watch.register(sys.stdout.fileno(), select.POLLOUT)
        if not any(event & select.POLLERR for _, event in watch.poll(0)):
            return False
    discard_stdout()
    return True
