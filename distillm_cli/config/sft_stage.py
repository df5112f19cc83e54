"""Recipes that follow from another: the fine-tuning that a student gets before it is distilled."""

from __future__ import annotations

from typing import Any

from distillm_cli.config.load import Resolved
from distillm_cli.config.methods import METHODS
from distillm_cli.config.schema import Recipe

_WHY = "student.sft_epochs"


def sft_before(resolved: Resolved) -> Resolved | None:
    """The stage that ``student.sft_epochs`` asks for, as `distillm sft` would run it; None where it asks for none.

    The same student, rows and seed; method sft's preset, ``sft_epochs`` epochs at ``sft_lr``, validated and saved after
    each, the best by validation loss.
    """
    recipe = resolved.recipe
    student = recipe.student
    if not student.sft_epochs:
        return None
    changed: dict[str, tuple[Any, str]] = {key: (value, "method sft") for key, value in METHODS["sft"].preset.items()}
    changed |= {
        "method": ("sft", _WHY),
        "train.epochs": (student.sft_epochs, _WHY),
        "train.steps": (None, _WHY),
        "train.eval_steps": ("epoch", _WHY),
        "train.save_steps": ("epoch", _WHY),
        "train.patience": (None, _WHY),
        "train.lr": (recipe.train.lr, resolved.origin["train.lr"])
        if student.sft_lr is None
        else (student.sft_lr, "student.sft_lr"),
        "student.save_dtype": ("fp32", _WHY),  # distillation goes on from these very weights
        "student.sft_epochs": (type(student).model_fields["sft_epochs"].default, _WHY),
        "student.sft_lr": (None, _WHY),
    }
    untouched = Recipe.model_fields
    nested = recipe.model_dump()
    for section in ("objective", "schedule"):  # fine-tuning reads nothing of them
        nested[section] = untouched[section].default.model_dump()
        changed |= {
            f"{section}.{name}": (value, "default")
            for name, value in nested[section].items()
            if f"{section}.{name}" not in changed
        }
    for key, (value, _) in changed.items():
        *sections, name = key.split(".")
        place = nested
        for section in sections:
            place = place[section]
        place[name] = value
    origin = resolved.origin | {key: why for key, (_, why) in changed.items()}
    former = {key: was for key, was in resolved.former.items() if key not in changed}
    return Resolved(Recipe.model_validate(nested), origin, former, name=resolved.name)
