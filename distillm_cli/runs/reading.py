"""What of a run can begin before torch is imported: its rows, and their token ids by a tokenizer's file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distillm_cli.data.early import Early
from distillm_cli.errors import ModelError

if TYPE_CHECKING:
    from distillm_cli.config.schema import Recipe, StudentConfig, TeacherConfig


def reading(recipe: Recipe) -> Early:
    """The recipe's rows on their way, once the context is entered."""
    return Early(recipe.data, partial(_tokenizer_file, recipe), recipe.needs_responses)


def bringers(recipe: Recipe) -> list[StudentConfig | TeacherConfig]:
    """The models that most likely bring the run's tokenizer, the likeliest first: the student, the teacher for one without.

    No model where it is asked for by name or tried out on the way (a built student's is, whether it comes back as it was),
    and where processes of their own tokenize.
    """
    if recipe.student.tokenizer is not None or recipe.student.is_built or recipe.data.workers:
        return []
    return [model for model in (recipe.student, recipe.teacher) if model.path is not None]


def _tokenizer_file(recipe: Recipe) -> Path | None:
    from distillm_cli.models.model_paths import cached_hub_file, locate_model

    for model in bringers(recipe):
        try:
            name, local = locate_model(model.path)
        except ModelError:  # told when the model is loaded, after whatever else is wrong before that
            continue
        file = Path(name) / "tokenizer.json" if local else cached_hub_file(name, "tokenizer.json", model.revision)
        if file is not None and file.is_file():
            return file
    return None
