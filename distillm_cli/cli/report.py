"""Compare runs: ``distillm report``."""

from __future__ import annotations

from typing import Annotated

import typer

from distillm_cli.cli import options
from distillm_cli.cli.options import command
from distillm_cli.errors import UsageError

RunDirectories = Annotated[
    list[str],
    typer.Argument(
        metavar="DIR...",
        callback=options.check_named,
        help="Output directories of runs, or directories that have them.",
        show_default=False,
    ),
]
Sort = Annotated[
    str | None,
    options.named(
        "--sort",
        "COLUMN",
        "Sort by a metric, seconds, tokens_per_s, rollouts or a setting, the best first.",
        options.OUTPUT_PANEL,
    ),
]
Csv = Annotated[bool, options.switch("--csv", "Print CSV with every figure.", options.OUTPUT_PANEL)]
Markdown = Annotated[bool, options.switch("--md", "Print a Markdown table.", options.OUTPUT_PANEL)]
Html = Annotated[
    bool,
    options.switch("--html", "Write report.html: one file, no scripts.", options.OUTPUT_PANEL),
]
Plots = Annotated[
    bool,
    options.switch("--plots", "Write the charts as SVG and PNG in plots/.", options.OUTPUT_PANEL),
]
Place = Annotated[
    str | None,
    options.named(
        "--output",
        "DIR",
        r"Directory of report.html and plots/. [dim]\[default: the run's, or the one that has all runs][/]",
        options.OUTPUT_PANEL,
    ),
]
Card = Annotated[
    bool,
    options.switch("--card", "Add the scores of evaluations to the model card (README.md).", options.OUTPUT_PANEL),
]
ShownRows = Annotated[
    int,
    typer.Option(
        "--rows",
        metavar="N",
        show_default=False,
        help=r"Held-out rows that report.html of one run shows token by token. 0: load no model. [dim]\[default: 4][/]",
        rich_help_panel=options.OUTPUT_PANEL,
    ),
]


@command(
    "report",
    panel=options.OTHER_COMMANDS,
    examples=(
        "distillm report runs/a",
        "distillm report runs/* --sort exact_match",
        "distillm report runs --csv > runs.csv",
        "distillm report runs/a --html",
        "distillm report runs/* --html --plots --output sweep",
    ),
)
def show_report(
    directories: RunDirectories,
    sort: Sort = None,
    csv: Csv = False,
    md: Markdown = False,
    html: Html = False,
    plots: Plots = False,
    card: Card = False,
    output: Place = None,
    rows: ShownRows = 4,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Compare runs: the settings that differ, quality, seconds, tokens/s and share of rollouts.

    Runs that differ in their seed alone are one row: mean ± standard deviation.
    """
    from pathlib import Path

    from distillm_cli.runs.report_runs import ReportOptions, report_runs
    from distillm_cli.ui.console import console
    from distillm_cli.ui.report_tables import report_csv, report_markdown, report_tables
    from distillm_cli.utils.stdout import write_stdout

    if csv + md + json > 1:
        what = "--csv, --md and --json are mutually exclusive"
        raise UsageError("usage.exclusive_options", what, hint="choose one of them")
    if rows < 0:
        raise UsageError(
            "usage.invalid_value", f"--rows = {rows}", where="expected an integer ≥ 0", hint="try --rows 4"
        )
    paths = [Path(directory).expanduser() for directory in directories]
    with console(json_mode=json, quiet=quiet) as ui:
        chosen = ReportOptions(sort, html, plots, card, Path(output).expanduser() if output else None, rows)
        result = report_runs(paths, chosen, ui)
        if csv or md:
            write_stdout(report_csv(result) if csv else report_markdown(result))
            return
        if not json:
            ui.answer(*report_tables(result))
        ui.result(result.as_json())
