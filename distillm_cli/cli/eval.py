"""Score checkpoints on instruction-following suites: ``distillm eval``."""

from __future__ import annotations

from typing import Annotated

import typer

from distillm_cli.cli import options
from distillm_cli.cli.eval_options import AnalysisFlags, ListSuites, print_suites
from distillm_cli.cli.generate import ServedBy
from distillm_cli.cli.options import FieldFlags, command
from distillm_cli.cli.usage import check_sampling_inputs
from distillm_cli.errors import UsageError

CheckpointArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CKPT...",
        callback=options.check_named,
        help="Output directories, model directories or hub names.",
        show_default=False,
    ),
]
ResultsDirectory = Annotated[
    str | None,
    options.named(
        "--output", "DIR", r"Output directory of the results. [dim]\[default: CKPT/eval][/]", options.OUTPUT_PANEL
    ),
]


@command(
    "eval",
    panel=options.VERBS,
    examples=(
        "distillm eval ckpt/ --suite dolly",
        "distillm eval runs/a runs/b --suite dolly,self-inst,vicuna --compare --json",
        "distillm eval ckpt/ --suite words/test.jsonl --metric error_rate --greedy",
        "distillm eval gpt2 --suite sni --limit 100 --seeds 10",
        "distillm eval NAME --server https://HOST/v1 --suite dolly --set eval.no_repeat_ngram_size=0",
    ),
)
def eval_checkpoints(
    fields: FieldFlags,
    analysis: AnalysisFlags,
    checkpoints: CheckpointArgument = None,
    list_suites: ListSuites = False,
    recipe: options.RecipeOption = None,
    sets: options.Set = None,
    output: ResultsDirectory = None,
    server: ServedBy = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Score checkpoints on instruction-following suites: mean ± sd over seeds, results in CKPT/eval/.

    Without --suite, the suites of the checkpoint's recipe are used, or the held-out rows of its run. Options that are
    not given, including the template, come from that recipe as well. Without a recipe, the defaults below apply.
    """
    from distillm_cli.api import evaluation_flags

    if list_suites:
        print_suites(as_json=json)
        return
    if not checkpoints:
        raise UsageError("usage.invalid_option", "missing argument 'CKPT...'", hint="see `distillm eval --help`")
    flags = evaluation_flags(fields)
    suites = flags["eval.suites"].value if "eval.suites" in flags else []
    chosen = analysis.to_options()
    chosen.check(len(set(checkpoints)), on_server=server is not None)
    models = [*(checkpoints if server is None else []), *([chosen.teacher] if chosen.teacher else [])]
    check_sampling_inputs("eval", models, suites, recipe, flags, sets)

    from distillm_cli.runs.eval import evaluate_checkpoints  # imports torch
    from distillm_cli.runs.inference import Settings
    from distillm_cli.ui.analysis_tables import analysis_tables
    from distillm_cli.ui.console import console
    from distillm_cli.ui.summary import eval_summary

    with console(json_mode=json, quiet=quiet) as ui:
        settings = Settings(recipe, flags, sets)
        result = evaluate_checkpoints(checkpoints, settings, ui, output=output, server=server, options=chosen)
        ui.answer(*eval_summary(result), *analysis_tables(result))
        ui.result(result.as_json())
