"""Find the local models and rows that a recipe names, and protect them from ``--overwrite``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from distillm_cli.config.load import locate
from distillm_cli.config.pipeline_recipe import StageConfig, inputs
from distillm_cli.config.schema import Recipe
from distillm_cli.config.shortcuts import flag_of
from distillm_cli.config.student_spec import BUILTIN_MODELS
from distillm_cli.data.sources import local_path
from distillm_cli.errors import UsageError
from distillm_cli.models.model_paths import ADAPTER_CONFIG, read_base_model
from distillm_cli.runs import output_dir
from distillm_cli.training.distributed import in_first_process


def names_rows(key: str) -> bool:
    """Return whether a field names rows; the other inputs are models and tokenizers."""
    return key.startswith(("data.", "eval."))


def local_input(key: str, text: str) -> Path | None:
    """Return the file or directory that a field names; None for a hub name and for what this package ships."""
    if text in BUILTIN_MODELS:
        return None
    place = local_path(text) if names_rows(key) else Path(text).expanduser()
    return place if place is not None and place.exists() else None


@in_first_process
def check_overwrite(verb: str, recipe: Recipe, output: Path, *, file: str | None = None) -> None:
    """Raise UsageError if an overwrite of ``output`` would remove or replace inputs of the run.

    file: path or shipped name of the recipe. Paths are compared after links are resolved.
    """
    removed = {_real_path(path) for path in output_dir.written(output)}
    for name, read in _reads(verb, recipe, file):
        if any(path in removed or not removed.isdisjoint(path.parents) for path in map(_real_path, read)):
            raise UsageError(
                "usage.output_is_input",
                f"starting over in {output} would remove an input of the run",
                where=name,
                hint="choose another --output, or copy it elsewhere first",
            )


def _real_path(path: Path) -> Path:
    """Return the path with links resolved. ``Path.resolve`` would raise for a link to itself."""
    return Path(os.path.realpath(path))


def _reads(verb: str, recipe: Recipe, file: str | None) -> Iterator[tuple[str, list[Path]]]:
    """Yield the inputs of a run: a name for messages, and the paths."""
    if file is not None:
        yield f"--recipe {file}", [locate(file)]
    for key, text in inputs(StageConfig(verb=verb), recipe):
        place, flag = local_input(key, text), flag_of(key, verb)
        name = f"{flag} {text}" if flag else f"{key} = {text}"
        if place is None:
            continue
        if names_rows(key):  # the files in it need no check: a run writes no rows
            yield name, [place]
            continue
        for model in _with_bases(place):
            yield name if model == place else f"{name}, an adapter of {model}", [model, *_files(model)]


def _with_bases(place: Path) -> Iterator[Path]:
    """Yield a model's path, and for an adapter that of its base model, which may be an adapter too."""
    seen: set[Path] = set()
    while place.exists() and place not in seen:
        yield place
        seen.add(place)
        if not (place / ADAPTER_CONFIG).is_file():
            return
        place = Path(read_base_model(place / ADAPTER_CONFIG)[0]).expanduser()


def _files(place: Path) -> list[Path]:
    return list(place.iterdir()) if place.is_dir() else []
