"""``distillm eval``: score checkpoints on instruction-following suites."""

from __future__ import annotations

from typing import Annotated

import typer

from distillm_cli.cli import options
from distillm_cli.cli.options import FieldFlags, command
from distillm_cli.cli.usage import check_sampling_inputs, check_single_process
from distillm_cli.config.shortcuts import Flag
from distillm_cli.errors import UsageError

CheckpointArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="CKPT...",
        callback=options.check_named,
        help="Output directories, model directories or hub names.",
        show_default=False,
    ),
]
ResultsDirectory = Annotated[
    str | None,
    typer.Option(
        "--output",
        metavar="DIR",
        callback=options.check_named,
        help=r"Directory of the results. [dim]\[default: CKPT/eval][/]",
        rich_help_panel=options.OUTPUT_PANEL,
    ),
]


@command(
    "eval",
    panel=options.VERBS,
    examples=(
        "distillm eval ckpt/ --suite dolly",
        "distillm eval runs/a runs/b --suite dolly,self-inst,vicuna --json",
        "distillm eval ckpt/ --suite words/test.jsonl --metric error_rate --greedy",
        "distillm eval gpt2 --suite sni --limit 100 --seeds 10",
    ),
)
def eval_checkpoints(
    checkpoints: CheckpointArgument,
    fields: FieldFlags,
    recipe: options.RecipeOption = None,
    sets: options.Set = None,
    output: ResultsDirectory = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Score checkpoints on instruction-following suites: mean ± sd over seeds, results in CKPT/eval/.

    Without --suite: the suites of the checkpoint's own recipe, or the held-out rows of its run. Settings that no flag
    gives, the template among them, come from that recipe too, and the defaults below hold without one.
    """
    sampling = ("eval.seeds", "eval.temperature", "eval.top_p")
    sampling_flag = next((fields[key].name for key in sampling if key in fields), None)
    if "eval.greedy" in fields and fields["eval.greedy"].value and sampling_flag:
        raise UsageError(f"--greedy and {sampling_flag} exclude each other", hint="drop one of them")
    if "eval.temperature" in fields and fields["eval.temperature"].value == 0 and "eval.seeds" in fields:
        raise UsageError("--temperature 0 and --seeds exclude each other", where="there is nothing random")
    check_single_process()
    if "eval.greedy" not in fields and sampling_flag:
        fields["eval.greedy"] = Flag("--greedy", False)  # even where the checkpoint's own recipe is greedy
    suites = fields["eval.suites"].value if "eval.suites" in fields else []
    check_sampling_inputs("eval", checkpoints, suites, recipe, fields, sets)

    from distillm_cli.runs.eval import evaluate_checkpoints  # imports torch
    from distillm_cli.runs.inference import Settings
    from distillm_cli.ui.console import console
    from distillm_cli.ui.summary import eval_summary

    with console(json_mode=json, quiet=quiet) as ui:
        result = evaluate_checkpoints(checkpoints, Settings(recipe, fields, sets), ui, output=output)
        ui.answer(*eval_summary(result))
        ui.result(result.as_json())
