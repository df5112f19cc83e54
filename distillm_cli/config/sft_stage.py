"""Derive the recipe of the fine-tuning that a student gets before it is distilled."""

from __future__ import annotations

from typing import Any

from distillm_cli.config.explain import leaves
from distillm_cli.config.load import Resolved, nested
from distillm_cli.config.methods import METHODS
from distillm_cli.config.ownership import has, value_of
from distillm_cli.config.schema import Recipe

_WHY = "student.sft_epochs"


def sft_before(resolved: Resolved) -> Resolved | None:
    """Return the stage that ``student.sft_epochs`` asks for, as `distillm sft` would run it; None where it asks for none.

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
    kept = {
        key: value_of(recipe, key)
        for key in resolved.origin
        if not key.startswith(("objective.", "schedule."))  # fine-tuning uses nothing of them
    }
    values = kept | {key: value for key, (value, _) in changed.items()}
    made = Recipe.model_validate(nested(values))
    reasons = {key: resolved.origin[key] for key in kept} | {key: why for key, (_, why) in changed.items()}
    origin = {key: reasons.get(key, "default") for key in leaves() if has(made, key)}
    former = {key: was for key, was in resolved.former.items() if key in kept and key not in changed}
    return Resolved(made, origin, former, name=resolved.name)
