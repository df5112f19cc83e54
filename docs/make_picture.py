"""Run the quickstart and write a picture of what a terminal shows: docs/images/run.svg.

python docs/make_picture.py [--steps N] > docs/images/run.svg

The picture has the command, the live display when 60 % of the steps are done, the outcome and a sample. It refers to no font
or file on the network. Times are those of the machine: run it on an idle one.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tempfile
from pathlib import Path

from rich.text import Text

from distillm_cli.api import resolve_training, train_recipe
from distillm_cli.runs.start import TrainOptions
from distillm_cli.training.events import Event, RunEnded, RunStarted, Stepped
from distillm_cli.ui.console import Console, Terminal, console
from distillm_cli.ui.summary import outcome_tables, samples_table, sources_sentence

WIDTH = 88
OUTPUT = "runs/quickstart"
COMMAND = f"distillm distill --recipe quickstart --output {OUTPUT}"
SHOWN_SHARE = 0.6  # of the steps, when the live display is drawn


def terminal(*, record: bool) -> Terminal:
    """Return a terminal that shows nothing."""
    return Terminal(file=io.StringIO(), record=record, width=WIDTH, height=40, force_terminal=True)


class Recorder:
    """Pass events to the display of the command line, and draw it once in the last training loop of the run."""

    def __init__(self, display: Console, picture: Terminal, verb: str):
        self.display = display
        self.picture = picture
        self.verb = verb
        self.at_step: int | None = None

    def __call__(self, event: Event) -> None:
        self.display(event)
        if isinstance(event, RunStarted):
            self.at_step = round(SHOWN_SHARE * event.steps) if event.method == self.verb else None
        elif isinstance(event, Stepped) and event.step == self.at_step:
            self.picture.print(self.display.frame())
        elif isinstance(event, RunEnded):
            self.at_step = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="fewer steps than the recipe has, to try the script")
    args = parser.parse_args()
    sets = [] if args.steps is None else [f"train.steps={args.steps}"]
    resolved = resolve_training("distill", "quickstart", {}, sets, output=None, resume=False)
    picture = terminal(record=True)
    picture.print(Text.assemble(("$ ", "bold green"), (COMMAND, "bold")), highlight=False)
    picture.print()
    with tempfile.TemporaryDirectory() as directory, console(stderr=terminal(record=False)) as display:
        recorder = Recorder(display, picture, resolved.recipe.method)
        result = train_recipe("distill", resolved, str(Path(directory) / "run"), recorder, TrainOptions(), "quickstart")
        summary = result.summary
        for item in (*outcome_tables(summary), samples_table(summary.samples[:1])):
            picture.print(item)
        picture.print(sources_sentence(summary.sources, summary.phi_history), highlight=False)
    svg = picture.export_svg(title="distillm", unique_id="run")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL).replace("Fira Code, monospace", "monospace")
    sys.stdout.write("\n".join(line.rstrip() for line in svg.splitlines()) + "\n")


if __name__ == "__main__":
    main()
