"""Show a run from another terminal: ``distillm watch``."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Annotated

import typer

from distillm_cli.cli import options
from distillm_cli.cli.options import command
from distillm_cli.errors import CtrlC

_PERIOD = 1.0  # seconds between two looks at the directory

RunDirectory = Annotated[
    str,
    typer.Argument(
        metavar="DIR",
        callback=options.check_named,
        help="Output directory of a run or of a pipeline.",
        show_default=False,
    ),
]
Once = Annotated[
    bool,
    options.switch(
        "--once", "Print the current state and exit, as when stdout is not a terminal.", options.OUTPUT_PANEL
    ),
]


@command(
    "watch",
    panel=options.OTHER_COMMANDS,
    examples=("distillm watch runs/small", "distillm watch runs/small --once", "distillm watch runs/small --json"),
)
def watch(
    directory: RunDirectory, once: Once = False, json: options.Json = False, debug: options.Debug = False
) -> None:
    """Show a run from another terminal: progress, losses, sources, checkpoints, alarms, and the scores at the end.

    The display ends when the run ends, or with Ctrl-C, which does not affect the run. A run that has finished, was
    interrupted or was killed is shown once.
    """
    from pathlib import Path

    from rich.live import Live

    from distillm_cli.runs.watch import RunWatcher
    from distillm_cli.ui.console import Terminal, console
    from distillm_cli.ui.run_view import RunPicture

    watcher = RunWatcher(Path(directory).expanduser())
    view = watcher.look()
    terminal = Terminal(file=sys.stdout)
    picture = RunPicture()
    if view.is_alive and terminal.is_interactive and not (once or json):
        with suppress(CtrlC), Live(console=terminal, auto_refresh=False) as live:
            while view.is_alive:
                live.update(picture.draw(view, width=terminal.width, now=time.time()), refresh=True)
                time.sleep(_PERIOD)
                view = watcher.look()
            live.update(picture.draw(view, width=terminal.width, now=time.time()), refresh=True)
        return
    with console(json_mode=json) as ui:
        if not json:
            ui.answer(picture.draw(view, width=terminal.width, now=time.time()))
        ui.result(view.as_json())
