"""Implement related systems, one file each, that train something beside the student's objective (``losses.extra``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distillm_cli.config.schema import Recipe
    from distillm_cli.losses.extra import Extra
    from distillm_cli.models.backbone import Backbone
    from distillm_cli.models.pair import Pair


def build_extras(recipe: Recipe, pair: Pair) -> dict[str, Extra]:
    """Return the extras of a recipe by name. Their modules are imported only if a recipe uses them."""
    extras: dict[str, Extra] = {}
    teacher = None if recipe.method == "sft" else pair.teacher
    seed = recipe.train.seed
    if recipe.data.mixup:
        from distillm_cli.extras.mixkd import MixKD

        _check_embeddings(pair.student, teacher)
        extras["mixkd"] = MixKD(
            teacher,
            recipe.mixkd,
            alpha=recipe.data.mixup,
            seed=seed,
            is_encoder_decoder=pair.student.is_encoder_decoder,
            context=min((m.context for m in (pair.student, teacher) if m and m.context), default=None),
            per_sequence=teacher is not None and recipe.objective.reduction == "sequence",
        )
    if teacher is None:
        return extras
    if recipe.okd.rank is not None and teacher is not None:
        from distillm_cli.extras.okd import OKD

        extras["okd"] = OKD(teacher, recipe.okd, seed=seed)
    return extras


def _check_embeddings(*models: Backbone | None) -> None:
    """Raise ModelError for a model that cannot run on input embeddings."""
    for model in models:
        if model is not None:
            model.check_embeddings()
