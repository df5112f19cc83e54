"""Find what a run can read before torch is imported: its rows and the file of its tokenizer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distillm_cli.data.prefetch import Prefetcher
from distillm_cli.errors import ModelError

if TYPE_CHECKING:
    from distillm_cli.config.schema import Recipe, StudentConfig, TeacherConfig


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
    from distillm_cli.models.places import cached, locate

    for model in tokenizer_candidates(recipe):
        try:
            name, local = locate(model.path)
        except ModelError:  # reported when the model is loaded, after whatever else is wrong before that
            continue
        file = Path(name) / "tokenizer.json" if local else cached(name, "tokenizer.json", model.revision)
        if file is not None and file.is_file():
            return file
    return None
