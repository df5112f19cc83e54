"""Implement related systems, one file each, that train something beside the student's objective (``losses.extra``)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distillm_cli.config.student_spec import copies_layers
from distillm_cli.errors import ModelError
from distillm_cli.training.events import Listener, Note, silent

if TYPE_CHECKING:
    from distillm_cli.config.schema import Recipe
    from distillm_cli.losses.extra import Extra
    from distillm_cli.models.pair import Pair

MASK_STAGE = "mask"  # name of the stage that learns the masks of RobustKD, and of its directory
MASK_FILE = "mask.safetensors"


def build_extras(
    recipe: Recipe, pair: Pair, stages: Mapping[str, Path], listener: Listener = silent
) -> dict[str, Extra]:
    """Return the extras of a recipe by name. Their modules are imported only if a recipe uses them.

    stages: the directories of the finished stages before the run, by name.
    """
    extras: dict[str, Extra] = {}
    teacher = None if recipe.method == "sft" else pair.teacher
    seed = recipe.train.seed
    per_sequence = teacher is not None and recipe.objective.reduction == "sequence"
    if recipe.train.adversarial != "none":
        from distillm_cli.extras.adversarial import Adversarial
        from distillm_cli.losses.attacks import Attack

        attack = Attack(recipe.train.adversarial, recipe.train.adversarial_radius, recipe.train.adversarial_steps)
        extras["adversarial"] = Adversarial(attack, per_sequence=per_sequence)
    if recipe.data.mixup:
        from distillm_cli.extras.mixkd import MixKD

        extras["mixkd"] = MixKD(
            teacher,
            recipe.mixkd,
            alpha=recipe.data.mixup,
            seed=seed,
            is_encoder_decoder=pair.student.is_encoder_decoder,
            context=min((m.context for m in (pair.student, teacher) if m and m.context), default=None),
            per_sequence=per_sequence,
        )
    if teacher is None:
        return extras
    if recipe.okd.rank is not None:
        from distillm_cli.extras.okd import OKD

        extras["okd"] = OKD(teacher, recipe.okd, seed=seed)
    if recipe.ctcd.enabled:
        import torch

        from distillm_cli.extras.ctcd import CTCD
        from distillm_cli.models.devices import resolve_dtype
        from distillm_cli.models.pair import rebuild_teacher

        dtype = resolve_dtype(recipe.student.dtype, teacher.device)
        extras["ctcd"] = CTCD(
            teacher,
            recipe.ctcd,
            tokenizer=pair.tokenizer,
            rebuild=partial(rebuild_teacher, recipe, pair),
            matmul_dtype=None if dtype == torch.float32 else dtype,
        )
    if recipe.robustkd.blocks:
        from distillm_cli.extras.robustkd import RobustKD, read_masks

        masks = read_masks(stages[MASK_STAGE])
        extras["robustkd"] = RobustKD(teacher, pair.student, masks, recipe.robustkd, seed=seed)
    if recipe.objective.hidden:
        from distillm_cli.extras.hidden_states import HiddenStates

        weight = recipe.objective.hidden
        extras["hidden"] = HiddenStates(teacher, pair.student, recipe.hidden, weight=weight, seed=seed)
    if recipe.objective.input_gradient:
        from distillm_cli.extras.kdiga import KDIGA

        space = _gradient_space(recipe, pair)
        listener(
            Note(f"input gradients: space {space}; attention without fused kernels, which have no second derivative")
        )
        extras["kdiga"] = KDIGA(
            teacher,
            recipe.kdiga,
            weight=recipe.objective.input_gradient,
            seed=seed,
            vocab=None if space == "shared" else pair.vocab,
        )
    return extras


def check_extras(recipe: Recipe, pair: Pair) -> None:
    """Raise ModelError or UsageError if the recipe's extras cannot work with these models, before anything is trained."""
    models = [pair.student] if recipe.train.adversarial != "none" or recipe.data.mixup else []
    if recipe.runs_teacher_on_embeddings:
        models = [*pair.models.values()]
    for model in models:
        model.check_embeddings()
    if recipe.objective.hidden and pair.teacher is not None:
        from distillm_cli.extras.hidden_states import matched_pairs
        from distillm_cli.models.blocks import blocks_of

        matched_pairs(recipe.hidden.layers, len(blocks_of(pair.student)), len(blocks_of(pair.teacher)))
    if recipe.objective.input_gradient and pair.teacher is not None:
        from distillm_cli.extras.kdiga import check_second_derivative

        _gradient_space(recipe, pair)
        check_second_derivative(pair.student)


def _gradient_space(recipe: Recipe, pair: Pair) -> str:
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
    return space
