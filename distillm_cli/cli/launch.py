"""From typed flags to a running recipe: the few lines that ``sft`` and ``distill`` would otherwise both have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from distillm_cli.errors import UsageError

if TYPE_CHECKING:
    from distillm_cli.config.schema import Recipe


def launch(ctx: typer.Context) -> None:
    """Resolve what was typed, then print the resolved recipe (``--dry-run``), warm the teacher's cache, or train."""
    from distillm_cli.cli import options
    from distillm_cli.cli.streams import write_stdout
    from distillm_cli.config.load import resolve, to_yaml
    from distillm_cli.runs import output_dir
    from distillm_cli.runs.defaults import check_data, fitted, fitted_line
    from distillm_cli.training.events import Note

    command, typed = ctx.info_name, ctx.params
    output, resume, overwrite = typed["output"], typed["resume"], typed["overwrite"]
    recipe, rebuild = typed["recipe"], typed.get("rebuild_teacher_cache", False)
    if resume and recipe is None and output is not None and (Path(output) / output_dir.RECIPE).is_file():
        recipe = str(Path(output) / output_dir.RECIPE)  # going on needs no more than the directory
    resolved = fitted(resolve(command=command, recipe=recipe, flags=options.given(ctx), sets=typed["sets"]))
    if typed["dry_run"]:
        if typed["json"]:
            from distillm_cli.ui.console import print_json

            print_json({"command": command, "status": "ok", "recipe": resolved.recipe.model_dump(mode="json")})
        else:
            write_stdout(to_yaml(resolved))
        return
    check_complete(resolved.recipe)
    notes = [note for note in (check_data(resolved), fitted_line(resolved)) if note is not None]
    check_alone()

    from distillm_cli.runs.inputs import prefetcher_of
    from distillm_cli.ui.console import console

    if typed.get("warm_teacher_cache"):
        if resume or overwrite or output is not None:
            what = "--warm-teacher-cache writes no output directory"
            raise UsageError(what, hint="drop --output, --resume and --overwrite")
        with console(json_mode=typed["json"], quiet=typed["quiet"]) as ui, prefetcher_of(resolved.recipe) as prefetcher:
            for note in notes:
                ui(Note(note))
            from distillm_cli.runs.teacher_states import warm

            ui.result(warm(resolved, rebuild=rebuild, ui=ui, prefetcher=prefetcher))
        return
    r = resolved.recipe
    place = Path(output) if output else None
    if place is None:
        place = output_dir.default_name(
            resolved.name, r.data.source, r.student.path or "student", r.method, resume=resume
        )
    is_new = output_dir.check_output(
        place, resume=resume, overwrite=overwrite
    )  # before rows are read that nobody will want
    if overwrite:
        from distillm_cli.runs.inputs import check_spared

        check_spared(command, r, place, file=recipe)
    ui = console(json_mode=typed["json"], quiet=typed["quiet"])
    with output_dir.claimed(place, is_new=is_new), ui, prefetcher_of(r) as prefetcher:
        for note in notes:
            ui(Note(note))
        from distillm_cli.runs.train import train  # which imports torch, while the rows are read and tokenized

        result = train(
            command,
            resolved,
            place,
            resume=resume,
            overwrite=overwrite,
            rebuild_teacher_cache=rebuild,
            prefetcher=prefetcher,
            ui=ui,
        )
        ui.result(result)


def check_alone() -> None:
    """Raises UsageError where a launcher (accelerate's, torchrun) has started several of this: each would do all of it."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UsageError("work in several processes is not supported yet", hint="start it without a launcher")


def check_complete(recipe: Recipe) -> None:
    """Raises UsageError where no model is named to train, or no teacher to learn from."""
    if recipe.student.path is None:
        what, flag = ("model", "--model") if recipe.method == "sft" else ("student", "--student")
        raise UsageError(f"no {what} to train", hint=f"give {flag} PATH, or a --recipe that names one")
    if recipe.method != "sft" and recipe.teacher.path is None:
        raise UsageError("no teacher to learn from", hint="give --teacher PATH, or use `distillm sft`")
