"""Implement related systems, one file each, that train something beside the student's objective (``losses.extra``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distillm_cli.config.student_spec import copies_layers
from distillm_cli.errors import ModelError
from distillm_cli.training.events import Listener, Note, silent

if TYPE_CHECKING:
    from distillm_cli.config.schema import Recipe
    from distillm_cli.losses.extra import Extra
    from distillm_cli.models.backbone import Backbone
    from distillm_cli.models.pair import Pair


def build_extras(recipe: Recipe, pair: Pair, listener: Listener = silent) -> dict[str, Extra]:
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
    if recipe.objective.input_gradient:
        from distillm_cli.extras.kdiga import KDIGA

        _check_embeddings(pair.student, teacher)
        space = gradient_space(recipe, pair, listener)
        extras["kdiga"] = KDIGA(
            teacher,
            recipe.kdiga,
            weight=recipe.objective.input_gradient,
            seed=seed,
            vocab=None if space == "shared" else pair.vocab,
        )
    return extras


def gradient_space(recipe: Recipe, pair: Pair, listener: Listener) -> str:
    """Return the space in which input gradients are compared: "shared" or "swap". Raises ModelError for other widths."""
    assert pair.teacher is not None
    student, teacher = (m.model.get_input_embeddings().weight.shape[1] for m in (pair.student, pair.teacher))
    space = recipe.kdiga.space
    if space == "auto":
        space = "shared" if copies_layers(recipe.student.path) and student == teacher else "swap"
    if space == "shared" and student != teacher:
        raise ModelError(
            "model.different_widths",
            f"input embeddings of student and teacher have widths {student:,} and {teacher:,}",
            where="kdiga.space shared compares their gradients",
            hint="try --set kdiga.space=swap",
        )
    listener(Note(f"input gradients: space {space}; attention without fused kernels, which have no second derivative"))
    return space


def _check_embeddings(*models: Backbone | None) -> None:
    """Raise ModelError for a model that cannot run on input embeddings."""
    for model in models:
        if model is not None:
            model.check_embeddings()
