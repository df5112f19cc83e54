"""The flags that several commands share: name, help, panel. None means "not given": the recipe or the schema decides.

    def distill(alpha: options.Alpha = None, sets: options.Set = None, …):
        resolved = resolve(command="distill", flags=options.flags(alpha=alpha), sets=sets)

Nothing heavy may be imported here: ``--help`` reads this file.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import typer

from distillm_cli.config.methods import METHODS
from distillm_cli.config.shortcuts import SHORTCUTS, Flag
from distillm_cli.errors import UsageError

# Panels of a command's help, in the order in which they are shown.
MODELS = "Models and data"
METHOD = "Method"
TRAINING = "Training"
RECIPE = "Recipe"
OUTPUT = "Output"

# Groups of commands in `distillm --help`.
VERBS = "Verbs"
AROUND = "Around them"

Teacher = Annotated[
    str | None,
    typer.Option(
        "--teacher", metavar="PATH|NAME", help="Local directory, hub name, or builtin.", rich_help_panel=MODELS
    ),
]
Student = Annotated[
    str | None,
    typer.Option(
        "--student",
        metavar="PATH|NAME|SPEC",
        help="What is trained; or built: layers:6, width:0.5, random:4x256.",
        rich_help_panel=MODELS,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PATH|NAME|SPEC",
        help="What is trained; random:4x256 starts from scratch.",
        rich_help_panel=MODELS,
    ),
]
Lora = Annotated[
    int | None,
    typer.Option(
        "--lora", metavar="R", help="Train a LoRA adapter of this rank, the rest frozen.", rich_help_panel=MODELS
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="PATH|NAME|SPEC",
        help="Of a model from scratch; or bpe:1000, chars, words.",
        rich_help_panel=MODELS,
    ),
]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="PATH|NAME", help="File, directory, data set, or builtin.", rich_help_panel=MODELS),
]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", metavar="N", help="Tokens of prompt and response together.", rich_help_panel=MODELS),
]
SkipBadRows = Annotated[
    bool | None,
    typer.Option(
        "--skip-bad-rows", metavar="", help="Count and list broken rows instead of stopping.", rich_help_panel=MODELS
    ),
]

Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="NAME",
        help=f"A preset (see distillm methods): {', '.join(METHODS)}.",
        autocompletion=lambda incomplete: methods_like(incomplete),
        rich_help_panel=METHOD,
    ),
]
Divergence = Annotated[
    str | None,
    typer.Option(
        "--divergence",
        metavar="NAME",
        help="kl, rkl, skl, srkl, jsd, tvd, jeffreys, akl, ab, amid, taid or atkd.",
        autocompletion=lambda incomplete: words_like(incomplete, "objective.divergence"),
        rich_help_panel=METHOD,
    ),
]
Schedule = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        metavar="KIND",
        help="off, on, mixed, annealed, adaptive, teacher, pairs, interleaved or rounds.",
        autocompletion=lambda incomplete: words_like(incomplete, "schedule.kind"),
        rich_help_panel=METHOD,
    ),
]
Alpha = Annotated[
    float | None,
    typer.Option("--alpha", metavar="A", help="Skew of skl and srkl, 0 ≤ A < 1; 0 is kl, rkl.", rich_help_panel=METHOD),
]
TeacherCache = Annotated[
    str | None,
    typer.Option(
        "--teacher-cache",
        metavar="WHERE",
        help="Keep what the teacher said: auto, memory, disk or off.",
        rich_help_panel=METHOD,
    ),
]
WarmTeacherCache = Annotated[
    bool,
    typer.Option(
        "--warm-teacher-cache",
        metavar="",
        help="Only compute what the teacher says of the rows, on disk for later runs.",
        rich_help_panel=METHOD,
    ),
]
RebuildTeacherCache = Annotated[
    bool,
    typer.Option(
        "--rebuild-teacher-cache",
        metavar="",
        help="Replace a cache on disk that is stale or damaged.",
        rich_help_panel=METHOD,
    ),
]

Lr = Annotated[float | None, typer.Option("--lr", metavar="X", help="Highest learning rate.", rich_help_panel=TRAINING)]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", metavar="N", help="Sequences side by side.", rich_help_panel=TRAINING)
]
Epochs = Annotated[
    float | None, typer.Option("--epochs", metavar="X", help="LengthGroups over the rows.", rich_help_panel=TRAINING)
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", metavar="N", help="Optimizer steps, in place of epochs.", rich_help_panel=TRAINING),
]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Of everything random in the run.", rich_help_panel=TRAINING)
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", metavar="TYPE", help="auto, fp32 or bf16.", rich_help_panel=TRAINING)
]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.", rich_help_panel=TRAINING),
]

Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="Shipped name or file: distillm recipes ls, show.",
        autocompletion=lambda incomplete: recipes_like(incomplete),
        rich_help_panel=RECIPE,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="SECTION.KEY=VALUE", help="Any field of a recipe; may be repeated.", rich_help_panel=RECIPE
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        metavar="",
        help="Print the resolved recipe, with where each value comes from.",
        rich_help_panel=RECIPE,
    ),
]


def named(parameter: typer.CallbackParam, value: Any) -> Any:
    """Of --output and the like: an empty name is a script's unset variable, and no wish for another place.

    Of a list each item, and what is left of it between commas: ``--suite ,`` names nothing either.
    """
    if any(not item.strip(" ,") for item in ([value] if isinstance(value, str) else value or [])):
        flag = next((opt for opt in parameter.opts if opt.startswith("-")), parameter.metavar)
        raise UsageError(f"{flag} = (empty)", where="expected a name", hint="drop it, or see what the variable holds")
    return value


Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        metavar="DIR",
        callback=named,
        help="Where it goes; else a name under runs/.",
        rich_help_panel=OUTPUT,
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", metavar="", help="Go on from the newest checkpoint in --output.", rich_help_panel=OUTPUT),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", metavar="", help="Replace what is in --output.", rich_help_panel=OUTPUT)
]
Json = Annotated[
    bool,
    typer.Option("--json", metavar="", help="One JSON object on stdout, nothing else there.", rich_help_panel=OUTPUT),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", metavar="", help="Only warnings and errors on stderr.", rich_help_panel=OUTPUT)
]
Debug = Annotated[bool, typer.Option("--debug", metavar="", help="Tracebacks with errors.", rich_help_panel=OUTPUT)]


# What may follow in a shell: names that begin as what was typed.


def methods_like(typed: str) -> list[tuple[str, str]]:
    return [(method.name, method.summary) for method in METHODS.values() if method.name.startswith(typed)]


def recipes_like(typed: str, *, of_stages: bool = False) -> list[str]:
    """Shipped ones. of_stages: those for `distillm run` alone."""
    from distillm_cli.config.load import shipped
    from distillm_cli.config.pipeline_recipe import is_pipeline

    return [name for name in shipped() if name.startswith(typed) and (not of_stages or is_pipeline(name))]


def words_like(typed: str, key: str) -> list[str]:
    """Values of this field of a recipe."""
    from distillm_cli.config.explain import choices

    return _last_like(typed, choices(key))


def suites_like(typed: str) -> list[str]:
    from distillm_cli.data.known import names

    return _last_like(typed, names())


def _last_like(typed: str, words: Iterable[str]) -> list[str]:
    """Of several with commas between them, the last is the one that goes on."""
    before, comma, last = typed.rpartition(",")
    return [before + comma + word for word in words if word.startswith(last)]


def flags(**given: Any) -> dict[str, Flag]:
    """Shared flags by parameter name → what ``config.load.resolve`` takes; those that are None are left out.

    Raises KeyError for a name that is no shortcut.
    """
    named = {name: Flag(SHORTCUTS[name].flag, value) for name, value in given.items()}
    return {key: flag for name, flag in named.items() if flag.value is not None for key in SHORTCUTS[name].keys}


def given(ctx: typer.Context) -> dict[str, Flag]:
    """The shared flags of the command being run that were given. Its parameters declare them; this reads them all."""
    return flags(**{name: value for name, value in ctx.params.items() if name in SHORTCUTS})


def examples(*lines: str) -> str:
    """Worked examples as a command's epilog: one line each, as they are typed."""
    return "\n".join(["[bold]Examples[/]", *(line.replace("[", r"\[") for line in lines)])
