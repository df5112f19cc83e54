"""Find the models and rows that a recipe names, prefetch the rows, and check that starting over spares them all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from distillm_cli.config.load import locate
from distillm_cli.config.pipeline_recipe import Training, inputs
from distillm_cli.config.schema import Recipe, StudentConfig, TeacherConfig
from distillm_cli.config.shortcuts import flag_of
from distillm_cli.data.prefetch import Prefetcher
from distillm_cli.data.sources import local_place
from distillm_cli.errors import ModelError, UsageError
from distillm_cli.models.places import CONFIG, base_in, cached
from distillm_cli.models.places import locate as locate_model
from distillm_cli.runs import output_dir


def is_data(key: str) -> bool:
    """Whether a field names rows; else what it names is a model or a tokenizer."""
    return key.startswith(("data.", "eval."))


def place_of(key: str, text: str) -> Path | None:
    """The file or directory that a field's text stands for; None where there is none: a name of the hub, `builtin`."""
    place = local_place(text) if is_data(key) else Path(text).expanduser()
    return None if place is None or text == "builtin" or not place.exists() else place


def check_spared(verb: str, recipe: Recipe, output: Path, *, file: str | None = None) -> None:
    """Raises UsageError where starting anew in ``output`` would remove or replace what the run reads.

    file: the recipe's own, or its shipped name. Real places are compared, whatever leads to them.
    """
    gone = {_real(path) for path in output_dir.written(output)}
    for said, read in _reads(verb, recipe, file):
        if any(path in gone or not gone.isdisjoint(path.parents) for path in map(_real, read)):
            raise UsageError(
                f"starting anew in {output} would remove what the run reads",
                where=said,
                hint="choose another --output, or copy it elsewhere first",
            )


def _real(path: Path) -> Path:
    """Return where links lead. Of one that leads to itself, its own place: ``Path.resolve`` would raise."""
    return Path(os.path.realpath(path))


def _reads(verb: str, recipe: Recipe, file: str | None) -> Iterator[tuple[str, list[Path]]]:
    """What a run reads: as it may be typed, and the paths that it needs for it."""
    if file is not None:
        yield f"--recipe {file}", [locate(file)]
    for key, text in inputs(Training(verb=verb), recipe):
        place, flag = place_of(key, text), flag_of(key, verb)
        said = f"{flag} {text}" if flag else f"{key} = {text}"
        if place is None:
            continue
        if is_data(key):  # of a directory, its rows alone are read, and those are in no file of ours
            yield said, [place]
            continue
        for model in _with_bases(place):
            yield said if model == place else f"{said}, an adapter of {model}", [model, *_files(model)]


def _with_bases(place: Path) -> Iterator[Path]:
    """A model's place; of an adapter also that of the model it belongs to, which may be an adapter again."""
    seen: set[Path] = set()
    while place.exists() and place not in seen:
        yield place
        seen.add(place)
        if not (place / CONFIG).is_file():
            return
        place = Path(base_in(place / CONFIG)[0]).expanduser()


def _files(place: Path) -> list[Path]:
    return list(place.iterdir()) if place.is_dir() else []


def prefetcher_of(recipe: Recipe) -> Prefetcher:
    """Return the prefetcher of the recipe's rows, which starts once it is entered."""
    return Prefetcher(recipe.data, partial(_tokenizer_file, recipe), recipe.needs_responses)


def tokenizer_candidates(recipe: Recipe) -> list[StudentConfig | TeacherConfig]:
    """Return the models that the run's tokenizer most likely comes from: the student, else the teacher.

    None where the recipe names a tokenizer, where the student is built (its tokenizer may be trained), and where worker
    processes tokenize.
    """
    if recipe.student.tokenizer is not None or recipe.student.is_built or recipe.data.workers:
        return []
    return [model for model in (recipe.student, recipe.teacher) if model.path is not None]


def _tokenizer_file(recipe: Recipe) -> Path | None:
    for model in tokenizer_candidates(recipe):
        try:
            name, local = locate_model(model.path)
        except ModelError:  # reported when the model is loaded, after whatever else is wrong before that
            continue
        file = Path(name) / "tokenizer.json" if local else cached(name, "tokenizer.json", model.revision)
        if file is not None and file.is_file():
            return file
    return None
