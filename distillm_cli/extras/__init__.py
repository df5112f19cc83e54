"""Implement related systems, one file each, that train something beside the student's objective (``losses.extra``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distillm_cli.config.schema import Recipe
    from distillm_cli.losses.extra import Extra
    from distillm_cli.models.pair import Pair

MASK_STAGE = "mask"  # name of the stage that learns the masks of RobustKD, and of its directory
MASK_FILE = "mask.safetensors"


def build_extras(recipe: Recipe, pair: Pair, stages: Mapping[str, Path]) -> dict[str, Extra]:
    """Return the extras of a recipe by name. Their modules are imported only if a recipe uses them.

    stages: the directories of the finished stages before the run, by name.
    """
    extras: dict[str, Extra] = {}
    if recipe.method == "sft":
        return extras
    teacher = pair.teacher
    if recipe.okd.rank is not None and teacher is not None:
        from distillm_cli.extras.okd import OKD

        extras["okd"] = OKD(teacher, recipe.okd, seed=recipe.train.seed)
    if recipe.robustkd.blocks and teacher is not None:
        from distillm_cli.extras.robustkd import RobustKD, read_masks

        masks = read_masks(stages[MASK_STAGE])
        extras["robustkd"] = RobustKD(teacher, pair.student, masks, recipe.robustkd, seed=recipe.train.seed)
    return extras
