"""Start a training run: lock its output directory and read its rows while torch is being imported.

This module imports nothing slow.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distillm_cli.data.prefetch import Prefetcher
from distillm_cli.errors import ModelError, UsageError
from distillm_cli.runs import output_dir
from distillm_cli.runs.push import check_push, push_output
from distillm_cli.runs.trackers import check_trackers
from distillm_cli.training.events import Listener, Note

if TYPE_CHECKING:
    from distillm_cli.config.load import Resolved
    from distillm_cli.config.schema import Recipe
    from distillm_cli.runs.run_results import TeacherCacheResult, TrainResult


@dataclass(frozen=True)
class TrainOptions:
    """Describe the handling of existing output and cache.

    compare: also train the baselines of ``runs.compare``. strict: a warning of ``runs.preflight`` is an error.
    track: names of experiment trackers. push: name on the hub that the output directory is uploaded to; push_dry_run: only
    list what would be. moved_inputs: dotted keys of inputs that are unchanged but whose paths may differ.
    """

    resume: bool = False
    overwrite: bool = False
    rebuild_teacher_cache: bool = False
    compare: bool = False
    strict: bool = False
    track: tuple[str, ...] = ()
    push: str | None = None
    push_dry_run: bool = False
    moved_inputs: Collection[str] = ()


def start_training(
    command: str,
    resolved: Resolved,
    output: Path,
    listener: Listener,
    options: TrainOptions,
    recipe_file: str | None = None,
    notes: Iterable[str] = (),
) -> TrainResult:
    """Run a training recipe into ``output`` and return its result. command: "sft" or "distill".

    recipe_file: the recipe's file or shipped name, which an overwrite must not remove. notes: reported first.
    Raises DistillmError.
    """
    if resolved.recipe.disco.enabled:
        for flag, is_given in (
            ("--compare", options.compare),
            ("--rebuild-teacher-cache", options.rebuild_teacher_cache),
            ("--track", bool(options.track)),
        ):
            if is_given:
                raise embeddings_error(flag)
    # Checked before rows are read, which takes longer.
    check_trackers(options.track)
    check_push(options.push, dry_run=options.push_dry_run)
    is_new = output_dir.check_output(output, resume=options.resume, overwrite=options.overwrite)
    output_dir.check_shared(output)
    if options.overwrite:
        from distillm_cli.runs.inputs import check_overwrite

        check_overwrite(command, resolved.recipe, output, file=recipe_file)
    rows = (
        nullcontext() if resolved.recipe.disco.enabled else prefetch_rows(resolved.recipe)
    )  # sentences are read later
    with output_dir.claimed(output, is_new=is_new), rows as prefetcher:
        for note in notes:
            listener(Note(note))
        from distillm_cli.runs.train import train  # imports torch, while the rows are read and tokenized

        result = train(command, resolved, output, listener, options, prefetcher)
        if options.push is not None:
            address = push_output(output, options.push, listener, dry_run=options.push_dry_run)
            result = replace(result, pushed=address)
        return result


def embeddings_error(flag: str) -> UsageError:
    """Return the error for an option that is only for models of tokens."""
    what = f"{flag} does not apply to sentence embeddings (method disco)"
    return UsageError("usage.exclusive_options", what, hint=f"drop {flag}, or choose another method")


def warm_teacher_cache(
    resolved: Resolved, listener: Listener, *, rebuild: bool = False, notes: Iterable[str] = ()
) -> TeacherCacheResult:
    """Compute the recipe's teacher cache on disk, unless it exists. notes: reported first."""
    if resolved.recipe.disco.enabled:
        raise embeddings_error("--warm-teacher-cache")
    with prefetch_rows(resolved.recipe) as prefetcher:
        for note in notes:
            listener(Note(note))
        from distillm_cli.runs.cache_planning import warm_cache

        return warm_cache(resolved, listener, rebuild=rebuild, prefetcher=prefetcher)


def prefetch_rows(recipe: Recipe) -> Prefetcher:
    """Return the prefetcher of the recipe's rows, which starts once it is entered."""
    return Prefetcher(recipe.data_of("student"), partial(_tokenizer_file, recipe), recipe.needs_responses)


def tokenizer_candidates(recipe: Recipe) -> list[tuple[str, str | None]]:
    """Return (path, revision) of the models that may have the tokenizer of the run, the most likely first.

    Empty if the recipe names a tokenizer, if the student is built (its tokenizer depends on whether the teacher's can
    be saved), or if other processes tokenize.
    """
    if recipe.student.tokenizer is not None or recipe.student.is_built or recipe.data.workers:
        return []
    return [(model.path, model.revision) for model in (recipe.student, recipe.teacher) if model.path is not None]


def _tokenizer_file(recipe: Recipe) -> Path | None:
    from distillm_cli.models.model_paths import cached_hub_file, locate_model

    for path, revision in tokenizer_candidates(recipe):
        try:
            name, local = locate_model(path)
        except ModelError:  # reported when the model is loaded, after earlier errors
            continue
        file = Path(name) / "tokenizer.json" if local else cached_hub_file(name, "tokenizer.json", revision)
        if file is not None and file.is_file():
            return file
    return None
